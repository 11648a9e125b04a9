"""``waste-seg replay``: play a recording to the graph, or look at it with the perception here.

Played, the messages go out as they lie in the file, in the pace in which they came. With
``--offline`` nothing is sent: the images of the recording go through the same work as in the
segmenter, with the parameters of ``config/segmenter.yaml``, and where the recording holds the truth
(``truth/labels`` and ``truth/instances``, as the camera node publishes them) what is found is
compared with it. That takes no ROS, unless the items are to be written (``--output``).
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from waste_seg_ros.data.sample import CLASSES, Sample
from waste_seg_ros.files import write_json
from waste_seg_ros.record import (
    Bag,
    BagWriter,
    Entry,
    RecordingError,
    Topic,
    message_class,
    message_definition,
    offered_qos,
    stop_requests,
)
from waste_seg_ros.runtime import HEADS, KINDS

if TYPE_CHECKING:
    from waste_seg_ros.nodes.loading import Model, Request, Settings
    from waste_seg_ros.perception.items import ItemParams
    from waste_seg_ros.runtime.backends import Prediction

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
NOT_SEEN = ("mask", "instances", "overlay", "labels", "depth", "disparity")
"""Names of topics with images that no camera took; in whichever part of the name."""
CLOCK_HZ = 100.0
TRUTH_WAIT = 16
"""Images for whose truth is waited; it lies a few messages behind them."""


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``waste-seg replay``."""
    parser.add_argument("recording", type=Path, help=".mcap file, or the folder of a bag")
    parser.add_argument("--info", action="store_true", help="list the topics and end")
    parser.add_argument(
        "--topics", nargs="+", metavar="TOPIC", help="play only these; * stands for anything"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="times as fast as it was")
    parser.add_argument("--loop", action="store_true", help="again and again until Ctrl-C")
    parser.add_argument(
        "--clock",
        nargs="?",
        type=float,
        const=CLOCK_HZ,
        metavar="HZ",
        help=f"publish the recording's time on /clock ({CLOCK_HZ:g} Hz), for nodes with "
        "use_sim_time",
    )
    parser.add_argument(
        "--remap", nargs="+", default=[], metavar="FROM:=TO", help="publish under other names"
    )
    parser.add_argument(
        "--wait", type=float, default=2.0, metavar="S", help="for subscribers, before it begins"
    )
    parser.add_argument(
        "--repair", type=Path, metavar="FOLDER", help="write what can be read to a new bag and end"
    )
    offline = parser.add_argument_group("without sending anything")
    offline.add_argument(
        "--offline", action="store_true", help="run the perception here and compare with the truth"
    )
    offline.add_argument("--image-topic", default="", help="where there are several")
    offline.add_argument("--model", default="", help="name of a model bundle, or its folder")
    offline.add_argument("--head", default="", choices=("", *HEADS))
    offline.add_argument("--backend", default="", choices=("", *KINDS))
    offline.add_argument("--threads", type=int, help="of the backend; 0: all cores")
    offline.add_argument(
        "--params-file", type=Path, metavar="YAML", help="segmenter parameters, over config/"
    )
    offline.add_argument("--output", type=Path, metavar="FOLDER", help="write a bag of the items")
    offline.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg replay``; 1 where recording or model cannot be used, 2 for a wrong option."""
    for problem, wrong in (
        ("--rate takes a factor above 0", not (args.rate > 0 and math.isfinite(args.rate))),
        ("--clock takes a rate in Hz above 0", args.clock is not None and not args.clock > 0),
        ("--remap takes FROM:=TO", any(":=" not in entry for entry in args.remap)),
        (
            "--output, --json and --params-file go with --offline",
            not args.offline and (args.output or args.json or args.params_file),
        ),
    ):
        if wrong:
            print(f"waste-seg replay: {problem}", file=sys.stderr)
            return 2
    try:
        bag = Bag(args.recording.expanduser())
        for problem in bag.problems:
            print(f"warning: {problem}; the rest is used", file=sys.stderr)
        if args.info:
            print(bag.listing())
            return 0
        if args.repair:
            return _repair(bag, args.repair.expanduser())
        if args.offline:
            return _offline(bag, args)
        return _play(bag, args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:  # RecordingError, ModelError, ImageError are ValueErrors
        print(f"waste-seg replay: {error}", file=sys.stderr)
        return 1


def _repair(bag: Bag, folder: Path) -> int:
    writer = BagWriter(folder)
    try:
        for topic in bag.topics.values():
            if topic.definition:
                writer.add_topic(topic)
        for entry in bag.salvage():
            if entry.topic in writer.topics:
                writer.write(entry.topic, entry.data, entry.log_time, entry.publish_time)
    finally:
        writer.close()
    print(f"{folder}: {writer.counts.total()} messages saved")
    return 0


# --- playing --------------------------------------------------------------------------------------


def _play(bag: Bag, args: argparse.Namespace) -> int:
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    from waste_seg_ros.nodes import use_image_profile

    wanted = chosen(bag, args.topics)
    ros_args = [part for entry in args.remap for part in ("-r", entry)]
    use_image_profile()
    with stop_requests() as stop:
        rclpy.init(
            args=["--ros-args", *ros_args] if ros_args else [],
            signal_handler_options=SignalHandlerOptions.NO,
        )
        try:
            node = rclpy.create_node("replay")
            player = Player(node, bag, wanted, args.clock)
            unheard = player.wait(args.wait, stop)
            print(
                f"playing {bag.path}: {', '.join(sorted(player.publishers))}"
                + (f"; nobody listens to {', '.join(unheard)}" if unheard else ""),
                flush=True,
            )
            while not stop.is_set():
                player.play(args.rate, stop)
                if not args.loop:
                    break
            player.finish()
            print(f"{player.sent} messages sent, at most {1e3 * player.late:.0f} ms late")
            node.destroy_node()
        finally:
            rclpy.try_shutdown()
    return 0


def chosen(bag: Bag, patterns: Sequence[str] | None) -> set[str]:
    """Topics of a bag by patterns; a name without a slash in front may end a longer one.

    Raises:
        RecordingError: a pattern fits none.
    """
    if not patterns:
        return set(bag.topics)
    found: set[str] = set()
    for pattern in patterns:
        pattern = pattern if pattern.startswith("/") else f"*/{pattern}"
        fitting = fnmatch.filter(bag.topics, pattern)
        if not fitting:
            raise RecordingError(
                f"--topics: {bag.path} has no {pattern}; it has {', '.join(sorted(bag.topics))}"
            )
        found |= set(fitting)
    return found


class Player:
    """Publishes a bag's messages as they are."""

    def __init__(self, node: Any, bag: Bag, topics: Collection[str], clock: float | None) -> None:
        """Make the publishers; a topic whose type is not installed is left out, and told of.

        Raises:
            RecordingError: no topic is left.
        """
        self.sent = 0
        self.late = 0.0
        """By how much a message went out late, at most [s]."""
        self.publishers: dict[str, Any] = {}
        self._bag = bag
        for name in sorted(topics):
            topic = bag.topics[name]
            if clock and name == "/clock":
                continue
            try:
                if not topic.definition:
                    raise RecordingError("it is not in CDR")
                kind = message_class(topic.type)
            except RecordingError as error:
                print(f"{name} is not played: {error}", file=sys.stderr)
                continue
            self.publishers[name] = node.create_publisher(kind, name, offered_qos(topic))
        if not self.publishers:
            raise RecordingError(f"{bag.path}: none of its topics can be played")
        self._clock: Any = None
        self._tick = 1.0 / clock if clock else math.inf
        if clock:
            from rosgraph_msgs.msg import Clock

            self._clock = node.create_publisher(Clock, "/clock", 10)

    def wait(self, seconds: float, stop: threading.Event) -> list[str]:
        """Wait until each topic has a subscriber, or so long; returns the topics that have none."""
        end = time.monotonic() + seconds
        while True:
            unheard = [n for n, p in self.publishers.items() if not p.get_subscription_count()]
            if not unheard or time.monotonic() > end or stop.is_set():
                break
            stop.wait(0.05)
        # That we know them does not mean that they know us.
        stop.wait(min(0.2, seconds))
        return unheard

    def play(self, rate: float, stop: threading.Event) -> None:
        """Publish all messages once, so many times as fast as they came."""
        begin = ticked = time.monotonic()
        first = self._bag.first
        for entry in self._bag.entries(self.publishers):
            due = begin + (entry.log_time - first) * 1e-9 / rate
            while True:
                now = time.monotonic()
                if self._clock is not None and now >= ticked:
                    self._publish_clock(first + int((now - begin) * rate * 1e9))
                    ticked = max(ticked + self._tick, now)
                if now >= due:
                    break
                if stop.wait(min(due, ticked if self._clock is not None else due) - now):
                    return
            if stop.is_set():
                return
            self.late = max(self.late, now - due)
            self.publishers[entry.topic].publish(bytes(entry.data))
            self.sent += 1

    def _publish_clock(self, at: int) -> None:
        from rosgraph_msgs.msg import Clock

        message = Clock()
        message.clock.sec, message.clock.nanosec = divmod(at, 10**9)
        self._clock.publish(message)

    def finish(self) -> None:
        """Let the last messages arrive before the publishers go."""
        from rclpy.duration import Duration

        for publisher in self.publishers.values():
            publisher.wait_for_all_acked(Duration(seconds=1))
        time.sleep(0.1)  # best-effort subscribers do not acknowledge


# --- looking at it here ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Frame:
    """An image of a recording, and what there is beside it.

    Attributes:
        message: sensor_msgs/Image or CompressedImage.
        image: (H, W, 3) uint8 RGB of it.
        camera_info: the newest before it, if any.
        log_time: when it came [ns since the epoch].
        truth: labels and instances if they were recorded.
    """

    message: Any
    image: np.ndarray
    camera_info: Any
    log_time: int
    truth: Sample | None


@dataclass(frozen=True)
class Inputs:
    """Topics of a recording that the perception takes; "" where there is none."""

    image: str
    camera_info: str
    labels: str
    instances: str


def find_inputs(bag: Bag, image: str = "") -> Inputs:
    """Choose the topics.

    Args:
        bag: the recording.
        image: the image topic if the user has said so.

    Raises:
        RecordingError: there is no image topic, or it is not clear which.
    """
    there = {name: t for name, t in bag.topics.items() if t.type in IMAGE_TYPES}
    if image:
        name = _named(bag, image, there)
    else:
        seen = [
            name
            for name in there
            if not any(word in part for part in name.split("/") for word in NOT_SEEN)
            and "/truth/" not in name
        ]
        # One camera gives both kinds; raw is nearer to the truth.
        raw = [name for name in seen if there[name].type == IMAGE_TYPES[0]]
        seen = raw or seen
        if not seen:
            listed = ", ".join(f"{n} ({t.type})" for n, t in sorted(bag.topics.items()))
            raise RecordingError(
                f"{bag.path} has no topic with a camera's images; it has {listed}. Record "
                "image_raw, or name another with --image-topic"
            )
        if len(seen) > 1:
            raise RecordingError(
                f"{bag.path} has images on {', '.join(sorted(seen))}: choose one with --image-topic"
            )
        name = seen[0]
    base = name.removesuffix("/compressed").rpartition("/")[0] + "/"

    def beside(suffix: str) -> str:
        if base + suffix in bag.topics:
            return base + suffix
        others = [topic for topic in bag.topics if topic.endswith("/" + suffix)]
        return others[0] if len(others) == 1 else ""

    return Inputs(name, beside("camera_info"), beside("truth/labels"), beside("truth/instances"))


def _named(bag: Bag, image: str, there: Collection[str]) -> str:
    """The image topic of that name. Raises RecordingError if there is none such."""
    name = image if image.startswith("/") else "/" + image
    if name not in there:
        other = f"; {name} has {bag.topics[name].type}" if name in bag.topics else ""
        raise RecordingError(
            f"--image-topic: {bag.path} has no images on {name}, but on "
            f"{', '.join(sorted(there)) or 'no topic'}{other}"
        )
    return name


class Frames:
    """The images of a recording in their order, as an iterable; holds what went wrong.

    Attributes:
        unreadable: images left out because they cannot be read.
        problem: why the last of them cannot be.
    """

    def __init__(self, bag: Bag, inputs: Inputs) -> None:
        self.unreadable, self.problem = 0, ""
        self._one_was_read = False
        self._bag, self._inputs = bag, inputs
        self.has_truth = bool(inputs.labels and inputs.instances)
        self._decoders = {
            name: bag.decoder(name)
            for name in (inputs.image, inputs.camera_info, inputs.labels, inputs.instances)
            if name
        }

    def __iter__(self) -> Iterator[Frame]:
        """Yield the images, each with the truth of the same stamp.

        Raises:
            RecordingError: the first image cannot be read, or a message is not what it should be.
        """
        inputs = self._inputs
        truths: dict[str, dict[int, np.ndarray]] = {inputs.labels: {}, inputs.instances: {}}
        waiting: deque[tuple[Entry, Any, int]] = deque()
        info: Any = None
        for entry in self._bag.entries(self._decoders):
            if entry.topic == inputs.camera_info:
                info = self._decoders[entry.topic](entry.data)
                continue
            message = self._decoders[entry.topic](entry.data)
            if entry.topic == inputs.image:
                waiting.append((entry, message, _stamp(message)))
            else:
                truths[entry.topic][_stamp(message)] = self._truth(entry.topic, message)
            both = truths[inputs.labels].keys() & truths[inputs.instances].keys()
            while waiting and (
                not self.has_truth
                or len(waiting) > TRUTH_WAIT
                or any(stamp in both for _, _, stamp in waiting)
            ):
                yield from self._frame(waiting.popleft(), info, truths)
        while waiting:
            yield from self._frame(waiting.popleft(), info, truths)

    def _truth(self, topic: str, message: Any) -> np.ndarray:
        from waste_seg_ros.nodes.images import ImageError, to_array

        try:
            return to_array(message)
        except ImageError as error:
            raise RecordingError(f"{self._bag.path}: {topic}: {error}") from error

    def _frame(
        self,
        held: tuple[Entry, Any, int],
        info: Any,
        truths: Mapping[str, dict[int, np.ndarray]],
    ) -> Iterator[Frame]:
        from waste_seg_ros.nodes.images import ImageError, to_rgb

        entry, message, stamp = held
        labels = truths[self._inputs.labels].pop(stamp, None)
        instances = truths[self._inputs.instances].pop(stamp, None)
        for kept in truths.values():  # of images that never came
            while len(kept) > 4 * TRUTH_WAIT:
                del kept[next(iter(kept))]
        try:
            image = to_rgb(message)
        except ImageError as error:
            self.problem = f"{self._bag.path}: {entry.topic}: {error}"
            if not self._one_was_read:
                raise RecordingError(self.problem) from error
            self.unreadable += 1
            return
        self._one_was_read = True
        truth = None
        if labels is not None and instances is not None:
            shapes = {image.shape[:2], labels.shape, instances.shape}
            if len(shapes) > 1:
                raise RecordingError(
                    f"{self._bag.path}: {entry.topic} and its truth differ in size: "
                    + ", ".join(f"{w}x{h}" for h, w in sorted(shapes))
                )
            truth = Sample(
                image, labels.astype(np.uint8), instances.astype(np.uint16), str(entry.log_time)
            )
        yield Frame(message, image, info, entry.log_time, truth)


def _stamp(message: Any) -> int:
    stamp = message.header.stamp
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def segmenter_parameters(file: Path | None = None) -> dict[str, Any]:
    """Parameters of the segmenter: those shipped, and over them those of a file.

    Raises:
        RecordingError: the file cannot be read as ROS parameters.
    """
    from waste_seg_ros.graph import share_folder

    values: dict[str, Any] = {}
    for path in (share_folder() / "config" / "segmenter.yaml", file):
        if path is None:
            continue
        try:
            read = yaml.safe_load(path.expanduser().read_text())
            for node, entry in read.items():
                if node.rpartition("/")[2] in ("segmenter", "**"):
                    values |= entry["ros__parameters"]
        except OSError as error:
            raise RecordingError(f"--params-file: {path}: {error.strerror}") from error
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordingError(
                f"--params-file: {path} is not a file of ROS parameters "
                f"(segmenter: ros__parameters: ...): {error}"
            ) from error
    return values


class Perception:
    """What the segmenter does with an image, without its topics.

    Attributes:
        frames, items: how many so far.
        network: time that the network has taken [s].
    """

    def __init__(self, request: Request, settings: Settings, writer: ItemWriter | None) -> None:
        self.frames, self.items, self.network = 0, 0, 0.0
        self._request, self._settings, self._writer = request, settings, writer
        self._models: dict[tuple[int, int], Model] = {}

    def model(self, size: tuple[int, int] | None) -> Model:
        """The model for images of a size (width, height). Raises ModelError."""
        from waste_seg_ros.nodes.loading import load

        if size is None:
            return load(self._request, None)
        if size not in self._models:
            if len(self._models) > 3:
                self._models.clear()
            self._models[size] = load(self._request, size)
        return self._models[size]

    def params(self, model: Model) -> ItemParams:
        """How items are made. Raises ValueError for what does not fit the model."""
        return self._settings.item_params(model)

    def see(self, frame: Frame) -> Prediction:
        """Work on an image, and write its items where that is asked for."""
        from waste_seg_ros.perception.items import extract_items
        from waste_seg_ros.perception.scaling import scale_image
        from waste_seg_ros.runtime.backends import as_head

        height, width = frame.image.shape[:2]
        model = self.model((width, height))
        params = self.params(model)
        if self._writer is not None:
            prediction, seconds, count = self._writer.see(frame, model, self._settings, params)
        else:
            image = np.ascontiguousarray(scale_image(frame.image, model.backend.input_size))
            begin = time.perf_counter()
            prediction = as_head(model.backend.predict(image), model.head)
            seconds = time.perf_counter() - begin
            _, found = extract_items(prediction, (width, height), params)
            count = len(found)
        self.frames += 1
        self.items += count
        self.network += seconds
        return prediction


class ItemWriter:
    """Writes the items of images to a bag, as the segmenter would publish them; needs ROS."""

    def __init__(self, folder: Path, topic: str) -> None:
        kind = "waste_seg_ros/msg/WasteItemArray"
        message_class(kind)
        self._topic = topic
        self._bag = BagWriter(folder)
        self._bag.add_topic(Topic(topic, kind, message_definition(kind)))

    def see(
        self, frame: Frame, model: Model, settings: Settings, params: ItemParams
    ) -> tuple[Prediction, float, int]:
        """Work on an image; returns the prediction, the network's time [s], and how many items."""
        from builtin_interfaces.msg import Time
        from rclpy.serialization import serialize_message
        from std_msgs.msg import Header

        from waste_seg_ros.msg import StageLatency, WasteItemArray
        from waste_seg_ros.nodes.segmenter import Work, segment
        from waste_seg_ros.perception.items import extract_items

        kept: list[Prediction] = []

        def extract(prediction: Prediction, size: tuple[int, int], how: ItemParams) -> Any:
            kept.append(prediction)
            return extract_items(prediction, size, how)

        begin = time.perf_counter()
        recorded = frame.message.header
        stamp = Time(sec=recorded.stamp.sec, nanosec=recorded.stamp.nanosec)
        header = Header(stamp=stamp, frame_id=recorded.frame_id)
        work = Work(model, settings, params)
        found = segment(frame.image, header, work, frame.camera_info, extract)
        latency = StageLatency(
            conversion=found.converted - begin,
            inference=found.inferred - found.converted,
            extraction=found.filled - found.inferred,
            total=found.filled - begin,
        )
        array = WasteItemArray(
            header=header, model=model.name, items=found.entries, latency=latency
        )
        data = serialize_message(array)
        self._bag.write(self._topic, data, frame.log_time, frame.log_time)
        return kept[0], found.inferred - found.converted, len(found.entries)

    def close(self) -> None:
        """End the bag."""
        self._bag.close()


class _WithTruth:
    """The frames that have their truth as samples; the others are only worked on."""

    classes = CLASSES

    def __init__(self, frames: Frames, perception: Perception) -> None:
        self.count, self.ended = 0, False
        self._frames, self._perception = frames, perception
        self._now: Frame | None = None

    def __iter__(self) -> Iterator[Sample]:
        for frame in self._frames:
            if frame.truth is None:
                self._perception.see(frame)
                continue
            self._now = frame
            self.count += 1
            yield frame.truth
        self.ended = True

    def predict(self, image: np.ndarray) -> Prediction:
        """Of the frame whose image this is."""
        assert self._now is not None and self._now.image is image
        return self._perception.see(self._now)


def _offline(bag: Bag, args: argparse.Namespace) -> int:
    from waste_seg_ros.nodes.loading import Request, Settings

    values = segmenter_parameters(args.params_file)
    for name in ("model", "head", "backend", "threads"):
        if getattr(args, name) not in ("", None):
            values[name] = getattr(args, name)
    values["classes"] = tuple(values.get("classes") or ())
    try:
        request = Request(**{entry.name: values[entry.name] for entry in fields(Request)})
        settings = Settings(**{entry.name: values[entry.name] for entry in fields(Settings)})
    except KeyError as error:
        raise RecordingError(f"--params-file: parameter {error} is missing") from error

    inputs = find_inputs(bag, args.image_topic)
    frames = Frames(bag, inputs)
    writer = None
    if args.output:
        place = inputs.image.removesuffix("/compressed").rpartition("/")[0]
        writer = ItemWriter(args.output.expanduser(), f"{place}/items")
    perception = Perception(request, settings, writer)
    try:
        result = _measure(frames, perception)
    finally:
        if writer is not None:
            writer.close()
    result |= {
        "recording": os.fspath(bag.path),
        "image_topic": inputs.image,
        "images": perception.frames,
        "unreadable": frames.unreadable,
        "items_seen": perception.items,
        "network_seconds": perception.network / max(perception.frames, 1),
        "problems": bag.problems,
    }
    if args.json:
        write_json(args.json.expanduser(), result)
    _report(result, frames, writer is not None and args.output)
    return 0


def _measure(frames: Frames, perception: Perception) -> dict[str, Any]:
    """Work on all frames; figures as of ``waste-seg eval`` where there is truth."""
    if not frames.has_truth:
        for frame in frames:
            perception.see(frame)
        return {"frames": 0}
    from waste_seg_ros.train.evaluate import evaluate

    model = perception.model(None)
    samples = _WithTruth(frames, perception)
    try:
        result = evaluate(
            samples.predict,
            samples,
            head=model.head,
            classes=model.bundle.manifest.classes,
            params=perception.params(model),
        )
    except ValueError:
        if samples.count or not samples.ended:
            raise
        return {"frames": 0}
    result["model"] = model.name
    result["seconds"]["network"] = perception.network / perception.frames
    return result


def _report(result: Mapping[str, Any], frames: Frames, output: Path | bool | None) -> None:
    print(
        f"{result['images']} images of {result['image_topic']}, {result['items_seen']} items, "
        f"network {1e3 * result['network_seconds']:.1f} ms per image"
    )
    if frames.unreadable:
        print(f"{frames.unreadable} images cannot be read: {frames.problem}", file=sys.stderr)
    if output:
        print(f"items written to {output}")
    if result["frames"]:
        from waste_seg_ros.train.evaluate import format_report

        print(format_report(result))
    elif frames.has_truth:
        print("no image has truth of the same stamp: nothing to compare with")
    else:
        print(
            "no truth in the recording (truth/labels and truth/instances): nothing to compare with"
        )
