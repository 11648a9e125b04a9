"""Evaluation with predictors whose figures are known."""

from __future__ import annotations

import argparse
import json
import math
import tracemalloc
from dataclasses import dataclass

import cv2
import numpy as np
import pytest

pytest.importorskip("tqdm", reason="evaluation needs tqdm (requirements-dev.txt)")

from waste_seg_ros.data.cityscapes import CITYSCAPES
from waste_seg_ros.data.sample import CLASSES, Sample
from waste_seg_ros.runtime.backends import as_head
from waste_seg_ros.train import evaluate as module
from waste_seg_ros.train.evaluate import (
    add_arguments,
    bundle_predictor,
    evaluate,
    evaluate_model,
    format_report,
    headline,
    instance_classes,
    model_predictor,
    run,
)
from waste_seg_ros.train.plots import draw_confusion, draw_reliability


@dataclass(frozen=True, eq=False)
class FakePrediction:
    labels: np.ndarray
    scores: np.ndarray
    centers: np.ndarray | None = None
    offsets: np.ndarray | None = None


def sample(name, *items, size=(320, 240)):
    """(label, x0, x1, y0, y1) items on a grey belt; the image's red channel holds the labels."""
    labels = np.zeros((size[1], size[0]), np.uint8)
    instances = np.zeros(labels.shape, np.uint16)
    for index, (label, x0, x1, y0, y1) in enumerate(items, 1):
        labels[y0:y1, x0:x1] = label
        instances[y0:y1, x0:x1] = 0 if label == 255 else index
    image = np.full((*labels.shape, 3), 90, np.uint8)
    image[..., 0] = labels
    return Sample(image, labels, instances, name)


def oracle(image):
    """Reads the labels off the image; what it does not know it takes for paper."""
    labels = image[..., 0].copy()
    labels[labels > 4] = 1
    return FakePrediction(labels, np.full(labels.shape, 0.9, np.float32))


def halving_oracle(image):
    height, width = image.shape[:2]
    return oracle(cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_NEAREST))


SCENES = [
    sample("one", (1, 10, 60, 10, 60), (2, 100, 160, 100, 140)),
    sample("two", (4, 200, 240, 20, 60), (3, 50, 90, 150, 200)),
]


@pytest.mark.parametrize("predict", [oracle, halving_oracle])
def test_a_perfect_network_has_perfect_figures(predict):
    result = evaluate(predict, SCENES, head="semantic")
    assert result["frames"] == 2
    for name in ("miou", "miou_foreground", "binary_iou", "pq", "sq", "rq", "item_recall"):
        assert result[name] == 1.0
    assert result["item_precision"] == result["item_naming"] == 1.0
    names = ("pq", "sq", "rq", "ap", "ap50", "ap75")
    assert result["agnostic"] == pytest.approx(dict.fromkeys(names, 1.0))
    for name in ("ap", "ap50", "ap75", "boundary_f", "boundary_f_foreground", "miou_pixels"):
        assert result[name] == pytest.approx(1.0) and headline(result)[name] == 1.0
    # It is always right, and says so at 0.9.
    assert result["ece"] == pytest.approx(0.1) and result["ece_items"] == pytest.approx(0.1)
    assert result["items"] == {"found": 4, "missed": 0, "false": 0}


def test_a_blind_network_misses_everything():
    def blind(image):
        return FakePrediction(
            np.zeros(image.shape[:2], np.uint8), np.ones(image.shape[:2], np.float32)
        )

    result = evaluate(blind, SCENES, head="semantic")
    assert result["binary_iou"] == result["pq"] == result["item_recall"] == 0.0
    assert math.isnan(result["item_precision"])
    assert result["items"]["missed"] == 4
    assert "item_naming" not in headline(result)
    assert json.dumps(headline(result), allow_nan=False)


def test_wrong_class_costs_class_figures_only():
    def colour_blind(image):
        prediction = oracle(image)
        return FakePrediction(np.minimum(prediction.labels, 1), prediction.scores)

    result = evaluate(colour_blind, SCENES, head="semantic")
    assert result["binary_iou"] == result["item_recall"] == 1.0
    assert result["item_naming"] == 0.25
    # Paper: one right and three false, 1 / (1 + 3 / 2); the others nothing.
    assert result["pq"] == pytest.approx(0.4 / 4)
    assert result["per_class"]["bottle"]["missed"] == 1
    assert result["per_class"]["paper"]["false"] == 3


def test_binary_head_has_class_agnostic_figures_only():
    result = evaluate(oracle, SCENES, head="binary")
    assert result["binary_iou"] == result["item_recall"] == 1.0
    assert "miou" not in result and "pq" not in result
    assert "mIoU" not in format_report(result)


def test_unknown_kinds_and_ignored_pixels():
    scene = sample("x", (1, 10, 60, 10, 60), (254, 100, 160, 100, 140), (255, 200, 260, 20, 60))
    result = evaluate(oracle, [scene], head="semantic")
    # What lies on ignored pixels is not false, and the unknown item is found but not named.
    assert result["items"] == {"found": 2, "missed": 0, "false": 0}
    assert result["binary_iou"] == result["miou"] == result["pq"] == 1.0
    assert result["item_naming"] == 1.0


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="no frames"):
        evaluate(oracle, [])
    with pytest.raises(ValueError, match="head"):
        evaluate(oracle, SCENES, head="depth")


def test_report_names_every_class_and_figure():
    text = format_report(evaluate(oracle, SCENES, head="semantic"))
    for word in (*CLASSES, "background", "mIoU with", "mIoU without", "foreground", "PQ", "recall"):
        assert word in text


def test_the_worst_frames_are_drawn_worst_first(tmp_path):
    scenes = [
        sample("good", (1, 10, 60, 10, 60)),
        sample("sub/bad", (5, 10, 60, 10, 60)),  # blind to it, see below
        sample("fair", (1, 10, 60, 10, 60), (5, 100, 140, 100, 140)),
    ]

    def blind_to_five(image):
        prediction = oracle(image)
        prediction.labels[image[..., 0] == 5] = 0
        return prediction

    @dataclass
    class Data:
        classes = (*CLASSES, "glass")

        def __iter__(self):
            return iter(scenes)

    evaluate(blind_to_five, Data(), head="semantic", worst=2, gallery=tmp_path / "g")
    names = sorted(path.name for path in (tmp_path / "g").iterdir())
    assert names == ["01_sub_bad.png", "02_fair.png"]
    sheet = cv2.imread(str(tmp_path / "g" / names[0]))
    assert sheet.shape[1] >= 640 and sheet.shape[0] >= 240


@dataclass
class Street:
    """What Cityscapes' reader gives: no background, 19 classes, items of some of them only."""

    samples: tuple
    classes = CITYSCAPES
    things = frozenset(range(12, 20))

    def __iter__(self):
        return iter(self.samples)


def street(size=(256, 128), cars=3):
    """Road below sky and cars on it, their ids as large as those of Cityscapes."""
    road, sky, car = (CITYSCAPES.index(name) + 1 for name in ("road", "sky", "car"))
    width, height = size
    labels = np.full((height, width), road, np.uint8)
    labels[: height // 3] = sky
    labels[-height // 16 :] = 255
    instances = np.zeros(labels.shape, np.uint16)
    for index in range(cars):
        x0 = width * index // cars
        box = np.s_[height // 2 : height // 2 + height // 8, x0 : x0 + width // cars // 2]
        labels[box], instances[box] = car, 26000 + index
    image = np.repeat(labels[..., None], 3, axis=2)
    return Sample(image, labels, instances, "street")


def street_oracle(image):
    labels = image[..., 0].copy()
    labels[labels > 19] = 1
    return FakePrediction(labels, np.full(labels.shape, 0.9, np.float32))


def test_a_street_has_no_background_and_items_of_things_only():
    scene = street()
    result = evaluate(street_oracle, Street((scene,)), head="semantic", classes=CITYSCAPES)
    # The sixteen classes and the background that are not in the truth do not count.
    seen = {name for name, value in result["iou"].items() if not math.isnan(value)}
    assert seen == {"road", "sky", "car"}
    assert result["miou"] == result["miou_foreground"] == result["miou_pixels"] == 1.0
    # Road and sky are no items: neither found nor false.
    assert result["items"] == {"found": 3, "missed": 0, "false": 0}
    assert result["pq"] == result["agnostic"]["pq"] == 1.0 and result["ap"] == pytest.approx(1.0)

    def takes_sky_for_road(image):
        prediction = street_oracle(image)
        prediction.labels[prediction.labels == 11] = 1
        return prediction

    result = evaluate(takes_sky_for_road, Street((scene,)), head="semantic", classes=CITYSCAPES)
    road = result["iou"]["road"]
    assert 0.4 < road < 0.7 and result["iou"]["sky"] == 0.0
    assert result["miou"] == pytest.approx((road + 0 + 1) / 3)


def test_a_group_of_things_makes_no_item_false():
    scene = street()
    scene.instances[scene.instances == 26001] = 0  # outlined as a group
    result = evaluate(street_oracle, Street((scene,)), head="semantic", classes=CITYSCAPES)
    assert result["items"] == {"found": 2, "missed": 0, "false": 0}
    assert result["miou"] == 1.0 and result["ap"] == pytest.approx(1.0)


def test_large_frames_are_measured_in_bounded_memory():
    scene = street((2048, 1024), cars=20)
    seen = []

    def at_half_size(image):
        seen.append(tracemalloc.get_traced_memory()[0])
        return street_oracle(cv2.resize(image, (1024, 512), interpolation=cv2.INTER_NEAREST))

    tracemalloc.start()
    try:
        result = evaluate(at_half_size, Street((scene,) * 3), head="semantic", classes=CITYSCAPES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    counts = np.array(result["confusion"]["counts"])
    assert counts.sum() == 3 * np.count_nonzero(scene.labels < 255)  # at the images' own size
    assert result["items"]["found"] == 60
    assert peak < 200e6
    assert seen[2] - seen[1] < 1e6  # a frame leaves nothing of its size behind


def test_the_binary_head_confuses_background_and_items():
    scene = sample("x", (1, 0, 100, 0, 100), (254, 100, 200, 0, 100), (255, 200, 300, 0, 100))

    def half(image):
        prediction = oracle(image)
        prediction.labels[50:] = 0
        return prediction

    confusion = evaluate(half, [scene], head="binary")["confusion"]
    assert confusion["names"] == ["background", "item"]
    # 254 is an item, 255 does not count.
    assert confusion["counts"] == [[320 * 240 - 30000, 0], [10000, 10000]]


def test_confusion_is_drawn():
    names = ("background", "paper", "glass")
    chart = draw_confusion([[90, 10, 0], [0, 50, 50], [0, 0, 0]], names)
    assert chart.dtype == np.uint8 and chart.shape[2] == 3
    assert min(chart.shape[:2]) > 150
    # What is right is a dark diagonal.
    right, guessed = draw_confusion(np.eye(3), names), draw_confusion(np.ones((3, 3)), names)
    assert np.count_nonzero(right[..., 0] < 50) > 2 * np.count_nonzero(guessed[..., 0] < 50)
    assert max(draw_confusion(np.eye(20), ("background", *CITYSCAPES)).shape) < 1200
    with pytest.raises(ValueError, match="3 names"):
        draw_confusion([[1]], names)


def test_reliability_is_drawn():
    nothing = [math.nan] * 5
    empty = draw_reliability(nothing, nothing, [0.0] * 5, math.nan)
    sure = draw_reliability([0.1, 0.5, 0.9], [0.1, 0.5, 1.0], [0.2, 0.2, 0.6], 0.06)
    assert empty.shape == sure.shape and (empty != sure).any()
    with pytest.raises(ValueError, match="alike"):
        draw_reliability([0.1], [0.1, 0.2], [0.2], 0.0)


def test_class_of_an_item_is_that_of_most_of_its_pixels():
    scene = sample("x", (1, 10, 60, 10, 60), (254, 100, 160, 100, 140))
    scene.labels[10:20, 10:60] = 255
    assert instance_classes(scene) == {1: 1, 2: 254}


def test_lesser_heads():
    full = FakePrediction(
        np.array([[0, 3]], np.uint8), np.ones((1, 2), np.float32), np.zeros((1, 1)), np.zeros(1)
    )
    assert as_head(full, "instance") is full
    semantic, binary = as_head(full, "semantic"), as_head(full, "binary")
    assert semantic.centers is None and semantic.labels.tolist() == [[0, 3]]
    assert binary.offsets is None and binary.labels.tolist() == [[0, 1]]


def command(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


def test_command_names_what_is_wrong(capsys, tmp_path):
    assert command("--model", str(tmp_path / "none"), "--data", "synthetic:1:1") == 1
    assert "none" in capsys.readouterr().err
    assert command("--model", "x", "--data", "synthetic:1:1", "--worst", "3") == 1
    assert "--gallery" in capsys.readouterr().err


def test_command_reports_and_writes_json(capsys, tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class FakeManifest:
        name: str = "fake"
        head: str = "semantic"
        classes: tuple = CLASSES

    @dataclass(frozen=True)
    class FakeBundle:
        manifest: FakeManifest

    def blind(image):
        return FakePrediction(
            np.zeros(image.shape[:2], np.uint8), np.ones(image.shape[:2], np.float32)
        )

    import waste_seg_ros.runtime.bundle as bundle_module

    monkeypatch.setattr(bundle_module, "open_bundle", lambda name: FakeBundle(FakeManifest()))
    monkeypatch.setattr(module, "bundle_predictor", lambda *_: blind)
    path = tmp_path / "out" / "figures.json"
    words = ("--model", "fake", "--data", "synthetic:7:2", "--json", str(path))
    assert command(*words) == 0
    assert "foreground IoU" in capsys.readouterr().out
    figures = json.loads(path.read_text())
    assert figures["frames"] == 2 and figures["binary_iou"] == 0.0
    assert figures["item_precision"] is None  # nothing was predicted
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]
    assert command(*words, "--output", str(tmp_path / "charts")) == 0
    assert sorted(p.name for p in (tmp_path / "charts").iterdir()) == [
        "figures.json",
        "figures_confusion.png",
        "figures_reliability.png",
    ]
    assert command(*words, "--output", str(tmp_path / "one" / "blind.json")) == 0
    assert (tmp_path / "one" / "blind_confusion.png").is_file()
    assert json.loads((tmp_path / "one" / "blind.json").read_text())["ece"] is not None
    assert command(*words, "--head", "instance") == 1
    assert "semantic" in capsys.readouterr().err


@pytest.fixture(scope="module")
def network():
    torch = pytest.importorskip("torch", reason="networks in training need torch")
    from waste_seg_ros.models import build_model

    torch.set_num_threads(1)  # threads that wait for busy cores take many times as long
    torch.manual_seed(0)
    return build_model("enet", ("binary", "semantic", "instance"), width=0.25)


@pytest.mark.parametrize("head", ["binary", "semantic", "instance"])
def test_a_network_in_training_is_measured_and_goes_on_training(network, head):
    network.train()
    result = evaluate_model(network, SCENES, head)
    assert result["frames"] == 2 and result["head"] == head
    assert 0.0 <= result["binary_iou"] <= 1.0
    assert network.training
    # An image whose sides are no multiples of the stride, and a given input size.
    odd = [sample("odd", (1, 10, 40, 10, 40), size=(101, 75))]
    assert evaluate_model(network, odd, head)["frames"] == 1
    assert evaluate_model(network, odd, head, input_size=(64, 48))["frames"] == 1


def test_a_bundle_is_measured_as_the_network_it_was_saved_from(network, tmp_path, capsys):
    from waste_seg_ros.runtime.bundle import save_bundle

    network.eval()
    bundle = save_bundle(tmp_path / "b", network, head="instance", input_size=(160, 120))
    direct = model_predictor(network, "instance", (160, 120))(SCENES[0].image)
    saved = bundle_predictor(bundle)(SCENES[0].image)
    assert saved.labels.shape == direct.labels.shape == (120, 160)
    # Its random weights leave near ties.
    assert (saved.labels == direct.labels).mean() > 0.95
    # Twice the pixels of another aspect are brought to the bundle's number of pixels.
    assert bundle_predictor(bundle)(np.zeros((200, 640, 3), np.uint8)).labels.shape == (80, 248)
    assert command("--model", str(tmp_path / "b"), "--data", "synthetic:7:2") == 0
    assert "2 frames" in capsys.readouterr().out
