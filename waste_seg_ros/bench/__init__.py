"""Benchmarks that anyone can run again: ``waste-seg bench``.

    waste-seg bench model     the network alone, on every backend, beside its limits and a peer
    waste-seg bench node      the segmenter's work on one image, by stages, without DDS
    waste-seg bench graph     camera and segmenter as processes, over DDS
    waste-seg bench all       the three
    waste-seg bench compare   two reports: what has become worse beyond noise

The figures are only worth something on a machine that does nothing else. The report tells how busy
it was, and ``--processor-time`` counts what this process alone has used of the cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from waste_seg_ros.bench.compare import compare, print_comparison, read_report
from waste_seg_ros.bench.figures import BenchError, describe_run
from waste_seg_ros.bench.peer import PeerNetwork, build_peer, peer_size
from waste_seg_ros.cli import as_size
from waste_seg_ros.files import write_json
from waste_seg_ros.runtime import AUTO_ORDER, KINDS
from waste_seg_ros.runtime.backends import PRECISIONS
from waste_seg_ros.runtime.bundle import Bundle, BundleError, open_bundle

WORSE = 3
"""Exit code of ``compare`` where something has become worse; 1 is for what cannot be compared."""
PARTS = ("model", "node", "graph")
PEER = "yolo11n-seg"
VGA, HD, FULL_HD = (640, 480), (1280, 720), (1920, 1080)
LARGE_INPUT = (640, 480)
"""At which the network finds up to 200 items in a picture; at 320x240 they are too small."""
OVERLOAD = 300.0


def _size(text: str) -> tuple[int, int]:
    width, height = as_size(text)
    if not (16 <= width <= 8192 and 16 <= height <= 8192):
        raise argparse.ArgumentTypeError(f"{text}: each side must be 16 to 8192")
    return width, height


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text}: must be 0.1 to 1000")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0.0 < value < 1e5:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands and flags of ``waste-seg bench``."""
    commands = parser.add_subparsers(dest="part", metavar="PART", required=True)
    texts = {
        "model": "the network alone on every backend, and what to compare it with",
        "node": "the segmenter's work on one image, stage by stage, without DDS",
        "graph": "camera and segmenter as processes of their own, over DDS",
        "all": "model, node and graph",
    }
    for name, text in texts.items():
        _add_measuring(commands.add_parser(name, help=text, description=text), name)
    text = f"compare two reports; exit code {WORSE} if a figure is worse beyond noise"
    two = commands.add_parser("compare", help=text, description=text)
    two.add_argument("before", type=Path, metavar="A.json")
    two.add_argument("after", type=Path, metavar="B.json")
    two.add_argument(
        "--tolerance", type=float, default=5.0, help="least change that counts [%%] (default: 5)"
    )
    two.add_argument("--all", action="store_true", help="print what is the same, too")
    two.add_argument(
        "--any-machine", action="store_true", help="compare though the processors differ"
    )


def _add_measuring(parser: argparse.ArgumentParser, part: str) -> None:
    parser.add_argument("--model", default="enet-instance", help="bundle, by name or path")
    parser.add_argument("--quick", action="store_true", help="few cases: under two minutes")
    parser.add_argument("--threads", type=int, default=0, help="0: the runtime's choice")
    parser.add_argument("--output", type=Path, metavar="JSON", help="report; a PNG comes beside it")
    parser.add_argument(
        "--peer",
        default=PEER,
        help="to compare with, for speed only: a model of ultralytics by the name of its YAML "
        "file, or an exported ONNX file, or 'none' (default: %(default)s)",
    )
    if part != "graph":
        parser.add_argument("--rounds", type=_positive, help="in each of which all have a turn")
        parser.add_argument("--repeats", type=_positive, default=5, help="timed runs in a turn")
        parser.add_argument(
            "--processor-time",
            action="store_true",
            help="count the processor time of this process, as on a busy machine; with --threads 1",
        )
    if part in ("model", "all"):
        parser.add_argument(
            "--backends",
            default=",".join(AUTO_ORDER),
            help=f"of {', '.join(kind for kind in KINDS if kind != 'auto')} (default: %(default)s)",
        )
        parser.add_argument("--size", type=_size, help="WIDTHxHEIGHT (default: the bundle's)")
        parser.add_argument("--precision", choices=PRECISIONS, default="f32", help="of openvino")
    if part != "model":
        parser.add_argument("--backend", choices=KINDS, default="auto", help="of node and graph")
        parser.add_argument("--images", type=_size, nargs="+", help="the camera's WIDTHxHEIGHT")
        parser.add_argument("--items", type=_positive, nargs="+", help="in a picture")
        parser.add_argument("--input", type=_size, help="of the network (default: as the node)")
    if part in ("graph", "all"):
        parser.add_argument("--rates", type=_rate, nargs="+", help="of the camera [Hz]")
        parser.add_argument("--seconds", type=_above_zero, help="that a case is measured")
        parser.add_argument("--warm-up", type=_above_zero, help="seconds before that")
        parser.add_argument(
            "--overload", type=float, default=OVERLOAD, help="camera's rate there; 0: leave out"
        )
    parser.set_defaults(processor_time=False)


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg bench``; 1 if something cannot be measured or compared."""
    try:
        return _compare(args) if args.part == "compare" else _measure(args)
    except (BenchError, BundleError, OSError) as error:
        print(f"waste-seg bench {args.part}: {error}", file=sys.stderr)
        return 1


def _compare(args: argparse.Namespace) -> int:
    before, after = read_report(args.before), read_report(args.after)
    found = compare(before, after, args.tolerance / 100, args.any_machine)
    print_comparison(before, after, found, args.all)
    return WORSE if any(one.verdict == "worse" for one in found) else 0


# --- measuring ------------------------------------------------------------------------------------


class _Peers:
    """The peer's graphs, built when asked for; each size once."""

    def __init__(self, name: str, classes: int, folder: Path) -> None:
        self._name, self._classes, self._folder = name, classes, folder
        self._given = Path(name) if name.endswith(".onnx") else None
        if self._given is not None and not self._given.is_file():
            raise BenchError(f"--peer: there is no file {name}")
        self.problem = "left out by --peer none" if name == "none" else ""

    def graph(self, size: tuple[int, int]) -> Path | None:
        """Its file for inputs of at least that size; None, and a problem, if there is none."""
        if self._given is not None:
            return self._given.resolve()
        if self.problem:
            return None
        width, height = peer_size(size)
        path = self._folder / f"{self._name}-{width}x{height}.onnx"
        if not path.is_file():
            try:
                build_peer(self._name, self._classes, (width, height), path)
            except BenchError as error:
                self.problem = str(error)
                return None
        return path


def _measure(args: argparse.Namespace) -> int:
    bundle = open_bundle(args.model)
    parts = PARTS if args.part == "all" else (args.part,)
    _check_writable(args.output)
    report: dict[str, Any] = {
        **describe_run(),
        "clock": "processor" if args.processor_time else "wall",
        "settings": {
            "model": bundle.reference,
            "quick": args.quick,
            "threads": args.threads,
            "peer": args.peer,
        },
    }
    from waste_seg_ros.bench import report as reports

    reports.print_head(report)
    with tempfile.TemporaryDirectory(prefix="waste-seg-bench-") as folder:
        peers = _Peers(args.peer, len(bundle.manifest.classes), Path(folder))
        for part in parts:
            if part == "model":
                report["model"], report["not_run"] = _model(args, bundle, peers)
                reports.print_model(report["model"])
                for reason in report["not_run"].values():
                    print(f"not run: {reason}")
            elif part == "node":
                report["node"] = _node(args, bundle, peers)
                reports.print_node(report["node"])
            else:
                report["graph"] = _graph(args, bundle, peers)
                reports.print_graph(report["graph"])
        if peers.problem:
            print(f"\npeer not run: {peers.problem}")
        elif args.peer.endswith(".onnx"):
            print(f"\npeer: {args.peer}, for its speed only")
        else:
            print(
                f"\npeer: {args.peer} with random weights, for its speed only: of its best boxes "
                "up to as many count as found as there are items"
            )
        report["peer_problem"] = peers.problem
    if args.output:
        write_json(args.output, report)
        chart = args.output.with_suffix(".png")
        drawn = reports.write_charts(chart, report)
        print(f"written: {args.output}" + (f", {chart}" if drawn else ""))
    return 0


def _check_writable(output: Path | None) -> None:
    """Better now than after the measuring."""
    if output is not None and output.suffix != ".json":
        raise BenchError(f"--output: {output} must end in .json")
    if output is not None and not output.parent.is_dir():
        raise BenchError(f"--output: there is no folder {output.parent}")


def _clock(args: argparse.Namespace) -> Any:
    return time.process_time if args.processor_time else time.perf_counter


def _model(
    args: argparse.Namespace, bundle: Bundle, peers: _Peers
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    from waste_seg_ros.bench import model

    kinds = args.backends.split(",")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise BenchError(f"--backends: unknown {', '.join(unknown)}; known: {', '.join(KINDS)}")
    size = args.size or bundle.manifest.input_size
    entrants, missing = model.contenders(bundle, kinds, size, args.threads, args.precision)
    for wanted in (size,) if args.quick else dict.fromkeys((size, LARGE_INPUT)):
        path = peers.graph(wanted)
        for runtime in (entrant.name for entrant in list(entrants) if entrant.limit):
            if path is not None and not any(
                entrant.name == f"{path.stem} {runtime}" for entrant in entrants
            ):
                network = PeerNetwork(path, runtime, args.threads)
                name = f"{path.stem} {runtime}"
                entrants.append(model.Contender(name, "peer", network.input_size, network.run))
    rounds = args.rounds or (15 if args.quick else 60)
    return model.measure(entrants, rounds, args.repeats, _clock(args)), missing


def _node(args: argparse.Namespace, bundle: Bundle, peers: _Peers) -> list[dict[str, Any]]:
    from waste_seg_ros.bench.node import Case, measure
    from waste_seg_ros.nodes.loading import ModelError

    if args.images or args.items or args.input:
        cases = [
            Case(image, items, args.input)
            for image in args.images or [VGA]
            for items in args.items or [10]
        ]
    else:
        cases = [Case(VGA, 10), Case(FULL_HD, 10), Case(VGA, 200, LARGE_INPUT)]
        if not args.quick:
            cases += [Case(HD, 10), Case(VGA, 1), Case(VGA, 50)]
            cases += [Case(VGA, items, LARGE_INPUT) for items in (1, 10, 50, 100)]
    rounds = args.rounds or (8 if args.quick else 40)
    options: dict[str, Any] = {
        "threads": args.threads,
        "rounds": rounds,
        "repeats": args.repeats,
        "clock": _clock(args),
    }
    found = []
    try:
        for case in cases:
            found.append(measure(bundle, args.backend, case, **options))
        path = peers.graph(bundle.manifest.input_size)
        if path is not None:
            case = Case(cases[0].image, cases[0].items)
            found.append(measure(bundle, args.backend, case, peer=path, **options))
    except ModelError as error:
        raise BenchError(str(error)) from error
    return found


def _graph(args: argparse.Namespace, bundle: Bundle, peers: _Peers) -> list[dict[str, Any]]:
    from waste_seg_ros.bench.graph import Case, measure, session

    seconds = args.seconds or (3.0 if args.quick else 10.0)
    warm_up = args.warm_up or (1.0 if args.quick else 2.0)
    if args.images or args.items or args.rates or args.input:
        cases = [
            Case(image, rate, items, args.input)
            for image in args.images or [VGA]
            for rate in args.rates or [30.0]
            for items in args.items or [10]
        ]
    elif args.quick:
        cases = [Case(VGA, 30.0, 10), Case(FULL_HD, 30.0, 10), Case(VGA, 30.0, 200, LARGE_INPUT)]
    else:
        cases = [Case(i, r, 10) for i in (VGA, HD, FULL_HD) for r in (10.0, 30.0, 60.0)]
        cases += [Case(i, 30.0, n) for i in (VGA, HD, FULL_HD) for n in (1, 50)]
        cases += [Case(VGA, 30.0, n, LARGE_INPUT) for n in (1, 10, 50, 100, 200)]
    first = cases[0]
    path = peers.graph(bundle.manifest.input_size)
    if path is not None:
        cases.append(Case(first.image, first.rate, first.items, peer=path))
        large = None if args.quick else peers.graph(LARGE_INPUT)
        if large is not None and large != path:
            cases.append(Case(first.image, first.rate, first.items, peer=large))
    cases = [dataclasses.replace(case, seconds=seconds) for case in cases]
    if args.overload > 0:
        # Long enough for what grows to be seen.
        longer = seconds if args.quick or args.seconds else 3 * seconds
        cases.append(Case(first.image, args.overload, first.items, args.input, longer, None, True))
    found = []
    with session() as listener:
        for number, case in enumerate(cases, 1):
            print(
                f"graph {number} of {len(cases)}: {case.image[0]}x{case.image[1]} at "
                f"{case.rate:g} Hz, {case.items} items{', peer' if case.peer else ''}",
                file=sys.stderr,
                flush=True,
            )
            found.append(
                measure(
                    listener,
                    case,
                    model=str(bundle.path),
                    backend=args.backend,
                    threads=args.threads,
                    warm_up=warm_up,
                )
            )
    return found
