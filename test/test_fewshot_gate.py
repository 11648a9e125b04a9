"""The gate and the pointer: nothing worse is promoted, and there is always a current network."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from waste_seg_ros.data.sample import CLASSES, Sample, rename_labels
from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.fewshot.finetune import FineTuneConfig, SampleData
from waste_seg_ros.fewshot.gate import GateSettings, frozen_digest, judge
from waste_seg_ros.fewshot.labels import Label
from waste_seg_ros.fewshot.prototypes import FewShotError, learn_class
from waste_seg_ros.fewshot.registry import Registry, RegistryError
from waste_seg_ros.fewshot.session import SessionConfig, run_session
from waste_seg_ros.fewshot.store import Store, split
from waste_seg_ros.models import build_model
from waste_seg_ros.runtime.bundle import BundleError, load_model, open_bundle, save_bundle
from waste_seg_ros.train.start import start_from

SIZE = (256, 192)
OLD = ("paper", "bottle", "aluminum")
NEW = (*OLD, "nylon")


def scenes(seed, count, classes):
    drawn = (synthetic_sample(seed, index, SIZE) for index in range(count))
    return [replace(s, labels=rename_labels(s.labels, CLASSES, classes)) for s in drawn]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A registry whose base knows three of the classes, and two candidates for the fourth.

    One learned it; the other takes everything for it.
    """
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("registry")
    model = build_model("enet", "instance", OLD).eval()
    start_from(model, "enet-instance")
    base = save_bundle(folder / "start", model, name="line", input_size=SIZE, parent="older@0")
    registry = Registry(folder / "registry", base.path)
    learned = learn_class(model, "nylon", scenes(930001, 6, NEW), [], size=SIZE).model
    good = registry.save(learned, base, {"shots": 6})
    greedy = learned
    with torch.no_grad():
        greedy.semantic.full.bias[4] += 12.0
    bad = registry.save(greedy, base)
    return registry, base, good, bad


@pytest.fixture(scope="module")
def held_out():
    return SampleData(scenes(940001, 5, NEW), NEW)


@pytest.fixture(scope="module")
def frozen():
    return SampleData(scenes(950001, 5, OLD), OLD)


@pytest.fixture(scope="module")
def verdicts(made, held_out, frozen):
    _, base, good, bad = made
    settings = GateSettings(margin=0.03)  # five scenes are few
    return [judge(base, c, held_out, frozen, ("nylon",), settings, threads=1) for c in (good, bad)]


@pytest.fixture
def registry(made, tmp_path):
    """A registry of one's own to change."""
    ours, base, *_ = made
    shutil.copytree(ours.root, tmp_path / "registry")
    return Registry(tmp_path / "registry", base.path)


# --- the gate -------------------------------------------------------------------------------------


def test_a_candidate_that_gains_and_forgets_nothing_passes(verdicts, made, frozen):
    verdict = verdicts[0]
    assert verdict.passed, verdict.table()
    assert (verdict.current, verdict.candidate) == (made[1].reference, made[2].reference)
    (change,) = verdict.learned
    assert (change.name, change.before) == ("nylon", 0.0)
    assert change.after > 0.4
    assert "nylon 0.000 ->" in verdict.reason
    assert [c.name for c in verdict.kept] == ["background", *OLD]
    assert verdict.worst_fall <= 0.03
    assert verdict.iou_after == change.after
    assert verdict.frames == {"held-out": 5, "frozen": 5}
    assert verdict.frozen_digest == frozen_digest(frozen)
    assert verdict.figures["frozen"]["binary_iou"][0] > 0.5
    assert "nylon" in verdict.table() and "paper" in verdict.table()


def test_a_candidate_that_forgets_is_refused_with_the_numbers(verdicts):
    verdict = verdicts[1]
    assert not verdict.passed
    fallen = [c for c in verdict.kept if -c.gain > 0.03]
    assert fallen
    for change in fallen:
        assert f"'{change.name}' falls by {-change.gain:.3f}" in verdict.reason
    assert "at most 0.03" in verdict.reason


def test_what_was_not_measured_counts_against_a_candidate(made, held_out, frozen):
    _, base, good, _ = made
    without = SampleData(
        [
            replace(s, labels=np.where(s.labels == 3, 255, s.labels).astype(np.uint8))
            for s in frozen.samples[:1]
        ],
        OLD,
    )
    belt = SampleData(
        [
            replace(
                held_out.samples[0],
                labels=np.zeros(SIZE[::-1], np.uint8),
                instances=np.zeros(SIZE[::-1], np.uint16),
            )
        ],
        NEW,
    )
    verdict = judge(base, good, belt, without, ("nylon", "glass"), threads=1)
    assert not verdict.passed
    assert "no held-out sample shows 'nylon'" in verdict.reason
    assert "does not know 'glass'" in verdict.reason
    assert "show 'aluminum', so nobody knows" in verdict.reason
    with pytest.raises(FewShotError, match="no class"):
        judge(base, good, held_out, frozen, ())
    with pytest.raises(FewShotError, match="and an end"):
        judge(base, good, held_out, SampleData([], NEW), ("nylon",))


def test_a_frozen_set_that_changes_has_another_digest(frozen):
    first = next(s for s in frozen.samples if (s.labels == 1).any())
    other = replace(first, labels=np.where(first.labels == 1, 2, first.labels).astype(np.uint8))
    assert isinstance(other, Sample)
    assert frozen_digest([other]) != frozen_digest([first])
    assert frozen_digest([first]) == frozen_digest([replace(first, name="else")])


def test_from_the_store_to_a_candidate_and_its_promotion(registry, made, tmp_path, frozen):
    store = Store(tmp_path / "store", OLD)
    for scene in scenes(930001, 6, NEW):
        labels = [
            Label(NEW[int(np.bincount(scene.labels[mask]).argmax()) - 1], mask)
            for number in np.unique(scene.instances)
            if number and (mask := scene.instances == number).sum() >= 24
        ]
        store.add(scene.image, labels, complete=True)
    seen = []
    quick = FineTuneConfig(steps=2, batch=2, measure=2)
    config = SessionConfig(tuning=quick, gate=GateSettings(margin=0.2), held_out=0.5)
    outcome = run_session(
        store, registry, [frozen], frozen, ("Nylon",), config, progress=seen.append
    )
    assert outcome.notes == () and [p.step for p in seen] == [1, 2]
    assert outcome.candidate.manifest.classes == NEW
    assert outcome.candidate.manifest.parent == made[1].reference
    assert outcome.candidate.manifest.training["learned"] == ["nylon"]
    held = set(split(store.entries(), 0.5)[1])
    assert held and not held & set(outcome.candidate.manifest.training["samples"])
    assert outcome.verdict.frames["held-out"] == len(held)
    assert outcome.verdict.passed, outcome.verdict.table()
    name = outcome.candidate.manifest.name
    assert registry.promote(name).reference == registry.current().reference
    # What was promoted knows the class: prototypes have nothing to give.
    with pytest.raises(FewShotError, match="known already"):
        run_session(store, registry, [], frozen, ("nylon",), replace(config, fast=True))
    with pytest.raises(FewShotError, match="no samples of 'glass'"):
        run_session(store, registry, [], frozen, ("glass",))
    stopped = run_session(
        store, registry, [frozen], frozen, ("nylon",), config, cancelled=lambda: True
    )
    assert stopped.candidate is None
    assert len(registry.candidates()) == 3


def test_samples_of_one_picture_give_a_candidate_that_is_refused(registry, tmp_path, frozen):
    store = Store(tmp_path / "store", OLD)
    scene = next(s for s in scenes(930001, 6, NEW) if (s.labels == 4).sum() > 200)
    store.add(scene.image, [Label("nylon", scene.labels == 4)])
    outcome = run_session(store, registry, [frozen], frozen, (), SessionConfig(fast=True))
    assert "show one picture" in outcome.notes[0]
    assert not outcome.verdict.passed
    assert "no held-out sample shows 'nylon'" in outcome.verdict.reason
    with pytest.raises(RegistryError, match="was refused"):
        registry.promote(outcome.candidate.manifest.name)


# --- the pointer ----------------------------------------------------------------------------------


def test_promotion_and_the_way_back(registry, made, verdicts):
    _, base, good, bad = made
    assert registry.current().reference == base.reference
    with pytest.raises(RegistryError, match="nothing to return to"):
        registry.roll_back()
    with pytest.raises(RegistryError, match="not judged"):
        registry.promote(good.manifest.name)
    for verdict in verdicts:
        registry.record(verdict)
    with pytest.raises(RegistryError, match="was refused: .* falls by"):
        registry.promote(bad.manifest.name)
    assert registry.promote(good.manifest.name).reference == good.reference
    again = Registry(registry.root, registry.base)
    assert again.current().reference == good.reference
    assert again.current().path == registry.bundles / good.manifest.name
    assert again.lineage() == [good.reference, base.reference, "older@0"]
    with pytest.raises(RegistryError, match="current network already"):
        again.promote(good.manifest.name)
    with pytest.raises(RegistryError, match="roll back first"):
        again.discard(good.manifest.name)
    assert again.roll_back("the operator said so").reference == base.reference
    assert again.current().reference == base.reference
    events = again.pointer().events
    assert [e.event for e in events] == ["promoted", "rolled back"]
    assert events[1].reason == "the operator said so"
    again.discard(bad.manifest.name)
    assert again.candidates() == [good.manifest.name]
    with pytest.raises(RegistryError, match="no such candidate; there are"):
        again.promote("../start")


def test_a_verdict_against_another_network_does_not_count(registry, made, verdicts):
    good = made[2]
    registry.record(replace(verdicts[0], current="line@" + "0" * 64))
    with pytest.raises(RegistryError, match="judge it again"):
        registry.promote(good.manifest.name)
    registry.record(replace(verdicts[0], candidate=good.manifest.name + "@" + "0" * 64))
    with pytest.raises(RegistryError, match="not judged"):
        registry.promote(good.manifest.name)
    assert registry.pointer().events == ()


def test_names_are_used_once(made, registry):
    _, base, good, bad = made
    assert (good.manifest.name, bad.manifest.name) == ("line-fs0001", "line-fs0002")
    assert good.manifest.parent == base.reference
    assert good.manifest.training["shots"] == 6
    registry.discard(bad.manifest.name)
    (registry.bundles / ".line-fs0003.killed").mkdir()
    third = registry.save(load_model(good), good)
    assert third.manifest.name == "line-fs0002"  # it was never judged, so nobody can mean the old
    assert not list(registry.bundles.glob(".*"))


def test_a_damaged_candidate_or_pointer_is_named_and_nothing_moves(registry, made, verdicts):
    good = made[2]
    registry.record(verdicts[0])
    path = registry.bundles / good.manifest.name / "weights.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(BundleError, match="SHA-256"):
        registry.promote(good.manifest.name)
    assert registry.pointer().events == ()
    path.write_bytes(data)
    registry.promote(good.manifest.name)
    pointer = registry.root / "current.json"
    values = json.loads(pointer.read_text())
    pointer.write_text(json.dumps({**values, "stack": ["line@" + "0" * 64, values["stack"][1]]}))
    with pytest.raises(RegistryError, match="another network"):
        registry.roll_back()
    assert registry.current().reference == good.reference
    pointer.write_text("{")
    with pytest.raises(RegistryError, match="damaged"):
        registry.current()


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("number", [1, 2])
def test_killed_while_promoting_there_is_a_current_network(registry, made, verdicts, call, number):
    _, base, good, _ = made
    registry.record(verdicts[0])
    child = os.fork()
    if child == 0:
        plain, count = getattr(os, call), 0

        def trapped(*args, **more):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **more)

        setattr(os, call, trapped)
        try:
            registry.promote(good.manifest.name)
        finally:
            os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    committed = not killed or (call, number) == ("fsync", 2)
    assert killed == (number == 1 or call == "fsync")
    again = Registry(registry.root, registry.base)
    assert again.current().reference == (good if committed else base).reference
    if not committed:
        again.promote(good.manifest.name)
    assert again.roll_back().reference == base.reference


def test_the_bundles_that_come_along_can_be_the_base(tmp_path):
    registry = Registry(tmp_path / "new")
    assert registry.current().reference == open_bundle("enet-instance").reference
    assert registry.candidates() == []
    assert not registry.root.exists()
