"""Data by a line of text, and the mixing of several."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from fractions import Fraction

import cv2
import numpy as np
import pytest

from waste_seg_ros.data import photographs
from waste_seg_ros.data.photographs import check_image, read_ids, read_image
from waste_seg_ros.data.sample import CLASSES, DataError, Sample, rename_labels
from waste_seg_ros.data.sources import (
    Mixture,
    open_data,
    read_categories,
    read_names,
    split_weight,
    tell_problems,
)
from waste_seg_ros.data.synthetic import synthetic_sample

CATEGORIES = ("resortit", "taco", "zerowaste")


def write_folder(root, count, size=(40, 30)):
    """A folder data set whose image k has red k + 1 and one item of label 1."""
    labels = np.zeros(size[::-1], np.uint8)
    labels[5:15, 5:15] = 1
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for k in range(count):
        image = np.zeros((*labels.shape, 3), np.uint8)
        image[..., 2] = k + 1
        assert cv2.imwrite(str(root / "images" / f"{k:03d}.png"), image)
        assert cv2.imwrite(str(root / "masks" / f"{k:03d}.png"), labels)
    return f"folder:{root}"


def write_coco(root, names=("a.png", "b.png")):
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for k, name in enumerate(names, 1):
        assert cv2.imwrite(str(root / "images" / name), np.full((30, 40, 3), 10 * k, np.uint8))
        images.append({"id": k, "file_name": name, "width": 40, "height": 30})
        box = [0, 0, 10, 0, 10, 10, 0, 10]
        entry = {"id": k, "image_id": k, "category_id": 1, "segmentation": [box]}
        annotations.append(entry)
    categories = [{"id": 1, "name": "Drink can"}]
    path = root / "a.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return f"coco:{path}:{root / 'images'}"


def test_labels_are_renamed_by_class_name():
    labels = np.array([[0, 1, 2, 3, 254, 255]], np.uint8)
    renamed = rename_labels(labels, ("paper", "bottle", "glass"), ("bottle", "paper"))
    assert renamed.tolist() == [[0, 2, 1, 254, 254, 255]]
    assert rename_labels(labels, CLASSES, CLASSES) is labels


# --- specifications


def test_the_synthetic_line():
    data = open_data("synthetic:7:3:160x120")
    samples = list(data)
    assert len(data) == len(samples) == 3
    assert samples[0].image.shape == (120, 160, 3) and samples[2].name == "synthetic:7:2"
    # Its own size stands; where it has none, the one that is asked for.
    assert data.sample(1, (64, 48)).image.shape == (120, 160, 3)
    expected = synthetic_sample(7, 2, (64, 48))
    assert np.array_equal(open_data("synthetic:7:3").sample(2, (64, 48)).image, expected.image)
    assert open_data("synthetic:7:3", size=(64, 48))[0].image.shape == (48, 64, 3)
    with pytest.raises(IndexError):
        data.sample(3)


def test_data_without_end():
    data = open_data("synthetic:7", size=(64, 48))
    assert len(data) == 0
    names = [sample.name for sample in itertools.islice(data, 4)]
    assert names == [f"synthetic:7:{k}" for k in range(4)]
    with pytest.raises(DataError, match="no end; say how many: synthetic:7:100"):
        open_data("synthetic:7", finite=True)


def test_labels_follow_the_classes_that_are_asked_for(tmp_path):
    plain = open_data("synthetic:7:2", size=(160, 120))[0].labels
    turned = open_data("synthetic:7:2", ("nylon", "paper"), size=(160, 120))
    assert turned.classes == ("nylon", "paper")
    labels = turned[0].labels
    assert np.array_equal(labels == 1, plain == 4) and np.array_equal(labels == 2, plain == 1)
    assert np.array_equal(labels == 254, (plain == 2) | (plain == 3)) and (labels == 254).any()


def test_folders_and_coco(tmp_path):
    assert len(open_data(write_folder(tmp_path / "f", 3))) == 3
    spec = write_coco(tmp_path / "c")
    data = open_data(spec)
    assert [sample.name for sample in data] == ["a.png", "b.png"]
    assert data[0].labels[5, 5] == 3 and data.sample(1, (999, 9)).image.shape == (30, 40, 3)
    mapped = open_data(spec, categories={"drink can": "other"})
    assert mapped[0].labels[5, 5] == 254
    names = tmp_path / "folds.json"
    names.write_text('{"one": ["b.png"], "two": []}')
    assert [s.name for s in open_data(f"{spec}:{names}:one")] == ["b.png"]
    assert [s.name for s in open_data(f"{spec}:{names}:one", only={"a.png"})] == ["a.png"]
    lines = tmp_path / "names.txt"
    lines.write_text("a.png\n")
    assert [s.name for s in open_data(f"{spec}:{lines}")] == ["a.png"]


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "synthetic",
        "synthetic:",
        "synthetic:a:3",
        "synthetic:1:2:3",
        "synthetic:1:2:3x",
        "synthetic:-1",
        "coco:x",
        "coco::x",
        "folder:",
        "cityscapes:x",
        "video:a.mp4",
    ],
)
def test_what_is_not_understood_is_told_with_what_would_be(spec):
    with pytest.raises(DataError, match=r"must be synthetic:SEED.*coco:.*folder:.*cityscapes:"):
        open_data(spec)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="has no folder images"):
        open_data(f"folder:{tmp_path}")
    with pytest.raises(DataError, match=r"no\.json: No such file"):
        open_data(f"coco:{tmp_path / 'no.json'}:{tmp_path}")
    with pytest.raises(DataError, match=r"names\.txt: No such file"):
        open_data(f"coco:{tmp_path / 'a.json'}:{tmp_path}:{tmp_path / 'names.txt'}")
    with pytest.raises(DataError, match="32 to 4096"):
        open_data("synthetic:1:1:9999x20")


def test_lists_of_names(tmp_path):
    path = tmp_path / "folds.json"
    path.write_text('{"a": ["x.jpg"], "b": ["y.jpg", "z.jpg"]}')
    assert read_names(f"{path}:b") == {"y.jpg", "z.jpg"}
    with pytest.raises(DataError, match="'c'; it has a, b"):
        read_names(f"{path}:c")
    lines = tmp_path / "names.txt"
    lines.write_text("x.jpg\n\ny.jpg\n")
    assert read_names(str(lines)) == {"x.jpg", "y.jpg"}
    lines.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a text file"):
        read_names(str(lines))


# --- maps of categories


@pytest.mark.parametrize("name", CATEGORIES)
def test_the_maps_that_come_along_lead_to_the_default_classes(name):
    mapping = read_categories(name)
    assert set(mapping.values()) <= {*CLASSES, "other"}
    assert len({key.lower() for key in mapping}) == len(mapping)
    for label in CLASSES:
        assert label in mapping.values(), label


def test_maps_by_name_and_file(tmp_path):
    assert read_categories("zerowaste")["rigid_plastic"] == "bottle"
    assert read_categories("taco")["Drink can"] == "aluminum"
    path = tmp_path / "map.yaml"
    path.write_text("PET: bottle\n3: other\n")
    assert read_categories(path) == {"PET": "bottle", "3": "other"}
    for text, message in (
        ("- PET", "must map"),
        ("PET: 3", "must map"),
        ("PET: [", "not YAML"),
        ("!!python/object/apply:os.system [ls]", "not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_categories(path)
    with pytest.raises(DataError, match="by name: resortit, taco, zerowaste"):
        read_categories("cocos")
    with pytest.raises(DataError, match=r"no\.yaml: No such file"):
        read_categories(tmp_path / "no.yaml")


def test_a_map_may_name_a_default_class_that_the_network_lacks(tmp_path):
    data = open_data(write_coco(tmp_path), ("bottle",), categories="taco")
    assert data[0].labels[5, 5] == 254 and not data.unmapped
    with pytest.raises(DataError, match="mapped to 'tin'"):
        open_data(write_coco(tmp_path / "b"), categories={"Drink can": "tin"})


# --- mixing


def test_weights():
    assert split_weight("folder:a@2") == ("folder:a", 2)
    assert split_weight("synthetic:1:5@0.25") == ("synthetic:1:5", Fraction(1, 4))
    assert split_weight("folder:me@home") == ("folder:me@home", 1)
    assert split_weight("folder:photos@2@1") == ("folder:photos@2", 1)
    with pytest.raises(DataError, match="above 0"):
        split_weight("synthetic:1@0")
    assert len(open_data("synthetic:1:5@3")) == 5


def sources_of(mixture, numbers):
    return [mixture.locate(number)[0] for number in numbers]


def test_sources_take_turns_by_their_weights():
    one, two = open_data("synthetic:1"), open_data("synthetic:2")
    assert sources_of(Mixture([one, two]), range(6)) == [0, 1, 0, 1, 0, 1]
    assert sources_of(Mixture([one, two], [3, 1]), range(8)) == [0, 0, 1, 0, 0, 0, 1, 0]
    assert sources_of(Mixture([one, two], [0.3, 0.1]), range(8)) == [0, 0, 1, 0, 0, 0, 1, 0]
    many = Mixture([one, two, one], [Fraction("2.5"), 1, Fraction("0.5")])
    assert Counter(sources_of(many, range(8000))) == {0: 5000, 1: 2000, 2: 1000}
    # Any few in a row are mixed, so that each batch is.
    for first in range(16):
        assert set(sources_of(many, range(first, first + 8))) == {0, 1, 2}
    with pytest.raises(DataError, match="rounder"):
        Mixture([one, two], [1, 0.00001])


def test_no_sample_of_a_source_is_left_out_or_taken_twice():
    mixture = Mixture([open_data("synthetic:1"), open_data("synthetic:2")], [3, 2])
    places = {0: [], 1: []}
    for number in range(500):
        source, place = mixture.locate(number)
        places[source].append(place)
    assert places == {0: list(range(300)), 1: list(range(200))}


def test_samples_follow_from_seed_and_number_alone(tmp_path):
    specs = (write_folder(tmp_path, 7) + "@2", "synthetic:4:3@1")

    def names(mixture, numbers):
        return [mixture.sample(number, (64, 48)).name for number in numbers]

    ahead = names(Mixture.open(specs, seed=3), range(40))
    assert names(Mixture.open(specs, seed=3), range(25, 40)) == ahead[25:]
    assert names(Mixture.open(specs, seed=3), reversed(range(40))) == ahead[::-1]
    assert names(Mixture.open(specs, seed=4), range(40)) != ahead


def test_a_source_with_an_end_is_seen_whole_in_every_round(tmp_path):
    mixture = Mixture.open([write_folder(tmp_path, 6)], seed=0)
    seen = [mixture.sample(number).name for number in range(12)]
    assert sorted(seen[:6]) == sorted(seen[6:]) == [f"{k:03d}.png" for k in range(6)]
    assert seen[:6] != seen[6:]


def test_images_that_cannot_be_read_do_not_end_a_run(tmp_path, caplog):
    spec = write_folder(tmp_path, 4)
    for k in (1, 2):  # sound at both ends, so that only decoding tells
        path = tmp_path / "images" / f"{k:03d}.png"
        data = bytearray(path.read_bytes())
        data[60:70] = bytes(10)
        path.write_bytes(bytes(data))
    mixture = Mixture.open([spec])
    # The level is named because NNCF, once used in this process, raises that of all handlers.
    with caplog.at_level(logging.WARNING):
        seen = {mixture.sample(number).name for number in range(40)}
    assert seen == {"000.png", "003.png"}
    assert sum("001.png" in r.message for r in caplog.records) == 1  # told once
    with pytest.raises(DataError, match=r"00[12]\.png"):
        strict = Mixture.open([spec], strict=True)
        for number in range(4):
            strict.sample(number)
    for k in (0, 3):
        (tmp_path / "images" / f"{k:03d}.png").unlink()
    with pytest.raises(DataError, match="none of its 4 images"):
        mixture.sample(0)


def test_problems_of_all_sources_are_known_when_they_are_opened(tmp_path):
    spec = write_folder(tmp_path / "f", 3)
    (tmp_path / "f/masks/001.png").unlink()
    (tmp_path / "f/images/002.png").write_bytes(b"")
    mixture = Mixture.open([spec, write_coco(tmp_path / "c")])
    assert len(mixture.problems) == 2
    lines = tell_problems(mixture.problems, shown=1)
    assert lines[0] == "2 broken entries were passed over:"
    assert "001.png: has no mask" in lines[1] and lines[2] == "  ... and 1 more"
    assert tell_problems([]) == []


# --- reading


def photograph(width=64, height=48):
    noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tiff"])
def test_images_are_checked_by_their_ends(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    assert cv2.imwrite(str(path), photograph())
    known = suffix in (".jpg", ".png")
    assert check_image(path) == ((64, 48) if known else None)
    assert read_image(path).shape == (48, 64, 3)
    whole = path.read_bytes()
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        if known:
            with pytest.raises(DataError, match=f"a{suffix}: is cut short"):
                check_image(path)
            with pytest.raises(DataError, match=f"a{suffix}: is cut short"):
                read_image(path)
    path.write_bytes(whole + b"what some phones append")
    assert read_image(path).shape == (48, 64, 3)


def test_the_end_of_a_thumbnail_is_not_that_of_its_picture(tmp_path):
    path = tmp_path / "a.jpg"
    assert cv2.imwrite(str(path), photograph())
    plain = path.read_bytes()
    segment = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\0\0\0\0\0" + b"\xff\xd8\xff\xd9"
    thumbnail = b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment
    path.write_bytes(plain[:2] + thumbnail + plain[2:])
    assert check_image(path) == (64, 48)
    path.write_bytes((plain[:2] + thumbnail + plain[2:])[:-40])
    with pytest.raises(DataError, match="cut short"):
        check_image(path)


def test_files_that_are_no_images_are_named(tmp_path):
    for name, content, message in (
        ("empty.jpg", b"", "is empty"),
        ("text.png", b"no image", "is not an image"),
        ("broken.jpg", b"\xff\xd8\xff\xd9", "is cut short"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: {message}"):
            read_image(path)
    with pytest.raises(DataError, match=r"no\.png: no such file"):
        read_image(tmp_path / "no.png")
    with pytest.raises(DataError, match=r"no\.png: no such file"):
        check_image(tmp_path / "no.png")
    with pytest.raises(DataError, match="Is a directory"):
        read_image(tmp_path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_huge_images_are_refused_with_the_limit(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a{suffix}"
    assert cv2.imwrite(str(path), np.zeros((1500, 2000, 3), np.uint8))
    assert read_image(path).shape == (1500, 2000, 3)
    monkeypatch.setattr(photographs, "MAX_PIXELS", 2_000_000)
    with pytest.raises(DataError, match="is 2000x1500; at most 2 million pixels .* scale it down"):
        read_image(path)


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path):
    # The header of a PNG of 4 gigapixels; nothing of that size is ever made.
    path = tmp_path / "a.png"
    assert cv2.imwrite(str(path), np.zeros((8, 8, 3), np.uint8))
    data = bytearray(path.read_bytes())
    data[16:24] = (65536).to_bytes(4, "big") * 2
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="is 65536x65536; at most 100 million"):
        read_image(path)


def test_ids(tmp_path):
    path = tmp_path / "a.png"
    ids = np.arange(12, dtype=np.uint16).reshape(3, 4) * 1000
    assert cv2.imwrite(str(path), ids)
    assert np.array_equal(read_ids(path), ids) and read_ids(path).dtype == np.int32
    with pytest.raises(DataError, match="is 4x3, its image 3x3"):
        read_ids(path, (3, 3))
    assert cv2.imwrite(str(path), np.dstack([ids % 255] * 3).astype(np.uint8))
    assert np.array_equal(read_ids(path), ids % 255)
    assert cv2.imwrite(str(path), photograph())
    with pytest.raises(DataError, match="colours or a palette"):
        read_ids(path)


# --- training on them


def test_training_takes_every_kind_and_says_what_it_passed_over(tmp_path, capsys):
    pytest.importorskip("torch", reason="training needs torch")
    from waste_seg_ros.cli import main
    from waste_seg_ros.train.loop import TrainConfig, _Batches, read_config, train

    folder = write_folder(tmp_path / "f", 3, (64, 48))
    (tmp_path / "f/masks/001.png").unlink()
    coco = write_coco(tmp_path / "c")
    config = TrainConfig(
        width=0.25,
        heads=("binary",),
        data=(f"{folder}@16", f"{coco}@8", "synthetic:1"),
        validation=coco,
        categories="taco",
        sizes=("64x48",),
        batch=2,
        steps=1,
        workers=0,
    )
    assert train(config, tmp_path / "run").finished
    printed = capsys.readouterr().err
    assert "1 broken entry was passed over" in printed and "001.png: has no mask" in printed
    drawn = Counter(sources_of(_Batches(config).data, range(50)))
    assert drawn == {0: 32, 1: 16, 2: 2}
    assert read_config(tmp_path / "run/config.yaml", TrainConfig()) == config

    words = ["train", "--run", str(tmp_path / "no"), "--steps", "1", "--data", folder]
    assert main([*words, "--strict"]) == 1
    assert "001.png: has no mask" in capsys.readouterr().err
    assert main([*words, "--categories", "nowhere", "--data", coco]) == 1
    assert "categories nowhere: no such file" in capsys.readouterr().err


def test_nothing_of_a_sample_is_shared_between_reads():
    data = open_data("synthetic:7:2", size=(64, 48))
    one = data[0]
    assert isinstance(one, Sample)
    one.labels[:] = 9
    assert not (data[0].labels == 9).any()
