"""TensorRT: the cache and what is compiled, without a GPU; the engines themselves where one is."""

import importlib.util
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.models import HEADS, build_model
from waste_seg_ros.runtime import backends, tensorrt_engine
from waste_seg_ros.runtime.backends import BackendError, gpu_found, load_backend
from waste_seg_ros.runtime.bundle import open_bundle, save_bundle
from waste_seg_ros.runtime.export import deploy
from waste_seg_ros.runtime.quantize import symmetric_graph
from waste_seg_ros.runtime.tensorrt_engine import (
    EngineGraph,
    EngineKey,
    EngineLogits,
    Logits,
    cached_engine,
    half_program,
    logit_names,
    read_engine,
    write_engine,
)
from waste_seg_ros.runtime.verify import compare

SIZE = (64, 48)
KEY = EngineKey("ab" * 32, "Some GPU", "9.0", "11.0.0", "2.13.0", *SIZE, "f16")
torch.set_num_threads(1)

on_gpu = pytest.mark.skipif(
    not gpu_found() or importlib.util.find_spec("torch_tensorrt") is None,
    reason="no NVIDIA GPU is found" if not gpu_found() else "torch_tensorrt is not installed",
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("enet", HEADS, ("a", "b", "c"), width=0.25).eval()


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "small"
    return save_bundle(path, model, head="instance", input_size=SIZE)


# --- cache ----------------------------------------------------------------------------------------


def never():
    raise AssertionError("built, though it was kept")


def test_an_engine_is_built_once_and_kept(tmp_path):
    folder = tmp_path / "new" / "cache"
    plan = bytes(range(256)) + b"\n\n"
    assert cached_engine(folder, KEY, lambda: plan, lambda p: True) == plan
    assert cached_engine(folder, KEY, never, lambda p: p == plan) == plan
    assert folder.stat().st_mode & 0o077 == 0
    assert len(list(folder.iterdir())) == 1  # nothing half written beside it


@pytest.mark.parametrize(
    "other",
    [
        {"bundle": "cd" * 32},
        {"gpu": "Other GPU"},
        {"capability": "8.9"},
        {"tensorrt": "11.1.0"},
        {"torch_tensorrt": "2.14.0"},
        {"width": 72},
        {"height": 56},
        {"precision": "int8"},
    ],
)
def test_whatever_an_engine_depends_on_makes_another(other, tmp_path, caplog):
    key = replace(KEY, **other)
    write_engine(KEY.path(tmp_path), KEY, b"old")
    assert key.path(tmp_path) != KEY.path(tmp_path)
    assert cached_engine(tmp_path, key, lambda: b"new", lambda p: True) == b"new"
    assert read_engine(KEY.path(tmp_path), KEY) == b"old"
    # Even if it was copied to where the other is looked for.
    key.path(tmp_path).write_bytes(KEY.path(tmp_path).read_bytes())
    assert read_engine(key.path(tmp_path), key) is None
    assert "is for another GPU" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[:-1], "is damaged"),
        (lambda content: content[:-1] + b"X", "is damaged"),
        (lambda content: b"", "no engine of this version"),
        (lambda content: b"\x80\x04pickle", "no engine of this version"),
    ],
)
def test_a_damaged_engine_is_built_anew(spoil, message, tmp_path, caplog):
    path = KEY.path(tmp_path)
    write_engine(path, KEY, b"plan")
    path.write_bytes(spoil(path.read_bytes()))
    assert cached_engine(tmp_path, KEY, lambda: b"new", lambda p: True) == b"new"
    assert message in caplog.text
    assert read_engine(path, KEY) == b"new"


def test_an_engine_that_tensorrt_does_not_take_is_built_anew(tmp_path):
    write_engine(KEY.path(tmp_path), KEY, b"old")
    assert cached_engine(tmp_path, KEY, lambda: b"new", lambda p: p != b"old") == b"new"
    assert read_engine(KEY.path(tmp_path), KEY) == b"new"


def test_a_cache_that_cannot_be_written_is_only_warned_of(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        plan = cached_engine(tmp_path / "file", KEY, lambda: b"new", lambda p: True)
    assert plan == b"new"
    assert "the engine is not kept" in caplog.text


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("WASTE_SEG_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tensorrt_engine.cache_folder() == tmp_path / "waste_seg_ros" / "engines"
    monkeypatch.setenv("WASTE_SEG_CACHE", str(tmp_path / "mine"))
    assert tensorrt_engine.cache_folder() == tmp_path / "mine"


# --- what is compiled -----------------------------------------------------------------------------


class Stub:
    """Stands for an engine: keeps what a function gives in tensors by name."""

    def __init__(self, function, names):
        self.outputs = dict.fromkeys(names)
        self._function = function

    def __call__(self, x):
        self.outputs = dict(zip(self.outputs, self._function(x), strict=True))


def test_the_half_network_exports_and_computes_what_the_model_does(model):
    program = half_program(build_copy(model), SIZE, "cpu")
    x = torch.randn(1, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(x)
        found = program.module()(x.half())
    names = logit_names(model)
    assert set(names) == set(expected)
    for name, output in zip(names, found, strict=True):
        assert output.dtype == torch.float16
        assert (output.float() - expected[name]).abs().max() < 0.05 * (
            1 + expected[name].abs().max()
        )


def build_copy(model):
    copy = build_model("enet", HEADS, ("a", "b", "c"), width=0.25)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def test_an_engine_in_the_networks_place_gives_the_same_prediction(bundle, model):
    single = build_model("enet", "instance", ("a", "b", "c"), width=0.25).eval()
    own = single.state_dict()
    single.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
    image = torch.from_numpy(synthetic_sample(5, 3, SIZE).image)[None]
    names = logit_names(single)
    stub = Stub(Logits(single, names), [f"output{i}" for i in range(len(names))])
    module = deploy(single, bundle.manifest)
    with torch.inference_mode():
        expected = module(image)
        module.model = EngineLogits(stub, names)
        found = module(image)
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(BackendError, match="the engine gives"):
        EngineLogits(Stub(None, ["output0"]), names)


def test_an_int8_graph_is_made_symmetric():
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    bundle = open_bundle("enet-instance-int8")
    size = bundle.manifest.input_size
    content = symmetric_graph(bundle.path / "model.onnx", size)
    graph = onnx.load_from_string(content).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    zeros = [
        constants[n.input[2]]
        for n in graph.node
        if n.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert len(zeros) > 100
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def engine(x):
        return session.run(None, {"image": x.numpy().astype(np.float32)})

    names = ("labels", "scores", "centers", "offsets")
    stub = Stub(lambda x: map(torch.from_numpy, engine(x)), names)
    image = synthetic_sample(5, 2, size).image
    found = EngineGraph(stub, "instance")(torch.from_numpy(image)[None])
    assert stub.outputs["labels"].dtype == torch.int32
    prediction = backends.as_prediction([o.numpy() for o in found])
    assert prediction.labels.dtype == np.uint8
    expected = load_backend(bundle, "onnxruntime", size, 1).predict(image)
    assert len(np.unique(expected.labels)) > 1
    assert compare(prediction, expected).labels > 0.99
    with pytest.raises(BackendError, match="the engine gives"):
        EngineGraph(stub, "semantic")


# --- where it cannot be had -----------------------------------------------------------------------


def test_without_a_gpu_it_is_refused_and_auto_does_not_try_it(bundle, monkeypatch):
    monkeypatch.setattr(backends, "gpu_found", lambda: False)
    with pytest.raises(BackendError, match="backend tensorrt: no NVIDIA GPU is found"):
        load_backend(bundle, "tensorrt")
    assert backends.auto_order() == backends.AUTO_ORDER


def test_with_a_gpu_auto_tries_it_first_and_falls_back(bundle, monkeypatch):
    monkeypatch.setattr(backends, "gpu_found", lambda: True)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    assert backends.auto_order() == ("tensorrt", *backends.AUTO_ORDER)

    def fails(*_):
        raise BackendError("backend tensorrt: no memory left")

    monkeypatch.setitem(backends._LOADERS, "tensorrt", fails)
    backend = load_backend(bundle, "auto", threads=1)
    assert backend.name == backends.AUTO_ORDER[0]
    assert backend.notes == (
        f"backend tensorrt: no memory left; running on {backend.name} instead",
    )


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is here")
def test_without_tensorrt_it_says_what_to_install(bundle, monkeypatch):
    monkeypatch.setattr(backends, "gpu_found", lambda: True)
    with pytest.raises(BackendError, match="pip install torch_tensorrt=="):
        load_backend(bundle, "tensorrt")


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", ["enet-instance", "icnet-instance", "enet-instance-int8"])
def test_engines_say_what_the_cpu_says(name, monkeypatch, tmp_path):
    monkeypatch.setenv("WASTE_SEG_CACHE", str(tmp_path))
    bundle = open_bundle(name)
    backend = load_backend(bundle, "tensorrt", verify=True)
    assert backend.checked.startswith("against ")
    first, second = (synthetic_sample(5, i, bundle.manifest.input_size).image for i in (3, 4))
    found = backend.predict(first)
    kept = found.labels.copy()
    backend.predict(second)
    assert np.array_equal(found.labels, kept)
    monkeypatch.setattr(tensorrt_engine, "build_engine", lambda *_: never())
    again = load_backend(bundle, "tensorrt")
    assert np.array_equal(again.predict(first).labels, kept)
