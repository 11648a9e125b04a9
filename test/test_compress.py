"""Compression: smaller bundles that see the same."""

import itertools
import sys

import numpy as np
import pytest
import torch
import yaml

from waste_seg_ros.cli import main
from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.models import TRUNKS, build_model, fit, load_weights, parameter_count
from waste_seg_ros.models.count import count_macs
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
from waste_seg_ros.train.compress import prune, quantize_bundle
from waste_seg_ros.train.loop import TrainConfig, make_batches, read_run, train
from waste_seg_ros.train.start import start_from


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small are no work to share
    yield
    torch.set_num_threads(threads)


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


def test_float_where_a_concatenation_may_be_negative():
    # OpenVINO takes such graphs wrongly in 8 bits.
    from onnx import helper

    from waste_seg_ros.runtime.quantize import float_nodes

    nodes = [
        helper.make_node(kind, inputs, [output], name=f"/model/trunk/{output}")
        for kind, inputs, output in (
            ("Conv", ["x", "w"], "a"),
            ("Relu", ["a"], "b"),
            ("Resize", ["b"], "c"),
            ("ConvTranspose", ["b", "w"], "d"),
            ("Concat", ["b", "c"], "e"),
            ("Concat", ["b", "d"], "f"),
            ("Conv", ["e", "w"], "g"),
            ("Conv", ["f", "w"], "h"),
            ("Conv", ["h", "w"], "i"),
        )
    ]
    model = helper.make_model(helper.make_graph(nodes, "graph", [], []))
    assert float_nodes(model) == ["/model/trunk/h"]
    assert float_nodes(model, ["trunk/i"]) == ["/model/trunk/h", "/model/trunk/i"]


def test_a_graph_that_runtimes_take_otherwise_is_refused(parent, tmp_path, monkeypatch):
    from waste_seg_ros.train import compress

    class Blind:
        def __init__(self, bundle, kind, size):
            self.blind = kind == "onnxruntime" and bundle is not parent
            self.backend = load_backend(bundle, "openvino", size)

        def predict(self, frame):
            found = self.backend.predict(frame)
            found.labels[:] = 0 if self.blind else found.labels
            return found

    monkeypatch.setattr(compress, "load_backend", Blind)
    with pytest.raises(BundleError, match=r"openvino at 9\d\.\d% and onnxruntime at .*float"):
        quantize_bundle(parent, tmp_path / "int8", "synthetic:5:2:160x120")
    assert not list(tmp_path.iterdir())


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


# --------------------------------------------------------------------------------------------------
# Pruning


def batches(count=1, **changes):
    values = {"heads": ("instance",), "sizes": ("64x64",), "batch": 2, "steps": 1, "workers": 0}
    return itertools.islice(make_batches(TrainConfig(**{**values, **changes}), 0), count)


@pytest.mark.parametrize("name", TRUNKS)
def test_a_pruned_network_is_built_again_from_its_weights(name):
    torch.manual_seed(0)
    model = build_model(name, "instance", width=0.25)
    whole = count_macs(model, (64, 64))
    gone = prune(model, 0.15, (64, 64), batches(architecture=name))
    assert 0.15 <= gone < 0.5
    assert count_macs(model, (64, 64)) == pytest.approx((1 - gone) * whole, rel=1e-6)
    twin = build_model(name, "instance", width=0.25, guides=True)
    assert fit(twin, model.state_dict())
    twin.load_state_dict(model.state_dict(), strict=False)
    assert not fit(twin, model.state_dict())
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        found, expected = twin.eval()(image), model(image)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    # And it is trained on, guides and all.
    outputs = twin.train()(image)
    sum(value.float().mean() for value in outputs.values()).backward()
    assert len(twin.guides) == sum(key.startswith("guide") for key in outputs)


def test_pruning_takes_out_what_matters_least():
    torch.manual_seed(0)
    model = build_model("enet", "semantic")
    # Of the block's 16 inner channels, these change nothing.
    branch = model.trunk.stage1[0].branch
    with torch.no_grad():
        branch[6].weight[:, 3:11] = 0
        branch[6].weight[:, 11:] *= 100
        branch[6].weight[:, :3] *= 100
    kept = torch.cat((branch[3].weight[:3, 0, 0, 0], branch[3].weight[11:, 0, 0, 0]))
    prune(model, 0.1, (64, 64), batches(heads=("semantic",)))
    assert branch[3].out_channels == 8
    if branch[3].in_channels == 16:
        assert torch.equal(branch[3].weight[:, 0, 0, 0], kept)
    assert branch[6].weight.abs().sum((0, 2, 3)).min() > 0
    assert branch[6].out_channels == 64  # the maps between the blocks stay


def test_what_cannot_go_is_named():
    model = build_model("enet", "binary", width=0.25)
    with pytest.raises(BundleError, match=r"--prune 0.97: of enet no more than 0\.\d+ of the mult"):
        prune(model, 0.97, (64, 64), batches(heads=("binary",)))


def test_weights_that_do_not_go_together_are_refused():
    model = build_model("enet", "binary", width=0.5)
    weights = dict(model.state_dict())
    weights["trunk.stage1.0.branch.3.weight"] = weights["trunk.stage1.0.branch.3.weight"][:4]
    with pytest.raises(ValueError, match="its layers do not go together"):
        load_weights(build_model("enet", "binary", width=0.5), weights)
    # Narrower, never wider.
    with pytest.raises(ValueError, match="size mismatch"):
        load_weights(build_model("enet", "binary", width=0.25), model.state_dict())


def test_the_command_prunes_trains_on_learns_and_quantizes(parent, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WASTE_SEG_BUNDLES", str(tmp_path))
    config = tmp_path / "short.yaml"
    config.write_text("{steps: 2, batch: 2, workers: 0, sizes: [64x64], worst: 0}")
    arguments = ["compress", "enet-instance", "--prune", "0.1", "--distill", "enet-semantic"]
    arguments += ["--config", str(config), "--int8", "--calibration", "synthetic:5:2:64x64"]
    arguments += ["--validation", "synthetic:800001:2:160x120", "--run", str(tmp_path / "run")]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    pruned = open_bundle("enet-instance-pruned-distilled")
    training = pruned.manifest.training
    assert pruned.manifest.parent == parent.reference
    assert pruned.manifest.width == parent.manifest.width
    assert training["compressed"] == "prune 0.1, distil enet-semantic"
    assert training["teacher"] == open_bundle("enet-semantic").reference
    assert training["steps"] == 2
    whole, macs = bundle_cost(parent)[1], bundle_cost(pruned)[1]
    assert 0.1 <= training["macs_removed"] == pytest.approx(1 - macs / whole, abs=1e-4)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "distill" in log
    small = open_bundle("enet-instance-pruned-distilled-int8")
    assert small.manifest.parent == pruned.reference
    assert small.manifest.training["compressed"] == "prune 0.1, distil enet-semantic, int8"
    assert small.manifest.training["miou_parent"] == training["miou"]
    assert bundle_cost(small) == bundle_cost(pruned)
    for kind in ("openvino", "torch"):
        load_backend(pruned, kind, SIZE).predict(np.zeros((120, 160, 3), np.uint8))
    # It is started from, and its run gone on with.
    fresh = build_model("enet", "semantic", ("paper", "glass"))
    assert "starting fresh: classes glass" in start_from(fresh, pruned.path.name)
    assert parameter_count(fresh.trunk) == parameter_count(load_model(pruned).trunk)
    _, model, _ = read_run(tmp_path / "run")
    assert torch.equal(
        model.trunk.initial.conv.weight, load_model(pruned).trunk.initial.conv.weight
    )


def test_a_run_from_a_pruned_network_is_resumed(tmp_path, monkeypatch):
    model = build_model("enet", "binary", width=0.5)
    prune(model, 0.2, (64, 64), batches(heads=("binary",)))
    save_bundle(tmp_path / "pruned", model, input_size=(64, 64))
    config = TrainConfig(
        data=("synthetic:3",),
        heads=("binary",),
        width=0.5,
        sizes=("64x64",),
        batch=2,
        steps=2,
        workers=0,
        validation="synthetic:9:2",
        worst=0,
        init=str(tmp_path / "pruned"),
    )
    run = tmp_path / "run"
    assert not train(config, run, until_step=1, quiet=True).finished
    assert train(config, run, resume=True, quiet=True).step == 2
    _, trained, _ = read_run(run)
    assert parameter_count(trained) == parameter_count(model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune", "1"], "--prune 1: must be above 0 and below 1"),
        (["--prune", "0.5"], "say how long: --minutes 8"),
        (["--prune", "0.5", "--minutes", "1", "--lr", "0"], "lr must be above 0"),
        (["--distill", "nonet", "--minutes", "1"], "no bundle 'nonet'"),
    ],
)
def test_a_wrong_way_to_prune_is_named(flags, message, tmp_path, capsys):
    assert main(["compress", "enet-binary", *flags, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_without_torch_pruning_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(BundleError, match="pip install torch-pruning"):
        prune(build_model("enet", "binary", width=0.25), 0.5, (64, 64), [])
