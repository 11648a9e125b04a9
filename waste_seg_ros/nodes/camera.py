"""A camera over the belt: the synthetic line, a folder of images, a video file or a V4L2 device.

Publishes ``image_raw`` (rgb8) and ``camera_info``; where the truth is known, also
``truth/labels`` (mono8, label ids), ``truth/instances`` (16UC1) and ``truth/items``, each with the
image's own header, when somebody subscribes. ``truth/items`` carries the picture's name as model.

Time: a stamp is when the picture was taken. The synthetic line is rendered ahead for the moment
at which it is published, files count as taken at that moment, and a device's picture at the moment
it was handed over by the driver. A moment that cannot be kept is counted as missed and left out;
pictures never come in a bunch afterwards.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from waste_seg_ros.data.photographs import SUFFIXES, read_image
from waste_seg_ros.data.sample import CLASSES, DataError, Sample
from waste_seg_ros.data.sources import tell_problems
from waste_seg_ros.msg import WasteItemArray
from waste_seg_ros.nodes import NodeError, declare, run_node
from waste_seg_ros.nodes.diagnostics import (
    ERROR,
    OK,
    WARN,
    Finding,
    Rate,
    Reporter,
    publish,
    status,
)
from waste_seg_ros.nodes.images import to_image
from waste_seg_ros.nodes.messages import BeltPlane, item_message
from waste_seg_ros.perception.items import describe_items
from waste_seg_ros.perception.scaling import scale_ids, scale_image

BELT_DISTANCE = 1.0
"""From the synthetic line's camera to its belt [m]."""


@dataclass(frozen=True, eq=False)
class Picture:
    """What a source gives.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        taken: when, on the monotonic clock [s]; None for a source that is not live.
        truth: what is to be seen, if that is known.
        tracks: of truth's instances: id along the belt and velocity (x, y) [px/s].
    """

    image: np.ndarray
    taken: float | None = None
    truth: Sample | None = None
    tracks: dict[int, tuple[int, tuple[float, float]]] | None = None


class Source(Protocol):
    """Where pictures come from."""

    skipped: int
    """Pictures that could not be read."""
    focal_length: float
    """[px] of the pictures, 0 if not known."""

    def take(self, at: float) -> Picture | None:
        """Return the picture for a moment [s from the start], None where there are no more.

        Raises:
            NodeError: the source is gone or gives nothing.
        """

    def close(self) -> None:
        """Let go of files and devices."""


class SyntheticSource:
    """The synthetic line, with its truth."""

    def __init__(self, seed: int, size: tuple[int, int], speed: float) -> None:
        from waste_seg_ros.data.synthetic import SyntheticLine

        try:
            self._line = SyntheticLine(seed=seed, size=size, speed=speed)
        except ValueError as error:
            raise NodeError(f"synthetic line: {error}") from error
        self.skipped = 0
        self.focal_length = BELT_DISTANCE / self._line.meters_per_pixel

    def take(self, at: float) -> Picture:
        """Render the belt as it is at that moment."""
        # The name of a sample gives the time to the microsecond; this is the very same frame.
        frame = self._line.frame(round(at, 6))
        tracks = {item.instance: (item.id, item.velocity) for item in frame.items}
        return Picture(frame.sample.image, truth=frame.sample, tracks=tracks)

    def close(self) -> None:
        """Nothing to let go of."""


class FolderSource:
    """The images of a folder in the order of their names, numbers in names counted as such."""

    def __init__(
        self, folder: Path, size: tuple[int, int], loop: bool, annotations: Path | None, log: Any
    ) -> None:
        try:
            files = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES]
        except OSError as error:
            raise NodeError(f"source: cannot read folder {folder}: {error.strerror}") from error
        if not files:
            raise NodeError(f"source: no images in folder {folder}; it takes {', '.join(SUFFIXES)}")
        self._files = sorted(files, key=_natural)
        self._size, self._loop, self._log = size, loop, log
        self._next = 0
        self._bad: set[Path] = set()
        self.skipped = 0
        self.focal_length = 0.0
        self._truth = _annotated(annotations, folder, log) if annotations else None

    def take(self, at: float) -> Picture | None:
        """Read the next image that can be read."""
        truth: Sample | None = None
        while True:
            if self._next == len(self._files):
                if not self._loop:
                    return None
                self._next = 0
            file = self._files[self._next]
            self._next += 1
            try:
                truth = self._truth(file.name) if self._truth else None
                # Where there are masks, all pictures lie as those do: as stored.
                image = truth.image if truth else read_image(file, upright=self._truth is None)
                break
            except DataError as error:
                self.skipped += 1
                if file not in self._bad:  # once, however often the folder is gone through
                    self._log.warning(f"{error}; it is left out")
                self._bad.add(file)
            if len(self._bad) == len(self._files):
                raise NodeError(f"source: none of the {len(self._files)} images can be read")
        image = _resized(image, self._size)
        if truth is not None:
            size = (image.shape[1], image.shape[0])
            truth = Sample(
                image,
                scale_ids(truth.labels, size),
                scale_ids(truth.instances, size),
                truth.name,
            )
        return Picture(image, truth=truth)

    def close(self) -> None:
        """Nothing to let go of."""


class VideoSource:
    """A video file, frame by frame at the node's own rate."""

    def __init__(self, file: Path, size: tuple[int, int], loop: bool) -> None:
        self._file, self._size, self._loop = file, size, loop
        self.skipped = 0
        self.focal_length = 0.0
        self._video = cv2.VideoCapture(str(file))
        if not self._video.isOpened():
            raise NodeError(f"source: {file} is not a video that OpenCV reads; try .mp4 or .avi")

    def take(self, at: float) -> Picture | None:
        """Read the next frame."""
        found, image = self._video.read()
        if not found and self._loop:
            # Opened anew: seeking to frame 0 is not exact in every container.
            self._video.release()
            self._video = cv2.VideoCapture(str(self._file))
            found, image = self._video.read()
            if not found:
                raise NodeError(f"source: no frame can be read from {self._file}")
        if not found:
            return None
        return Picture(_resized(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), self._size))

    def close(self) -> None:
        """Close the file."""
        self._video.release()


class ReplaySource:
    """Pictures that lie ready in an .npy file, over and over: for any rate, as in a benchmark."""

    def __init__(self, file: Path, size: tuple[int, int], loop: bool) -> None:
        try:
            # Mapped, so that the file's pages are the only copy; and never unpickled.
            frames = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise NodeError(f"source: {file} is not a file of pictures: {error}") from error
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
            raise NodeError(
                f"source: {file} holds {frames.dtype} of shape {frames.shape}; "
                "pictures are (N, H, W, 3) uint8 RGB"
            )
        self._frames, self._size, self._loop = frames, size, loop
        self._next = 0
        self.skipped = 0
        self.focal_length = 0.0

    def take(self, at: float) -> Picture | None:
        """Hand out the next picture."""
        if self._next == len(self._frames):
            if not self._loop:
                return None
            self._next = 0
        self._next += 1
        return Picture(_resized(self._frames[self._next - 1], self._size))

    def close(self) -> None:
        """Nothing to let go of."""


class DeviceSource:
    """A V4L2 device. One that is unplugged is opened again when it comes back."""

    def __init__(self, device: str, size: tuple[int, int], rate: float, log: Any) -> None:
        self._device, self._size, self._rate, self._log = device, size, rate, log
        self.skipped = 0
        self.focal_length = 0.0
        self._start = time.monotonic()
        if not os.path.exists(device):
            found = ", ".join(sorted(str(p) for p in Path("/dev").glob("video*"))) or "none"
            raise NodeError(f"source: there is no {device}; video devices here: {found}")
        if not os.access(device, os.R_OK | os.W_OK):
            raise NodeError(f"source: no permission for {device}: sudo usermod -aG video $USER")
        self._camera = self._open()
        if self._camera is None:
            raise NodeError(
                f"source: {device} does not open as a camera: another program may hold it "
                f"(fuser {device}), or it gives no images (try the next number)"
            )

    def _open(self) -> cv2.VideoCapture | None:
        camera = cv2.VideoCapture(self._device, cv2.CAP_V4L2)
        if not camera.isOpened():
            return None
        camera.set(cv2.CAP_PROP_FRAME_WIDTH, self._size[0])
        camera.set(cv2.CAP_PROP_FRAME_HEIGHT, self._size[1])
        camera.set(cv2.CAP_PROP_FPS, self._rate)
        camera.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # older pictures are of no use
        return camera

    def take(self, at: float) -> Picture | None:
        """Wait for the device's next picture at or after that moment."""
        for _ in range(100):
            grabbed = self._camera is not None and self._camera.grab()
            taken = time.monotonic()
            if not grabbed:
                self.skipped += 1
                if self._camera is not None:
                    self._log.error(f"{self._device} gives no more images; is it plugged in?")
                    self._camera.release()
                time.sleep(0.2)
                self._camera = self._open() if os.path.exists(self._device) else None
                return Picture(np.empty((0, 0, 3), np.uint8), taken)
            # Half a device frame early is as good as half a frame late.
            if taken - self._start >= at - 0.5 / self._rate:
                break
        assert self._camera is not None
        found, image = self._camera.retrieve()
        if not found:
            self.skipped += 1
            return Picture(np.empty((0, 0, 3), np.uint8), taken)
        return Picture(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), taken)

    def close(self) -> None:
        """Let go of the device."""
        if self._camera is not None:
            self._camera.release()


def open_source(
    source: str,
    *,
    size: tuple[int, int],
    rate: float,
    seed: int,
    speed: float,
    loop: bool,
    truth: str,
    log: Any,
) -> Source:
    """Open what the parameter ``source`` names.

    Raises:
        NodeError: it cannot be opened.
    """
    default = (size[0] or 640, size[1] or 480)
    if truth and not os.path.isdir(os.path.expanduser(source)):
        raise NodeError("truth: annotations go with a folder of images as source")
    if source == "synthetic":
        return SyntheticSource(seed, default, speed)
    device = re.fullmatch(r"v4l2:(\d+)", source)
    if device or source.startswith("/dev/"):
        path = f"/dev/video{device[1]}" if device else source
        return DeviceSource(path, default, rate, log)
    path_of = Path(source).expanduser()
    if path_of.is_dir():
        annotations = Path(truth).expanduser() if truth else None
        return FolderSource(path_of, size, loop, annotations, log)
    if path_of.is_file() and path_of.suffix == ".npy":
        return ReplaySource(path_of, size, loop)
    if path_of.is_file():
        return VideoSource(path_of, size, loop)
    raise NodeError(
        f"source: there is no '{source}' (seen from {Path.cwd()}); give 'synthetic', a folder of "
        "images, a video file, /dev/videoN or v4l2:N"
    )


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sort key by which frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts] + [
        (-1, file.name)
    ]


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale to (width, height); a 0 follows the image's aspect, two zeros leave it as it is."""
    height, width = image.shape[:2]
    wanted = (
        size[0] or round(width * size[1] / height) or width,
        size[1] or round(height * size[0] / width) or height,
    )
    return scale_image(image, wanted)


def _annotated(annotations: Path, folder: Path, log: Any) -> Any:
    """Function from an image's file name to its annotated sample, or None if it has none."""
    from waste_seg_ros.data.coco import CocoDataset

    try:
        dataset = CocoDataset(annotations, folder)
    except (OSError, ValueError) as error:
        raise NodeError(f"truth: {error}") from error
    for line in tell_problems(dataset.problems):
        log.warning(line)
    places = {Path(name).name: place for place, name in enumerate(dataset.names)}
    return lambda name: dataset[places[name]] if name in places else None


class Camera(Node):
    """The camera node."""

    def __init__(self) -> None:
        super().__init__("camera")
        self.exit_code: int | None = None
        # One core: the rest of the machine is for the network.
        cv2.setNumThreads(1)
        rate = declare(self, "rate", 20.0, "Pictures per second.", low=0.1, high=1000.0)
        self._period = 1.0 / rate
        once = {"read_only": True}
        source = declare(
            self,
            "source",
            "synthetic",
            "'synthetic', a folder of images, a video file, /dev/videoN or v4l2:N.",
            **once,
        )
        size = tuple(
            declare(
                self,
                name,
                0,
                f"Picture {name} [px]. 0: 640x480 for the synthetic line and V4L2, the image's "
                "own size for a folder or video.",
                low=0,
                high=16384,
                **once,
            )
            for name in ("width", "height")
        )
        seed = declare(
            self, "seed", 0, "Synthetic line: another seed, other items.", low=0, high=2**31, **once
        )
        speed = declare(
            self, "speed", 0.25, "Synthetic line: belt speed [m/s].", low=-20.0, high=20.0, **once
        )
        loop = declare(self, "loop", True, "Folder or video: start again at the end.", **once)
        truth = declare(
            self, "truth", "", "Folder: COCO annotations of its images, published as truth.", **once
        )
        self._frames = declare(
            self, "frames", 0, "End after so many pictures; 0: never.", low=0, high=2**31, **once
        )
        self._frame_id = declare(
            self, "frame_id", "camera_optical_frame", "Frame of the pictures (REP 103).", **once
        )
        self._delay = declare(
            self,
            "start_delay",
            0.0,
            "Wait before the first picture [s], after wait_for_subscriber.",
            low=0,
            high=3600,
            **once,
        )
        self._wait = declare(
            self, "wait_for_subscriber", False, "Start when somebody subscribes.", **once
        )
        self._paused = declare(self, "paused", False, "Hold the belt, and take no pictures.")
        self.add_on_set_parameters_callback(self._on_parameters)

        self._name = source
        self._source = open_source(
            source,
            size=(size[0], size[1]),
            rate=rate,
            seed=seed,
            speed=speed,
            loop=loop,
            truth=truth,
            log=self.get_logger(),
        )
        # Reliable serves subscribers of either kind.
        reliable = QoSProfile(depth=5)
        options = {"qos_overriding_options": QoSOverridingOptions.with_default_policies()}
        self._image = self.create_publisher(Image, "image_raw", reliable, **options)
        self._info = self.create_publisher(CameraInfo, "camera_info", reliable, **options)
        self._publishers_made = [self._image, self._info]
        if source == "synthetic" or truth:
            self._labels = self.create_publisher(Image, "truth/labels", reliable)
            self._instances = self.create_publisher(Image, "truth/instances", reliable)
            self._items = self.create_publisher(WasteItemArray, "truth/items", 10)
            self._publishers_made += [self._labels, self._instances, self._items]

        self._published = Rate()
        self._missed = 0
        self._problem = ""
        self._done = False
        self._stop = threading.Event()
        self._ended = self.create_guard_condition(lambda: None)
        self._reporter = Reporter(self, self._statuses)
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def _on_parameters(self, parameters: list[Any]) -> SetParametersResult:
        for parameter in parameters:
            if parameter.name == "rate":
                self._period = 1.0 / parameter.value
            elif parameter.name == "paused":
                self._paused = parameter.value
        return SetParametersResult(successful=True)

    def close(self) -> bool:
        """End the capture thread; says whether it has ended."""
        self._stop.set()
        self._thread.join(timeout=1.5)
        if self._thread.is_alive():
            return False
        self._source.close()
        return True

    # --- capture thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        code = 0
        try:
            self._capture()
        except NodeError as error:
            self.get_logger().fatal(str(error))
            code = 1
        except Exception as error:
            if self.context.ok():
                self.get_logger().fatal(f"{type(error).__name__}: {error}")
                code = 1
        self.exit_code = code
        if self.context.ok():
            self._ended.trigger()

    def _capture(self) -> None:
        while self._wait and self._image.get_subscription_count() == 0:
            if self._stop.wait(0.02):
                return
        if self._stop.wait(self._delay):
            return
        self.get_logger().info(f"taking pictures from {self._name}")
        start = due = time.monotonic()
        effort = 0.0  # smoothed time that a picture takes [s]
        while not self._stop.is_set():
            begin = time.monotonic()
            if self._paused:
                while self._paused and not self._stop.wait(0.02):
                    pass
                held = time.monotonic() - max(due, begin)
                start, due, begin = start + held, due + held, time.monotonic()
            picture = self._source.take(due - start)
            if picture is None:
                break
            now = time.monotonic()
            if picture.taken is not None:
                due = picture.taken
            else:
                effort += 0.2 * (now - begin - effort)
                if self._stop.wait(max(0.0, due - now)):
                    break
            if picture.image.size:
                self._publish(picture, due)
                self._problem = ""
            else:
                self._problem = f"no image from {self._name}"
            if self._frames and self._published.count >= self._frames:
                break
            # The next moment by which the next picture can be ready.
            due += self._period
            ready = time.monotonic() + (effort if picture.taken is None else 0.0)
            if ready > due + 0.5 * self._period:
                missed = math.ceil((ready - due) / self._period)
                self._missed += missed
                due += missed * self._period
        # The last picture is to arrive before the publisher goes.
        if self.context.ok():
            self._done = True
            self._reporter.report_change()
            self._image.wait_for_all_acked(Duration(seconds=1))
            self._stop.wait(0.1)  # best-effort subscribers do not acknowledge
            self.get_logger().info(
                f"end after {self._published.count} pictures, {self._missed} moments missed"
            )

    def _publish(self, picture: Picture, taken: float) -> None:
        ago = Duration(nanoseconds=int((time.monotonic() - taken) * 1e9))
        stamp = (self.get_clock().now() - ago).to_msg()
        header = Header(stamp=stamp, frame_id=self._frame_id)
        height, width = picture.image.shape[:2]
        publish(self, self._info, self._camera_info(header, width, height))
        publish(self, self._image, to_image(picture.image, "rgb8", header))
        self._published.tick()
        if picture.truth is not None:
            self._publish_truth(picture, picture.truth, header)

    def _plane(self, width: int, height: int) -> BeltPlane:
        focal = self._source.focal_length or width
        return BeltPlane(focal, focal, (width - 1) / 2, (height - 1) / 2, BELT_DISTANCE)

    def _camera_info(self, header: Header, width: int, height: int) -> CameraInfo:
        info = CameraInfo(header=header, width=width, height=height)
        if self._source.focal_length:  # else K stays zero, which means not calibrated
            p = self._plane(width, height)
            info.distortion_model = "plumb_bob"
            info.d = [0.0] * 5
            info.k = [p.fx, 0.0, p.cx, 0.0, p.fy, p.cy, 0.0, 0.0, 1.0]
            info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
            info.p = [p.fx, 0.0, p.cx, 0.0, 0.0, p.fy, p.cy, 0.0, 0.0, 0.0, 1.0, 0.0]
        return info

    def _publish_truth(self, picture: Picture, truth: Sample, header: Header) -> None:
        if self._labels.get_subscription_count():
            publish(self, self._labels, to_image(truth.labels, "mono8", header))
        if self._instances.get_subscription_count():
            publish(self, self._instances, to_image(truth.instances, "16UC1", header))
        if self._items.get_subscription_count():
            publish(self, self._items, self._truth_items(picture, truth, header))

    def _truth_items(self, picture: Picture, truth: Sample, header: Header) -> WasteItemArray:
        height, width = truth.labels.shape
        plane = self._plane(width, height)
        message = WasteItemArray(header=header, model=truth.name)
        for item in describe_items(truth.instances, truth.labels, None, (width, height)):
            entry = item_message(item, header, CLASSES, plane, pixel_error=0.5)
            if picture.tracks and item.id in picture.tracks:
                entry.track_id, velocity = picture.tracks[item.id]
                entry.belt_velocity.x, entry.belt_velocity.y = plane.vector(*velocity)
            message.items.append(entry)
        return message

    # --- diagnostics ------------------------------------------------------------------------------

    def _statuses(self) -> list[DiagnosticStatus]:
        rate, wanted = self._published.hertz(), 1.0 / self._period
        findings: list[Finding] = []
        if self._problem:
            findings.append((ERROR, self._problem))
        elif (
            not self._done
            and self._published.count
            and rate < 0.8 * wanted
            and self._published.age() < 3
        ):
            findings.append(
                (WARN, f"{rate:.1f} pictures/s of the {wanted:.1f} asked for: lower the rate")
            )
        if self._source.skipped:
            findings.append((WARN, f"{self._source.skipped} pictures could not be read"))
        if self._done:
            findings.append((OK, f"ended after {self._published.count} pictures"))
        elif not findings and self._paused:
            findings.append((OK, "paused"))
        elif not findings:
            findings.append((OK, f"{rate:.1f} pictures/s from {self._name}"))
        values: dict[str, object] = {
            "source": self._name,
            "published": self._published.count,
            "ended": self._done,
            "rate [Hz]": rate,
            "missed moments": self._missed,
            "unreadable": self._source.skipped,
        }
        for publisher in self._publishers_made:
            topic = publisher.topic_name.removeprefix(self.get_namespace().rstrip("/") + "/")
            values[f"subscribers of {topic}"] = publisher.get_subscription_count()
        return [status(f"{self.get_name()}: source", self._name, findings, values)]


def main(args: Sequence[str] | None = None) -> int:
    """Run the camera node."""
    return run_node(Camera, args)


if __name__ == "__main__":
    raise SystemExit(main())
