"""``waste-seg demo``: the whole chain on this machine, and how well it did.

Starts the camera and the segmenter as processes of their own that talk over DDS, shows the items
passing, and writes to the output folder: ``overlay.mp4``, ``contact.png`` and ``last.png`` with
the items drawn in, ``nodes.log`` with what the nodes printed, and ``summary.json``.

The recorder must not make the figures worse than they are, nor better. While the nodes run it only
stores: pictures are packed by threads of the lowest priority, which drop pictures of the film
rather than hold up anything. Latency is taken where items arrive, in this process. The comparison
with the truth is made afterwards: the camera names each picture (``truth/items``), and the truth
is rendered or read again from that name.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import platform
import queue
import signal
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from waste_seg_ros import demo_arms
from waste_seg_ros.data.sample import CLASSES, Sample, rename_labels
from waste_seg_ros.files import write_json, write_png
from waste_seg_ros.runtime import HEADS, KINDS

if TYPE_CHECKING:
    from waste_seg_ros.launcher import Supervisor

FRAMES = 300
"""Pictures of a source that has no end."""
MEASURED = 300
"""Of more pictures than this, so many, evenly spread, are compared with the truth."""
SHOWN = 12
"""Pictures on the contact sheet."""
PATIENCE = 60.0
"""Seconds until the first items must have come."""


class DemoError(RuntimeError):
    """The demo cannot run; the text says why and how to mend it."""


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``waste-seg demo``."""
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help=f"end after N pictures; by default {FRAMES}, or once through a folder or video",
    )
    parser.add_argument(
        "--source",
        default="synthetic",
        help="'synthetic' (default), a folder of images, a video file or /dev/videoN",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="JSON",
        help="COCO annotations of a folder's images to compare with; by default annotations.json "
        "in the folder or beside it, if there is one",
    )
    parser.add_argument("--model", default="", help="name of a model bundle, or its folder")
    parser.add_argument(
        "--head",
        default="",
        choices=("", *HEADS),
        help="what the model is used as; by default as its bundle says",
    )
    parser.add_argument(
        "--backend",
        default="",
        choices=("", *KINDS),
        help="what runs the network",
    )
    parser.add_argument("--rate", type=float, default=25.0, help="pictures per second")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic line")
    parser.add_argument(
        "--arms",
        type=int,
        default=0,
        metavar="N",
        help="let so many simulated arms pick the synthetic line's items",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("sorter-demo"), help="folder for film and summary"
    )
    parser.add_argument(
        "--keep-running", action="store_true", help="go on until Ctrl-C, then sum up"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg demo``."""
    if args.frames is not None and args.frames < 1:
        print("error: --frames takes a number from 1", file=sys.stderr)
        return 2
    if not 0.1 <= args.rate <= 1000:
        print("error: --rate takes 0.1 to 1000 pictures per second", file=sys.stderr)
        return 2
    if args.arms and args.source != "synthetic":
        print("error: --arms needs the synthetic line, whose truth is known", file=sys.stderr)
        return 2
    if not 0 <= args.arms <= demo_arms.MOST:
        print(f"error: --arms takes 0 to {demo_arms.MOST}", file=sys.stderr)
        return 2
    try:
        return _run(args)
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    output: Path = args.output.expanduser()
    output.mkdir(parents=True, exist_ok=True)
    plan = _plan(args)
    domain = isolate()
    specs = _graph(args, plan)

    # After the domain is chosen: rclpy reads it when it starts.
    import rclpy
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
    from rclpy.signals import SignalHandlerOptions

    from waste_seg_ros.launcher import LaunchError, start
    from waste_seg_ros.nodes import use_image_profile
    from waste_seg_ros.nodes.watch import Board, Screen

    use_image_profile()
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        board = Board()
        with Recording(output, args.rate) as recording, _stop_requests() as requested:
            picks = demo_arms.PickRecord(args.arms) if args.arms else None
            recorder = Recorder(board, recording, plan.truth is not None, picks)
            executor = SingleThreadedExecutor()
            executor.add_node(recorder.node)

            def spin() -> None:
                with contextlib.suppress(ExternalShutdownException):
                    executor.spin()

            spinner = threading.Thread(target=spin, name="executor")
            spinner.start()
            print(
                f"camera '{args.source}' and segmenter on ROS domain {domain}, this machine only; "
                f"to look on: export ROS_DOMAIN_ID={domain} "
                f"ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST",
                flush=True,
            )
            try:
                with (
                    (output / "nodes.log").open("w") as log,
                    start(specs, output=log) as nodes,
                    contextlib.closing(Screen(board)) as screen,
                ):
                    problem, load = _watch(nodes, recorder, screen, requested)
            except LaunchError as error:
                raise DemoError(str(error)) from error
            finally:
                executor.shutdown()
                spinner.join()
                recorder.node.destroy_node()
            stopped = requested()
    finally:
        rclpy.try_shutdown()

    if problem:
        print(f"error: {problem}\n--- last lines of {output / 'nodes.log'}", file=sys.stderr)
        lines = (output / "nodes.log").read_text(errors="replace").splitlines()
        print("\n".join(lines[-15:]), file=sys.stderr)
    if not recording.arrivals:
        return 1
    if plan.truth is not None:
        print("comparing with the truth ...", flush=True)
    summary = _summary(args, plan, recording, board, load)
    if picks is not None:
        summary["arms"] = picks.summary(board.health())
    write_json(output / "summary.json", summary)
    print(_report(summary))
    written = sorted(p.name for p in output.iterdir() if not p.name.startswith("."))
    print(f"\nin {output}: {', '.join(written)}")
    if problem:
        return 1
    return 130 if stopped and not args.keep_running else 0


# --- what to run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What the source means for the run.

    Attributes:
        frames: after which the camera ends, 0 for never or the end of the source.
        loop: go through folder or video again and again.
        annotations: COCO file of a folder.
        truth: gives the sample of a picture's name, None without any truth.
        agnostic: the truth's classes are not the model's, so that only foreground and items
            whatever their class are compared.
    """

    frames: int
    loop: bool
    annotations: Path | None
    truth: Callable[[str], Sample] | None
    agnostic: bool


def _plan(args: argparse.Namespace) -> Plan:
    if args.truth is not None and not Path(args.source).expanduser().is_dir():
        raise DemoError("--truth goes with a folder of images as --source")
    if args.source == "synthetic":
        from waste_seg_ros.data.synthetic import SyntheticLine

        line = SyntheticLine(seed=args.seed)
        usual = demo_arms.FRAMES if args.arms else FRAMES
        frames = 0 if args.keep_running else args.frames or usual

        def rendered(name: str) -> Sample:
            return line.frame(float(name.split(":")[2])).sample

        return Plan(frames, True, None, rendered, agnostic=False)
    path = Path(args.source).expanduser()
    if not path.is_dir():
        endless = not path.is_file() or path.is_char_device()
        frames = args.frames or (FRAMES if endless else 0)
        return Plan(0 if args.keep_running else frames, args.keep_running, None, None, True)
    frames = 0 if args.keep_running else args.frames or 0
    loop = args.keep_running or args.frames is not None
    if args.truth is not None:
        annotations = args.truth.expanduser().resolve()
    else:
        places = (path / "annotations.json", path.resolve().parent / "annotations.json")
        annotations = next((place.resolve() for place in places if place.is_file()), None)
        if annotations is None:
            return Plan(frames, loop, None, None, True)
    from waste_seg_ros.data.coco import CocoDataset

    try:
        dataset = CocoDataset(annotations, path)
    except (ValueError, OSError) as error:
        raise DemoError(f"--truth: {error}") from error
    places_of = {Path(name).name: place for place, name in enumerate(dataset.names)}

    def annotated(name: str) -> Sample:
        return dataset[places_of[Path(name).name]]

    return Plan(frames, loop, annotations, annotated, agnostic=True)


def _graph(args: argparse.Namespace, plan: Plan) -> list[Any]:
    from waste_seg_ros.graph import sorter_graph

    path = Path(args.source).expanduser()
    camera: dict[str, Any] = {
        "frames": plan.frames,
        "loop": plan.loop,
        "seed": args.seed,
        "wait_for_subscriber": True,
        "paused": True,  # until all know each other, see Recorder.ready
    }
    if plan.annotations is not None:
        camera["truth"] = str(plan.annotations)
    arms_file = ""
    if args.arms:
        arms_file = str(args.output.expanduser() / "arms.yaml")
        demo_arms.write_arms(Path(arms_file), args.arms)
    try:
        specs = sorter_graph(
            source=str(path.resolve()) if path.exists() else args.source,
            rate=args.rate,
            model=args.model,
            head=args.head,
            backend=args.backend,
            arms=args.arms,
            arms_file=arms_file,
            camera_parameters=camera,
            tracker_parameters={
                "horizon": demo_arms.HORIZON,
                "margin": max(0.1, min(2.0 / args.rate, 1.0)),
            },
        )
    except (ValueError, FileNotFoundError) as error:
        raise DemoError(str(error)) from error
    # The camera ends when it has shown all; the others must not end before.
    return [dataclasses.replace(spec, required=spec.name != "camera") for spec in specs]


def isolate() -> int:
    """Keep to this machine, and to a domain of our own unless the user has chosen one."""
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ.pop("ROS_LOCALHOST_ONLY", None)
    chosen = os.environ.get("ROS_DOMAIN_ID", "")
    if chosen:
        return int(chosen)
    domains = range(1, 102)  # above, Fast DDS's ports are in the range of passing connections
    start = os.getpid() % len(domains)
    for domain in (*domains[start:], *domains[:start]):
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
        ):
            # Where the first participant of a domain listens (DDS-RTPS 9.6.1.1).
            probe.bind(("127.0.0.1", 7410 + 250 * domain))
            os.environ["ROS_DOMAIN_ID"] = str(domain)
            return domain
    raise DemoError("all ROS domains of this machine are in use; set ROS_DOMAIN_ID")


# --- recording ------------------------------------------------------------------------------------


@dataclass
class Recording:
    """All that came, by stamp [ns]; filled by the executor's thread.

    Leaving its ``with`` block finishes the film and the pictures.
    """

    output: Path
    rate: float
    arrivals: dict[int, float] = field(default_factory=dict)
    """When an image's items were here, on the monotonic clock [s]."""
    latencies: dict[int, float] = field(default_factory=dict)
    """From the stamp until an image's items were here [s]."""
    stages: dict[int, dict[str, float]] = field(default_factory=dict)
    kinds: dict[int, dict[int, str]] = field(default_factory=dict)
    """Class name by id of an image's items."""
    names: dict[int, str] = field(default_factory=dict)
    """Names of the camera's pictures."""
    published: list[int] = field(default_factory=list)
    """Stamps of the camera's pictures."""
    packed: dict[tuple[str, int], tuple[bytes, tuple[int, int], str]] = field(default_factory=dict)
    """``mask`` and ``instances``: zlib of the pixels, (height, width), type."""
    unfilmed: int = 0
    """Pictures left out of the film."""
    memory: float = 0.0
    """Most that the segmenter said to have in RAM [MB]."""
    _film: queue.Queue[tuple[int, Any] | None] = field(default_factory=lambda: queue.Queue(40))
    _pack: queue.Queue[tuple[str, int, Any] | None] = field(default_factory=queue.Queue)
    _shown: dict[int, np.ndarray] = field(default_factory=dict)
    _last: np.ndarray | None = None
    _every: int = 1

    def __enter__(self) -> Recording:
        self._threads = [
            threading.Thread(target=self._write_film, name="film"),
            threading.Thread(target=self._pack_ids, name="pack"),
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._film.put(None)
        self._pack.put(None)
        for thread in self._threads:
            thread.join()
        if self._last is not None:
            from waste_seg_ros.perception.draw import contact_sheet

            tiles = [self._shown[key] for key in sorted(self._shown)]
            write_png(self.output / "contact.png", contact_sheet(tiles[-SHOWN:], 3))
            write_png(self.output / "last.png", self._last)

    def film(self, stamp: int, message: Any) -> None:
        """Take a picture for the film, if there is room."""
        try:
            self._film.put_nowait((stamp, message))
        except queue.Full:
            self.unfilmed += 1

    def pack(self, topic: str, stamp: int, message: Any) -> None:
        """Keep an image of ids, unless there are plenty."""
        if self._chosen(stamp):
            self._pack.put((topic, stamp, message))

    def _chosen(self, stamp: int) -> bool:
        """Whether a stamp is among those kept: a fair draw, the same for every topic."""
        return zlib.crc32(stamp.to_bytes(8, "little")) % self._every == 0

    def _pack_ids(self) -> None:
        from waste_seg_ros.nodes.images import to_array

        _give_way()
        while (job := self._pack.get()) is not None:
            topic, stamp, message = job
            ids = to_array(message)
            shape = (ids.shape[0], ids.shape[1])
            self.packed[topic, stamp] = (zlib.compress(ids.tobytes(), 1), shape, ids.dtype.str)
            if len(self.packed) > 8 * MEASURED:
                self._every *= 2
                self.packed = {k: v for k, v in self.packed.items() if self._chosen(k[1])}

    def ids(self, topic: str, stamp: int) -> np.ndarray | None:
        """An image of ids that came."""
        if (topic, stamp) not in self.packed:
            return None
        content, shape, kind = self.packed[topic, stamp]
        return np.frombuffer(zlib.decompress(content), kind).reshape(shape)

    def _write_film(self) -> None:
        from waste_seg_ros.nodes.images import to_array

        _give_way()
        writer: cv2.VideoWriter | None = None
        size = (0, 0)
        partial = self.output / ".overlay.mp4"
        every, count = 1, 0
        while (job := self._film.get()) is not None:
            image = to_array(job[1])
            if writer is None:
                size = (image.shape[1], image.shape[0])
                # OpenCV's own wheel encodes MPEG-4 part 2, which players know, but no H.264.
                code = cv2.VideoWriter.fourcc(*"mp4v")
                writer = cv2.VideoWriter(str(partial), code, max(self.rate, 1.0), size)
            self._last = image
            shown = image
            if (image.shape[1], image.shape[0]) != size:  # a film has one size
                shown = _letterbox(image, size)
            writer.write(cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))
            # Evenly spread however many there will be: of too many every other one goes.
            if count % every == 0:
                self._shown[count] = image.copy()
                if len(self._shown) >= 2 * SHOWN:
                    every *= 2
                    self._shown = {k: v for k, v in self._shown.items() if k % every == 0}
            count += 1
        if writer is not None:
            writer.release()
            os.replace(partial, self.output / "overlay.mp4")


def _give_way() -> None:
    """Give this thread the lowest priority: on Linux each thread has its own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _letterbox(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = image.shape[:2]
    scale = min(size[0] / width, size[1] / height)
    small = cv2.resize(image, (max(1, int(width * scale)), max(1, int(height * scale))))
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    y, x = (size[1] - small.shape[0]) // 2, (size[0] - small.shape[1]) // 2
    canvas[y : y + small.shape[0], x : x + small.shape[1]] = small
    return canvas


class Recorder:
    """The node that hears all there is, and lets the camera begin."""

    def __init__(
        self,
        board: Any,
        recording: Recording,
        truth: bool,
        picks: demo_arms.PickRecord | None = None,
    ) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from rcl_interfaces.srv import SetParameters
        from sensor_msgs.msg import CameraInfo, Image

        from waste_seg_ros.msg import Pick, WasteItemArray

        self.board, self.recording, self.picks = board, recording, picks
        self.node = rclpy.create_node("demo")
        self._matched: dict[str, int] = {}
        self._truth = truth
        self._subscribe(WasteItemArray, "items", self._on_items)
        self._subscribe(CameraInfo, "camera_info", lambda m: recording.published.append(_stamp(m)))
        self._subscribe(Image, "overlay", lambda m: recording.film(_stamp(m), m))
        for topic in ("mask", "instances") if truth else ():
            self._subscribe(Image, topic, functools.partial(self._on_ids, topic))
        if truth:
            self._subscribe(WasteItemArray, "truth/items", self._on_name)
        if picks is not None:
            self._subscribe(Pick, "picks", picks.orders.append)
        self._begin = self.node.create_client(SetParameters, "camera/set_parameters")
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def _subscribe(self, kind: Any, topic: str, callback: Callable[[Any], None]) -> None:
        from rclpy.event_handler import SubscriptionEventCallbacks
        from rclpy.qos import QoSProfile

        def matched(event: Any) -> None:
            self._matched[topic] = event.current_count

        self._matched[topic] = 0
        events = SubscriptionEventCallbacks(matched=matched)
        self.node.create_subscription(
            kind, topic, callback, QoSProfile(depth=100), event_callbacks=events
        )

    def ready(self) -> bool:
        """Whether nothing that is published from now on is lost: both ends know of each other."""
        health = self.board.health()
        values: dict[str, str] = {}
        names = ["segmenter: output", "camera: source"]
        wanted = {topic: 1 for topic in self._matched}
        wanted |= {"camera_info": 2, "image_raw": 1}  # the segmenter's are among them
        if self.picks is not None:  # and those of the tracker and the arms
            names += ["tracker: arms"]
            more = 1 + self.picks.arms
            wanted |= {"camera_info": 3, "items": 2, "picks": more, "truth/items": more}
        for name in names:
            if name not in health:
                return False
            values |= health[name].values
        if list(values.values()).count("ready") < (self.picks.arms if self.picks else 0):
            return False
        known = {topic: int(values.get(f"subscribers of {topic}", 0)) for topic in wanted}
        return all(self._matched.values()) and all(known[t] >= n for t, n in wanted.items())

    def begin(self) -> None:
        """Let the camera take pictures.

        Raises:
            DemoError: the camera does not answer.
        """
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        value = Parameter("paused", value=False).to_parameter_msg()
        future = self._begin.call_async(SetParameters.Request(parameters=[value]))
        end = time.monotonic() + 10.0
        while not future.done():
            if time.monotonic() > end:
                raise DemoError("the camera does not answer")
            time.sleep(0.01)

    def _on_items(self, array: Any) -> None:
        key, recording = _stamp(array), self.recording
        recording.latencies[key] = self.board.add_items(array, self.node.get_clock().now())
        recording.arrivals[key] = time.monotonic()
        names = ("transport", "conversion", "inference", "extraction", "total")
        recording.stages[key] = {name: getattr(array.latency, name) for name in names}
        recording.kinds[key] = {item.track_id: item.class_id for item in array.items}

    def _on_ids(self, topic: str, message: Any) -> None:
        self.recording.pack(topic, _stamp(message), message)

    def _on_name(self, array: Any) -> None:
        self.recording.names[_stamp(array)] = array.model
        if self.picks is not None:
            self.picks.add_truth(array)

    def _on_diagnostics(self, array: Any) -> None:
        self.board.add_diagnostics(array)
        camera = self.board.health().get("camera: source")
        if camera is not None and camera.values.get("ended") == "True":
            self.board.hold()  # that the camera goes then is no fault
        for health in self.board.health().values():
            with contextlib.suppress(KeyError, ValueError):
                memory = float(health.values["memory [MB]"])
                self.recording.memory = max(self.recording.memory, memory)


def _stamp(message: Any) -> int:
    stamp = message.header.stamp
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


# --- running --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into an answer of the yielded function."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(
    nodes: Supervisor, recorder: Recorder, screen: Any, requested: Callable[[], bool]
) -> tuple[str, dict[str, float]]:
    """Show what passes until the camera has ended.

    Returns:
        what went wrong, or "", and the processor time used by each process [s].
    """
    recording = recorder.recording
    used: dict[str, float] = {}
    started = changed = time.monotonic()
    begun = False
    ended = math.inf
    heard: tuple[int, ...] = ()
    while not requested():
        time.sleep(0.25)
        screen.refresh()
        used |= _processor_seconds(nodes)
        now = time.monotonic()
        if problem := _problem(nodes, recording, recorder.board, now - started):
            return problem, used
        if not begun and recorder.ready():
            recorder.begin()
            begun = True
        counts = (len(recording.published), len(recording.arrivals), len(recording.packed))
        if counts != heard:
            heard, changed = counts, now
        if ended == math.inf and "camera" in nodes.exit_codes:
            ended = now
        # After the camera's last picture all that is on its way may still arrive, and be picked.
        patience = 1.0 if recorder.picks is None else 1.5 + demo_arms.HORIZON
        if now - max(ended, changed) > patience:
            break
    if not recording.arrivals and not requested():
        return "no items came", used
    return "", used


def _problem(nodes: Supervisor, recording: Recording, board: Any, running: float) -> str:
    """What keeps the chain from working, or ""."""
    from waste_seg_ros.nodes.diagnostics import ERROR

    if failed := nodes.failed():
        return failed
    if code := nodes.exit_codes.get("camera"):
        return f"camera ended with exit code {code}"
    if recording.arrivals:
        return ""
    health = board.health()
    model = health.get("segmenter: model")
    if model is not None and model.level == ERROR:
        return f"segmenter: {model.message}"
    if running > PATIENCE:
        states = "; ".join(f"{name}: {entry.message}" for name, entry in sorted(health.items()))
        return f"no items within {PATIENCE:.0f} s ({states or 'nothing was heard of the nodes'})"
    return ""


def _processor_seconds(nodes: Supervisor) -> dict[str, float]:
    """Processor time that the running nodes, and this process, have used [s]."""
    ticks = os.sysconf("SC_CLK_TCK")
    used = {}
    for name, pid in {**nodes.pids, "demo": os.getpid()}.items():
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used[name] = (int(fields[11]) + int(fields[12])) / ticks
    return used


# --- summing up -----------------------------------------------------------------------------------


def _summary(
    args: argparse.Namespace,
    plan: Plan,
    recording: Recording,
    board: Any,
    load: Mapping[str, float],
) -> dict[str, Any]:
    health = board.health()
    model = health["segmenter: model"].values if "segmenter: model" in health else {}
    camera = health["camera: source"].values if "camera: source" in health else {}
    times = sorted(recording.arrivals.values())
    spent = times[-1] - times[0]
    latencies = 1e3 * np.array(list(recording.latencies.values()))
    stages = {
        name: float(np.mean([1e3 * entry[name] for entry in recording.stages.values()]))
        for name in next(iter(recording.stages.values()))
    }
    published = len(set(recording.published) | set(recording.arrivals))
    summary: dict[str, Any] = {
        "source": args.source,
        "seed": args.seed if args.source == "synthetic" else None,
        "model": Path(model.get("bundle", "")).name or args.model,
        "head": model.get("head", args.head),
        "backend": model.get("backend", args.backend),
        "network_input": model.get("input", ""),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(),
            "load_1min": os.getloadavg()[0],
            "ran": "camera, segmenter"
            + (f", tracker, {args.arms} simulated arms" if args.arms else "")
            + " and this recorder with film, all on these cores",
            "processor_seconds": load,
        },
        "frames": {
            "rate_asked_hz": args.rate,
            "published": published,
            "served": len(recording.arrivals),
            "not_served": published - len(recording.arrivals),
            "dropped_by_segmenter": board.dropped(),
            "missed_by_camera": int(camera.get("missed moments", 0)),
            "not_in_film": recording.unfilmed,
        },
        "frames_per_second": (len(times) - 1) / spent if spent > 0 else math.nan,
        "latency_ms": {
            f"p{percent}": float(np.percentile(latencies, percent)) for percent in (50, 90, 99)
        },
        "latency_from_to": "camera's stamp to the items' arrival in this process",
        "stage_mean_ms": stages,
        "segmenter_memory_mb": recording.memory or None,
        "items_seen": dict(
            Counter(kind for kinds in recording.kinds.values() for kind in kinds.values())
        ),
    }
    if plan.truth is not None:
        classes = tuple(name for name in model.get("classes", "").split(", ") if name)
        summary["truth"] = _compare(plan, recording, classes)
    return summary


def _compare(plan: Plan, recording: Recording, classes: Sequence[str]) -> dict[str, Any]:
    """Compare mask and instances with the truth of the same stamp."""
    from waste_seg_ros.train.evaluate import Scores

    assert plan.truth is not None
    both = [
        stamp
        for stamp in sorted(recording.names)
        if ("mask", stamp) in recording.packed and ("instances", stamp) in recording.packed
    ]
    if len(both) > MEASURED:
        both = [both[k * len(both) // MEASURED] for k in range(MEASURED)]
    if not both:
        return {"frames": 0}
    named = bool(classes) and not plan.agnostic
    kinds = tuple(classes) if named else CLASSES
    scores = Scores(len(kinds), named)
    for stamp in both:
        sample = plan.truth(recording.names[stamp])
        if named:
            labels = rename_labels(sample.labels, CLASSES, kinds)
            sample = dataclasses.replace(sample, labels=labels)
        mask, instances = recording.ids("mask", stamp), recording.ids("instances", stamp)
        assert mask is not None and instances is not None
        seen = {
            number: kinds.index(name) + 1 if named and name in kinds else 0
            for number, name in recording.kinds.get(stamp, {}).items()
        }
        scores.update(sample, mask, instances, seen)
    confusion, quality, found = scores.confusion, scores.quality, scores.found
    result: dict[str, Any] = {
        "frames": len(both),
        "binary_iou": scores.binary.value(),
        "items": {"found": found.found, "missed": found.missed, "false": found.false},
        "item_recall": found.recall(),
        "item_precision": found.precision(),
        "pq_whatever_class": quality.agnostic()[0],
    }
    if named:
        result |= {
            "miou": confusion.mean_iou(),
            "iou": dict(zip(("background", *kinds), confusion.iou().tolist(), strict=True)),
            "wrong_class": found.nameable - found.named,
            "pq": quality.mean()[0],
        }
    return result


def _report(summary: Mapping[str, Any]) -> str:
    frames, latency, machine = summary["frames"], summary["latency_ms"], summary["machine"]
    lines = [
        "",
        f"model       {summary['model']} ({summary['head']}) on {summary['backend']}, "
        f"input {summary['network_input']}",
        f"speed       {summary['frames_per_second']:.1f} images/s of {frames['rate_asked_hz']:g} "
        f"asked for: {frames['served']} of {frames['published']} images served, "
        f"{frames['missed_by_camera']} moments missed by the camera",
        f"latency     camera to items p50 {latency['p50']:.0f} ms, p90 {latency['p90']:.0f} ms, "
        f"p99 {latency['p99']:.0f} ms",
        "            on average "
        + ", ".join(f"{k} {v:.1f}" for k, v in summary["stage_mean_ms"].items() if k != "total")
        + " ms",
    ]
    if summary["segmenter_memory_mb"]:
        lines.append(f"memory      segmenter {summary['segmenter_memory_mb']:.0f} MB")
    lines.append(
        f"machine     {machine['cores']} cores of {machine['processor']}; "
        + ", ".join(f"{k} {v:.1f}" for k, v in machine["processor_seconds"].items())
        + " s of processor time"
    )
    truth = summary.get("truth")
    if truth is None:
        lines.append("truth       not known for this source")
    elif not truth["frames"]:
        lines.append("truth       no picture came with its truth")
    else:
        items = truth["items"]
        lines.append(
            f"truth       {truth['frames']} images: foreground IoU {truth['binary_iou']:.3f}"
            + (f", mIoU {truth['miou']:.3f}, PQ {truth['pq']:.3f}" if "miou" in truth else "")
            + f", PQ whatever the class {truth['pq_whatever_class']:.3f}"
        )
        lines.append(
            f"items       {items['found']} found, {items['missed']} missed, {items['false']} false"
            + (f", {truth['wrong_class']} of wrong class" if "wrong_class" in truth else "")
            + f" (recall {truth['item_recall']:.3f} at IoU 0.5)"
        )
        if "iou" in truth:
            each = ", ".join(f"{name} {value:.3f}" for name, value in truth["iou"].items())
            lines.append(f"IoU         {each}")
    if "arms" in summary:
        lines += demo_arms.report(summary["arms"])
    return "\n".join(lines)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
