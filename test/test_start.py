"""What a run starts from: transfer, freezing, teachers; and how it ends for want of memory."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from waste_seg_ros.cli import main
from waste_seg_ros.data.sample import CLASSES
from waste_seg_ros.models import build_model
from waste_seg_ros.runtime.bundle import save_bundle
from waste_seg_ros.train.loop import TrainConfig, TrainingError, find_checkpoints, read_run, train
from waste_seg_ros.train.losses import DistillSettings
from waste_seg_ros.train.memory import is_out_of_memory, limited_memory
from waste_seg_ros.train.start import freeze, open_teacher, start_from

SMALL = TrainConfig(
    width=0.25,
    sizes=("64x64", "96x64"),
    batch=2,
    steps=4,
    workers=0,
    threads=1,
    validation="synthetic:9:2",
    log_steps=1,
    checkpoint_seconds=3600.0,
    worst=0,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(classes=CLASSES, heads=("semantic",), name="enet", seed=0, **options):
    torch.manual_seed(seed)
    return build_model(name, heads, classes, 0.25, **options)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A bundle for paper, bottle, aluminum and nylon, and its network."""
    model = model_of(seed=5).eval()
    folder = tmp_path_factory.mktemp("bundles") / "parent"
    return save_bundle(folder, model, input_size=(64, 64)), model


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A bundle of another architecture for nylon and paper, and its network with guides."""
    model = model_of(("nylon", "paper"), ("instance",), "bisenet", seed=5, guides=True).eval()
    folder = tmp_path_factory.mktemp("bundles") / "stranger"
    return save_bundle(folder, model, input_size=(64, 64)), model


def test_classes_are_taken_over_by_name(parent):
    bundle, old = parent
    model = model_of(("nylon", "glass", "paper"), ("semantic", "instance"))
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    said = start_from(model, str(bundle.path))
    assert "starting fresh: instance, classes glass (kept: background, nylon, paper)" in said
    # A transposed convolution: the classes are its second axis.
    ours, theirs = model.semantic.full, old.semantic.full
    for here, there in ((0, 0), (1, 4), (3, 1)):
        assert torch.equal(ours.weight[:, here], theirs.weight[:, there])
        assert ours.bias[here] == theirs.bias[there]
    assert torch.equal(ours.weight[:, 2], fresh["semantic.full.weight"][:, 2])
    state = model.state_dict()
    for key, value in state.items():
        if key.startswith(("trunk.", "binary.")):
            assert torch.equal(value, old.state_dict()[key]), key
        elif key.startswith("instance."):
            assert torch.equal(value, fresh[key]), key
    # As many classes of other names are other classes; the same in another order are not.
    other = model_of(("w", "x", "y", "z"))
    assert "classes w, x, y, z (kept: background)" in start_from(other, str(bundle.path))
    turned = model_of(CLASSES[::-1])
    assert start_from(turned, str(bundle.path)).endswith("everything fits")
    assert torch.equal(turned.semantic.full.weight[:, 1:], theirs.weight[:, 1:].flip(1))


def test_classes_of_a_convolution_are_its_first_axis(stranger):
    bundle, old = stranger
    model = model_of(("paper", "glass"), name="bisenet", guides=True)
    # A bundle has no guides.
    assert "starting fresh: guides, classes glass (kept: background, paper)" in start_from(
        model, str(bundle.path)
    )
    assert torch.equal(model.semantic.full.weight[1], old.semantic.full.weight[2])


def test_a_bundle_that_does_not_fit_is_named(parent):
    bundle, _ = parent
    with pytest.raises(ValueError, match=r"it is enet of width 0\.25.*bisenet of width 0\.25"):
        start_from(model_of(name="bisenet"), str(bundle.path))


def test_an_encoder_starts_from_a_file(tmp_path):
    encoder = model_of(name="icnet", seed=5).trunk.encoder
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    train(
        replace(
            SMALL,
            architecture="icnet",
            heads=("binary",),
            encoder=str(tmp_path / "encoder.safetensors"),
            freeze="encoder",
            steps=1,
            lr=1e-9,
        ),
        tmp_path / "run",
        quiet=True,
    )
    found = read_run(tmp_path / "run")[1].trunk.encoder.state_dict()
    for key, value in encoder.state_dict().items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("what", ["encoder", "trunk"])
def test_what_is_frozen_stays(what):
    model = model_of(heads=("semantic", "instance")).train()
    freeze(model, what)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = model(torch.randn(2, 3, 32, 32))
    sum(v.square().sum() for v in outputs.values()).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    names = {".".join(k.split(".")[:2]) for k in changed if k.startswith("trunk.")}
    if what == "trunk":
        assert not names
    else:
        assert names == {"trunk.up4", "trunk.stage4", "trunk.up5", "trunk.stage5"}
    assert {k.split(".")[0] for k in changed} >= {"semantic", "instance"}


def test_a_teacher_of_another_stride_and_fewer_classes(stranger):
    bundle, model = stranger
    teacher = open_teacher(str(bundle.path), CLASSES)
    image = torch.randn(2, 3, 40, 72)  # of stride 8; the teacher's is 32
    with torch.no_grad():
        found = teacher(image)
        padded = model(torch.nn.functional.pad(image, (0, 24, 0, 24), mode="replicate"))
    assert {k: tuple(v.shape[-2:]) for k, v in found.items()} == {
        "binary": (40, 72),
        "semantic": (40, 72),
        "centers": (10, 18),
        "offsets": (10, 18),
        "deep": (5, 9),
    }
    assert torch.isinf(found["semantic"][:, [2, 3]]).all()
    expected = padded["semantic"][:, [0, 2, 1], :40, :72]
    assert torch.allclose(found["semantic"][:, [0, 1, 4]], expected, atol=1e-5)
    with pytest.raises(ValueError, match="knows nylon, which are not among"):
        open_teacher(str(bundle.path), ("paper", "glass"))


def test_a_run_with_guides_and_a_teacher_resumes_to_the_same(tmp_path, parent):
    bundle, _ = parent
    config = replace(SMALL, architecture="bisenet", heads=("semantic",), teacher=str(bundle.path))
    train(config, tmp_path / "whole", quiet=True)
    train(config, tmp_path / "parts", until_step=2, quiet=True)
    train(config, tmp_path / "parts", resume=True, quiet=True)
    lines = [
        [
            (entry["step"], entry["losses"])
            for entry in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
            if "losses" in entry
        ]
        for name in ("whole", "parts")
    ]
    assert lines[0] == lines[1]
    assert [step for step, _ in lines[0]] == [1, 2, 3, 4]
    names = {"guide0", "guide1", "distill_semantic", "distill_binary", "distill_features"}
    assert names <= set(lines[0][0][1])
    one, other = (read_run(tmp_path / name)[1] for name in ("whole", "parts"))
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert {k.split(".")[0] for k in one.state_dict()} == {"trunk", "binary", "semantic", "guides"}


def test_the_teacher_is_asked_and_followed(tmp_path):
    asked = []

    def teacher(image):
        assert not torch.is_grad_enabled()
        asked.append(tuple(image.shape))
        # There are items everywhere, which is not so.
        return {"binary": torch.full((len(image), 1, *image.shape[-2:]), 20.0)}

    config = replace(SMALL, heads=("binary",), lr=0.02, steps=8)
    curves = []
    for name, factor in (("taught", 50.0), ("left", 0.0)):
        train(replace(config, distill=factor), tmp_path / name, quiet=True, teacher=teacher)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        curves.append([e["losses"] for e in map(json.loads, lines) if "losses" in e])
    assert len(asked) == 16
    taught, left = curves
    # The first step is of the same weights and batch.
    assert taught[0]["distill_binary"] == left[0]["distill_binary"] > 0
    added = 50.0 * DistillSettings().binary * left[0]["distill_binary"]
    assert taught[0]["total"] - left[0]["total"] == pytest.approx(added, rel=1e-3)
    assert taught[-1]["distill_binary"] < left[-1]["distill_binary"]


def test_a_network_that_is_given_is_trained_and_resumes(tmp_path):
    def narrow():
        # Channels that no width gives.
        model = model_of(heads=("binary",))
        model.trunk.stage5.branch[0] = torch.nn.Conv2d(8, 3, 1, bias=False)
        model.trunk.stage5.branch[1] = torch.nn.BatchNorm2d(3)
        model.trunk.stage5.branch[3] = torch.nn.Conv2d(3, 2, 3, padding=1, bias=False)
        return model

    config = replace(SMALL, heads=("binary",), steps=2)
    first = narrow()
    train(config, tmp_path, until_step=1, quiet=True, model=first)
    train(config, tmp_path, resume=True, quiet=True, model=narrow())
    assert find_checkpoints(tmp_path)[-1].name == "checkpoint-00000002"
    assert read_run(tmp_path, narrow())[1].trunk.stage5.branch[0].out_channels == 3
    with pytest.raises(TrainingError, match="cannot be read"):
        read_run(tmp_path)


def test_curves_go_to_tensorboard_and_a_resumed_run_replaces_them(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(SMALL, heads=("binary",), tensorboard=True, steps=3)
    train(config, tmp_path, until_step=2, quiet=True)
    train(config, tmp_path, resume=True, quiet=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("losses/total")] == [1, 2, 3]
    assert 0 <= events.Scalars("validation/binary_iou")[-1].value <= 1
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events.Scalars("losses/total")[1].value == pytest.approx(
        next(e for e in logged if e["step"] == 2)["losses"]["total"]
    )


def test_settings_that_cannot_be_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["train", "--run", str(tmp_path / "run"), "--steps", "1", "--width", "0.25"]
    for flags, message in (
        (["--loss", "mse"], "loss 'mse'; known: focal-lovasz, cross-entropy"),
        (["--freeze", "half"], "freeze 'half'; known: none, encoder, trunk"),
        (["--device", "tpu"], "device 'tpu'; known: auto, cpu, cuda"),
        (["--device", "cuda"], "this torch finds no GPU; take --device cpu"),
        (["--encoder", "w.pth"], "enet has no VGG-16 or ResNet-50"),
        (["--distill", "-1"], "distill must be at least 0"),
        (["--teacher", "nobody"], "no bundle 'nobody'"),
        (["--architecture", "fcn"], "architecture 'fcn'; known: enet, "),
    ):
        assert main([*words, *flags]) == 1
        assert message in capsys.readouterr().err, flags


# Memory of which there is so much more than after the imports; then the command.
LIMITED = """
import resource, sys
from pathlib import Path
import waste_seg_ros.train.loop
from waste_seg_ros.cli import main
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
sys.exit(main(sys.argv[1:]))
"""


def test_a_batch_that_does_not_fit_is_told_with_one_that_does(tmp_path):
    flags = ["--width", "0.25", "--heads", "binary", "--sizes", "320x240", "--batch", "24"]
    flags += ["--workers", "0", "--validation", "synthetic:9:2:64x64", "--steps", "1"]
    words = [sys.executable, "-c", LIMITED, "train", "--run", str(tmp_path / "run"), *flags]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "batch 24 at 320x240 does not fit in memory" in last
    assert "No checkpoint was made yet." in last
    fitting = int(last.partition("--batch ")[2].split(".")[0])
    assert fitting in (3, 6, 12)
    assert f"{fitting} does: --batch {fitting}" in last


def test_memory_is_limited_for_a_while():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limited_memory():
        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
        assert 0 < limit < 2 * total
        for make in (
            lambda: np.ones(4 * total, np.uint8),
            lambda: torch.ones(4 * total, dtype=torch.uint8),
        ):
            with pytest.raises((MemoryError, RuntimeError)) as caught:
                make()
            assert is_out_of_memory(caught.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
