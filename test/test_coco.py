"""Readers of annotated photographs, on files written by the tests."""

from __future__ import annotations

import json
import struct

import cv2
import numpy as np
import pytest

from waste_seg_ros.data.folder import FolderDataset, regions
from waste_seg_ros.data.sources import read_categories

pycocotools_mask = pytest.importorskip(
    "pycocotools.mask", reason="reading COCO files needs pycocotools (requirements-dev.txt)"
)
coco = pytest.importorskip("waste_seg_ros.data.coco")
CocoDataset = coco.CocoDataset

WIDTH, HEIGHT = 40, 30
CATEGORIES = [{"id": 3, "name": "bottle"}, {"id": 7, "name": "paper"}]


def write_image(path, width=WIDTH, height=HEIGHT):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2] = (10, 20, 200)  # BGR: red on the left
    assert cv2.imwrite(str(path), image)


def box(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def annotation(identity, segmentation, category=3, image=1, **more):
    return {
        "id": identity,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": 0,
        **more,
    }


@pytest.fixture
def dataset(tmp_path):
    """Write a COCO file with one image, unless told otherwise, and read it."""

    def build(annotations, images=None, categories=CATEGORIES, mapping=None, **options):
        if images is None:
            images = [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}]
            write_image(tmp_path / "images" / "a.png")
        path = tmp_path / "annotations.json"
        path.write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
        return CocoDataset(path, tmp_path / "images", mapping, **options)

    return build


def expected(*areas):
    """(y0, y1, x0, x1, label) drawn in order."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    for y0, y1, x0, x1, label in areas:
        labels[y0:y1, x0:x1] = label
    return labels


def test_polygon_covers_the_pixels_it_encloses(dataset):
    (sample,) = dataset([annotation(1, [box(5, 10, 20, 25)])])
    np.testing.assert_array_equal(sample.labels, expected((10, 25, 5, 20, 2)))
    np.testing.assert_array_equal(sample.instances, (sample.labels > 0).astype(np.uint16))
    assert sample.labels.dtype == np.uint8 and sample.instances.dtype == np.uint16
    assert sample.name == "a.png"


def test_image_is_rgb(dataset):
    (sample,) = dataset([])
    assert sample.image[0, 0].tolist() == [200, 20, 10]
    assert not sample.labels.any() and not sample.instances.any()


def test_several_polygons_are_one_item(dataset):
    (sample,) = dataset([annotation(1, [box(2, 2, 8, 8), box(20, 2, 30, 8)])])
    np.testing.assert_array_equal(sample.labels, expected((2, 8, 2, 8, 2), (2, 8, 20, 30, 2)))
    assert sample.instances.max() == 1


def test_run_lengths_in_both_forms(dataset):
    mask = expected((3, 9, 4, 30, 1))
    mask[5, 17] = 0
    compressed = pycocotools_mask.encode(np.asfortranarray(mask))
    columns = mask.T.ravel()
    edges = np.flatnonzero(np.diff(columns)) + 1
    lengths = np.diff([0, *edges, len(columns)]).tolist()
    for counts in (compressed["counts"].decode(), lengths):
        (sample,) = dataset([annotation(1, {"size": [HEIGHT, WIDTH], "counts": counts})])
        np.testing.assert_array_equal(sample.labels, mask * 2)


@pytest.mark.parametrize("seed", range(5))
def test_compressed_run_lengths_against_pycocotools(seed):
    random = np.random.default_rng(seed)
    mask = np.zeros((300, 200), np.uint8)
    for _ in range(int(random.integers(0, 12))):
        center = tuple(int(v) for v in random.integers(0, 300, 2))
        cv2.circle(mask, center, int(random.integers(2, 60)), int(random.integers(0, 2)), -1)
    encoded = pycocotools_mask.encode(np.asfortranarray(mask))
    encoded["counts"] = encoded["counts"].decode()
    np.testing.assert_array_equal(coco.decode_mask(encoded, 200, 300), mask > 0)


def test_run_lengths_may_begin_with_the_item(dataset):
    counts = [0, WIDTH * HEIGHT]
    (sample,) = dataset([annotation(1, {"size": [HEIGHT, WIDTH], "counts": counts})])
    assert (sample.labels == 2).all()


def test_smaller_item_is_in_front_whatever_the_order(dataset):
    large, small = [box(0, 0, 30, 30)], [box(10, 10, 15, 15)]
    want = expected((0, 30, 0, 30, 2), (10, 15, 10, 15, 1))
    for order in ((large, small), (small, large)):
        entries = [annotation(i, seg, 7 if seg is small else 3) for i, seg in enumerate(order, 1)]
        (sample,) = dataset(entries)
        np.testing.assert_array_equal(sample.labels, want)
        assert sorted(np.unique(sample.instances)) == [0, 1, 2]


def test_hidden_items_leave_no_gap_in_the_ids(dataset):
    (sample,) = dataset(
        [
            annotation(1, [box(10, 10, 15, 15)]),
            annotation(2, [box(10, 10, 15, 15)], 7),
            annotation(3, [box(20, 20, 35, 28)]),
        ]
    )
    assert sorted(np.unique(sample.instances)) == [0, 1, 2]


def test_crowd_has_no_truth_and_lies_behind(dataset):
    (sample,) = dataset(
        [annotation(1, [box(0, 0, 5, 5)]), annotation(2, [box(0, 0, 20, 20)], iscrowd=1)]
    )
    np.testing.assert_array_equal(sample.labels, expected((0, 20, 0, 20, 255), (0, 5, 0, 5, 2)))
    np.testing.assert_array_equal(sample.instances > 0, sample.labels == 2)
    (sample,) = dataset(
        [annotation(1, [box(0, 0, 20, 20)]), annotation(2, [box(0, 0, 5, 5)], iscrowd=1)]
    )
    np.testing.assert_array_equal(sample.labels, expected((0, 20, 0, 20, 2)))


def test_categories_are_mapped(dataset):
    categories = [
        {"id": 1, "name": "Non-Contamination"},
        {"id": 2, "name": "contamination"},
        {"id": 3, "name": "PET"},
        {"id": 4, "name": "shoe"},
        {"id": 5, "name": "smear"},
        {"id": 6, "name": "rail"},
        {"id": 7, "name": "nylon"},
    ]
    entries = [annotation(i, [box(5 * i - 5, 0, 5 * i, 10)], category=i) for i in range(1, 8)]
    data = dataset(
        entries,
        categories=categories,
        mapping={"PET": "bottle", "smear": "ignore", "rail": "background"},
    )
    (sample,) = data
    assert sample.labels[5, 2::5][:7].tolist() == [2, 254, 2, 254, 255, 0, 4]
    assert data.unmapped == ["shoe"]
    assert sample.instances.max() == 5


def test_a_map_to_no_class_is_refused(dataset):
    with pytest.raises(ValueError, match="'PET' is mapped to 'botle'"):
        dataset([], mapping={"PET": "botle"})


def test_map_from_a_file(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("PET: bottle\nshoe: other\n")
    assert read_categories(path) == {"PET": "bottle", "shoe": "other"}
    path.write_text("- PET\n")
    with pytest.raises(ValueError, match=r"map\.yaml"):
        read_categories(path)


def test_images_in_subfolders_and_a_choice_of_them(tmp_path, dataset):
    images = []
    for index, name in enumerate(("x/a.png", "y/b.png", "c.png"), 1):
        write_image(tmp_path / "images" / name)
        images.append({"id": index, "file_name": name, "width": WIDTH, "height": HEIGHT})
    entries = [annotation(i, [box(0, 0, 5 * i, 5)], image=i) for i in (1, 2, 3)]
    assert dataset(entries, images).names == ("x/a.png", "y/b.png", "c.png")
    data = dataset(entries, images, only={"y/b.png"})
    assert data.names == ("y/b.png",) and not data.problems
    assert (data[0].labels > 0).sum() == 50
    with pytest.raises(ValueError, match=r"such as z\.png"):
        dataset(entries, images, only={"z.png"})


BROKEN = [
    (annotation(1, []), "annotation 1 has no segmentation"),
    (annotation(1, [[1, 2, 3, 4]]), "three or more points"),
    (annotation(1, [[1, 2, 3, 4, 5, 6, 7]]), "three or more points"),
    (annotation(1, [["a", 2, 3, 4, 5, 6]]), "three or more points"),
    (annotation(1, [[1, 2, 3, 4, 5, 1e12]]), "far outside"),
    (annotation(1, 17), "segmentation is a int"),
    (annotation(1, {"size": [WIDTH, HEIGHT], "counts": [1200]}), "run lengths are of size"),
    (annotation(1, {"size": [HEIGHT, WIDTH], "counts": [5, 5]}), "do not add up"),
    (annotation(1, {"size": [HEIGHT, WIDTH], "counts": [-5, 1205]}), "do not add up"),
    (annotation(1, {"size": [HEIGHT, WIDTH], "counts": "zzz~"}), "run lengths"),
    (annotation(1, {"size": [HEIGHT, WIDTH], "counts": "\u00e4"}), "characters"),
    (annotation(1, [box(0, 0, 5, 5)], category=99), "category 99"),
    (annotation(1, [box(0, 0, 5, 5)], image=99), "image 99"),
]


@pytest.mark.parametrize(("entry", "message"), BROKEN)
def test_a_broken_annotation_is_named_and_passed_over(dataset, entry, message):
    data = dataset([entry, annotation(2, [box(10, 10, 15, 15)])])
    samples = list(data)
    np.testing.assert_array_equal(samples[0].labels, expected((10, 15, 10, 15, 2)))
    assert len(data.problems) == 1 and message in data.problems[0]
    list(data)
    assert len(data.problems) == 1  # not again at the second reading


@pytest.mark.parametrize(("entry", "message"), BROKEN)
def test_a_broken_annotation_raises_if_strict(dataset, entry, message):
    with pytest.raises(ValueError, match=message):
        list(dataset([entry], strict=True))


def test_broken_images_are_named_and_passed_over(tmp_path, dataset):
    write_image(tmp_path / "images" / "good.png")
    write_image(tmp_path / "images" / "turned.png", HEIGHT, WIDTH)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "secret.png").write_bytes(b"")
    names = ("good.png", "turned.png", "broken.jpg", "missing.png", "../secret.png")
    images = [
        {"id": index, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for index, name in enumerate(names)
    ]
    data = dataset([], images)
    assert [sample.name for sample in data] == ["good.png"]
    text = "\n".join(data.problems)
    assert len(data.problems) == 4
    assert "turned.png: is 30x40" in text and "EXIF" in text
    assert "broken.jpg: is not an image" in text
    assert "missing.png: no such file" in text
    assert "../secret.png: not inside" in text


def write_turned(path, orientation=6):
    """A JPEG whose EXIF orientation says to turn it: 6 by a quarter, 3 by a half."""
    write_image(path)
    plain = path.read_bytes()
    # One entry: tag 0x0112 (orientation), a short.
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    segment = b"Exif\0\0" + tiff
    exif = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    path.write_bytes(plain[:2] + exif + plain[2:])


def test_exif_orientation_is_not_applied(tmp_path, dataset):
    path = tmp_path / "images" / "a.jpg"
    write_turned(path)
    assert cv2.imread(str(path)).shape[:2] == (WIDTH, HEIGHT)  # others do turn it
    images = [{"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}]
    (sample,) = dataset([annotation(1, [box(0, 0, 5, 5)])], images)
    assert sample.image.shape == (HEIGHT, WIDTH, 3)


def test_sets_annotated_on_turned_pictures_are_read_upright(tmp_path, dataset):
    write_turned(tmp_path / "images" / "quarter.jpg")
    write_turned(tmp_path / "images" / "half.jpg", 3)
    images = [
        {"id": 1, "file_name": "quarter.jpg", "width": HEIGHT, "height": WIDTH},
        {"id": 2, "file_name": "half.jpg", "width": WIDTH, "height": HEIGHT},
    ]
    # Red, on the left as stored, is above after a turn by 90 degrees clockwise, right after 180.
    entries = [
        annotation(1, [box(0, 0, HEIGHT, WIDTH // 2)], image=1),
        annotation(2, [box(WIDTH // 2, 0, WIDTH, HEIGHT)], image=2),
    ]
    data = dataset(entries, images, upright=True)
    for sample in data:
        inside = sample.image[sample.labels == 2].astype(int).mean(0)
        outside = sample.image[sample.labels == 0].astype(int).mean(0)
        assert inside[0] > 180 and outside[0] < 20, sample.name
    assert not data.problems and data[0].image.shape == (WIDTH, HEIGHT, 3)
    # Read as stored, the one of another size is named with the mend.
    plain = dataset(entries, images)
    assert plain.names == ("half.jpg",)
    assert "quarter.jpg: is 40x30" in plain.problems[0] and "coco-upright:" in plain.problems[0]


def test_what_is_broken_is_known_when_the_set_is_opened(tmp_path, dataset):
    for name in ("good.png", "cut.png", "turned.png"):
        write_image(tmp_path / "images" / name)
    path = tmp_path / "images" / "cut.png"
    path.write_bytes(path.read_bytes()[:-20])
    images = [
        {"id": "one", "file_name": "good.png", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "cut.png"},
        {"id": 3, "file_name": "turned.png", "width": HEIGHT, "height": WIDTH},
        {"id": 4, "file_name": "good.png", "width": "wide", "height": 3},
        {"id": [5], "file_name": "good.png"},
        {"id": 6, "file_name": 7},
        "image",
    ]
    entries = [
        annotation(1, [box(0, 0, 5, 5)], image="one"),
        annotation(2, [[1, 2]], image="one"),
        annotation(3, [box(0, 0, 5, 5)], image=["one"]),
        annotation(4, [box(0, 0, 5, 5)], image="one", category={}),
        None,
    ]
    data = dataset(entries, images, categories=[*CATEGORIES, {"id": 9}, 5])
    problems = list(data.problems)
    assert [sample.name for sample in data] == ["good.png"]
    assert len(problems) == 12 and data.problems == problems
    text = "\n".join(problems)
    for part in (
        "cut.png: is cut short",
        "turned.png: is 40x30, but annotations.json says 30x40",
        "its width and height are no numbers",
        "annotation 2 of good.png: a polygon needs",
        "annotation 4 is of category None",
        "annotation None is no object",
    ):
        assert part in text


def test_crowds_in_run_lengths(dataset):
    counts = [0, HEIGHT * 10, HEIGHT * (WIDTH - 10)]  # the ten columns on the left
    crowd = {"size": [HEIGHT, WIDTH], "counts": counts}
    (sample,) = dataset([annotation(1, crowd, iscrowd=1), annotation(2, [box(5, 5, 15, 15)])])
    want = expected((0, HEIGHT, 0, 10, 255), (5, 15, 5, 15, 2))
    np.testing.assert_array_equal(sample.labels, want)


def test_ids_that_other_tools_write(tmp_path, dataset):
    write_image(tmp_path / "images" / "a.png")
    images = [{"image_id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}]
    whole = {"image_id": 1, "category_id": 3, "segmentation": [box(0, 0, 5, 5)]}
    broken = {"image_id": 1, "category_id": 3, "segmentation": []}
    data = dataset([whole, broken], images)
    assert (data[0].labels == 2).sum() == 25
    assert data.problems == ["annotation at place 1 has no segmentation"]


def test_files_that_are_not_coco_are_named(tmp_path):
    path = tmp_path / "x.json"
    for content, message in (
        ("{", "not JSON"),
        ("[]", "images"),
        ('{"images": []}', "annotations"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            CocoDataset(path, tmp_path)
    with pytest.raises(OSError, match=r"no\.json"):
        CocoDataset(tmp_path / "no.json", tmp_path)


# --- folders


def write_pair(root, name, labels, instances=None):
    write_image(root / "images" / f"{name}.png")
    for folder, ids in (("masks", labels), ("instances", instances)):
        if ids is not None:
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(root / folder / f"{name}.png"), ids)


def test_folder_of_pairs(tmp_path):
    labels = expected(
        (0, 5, 0, 5, 1), (10, 15, 0, 5, 1), (20, 25, 20, 30, 255), (0, 9, 30, 40, 254)
    )
    write_pair(tmp_path, "b/one", labels)
    data = FolderDataset(tmp_path)
    (sample,) = data
    assert len(data) == 1 and sample.name == "b/one.png"
    assert sample.image[0, 0].tolist() == [200, 20, 10]
    np.testing.assert_array_equal(sample.labels, labels)
    assert sorted(np.unique(sample.instances)) == [0, 1, 2, 3]
    assert not sample.instances[labels == 255].any()


def test_folder_with_instances(tmp_path):
    labels = expected((0, 10, 0, 10, 2))
    instances = np.zeros((HEIGHT, WIDTH), np.uint16)
    instances[0:10, 0:5], instances[0:10, 5:12] = 300, 301
    write_pair(tmp_path, "one", labels, instances)
    (sample,) = FolderDataset(tmp_path)
    assert sorted(np.unique(sample.instances)) == [0, 300, 301]
    assert (sample.instances[0:10, 10:12] == 0).all()  # the label says background


def test_folder_names_what_is_broken(tmp_path):
    write_pair(tmp_path, "good", expected((0, 5, 0, 5, 1)))
    write_pair(tmp_path, "label", expected((0, 5, 0, 5, 9)))
    write_pair(tmp_path, "size", np.zeros((10, 10), np.uint8))
    color = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    color[..., 2] = 128
    write_pair(tmp_path, "color", color)
    write_image(tmp_path / "images" / "lonely.png")
    data = FolderDataset(tmp_path)
    assert [sample.name for sample in data] == ["good.png"]
    text = "\n".join(data.problems)
    assert len(data.problems) == 4
    for part in ("label 9", "10x10", "single-channel", "lonely.png: has no mask"):
        assert part in text
    with pytest.raises(ValueError, match="lonely"):
        FolderDataset(tmp_path, strict=True)


def test_a_folder_without_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder images"):
        FolderDataset(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(ValueError, match="no image"):
        FolderDataset(tmp_path)


def test_regions_part_labels_and_places():
    labels = expected((0, 5, 0, 5, 1), (0, 5, 5, 10, 2), (10, 15, 0, 5, 1))
    ids = regions(labels)
    assert sorted(np.unique(ids)) == [0, 1, 2, 3]
    assert len(np.unique(ids[labels == 1])) == 2
