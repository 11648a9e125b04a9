"""The dashboard node: listens to a line and serves what it hears to browsers.

Threads: callbacks run on the executor's and only note what came; the web server has its own (see
``waste_seg_ros.dashboard.server``). Camera images are subscribed to only while somebody looks on,
and are kept as they came: only those that are sent are unpacked and made JPEGs. The items are drawn
by the browser, which spares the segmenter the drawing, and this machine a second copy of each
picture.
"""

from __future__ import annotations

import math
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import cv2
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.serialization import deserialize_message
from rclpy.time import Time
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from waste_seg_ros.dashboard import TOKEN
from waste_seg_ros.dashboard.server import Answer, Picture, Server, ServerError
from waste_seg_ros.dashboard.state import ERROR, OK, WARN, LineState, Seen
from waste_seg_ros.msg import ArmState, Pick, WasteItem, WasteItemArray
from waste_seg_ros.nodes import NodeError, declare, run_node
from waste_seg_ros.nodes.images import ImageError, to_rgb
from waste_seg_ros.nodes.messages import belt_plane
from waste_seg_ros.runtime.bundle import BundleError, list_bundles, read_manifest
from waste_seg_ros.srv import RollBackModel, SelectModel

ROLL_BACK = "waste_seg_ros/srv/RollBackModel"
KEPT_BYTES = 64 << 20
"""Of camera images that wait for their items."""
KEPT_IMAGES = 12
BARE_AFTER = 2.0
"""Seconds without items after which pictures are shown without them."""

_LEVELS = (OK, WARN, ERROR, ERROR)  # the last one is STALE


class Frames:
    """Camera images as they came, and the items found in them. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images: OrderedDict[int, bytes] = OrderedDict()
        self._image_at = 0
        self._heard = -math.inf  # when the newest items came [s of the monotonic clock]
        self._items: tuple[int, WasteItemArray | None] = (0, None)  # the newest
        self._shown: tuple[int, bytes | None, WasteItemArray | None] = (0, None, None)
        self._track_ids: dict[tuple[int, int, int, int], int] = {}
        self.camera_info: CameraInfo | None = None

    def add_image(self, stamp: int, message: bytes) -> None:
        """Keep an image, serialized, for its items; stamps in ns."""
        with self._lock:
            self._image_at = stamp
            if stamp == self._items[0]:  # it was slower than they
                self._shown = (stamp, message, self._items[1])
                return
            self._images[stamp] = message
            self._images.move_to_end(stamp)
            size = sum(len(image) for image in self._images.values())
            while len(self._images) > 1 and (len(self._images) > KEPT_IMAGES or size > KEPT_BYTES):
                _, oldest = self._images.popitem(last=False)
                size -= len(oldest)
            # Nobody works on it: the segmenter is away.
            if time.monotonic() - self._heard > BARE_AFTER:
                self._shown = (stamp, message, None)

    def add_items(self, stamp: int, array: WasteItemArray) -> None:
        """Take an image's items, whether the image is here or not."""
        with self._lock:
            self._items, self._heard = (stamp, array), time.monotonic()
            image = self._images.pop(stamp, None)
            for older in [key for key in self._images if key < stamp]:
                del self._images[older]
            if image is not None or abs(stamp - self._image_at) > BARE_AFTER * 1e9:
                self._shown = (stamp, image, array)

    def add_tracks(self, array: WasteItemArray) -> None:
        """Take the tracks' numbers; they have the boxes of the items they were seen as."""
        with self._lock:
            self._track_ids = {_box(item): item.track_id for item in array.items}

    def clear(self) -> None:
        """Let go of the images."""
        with self._lock:
            self._images.clear()
            self._shown = (0, None, None)

    def newest(self) -> tuple[int, bytes | None, WasteItemArray | None, dict[Any, int]]:
        """Stamp, image or None, its items or None, and numbers of tracks by box."""
        with self._lock:
            return (*self._shown, self._track_ids)


class Dashboard(Node):
    """The dashboard node."""

    def __init__(self) -> None:
        super().__init__("dashboard")
        self.exit_code: int | None = None
        cv2.setNumThreads(1)
        host = declare(
            self,
            "host",
            "127.0.0.1",
            "Address to listen at; on any but a loopback address a token is needed.",
            read_only=True,
        )
        port = declare(
            self,
            "port",
            8088,
            "To listen at; 0: any that is free.",
            low=0,
            high=65535,
            read_only=True,
        )
        rate = declare(
            self,
            "picture_rate",
            10.0,
            "Most pictures a second for a browser.",
            low=0.1,
            high=60.0,
            read_only=True,
        )
        declare(self, "picture_width", 640, "Wider ones are scaled down [px].", low=64, high=8192)
        declare(self, "picture_quality", 75, "Of the JPEGs.", low=10, high=100)
        self._bundles_dir = declare(
            self,
            "bundles_dir",
            "",
            "Folder in which bundles are looked for first; the segmenter's.",
            read_only=True,
        )
        transport = declare(
            self,
            "image_transport",
            "raw",
            "raw for sensor_msgs/Image, compressed for sensor_msgs/CompressedImage.",
            read_only=True,
        )
        if transport not in ("raw", "compressed"):
            raise NodeError(f"image_transport: it must be raw or compressed, not '{transport}'")
        self._compressed = transport == "compressed"

        self.state = LineState(domain=os.environ.get("ROS_DOMAIN_ID", "0"))
        self._frames = Frames()
        self._watched = 0
        self._image_subscription: Any = None
        self._manifests: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._listen()
        # After all it calls upon is there.
        try:
            self._server = Server(self, host, port, os.environ.get(TOKEN, ""), rate)
        except ServerError as error:
            raise NodeError(f"dashboard: {error}") from error
        # Not by the logger: what it writes is kept in files, and sent to all.
        print(f"dashboard: {self._server.url}", flush=True)

    def _listen(self) -> None:
        options = QoSOverridingOptions.with_default_policies()
        newest = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        orders = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        for kind, topic, callback, qos in (
            (WasteItemArray, "items", self._on_items, QoSProfile(depth=5)),
            (WasteItemArray, "tracks", self._on_tracks, QoSProfile(depth=5)),
            (Pick, "picks", self._on_pick, orders),
            (ArmState, "arms/state", self._on_arm, QoSProfile(depth=20)),
            (CameraInfo, "camera_info", self._on_camera_info, newest),
        ):
            self.create_subscription(kind, topic, callback, qos, qos_overriding_options=options)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 20)
        self._select = self.create_client(SelectModel, "segmenter/select_model")
        self._back: Any = None
        self.create_timer(1.0, self.state.tick)
        self.create_timer(0.2, self._follow_viewers)
        self.create_timer(2.0, self._find_roll_back)

    # --- from the line ------------------------------------------------------------------------

    def _on_items(self, array: WasteItemArray) -> None:
        stamp = _nanoseconds(array.header.stamp)
        latency = math.nan
        if stamp:
            latency = (
                self.get_clock().now() - Time.from_msg(array.header.stamp)
            ).nanoseconds * 1e-9
        names = ("transport", "conversion", "inference", "extraction")
        stages = {name: float(getattr(array.latency, name)) for name in names}
        self.state.add_items([seen(item) for item in array.items], latency, array.model, stages)
        if self._watched:
            self._frames.add_items(stamp, array)

    def _on_tracks(self, array: WasteItemArray) -> None:
        now = self.get_clock().now()
        self.state.add_tracks([seen(item, now) for item in array.items])
        self._frames.add_tracks(array)

    def _on_pick(self, pick: Pick) -> None:
        item, at = pick.item, _nanoseconds(pick.pick_time) * 1e-9
        self.state.add_order(pick.arm, pick.track_id, item.class_id, float(item.score), at)

    def _on_arm(self, arm: ArmState) -> None:
        self.state.add_arm(arm.arm, arm.ready, arm.picked, arm.missed)

    def _on_camera_info(self, message: CameraInfo) -> None:
        self._frames.camera_info = message

    def _on_diagnostics(self, array: DiagnosticArray) -> None:
        for status in array.status:
            level = _LEVELS[min(status.level[0], 3)]
            values = {entry.key: entry.value for entry in status.values}
            self.state.add_health(status.name, level, status.message, values)

    def _on_image(self, serialized: bytes) -> None:
        self._frames.add_image(serialized_stamp(serialized), serialized)

    def _follow_viewers(self) -> None:
        """Listen to images only while somebody looks on."""
        if self._watched and self._image_subscription is None:
            topic = self.resolve_topic_name("image_raw")
            self._image_subscription = self.create_subscription(
                CompressedImage if self._compressed else Image,
                topic + ("/compressed" if self._compressed else ""),
                self._on_image,
                QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT),
                raw=True,
            )
        elif not self._watched and self._image_subscription is not None:
            self.destroy_subscription(self._image_subscription)
            self._image_subscription = None
            self._frames.clear()

    def _find_roll_back(self) -> None:
        """Look for the node that keeps models, within our namespace."""
        within = self.get_namespace().rstrip("/") + "/"
        found = [
            name
            for name, types in self.get_service_names_and_types()
            if ROLL_BACK in types and name.startswith(within)
        ]
        if self._back is not None and self._back.srv_name not in found:
            self.destroy_client(self._back)
            self._back = None
        if self._back is None and found:
            self._back = self.create_client(RollBackModel, min(found))
        self.state.keeps_models = self._back is not None

    # --- for the server, from its threads -----------------------------------------------------

    def watched(self, viewers: int) -> None:
        """Say how many want to see pictures."""
        self._watched = viewers

    def picture(self) -> Picture | None:
        """The newest image with its items, or what there is of both."""
        stamp, image, array, numbers = self._frames.newest()
        if image is None and array is None:
            return None

        def make() -> tuple[dict[str, Any], bytes]:
            return self._make_picture(image, array, numbers)

        return Picture((stamp, array is None, image is None), make)

    def _make_picture(
        self, image: bytes | None, array: WasteItemArray | None, numbers: dict[Any, int]
    ) -> tuple[dict[str, Any], bytes]:
        info = self._frames.camera_info
        size = (0, 0)
        if image is not None and not self._compressed:
            size = _serialized_size(image)
        elif info is not None:
            size = (info.width, info.height)
        drawn = []
        for item in () if array is None else array.items:
            entry = seen(item, info=info, size=size).drawing()
            entry["id"] = numbers.get(_box(item), entry["id"])
            drawn.append(entry)
        header = {
            "width": size[0],
            "height": size[1],
            "items": drawn,
            "bare": array is None,
            "problem": "",
        }
        jpeg = b""
        if image is not None:
            try:
                jpeg = self._encode(image)
            except (ImageError, cv2.error) as error:
                header["problem"] = str(error)
        return header, jpeg

    def _encode(self, serialized: bytes) -> bytes:
        """A JPEG of a serialized image. Raises ImageError."""
        message = deserialize_message(serialized, CompressedImage if self._compressed else Image)
        if self._compressed and "jpeg" in message.format and len(message.data) < 1 << 20:
            return bytes(message.data)
        rgb = to_rgb(message)
        height, width = rgb.shape[:2]
        most = self.get_parameter("picture_width").value
        if width > most:
            size = (most, max(1, round(height * most / width)))
            rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        quality = [cv2.IMWRITE_JPEG_QUALITY, self.get_parameter("picture_quality").value]
        _, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)
        return bytes(data)

    def models(self) -> list[dict[str, Any]]:
        """The bundles there are, with what they say of themselves."""
        search = [Path(self._bundles_dir).expanduser()] if self._bundles_dir else []
        return sorted(map(self._about, list_bundles(search)), key=lambda model: model["name"])

    def _about(self, folder: Path) -> dict[str, Any]:
        file = folder / "manifest.yaml"
        try:
            changed = file.stat().st_mtime_ns
            if folder not in self._manifests or self._manifests[folder][0] != changed:
                manifest = read_manifest(file)
                about = {
                    "name": folder.name,
                    "architecture": manifest.architecture,
                    "head": manifest.head,
                    "classes": list(manifest.classes),
                    "input": "{}x{}".format(*manifest.input_size),
                    "precision": manifest.precision,
                    "problem": "",
                }
                self._manifests[folder] = (changed, about)
            return self._manifests[folder][1]
        except (BundleError, OSError) as error:
            return {"name": folder.name, "problem": str(error)}

    def select_model(self, name: str, backend: str) -> Future[Answer]:
        """Ask the segmenter for another model."""
        before = self.state.bundle or self.state.model

        def done(response: Any) -> Answer:
            if response.success:
                self.state.remember_model(before, name)
            return Answer(response.success, response.message, response.active_model)

        return self._ask(self._select, SelectModel.Request(model=name, backend=backend), done)

    def roll_back(self) -> Future[Answer]:
        """Go back by the service for it, or by naming the model that was there before."""
        keeper = self._back
        if keeper is not None:
            return self._ask(keeper, RollBackModel.Request(), _answer)
        before = self.state.previous
        if not before:
            nothing: Future[Answer] = Future()
            text = "there is no model to go back to: none was changed here, and no node keeps one"
            nothing.set_result(Answer(False, text, self.state.model))
            return nothing

        def done(response: Any) -> Answer:
            if response.success:
                self.state.forget_previous()
            return _answer(response)

        return self._ask(self._select, SelectModel.Request(model=before), done)

    def _ask(self, client: Any, request: Any, done: Callable[[Any], Answer]) -> Future[Answer]:
        answer: Future[Answer] = Future()
        if not client.wait_for_service(timeout_sec=2.0):
            text = f"no node serves {client.srv_name}: is the segmenter running?"
            answer.set_result(Answer(False, text, self.state.model))
            return answer

        def finished(future: Any) -> None:
            try:
                answer.set_result(done(future.result()))
            except Exception as error:  # the service's node has gone, or the context ends
                answer.set_result(Answer(False, str(error), self.state.model))

        client.call_async(request).add_done_callback(finished)
        return answer

    def close(self) -> bool:
        """End the server."""
        return self._server.stop()


def _answer(response: Any) -> Answer:
    return Answer(response.success, response.message, response.active_model)


def seen(
    item: WasteItem,
    now: Time | None = None,
    info: CameraInfo | None = None,
    size: tuple[int, int] | None = None,
) -> Seen:
    """Read a message.

    Args:
        item: the message.
        now: tells how long it is until the item is at the pick line.
        info: intrinsics, for where the jaws close in the image.
        size: of the image [px], 0 if not known; None leaves out what is drawn.
    """
    position, turn = item.pose.pose.position, item.pose.pose.orientation
    yaw = math.atan2(
        2 * (turn.w * turn.z + turn.x * turn.y), 1 - 2 * (turn.y * turn.y + turn.z * turn.z)
    )
    pick = None
    at = _nanoseconds(item.pick_time)
    if now is not None and at:
        pick = at * 1e-9 - now.nanoseconds * 1e-9
    outline: tuple[float, ...] = ()
    grasp: tuple[float, ...] = ()
    if size is not None:
        outline = tuple(v for point in item.outline.points for v in (point.x, point.y))
        grasp = _jaws(item, info, size) if all(size) else ()
    return Seen(
        id=item.track_id,
        kind=item.class_id,
        score=item.score,
        place=(1e3 * position.x, 1e3 * position.y),
        yaw=math.degrees(yaw),
        size=(1e3 * item.length, 1e3 * item.width, 1e3 * item.height),
        reason="" if item.pickable else item.reason or "not pickable",
        flags=item.flags,
        outline=outline,
        grasp=grasp,
        box=_box(item),
        pick_s=pick,
    )


def _jaws(item: WasteItem, info: CameraInfo | None, size: tuple[int, int]) -> tuple[float, ...]:
    """Ends of the line along which the jaws close [px]; they close along the grasp's y axis."""
    place, turn = item.grasp.position, item.grasp.orientation
    if not place.z > 0 or not item.grasp_width > 0:
        return ()
    plane = belt_plane(info, size, place.z)
    half = 0.5 * item.grasp_width
    along = (
        2 * half * (turn.x * turn.y - turn.w * turn.z),
        half * (1 - 2 * (turn.x * turn.x + turn.z * turn.z)),
    )
    ends: list[float] = []
    for sign in (-1, 1):
        x, y = place.x + sign * along[0], place.y + sign * along[1]
        ends += [plane.cx + x * plane.fx / place.z, plane.cy + y * plane.fy / place.z]
    return tuple(ends)


def _box(item: WasteItem) -> tuple[int, int, int, int]:
    roi = item.roi
    return roi.x_offset, roi.y_offset, roi.width, roi.height


def _nanoseconds(stamp: Any) -> int:
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def serialized_stamp(serialized: bytes) -> int:
    """Stamp [ns] of a serialized message that begins with a header.

    CDR (OMG DDS-XTypes 7.4): four bytes that tell the byte order, then the fields in turn.
    """
    order = "<" if serialized[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(order + "iI", serialized, 4)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def _serialized_size(serialized: bytes) -> tuple[int, int]:
    """(width, height) of a serialized sensor_msgs/Image."""
    order = "<" if serialized[1] & 1 else ">"
    (length,) = struct.unpack_from(order + "I", serialized, 12)
    after = 12 + length
    after += -after % 4  # fields are aligned, counted from after the first four bytes
    height, width = struct.unpack_from(order + "II", serialized, 4 + after)
    return int(width), int(height)


def main(args: Sequence[str] | None = None) -> int:
    """Run the dashboard node."""
    return run_node(Dashboard, args)


if __name__ == "__main__":
    raise SystemExit(main())
