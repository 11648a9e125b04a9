"""The tracker: items in pixels in; tracks in metres, and orders for the arms, out.

A lifecycle node that by default configures and activates itself (parameter ``autostart``). For
each message on ``items`` it publishes ``tracks`` (all items along the belt, in the belt frame,
with the image's stamp), and on ``picks`` what has become due for an arm. ``track_id`` on ``items``
stays a number within one image; that on ``tracks`` and ``picks`` is the item's along the belt.

``picks`` is reliable and transient-local: an arm that comes late, or again, hears the orders that
still stand; older ones are not kept (lifespan). An arm counts as there while it says on
``arms/state`` that it is ready.

All runs in the executor's one thread: an image takes milliseconds here.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import TransformStamped
from rcl_interfaces.msg import SetParametersResult
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Float32, Header
from visualization_msgs.msg import MarkerArray

from waste_seg_ros.data.sample import CLASSES
from waste_seg_ros.graph import share_folder
from waste_seg_ros.msg import ArmState, Pick, WasteItemArray
from waste_seg_ros.nodes import declare, declare_gripper, run_node
from waste_seg_ros.nodes.diagnostics import (
    ERROR,
    OK,
    WARN,
    Finding,
    Rate,
    Reporter,
    Window,
    publish,
    status,
)
from waste_seg_ros.nodes.images import ImageError, to_depth
from waste_seg_ros.nodes.lifecycle import AutostartNode
from waste_seg_ros.nodes.tracks import (
    pick_message,
    quaternion,
    sighting,
    to_seconds,
    track_markers,
    track_message,
    transform,
)
from waste_seg_ros.perception.belt import (
    BeltError,
    BeltPlane,
    Calibration,
    Camera,
    camera_from_info,
    default_plane,
    read_calibration,
)
from waste_seg_ros.perception.follow import Followed, Follower, Measuring, View
from waste_seg_ros.perception.grasp import Gripper
from waste_seg_ros.perception.picks import Arm, SchedulerParams, read_arms
from waste_seg_ros.perception.tracking import TrackerParams

STALE_AFTER = 2.0
"""Seconds without items after which the segmenter counts as gone."""
KEPT_PICKS = 64
"""Orders kept for arms that come late."""
FOREIGN_CLOCK = 5.0
"""Stamps further than this from the node's clock are of another clock [s]."""
BEYOND = 0.5
"""Items so far behind the last arm and the pick line are forgotten [m]."""


FIXED = frozenset(
    {
        *("cameras", "calibration", "rectified", "belt_distance", "belt_frame", "robot_frame"),
        *("depth", "arms", "pick_line", "horizon", "expiry"),
        *("min_hits", "hidden_time", "memory_time"),
    }
)
"""Parameters whose change would make items jump, or be ordered twice."""


@dataclass(eq=False)
class _Eye:
    """One camera: what is known of it, and the last of its depth images.

    Attributes:
        name: its namespace, "" for the node's own.
        calibration: of its file; None without one.
        info: its newest camera_info.
        view: camera and belt for the images as they are; None while it cannot be known.
        problem: why it cannot, and the mend.
        frame: of its images.
        depths: the newest depth images.
    """

    name: str
    calibration: Calibration | None
    info: CameraInfo | None = None
    view: tuple[Camera, BeltPlane] | None = None
    problem: str = ""
    frame: str = ""
    depths: deque[Image] = field(default_factory=lambda: deque(maxlen=8))


class Tracker(AutostartNode):
    """The tracker node."""

    def __init__(self) -> None:
        super().__init__("tracker")
        cv2.setNumThreads(1)
        self._declare()

        self._follower: Follower | None = None
        self._arms: tuple[Arm, ...] = ()
        self._arms_file = ""
        self._eyes: dict[str, _Eye] = {}
        self._problem = ""
        self._encoder: tuple[float, float] | None = None  # speed [m/s], time.monotonic()
        self._encoder_bad = 0
        self._heard: dict[str, tuple[float, bool]] = {}  # arm -> time.monotonic(), ready
        self._tracks: tuple[Followed, ...] = ()
        self._offset = 0.0  # of the node's clock from the stamps [s]
        self._unstamped = 0
        self._no_depth = 0
        self._restarted = -math.inf
        self._failure = ""
        self._arrived = Rate()
        self._served = Rate()
        self._depth_rate = Rate()
        self._activated = time.monotonic()
        self._took = Window()
        self._active = False
        self._made: list[Any] = []
        self._outputs: dict[str, Any] = {}
        self._tf: Any = None
        self._tf_sent: dict[str, TransformStamped] = {}
        self._reporter = Reporter(self, self._statuses)
        self.add_on_set_parameters_callback(self._check_parameters)
        self.add_post_set_parameters_callback(self._apply_parameters)
        self._plan_autostart()

    # --- parameters -------------------------------------------------------------------------------

    def _declare(self) -> None:
        declare(
            self,
            "cameras",
            [""],
            "Namespaces of the cameras along the belt, each with items and camera_info; '': this "
            "node's own.",
        )
        declare(
            self,
            "calibration",
            "",
            "File of waste-seg calibrate, {camera} standing for the camera's namespace; '': the "
            "camera looks straight down from belt_distance and the belt moves to the right in it.",
        )
        declare(
            self,
            "belt_distance",
            1.0,
            "Without a calibration: from the camera to the belt [m].",
            low=0.01,
            high=100.0,
        )
        declare(
            self,
            "rectified",
            False,
            "Without a calibration: the images are rectified, so that P of camera_info holds.",
        )
        declare(self, "belt_frame", "belt", "Frame of tracks and picks.")
        declare(
            self,
            "robot_frame",
            "",
            "Frame of the robot's base, to be published with the calibration's robot; '': none.",
        )
        declare(self, "depth", False, "Measure heights from depth/image, registered to the image.")
        self._number("depth_slop", 0.03, "Depth images this near to the items' stamp fit [s].", 1.0)
        how = Measuring(height_sigma_m=0.01)
        self._number("pixel_sigma", how.pixel_sigma, "Error of an outline in the image [px].", 100)
        self._number(
            "height_sigma",
            how.height_sigma_m,
            "Error of an outline's height above the belt where there is no depth [m].",
            1.0,
        )
        self._number(
            "tolerance", how.tolerance_m, "Outlines on the belt are simplified by this [m].", 1.0
        )
        self._declare_speed()
        self._declare_picks()
        declare_gripper(self)
        self._declare_autostart()

    def _declare_speed(self) -> None:
        self._number("speed", 0.25, "Speed of the belt, or where its estimate starts [m/s].", 20.0)
        declare(
            self,
            "estimate_speed",
            True,
            "Estimate the speed from the images while belt/speed is silent; false: as speed says.",
        )
        self._number("speed_sigma", 0.005, "Error of speed where it is not estimated [m/s].", 20.0)
        self._number("encoder_sigma", 0.005, "Error of what belt/speed says [m/s].", 20.0)
        declare(
            self,
            "encoder_timeout",
            0.5,
            "belt/speed is believed for so long [s].",
            low=0.01,
            high=60.0,
        )
        track = TrackerParams()
        declare(
            self,
            "min_hits",
            track.min_hits,
            "Images that a thing must be seen in to be an item.",
            low=1,
            high=100,
        )
        for name, default, text in (
            ("hidden_time", track.hidden_s, "How long an item in view may stay unseen [s]."),
            ("memory_time", track.memory_s, "How long one out of view is remembered [s]."),
        ):
            declare(self, name, default, text, low=0.01, high=3600.0)

    def _declare_picks(self) -> None:
        pick = SchedulerParams()
        declare(
            self, "pick_line", 1.2, "x that pick_time of tracks is for [m].", low=-1e3, high=1e3
        )
        declare(self, "arms", "", "YAML file of the arms; '': the package's config/arms.yaml.")
        declare(
            self,
            "arms_report",
            True,
            "Arms say on arms/state that they are ready; false: all of the file always are.",
        )
        declare(
            self,
            "arm_timeout",
            pick.silence_s,
            "An arm that is silent for so long is dead [s].",
            low=0.1,
            high=60.0,
        )
        for name, default, text, high in (
            ("lead_time", pick.lead_s, "An arm is told at least so long before [s].", 60.0),
            ("horizon", pick.horizon_s, "And at most so long before [s].", 600.0),
            (
                "margin",
                pick.margin_s,
                "At least the time between two images, so that none is told too late [s].",
                10.0,
            ),
            ("expiry", pick.expiry_s, "An order is void so long after its pick time [s].", 60.0),
            (
                "max_hidden",
                pick.max_hidden_s,
                "An item that ought to be seen and was not for so long is not ordered [s].",
                60.0,
            ),
            (
                "lane_margin",
                pick.lane_margin_m,
                "An item's centre must lie so far within an arm's lane [m].",
                10.0,
            ),
            ("min_score", pick.min_score, "Least score of an item to pick.", 1.0),
        ):
            self._number(name, default, text, high)
        for name, default, text in (
            (
                "good_pick_sigma",
                pick.good_sigma_s,
                "Wait for pick times known as well as this [s].",
            ),
            ("max_pick_sigma", pick.max_sigma_s, "Order none known less well than this [s]."),
        ):
            declare(self, name, default, text, low=1e-4, high=60.0)

    def _number(self, name: str, default: float, text: str, high: float) -> None:
        declare(self, name, float(default), text, low=0.0, high=float(high))

    def _get(self, name: str, changes: dict[str, Any] | None = None) -> Any:
        return changes[name] if changes and name in changes else self.get_parameter(name).value

    def _picking(self, changes: dict[str, Any] | None = None) -> SchedulerParams:
        def get(name: str) -> Any:
            return self._get(name, changes)

        return SchedulerParams(
            lead_s=get("lead_time"),
            horizon_s=get("horizon"),
            good_sigma_s=get("good_pick_sigma"),
            margin_s=get("margin"),
            expiry_s=get("expiry"),
            silence_s=get("arm_timeout"),
            max_sigma_s=get("max_pick_sigma"),
            max_hidden_s=get("max_hidden"),
            min_score=get("min_score"),
            lane_margin_m=get("lane_margin"),
        )

    def _gripper(self, changes: dict[str, Any] | None = None) -> Gripper:
        def get(name: str) -> Any:
            return self._get(name, changes)

        return Gripper(
            jaw_width=get("jaw_width"),
            jaw_thickness=get("jaw_thickness"),
            clearance=get("grasp_clearance"),
            friction_angle=get("friction_angle"),
            cup_diameter=get("cup_diameter"),
        )

    def _measuring(self) -> Measuring:
        return Measuring(
            self._get("pixel_sigma"), self._get("height_sigma"), self._get("tolerance")
        )

    def _check_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        """Accept a change, or refuse it with a reason."""
        changes = {parameter.name: parameter.value for parameter in parameters}
        fixed = [name for name in changes if name in FIXED]
        if fixed and self._follower is not None:
            reason = (
                f"{fixed[0]}: at work it cannot change, since items would jump or be ordered twice;"
                " deactivate the node, clean it up, set it and configure it again"
            )
            return SetParametersResult(successful=False, reason=reason)
        try:
            self._picking(changes)
            self._gripper(changes)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _apply_parameters(self, parameters: list[Parameter]) -> None:
        """Put an accepted change to work, with the next image."""
        if self._follower is not None:
            self._follower.scheduler.params = self._picking()
            self._follower.gripper = self._gripper()
            self._follower.measuring = self._measuring()
        else:
            self._plan_autostart()

    # --- lifecycle --------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read calibration and arms, and make publishers and subscriptions."""
        try:
            self._follower = self._make_follower()
            self._eyes = self._open_eyes()
        except ValueError as error:  # BeltError, ArmsError, a parameter
            self._follower = None
            self._problem = str(error)
            self.get_logger().error(f"not configured: {error}")
            self._reporter.report_change()
            return TransitionCallbackReturn.FAILURE
        self._problem = ""
        self._make_topics()
        return super().on_configure(state)

    def _make_follower(self) -> Follower:
        """Read the arms' file.

        Raises:
            ValueError: names file and key, or parameter.
        """
        named = self._get("arms")
        path = Path(named).expanduser() if named else share_folder() / "config" / "arms.yaml"
        arms = read_arms(path)
        lines = [arm.x_m for arm in arms] + [self._get("pick_line")]
        tracking = TrackerParams(
            speed=self._get("speed"),
            min_hits=self._get("min_hits"),
            hidden_s=self._get("hidden_time"),
            memory_s=self._get("memory_time"),
            forget_x=max(lines) + BEYOND,
        )
        self._arms, self._arms_file = arms, str(path)
        return Follower(
            arms,
            self._gripper(),
            tracking=tracking,
            picking=self._picking(),
            measuring=self._measuring(),
            names=CLASSES,
        )

    def _open_eyes(self) -> dict[str, _Eye]:
        """Read the calibrations.

        Raises:
            BeltError: names file and key, or parameter.
        """
        names = [name.strip("/") for name in self._get("cameras") or [""]]
        file = self._get("calibration")
        if len(set(names)) < len(names):
            raise BeltError(f"cameras: one is named twice: {', '.join(names)}")
        if len(names) > 1 and "{camera}" not in file:
            raise BeltError(
                "calibration: several cameras need one file each; write {camera} for the camera's "
                "name in it, as in belt-{camera}.yaml"
            )
        eyes = {}
        for name in names:
            calibration = None
            if file:
                path = os.path.expanduser(file.replace("{camera}", name.replace("/", "_")))
                calibration = read_calibration(path)
            eyes[name] = _Eye(name, calibration)
        return eyes

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start to follow items."""
        result = super().on_activate(state)
        self._activated = time.monotonic()
        self._active = True
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop to follow items; what is known of them is kept."""
        self._active = False
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Forget items and topics."""
        self._drop()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End for good."""
        self._drop()
        self.exit_code = 0
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Go back to unconfigured."""
        self._drop()
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> bool:
        """There are no threads to end."""
        return True

    def _make_topics(self) -> None:
        options = QoSOverridingOptions.with_default_policies()
        newest = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        reliable = QoSProfile(depth=10)

        def listen(kind: Any, topic: str, callback: Any, qos: QoSProfile) -> None:
            self._made.append(
                self.create_subscription(kind, topic, callback, qos, qos_overriding_options=options)
            )

        for eye in self._eyes.values():
            beside = f"{eye.name}/" if eye.name else ""
            listen(
                WasteItemArray,
                f"{beside}items",
                lambda array, eye=eye: self._on_items(eye, array),
                reliable,
            )
            listen(
                CameraInfo,
                f"{beside}camera_info",
                lambda info, eye=eye: self._on_camera_info(eye, info),
                newest,
            )
            if self._get("depth"):
                listen(
                    Image,
                    f"{beside}depth/image",
                    lambda image, eye=eye: self._on_depth(eye, image),
                    QoSProfile(depth=4, reliability=ReliabilityPolicy.BEST_EFFORT),
                )
        listen(Float32, "belt/speed", self._on_speed, newest)
        listen(ArmState, "arms/state", self._on_arm, QoSProfile(depth=50))
        standing = QoSProfile(depth=KEPT_PICKS, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        if not self._get("use_sim_time"):  # DDS goes by the computer's clock
            standing.lifespan = Duration(seconds=self._get("horizon") + self._get("expiry"))
        for name, kind, qos in (
            ("tracks", WasteItemArray, reliable),
            ("picks", Pick, standing),
            ("track_markers", MarkerArray, QoSProfile(depth=2)),
        ):
            self._outputs[name] = self.create_lifecycle_publisher(
                kind, name, qos, qos_overriding_options=options
            )
        try:  # not among the ROS wheels
            message = importlib.import_module("tf2_msgs.msg").TFMessage
        except ImportError:
            return
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._tf = self.create_publisher(message, "/tf_static", latched)

    def _drop(self) -> None:
        self._active = False
        for subscription in self._made:
            self.destroy_subscription(subscription)
        for publisher in self._outputs.values():
            self.destroy_lifecycle_publisher(publisher)
        if self._tf is not None:
            self.destroy_publisher(self._tf)
        self._made, self._outputs, self._tf, self._tf_sent = [], {}, None, {}
        self._follower, self._tracks = None, ()
        self._encoder = None
        self._heard.clear()

    # --- what it hears ----------------------------------------------------------------------------

    def _on_camera_info(self, eye: _Eye, info: CameraInfo) -> None:
        before, eye.info = eye.info, info
        if before is not None and _same_camera(before, info) and (eye.view or eye.problem):
            return
        eye.view, eye.problem = None, ""
        try:
            eye.view = self._see(eye, info)
        except BeltError as error:
            eye.problem = str(error)
            self.get_logger().error(f"{self._topic(eye, 'camera_info')}: {error}")
        self._reporter.report_change()

    def _see(self, eye: _Eye, info: CameraInfo) -> tuple[Camera, BeltPlane]:
        """Camera and belt for images of that camera_info.

        Raises:
            BeltError: they do not fit together.
        """
        size = (
            (info.roi.width or info.width) // (info.binning_x or 1),
            (info.roi.height or info.height) // (info.binning_y or 1),
        )
        if min(size) < 1:
            raise BeltError("it has no width and height; set them in the camera driver")
        if eye.calibration is not None:
            return eye.calibration.camera.scaled(size), eye.calibration.plane
        plane = default_plane(self._get("belt_distance"))
        if self._get("rectified"):
            p = info.p
            if not (p[0] > 0 and p[5] > 0):
                raise BeltError("it has no P, though the images are said to be rectified")
            info = CameraInfo(width=info.width, height=info.height, roi=info.roi)
            info.k = [p[0], 0.0, p[2], 0.0, p[5], p[6], 0.0, 0.0, 1.0]
        return camera_from_info(info, size), plane

    def _on_depth(self, eye: _Eye, image: Image) -> None:
        self._depth_rate.tick()
        eye.depths.append(image)

    def _on_speed(self, message: Float32) -> None:
        if math.isfinite(message.data):
            self._encoder = (float(message.data), time.monotonic())
        else:
            self._encoder_bad += 1

    def _on_arm(self, state: ArmState) -> None:
        known = self._heard.get(state.arm)
        self._heard[state.arm] = (time.monotonic(), state.ready)
        if known is None or known[1] != state.ready:
            self._reporter.report_change()

    def _on_items(self, eye: _Eye, array: WasteItemArray) -> None:
        self._arrived.tick()
        if not self._active or self._follower is None:
            return
        eye.frame = array.header.frame_id
        if not (array.header.stamp.sec or array.header.stamp.nanosec):
            self._unstamped += 1
            return
        if eye.info is None and eye.view is None and eye.calibration is not None:
            # The pictures are taken for those of the calibration until camera_info tells.
            eye.view = (eye.calibration.camera, eye.calibration.plane)
        if eye.view is None:
            return
        begin = time.perf_counter()
        before = self._failure
        self._failure = ""
        try:
            self._follow(eye, eye.view, array)
        except ValueError as error:
            self._failure = str(error)
            self.get_logger().error(self._failure, throttle_duration_sec=5.0)
        self._took.add(time.perf_counter() - begin)
        if self._failure != before:
            self._reporter.report_change()

    def _follow(self, eye: _Eye, view: tuple[Camera, BeltPlane], array: WasteItemArray) -> None:
        """Follow the items of an image, and publish what comes of it."""
        follower = self._follower
        assert follower is not None
        camera, plane = view
        stamp = to_seconds(array.header.stamp)
        now = self.get_clock().now().nanoseconds * 1e-9
        self._offset = now - stamp
        speed, sigma = self._belt_speed()
        ignored, restarts = follower.tracker.ignored, follower.tracker.restarts
        items, given = follower.update(
            View(stamp, camera, plane, eye.name, self._depth(eye, stamp)),
            [sighting(item) for item in array.items],
            now,
            speed=speed,
            speed_sigma=sigma,
            alive=self._alive() if abs(self._offset) < FOREIGN_CLOCK else (),
        )
        if follower.tracker.restarts != restarts:
            self._restarted = time.monotonic()
            self.get_logger().warning("the stamps began anew, and with them the tracks")
        frame = self._get("belt_frame")
        places = {arm.name: arm.x_m for arm in self._arms}
        for item in given:
            assert item.order is not None
            pick = pick_message(item, item.order, places[item.order.arm], frame)
            publish(self, self._outputs["picks"], pick)
        if follower.tracker.ignored != ignored:
            return
        self._tracks = items
        self._served.tick()
        header = Header(stamp=array.header.stamp, frame_id=frame)
        line = self._get("pick_line")
        tracks = WasteItemArray(header=header, model=array.model, latency=array.latency)
        for item in items:
            seen = array.items[item.sighting] if item.sighting >= 0 else None
            tracks.items.append(track_message(item, header, line, seen))
        tracks.latency.total = float(self.get_clock().now().nanoseconds * 1e-9 - stamp)
        publish(self, self._outputs["tracks"], tracks)
        if self._outputs["track_markers"].get_subscription_count():
            shown = track_markers(items, header, CLASSES, now)
            publish(self, self._outputs["track_markers"], shown)
        self._send_transform(eye, plane)

    def _belt_speed(self) -> tuple[float | None, float]:
        """Speed and its error for the tracker; None to estimate it."""
        if self._encoder is not None:
            speed, heard = self._encoder
            if time.monotonic() - heard <= self._get("encoder_timeout"):
                return speed, self._get("encoder_sigma")
        if self._get("estimate_speed"):
            return None, 0.0
        return self._get("speed"), self._get("speed_sigma")

    def _alive(self) -> list[str]:
        """Names of the arms that take orders."""
        if not self._get("arms_report"):
            return [arm.name for arm in self._arms]
        now, patience = time.monotonic(), self._get("arm_timeout")
        return [
            arm.name
            for arm in self._arms
            if arm.name in self._heard
            and self._heard[arm.name][1]
            and now - self._heard[arm.name][0] <= patience
        ]

    def _depth(self, eye: _Eye, stamp: float) -> np.ndarray | None:
        """The depth image nearest to the stamp, if one is near enough.

        As `message_filters`' approximate time would pair them; but items do not wait for a depth
        image: they come later than it by the network's time, and go without if there is none.
        """
        if not self._get("depth"):
            return None
        best = min(
            eye.depths,
            key=lambda image: abs(to_seconds(image.header.stamp) - stamp),
            default=None,
        )
        if best is None or abs(to_seconds(best.header.stamp) - stamp) > self._get("depth_slop"):
            self._no_depth += 1
            return None
        try:
            return to_depth(best)
        except ImageError as error:
            self._failure = f"{self._topic(eye, 'depth/image')}: {error}"
            return None

    def _send_transform(self, eye: _Eye, plane: BeltPlane) -> None:
        """Publish where the belt is, once; it is a frame of the first camera's."""
        if self._tf is None or self._tf_sent or eye is not next(iter(self._eyes.values())):
            return
        stamp = self.get_clock().now().to_msg()
        belt = self._get("belt_frame")
        sent = {belt: transform(plane, Header(stamp=stamp, frame_id=eye.frame), belt)}
        robot = eye.calibration.robot if eye.calibration else None
        if robot is not None and (frame := self._get("robot_frame")):
            base = TransformStamped(header=Header(stamp=stamp, frame_id=belt), child_frame_id=frame)
            place, turn = base.transform.translation, base.transform.rotation
            place.x, place.y, place.z = robot.xyz
            turn.x, turn.y, turn.z, turn.w = quaternion(robot.rotation)
            sent[frame] = base
        message = importlib.import_module("tf2_msgs.msg").TFMessage
        publish(self, self._tf, message(transforms=list(sent.values())))
        self._tf_sent = sent

    def _topic(self, eye: _Eye, name: str) -> str:
        return self.resolve_topic_name(f"{eye.name}/{name}" if eye.name else name)

    # --- diagnostics ------------------------------------------------------------------------------

    def _statuses(self) -> list[DiagnosticStatus]:
        follower = self._follower
        tracker = follower.tracker if follower else None
        belt = tracker.belt if tracker else None
        name = self.get_name()
        heard = {
            arm.name: "ready" if arm.name in self._alive() else "dead or not ready"
            for arm in self._arms
        }
        return [
            status(
                f"{name}: input",
                ", ".join(self._topic(eye, "items") for eye in self._eyes.values()),
                self._input_findings(),
                {
                    "state": self._state(),
                    "cameras known": sum(eye.view is not None for eye in self._eyes.values()),
                    "rate [Hz]": self._arrived.hertz(),
                    "received": self._arrived.count,
                    "followed": self._served.count,
                    "ignored": tracker.ignored if tracker else 0,
                    "without a place on the belt": follower.lost if follower else 0,
                    "stamps' age [s]": self._offset,
                    "p50 [ms]": 1e3 * self._took.percentile(50),
                    "p99 [ms]": 1e3 * self._took.percentile(99),
                    "without depth": self._no_depth,
                },
            ),
            status(
                f"{name}: belt",
                self._get("calibration") or "no calibration",
                self._belt_findings(),
                {
                    "tracks": len(self._tracks),
                    "speed [m/s]": belt.speed if belt else math.nan,
                    "speed's error [m/s]": belt.sigma if belt else math.nan,
                    "stamps' error [ms]": 1e3 * belt.stamp_sigma_s if belt else math.nan,
                    "restarts": tracker.restarts if tracker else 0,
                    "tf": self._tf_state(),
                },
            ),
            status(
                f"{name}: arms",
                self._arms_file,
                self._arm_findings(),
                {
                    **heard,
                    "ordered": follower.scheduler.given if follower else 0,
                    "passed without an order": follower.scheduler.late if follower else 0,
                    **{
                        f"subscribers of {topic}": publisher.get_subscription_count()
                        for topic, publisher in self._outputs.items()
                    },
                },
            ),
        ]

    def _tf_state(self) -> str:
        if self._follower is None:
            return ""
        if self._tf is None:
            return (
                f"{self._get('belt_frame')} is not published: tf2_msgs is not installed; "
                "apt install ros-jazzy-tf2-msgs"
            )
        return ", ".join(self._tf_sent) or "not yet published"

    def _input_findings(self) -> list[Finding]:
        if not self._active:
            if self._problem:
                return [(ERROR, self._problem)]
            return [(WARN, f"not active: {self._state()}")]
        findings: list[Finding] = []
        if self._failure:
            findings.append((ERROR, self._failure))
        age = min(self._arrived.age(), time.monotonic() - self._activated)
        for eye in self._eyes.values():
            items, info = self._topic(eye, "items"), self._topic(eye, "camera_info")
            if not self.count_publishers(items):
                findings.append(
                    (ERROR, f"nobody publishes {items}: start the segmenter, or remap items")
                )
            elif eye.problem:
                findings.append((ERROR, f"{info}: {eye.problem}"))
            elif eye.view is None and self._arrived.count:
                findings.append(
                    (
                        ERROR,
                        f"no camera_info on {info}, so the size of the images is not known: make "
                        "the camera publish it, remap camera_info, or give a calibration",
                    )
                )
        if age > STALE_AFTER and not findings:
            findings.append(
                (ERROR, f"no items for more than {STALE_AFTER:.0f} s: look after the segmenter")
            )
        if self._unstamped:
            findings.append(
                (ERROR, f"{self._unstamped} images had no stamp: make the camera set it")
            )
        if abs(self._offset) > FOREIGN_CLOCK:
            findings.append(
                (
                    ERROR,
                    f"the stamps are {self._offset:.0f} s behind this node's clock, so no arm can "
                    "be told a time: for a recording set use_sim_time, else synchronise the clocks",
                )
            )
        if self._get("depth") and self._depth_rate.age() > STALE_AFTER:
            findings.append(
                (
                    WARN,
                    "depth is on, but no depth/image comes: start the depth camera, remap "
                    "depth/image, or set depth to false",
                )
            )
        elif self._get("depth") and self._no_depth > 0.5 * max(1, self._served.count):
            findings.append(
                (WARN, f"{self._no_depth} images have no depth image near: raise depth_slop")
            )
        return findings or [(OK, f"{self._served.hertz():.1f} images/s")]

    def _belt_findings(self) -> list[Finding]:
        follower = self._follower
        if follower is None:
            return [(WARN, "not configured")]
        findings: list[Finding] = []
        eyes = self._eyes.values()
        if any(eye.calibration is None for eye in eyes):
            guess = ""
            if any(eye.info is not None and not eye.info.k[0] > 0 for eye in eyes):
                guess = ", and camera_info has no K, so the focal length is guessed"
            level = WARN if guess else OK
            findings.append(
                (
                    level,
                    f"no calibration{guess}: the camera is taken to look straight down from "
                    f"{self._get('belt_distance'):g} m; run waste-seg calibrate",
                )
            )
        if self._encoder is not None:
            silent = time.monotonic() - self._encoder[1]
            if silent > self._get("encoder_timeout"):
                instead = (
                    "estimated from the images"
                    if self._get("estimate_speed")
                    else f"taken as {self._get('speed'):g} m/s"
                )
                findings.append(
                    (
                        WARN,
                        f"the encoder on {self.resolve_topic_name('belt/speed')} is silent; the "
                        f"speed is {instead}: look after its cable and its node",
                    )
                )
        if self._encoder_bad:
            findings.append(
                (WARN, f"belt/speed was not a number {self._encoder_bad} times: mend the encoder")
            )
        if time.monotonic() - self._restarted < 10.0:
            findings.append(
                (
                    WARN,
                    "the clock went back or stood still for long, so all tracks began anew: a "
                    "recording that starts over does so; a camera's clock should not",
                )
            )
        belt = follower.tracker.belt
        text = f"{len(self._tracks)} items at {belt.speed:.3f} m/s +- {belt.sigma:.3f}"
        return [*findings, (OK, text)] if all(f[0] == OK for f in findings) else findings

    def _arm_findings(self) -> list[Finding]:
        follower = self._follower
        if follower is None:
            return [(WARN, "not configured")]
        if not self._arms:
            return [(WARN, f"{self._arms_file} has no arms: items are followed, none is ordered")]
        alive = self._alive()
        dead = [arm.name for arm in self._arms if arm.name not in alive]
        unknown = [name for name in self._heard if name not in {arm.name for arm in self._arms}]
        findings: list[Finding] = []
        if not alive and not self._heard:
            findings.append(
                (
                    WARN,
                    f"no arm speaks on {self.resolve_topic_name('arms/state')}, so none gets "
                    "orders: start the arms, or set arms_report to false for arms that do not",
                )
            )
        elif dead:
            level = WARN if alive else ERROR
            findings.append(
                (
                    level,
                    f"{', '.join(dead)}: dead or not ready; arms further along the belt take over "
                    "what they can; look after it",
                )
            )
        if unknown:
            findings.append(
                (
                    WARN,
                    f"{', '.join(sorted(unknown))} speak on arms/state but are not in "
                    f"{self._arms_file}: rename them, or put them in",
                )
            )
        given, late = follower.scheduler.given, follower.scheduler.late
        return findings or [(OK, f"{given} orders given, {late} items passed without one")]


def _same_camera(one: CameraInfo, other: CameraInfo) -> bool:
    return (
        (one.width, one.height, one.binning_x, one.binning_y, one.distortion_model)
        == (other.width, other.height, other.binning_x, other.binning_y, other.distortion_model)
        and one.roi == other.roi
        and np.array_equal(one.k, other.k)
        and np.array_equal(one.d, other.d)
        and np.array_equal(one.p, other.p)
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run the tracker node."""
    return run_node(Tracker, args)


if __name__ == "__main__":
    raise SystemExit(main())
