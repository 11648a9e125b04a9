"""Backends: one graph, the same answers on every runtime."""

import functools
import importlib.util
import logging
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.models import HEADS, build_model, decide
from waste_seg_ros.runtime import backends
from waste_seg_ros.runtime.backends import BackendError, input_size_for, load_backend
from waste_seg_ros.runtime.bundle import MEAN, STD, BundleError, save_bundle
from waste_seg_ros.runtime.export import Deploy, check_graph, deploy
from waste_seg_ros.runtime.verify import AGREEMENT, COARSE_AGREEMENT, compare

RUNTIMES = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(kind) is None, reason=f"{kind} is not installed"
        ),
    )
    for kind in ("openvino", "onnxruntime", "torch")
]
SIZE = (96, 64)
torch.set_num_threads(1)  # small networks: more threads wait for each other


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model("enet", HEADS, ("a", "b", "c"), width=0.5)
    # Statistics of real images, so that the outputs vary over the frame.
    model.train()
    frames = np.stack([synthetic_sample(5, i, SIZE).image for i in range(8)])
    with torch.no_grad():
        for _ in range(20):
            model(torch.from_numpy(frames).permute(0, 3, 1, 2) / 255.0 * 4 - 2)
        model.instance.centers.weight.mul_(5)
    return model.eval()


@pytest.fixture(scope="module")
def bundles(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {h: save_bundle(folder / h, model, head=h, input_size=SIZE) for h in HEADS}


@pytest.fixture(scope="module")
def loaded(bundles):
    """Loads a head's bundle on a runtime, once."""
    return functools.cache(lambda kind, head: load_backend(bundles[head], kind, threads=1))


@pytest.fixture(scope="module")
def frame():
    return synthetic_sample(5, 3, SIZE).image


def expected(model, head, frame):
    """Plain steps in float64 from the model's logits."""
    x = (frame / 255.0 - np.array(MEAN)) / np.array(STD)
    x = torch.from_numpy(x.transpose(2, 0, 1)[None].astype(np.float32))
    with torch.inference_mode():
        out = {k: v[0].double().numpy() for k, v in model(x).items()}
    item = 1 / (1 + np.exp(-out["binary"][0]))
    if head == "binary":
        return (item > 0.5).astype(np.uint8), np.maximum(item, 1 - item), None, None
    e = np.exp(out["semantic"])[1:]  # which class, given that it is an item
    p = e / e.sum(0)
    labels = np.where(item > 0.5, p.argmax(0) + 1, 0).astype(np.uint8)
    scores = np.where(item > 0.5, item * p.max(0), 1 - item)
    if head == "semantic":
        return labels, scores, None, None
    heat = 1 / (1 + np.exp(-out["centers"][0]))
    padded = np.pad(heat, 1)
    h, w = heat.shape
    windows = [padded[i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return labels, scores, np.where(heat >= np.max(windows, 0), heat, 0), out["offsets"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", RUNTIMES)
def test_every_backend_gives_what_the_model_says(kind, head, loaded, model, frame):
    backend = loaded(kind, head)
    assert (backend.name, backend.input_size) == (kind, SIZE)
    found = backend.predict(frame)
    labels, scores, centers, offsets = expected(model, head, frame)
    assert found.labels.dtype == np.uint8
    assert found.scores.dtype == np.float32
    assert found.labels.shape == found.scores.shape == (64, 96)
    assert len(np.unique(labels)) > 1, "a frame of one label tests nothing"
    assert (found.labels == labels).mean() >= 0.995
    assert np.abs(found.scores - scores).mean() < 1e-3
    if head != "instance":
        assert found.centers is None
        assert found.offsets is None
        return
    assert found.centers.shape == (16, 24)
    assert found.offsets.shape == (2, 16, 24)
    assert np.count_nonzero(centers) > 3
    assert ((found.centers > 0) == (centers > 0)).mean() > 0.99
    assert np.abs(found.offsets - offsets).max() < 1e-2


@pytest.mark.parametrize("kind", RUNTIMES)
def test_other_sizes_of_the_stride_run(kind, bundles):
    size = (72, 104)
    image = synthetic_sample(5, 4, size).image
    backend = load_backend(bundles["instance"], kind, size, threads=1)
    found = backend.predict(image)
    assert found.labels.shape == (104, 72)
    assert found.centers.shape == (26, 18)


@pytest.mark.parametrize("kind", RUNTIMES)
def test_predictions_do_not_change_with_the_next_one(kind, loaded, frame):
    backend = loaded(kind, "instance")
    first = backend.predict(frame)
    kept = [np.copy(a) for a in (first.labels, first.scores, first.centers, first.offsets)]
    backend.predict(np.ascontiguousarray(frame[::-1, ::-1]))
    for before, now in zip(
        kept, (first.labels, first.scores, first.centers, first.offsets), strict=True
    ):
        assert np.array_equal(before, now)


@pytest.mark.parametrize("kind", RUNTIMES)
def test_views_are_taken_as_they_look(kind, loaded, frame):
    backend = loaded(kind, "semantic")
    flipped = frame[:, ::-1]
    assert not flipped.flags.c_contiguous
    found = backend.predict(flipped)
    assert np.array_equal(found.labels, backend.predict(flipped.copy()).labels)


@pytest.mark.parametrize("kind", RUNTIMES)
@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 88, 3), np.uint8),
        np.zeros((64, 96), np.uint8),
        np.zeros((64, 96, 4), np.uint8),
        np.zeros((64, 96, 3), np.float32),
    ],
)
def test_a_wrong_image_is_refused_with_what_was_expected(kind, image, loaded):
    backend = loaded(kind, "semantic")
    with pytest.raises(BackendError, match=r"expected \(64, 96, 3\) uint8 RGB"):
        backend.predict(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "caffe"}, "unknown backend 'caffe'; known: auto, openvino"),
        ({"input_size": (100, 64)}, "input size 100x64: semantic takes multiples of 8"),
        ({"input_size": (0, 64)}, "input size 0x64"),
        ({"threads": -1}, "threads must be"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
    ],
)
def test_what_cannot_be_loaded_is_named(options, message, bundles):
    with pytest.raises(BackendError, match=message):
        load_backend(bundles["semantic"], **options)


def test_auto_falls_back_and_says_why(bundles, frame, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "openvino", None)  # import openvino now fails
    with caplog.at_level(logging.WARNING):
        backend = load_backend(bundles["semantic"], "auto")
    assert backend.name == backends.AUTO_ORDER[1]
    assert "openvino is not installed" in caplog.text
    assert "running on onnxruntime instead" in caplog.text
    assert backend.predict(frame).labels.shape == (64, 96)
    with pytest.raises(BackendError, match="pip install openvino"):
        load_backend(bundles["semantic"], "openvino")


def spoiled(share):
    """ONNX Runtime whose labels are wrong on a share of the rows."""

    class Spoiled(backends._OnnxRuntime):
        def predict(self, image):
            found = super().predict(image)
            labels = np.copy(found.labels)
            labels[: round(share * len(labels))] ^= 1
            return replace(found, labels=labels)

    return Spoiled


@pytest.mark.parametrize("kind", ["openvino", "onnxruntime"])
def test_a_backend_is_compared_with_eager_torch_where_that_is_loaded(kind, bundles):
    backend = load_backend(bundles["instance"], kind, threads=1, verify=True)
    assert backend.checked.startswith("against torch: same labels on")
    assert load_backend(bundles["instance"], kind, threads=1).checked == ""
    eager = load_backend(bundles["instance"], "torch", threads=1, verify=True)
    assert eager.checked == "is what others are compared with"


def test_one_that_differs_is_refused_and_auto_goes_on(bundles, monkeypatch, caplog):
    monkeypatch.setattr(backends, "AUTO_ORDER", ("onnxruntime", "torch"))
    monkeypatch.setitem(backends._LOADERS, "onnxruntime", spoiled(1 / 64))
    with pytest.raises(BackendError, match=r"onnxruntime: semantic differs from torch on a 96x64"):
        load_backend(bundles["semantic"], "onnxruntime", verify=True)
    assert load_backend(bundles["semantic"], "onnxruntime").name == "onnxruntime"
    backend = load_backend(bundles["semantic"], "auto", verify=True)
    assert backend.name == "torch"
    (note,) = backend.notes
    assert "same labels on 98." in note and "running on torch instead" in note
    assert note in caplog.text


def test_without_torch_the_light_ones_are_compared_and_torch_decides(bundles):
    script = f"""
import sys
import threading
from dataclasses import replace
import numpy as np
from waste_seg_ros.runtime import backends
from waste_seg_ros.runtime.bundle import open_bundle
bundle = open_bundle({str(bundles["semantic"].path)!r})
good = backends.load_backend(bundle, "openvino", threads=1, verify=True)
print(good.checked.split(":")[0], "torch" in sys.modules)
class Spoiled(backends._OnnxRuntime):
    def predict(self, image):
        found = super().predict(image)
        return replace(found, labels=found.labels ^ 1)
backends._LOADERS["onnxruntime"] = Spoiled
kept = backends.load_backend(bundle, "openvino", threads=1, verify=True)
print(kept.checked.split(":")[0], "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["against onnxruntime False", "against torch True"]


def test_without_another_backend_none_is_compared(bundles, monkeypatch):
    int8 = replace(bundles["semantic"].manifest, precision="int8")
    monkeypatch.setitem(sys.modules, "openvino", None)
    bundle = replace(bundles["semantic"], manifest=int8)
    backend = load_backend(bundle, "onnxruntime", threads=1, verify=True)
    assert backend.checked == "not compared: there is no other backend that runs it"


@pytest.mark.parametrize(
    ("share", "fits", "fits_coarsely"), [(0, True, True), (0.1, False, True), (0.5, False, False)]
)
def test_eight_bits_may_differ_more(share, fits, fits_coarsely, loaded, bundles, frame):
    assert COARSE_AGREEMENT < AGREEMENT
    found = spoiled(share)(bundles["semantic"], SIZE, 1, "f32").predict(frame)
    difference = compare(found, loaded("torch", "semantic").predict(frame))
    assert difference.labels == pytest.approx(1 - round(share * 64) / 64, abs=0.005)
    assert (difference.fits(False), difference.fits(True)) == (fits, fits_coarsely)


def test_numbers_of_another_shape_or_missing_do_not_fit(loaded, frame):
    found = loaded("torch", "instance").predict(frame)
    assert compare(found, found).fits(False)
    assert not compare(replace(found, centers=None), found).fits(False)
    assert not compare(replace(found, offsets=found.offsets[:, 1:]), found).fits(False)
    assert not compare(replace(found, offsets=found.offsets + 0.2), found).fits(False)
    assert not compare(replace(found, labels=found.labels[1:]), found).fits(True)


# "eager" has all of torch.compile but the C++ compiler, which takes a minute.
def test_compile_gives_what_eager_torch_gives(bundles, loaded, frame, monkeypatch):
    monkeypatch.setattr(backends._Compiled, "compiler", "eager")
    backend = load_backend(bundles["instance"], "compile", threads=1)
    assert backend.name == "compile"
    assert backend.checked.startswith("against torch: same labels on 100.00%")
    assert backend._run is not backend._eager
    found, expected = backend.predict(frame), loaded("torch", "instance").predict(frame)
    assert compare(found, expected).fits(False)


def test_compile_answers_while_it_compiles(bundles, loaded, frame, monkeypatch):
    go_on = threading.Event()

    def slow(module, **options):
        assert go_on.wait(20)
        return lambda image: module(image)

    monkeypatch.setattr(torch, "compile", slow)
    backend = load_backend(bundles["semantic"], "compile", threads=1, background=True)
    assert backend._run is backend._eager
    found = backend.predict(frame)
    assert np.array_equal(found.labels, loaded("torch", "semantic").predict(frame).labels)
    go_on.set()
    backend._thread.join(20)
    assert backend._run is not backend._eager
    assert np.array_equal(backend.predict(frame).labels, found.labels)
    assert backend.notes == ()


@pytest.mark.parametrize(
    ("compiled", "message"),
    [
        (lambda module: lambda image: 1 / 0, "division by zero"),
        (lambda module: lambda image: [o.flip(1) for o in module(image)], "differs from eager"),
    ],
)
def test_what_compiles_to_something_else_stays_eager(
    compiled, message, bundles, frame, monkeypatch
):
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled(module))
    with pytest.raises(BackendError, match=message):
        load_backend(bundles["semantic"], "compile", threads=1)
    backend = load_backend(bundles["semantic"], "compile", threads=1, background=True)
    backend._thread.join(20)
    assert backend._run is backend._eager
    assert message in backend.notes[0] and "running on eager torch instead" in backend.notes[0]
    assert backend.predict(frame).labels.shape == (64, 96)


def test_compile_without_a_compiler_says_what_to_install(bundles, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BackendError, match=r"no C\+\+ compiler .* apt-get install g\+\+"):
        load_backend(bundles["semantic"], "compile")


def test_auto_without_any_runtime_lists_the_reasons(bundles, monkeypatch):
    for name in ("openvino", "onnxruntime", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        BackendError, match=r"no backend can be had: .*openvino.*onnxruntime.*torch"
    ):
        load_backend(bundles["semantic"])


@pytest.mark.parametrize("kind", [k for k in RUNTIMES if k.values[0] != "torch"])
def test_a_graph_that_is_none_is_named(kind, bundles, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    broken = replace(bundles["semantic"], path=tmp_path)
    with pytest.raises(BackendError, match=r"model\.onnx"):
        load_backend(broken, kind)


@pytest.mark.parametrize("kind", [k for k in RUNTIMES if k.values[0] != "torch"])
def test_light_backends_do_not_import_torch(kind, bundles):
    code = (
        "import sys, numpy as np\n"
        "from waste_seg_ros.runtime.bundle import open_bundle\n"
        "from waste_seg_ros.runtime.backends import load_backend\n"
        f"backend = load_backend(open_bundle({str(bundles['instance'].path)!r}), {kind!r})\n"
        "backend.predict(np.zeros((64, 96, 3), np.uint8))\n"
        "print(backend.name, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [kind, "False"]


@pytest.mark.parametrize(
    ("image_size", "expected_size"),
    [
        ((640, 480), (320, 240)),
        ((320, 240), (320, 240)),
        ((480, 640), (240, 320)),
        ((1024, 576), (368, 208)),
        ((1920, 1080), (368, 208)),
        ((64, 48), (320, 240)),
        ((50000, 10), (19592, 16)),
    ],
)
def test_the_input_size_keeps_the_cameras_aspect(image_size, expected_size, bundles):
    manifest = replace(bundles["semantic"].manifest, input_size=(320, 240))
    size = input_size_for(image_size, manifest)
    assert size == expected_size
    assert size[0] % 8 == size[1] % 8 == 0


def test_an_empty_image_size_is_refused(bundles):
    with pytest.raises(BackendError, match="0x480"):
        input_size_for((0, 480), bundles["semantic"].manifest)


def test_the_first_of_equal_classes_wins_and_the_binary_logit_decides_on_items():
    logits = torch.tensor([[9.0, 1.0, 3.0, 3.0], [9.0, 2.0, 2.0, 1.0], [9.0, 0.0, 0.0, 5.0]])
    binary = torch.tensor([2.0, 0.5, -1.0])
    outputs = {"semantic": logits.t()[None, :, :, None], "binary": binary[None, None, :, None]}
    labels, scores = decide(outputs)
    assert labels.dtype == torch.uint8
    assert labels[0, :, 0].tolist() == [2, 1, 0]
    shares = logits[:, 1:].softmax(1).amax(1)
    sure = torch.sigmoid(torch.tensor([2.0, 0.5, 1.0]))
    assert torch.allclose(
        scores[0, :, 0],
        torch.tensor([1.0, 1.0, 0.0]) * sure * shares + torch.tensor([0.0, 0.0, 1.0]) * sure,
    )


def test_an_export_that_differs_is_refused(model, bundles):
    other = Deploy(model, "semantic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).eval()
    path = bundles["semantic"].path / "model.onnx"
    check_graph(deploy(model, bundles["semantic"].manifest), path, [SIZE])
    with pytest.raises(BundleError, match="labels that .* of a 96x64 test frame"):
        check_graph(other, path, [SIZE])
