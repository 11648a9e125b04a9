"""Bundles: what is written comes back, and what is not as it was written is refused."""

import hashlib
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import yaml

from waste_seg_ros.models import HEADS, build_model
from waste_seg_ros.runtime import bundle as bundles
from waste_seg_ros.runtime.bundle import (
    BundleError,
    find_bundle,
    list_bundles,
    load_model,
    open_bundle,
    restate_bundle,
    save_bundle,
    write_atomically,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("enet", HEADS, ("paper", "can"), width=0.5).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "small"
    return save_bundle(
        path,
        model,
        head="instance",
        input_size=(64, 48),
        metrics={"synthetic:1:5": {"miou": 0.5}},
        training={"steps": 3, "data": ["synthetic:1"]},
        parent="older@" + "0" * 64,
    )


@pytest.fixture
def copy(saved, tmp_path):
    """A bundle of one's own to spoil."""
    path = tmp_path / "copy"
    shutil.copytree(saved.path, path)
    return path


def edit(path, **changes):
    """Changes keys of a manifest; None takes a key out."""
    read = yaml.safe_load((path / "manifest.yaml").read_text())
    read.update(changes)
    kept = {k: v for k, v in read.items() if v is not None}
    (path / "manifest.yaml").write_text(yaml.safe_dump(kept))


def seal(path, name):
    """Puts the digest that a file has now into the manifest."""
    digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
    read = yaml.safe_load((path / "manifest.yaml").read_text())
    edit(path, files={**read["files"], name: digest})


def test_a_bundle_comes_back_as_it_was_written(saved, model):
    manifest = open_bundle(saved.path).manifest
    assert (manifest.name, manifest.architecture, manifest.width) == ("small", "enet", 0.5)
    assert (manifest.head, manifest.classes) == ("instance", ("paper", "can"))
    assert (manifest.input_size, manifest.stride) == ((64, 48), 8)
    assert manifest.metrics == {"synthetic:1:5": {"miou": 0.5}}
    assert manifest.training["data"] == ["synthetic:1"]
    assert manifest.parent.startswith("older@")
    assert set(manifest.files) == {"weights.safetensors", "model.onnx"}
    x = torch.randn(1, 3, 48, 64)
    loaded = load_model(saved)
    with torch.inference_mode():
        found, expected = loaded(x), model(x)
    assert set(found) == {"binary", "semantic", "centers", "offsets"}
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def test_other_heads_weights_are_left_out(model, tmp_path):
    bundle = save_bundle(tmp_path / "binary", model, head="binary", input_size=(64, 48))
    kept = {key.partition(".")[0] for key in bundles.read_weights(bundle)}
    assert kept == {"trunk", "binary"}


def test_a_bundle_is_never_written_over(saved, model):
    before = saved.digest
    with pytest.raises(BundleError, match="exists already"):
        save_bundle(saved.path, model, head="semantic")
    with pytest.raises(BundleError, match="exists already"):
        restate_bundle(saved, saved.path)
    assert open_bundle(saved.path).digest == before


def test_a_failed_write_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "new", fill)
    assert os.listdir(tmp_path) == []


def test_metrics_are_added_in_a_copy(saved, tmp_path):
    metrics = {"conveyor": {"binary_iou": 0.25}}
    other = restate_bundle(saved, tmp_path / "measured", name="measured", metrics=metrics)
    assert other.manifest.metrics == metrics
    assert other.manifest.files == saved.manifest.files
    assert saved.manifest.metrics != metrics


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_written(value, tmp_path):
    model = build_model("enet", "semantic", ("a",), width=0.5)
    with torch.no_grad():
        model.trunk.initial.conv.weight[0, 0, 0, 0] = value
    with pytest.raises(BundleError, match=r"trunk\.initial\.conv\.weight.*not finite"):
        save_bundle(tmp_path / "nan", model)
    assert os.listdir(tmp_path) == []


def test_weights_that_are_no_numbers_are_not_loaded(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "weights.safetensors")
    weights["instance.centers.bias"][0] = float("nan")
    save_file(weights, copy / "weights.safetensors")
    seal(copy, "weights.safetensors")
    with pytest.raises(BundleError, match=r"weights\.safetensors: instance\.centers\.bias"):
        load_model(open_bundle(copy))


@pytest.mark.parametrize("name", ["weights.safetensors", "model.onnx"])
def test_a_changed_file_is_named(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name}: SHA-256 is .* copy the bundle anew"):
        open_bundle(copy)


def test_a_missing_file_is_named(copy):
    (copy / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx: missing"):
        open_bundle(copy)


class Bomb:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_by_another_name_is_refused_unread(copy, zipped):
    path = copy / "weights.safetensors"
    if zipped:
        torch.save({"weights": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    seal(copy, "weights.safetensors")
    with pytest.raises(BundleError, match="pickled checkpoint"):
        open_bundle(copy)


def test_weights_that_begin_like_a_pickle_are_taken(copy):
    # The first byte is the low one of the header's size, so it is 0x80 now and then.
    from safetensors.torch import load_file, save_file

    path = copy / "weights.safetensors"
    weights = load_file(path)
    for length in range(400):
        save_file(weights, path, metadata={"note": "x" * length})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    seal(copy, "weights.safetensors")
    assert set(bundles.read_weights(open_bundle(copy))) == set(weights)


def test_garbage_for_weights_is_refused(copy):
    (copy / "weights.safetensors").write_bytes(b"\xff" * 40)
    seal(copy, "weights.safetensors")
    with pytest.raises(BundleError, match="not a safetensors file"):
        open_bundle(copy)


def test_weights_of_another_network_are_refused(copy, saved):
    for changes in ({"width": 0.25}, {"head": "semantic"}, {"classes": ["a"]}):
        edit(copy, **{"width": 0.5, "head": "instance", "classes": ["paper", "can"], **changes})
        with pytest.raises(BundleError, match="not the weights of enet with head"):
            load_model(open_bundle(copy))
    edit(copy, width=0.5, architecture="nonet")
    with pytest.raises(BundleError, match="unknown architecture 'nonet'"):
        load_model(open_bundle(copy))


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "a/b.bin", ".."])
def test_files_outside_of_the_bundle_are_refused(copy, name):
    (copy.parent / "outside.bin").write_bytes(b"x")
    read = yaml.safe_load((copy / "manifest.yaml").read_text())
    edit(copy, files={**read["files"], name: hashlib.sha256(b"x").hexdigest()})
    with pytest.raises(BundleError, match=r"manifest\.yaml: files: .*plain file name"):
        open_bundle(copy)


def test_a_link_out_of_the_bundle_is_refused(copy):
    outside = copy.parent / "elsewhere.onnx"
    (copy / "model.onnx").rename(outside)
    (copy / "model.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="outside of the bundle"):
        open_bundle(copy)


def test_a_bundle_installed_by_links_is_taken(copy, tmp_path):
    installed = tmp_path / "share" / "copy"
    installed.mkdir(parents=True)
    for file in copy.iterdir():
        (installed / file.name).symlink_to(file)
    assert open_bundle(installed).manifest.name == "small"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "panoptic"}, "head: expected one of binary, semantic, instance"),
        ({"head": None}, "key 'head' is missing"),
        ({"headd": "binary"}, "unknown key 'headd'"),
        ({"classes": []}, "classes: expected"),
        ({"classes": ["a", "a"]}, "classes: expected"),
        ({"classes": "paper"}, "classes: expected"),
        ({"width": -1}, "width: expected a number above 0"),
        ({"width": True}, "width: expected"),
        ({"width": float("nan")}, "width: expected"),
        ({"input_size": [64, 50]}, "input_size: expected .*multiples of the stride 8"),
        ({"input_size": [64]}, "input_size"),
        ({"stride": 0}, "stride"),
        ({"mean": [0, 0]}, "mean: expected a list of 3 numbers"),
        ({"std": [0.2, 0.2, 0.0]}, "std: expected numbers above 0"),
        ({"metrics": {"a": 0.5}}, "metrics: expected"),
        ({"metrics": {"a": {"miou": "good"}}}, "metrics: expected"),
        ({"training": ["x"]}, "training: expected a mapping"),
        ({"parent": 3}, "parent: expected"),
        ({"name": "../up"}, "name: expected"),
        ({"files": {}}, r"files: weights\.safetensors is missing"),
        ({"format": 99}, "format is 99; this version reads"),
        ({"format": "1"}, "format is '1'"),
    ],
)
def test_a_wrong_manifest_is_refused_by_file_and_key(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(BundleError, match=r"manifest\.yaml: " + message):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected a mapping"),
        ("a: [", "not YAML"),
        ("", "expected a mapping"),
        ("x: !!python/object/apply:os.abort []", "not YAML"),
        ("format: 1\n" + "#" * (2 << 20), "larger than a manifest can be"),
    ],
)
def test_what_is_no_manifest_is_refused(copy, text, message):
    (copy / "manifest.yaml").write_text(text)
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


def test_a_bundle_is_found_by_path_then_by_name_along_the_search_path(copy, tmp_path, monkeypatch):
    def place(folder):
        shutil.copytree(copy, folder / "here")
        return folder / "here"

    share = place(tmp_path / "prefix" / "share" / "waste_seg_ros" / "bundles")
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"{tmp_path / 'none'}{os.pathsep}{tmp_path / 'prefix'}")
    monkeypatch.delenv("WASTE_SEG_BUNDLES", raising=False)
    assert find_bundle("here") == share
    by_variable = place(tmp_path / "variable")
    monkeypatch.setenv("WASTE_SEG_BUNDLES", str(tmp_path / "variable"))
    assert find_bundle("here") == by_variable
    by_search = place(tmp_path / "search")
    assert find_bundle("here", [tmp_path / "search"]) == by_search
    assert find_bundle(str(copy), [tmp_path / "search"]) == copy
    assert by_search in list_bundles([tmp_path / "search"])
    with pytest.raises(BundleError, match=r"no bundle 'nothere'; there are: .*here.*Looked in"):
        find_bundle("nothere")
    with pytest.raises(BundleError, match="no such folder"):
        find_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"no manifest\.yaml in it"):
        find_bundle(tmp_path)
    with pytest.raises(BundleError, match="no bundle named"):
        find_bundle("")


def test_opening_a_bundle_needs_no_torch(copy):
    import subprocess
    import sys

    code = (
        "import sys; from waste_seg_ros.runtime.bundle import open_bundle;"
        f"print(open_bundle({str(copy)!r}).manifest.name, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["small", "False"]


def test_numpy_figures_are_refused_in_words(saved, tmp_path):
    with pytest.raises(BundleError, match="not plain values"):
        restate_bundle(saved, tmp_path / "np", training={"loss": np.float64(0.5)})
    assert os.listdir(tmp_path) == []
