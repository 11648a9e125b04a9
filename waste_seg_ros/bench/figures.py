"""Arithmetic of the benchmark: percentiles with their noise, and the machine they come from."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
"""Of the report."""
KIND = "waste-seg bench"
BUSY = 0.1
"""Share of the cores that others may take while the machine still counts as quiet."""
PACKAGES = ("numpy", "opencv-python-headless", "openvino", "onnxruntime", "torch", "ultralytics")

Seconds = NDArray[np.float64]


class BenchError(ValueError):
    """The benchmark cannot run; the message names the flag or file, and the mend."""


@dataclass(frozen=True)
class Timing:
    """How long something took, in milliseconds.

    Attributes:
        p50, p90, p99: percentiles of all runs.
        least: the shortest.
        error: standard error of p50, from how much the rounds' medians differ; NaN for one round.
        error_p99: likewise of p99.
        count: of runs.
    """

    p50: float
    p90: float
    p99: float
    least: float
    error: float
    error_p99: float
    count: int


def standard_error(values: Sequence[float] | Seconds) -> float:
    """Standard error of the median of independent values; NaN of fewer than two.

    By the median absolute deviation, so that a hiccup of the machine does not hide what changed.
    For normal values it is 1.253 times that of their mean.
    """
    if len(values) < 2:
        return math.nan
    array = np.asarray(values, np.float64)
    deviation = float(np.median(np.abs(array - np.median(array))))
    return 1.2533 * 1.4826 * deviation / math.sqrt(len(array))


def timing(rounds: Sequence[Seconds]) -> Timing:
    """Sum up the runs [s] of several rounds, of which each saw the machine at another moment.

    Raises:
        ValueError: there is no run.
    """
    parts = [1e3 * np.asarray(part, np.float64) for part in rounds if len(part)]
    if not parts:
        raise ValueError("there is nothing to sum up")
    whole = np.concatenate(parts)
    p50, p90, p99 = (float(value) for value in np.percentile(whole, (50, 90, 99)))
    return Timing(
        p50=p50,
        p90=p90,
        p99=p99,
        least=float(whole.min()),
        error=standard_error([float(np.median(part)) for part in parts]),
        error_p99=standard_error([float(np.percentile(part, 99)) for part in parts]),
        count=len(whole),
    )


def overhead(rounds: Sequence[Seconds], limit: Sequence[Seconds]) -> tuple[float, float]:
    """By how many per cent the runs take longer than the limit's of the same round.

    Returns:
        the median over the rounds, and its standard error.
    """
    shares = [
        100 * (float(np.median(own)) / float(np.median(least)) - 1)
        for own, least in zip(rounds, limit, strict=True)
    ]
    return float(np.median(shares)), standard_error(shares)


def thinned(values: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Cut a sequence into so many consecutive parts, as even as can be; fewer if it is short."""
    count = max(1, min(parts, len(values)))
    edges = [round(k * len(values) / count) for k in range(count + 1)]
    return [values[a:b] for a, b in itertools.pairwise(edges)]


# --- the machine ----------------------------------------------------------------------------------


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def busy_share(seconds: float = 1.0) -> float:
    """Share of all cores' time [0..1] that is used at the moment; this process sleeps."""

    def read() -> tuple[int, int]:
        fields = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # idle, and waiting for a disk

    try:
        whole, idle = read()
        time.sleep(seconds)
        whole_after, idle_after = read()
    except (OSError, ValueError, IndexError):  # not Linux
        return math.nan
    return 1 - (idle_after - idle) / max(1, whole_after - whole)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; of what is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["rmw"] = os.environ.get("RMW_IMPLEMENTATION", "")
    return found


def describe_run() -> dict[str, Any]:
    """The head of a report: machine, versions, commit and how busy the machine is with others."""
    # With it comes PyTorch, which the nodes that import this file do without.
    from waste_seg_ros.runtime.export import source_commit

    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError):
        memory = math.nan
    return {
        "kind": KIND,
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(memory, 1),
            "system": platform.platform(),
            "busy_before": round(busy_share(), 3),
        },
        "versions": versions(),
    }


def as_json(found: Timing) -> dict[str, float | int]:
    """For the report, to a microsecond."""
    return {k: v if isinstance(v, int) else round(v, 4) for k, v in asdict(found).items()}
