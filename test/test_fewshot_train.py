"""Learning a class that no network knows from a few frames, with the weights that come along."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from waste_seg_ros.data.sample import CLASSES, IGNORE, Sample
from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.fewshot.finetune import (
    FineTuneConfig,
    PastedData,
    SampleData,
    fill_background,
    fine_tune,
)
from waste_seg_ros.fewshot.prototypes import FewShotError, extend, learn_class
from waste_seg_ros.models import build_model
from waste_seg_ros.runtime.bundle import load_model, open_bundle
from waste_seg_ros.train.loop import validate

SIZE = (192, 144)
NEW = (*CLASSES, "checker")
CONFIG = FineTuneConfig(steps=24, batch=4, size=SIZE, measure=8)


def checkered(sample, seed):
    """`sample` with one item more, of a kind that no network was trained on, as label 5."""
    rng = np.random.default_rng(seed)
    height, width = sample.labels.shape
    image, labels, instances = (a.copy() for a in (sample.image, sample.labels, sample.instances))
    r = rng.uniform(0.08, 0.13) * width
    x, y, angle = rng.uniform(r, width - r), rng.uniform(r, height - r), rng.uniform(0, 3)
    rows, columns = np.mgrid[:height, :width]
    u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    v = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
    odd = (np.floor(u / r * 2.5) + np.floor(v / r * 2.5)) % 2 == 1
    colour = np.where(odd[..., None], (230, 40, 160), (30, 200, 90)) * rng.uniform(0.7, 1.05)
    inside = np.hypot(u, v) <= r
    noisy = colour + rng.normal(0, 5, (height, width, 1))
    image[inside] = np.clip(noisy, 0, 255).astype(np.uint8)[inside]
    labels[inside], instances[inside] = 5, instances.max() + 1
    return Sample(image, labels, instances, f"{sample.name} checkered {seed}")


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load_model(open_bundle("enet-instance"))


@pytest.fixture(scope="module")
def scenes():
    return [synthetic_sample(930001, index, SIZE) for index in range(14)]


@pytest.fixture(scope="module")
def shots(scenes):
    return [checkered(scene, seed) for seed, scene in enumerate(scenes[:5])]


@pytest.fixture(scope="module")
def held_out(scenes):
    return [checkered(scene, 100 + seed) for seed, scene in enumerate(scenes[5:10])]


@pytest.fixture(scope="module")
def rehearsal(scenes):
    return SampleData(scenes[10:], NEW)


@pytest.fixture(scope="module")
def learned(model, shots, rehearsal):
    return learn_class(model, "checker", shots, rehearsal.samples, size=SIZE)


# --- prototypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["enet", "icnet", "bisenet"])
def test_a_network_with_a_class_more_says_the_same_of_the_others(architecture):
    torch.manual_seed(0)
    model = build_model(architecture, "instance", ("a", "b"), 0.25, guides=True).eval()
    wider = extend(model, "c")
    x = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        before, after = model(x), wider(x)
    assert wider.classes == ("a", "b", "c")
    assert after["semantic"].shape == (1, 4, 96, 128)
    assert torch.allclose(after["semantic"][:, :3], before["semantic"], atol=1e-6)
    assert not after["semantic"][:, 3].any()
    assert torch.equal(after["offsets"], before["offsets"])
    assert model.classes == ("a", "b")


def test_a_prototype_finds_a_kind_that_was_never_seen(model, learned, held_out):
    unknown = [
        replace(s, labels=np.where(s.labels == 5, IGNORE, s.labels).astype(np.uint8))
        for s in held_out
    ]
    before, after = validate(model, unknown), validate(learned.model, held_out)
    assert after["iou/checker"] > 0.4
    assert learned.seen > 0.8 and learned.told > 0.85
    assert after["iou/nylon"] > before["iou/nylon"] - 0.05
    prototype = learned.prototype
    assert (prototype.name, prototype.items, prototype.fine.shape) == ("checker", 5, (16,))
    assert set(prototype.alike) <= set(CLASSES)
    assert all(-1 <= value <= 1 for value in prototype.alike.values())
    # Only the new channel is other.
    ours, theirs = learned.model.state_dict(), model.state_dict()
    for key, value in theirs.items():
        same = ours[key][:, :5] if key == "semantic.full.weight" else ours[key]
        assert torch.equal(same[:5] if key == "semantic.full.bias" else same, value), key


def test_refinement_lowers_the_loss_and_is_fast(model, shots, rehearsal, held_out, learned):
    before = time.process_time()
    raw = learn_class(model, "checker", shots, rehearsal.samples, size=SIZE, steps=0)
    again = learn_class(model, "checker", shots, rehearsal.samples, size=SIZE)
    assert time.process_time() - before < 10  # s of CPU for two
    assert raw.loss[0] == raw.loss[1] == pytest.approx(learned.loss[0], rel=1e-4)
    assert learned.loss[1] < 0.95 * learned.loss[0]
    assert validate(raw.model, held_out)["iou/checker"] > 0.2
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, learned.model.state_dict()[key]), key


def test_what_cannot_be_learned_is_refused(model, shots, scenes):
    with pytest.raises(FewShotError, match="known already"):
        learn_class(model, "paper", shots, scenes, size=SIZE)
    with pytest.raises(FewShotError, match="no sample to learn from shows"):
        learn_class(model, "checker", scenes[:1], scenes, size=SIZE)
    alone = replace(shots[0], labels=np.where(shots[0].labels == 5, 5, IGNORE).astype(np.uint8))
    with pytest.raises(FewShotError, match="no items of other classes"):
        learn_class(model, "checker", [alone], [], size=SIZE)
    with pytest.raises(FewShotError, match="has no classes"):
        extend(build_model("enet", "binary", ("a",), 0.25), "checker")


# --- fine-tuning ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(learned, shots, rehearsal, held_out):
    seen = []
    before = {key: value.clone() for key, value in learned.model.state_dict().items()}
    result = fine_tune(
        learned.model,
        shots,
        [rehearsal],
        held_out,
        CONFIG,
        learned=("checker",),
        progress=seen.append,
    )
    for key, value in learned.model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the network given was changed"
    return result, seen


def test_fine_tuning_gains_on_the_new_class(tuned, learned, held_out):
    result, _ = tuned
    before, after = validate(learned.model, held_out), validate(result.model, held_out)
    assert after["iou/checker"] > before["iou/checker"]
    assert after["miou"] > before["miou"] - 0.01
    assert (result.stopped, result.steps) == ("steps", 24)
    assert set(result.held_out) == {8, 16, 24}
    assert result.held_out[24] == pytest.approx(after)
    assert 0 < result.loss < 10


def test_encoder_and_statistics_stay(tuned, learned):
    result, _ = tuned
    changed = set()
    for (name, ours), theirs in zip(
        result.model.named_modules(), learned.model.modules(), strict=True
    ):
        if isinstance(ours, nn.BatchNorm2d):
            assert torch.equal(ours.running_mean, theirs.running_mean), name
            assert torch.equal(ours.running_var, theirs.running_var), name
        assert getattr(ours, "dropout", None) == getattr(theirs, "dropout", None)
        for key, value in ours.named_parameters(recurse=False):
            if not torch.equal(value, getattr(theirs, key)):
                changed.add(name.split(".")[1] if name.startswith("trunk") else name.split(".")[0])
    assert {"semantic", "binary", "instance", "stage5"} <= changed
    assert not changed & {"initial", "down1", "stage1", "down2", "stage2", "stage3"}
    assert all(p.requires_grad for p in result.model.parameters())


def test_progress_is_told_at_every_step(tuned):
    _, seen = tuned
    assert [p.step for p in seen] == list(range(1, 25))
    assert all(p.steps == 24 and math.isfinite(p.loss) for p in seen)
    assert math.isnan(seen[0].held_out_iou) and 0 < seen[-1].held_out_iou <= 1
    assert seen[-1].eta == 0 < seen[0].eta


def test_it_can_be_cancelled_and_has_an_end(learned, shots, rehearsal, held_out):
    seen = []
    config = replace(CONFIG, steps=10_000, batch=2)
    result = fine_tune(
        learned.model,
        shots[:1],
        [rehearsal],
        (),
        replace(config, seconds=60.0),
        progress=seen.append,
        cancelled=lambda: len(seen) >= 3,
    )
    assert (result.stopped, result.steps) == ("cancelled", 3)
    assert all(p.step < p.steps < 10_000 and p.eta <= 60 for p in seen)
    result = fine_tune(learned.model, shots[:1], [], (), replace(config, seconds=0.01))
    assert (result.stopped, result.steps) == ("time", 0)
    config = replace(config, lr=0.0, measure=1, patience=2)
    result = fine_tune(learned.model, shots[:1], [], held_out[:1], config)
    assert (result.stopped, result.steps) == ("patience", 3)


def test_settings_and_samples_that_cannot_be_are_named(learned, shots, rehearsal):
    def tune(samples=shots, **changes):
        return fine_tune(learned.model, samples, [rehearsal], (), replace(CONFIG, **changes))

    for changes, message in (
        ({"freeze": "all"}, "freeze"),
        ({"steps": 0}, "steps"),
        ({"seconds": math.nan}, "seconds"),
        ({"shots": 0}, "shots"),
        ({"size": (190, 144)}, "multiples of 8"),
    ):
        with pytest.raises(FewShotError, match=message):
            tune(**changes)
    with pytest.raises(FewShotError, match="no samples"):
        tune([])
    stranger = replace(shots[0], labels=np.full_like(shots[0].labels, 9))
    with pytest.raises(FewShotError, match="label 9; the network knows 5"):
        tune([stranger])
    spoiled = extend(learned.model, "else")
    with torch.no_grad():
        spoiled.semantic.full.bias[0] = math.nan
    with pytest.raises(FewShotError, match="no number at step 0"):
        fine_tune(spoiled, shots, [], (), CONFIG)


def test_pasted_items_are_labelled_as_they_lie(shots, rehearsal):
    data = PastedData(shots, rehearsal, NEW, SIZE, seed=3)
    assert len(data) == 0
    shown = 0
    for index in range(12):
        sample = data.sample(index)
        assert np.array_equal(sample.image, data.sample(index).image)
        assert sample.labels.shape == SIZE[::-1]
        assert ((sample.instances > 0) <= (sample.labels > 0)).all()
        for number in np.unique(sample.instances[sample.instances > 0]):
            assert len(np.unique(sample.labels[sample.instances == number])) == 1
        new = sample.labels == 5
        if new.sum() > 200:
            shown += 1
            red, green, blue = sample.image[new].mean(0)
            assert abs(red - blue) < 60 and max(red, green, blue) > 80
    assert shown >= 3


def test_what_nobody_labelled_becomes_belt_where_the_network_is_sure(model, shots):
    whole = shots[0]
    partial = replace(whole, labels=np.where(whole.labels == 5, 5, IGNORE).astype(np.uint8))
    (filled,) = fill_background(model, [partial], SIZE)
    belt = filled.labels == 0
    assert belt.mean() > 0.3
    assert (whole.labels[belt] == 0).mean() > 0.97
    assert np.array_equal(filled.labels == 5, whole.labels == 5)
