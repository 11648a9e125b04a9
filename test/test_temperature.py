"""Temperatures: found where they are known, and folded in without a change of any label."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from waste_seg_ros.data.sample import Sample
from waste_seg_ros.models import build_model
from waste_seg_ros.runtime import export
from waste_seg_ros.runtime.backends import load_backend
from waste_seg_ros.runtime.bundle import load_model, open_bundle, save_bundle
from waste_seg_ros.train import temperature as module
from waste_seg_ros.train.temperature import Temperatures, calibrate_bundle, fit_temperatures, fold

CLASSES = ("paper", "bottle", "can")
SIZE = (64, 48)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = build_model("enet", "semantic", CLASSES, width=0.25).eval()
    return save_bundle(tmp_path_factory.mktemp("b") / "plain", model, input_size=SIZE)


def samples(bundle, temperature, count=12):
    """Labels drawn by chance with the network's own probabilities at a temperature."""
    random = np.random.default_rng(0)
    model = load_model(bundle)
    manifest = bundle.manifest
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (manifest.mean, manifest.std))
    for _ in range(count):
        image = random.integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
        with torch.inference_mode():
            x = torch.from_numpy(image[None]).permute(0, 3, 1, 2) / 255
            outputs = model((x - mean) / std)
        item = torch.sigmoid(outputs["binary"][0, 0] / temperature.binary).numpy()
        logits = outputs["semantic"][0, 1:].numpy() / temperature.semantic
        # The largest of logits with Gumbel noise is a draw from their softmax.
        kind = 1 + (logits + random.gumbel(size=logits.shape)).argmax(axis=0)
        labels = np.where(random.random(item.shape) < item, kind, 0).astype(np.uint8)
        labels[:4], labels[4:6] = 255, 254
        yield Sample(image, labels, np.zeros(labels.shape, np.uint16), "drawn")


def test_the_temperature_that_labels_were_drawn_at_is_found(bundle):
    for truth in (Temperatures(0.2, 0.4), Temperatures(0.1, 0.1)):
        found = fit_temperatures(bundle, samples(bundle, truth))
        assert found.binary == pytest.approx(truth.binary, rel=0.1)
        assert found.semantic == pytest.approx(truth.semantic, rel=0.1)


def test_logits_are_divided_by_what_is_folded_in(bundle):
    x = torch.randn(1, 3, SIZE[1], SIZE[0])
    model = load_model(bundle)
    with torch.inference_mode():
        before = model(x)
    fold(model, Temperatures(0.5, 4.0))
    with torch.inference_mode():
        after = model(x)
    torch.testing.assert_close(after["binary"], before["binary"] * 2)
    torch.testing.assert_close(after["semantic"], before["semantic"] / 4)


def test_a_calibrated_bundle_gives_the_same_labels_with_other_scores(bundle, tmp_path):
    new, found = calibrate_bundle(bundle, samples(bundle, Temperatures(0.2, 0.4)), tmp_path / "new")
    image = np.random.default_rng(5).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
    old, sure = (load_backend(b, "onnxruntime", threads=1).predict(image) for b in (bundle, new))
    assert (old.labels == sure.labels).mean() > 0.999
    assert sure.scores.mean() > old.scores.mean() + 0.01
    manifest = open_bundle(tmp_path / "new").manifest
    assert manifest.parent == bundle.reference and not manifest.metrics
    assert manifest.training["temperatures"]["binary"] == pytest.approx(found.binary, abs=1e-3)


def test_data_without_truth_are_refused(bundle):
    image = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    nothing = Sample(image, np.full(image.shape[:2], 255, np.uint8), np.zeros(image.shape[:2], int))
    with pytest.raises(ValueError, match="no pixels"):
        fit_temperatures(bundle, [nothing])


def test_the_command_writes_a_calibrated_bundle(bundle, tmp_path, capsys, monkeypatch):
    def command(*words):
        parser = argparse.ArgumentParser()
        export.add_arguments(parser)
        return export.run(parser.parse_args(words))

    monkeypatch.setattr(module, "PIXELS", 500)
    words = ("--bundle", str(bundle.path), "--calibrate", "synthetic:3:2:64x48")
    assert command(*words, "--output", str(tmp_path / "c")) == 0
    assert "logits divided by" in capsys.readouterr().out
    assert "temperatures" in open_bundle(tmp_path / "c").manifest.training
    assert command(*words, "--output", str(tmp_path / "c")) == 1
    assert "exists" in capsys.readouterr().err
    assert command(*words[:3], "synthetic:3", "--output", str(tmp_path / "d")) == 1
    assert "synthetic:3" in capsys.readouterr().err
