"""``waste-seg bench model``: a bundle on every backend, and what it could be compared with.

All contenders take turns in one process, in an order drawn anew for each round, so that what else
the machine does falls on all alike. In a round each first runs once without being timed, for the
one before has left the caches full of its own.

*Raw* is the limit: the runtime itself on the same graph, with its input and output already where
it wants them. What a backend takes beyond is our wrapper's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.bench.figures import BenchError, Seconds, as_json, overhead, timing
from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.runtime.backends import BackendError, load_backend
from waste_seg_ros.runtime.bundle import GRAPH, Bundle

RAW = ("openvino", "onnxruntime")
"""Runtimes that can be run without our wrapper."""

Image = NDArray[np.uint8]
Runner = Callable[[Image], Any]


@dataclass(frozen=True, eq=False)
class Contender:
    """Something to time.

    Attributes:
        name: as it is written.
        kind: "backend", "raw" or "peer".
        size: (width, height) of its input.
        run: takes a frame of that size.
        limit: name of the raw contender that it is to be compared with, or "".
    """

    name: str
    kind: str
    size: tuple[int, int]
    run: Runner
    limit: str = ""


def take_turns(
    runners: Sequence[tuple[Runner, Sequence[Any]]],
    rounds: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 3,
) -> list[list[Seconds]]:
    """Time several runners in one go.

    Args:
        runners: each with the inputs that it is given one after the other.
        rounds: in each of which all have their turn.
        repeats: timed runs in a turn, after one that is not.
        clock: [s].
        warm_up: rounds of one run each before the first.

    Returns:
        for each runner its rounds, each the seconds of its runs.
    """
    rng = np.random.default_rng(0)
    for _ in range(warm_up):
        for run, inputs in runners:
            run(inputs[0])
    found: list[list[Seconds]] = [[] for _ in runners]
    for number in range(rounds):
        for index in rng.permutation(len(runners)):
            run, inputs = runners[index]
            times = np.empty(repeats)
            run(inputs[number % len(inputs)])
            for k in range(repeats):
                given = inputs[(number + k) % len(inputs)]
                start = clock()
                run(given)
                times[k] = clock() - start
            found[index].append(times)
    return found


def raw_runner(
    graph: Path, runtime: str, size: tuple[int, int], threads: int = 0, precision: str = "f32"
) -> Runner:
    """A graph that takes (1, H, W, 3) uint8 on a runtime, with nothing of ours around it.

    The settings are those of `runtime.backends`. It takes (H, W, 3) images that lie in one piece.

    Raises:
        ModuleNotFoundError: the runtime is not installed.
    """
    if runtime == "openvino":
        import openvino

        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        network = core.read_model(str(graph))
        network.reshape([1, size[1], size[0], 3])
        request = core.compile_model(network, "CPU", options).create_infer_request()
        return lambda image: request.infer([image[None]], share_inputs=True, share_outputs=True)
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image[None]})


def contenders(
    bundle: Bundle,
    kinds: Sequence[str],
    size: tuple[int, int],
    threads: int,
    precision: str,
) -> tuple[list[Contender], dict[str, str]]:
    """Our backends and, behind each that has one, its limit.

    Returns:
        the contenders, and the reasons why backends are not among them.
    """
    found: list[Contender] = []
    missing: dict[str, str] = {}
    for kind in kinds:
        asked = precision if kind == "openvino" else "f32"
        try:
            backend = load_backend(bundle, kind, size, threads, asked)
        except BackendError as error:
            missing[kind] = str(error)
            continue
        limit = f"raw {kind}" if kind in RAW else ""
        found.append(Contender(kind, "backend", size, backend.predict, limit))
        if limit:
            run = raw_runner(bundle.path / GRAPH, kind, size, threads, asked)
            found.append(Contender(limit, "raw", size, run))
    return found, missing


def measure(
    entrants: Sequence[Contender],
    rounds: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Let contenders take turns; returns an entry of the report for each.

    Raises:
        BenchError: there is none.
    """
    if not entrants:
        raise BenchError("--backends: none of these can run here")
    frames = {
        size: [np.ascontiguousarray(synthetic_sample(0, k, size).image) for k in range(8)]
        for size in {entrant.size for entrant in entrants}
    }
    runners = [(entrant.run, frames[entrant.size]) for entrant in entrants]
    times = dict(
        zip([e.name for e in entrants], take_turns(runners, rounds, repeats, clock), strict=True)
    )
    report = []
    for entrant in entrants:
        entry: dict[str, Any] = {
            "name": entrant.name,
            "kind": entrant.kind,
            "size": list(entrant.size),
            "ms": as_json(timing(times[entrant.name])),
        }
        if entrant.limit:
            share, error = overhead(times[entrant.name], times[entrant.limit])
            entry["over_raw_percent"] = {"value": round(share, 2), "error": round(error, 2)}
        report.append(entry)
    return report
