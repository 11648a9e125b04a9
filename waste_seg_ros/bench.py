"""How fast this machine runs a bundle: ``waste-seg bench``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.files import write_json
from waste_seg_ros.runtime import AUTO_ORDER
from waste_seg_ros.runtime.backends import (
    PRECISIONS,
    Backend,
    BackendError,
    load_backend,
)
from waste_seg_ros.runtime.bundle import BundleError, open_bundle


def measure(
    backend: Backend, frames: Sequence[NDArray[np.uint8]], runs: int, warm_up: int = 10
) -> NDArray[np.float64]:
    """Seconds that each of ``runs`` predictions took, after ``warm_up`` ones that do not count."""
    times = np.empty(runs)
    for number in range(-warm_up, runs):
        frame = frames[number % len(frames)]
        start = time.perf_counter()
        backend.predict(frame)
        if number >= 0:
            times[number] = time.perf_counter() - start
    return times


def percentiles(seconds: NDArray[np.float64]) -> dict[str, float]:
    """Median and the slow end, in milliseconds, and frames/s at the median."""
    p50, p90, p99 = (float(v) for v in np.percentile(seconds, (50, 90, 99)) * 1e3)
    return {
        "p50_ms": round(p50, 3),
        "p90_ms": round(p90, 3),
        "p99_ms": round(p99, 3),
        "min_ms": round(float(seconds.min() * 1e3), 3),
        "frames_per_second": round(1e3 / p50, 1),
    }


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT") from None
    return width, height


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``waste-seg bench``."""
    parser.add_argument("--model", default="enet-instance", help="bundle, by name or path")
    parser.add_argument(
        "--backends",
        default=",".join(AUTO_ORDER),
        help="of openvino, onnxruntime, torch (default: %(default)s)",
    )
    parser.add_argument("--size", type=_size, help="WIDTHxHEIGHT (default: the bundle's)")
    parser.add_argument("--threads", type=int, default=0, help="0: the runtime's choice")
    parser.add_argument("--precision", choices=PRECISIONS, default="f32", help="of openvino")
    parser.add_argument("--runs", type=_positive, default=100, help="predictions to time")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg bench``; 1 if the bundle or every backend fails."""
    try:
        bundle = open_bundle(args.model)
    except BundleError as error:
        print(f"waste-seg bench: {error}", file=sys.stderr)
        return 1
    size = args.size or bundle.manifest.input_size
    figures: dict[str, dict[str, float]] = {}
    print(f"{bundle.manifest.name}, {size[0]}x{size[1]}, {args.runs} runs each, milliseconds")
    print(f"{'backend':14s}{'p50':>9s}{'p90':>9s}{'p99':>9s}{'frames/s':>10s}")
    for kind in args.backends.split(","):
        precision = args.precision if kind == "openvino" else "f32"
        try:
            backend = load_backend(bundle, kind, size, args.threads, precision)
        except BackendError as error:
            print(f"{kind:14s} {error}", file=sys.stderr)
            continue
        frames = [synthetic_sample(0, index, size).image for index in range(8)]
        found = percentiles(measure(backend, frames, args.runs))
        figures[backend.name] = found
        print(
            f"{backend.name:14s}{found['p50_ms']:9.2f}{found['p90_ms']:9.2f}"
            f"{found['p99_ms']:9.2f}{found['frames_per_second']:10.1f}"
        )
    if args.output:
        report = {
            "model": bundle.reference,
            "size": list(size),
            "threads": args.threads,
            "precision": args.precision,
            "runs": args.runs,
            "machine": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "backends": figures,
        }
        write_json(args.output, report)
    return 0 if figures else 1
