"""The table of all bundles for the README: ``waste-seg table``.

Every figure is measured by this command, from the bundles as they lie there:

- parameters and multiply-accumulates of the network at its input size;
- size: bytes of the whole folder, which is what a robot is given, at the bundle's own precision,
  and at the others as a bundle made from it;
- quality on held-out data through the runtime that the robot uses;
- the time of one prediction at the input size with OpenVINO. All bundles take turns, so that
  whatever else the machine does falls on all of them alike.

What does not depend on the machine's mood is kept in the JSON by the bundle's digest, so that a
second run measures only what is new, and the times.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from waste_seg_ros.data.sources import open_data
from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.files import write_file, write_json
from waste_seg_ros.runtime import STORED
from waste_seg_ros.runtime.backends import Backend, load_backend
from waste_seg_ros.runtime.bundle import (
    Bundle,
    BundleError,
    halve_bundle,
    list_bundles,
    load_model,
    open_bundle,
    save_bundle,
)
from waste_seg_ros.runtime.export import source_commit
from waste_seg_ros.runtime.listing import bundle_cost
from waste_seg_ros.train.evaluate import bundle_predictor, evaluate, headline
from waste_seg_ros.train.plots import Series, write_chart

DATA = "synthetic:900007:300:320x240"
"""Held-out scenes: no training or tuning saw this seed."""

LIMIT_MB = 10.0
"""A deployed bundle is to be smaller."""
LIMIT_LOSS = 0.01
"""mIoU that a compressed bundle may lose against its parent."""
BUSY = 2.0
"""Median times above so many times the least one tell of other work on the machine."""

MARKS = ("<!-- table:zoo -->", "<!-- /table:zoo -->")
"""Between these lines of the README the tables are put."""


class TableError(ValueError):
    """The table cannot be made so; the message names the flag or file."""


# --- figures --------------------------------------------------------------------------------------


def find_parent(bundle: Bundle, others: Sequence[Bundle]) -> Bundle | None:
    """The bundle that this one was made from, if it is among ``others``.

    By name and digest; by the name alone if the manifest of the parent was written anew since, as
    when figures are put into it.
    """
    name, _, digest = bundle.manifest.parent.partition("@")
    named = [b for b in others if b.manifest.name == name and b.digest != bundle.digest]
    exact = [b for b in named if b.digest == digest]
    return (exact or named or [None])[0]  # type: ignore[list-item]


def is_compressed(bundle: Bundle, parent: Bundle | None) -> bool:
    """Whether a bundle is its parent stored in fewer bits or with fewer channels."""
    if parent is None:
        return False
    ours, theirs = bundle.manifest, parent.manifest
    if (ours.architecture, ours.head, ours.classes) != (
        theirs.architecture,
        theirs.head,
        theirs.classes,
    ):
        return False
    return ours.precision != theirs.precision or bundle_cost(bundle)[0] < bundle_cost(parent)[0]


def data_key(spec: str) -> str:
    """A specification without the folders of this machine; annotations are known by their digest.

    Raises OSError if annotations cannot be read.
    """
    kind, *parts = spec.split(":")
    if kind == "synthetic":
        return spec
    names = [Path(part).name for part in parts]
    if kind.startswith("coco") and parts:
        names[0] += "@" + hashlib.sha256(Path(parts[0]).read_bytes()).hexdigest()[:12]
    return ":".join((kind, *names))


def measure_quality(bundle: Bundle, spec: str) -> dict[str, float]:
    """The figures of `evaluate.headline` on the data. Raises ValueError or OSError."""
    manifest = bundle.manifest
    dataset = open_data(spec, manifest.classes, finite=True)
    result = evaluate(
        bundle_predictor(bundle, "openvino"),
        dataset,
        head=manifest.head,
        classes=manifest.classes,
        progress=sys.stderr.isatty(),
    )
    for problem in dataset.problems:
        print(f"{spec}: {problem} (passed over)", file=sys.stderr)
    return headline(result)


def measure_times(
    bundles: Sequence[Bundle], rounds: int, threads: int = 0, each: int = 5
) -> list[dict[str, float]]:
    """Median and least milliseconds of one prediction of each bundle at its input size.

    They take turns: in each round every bundle predicts ``each`` times after one prediction that
    does not count, as it finds the caches full of another's weights.
    """
    backends: list[Backend] = [load_backend(b, "openvino", threads=threads) for b in bundles]
    frames = {
        size: [synthetic_sample(0, index, size).image for index in range(4)]
        for size in {backend.input_size for backend in backends}
    }
    times: list[list[float]] = [[] for _ in backends]
    for number in range(-1, rounds):  # the first round warms up
        for backend, seen in zip(backends, times, strict=True):
            for turn in range(-1, each):
                frame = frames[backend.input_size][turn % 4]
                start = time.perf_counter()
                backend.predict(frame)
                if number >= 0 and turn >= 0:
                    seen.append(time.perf_counter() - start)
    return [
        {"median_ms": 1e3 * statistics.median(seen), "min_ms": 1e3 * min(seen)} for seen in times
    ]


def measure_sizes(
    bundle: Bundle, others: Sequence[Bundle], known: Mapping[str, float] | None = None
) -> dict[str, float]:
    """MB of whole bundles by how they are stored (`STORED`).

    Args:
        bundle: counts as it is stored; if that is in integers, then not otherwise.
        others: of these, the bundle in fewer bits counts. Where there is none, one is made for
            the purpose and thrown away.
        known: what such ones came to before.
    """
    found = {bundle.manifest.precision: bundle.size / 1e6}
    if bundle.manifest.precision == "int8":
        return found
    for other in others:
        ours = is_compressed(other, bundle) and find_parent(other, others) == bundle
        if ours and bundle_cost(other) == bundle_cost(bundle):  # else it is pruned too
            found.setdefault(other.manifest.precision, other.size / 1e6)
    for stored in STORED:
        if stored not in found:
            found[stored] = (known or {}).get(stored) or _made_size(bundle, stored)
    return found


def _made_size(bundle: Bundle, stored: str) -> float:
    """MB of a bundle made from this one; NaN, and a line about it, if that cannot be done."""
    from waste_seg_ros.train.compress import quantize_bundle

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / bundle.manifest.name
        try:
            if stored == "f32":
                model, size = load_model(bundle), bundle.manifest.input_size
                return save_bundle(path, model, input_size=size).size / 1e6
            if stored == "f16":
                return halve_bundle(bundle, path).size / 1e6
            # A few images do: the size does not depend on what they are.
            return quantize_bundle(bundle, path, "synthetic:5:4").size / 1e6
        except BundleError as error:
            print(f"{bundle.manifest.name} as {stored}: {error}", file=sys.stderr)
            return math.nan


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    versions = {}
    for package in ("numpy", "openvino", "onnxruntime", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": source_commit(),
    }


def build_table(
    bundles: Sequence[Bundle],
    *,
    data: str = DATA,
    photographs: str = "",
    rounds: int = 30,
    threads: int = 0,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure all bundles.

    Args:
        bundles: those of the table. Parents that are found by name are measured too.
        data: specification of held-out data with classes.
        photographs: likewise for the second table, whatever the classes; "" for none.
        rounds: of timing, see `measure_times`.
        threads: of OpenVINO; 0 leaves it to it.
        known: what an earlier call gave back, of which figures are taken over.

    Returns:
        plain values: ``machine``, ``data``, ``photographs``, ``figures`` (by digest of the bundle
        and then `data_key`), ``sizes`` (by digest and then as stored), and ``rows``, one for each
        bundle.

    Raises:
        ValueError: a bundle or the data cannot be used.
        OSError: a file cannot be read.
    """
    known = known or {}
    on_path = _with_parents(bundles)
    figures: dict[str, dict[str, Any]] = {}
    sizes: dict[str, dict[str, float]] = {}
    specs = {data_key(spec): spec for spec in (data, photographs) if spec}
    for bundle in on_path:
        digest = bundle.digest
        figures[digest] = dict(known.get("figures", {}).get(digest, {}))
        for key, spec in specs.items():
            if key not in figures[digest] and (bundle in bundles or spec == data):
                print(f"{bundle.manifest.name} on {key}", file=sys.stderr)
                figures[digest][key] = measure_quality(bundle, spec)
        if bundle in bundles:
            made = known.get("sizes", {}).get(digest)
            sizes[digest] = measure_sizes(bundle, on_path, made)
    print(f"timing {len(bundles)} bundles side by side", file=sys.stderr)
    times = measure_times(bundles, rounds, threads)
    rows = []
    for bundle, spent in zip(bundles, times, strict=True):
        manifest, own = bundle.manifest, figures[bundle.digest]
        parent = find_parent(bundle, on_path)
        compressed = is_compressed(bundle, parent)
        lost = math.nan
        if compressed and parent is not None:
            theirs = figures[parent.digest][data_key(data)]
            lost = theirs.get("miou", math.nan) - own[data_key(data)].get("miou", math.nan)
        parameters, macs = bundle_cost(bundle)
        rows.append(
            {
                "name": manifest.name,
                "digest": bundle.digest,
                "architecture": manifest.architecture,
                "width": manifest.width,
                "head": manifest.head,
                "precision": manifest.precision,
                "classes": list(manifest.classes),
                "input_size": list(manifest.input_size),
                "parameters": parameters,
                "macs": macs,
                "mb": round(bundle.size / 1e6, 3),
                "mb_by_precision": sizes[bundle.digest],
                "cpu_ms": round(spent["median_ms"], 3),
                "cpu_min_ms": round(spent["min_ms"], 3),
                "data": own[data_key(data)],
                "photographs": own[data_key(photographs)] if photographs else {},
                "parent": parent.manifest.name if compressed and parent is not None else "",
                "miou_lost": round(lost, 4),
            }
        )
    return {
        "machine": machine(),
        "data": data_key(data),
        "photographs": data_key(photographs) if photographs else "",
        "timing": {"rounds": rounds, "threads": threads, "backend": "openvino"},
        "figures": figures,
        "sizes": sizes,
        "rows": rows,
    }


def _with_parents(bundles: Sequence[Bundle]) -> list[Bundle]:
    """The bundles, and those on the search path that they were made from."""
    found = list(bundles)
    seen = {bundle.digest for bundle in found}
    place = 0
    while place < len(found):
        name = found[place].manifest.parent.partition("@")[0]
        place += 1
        if not name or find_parent(found[place - 1], found):
            continue
        try:
            parent = open_bundle(name)
        except BundleError:
            continue  # trained from something that is not here
        if parent.digest not in seen and is_compressed(found[place - 1], parent):
            found.append(parent)
            seen.add(parent.digest)
    return found


# --- what is written ------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """The tables, of held-out data and, if measured, of photographs."""
    rows = report["rows"]
    classes = list(dict.fromkeys(name for row in rows for name in row["classes"]))
    head = ["bundle", "input", "params M", "MACs G", "MB FP32", "MB FP16", "MB INT8"]
    head += ["mIoU", "background", *classes, "PQ", "CPU ms", "mIoU lost to parent"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        found = row["data"]
        cells = [row["name"], "x".join(map(str, row["input_size"]))]
        cells += [f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}"]
        cells += [_number(row["mb_by_precision"].get(stored), 1) for stored in STORED]
        cells.append(_number(found.get("miou")))
        cells += [_number(found.get(f"iou_{name}")) for name in ("background", *classes)]
        cells += [_number(found.get("pq")), _number(row["cpu_ms"], 1)]
        cells.append(f"{row['miou_lost']:+.3f} ({row['parent']})" if row["parent"] else "")
        lines.append(_line(cells))
    source, versions = report["machine"], report["machine"]["versions"]
    threads = report["timing"]["threads"] or source["cores"]
    text = "\n".join(lines) + (
        f"\n\nOn `{report['data']}`; CPU ms: median of one prediction at the input size on "
        f"{source['cpu']}, {threads} cores, OpenVINO {versions['openvino']}, all bundles in turn."
    )
    if not report["photographs"]:
        return text
    head = ["bundle", "foreground IoU", "item recall", "item precision", "PQ any class"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        found = row["photographs"]
        names = ("binary_iou", "item_recall", "item_precision", "pq_agnostic")
        lines.append(_line([row["name"], *(_number(found.get(name)) for name in names)]))
    frames = {int(row["photographs"]["frames"]) for row in rows}
    count = ", ".join(map(str, sorted(frames)))
    return f"{text}\n\nOn {count} real photographs, none of which was trained on:\n\n" + "\n".join(
        lines
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def shortcomings(report: Mapping[str, Any]) -> list[str]:
    """Lines on what is not as the limits want it, or could not be measured well."""
    lines = []
    rows = report["rows"]
    busy = [r["name"] for r in rows if r["cpu_ms"] > BUSY * r["cpu_min_ms"]]
    if busy:
        lines.append(
            f"the machine was busy: median times of {', '.join(busy)} are over {BUSY:g} times the "
            "least; measure again when it is idle"
        )
    for row in rows:
        if row["mb"] >= LIMIT_MB:
            lines.append(f"{row['name']}: {row['mb']:.1f} MB, not below {LIMIT_MB:g}")
        if row["parent"] and row["miou_lost"] >= LIMIT_LOSS:
            lines.append(
                f"{row['name']}: loses {row['miou_lost']:.3f} of mIoU against {row['parent']}, "
                f"not below {LIMIT_LOSS:g}"
            )
    return lines


def put_into(readme: Path, text: str) -> None:
    """Replace what is between the `MARKS` of a file.

    Raises:
        TableError: the file has not each mark once, in their order.
        OSError: it cannot be read or written.
    """
    content = readme.read_text(encoding="utf-8")
    first, last = MARKS
    begin, end = content.find(first), content.find(last)
    if content.count(first) != 1 or content.count(last) != 1 or end < begin:
        raise TableError(
            f"{readme}: the lines {first} and {last} must each be in it once, in order"
        )
    whole = content[: begin + len(first)] + f"\n{text}\n" + content[end:]
    write_file(readme, whole.encode())


def draw_table(report: Mapping[str, Any], path: Path) -> None:
    """Draw mIoU over CPU time to a PNG; discs are as large as bundles. Raises OSError."""
    series = [
        Series(row["name"], [(row["cpu_ms"], row["data"].get("miou", math.nan))], areas=[row["mb"]])
        for row in report["rows"]
    ]
    threads = report["timing"]["threads"] or report["machine"]["cores"]
    write_chart(
        path,
        series,
        f"mIoU on {report['data']}; a disc's area is the bundle's size",
        f"median CPU ms of one prediction, OpenVINO, {threads} cores",
        "mIoU",
    )


# --- command line ---------------------------------------------------------------------------------


def choose_bundles(names: Sequence[str], heads: Sequence[str]) -> list[Bundle]:
    """The bundles named, or all of the heads on the search path; children follow their parents.

    Raises BundleError, or TableError if there are none.
    """
    if names:
        return [open_bundle(name) for name in names]
    found = [b for b in map(open_bundle, list_bundles()) if b.manifest.head in heads]
    if not found:
        raise TableError(f"there are no bundles with the head {' or '.join(heads)}; name some")

    def family(bundle: Bundle) -> tuple[str, ...]:
        parent = find_parent(bundle, found)
        chain = family(parent) if is_compressed(bundle, parent) and parent is not None else ()
        return (*(chain or (bundle.manifest.architecture,)), bundle.manifest.name)

    return sorted(found, key=family)


def _read_known(path: Path) -> Mapping[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TableError(f"--output {path}: is there, but no JSON ({error}); remove it") from error
    if not (isinstance(read, dict) and isinstance(read.get("figures"), dict)):
        raise TableError(f"--output {path}: is there, but not of this command; choose another file")
    return read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``waste-seg table``."""
    add = parser.add_argument
    add("models", nargs="*", metavar="BUNDLE", help="name or folder (default: all of the head)")
    add("--head", default="instance", help="of the bundles if none are named (%(default)s)")
    add("--data", default=DATA, help="held-out data (default: %(default)s)")
    add("--photographs", default="", help="second table, such as coco:ANNOTATIONS.json:IMAGES")
    add("--rounds", type=int, default=30, help="of timing, 5 predictions each (%(default)s)")
    add("--threads", type=int, default=0, help="of OpenVINO; 0: its choice")
    add("--output", type=Path, default=Path("table.json"), help="(default: %(default)s)")
    add("--fresh", action="store_true", help="measure anew what --output holds already")
    add("--plot", type=Path, help="PNG of mIoU over CPU time")
    add("--readme", type=Path, help=f"put the tables between {MARKS[0]} and {MARKS[1]}")


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg table``; 1 if bundles, data or files cannot be used."""
    try:
        if args.rounds < 1 or args.threads < 0:
            raise TableError("--rounds must be at least 1 and --threads at least 0")
        known = {} if args.fresh else _read_known(args.output)
        report = build_table(
            choose_bundles(args.models, (args.head,)),
            data=args.data,
            photographs=args.photographs,
            rounds=args.rounds,
            threads=args.threads,
            known=known,
        )
        text = markdown(report)
        write_json(args.output, report)
        if args.plot:
            draw_table(report, args.plot)
        if args.readme:
            put_into(args.readme, text)
    except (ValueError, OSError) as error:
        print(f"waste-seg table: {error}", file=sys.stderr)
        return 1
    print(text)
    for line in shortcomings(report):
        print(line, file=sys.stderr)
    return 0
