"""Whether a candidate may take the place of the current network.

Both run as they would on the robot, on held-out samples of what was to be learned and on a set that
never changes (the frozen one) of what was known. The candidate passes only if it gains on every
class to learn and falls on none of the old ones, nor on the belt, by more than a margin. What
nothing was measured of counts against it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from waste_seg_ros.data.sample import Sample
from waste_seg_ros.data.sources import Dataset
from waste_seg_ros.fewshot.prototypes import FewShotError
from waste_seg_ros.fewshot.store import pixel_digest
from waste_seg_ros.runtime.bundle import Bundle
from waste_seg_ros.train.evaluate import bundle_predictor, evaluate

BACKGROUND_NAME = "background"

_FIGURES = ("binary_iou", "miou", "pq", "item_recall", "item_precision", "item_naming")


@dataclass(frozen=True)
class GateSettings:
    """What a candidate must reach.

    Attributes:
        gain: IoU by which every class to learn must rise, 0..1.
        floor: IoU that it must reach; below, a class is of no use to a robot.
        margin: IoU by which an old class, or the belt, may fall.
    """

    gain: float = 0.02
    floor: float = 0.3
    margin: float = 0.01


@dataclass(frozen=True)
class Change:
    """IoU of a class with the current network and with the candidate, 0..1.

    NaN where nothing was measured; ``before`` is 0 for a class that the current one does not know.
    """

    name: str
    before: float
    after: float

    @property
    def gain(self) -> float:
        """After less before."""
        return self.after - self.before


@dataclass(frozen=True)
class Verdict:
    """What the gate says, with all its numbers.

    Attributes:
        current, candidate: references ("name@digest") of the two bundles.
        passed: it may be promoted.
        reason: in a line: what stands against it, or what it gains.
        learned: change of each class to learn, on the held-out samples.
        kept: change of the belt ("background") and of each old class, on the frozen set, or on the
            held-out samples if the frozen set does not show it.
        figures: further ones by set ("held-out", "frozen"), then by figure: before and after.
        frames: by set.
        frozen_digest: SHA-256 of the frozen set.
        settings: that were asked for.
        seconds: it took.
    """

    current: str
    candidate: str
    passed: bool
    reason: str
    learned: tuple[Change, ...]
    kept: tuple[Change, ...]
    figures: Mapping[str, Mapping[str, tuple[float, float]]]
    frames: Mapping[str, int]
    frozen_digest: str
    settings: GateSettings
    seconds: float

    @property
    def iou_before(self) -> float:
        """Mean over the classes to learn, 0..1; NaN without any."""
        return _mean([change.before for change in self.learned])

    @property
    def iou_after(self) -> float:
        """Likewise with the candidate."""
        return _mean([change.after for change in self.learned])

    @property
    def worst_fall(self) -> float:
        """Largest fall of an old class or the belt; below 0 if all rose."""
        return max((-change.gain for change in self.kept), default=math.nan)

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """The numbers as lines for a terminal or a message."""
        lines = [f"{self.candidate.partition('@')[0]}: {self.reason}"]
        for title, changes in (("to learn", self.learned), ("old", self.kept)):
            for change in changes:
                lines.append(
                    f"  {title:8} {change.name:16} {change.before:6.3f} -> {change.after:6.3f} "
                    f"({change.gain:+.3f})"
                )
        return "\n".join(lines)


def judge(
    current: Bundle,
    candidate: Bundle,
    held_out: Dataset,
    frozen: Dataset,
    learned: Sequence[str],
    settings: GateSettings | None = None,
    *,
    backend: str = "auto",
    threads: int = 0,
) -> Verdict:
    """Measure both networks and decide.

    Args:
        current: the bundle that works now.
        candidate: the one that would take its place.
        held_out: samples of the classes to learn that the candidate did not learn from.
        frozen: samples of the old classes; always the same ones.
        learned: classes to learn: new ones, or old ones that look different now.
        settings: what must be reached.
        backend: runtime to measure on, see `runtime.backends`.
        threads: of it; 0 leaves it to the runtime.

    Raises:
        FewShotError: if the frozen set is empty or endless, or no class to learn is given.
        BackendError: if a bundle cannot be run.
    """
    settings = settings or GateSettings()
    begin = time.perf_counter()
    if not learned:
        raise FewShotError("no class to learn is given, so there is nothing to gain")
    if not len(frozen):
        raise FewShotError(
            "the frozen set must have samples and an end, such as synthetic:950001:60"
        )
    digest = frozen_digest(frozen)
    results: dict[str, list[dict[str, Any]]] = {"held-out": [], "frozen": []}
    for bundle in (current, candidate):
        predict = bundle_predictor(bundle, backend, threads)
        for name, data in (("held-out", held_out), ("frozen", frozen)):
            if name == "held-out" and not len(held_out):
                results[name].append({"frames": 0})  # which counts against it
                continue
            try:
                result = evaluate(
                    predict, data, head=bundle.manifest.head, classes=bundle.manifest.classes
                )
            except ValueError as error:
                raise FewShotError(f"{name} samples: {error}") from error
            results[name].append(result)
    known = current.manifest.classes
    changes = [_change(name, results["held-out"], known) for name in learned]
    kept = []
    for name in (BACKGROUND_NAME, *known):
        if name not in learned:
            change = _change(name, results["frozen"], known)
            if math.isnan(change.before):
                change = _change(name, results["held-out"], known)
            kept.append(change)
    objections = _objections(changes, kept, settings, candidate)
    gains = ", ".join(f"{c.name} {c.before:.3f} -> {c.after:.3f}" for c in changes)
    return Verdict(
        current=current.reference,
        candidate=candidate.reference,
        passed=not objections,
        reason="; ".join(objections) if objections else f"gains: {gains}",
        learned=tuple(changes),
        kept=tuple(kept),
        figures={
            name: {
                key: (float(pair[0].get(key, math.nan)), float(pair[1].get(key, math.nan)))
                for key in _FIGURES
            }
            for name, pair in results.items()
        },
        frames={name: int(pair[0]["frames"]) for name, pair in results.items()},
        frozen_digest=digest,
        settings=settings,
        seconds=time.perf_counter() - begin,
    )


def frozen_digest(samples: Iterable[Sample]) -> str:
    """SHA-256 (hex) of samples: their pictures, labels and items."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(pixel_digest(sample.image).encode())
        digest.update(sample.labels.tobytes())
        digest.update(sample.instances.tobytes())
    return digest.hexdigest()


def _change(name: str, pair: Sequence[Mapping[str, Any]], known: Sequence[str]) -> Change:
    before, after = (float(result.get("iou", {}).get(name, math.nan)) for result in pair)
    if name not in known and name != BACKGROUND_NAME and not math.isnan(after):
        before = 0.0
    return Change(name, before, after)


def _objections(
    learned: Sequence[Change], kept: Sequence[Change], settings: GateSettings, candidate: Bundle
) -> list[str]:
    """What stands against the candidate, a phrase each."""
    found = []
    for change in learned:
        if change.name not in candidate.manifest.classes:
            found.append(f"the candidate does not know {change.name!r}")
        elif math.isnan(change.after):
            found.append(f"no held-out sample shows {change.name!r}: label it in one picture more")
        elif change.after < settings.floor:
            found.append(
                f"{change.name!r} reaches an IoU of {change.after:.3f} only; at least "
                f"{settings.floor:g} is asked for"
            )
        elif not change.gain >= settings.gain:
            found.append(
                f"{change.name!r} gains {change.gain:+.3f} only ({change.before:.3f} -> "
                f"{change.after:.3f}); at least {settings.gain:g} is asked for"
            )
    for change in kept:
        if change.name not in (BACKGROUND_NAME, *candidate.manifest.classes):
            found.append(f"the candidate does not know {change.name!r}, which is an old class")
        elif math.isnan(change.before):
            found.append(
                f"neither the frozen set nor the held-out samples show {change.name!r}, so nobody "
                "knows whether it suffers"
            )
        elif not -change.gain <= settings.margin:
            found.append(
                f"{change.name!r} falls by {-change.gain:.3f} ({change.before:.3f} -> "
                f"{change.after:.3f}); at most {settings.margin:g} is allowed"
            )
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
