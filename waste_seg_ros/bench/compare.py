"""``waste-seg bench compare A.json B.json``: what has become worse from A to B beyond noise.

A figure is worse if it differs by more than all of: a share of itself (``--tolerance``), the least
difference that matters to anybody, and three standard errors of the difference. Its standard error
comes from how much the rounds, or the parts of a window, of each report differ among themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waste_seg_ros.bench.figures import BUSY, FORMAT, KIND, BenchError

TOLERANCE = 0.05
ERRORS = 3.0
#: Least differences that matter, by unit.
LEAST = {"ms": 0.05, "/s": 0.5, "MB": 10.0, "%": 5.0, "share": 0.02}


@dataclass(frozen=True)
class Figure:
    """One figure of a report; the error is NaN if it is not known."""

    value: float
    error: float
    unit: str
    more_is_better: bool = False


@dataclass(frozen=True)
class Difference:
    """How a figure differs between two reports.

    Attributes:
        name: of the figure.
        before, after: the two.
        change: relative, positive for more; NaN if it was 0.
        verdict: "worse", "better" or "same".
    """

    name: str
    before: Figure
    after: Figure
    change: float
    verdict: str


def read_report(path: Path) -> dict[str, Any]:
    """Read a report of ``waste-seg bench``.

    Raises:
        BenchError: it is none, or of another version; names the file.
    """
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BenchError(f"{path}: is not JSON: {error}") from error
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise BenchError(f"{path}: is not a report of waste-seg bench --output")
    if report.get("format") != FORMAT:
        raise BenchError(
            f"{path}: is of format {report.get('format')!r}; this version reads {FORMAT}: "
            "measure anew"
        )
    return report


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _timing(name: str, entry: Mapping[str, Any], slow_end: bool) -> Iterator[tuple[str, Figure]]:
    yield f"{name} p50", Figure(float(entry["p50"]), _number(entry["error"]), "ms")
    if slow_end:
        yield f"{name} p99", Figure(float(entry["p99"]), _number(entry["error_p99"]), "ms")


def _size(size: Any) -> str:
    return "x".join(map(str, size)) if size else "?"


def figures(report: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a report that are compared, by name."""
    found: dict[str, Figure] = {}
    for entry in report.get("model", ()):
        name = f"model {entry['name']} {_size(entry['size'])}"
        found |= _timing(name, entry["ms"], slow_end=False)
    for entry in report.get("node", ()):
        name = (
            f"node {entry['node']} {entry['backend']} {_size(entry['image'])} to "
            f"{_size(entry['input'])}, {entry['items']} items"
        )
        found |= _timing(f"{name}: total", entry["total_ms"], slow_end=False)
        for stage, timed in entry["stages_ms"].items():
            found |= _timing(f"{name}: {stage}", timed, slow_end=False)
    for entry in report.get("graph", ()):
        name = (
            f"graph {entry['node']} {entry['backend']} {_size(entry['image'])} to "
            f"{_size(entry['input'])}, {entry['rate']:g} Hz, {entry['items']} items"
        )
        found |= _timing(f"{name}: latency", entry["latency_ms"], slow_end=True)
        speed = entry["frames_per_second"]
        found[f"{name}: images"] = Figure(
            float(speed["value"]), _number(speed["error"]), "/s", more_is_better=True
        )
        found[f"{name}: memory peak"] = Figure(entry["memory_mb"]["peak"], math.nan, "MB")
        found[f"{name}: memory growth"] = Figure(entry["memory_mb"]["growth"], math.nan, "MB")
        found[f"{name}: processor"] = Figure(entry["cpu_percent"]["segmenter"], math.nan, "%")
        if not entry["overload"]:
            found[f"{name}: not served"] = Figure(entry["not_served_share"], math.nan, "share")
    return found


def judge(before: Figure, after: Figure, tolerance: float = TOLERANCE) -> str:
    """Say whether a figure has become "worse", "better", or is the "same" within noise."""
    difference = after.value - before.value
    errors = [error for error in (before.error, after.error) if math.isfinite(error)]
    noise = ERRORS * math.sqrt(sum(error**2 for error in errors))
    limit = max(tolerance * abs(before.value), LEAST[before.unit], noise)
    if not abs(difference) > limit:
        return "same"
    return "better" if (difference > 0) == before.more_is_better else "worse"


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    tolerance: float = TOLERANCE,
    any_machine: bool = False,
) -> list[Difference]:
    """Compare two reports figure by figure; those that only one of them has are left out.

    Raises:
        BenchError: they have nothing in common, or come of different machines or clocks.
    """
    if before.get("clock") != after.get("clock"):
        raise BenchError("one report counts processor time and the other the clock's")
    if not any_machine:
        for name in ("processor", "cores"):
            first, second = before["machine"][name], after["machine"][name]
            if first != second:
                raise BenchError(
                    f"machine: {name} {first} and {second}: times cannot be compared "
                    "(--any-machine does)"
                )
    old, new = figures(before), figures(after)
    common = [name for name in old if name in new]
    if not common:
        raise BenchError("the two reports have no figure in common: measure the same cases")
    return [
        Difference(
            name,
            old[name],
            new[name],
            new[name].value / old[name].value - 1 if old[name].value else math.nan,
            judge(old[name], new[name], tolerance),
        )
        for name in common
    ]


def print_comparison(
    before: Mapping[str, Any], after: Mapping[str, Any], found: list[Difference], every: bool
) -> None:
    """Print what differs, or every figure."""
    print(f"{before['commit'][:10] or '?'} of {before['date']} and ", end="")
    print(f"{after['commit'][:10] or '?'} of {after['date']}: {len(found)} figures in common")
    for report in (before, after):
        busy = _number(report["machine"]["busy_before"])
        if busy > BUSY:
            print(
                f"note: {report['date']}: others took {100 * busy:.0f} % of the cores just before; "
                "measure on a quiet machine"
            )
    for one in found:
        if every or one.verdict != "same":
            change = "" if math.isnan(one.change) else f" ({100 * one.change:+.1f} %)"
            print(
                f"{one.verdict:7s}{one.name}: {one.before.value:.4g} -> {one.after.value:.4g} "
                f"{one.before.unit}{change}"
            )
    worse = sum(one.verdict == "worse" for one in found)
    better = sum(one.verdict == "better" for one in found)
    print(f"{worse} worse, {better} better, {len(found) - worse - better} the same within noise")
