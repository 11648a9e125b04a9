"""The Cityscapes layout, on a tree of a few small scenes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import pytest

from waste_seg_ros.data.cityscapes import CITYSCAPES, LABEL_IDS, THINGS, CityscapesDataset
from waste_seg_ros.data.sources import open_data

WIDTH, HEIGHT = 64, 48


def write_scene(root, city, number, labels, instances=None, split="train"):
    stem = f"{city}_{number:06d}_000019"
    image = np.zeros((*labels.shape, 3), np.uint8)
    image[..., 2] = labels  # red in RGB
    for kind, end, pixels in (
        ("leftImg8bit", "leftImg8bit", image),
        ("gtFine", "gtFine_labelIds", labels),
        ("gtFine", "gtFine_instanceIds", instances),
    ):
        if pixels is not None:
            path = root / kind / split / city / f"{stem}_{end}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(path), pixels)


def street():
    """labelIds and instanceIds: sky over road, two cars, a group of cars, void at the bottom."""
    labels = np.full((HEIGHT, WIDTH), LABEL_IDS["road"], np.uint8)
    labels[:16] = LABEL_IDS["sky"]
    labels[40:] = 1  # ego vehicle
    labels[20:30, 4:24] = labels[20:30, 40:60] = LABEL_IDS["car"]
    instances = labels.astype(np.uint16)
    instances[20:30, 4:14], instances[20:30, 14:24] = 26000, 26001
    return labels, instances


def test_label_ids_become_the_nineteen_classes(tmp_path):
    write_scene(tmp_path, "ulm", 1, *street())
    data = CityscapesDataset(tmp_path, "train")
    (sample,) = data
    assert sample.name == "ulm/ulm_000001_000019"
    assert sample.image.shape == (HEIGHT, WIDTH, 3) and sample.image[0, 0].tolist() == [23, 0, 0]
    assert len(CITYSCAPES) == 19 and data.classes == CITYSCAPES
    # trainId + 1: road 0, sky 10, car 13.
    assert sample.labels[35, 0] == 1 and sample.labels[0, 0] == 11 and sample.labels[25, 50] == 14
    assert (sample.labels[40:] == 255).all()
    assert (sample.labels != 0).all()
    assert sample.labels.dtype == np.uint8 and sample.instances.dtype == np.uint16


def test_every_label_id_is_known_and_all_others_have_no_truth(tmp_path):
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[0, :34], labels[0, 34] = np.arange(34), 255  # 255: a licence plate
    write_scene(tmp_path, "ulm", 1, labels)
    (sample,) = CityscapesDataset(tmp_path, "train")
    # As in the benchmark's own table of labels.
    train_ids = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10}
    train_ids |= {24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    want = [train_ids[k] + 1 if k in train_ids else 255 for k in range(34)]
    assert sample.labels[0, :34].tolist() == want
    assert sample.labels[0, 34] == 255


def test_items_are_those_of_things(tmp_path):
    labels, instances = street()
    write_scene(tmp_path, "ulm", 1, labels, instances)
    data = CityscapesDataset(tmp_path, "train")
    (sample,) = data
    assert {CITYSCAPES[label - 1] for label in data.things} == set(THINGS)
    assert THINGS == ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    assert sorted(np.unique(sample.instances)) == [0, 1, 2]
    assert (sample.instances[20:30, 4:14] == 1).all() and (
        sample.instances[20:30, 14:24] == 2
    ).all()
    # The group keeps its class but is no item, and neither is what is no thing.
    assert (sample.instances[20:30, 40:60] == 0).all() and (sample.labels[20:30, 40:60] == 14).all()
    assert (sample.instances[labels != 26] == 0).all()


def test_without_instance_ids_each_region_is_an_item(tmp_path):
    write_scene(tmp_path, "ulm", 1, street()[0])
    (sample,) = CityscapesDataset(tmp_path, "train")
    assert sorted(np.unique(sample.instances)) == [0, 1, 2]
    assert len(np.unique(sample.instances[20:30, 4:24])) == 1
    assert (sample.instances[sample.labels != 14] == 0).all()


def test_a_scene_full_of_one_item(tmp_path):
    labels = np.full((HEIGHT, WIDTH), 26, np.uint8)
    write_scene(tmp_path, "ulm", 1, labels, np.full((HEIGHT, WIDTH), 26003, np.uint16))
    (sample,) = CityscapesDataset(tmp_path, "train")
    assert (sample.instances == 1).all()


def test_a_choice_of_classes_has_the_others_as_unknown_items(tmp_path):
    write_scene(tmp_path, "ulm", 1, *street())
    data = open_data(f"cityscapes:{tmp_path}:train", ("car", "road"))
    (sample,) = data
    assert sample.labels[25, 50] == 1 and sample.labels[35, 0] == 2 and sample.labels[0, 0] == 254
    assert data.things == {1}


def test_what_is_broken_is_named_and_passed_over(tmp_path):
    labels, instances = street()
    write_scene(tmp_path, "ulm", 1, labels, instances)
    write_scene(tmp_path, "bonn", 2, labels, instances)
    write_scene(tmp_path, "bonn", 3, np.full((HEIGHT, WIDTH), 77, np.uint8))
    write_scene(tmp_path, "bonn", 4, labels[:20])
    cut = tmp_path / "leftImg8bit/train/bonn/bonn_000002_000019_leftImg8bit.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    image = cut.with_name("bonn_000004_000019_leftImg8bit.png")
    assert cv2.imwrite(str(image), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    lonely = cut.with_name("bonn_000005_000019_leftImg8bit.png")
    assert cv2.imwrite(str(lonely), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    data = CityscapesDataset(tmp_path, "train")
    assert [sample.name for sample in data] == ["ulm/ulm_000001_000019"]
    text = "\n".join(data.problems)
    assert len(data.problems) == 4
    for part in (
        "bonn_000002_000019_leftImg8bit.png: is cut short",
        "bonn_000003_000019_gtFine_labelIds.png: holds the labelId 77",
        "bonn_000004_000019_gtFine_labelIds.png: is 64x20, its image 64x48",
        "bonn_000005_000019_gtFine_labelIds.png: no such file",
    ):
        assert part in text
    with pytest.raises(ValueError, match="cut short"):
        CityscapesDataset(tmp_path, "train", strict=True)


def test_another_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leftImg8bit/SPLIT/CITY"):
        CityscapesDataset(tmp_path, "train")
    write_scene(tmp_path, "ulm", 1, *street())
    with pytest.raises(ValueError, match="splits here: train"):
        CityscapesDataset(tmp_path, "val")
    (tmp_path / "leftImg8bit" / "test").mkdir()
    (tmp_path / "gtFine" / "test").mkdir()
    with pytest.raises(ValueError, match="no CITY"):
        CityscapesDataset(tmp_path, "test")


def test_evaluation_counts_no_background(tmp_path):
    pytest.importorskip("tqdm", reason="evaluation needs tqdm (requirements-dev.txt)")
    from waste_seg_ros.train.evaluate import evaluate

    write_scene(tmp_path, "ulm", 1, *street())

    @dataclass(frozen=True, eq=False)
    class Found:
        labels: np.ndarray
        scores: np.ndarray
        centers: np.ndarray | None = None
        offsets: np.ndarray | None = None

    def oracle(image):
        labels = np.zeros(image.shape[:2], np.uint8)
        for label, name in enumerate(CITYSCAPES, 1):
            labels[image[..., 0] == LABEL_IDS[name]] = label
        labels[:8] = 9  # half of the sky is taken for vegetation
        return Found(labels, np.ones(labels.shape, np.float32))

    data = open_data(f"cityscapes:{tmp_path}:train", CITYSCAPES)
    result = evaluate(oracle, data, head="semantic", classes=CITYSCAPES)
    assert result["iou"]["road"] == result["iou"]["car"] == 1.0
    assert result["iou"]["sky"] == pytest.approx(0.5)
    assert math.isnan(result["iou"]["background"]) and math.isnan(result["iou"]["train"])
    assert result["miou"] == pytest.approx(2.5 / 3)


def test_a_network_is_trained_on_it(tmp_path):
    torch = pytest.importorskip("torch", reason="training needs torch")
    from waste_seg_ros.train.loop import TrainConfig, read_run, train

    write_scene(tmp_path, "ulm", 1, *street())
    write_scene(tmp_path, "ulm", 2, *street(), split="val")
    config = TrainConfig(
        width=0.25,
        heads=("semantic", "instance"),
        classes=CITYSCAPES,
        data=(f"cityscapes:{tmp_path}:train",),
        validation=f"cityscapes:{tmp_path}:val",
        sizes=("64x48",),
        batch=2,
        steps=2,
        workers=0,
    )
    result = train(config, tmp_path / "run", quiet=True)
    assert result.finished and {"iou/road", "iou/traffic light"} <= set(result.figures)
    model = read_run(tmp_path / "run")[1]
    assert model.classes == CITYSCAPES
    assert model(torch.zeros(1, 3, 48, 64))["semantic"].shape[1] == 20
