"""Exports to other formats: what is written gives what the bundle gives."""

import json

import numpy as np
import pytest

from waste_seg_ros import cli
from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.runtime import formats
from waste_seg_ros.runtime.backends import as_prediction, load_backend
from waste_seg_ros.runtime.bundle import open_bundle
from waste_seg_ros.runtime.export import FORMATS
from waste_seg_ros.runtime.verify import compare

SIZE = (160, 96)


def export(*arguments):
    return cli.main(["export", *map(str, arguments)])


def about(folder):
    return json.loads((folder / "export.json").read_text())


def test_every_format_has_a_writer():
    assert set(FORMATS) == set(formats.WRITERS)


@pytest.mark.parametrize("name", ["enet-instance", "enet-binary", "enet-instance-int8"])
def test_openvino_ir_gives_what_the_bundle_gives(name, tmp_path, capsys):
    import openvino

    folder = tmp_path / "ir"
    assert export("--bundle", name, "--format", "openvino", "--output", folder) == 0
    assert "openvino of" in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"model.xml", "model.bin", "export.json"}
    compiled = openvino.Core().compile_model(
        str(folder / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    image = synthetic_sample(5, 2, SIZE).image  # not the size it was trained at
    results = compiled([image[None]])
    found = as_prediction([np.copy(results[output]) for output in compiled.outputs])
    bundle = open_bundle(name)
    assert len(about(folder)["outputs"]) == len(compiled.outputs)
    assert about(folder)["bundle"] == bundle.reference
    expected = load_backend(bundle, "openvino", SIZE, 1).predict(image)
    assert compare(found, expected).fits(coarse="int8" in name)


def test_onnx_is_the_bundles_own(tmp_path):
    folder = tmp_path / "onnx"
    assert export("--bundle", "enet-instance", "--format", "onnx", "--output", folder) == 0
    bundle = open_bundle("enet-instance")
    assert (folder / "model.onnx").read_bytes() == (bundle.path / "model.onnx").read_bytes()
    assert about(folder)["classes"] == list(bundle.manifest.classes)
    assert about(folder)["outputs"] == ["labels", "scores", "centers", "offsets"]


def test_an_ir_that_differs_is_not_left_behind(tmp_path, monkeypatch, capsys):
    class Other:
        @staticmethod
        def predict(image):
            found = load_backend(open_bundle("enet-binary"), "onnxruntime", threads=1)
            prediction = found.predict(image)
            prediction.labels[:] ^= 1
            return prediction

    monkeypatch.setattr(formats, "load_backend", lambda *_: Other)
    folder = tmp_path / "ir"
    assert export("--bundle", "enet-binary", "--format", "openvino", "--output", folder) == 1
    assert "same labels on 0.00%" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tensorrt"], "no NVIDIA GPU is found"),
        (["--format", "tensorrt", "--size", "321x240"], "takes multiples of 8"),
        (["--format", "onnx", "--size", "320x240"], "onnx is for all sizes"),
        (["--format", "onnx", "--precision", "f16"], "--precision mean nothing"),
        (["--size", "320x240"], "--size needs --format tensorrt"),
    ],
)
def test_what_cannot_be_exported_is_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "gpu_found", lambda: False)
    words = ["--bundle", "enet-instance", "--output", tmp_path / "new", *arguments]
    assert export(*words) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path, capsys):
    words = ["--bundle", "enet-instance", "--format", "onnx", "--output", tmp_path]
    assert export(*words) == 1
    assert "exists already" in capsys.readouterr().err
