"""The benchmark's report as tables for the terminal and as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.bench.figures import BUSY
from waste_seg_ros.files import write_png
from waste_seg_ros.runtime.listing import print_rows
from waste_seg_ros.train.plots import Series, draw_chart


def _size(size: Sequence[int] | None) -> str:
    return f"{size[0]}x{size[1]}" if size else "?"


def _percent(entry: Mapping[str, Any] | None) -> str:
    return f"{entry['value']:+.1f}" if entry else ""


def print_head(report: Mapping[str, Any]) -> None:
    """Print what was measured where."""
    machine = report["machine"]
    print(
        f"{report['settings']['model'].partition('@')[0]} at commit "
        f"{report['commit'][:10] or '?'} on {machine['cores']} "
        f"cores of {machine['processor']}"
    )
    if report["clock"] == "processor":
        print("times are the processor's for this process, not the clock's")
    busy = machine["busy_before"]
    if busy == busy and busy > BUSY:
        print(
            f"warning: others take {100 * busy:.0f} % of the cores: these figures are worth little"
        )


def print_model(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of the model alone."""
    rows = [("model", "input", "p50 ms", "p90", "p99", "least", "images/s", "over raw %")]
    for entry in entries:
        ms = entry["ms"]
        rows.append(
            (
                entry["name"],
                _size(entry["size"]),
                *(f"{ms[key]:.2f}" for key in ("p50", "p90", "p99", "least")),
                f"{1e3 / ms['p50']:.1f}",
                _percent(entry.get("over_raw_percent")),
            )
        )
    _print("", rows)


def print_node(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of the node's work without DDS."""
    stages = list(entries[0]["stages_ms"]) if entries else []
    head = ("node", "image", "input", "items", "found", *stages, "total ms", "raw", "over raw %")
    rows: list[tuple[str, ...]] = [head]
    for entry in entries:
        raw = entry.get("raw_ms")
        rows.append(
            (
                f"{entry['node']} {entry['backend']}",
                _size(entry["image"]),
                _size(entry["input"]),
                str(entry["items"]),
                f"{entry['found']:g}",
                *(f"{entry['stages_ms'][stage]['p50']:.2f}" for stage in stages),
                f"{entry['total_ms']['p50']:.2f}",
                f"{raw['p50']:.2f}" if raw else "",
                _percent(entry.get("overhead_percent")),
            )
        )
    _print("one image through the node, without DDS, medians", rows)


def print_graph(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of the whole graph."""
    rows: list[tuple[str, ...]] = [
        (
            *("node", "image", "input", "Hz", "items", "found", "images/s", "not served %"),
            *("p50 ms", "p90", "p99", "age", "CPU %", "camera %", "peak MB", "growth MB"),
        )
    ]
    for entry in entries:
        latency, load, memory = entry["latency_ms"], entry["cpu_percent"], entry["memory_mb"]
        rows.append(
            (
                f"{entry['node']} {entry['backend']}",
                _size(entry["image"]),
                _size(entry["input"]),
                f"{entry['rate']:g}",
                str(entry["items"]),
                f"{entry['found']:g}",
                f"{entry['frames_per_second']['value']:.1f}",
                f"{100 * entry['not_served_share']:.1f}",
                *(f"{latency[key]:.1f}" for key in ("p50", "p90", "p99")),
                f"{entry['age_p99_in_inferences'] or 0:.1f}",
                f"{load['segmenter']:.0f}",
                f"{load['camera']:.0f}",
                f"{memory['peak']:.0f}",
                f"{memory['growth']:+.1f}",
            )
        )
    _print(
        "camera to items over DDS; age: p99 of items when published, in times of the network", rows
    )


def _print(title: str, rows: Sequence[Sequence[str]]) -> None:
    if len(rows) > 1:
        print(f"\n{title}" if title else "")
        print_rows(rows)


# --- charts ---------------------------------------------------------------------------------------


def charts(report: Mapping[str, Any]) -> list[NDArray[np.uint8]]:
    """Charts of what the report holds, of one size, each (H, W, 3) uint8 RGB."""
    found = []
    if model := report.get("model"):
        ranked = sorted(model, key=lambda entry: float(entry["ms"]["p50"]))
        points = [
            Series(f"{e['name']} {_size(e['size'])}", [(k + 1.0, e["ms"]["p50"])])
            for k, e in enumerate(ranked)
        ]
        found.append(draw_chart(points, "The network alone: median of one image", "place", "ms"))
    if node := report.get("node"):
        for key in sorted({(e["node"], tuple(e["image"]), tuple(e["input"])) for e in node}):
            same = [e for e in node if (e["node"], tuple(e["image"]), tuple(e["input"])) == key]
            if len({e["items"] for e in same}) > 1:
                found.append(_stage_chart(key, sorted(same, key=lambda e: int(e["items"]))))
    if graph := report.get("graph"):
        found += _graph_charts(graph)
    return found


def _stage_chart(
    key: tuple[str, tuple[int, ...], tuple[int, ...]], entries: Sequence[Mapping[str, Any]]
) -> NDArray[np.uint8]:
    lines = [
        Series(stage, [(e["items"], e["stages_ms"][stage]["p50"]) for e in entries], line=True)
        for stage in entries[0]["stages_ms"]
    ]
    title = f"{key[0]} without DDS, {_size(key[1])} to {_size(key[2])}: medians of its stages"
    return draw_chart(lines, title, "items in the picture", "ms")


def _graph_charts(entries: Sequence[Mapping[str, Any]]) -> list[NDArray[np.uint8]]:
    """Latency and speed against what was varied, the rest alike."""
    found = []
    kept = [e for e in entries if not e["overload"]]
    for varied, label in (("items", "items in the picture"), ("rate", "asked for [images/s]")):
        lines = []
        for title, same in _groups(kept, varied).items():
            if len(same) > 1:
                for key in ("p50", "p99"):
                    points = [(e[varied], e["latency_ms"][key]) for e in same]
                    lines.append(Series(f"{title} {key}", points, line=True))
        if lines:
            found.append(draw_chart(lines, "Camera's stamp to items, over DDS", label, "ms"))
    lines = [
        Series(title, [(e["rate"], e["frames_per_second"]["value"]) for e in same], line=True)
        for title, same in _groups(entries, "rate").items()
        if len(same) > 1
    ]
    if lines:
        found.append(draw_chart(lines, "Images served", "asked for [images/s]", "images/s"))
    return found


def _groups(
    entries: Sequence[Mapping[str, Any]], varied: str
) -> dict[str, list[Mapping[str, Any]]]:
    """Entries that differ in one thing alone, in its order, by what they have in common."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for entry in sorted(entries, key=lambda e: float(e[varied])):
        words = [entry["node"], f"{_size(entry['image'])} to {_size(entry['input'])}"]
        if varied != "items":
            words.append(f"{entry['items']} items")
        if varied != "rate":
            words.append(f"{entry['rate']:g} Hz")
        found.setdefault(" ".join(words), []).append(entry)
    return found


def write_charts(path: Path, report: Mapping[str, Any]) -> bool:
    """Write the charts, one below the other, as a PNG; says whether there were any.

    Raises OSError.
    """
    drawn = charts(report)
    if drawn:
        write_png(path, np.concatenate(drawn))
    return bool(drawn)
