"""Compression: smaller bundles that see the same."""

import sys

import numpy as np
import pytest
import yaml

from waste_seg_ros.cli import main
from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.runtime.backends import BackendError, load_backend
from waste_seg_ros.runtime.bundle import (
    BundleError,
    halve_bundle,
    load_model,
    open_bundle,
    read_manifest,
    read_weights,
    save_bundle,
)
from waste_seg_ros.runtime.listing import bundle_cost
from waste_seg_ros.train.compress import quantize_bundle

SIZE = (160, 120)
CALIBRATION = "synthetic:5:12:160x120"


@pytest.fixture(scope="module")
def parent():
    return open_bundle("enet-instance")


@pytest.fixture(scope="module")
def quantized(parent, tmp_path_factory):
    return quantize_bundle(parent, tmp_path_factory.mktemp("int8") / "small", CALIBRATION)


def labels(bundle, kind, frames):
    backend = load_backend(bundle, kind, SIZE, threads=1)
    return np.stack([backend.predict(frame).labels for frame in frames])


@pytest.fixture(scope="module")
def frames():
    return [synthetic_sample(17, index, SIZE).image for index in range(8)]


@pytest.mark.parametrize("kind", ["openvino", "onnxruntime"])
def test_int8_sees_what_its_parent_sees(kind, parent, quantized, frames):
    pytest.importorskip(kind)
    found, expected = labels(quantized, kind, frames), labels(parent, kind, frames)
    assert (found == expected).mean() > 0.98
    assert not (found == expected).all()  # or nothing was quantized
    assert (found[expected > 0] == expected[expected > 0]).mean() > 0.9


def test_int8_is_a_quarter_and_names_its_parent(parent, quantized):
    manifest = read_manifest(quantized.path / "manifest.yaml")
    assert manifest.precision == "int8"
    assert manifest.parent == parent.reference
    assert quantized.size < parent.size / 4


def test_normalisation_outputs_and_decision_stay_in_float(parent, quantized):
    import onnx

    model = onnx.load(str(quantized.path / "model.onnx"))
    makers = {output: node for node in model.graph.node for output in node.output}
    quantizing = {"QuantizeLinear", "DequantizeLinear"}

    def fed_by(node):
        return {makers[name].op_type for name in node.input if name in makers}

    kept = [
        node
        for node in model.graph.node
        if node.op_type not in quantizing
        and (
            not node.name.startswith("/model/")
            or node.name.startswith(("/model/semantic/", "/model/instance/offsets/"))
            or node.op_type == "Equal"
        )
    ]
    assert {"Conv", "ConvTranspose", "Sigmoid", "Equal", "Exp"} <= {n.op_type for n in kept}
    assert all(not fed_by(node) & quantizing for node in kept if node.op_type != "ConvTranspose")
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    share = np.mean([fed_by(node) == {"DequantizeLinear"} for node in convolutions])
    assert share > 0.9


def test_torch_refuses_int8_and_says_what_would_do(quantized):
    with pytest.raises(BackendError, match="small is int8.*choose openvino or onnxruntime"):
        load_backend(quantized, "torch")
    with pytest.raises(BundleError, match="no weights for torch, only its graph; take enet-inst"):
        load_model(quantized)


def test_half_floats_halve_the_bundle_and_change_nothing_to_see(parent, frames, tmp_path):
    half = halve_bundle(parent, tmp_path / "half")
    assert half.manifest.precision == "f16"
    assert half.size < 0.56 * parent.size
    for key, value in read_weights(parent).items():
        found = read_weights(half)[key]
        assert found.dtype == value.dtype
        assert np.allclose(found.numpy(), value.numpy(), rtol=1e-3, atol=1e-7), key
    for kind in ("openvino", "onnxruntime", "torch"):
        assert (labels(half, kind, frames) == labels(parent, kind, frames)).mean() > 0.999
    with pytest.raises(BundleError, match="is f16; only f32"):
        halve_bundle(half, tmp_path / "quarter")
    # A network is quantized from half floats as well.
    again = quantize_bundle(half, tmp_path / "int8", "synthetic:5:2:160x120")
    assert (labels(again, "openvino", frames) == labels(parent, "openvino", frames)).mean() > 0.95


def test_a_network_is_written_as_half_floats(parent, tmp_path):
    model = load_model(parent)
    bundle = save_bundle(tmp_path / "half", model, input_size=SIZE, precision="f16")
    assert bundle.size < 0.56 * parent.size
    with pytest.raises(BundleError, match="precision 'int8' cannot be written"):
        save_bundle(tmp_path / "int8", model, precision="int8")


def test_export_stores_half_floats(tmp_path, capsys):
    arguments = ["export", "--bundle", "enet-binary", "--precision", "f16"]
    assert main([*arguments, "--output", str(tmp_path / "half")]) == 0
    half = open_bundle(tmp_path / "half")
    assert (half.manifest.precision, half.manifest.metrics) == ("f16", {})
    assert half.manifest.parent == open_bundle("enet-binary").reference
    capsys.readouterr()
    arguments = ["export", "--bundle", str(half.path), "--precision", "f32"]
    assert main([*arguments, "--output", str(tmp_path / "single")]) == 1
    assert "--precision f32: " in capsys.readouterr().err


def test_the_command_says_what_was_lost(parent, tmp_path, capsys):
    arguments = ["compress", "enet-instance", "--int8", "--calibration", CALIBRATION]
    validation = "synthetic:800001:4:160x120"
    arguments += ["--validation", validation, "--output", str(tmp_path), "--name", "tiny"]
    assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-int8"]
    bundle = open_bundle(tmp_path / "tiny-int8")
    training = bundle.manifest.training
    assert bundle.manifest.parent == parent.reference
    assert (training["compressed"], training["validation"]) == ("int8", validation)
    lost = training["miou_parent"] - training["miou"]
    assert training["miou_lost"] == pytest.approx(lost, abs=1e-6)
    assert abs(lost) < 0.1  # of four small frames
    assert bundle_cost(bundle) == bundle_cost(parent)
    out, _ = capsys.readouterr()
    assert f"wrote {bundle.path}: 0." in out
    assert main(arguments) == 1
    assert "tiny-int8: exists already; choose another --output" in capsys.readouterr().err
    again = ["compress", str(bundle.path), "--int8", "--output", str(tmp_path / "again")]
    assert main(again) == 1
    assert "is int8 already; quantize its parent, enet-instance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nonet", "--int8"], "no bundle 'nonet'; there are:"),
        (["enet-instance"], "nothing to do"),
        (["enet-instance", "--int8", "--f16"], "--f16 and --int8"),
        (["enet-instance", "--int8", "--calibration", "synthetic:5"], "synthetic:5:100"),
        (["enet-instance", "--int8", "--validation", "nowhere:3"], "'nowhere:3'"),
    ],
)
def test_a_wrong_command_is_named(flags, message, tmp_path, capsys):
    assert main(["compress", *flags, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_without_images_or_nncf_int8_says_so(parent, tmp_path, monkeypatch):
    from waste_seg_ros.runtime import quantize

    graph = parent.path / "model.onnx"
    with pytest.raises(BundleError, match="--calibration: there are no images"):
        quantize.quantize_graph(graph, tmp_path / "model.onnx", [])
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(BundleError, match="pip install nncf"):
        quantize_bundle(parent, tmp_path / "int8", CALIBRATION)
    assert not list(tmp_path.iterdir())


def test_bundles_of_the_first_format_still_open(parent, tmp_path):
    import shutil

    shutil.copytree(parent.path, tmp_path / "old")
    path = tmp_path / "old" / "manifest.yaml"
    read = yaml.safe_load(path.read_text())
    read["format"] = 1
    read.pop("precision", None)
    path.write_text(yaml.safe_dump(read))
    assert open_bundle(tmp_path / "old").manifest.precision == "f32"
    read["precision"] = "f16"
    path.write_text(yaml.safe_dump(read))
    with pytest.raises(BundleError, match="unknown key 'precision'"):
        open_bundle(tmp_path / "old")
    read |= {"format": 2, "precision": "int4"}
    path.write_text(yaml.safe_dump(read))
    with pytest.raises(BundleError, match="precision: expected one of f32, f16, int8"):
        open_bundle(tmp_path / "old")
