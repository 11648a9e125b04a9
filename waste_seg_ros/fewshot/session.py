"""From stored samples to a judged candidate, in one call."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from waste_seg_ros.data.sample import Sample
from waste_seg_ros.data.sources import Dataset
from waste_seg_ros.fewshot.finetune import (
    FineTuneConfig,
    FineTuned,
    Progress,
    SampleData,
    fine_tune,
)
from waste_seg_ros.fewshot.gate import GateSettings, Verdict, judge
from waste_seg_ros.fewshot.prototypes import FewShotError, Learned, learn_class
from waste_seg_ros.fewshot.registry import Registry
from waste_seg_ros.fewshot.store import Store, StoreDataset, split
from waste_seg_ros.runtime.bundle import Bundle, load_model

CONTRAST = 12
"""Scenes of each source to rehearse that a prototype is told apart from."""


@dataclass(frozen=True)
class SessionConfig:
    """Settings.

    Attributes:
        fast: prototypes alone, within seconds; else they are the start of a fine-tuning.
        tuning: of the fine-tuning; its ``size`` is the network's own.
        gate: what a candidate must reach.
        held_out: share of the pictures that is held out for the gate, 0..1.
        seconds: wall time for learning, without the gate; 0 for no limit.
        backend: runtime that the gate measures on.
    """

    fast: bool = False
    tuning: FineTuneConfig = field(default_factory=FineTuneConfig)
    gate: GateSettings = field(default_factory=GateSettings)
    held_out: float = 0.25
    seconds: float = 0.0
    backend: str = "auto"


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        candidate: its bundle, saved in the registry; None if it was cancelled.
        verdict: of the gate, recorded there; None likewise.
        prototypes: of the new classes.
        tuned: of the fine-tuning; None if only prototypes were asked for.
        notes: what is to be told of the samples, a line each.
    """

    candidate: Bundle | None
    verdict: Verdict | None
    prototypes: tuple[Learned, ...]
    tuned: FineTuned | None
    notes: tuple[str, ...]


def run_session(
    store: Store,
    registry: Registry,
    rehearsal: Sequence[Dataset],
    frozen: Dataset,
    classes: Sequence[str] = (),
    config: SessionConfig | None = None,
    *,
    base: str = "",
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Learn what is in a store; nothing is promoted.

    Args:
        store: the samples.
        registry: where the candidate goes.
        rehearsal: what to rehearse, in the labels of the base network's classes.
        frozen: the gate's set of old classes.
        classes: to learn; () takes all that have samples.
        config: settings.
        base: network to start from, by name; "" takes the current one. The gate compares with the
            current one in any case.
        progress: called after every step of the fine-tuning.
        cancelled: looked at between steps.

    Raises:
        FewShotError: nothing can be learned, saved or judged; the message says why.
        DataError: samples cannot be read.
        BundleError: the base network cannot be used.
    """
    config = config or SessionConfig()
    begin = time.monotonic()
    current = registry.current()
    bundle = registry.open(base) if base else current
    entries = store.entries()
    found = {name for entry in entries for name in entry.classes}
    names = list(dict.fromkeys(store.spelled(name) for name in classes)) or sorted(found)
    missing = [name for name in names if name not in found]
    if missing or not names:
        what = f"of {missing[0]!r}" if missing else "at all"
        raise FewShotError(f"there are no samples {what} in {store.root}; label some first")
    ids, held_ids, notes = split(entries, config.held_out)
    size = bundle.manifest.input_size
    model = load_model(bundle)
    contrast = [s for data in rehearsal for s in itertools.islice(data, CONTRAST)]
    prototypes: list[Learned] = []
    for name in names:
        if name not in model.classes:
            if cancelled():
                return Outcome(None, None, tuple(prototypes), None, notes)
            shots = _samples(store, (*model.classes, name), ids)
            prototypes.append(learn_class(model, name, shots, contrast, size=size))
            model = prototypes[-1].model
    held_out = _samples(store, model.classes, held_ids)
    tuned = None
    if not config.fast:
        left = config.seconds and max(0.1, config.seconds - (time.monotonic() - begin))
        tuning = replace(config.tuning, size=size, seconds=left or config.tuning.seconds)
        tuned = fine_tune(
            model,
            _samples(store, model.classes, ids),
            rehearsal,
            held_out,
            tuning,
            learned=names,
            progress=progress,
            cancelled=cancelled,
        )
        model = tuned.model
    elif not prototypes:
        raise FewShotError(f"{', '.join(names)}: known already; prototypes are for new classes")
    if cancelled():
        return Outcome(None, None, tuple(prototypes), tuned, notes)
    training: dict[str, Any] = {
        "few_shot": "prototypes" if tuned is None else "fine-tuning",
        "learned": names,
        "samples": ids,
        "steps": tuned.steps if tuned else 0,
        "seconds": round(time.monotonic() - begin, 1),
        "seed": config.tuning.seed,
    }
    candidate = registry.save(model, bundle, training)
    verdict = judge(
        current,
        candidate,
        SampleData(held_out, model.classes),
        frozen,
        names,
        config.gate,
        backend=config.backend,
    )
    registry.record(verdict)
    return Outcome(candidate, verdict, tuple(prototypes), tuned, notes)


def _samples(store: Store, classes: Sequence[str], ids: Sequence[str]) -> list[Sample]:
    """Those of the ids that can be read; [] of none."""
    return list(StoreDataset(store.root, classes, only=ids)) if ids else []
