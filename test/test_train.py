"""The training loop: what it draws, what it keeps, and how it ends."""

import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import yaml

from waste_seg_ros.cli import main
from waste_seg_ros.data.sample import IGNORE, Sample
from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.models import TRUNKS, build_model
from waste_seg_ros.runtime.bundle import load_model, open_bundle
from waste_seg_ros.train.augment import augment
from waste_seg_ros.train.loop import (
    Average,
    Learner,
    TrainConfig,
    TrainingError,
    _Batches,
    check_config,
    class_weights,
    draw_curves,
    find_checkpoints,
    fit_sample,
    learns_in_bf16,
    make_batches,
    parse_size,
    read_config,
    read_run,
    rounded_up,
    schedule_factor,
    train,
    validate,
)

SMALL = TrainConfig(
    width=0.25,
    sizes=("64x48", "48x64"),
    batch=2,
    steps=4,
    workers=0,
    threads=1,
    validation="synthetic:9:3",
    log_steps=1,
    checkpoint_seconds=3600.0,
    worst=2,
)
FLAGS = [
    *("--width", "0.25", "--sizes", "64x48", "--batch", "2", "--workers", "0"),
    *("--validation", "synthetic:9:3", "--log-steps", "1"),
]


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_resumed_run_goes_on_as_the_unbroken_one(tmp_path):
    whole = train(SMALL, tmp_path / "whole", quiet=True)
    part = train(SMALL, tmp_path / "parts", until_step=2, quiet=True)
    assert (whole.finished, part.finished, part.step) == (True, False, 2)
    rest = train(SMALL, tmp_path / "parts", resume=True, quiet=True)
    assert (rest.finished, rest.step) == (True, 4)
    one, other = (read_run(tmp_path / name)[1].state_dict() for name in ("whole", "parts"))
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
    losses = [
        [(e["step"], e["losses"]) for e in log_of(tmp_path / name) if "losses" in e]
        for name in ("whole", "parts")
    ]
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4]
    assert losses[0] == losses[1]


def test_a_killed_run_resumes_to_the_same_curve(tmp_path):
    config = replace(SMALL, steps=30, heads=("binary",), sizes=("64x48",), workers=0)
    run = tmp_path / "killed"
    words = [sys.executable, "-m", "waste_seg_ros.cli", "train", "--run", str(run)]
    words += ["--steps", "30", "--heads", "binary", "--threads", "1", *FLAGS]
    process = subprocess.Popen([*words, "--checkpoint-seconds", "0.001"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(find_checkpoints(run)) < 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert len(log_of(run)) < 30
    train(config, run, resume=True, quiet=True)
    train(config, tmp_path / "whole", quiet=True)
    curves = [
        [(e["step"], e["losses"]) for e in log_of(tmp_path / name) if "losses" in e]
        for name in ("whole", "killed")
    ]
    assert [step for step, _ in curves[0]] == list(range(1, 31))
    assert curves[0] == curves[1]


def test_steps_after_the_checkpoint_are_taken_from_the_log(tmp_path):
    train(SMALL, tmp_path, until_step=2, quiet=True)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "losses": {"total": 1.0}}\n{"step": 4, "lo')  # killed while writing
    train(SMALL, tmp_path, resume=True, quiet=True)
    assert [e["step"] for e in log_of(tmp_path) if "losses" in e] == [1, 2, 3, 4]


def test_only_the_newest_checkpoints_are_kept_and_no_scraps(tmp_path):
    train(replace(SMALL, checkpoint_seconds=1e-6), tmp_path, quiet=True)
    names = [path.name for path in find_checkpoints(tmp_path)]
    assert names == ["checkpoint-00000003", "checkpoint-00000004"]
    assert {p.name for p in tmp_path.iterdir()} == {
        *names,
        "config.yaml",
        "log.jsonl",
        "curves.png",
        "validation.json",
        "validation_confusion.png",
        "validation_reliability.png",
        "worst",
    }
    assert len(list((tmp_path / "worst").iterdir())) == 2
    assert {p.name for p in (tmp_path / names[1]).iterdir()} == {
        "model.safetensors",
        "average.safetensors",
        "optimizer.safetensors",
        "state.json",
    }


def test_a_loss_that_is_no_number_ends_the_run_with_a_good_checkpoint(tmp_path):
    def poisoned(config, first):
        for number, batch in enumerate(make_batches(config, first), first):
            if number == 2:
                batch["heat"][0, 0, 0, 0] = float("nan")
            yield batch

    config = replace(SMALL, checkpoint_seconds=1e-6)
    with pytest.raises(TrainingError, match="batch 2, samples 4 to 5 of synthetic:1") as caught:
        train(config, tmp_path, quiet=True, batches=poisoned)
    assert "from: centers" in str(caught.value)
    last = find_checkpoints(tmp_path)[-1]
    assert str(last) in str(caught.value)
    assert last.name == "checkpoint-00000002"
    assert all(bool(v.isfinite().all()) for v in read_run(tmp_path)[1].state_dict().values())


def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    # Of batch normalisation's averages no loss in training tells.
    model = build_model("enet", "binary", width=0.25)
    model.trunk.initial.norm.running_mean[0] = float("inf")
    with pytest.raises(TrainingError, match=r"trunk\.initial\.norm\.running_mean.*is no number"):
        train(replace(SMALL, heads=("binary",), steps=1), tmp_path, quiet=True, model=model)
    assert not find_checkpoints(tmp_path)


def test_a_folder_with_a_run_is_not_trained_over(tmp_path):
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        train(SMALL, tmp_path, resume=True, quiet=True)
    train(SMALL, tmp_path, until_step=1, quiet=True)
    with pytest.raises(TrainingError, match="holds a run already"):
        train(SMALL, tmp_path, quiet=True)


def test_the_command_writes_one_bundle_a_head(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--run", str(run), "--steps", "2", "--name", "tiny", *FLAGS]) == 0
    for head in ("binary", "semantic", "instance"):
        bundle = open_bundle(run / "bundles" / f"tiny-{head}")
        assert bundle.manifest.head == head
        assert bundle.manifest.input_size == (64, 48)
        assert bundle.manifest.training["steps"] == 2
        averaged = read_run(run)[1].state_dict()
        for key, value in load_model(bundle).state_dict().items():
            assert torch.equal(value, averaged[key]), key
    curves = cv2.imread(str(run / "curves.png"))
    assert curves is not None
    assert (curves < 255).any()
    printed = capsys.readouterr().out
    assert "miou" in printed
    assert "tiny-instance" in printed
    # The same from the checkpoint, by hand; never over an existing one.
    words = ["export", "--checkpoint", str(run), "--head", "binary"]
    assert main([*words, "--output", str(tmp_path / "again")]) == 0
    assert open_bundle(tmp_path / "again").manifest.name == "again"
    assert main([*words, "--output", str(tmp_path / "again")]) == 1
    assert "exists already" in capsys.readouterr().err
    # And on from a bundle: its digest is named, its trunk taken over.
    other = tmp_path / "other"
    init = run / "bundles" / "tiny-semantic"
    words = ["train", "--run", str(other), "--steps", "1", "--init", str(init), "--lr", "1e-9"]
    assert main([*words, "--heads", "semantic", *FLAGS]) == 0
    child = open_bundle(other / "bundles" / "enet-semantic")
    assert child.manifest.parent == open_bundle(init).reference
    ours, theirs = load_model(child).state_dict(), load_model(open_bundle(init)).state_dict()
    weight = "trunk.stage2.0.branch.3.weight"
    assert torch.allclose(ours[weight], theirs[weight], atol=1e-6)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    words = [sys.executable, "-m", "waste_seg_ros.cli", "train", "--run", str(tmp_path / "run")]
    flags = [*FLAGS, "--workers", "1"]
    process = subprocess.Popen(
        [*words, "--minutes", "30", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        log = tmp_path / "run" / "log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "--resume" in printed
    state = read_run(tmp_path / "run")[2]
    assert state["step"] >= 1
    assert state["elapsed"] > 0


def test_what_cannot_be_trained_is_named(tmp_path, capsys):
    for words, message in (
        (["--steps", "1", "--data", "photos"], "data 'photos' is not understood; it must be"),
        (["--steps", "1", "--heads", "panoptic"], "unknown head 'panoptic'"),
        (["--steps", "1", "--sizes", "100x60"], "'100x60': both sides must be multiples of 8"),
        (["--steps", "1", "--sizes", "big"], "'big' is not WIDTHxHEIGHT"),
        ([], "give either steps or minutes"),
        (["--steps", "1", "--minutes", "1"], "give either steps or minutes"),
        (["--steps", "1", "--batch", "1"], "batch must be at least 2"),
        (["--steps", "1", "--optimizer", "lion"], "optimizer 'lion'; known: adamw, sgd"),
        (["--steps", "1", "--classes", "glass"], "samples is of the classes glass; name"),
        (["--steps", "1", "--init", "nothere"], "no bundle 'nothere'"),
        (["--minutes", "inf"], "give either steps or minutes"),
        (["--steps", "1", "--class-balance", "nan"], "class_balance must be at least 0, not nan"),
        (["--steps", "1", "--gamma", "-1"], "gamma must be at least 0, not -1"),
        (["--steps", "1", "--classes", "can,can"], "classes must be distinct names"),
    ):
        assert main(["train", "--run", str(tmp_path / "run"), *words, "--width", "0.25"]) == 1
        assert message in capsys.readouterr().err
    # What would be found in the way in the end is told at the start.
    (tmp_path / "enet-binary").mkdir()
    words = ["--steps", "1", "--heads", "binary", "--output", str(tmp_path)]
    assert main(["train", "--run", str(tmp_path / "new"), *words, *FLAGS]) == 1
    assert "enet-binary: exists already; choose another --output or --name" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "new").exists()


def test_settings_come_from_a_file_and_flags_go_before_them(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("batch: 6\nlr: 1\nheads: [binary]\nbf16: false\n")
    config = read_config(path, TrainConfig())
    assert (config.batch, config.lr, config.heads, config.bf16) == (6, 1.0, ("binary",), False)
    for text, message in (
        ("batsh: 6", "unknown setting 'batsh'"),
        ("batch: six", "batch must be a int, not 'six'"),
        ("batch: true", "batch must be a int"),
        ("heads: binary", "heads must be a list of strings"),
        ("- 1", "expected a mapping"),
        ("a: [", r"not YAML: [^\n]*line 1[^\n]*$"),
    ):
        path.write_text(text)
        with pytest.raises(TrainingError, match=rf"settings\.yaml: {message}"):
            read_config(path, TrainConfig())
    run = tmp_path / "run"
    words = ["--steps", "1", *FLAGS, "--heads", "binary"]
    path.write_text("batch: 6\nseed: 5\n")
    assert main(["train", "--run", str(run), "--config", str(path), *words]) == 0
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert (written["batch"], written["seed"], written["heads"]) == (2, 5, ["binary"])


def test_batches_depend_on_seed_and_number_alone():
    one, other = _Batches(SMALL), _Batches(SMALL)
    other[0]
    for key, value in one[3].items():
        assert torch.equal(value, other[3][key]), key
    assert not torch.equal(one[4]["image"][:, :48, :48], one[3]["image"][:, :48, :48])
    reseeded = _Batches(replace(SMALL, seed=1))
    assert {tuple(reseeded[n]["image"].shape) for n in range(12)} == {
        (2, 48, 64, 3),
        (2, 64, 48, 3),
    }


def test_resuming_starts_at_the_batch_after():
    ahead = itertools.islice(make_batches(SMALL, 0), 3)
    last = list(ahead)[2]
    assert torch.equal(next(make_batches(SMALL, 2))["image"], last["image"])


def test_the_default_sizes_suit_every_architecture():
    for name, trunk in TRUNKS.items():
        sizes = rounded_up(TrainConfig.sizes, trunk.stride)
        check_config(TrainConfig(architecture=name, steps=1, sizes=sizes))
    assert rounded_up(("320x240", "256x256"), 32) == ("320x256", "256x256")
    assert rounded_up(("320x240",), 8) == ("320x240",)


def test_sizes():
    assert parse_size("320x240") == (320, 240)


def test_augmentation_is_drawn_from_its_generator_alone():
    sample = synthetic_sample(1, 4, (96, 64))
    for seed in range(20):
        one = augment(sample, np.random.default_rng(seed), (80, 64))
        other = augment(sample, np.random.default_rng(seed), (80, 64))
        assert one.image.shape == (64, 80, 3)
        assert one.labels.shape == one.instances.shape == (64, 80)
        assert (one.image.dtype, one.labels.dtype, one.instances.dtype) == (
            np.uint8,
            np.uint8,
            np.uint16,
        )
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.labels, other.labels)


def test_augmentation_moves_image_labels_and_items_together():
    # Items painted in the colour of their class on black, of which recolouring keeps the order.
    labels = np.zeros((96, 128), np.uint8)
    labels[20:60, 20:50], labels[50:90, 70:120] = 1, 2
    instances = labels.astype(np.uint16) * 3
    image = np.zeros((96, 128, 3), np.uint8)
    image[labels == 1], image[labels == 2] = 100, 200
    sample = Sample(image, labels, instances)
    moved = 0
    for seed in range(40):
        found = augment(sample, np.random.default_rng(seed), (128, 96))
        known = found.labels != IGNORE
        assert np.array_equal(found.instances[known], found.labels[known].astype(np.uint16) * 3)
        assert (found.instances[~known] == 0).all()
        gray = found.image.mean(2)
        # Away from the edges, which interpolation and blur soften.
        inner = [
            gray[cv2.erode((found.labels == c).astype(np.uint8), np.ones((15, 15))) > 0]
            for c in (0, 1, 2)
        ]
        means = [float(part.mean()) for part in inner if len(part)]
        assert means == sorted(means), seed
        moved += not np.array_equal(found.labels, labels)
    assert moved > 20


def test_fitting_scales_image_and_masks():
    sample = synthetic_sample(1, 4, (128, 96))
    fitted = fit_sample(sample, (64, 48))
    assert fitted.image.shape == (48, 64, 3)
    assert set(np.unique(fitted.instances)) <= set(np.unique(sample.instances))
    assert fit_sample(sample, (128, 96)) is sample


def test_schedules():
    for kind in ("cosine", "poly"):
        values = [schedule_factor(kind, f, 0.1) for f in np.linspace(0, 1, 101)]
        assert max(values) == pytest.approx(1.0)
        assert int(np.argmax(values)) == 10
        assert all(a >= b for a, b in itertools.pairwise(values[10:]))
        assert values[-1] == pytest.approx(0.01)
    assert schedule_factor("cosine", 0.55, 0.1) == pytest.approx(0.505)
    assert schedule_factor("constant", 0.9, 0.1) == 1.0
    assert schedule_factor("cosine", 0.0, 0.0) == 1.0


def test_class_weights():
    shares = np.array([0.81, 0.09, 0.1])
    assert class_weights(shares, 0.0).tolist() == pytest.approx([1, 1, 1])
    weights = class_weights(shares, 0.5)
    assert weights[1] / weights[0] == pytest.approx(3.0)
    assert (weights * shares).sum() == pytest.approx(1.0)


def test_the_average_follows_the_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    average = Average(model, 0.5)
    torch.nn.init.constant_(model.weight, 3.0)
    average.update(model, 1)  # early on: 2/11 of the old
    assert float(average.state["weight"]) == pytest.approx(1 * 2 / 11 + 3 * 9 / 11)
    torch.nn.init.constant_(model.weight, 0.0)
    before = float(average.state["weight"])
    average.update(model, 1000)
    assert float(average.state["weight"]) == pytest.approx(before / 2)


def test_validation_figures_by_hand():
    model = build_model("enet", ("binary", "semantic"), ("a", "b"), 0.25)

    def outputs(x):
        # Everything is label 1; the truth is half 1, a quarter 2, the rest background.
        semantic = torch.zeros(len(x), 3, 8, 8)
        semantic[:, 1] = 5
        return {"semantic": semantic, "binary": torch.ones(len(x), 1, 8, 8)}

    model.forward = outputs
    labels = np.ones((8, 8), np.uint8)
    labels[4:, :4], labels[4:, 4:] = 2, 0
    labels[0, 0] = IGNORE
    sample = Sample(np.zeros((8, 8, 3), np.uint8), labels, np.zeros((8, 8), np.uint16))
    figures = validate(model, [sample])
    assert figures["iou/a"] == pytest.approx(31 / 63)
    assert figures["iou/b"] == figures["iou/background"] == 0
    assert figures["miou"] == pytest.approx(31 / 63 / 3)
    assert figures["binary_iou"] == pytest.approx(47 / 63)


def test_curves_of_a_log_cut_short(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 1, "losses": {"total": 2.0}}\n{"step": 2, "validation": {"miou": 0.5}}\n{"st'
    )
    draw_curves(log, tmp_path / "curves.png")
    assert cv2.imread(str(tmp_path / "curves.png")).shape == (760, 1000, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "log.jsonl"]


@pytest.mark.parametrize(("width", "sound"), [(1.0, True), (0.75, False), (0.25, True)])
def test_a_network_learns_whatever_its_channels(width, sound):
    model = build_model("enet", "semantic", width=width)  # 24 dilated channels at 0.75
    assert learns_in_bf16(model) is sound
    config = replace(SMALL, width=width, heads=("semantic",), sizes=("256x256",))
    model = model.to(memory_format=torch.channels_last).train()
    losses = Learner(config, model).learn(next(make_batches(config, 0)), 1e-3)
    assert np.isfinite(losses["total"])
