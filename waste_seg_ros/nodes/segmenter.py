"""The segmenter: camera images in, items of waste out.

A lifecycle node that by default configures and activates itself (parameter ``autostart``). The
subscription only keeps the newest image; a thread of its own takes it from there, so that a slow
network drops images, which are counted, instead of serving old ones. Everything published carries
the stamp and frame of the image it was made from.

Threads: callbacks run on the executor's; ``inference`` does the work; ``reshape`` loads the network
anew when the camera's format changes. A model is loaded beside the one at work and put in its place
between two images by one assignment, so that no image sees half of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import (
    QoSCompatibility,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
)
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.task import Future
from rclpy.time import Time
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from visualization_msgs.msg import MarkerArray

from waste_seg_ros.msg import StageLatency, WasteItem, WasteItemArray
from waste_seg_ros.nodes import declare, declare_gripper, run_node
from waste_seg_ros.nodes.diagnostics import (
    ERROR,
    OK,
    WARN,
    Finding,
    Rate,
    Reporter,
    Window,
    policy_name,
    publish,
    status,
)
from waste_seg_ros.nodes.images import ImageError, require_decompression, to_image, to_rgb
from waste_seg_ros.nodes.lifecycle import AutostartNode
from waste_seg_ros.nodes.loading import (
    Model,
    ModelError,
    Request,
    Settings,
    load,
)
from waste_seg_ros.nodes.messages import belt_plane, is_calibrated, item_message, markers
from waste_seg_ros.perception.draw import draw_overlay
from waste_seg_ros.perception.grasp import GRIPPERS, Gripper
from waste_seg_ros.perception.items import Item, ItemParams, extract_items, label_image
from waste_seg_ros.perception.scaling import scale_ids, scale_image
from waste_seg_ros.runtime import HEADS, KINDS
from waste_seg_ros.runtime.backends import as_head, input_size_for
from waste_seg_ros.srv import SelectModel

STALE_AFTER = 2.0
"""Seconds without an image after which the camera counts as gone."""

T = TypeVar("T")


class NewestSlot(Generic[T]):
    """Holds one thing for another thread: the newest, which takes the place of any before it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._content: T | None = None

    def put(self, content: T) -> bool:
        """Leave something; says whether it took the place of something nobody took."""
        with self._condition:
            replaced = self._content is not None
            self._content = content
            self._condition.notify()
            return replaced

    def take(self, timeout: float) -> T | None:
        """Take what there is, or what comes within so many seconds, else None."""
        with self._condition:
            if self._content is None:
                self._condition.wait(timeout)
            content, self._content = self._content, None
            return content

    def clear(self) -> None:
        """Throw away what there is, and end a waiting `take`."""
        with self._condition:
            self._content = None
            self._condition.notify_all()


@dataclass(frozen=True)
class _Stages:
    """Fields of StageLatency [s]."""

    transport: float
    conversion: float
    inference: float
    extraction: float
    total: float


@dataclass(frozen=True, eq=False)
class Work:
    """What the inference thread works with on one image."""

    model: Model
    settings: Settings
    params: ItemParams


@dataclass(frozen=True, eq=False)
class Received:
    """An image message and when it came."""

    message: Any
    transport: float  # s, from the stamp until it was here; NaN without a stamp
    clock: float  # time.perf_counter() when it was here


@dataclass(frozen=True, eq=False)
class Segmented:
    """What `segment` makes of an image, and when it had it [s of its clock].

    Attributes:
        instances: (h, w) uint16 ids at the network's resolution.
        items: in pixels of the image.
        entries: the same as messages.
        converted: there was the network's input.
        inferred: there was its output.
        extracted: there were the items.
        filled: there were the messages.
    """

    instances: np.ndarray
    items: tuple[Item, ...]
    entries: list[WasteItem]
    converted: float
    inferred: float
    extracted: float
    filled: float


def segment(
    rgb: np.ndarray,
    header: Any,
    work: Work,
    camera_info: CameraInfo | None,
    extract: Callable[..., tuple[np.ndarray, tuple[Item, ...]]] = extract_items,
    clock: Callable[[], float] = time.perf_counter,
) -> Segmented:
    """Do the segmenter's work on an image, without topics: ``waste-seg bench node`` runs it, too.

    Args:
        rgb: (H, W, 3) uint8.
        header: of its message.
        work: the model and its settings.
        camera_info: of the camera, if known.
        extract: makes items of what the network gives, as `extract_items` does.
        clock: [s].
    """
    model, params = work.model, work.params
    height, width = rgb.shape[:2]
    tensor = np.ascontiguousarray(scale_image(rgb, model.backend.input_size))
    converted = clock()

    prediction = as_head(model.backend.predict(tensor), model.head)
    inferred = clock()

    plane = belt_plane(camera_info, (width, height), work.settings.belt_distance)
    # The gripper of the parameters is in metres, that of the perception in pixels.
    gripper = params.gripper.scaled(plane.pixels_per_metre)
    params = dataclasses.replace(params, gripper=gripper)
    instances, items = extract(prediction, (width, height), params)
    extracted = clock()

    pixel_error = width / model.backend.input_size[0]
    entries = [item_message(item, header, model.classes, plane, pixel_error) for item in items]
    return Segmented(instances, items, entries, converted, inferred, extracted, clock())


class Segmenter(AutostartNode):
    """The segmenter node."""

    _extract = staticmethod(extract_items)
    """Makes items of what the network gives."""

    def __init__(self) -> None:
        super().__init__("segmenter")
        # The cores are for the network; what OpenCV does here is short.
        cv2.setNumThreads(1)
        self._declare()

        # Written by several threads, each by one assignment; read once per image.
        self._work: Work | None = None
        self._camera_info: CameraInfo | None = None
        self._image_size: tuple[int, int] | None = None

        self._slot: NewestSlot[Received] = NewestSlot()
        self._worker: threading.Thread | None = None
        self._working = threading.Event()
        self._load_lock = threading.Lock()
        self._pending: Model | None = None
        self._ahead: Model | None = None
        self._reshaping: threading.Thread | None = None

        self._arrived = Rate()
        self._served = Rate()
        self._lost = Rate(span=10.0)
        self._activated = time.monotonic()
        self._dropped = 0
        self._bad = 0
        self._frame_problem = ""
        self._model_problem = ""
        self._inference_problem = ""
        self._incompatible: dict[str, str] = {}  # topic -> policy
        self._encoding = ""
        self._windows = {f.name: Window() for f in dataclasses.fields(_Stages)}

        self._image_topic = ""
        self._image_qos: QoSProfile | None = None
        self._subscriptions_made: list[Any] = []
        self._outputs: dict[str, Any] = {}
        # Images must come in, and diagnostics go out, while a service waits for a model to load.
        self._image_group = MutuallyExclusiveCallbackGroup()
        self._report_group = MutuallyExclusiveCallbackGroup()
        self._reporter = Reporter(self, self._statuses, self._report_group)
        self.create_service(SelectModel, "~/select_model", self._on_select_model)
        self.add_on_set_parameters_callback(self._check_parameters)
        self.add_post_set_parameters_callback(self._apply_parameters)
        self._plan_autostart()

    # --- parameters -------------------------------------------------------------------------------

    def _declare(self) -> None:
        declare(self, "model", "enet-instance", "Name of a model bundle, or its folder.")
        declare(
            self,
            "head",
            "",
            "What the model is used as: binary, semantic or instance; '': as the bundle says.",
        )
        declare(self, "backend", "auto", f"What runs the network: {', '.join(KINDS)}.")
        declare(self, "threads", 0, "Threads of the network; 0: all cores.", low=0, high=256)
        for side in ("width", "height"):
            declare(
                self,
                f"input_{side}",
                0,
                f"Network input {side} [px]; 0: the bundle's pixels at the camera's aspect.",
                low=0,
                high=8192,
            )
        declare(
            self,
            "verify_backend",
            True,
            "Refuse a backend that says something else of a test frame than another runtime does.",
        )
        declare(self, "bundles_dir", "", "Folder in which bundles are looked for first.")
        # An empty list has no type in ROS; an empty name is none.
        declare(
            self,
            "classes",
            [""],
            "Classes to report, others are dropped; none: all that the model has.",
        )
        defaults = ItemParams()
        for name, default, text in (
            (
                "pixel_threshold",
                defaults.pixel_threshold,
                "Foreground pixels less probable are background.",
            ),
            ("center_threshold", defaults.center_threshold, "Least height of an item's centre."),
            ("score_threshold", defaults.score_threshold, "Least score of an item to pick."),
        ):
            declare(self, name, default, text, low=0.0, high=1.0)
        declare(
            self,
            "min_area",
            defaults.min_area_px,
            "Smallest item [px of the network's input].",
            low=1,
            high=1_000_000,
        )
        declare(
            self,
            "max_items",
            defaults.max_items,
            "Only so many items of the highest scores per image.",
            low=1,
            high=10_000,
        )
        declare(
            self,
            "belt_distance",
            1.0,
            "From the camera to the belt [m]; positions and sizes scale with it.",
            low=0.01,
            high=100.0,
        )
        self._declare_gripper()
        declare(
            self,
            "image_transport",
            "raw",
            "raw for sensor_msgs/Image, compressed for sensor_msgs/CompressedImage.",
            read_only=True,
        )
        self._declare_autostart()

    def _declare_gripper(self) -> None:
        gripper = Gripper()
        declare(self, "gripper", gripper.kind, f"What grips the items: {' or '.join(GRIPPERS)}.")
        for name, default, text in (
            ("min_opening", 0.0, "Narrowest that the jaws can hold [m]."),
            ("max_opening", 0.0, "How far the jaws open [m]; 0: as far as it takes."),
        ):
            declare(self, name, default, text, low=0.0, high=10.0)
        declare_gripper(self)

    def _values(self, names: Sequence[str], changes: dict[str, Any]) -> dict[str, Any]:
        return {
            name: changes[name] if name in changes else self.get_parameter(name).value
            for name in names
        }

    def _read_settings(self, changes: dict[str, Any]) -> Settings:
        values = self._values([f.name for f in dataclasses.fields(Settings)], changes)
        # What cannot be read as a list of strings, such as `classes:=[]`, is none.
        values["classes"] = tuple(values["classes"] or ())
        return Settings(**values)

    def _read_request(self, changes: dict[str, Any]) -> Request:
        """Read the parameters of a load.

        Raises:
            ModelError: a name that is none of the choices.
        """
        names = [f.name for f in dataclasses.fields(Request)]
        request = Request(**self._values(names, changes))
        if request.head and request.head not in HEADS:
            raise ModelError(f"head: '{request.head}' is none of {', '.join(HEADS)} or ''")
        if request.backend not in KINDS:
            raise ModelError(f"backend: '{request.backend}' is none of {', '.join(KINDS)}")
        return request

    def _check_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        """Accept a change or refuse it with a reason; load a model that it asks for."""
        changes = {parameter.name: parameter.value for parameter in parameters}
        self._pending = None
        try:
            request = self._read_request(changes)
            settings = self._read_settings(changes)
            model = self._work.model if self._work else None
            if model is not None and request != model.request:
                model = self._load(request)
                settings.item_params(model)
                self._pending = model
            elif model is not None:
                settings.item_params(model)
        except ValueError as error:  # ModelError is one
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _apply_parameters(self, parameters: list[Parameter]) -> None:
        """Put an accepted change to work, with the next image."""
        if self._work is not None:
            self._use(self._pending or self._work.model)
        else:
            self._plan_autostart()

    def _use(self, model: Model) -> None:
        """Work with a model and the parameters as they are, from the next image on."""
        if self._work is None or model is not self._work.model:
            width, height = model.backend.input_size
            self.get_logger().info(
                f"model '{model.name}' ({model.head}) on {model.backend.name}, "
                f"input {width}x{height}"
            )
        settings = self._read_settings({})
        self._pending = None
        self._work = Work(model, settings, settings.item_params(model))
        self._model_problem = ""
        self._reporter.report_change()

    def _load(self, request: Request) -> Model:
        """Load a model, or take the one that was loaded ahead for just this request."""
        model, self._ahead = self._ahead, None
        if model is not None and model.request == request:
            return model
        with self._load_lock:
            return load(request, self._image_size)

    async def _load_ahead(self, changes: dict[str, Any]) -> None:
        """Load what some changed parameters ask for while images go on being served."""
        done: Future = Future(executor=self.executor)

        def work() -> None:
            # What is wrong is told by the one who loads it again.
            with contextlib.suppress(ValueError):
                request = self._read_request(changes)
                if self._work is not None and request != self._work.model.request:
                    self._ahead = self._load(request)
            done.set_result(None)

        threading.Thread(target=work, name="load", daemon=True).start()
        await done

    async def _on_select_model(
        self, request: SelectModel.Request, response: SelectModel.Response
    ) -> SelectModel.Response:
        # Served in the same callback group as the parameter services, so one after the other.
        changes = [Parameter("model", value=request.model)]
        if request.backend:
            changes.append(Parameter("backend", value=request.backend))
        await self._load_ahead({change.name: change.value for change in changes})
        result = self.set_parameters_atomically(changes)
        self._ahead = None  # a change refused for another reason leaves it behind
        response.success, response.message = result.successful, result.reason
        if result.successful and self._state() == "unconfigured":
            if self.get_parameter("autostart").value:
                response.success = self._autostart()
                response.message = self._model_problem
            else:
                response.message = "it will be loaded when the node is configured"
        response.active_model = self._work.model.name if self._work else ""
        return response

    # --- lifecycle --------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model, and make publishers and subscriptions."""
        try:
            if self.get_parameter("image_transport").value not in ("raw", "compressed"):
                raise ModelError(
                    "image_transport: it must be raw or compressed; start the node anew"
                )
            if self.get_parameter("image_transport").value == "compressed":
                require_decompression()
            self._use(self._load(self._read_request({})))
        except ValueError as error:  # ModelError, ImageError, an unknown class
            self._work = None
            self._model_problem = str(error)
            self.get_logger().error(f"not configured: {error}")
            self._reporter.report_change()
            return TransitionCallbackReturn.FAILURE
        self._make_topics()
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start to work on images."""
        result = super().on_activate(state)
        self._slot.clear()
        self._activated = time.monotonic()
        self._working.set()
        self._worker = threading.Thread(target=self._infer, name="inference", daemon=True)
        self._worker.start()
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop to work on images; the model stays loaded."""
        self._stop_worker(timeout=10.0)
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of the model and the topics."""
        self._drop_topics()
        self._work = None
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End for good."""
        self._stop_worker(timeout=10.0)
        self._drop_topics()
        self._work = None
        self.exit_code = 0
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Go back to unconfigured."""
        self._stop_worker(timeout=10.0)
        self._drop_topics()
        self._work = None
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> bool:
        """End the threads; says whether they have ended."""
        ended = self._stop_worker(timeout=1.5)
        # A thread that loads a model ends with the process.
        return ended and not self._load_lock.locked()

    def _stop_worker(self, timeout: float) -> bool:
        self._working.clear()
        self._slot.clear()
        if self._worker is not None:
            self._worker.join(timeout)
            if self._worker.is_alive():
                return False
            self._worker = None
        return True

    def _make_topics(self) -> None:
        compressed = self.get_parameter("image_transport").value == "compressed"
        # As image_transport does: beside the image, wherever that is remapped to.
        topic = self.resolve_topic_name("image_raw") + ("/compressed" if compressed else "")
        reliability = QoSOverridingOptions(
            [
                QoSPolicyKind.HISTORY,
                QoSPolicyKind.DEPTH,
                QoSPolicyKind.RELIABILITY,
                QoSPolicyKind.DURABILITY,
            ]
        )
        # The newest image wins, here as in the slot.
        newest = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        image = self.create_subscription(
            CompressedImage if compressed else Image,
            topic,
            self._on_image,
            newest,
            callback_group=self._image_group,
            event_callbacks=SubscriptionEventCallbacks(
                incompatible_qos=lambda event: self._on_incompatible(topic, event),
                message_lost=lambda event: self._lost.tick(event.total_count_change),
            ),
            qos_overriding_options=reliability,
        )
        self._image_topic, self._image_qos = image.topic_name, image.qos_profile
        info = self.create_subscription(
            CameraInfo,
            "camera_info",
            self._on_camera_info,
            newest,
            callback_group=self._image_group,
            qos_overriding_options=reliability,
        )
        self._subscriptions_made = [image, info]
        # Reliable serves subscribers of either kind.
        for name, kind, depth in (
            ("items", WasteItemArray, 10),
            ("mask", Image, 2),
            ("instances", Image, 2),
            ("overlay", Image, 2),
            ("markers", MarkerArray, 2),
        ):
            self._outputs[name] = self.create_lifecycle_publisher(
                kind,
                name,
                QoSProfile(depth=depth),
                event_callbacks=PublisherEventCallbacks(
                    incompatible_qos=lambda event, name=name: self._on_incompatible(
                        self._outputs[name].topic_name, event
                    )
                ),
                qos_overriding_options=reliability,
            )

    def _drop_topics(self) -> None:
        for subscription in self._subscriptions_made:
            self.destroy_subscription(subscription)
        for publisher in self._outputs.values():
            self.destroy_lifecycle_publisher(publisher)
        self._subscriptions_made, self._outputs = [], {}
        self._incompatible.clear()

    # --- callbacks of topics ----------------------------------------------------------------------

    def _on_image(self, message: Any) -> None:
        clock = time.perf_counter()
        now_ns = self.get_clock().now().nanoseconds
        self._arrived.tick()
        if not self._working.is_set():
            return
        stamp_ns = Time.from_msg(message.header.stamp).nanoseconds
        transport = (now_ns - stamp_ns) * 1e-9 if stamp_ns else float("nan")
        if self._slot.put(Received(message, transport, clock)):
            self._dropped += 1

    def _on_camera_info(self, message: CameraInfo) -> None:
        self._camera_info = message

    def _on_incompatible(self, topic: str, event: Any) -> None:
        self._incompatible[topic] = policy_name(event)
        self.get_logger().error(self._incompatible_text(topic))
        self._reporter.report_change()

    # --- inference thread -------------------------------------------------------------------------

    def _infer(self) -> None:
        while self._working.is_set() and self.context.ok():
            received = self._slot.take(timeout=0.5)
            work = self._work
            if received is None or work is None:
                continue
            before = (self._frame_problem, self._inference_problem)
            log = self.get_logger()
            try:
                self._serve(received, work)
            except ImageError as error:
                self._bad += 1
                self._frame_problem = str(error)
                log.error(f"{self._image_topic}: {error}", throttle_duration_sec=5.0)
            except Exception as error:  # the next image may fare better
                if not self.context.ok():
                    return
                self._inference_problem = f"{type(error).__name__}: {error}"
                log.error(f"inference: {self._inference_problem}", throttle_duration_sec=5.0)
            if before != (self._frame_problem, self._inference_problem):
                self._reporter.report_change()

    def _serve(self, received: Received, work: Work) -> None:
        """Make items of an image and publish them, and then what else is asked for."""
        model = work.model
        message = received.message
        start = time.perf_counter()
        rgb = to_rgb(message)
        self._encoding = getattr(message, "encoding", "") or getattr(message, "format", "")
        self._frame_problem = ""
        self._fit_to(work, (rgb.shape[1], rgb.shape[0]))
        found = segment(rgb, message.header, work, self._camera_info, self._extract)
        instances, items = found.instances, found.items

        stages = _Stages(
            transport=received.transport,
            conversion=found.converted - start,
            inference=found.inferred - found.converted,
            extraction=found.filled - found.inferred,
            # The stamp's clock up to here, then one that does not jump; waiting included.
            total=received.transport + found.filled - received.clock,
        )
        array = WasteItemArray(
            header=message.header,
            model=model.name,
            items=found.entries,
            latency=StageLatency(**dataclasses.asdict(stages)),
        )
        publish(self, self._outputs["items"], array)
        for name, window in self._windows.items():
            window.add(getattr(stages, name))
        self._served.tick()
        self._inference_problem = ""
        self._publish_pictures(message.header, rgb, instances, items, work)
        if self._wanted("markers"):
            publish(self, self._outputs["markers"], markers(array, model.classes))

    def _publish_pictures(
        self,
        header: Any,
        rgb: np.ndarray,
        instances: np.ndarray,
        items: Sequence[Item],
        work: Work,
    ) -> None:
        """Pictures of the image's own size and header, for those who look at them."""
        size = (rgb.shape[1], rgb.shape[0])
        if self._wanted("mask"):
            mask = scale_ids(label_image(instances, items), size)
            publish(self, self._outputs["mask"], to_image(mask, "mono8", header))
        if self._wanted("instances"):
            image = to_image(scale_ids(instances, size), "16UC1", header)
            publish(self, self._outputs["instances"], image)
        if self._wanted("overlay"):
            overlay = draw_overlay(rgb, instances, items, work.model.classes)
            publish(self, self._outputs["overlay"], to_image(overlay, "rgb8", header))

    def _wanted(self, output: str) -> bool:
        return bool(self._outputs[output].get_subscription_count() > 0)

    def _fit_to(self, work: Work, image_size: tuple[int, int]) -> None:
        """Load the network for another format of images if that is better, beside the work."""
        if image_size == self._image_size:
            return
        self._image_size = image_size
        model = work.model
        if model.request.input_width:
            return
        if input_size_for(image_size, model.bundle.manifest) == tuple(model.backend.input_size):
            return
        if self._reshaping is None or not self._reshaping.is_alive():
            self._reshaping = threading.Thread(target=self._reshape, name="reshape", daemon=True)
            self._reshaping.start()

    def _reshape(self) -> None:
        while True:
            with self._load_lock:
                work, image_size = self._work, self._image_size
                if work is None:
                    return
                try:
                    model = load(work.model.request, image_size)
                except ModelError as error:  # the one at work goes on, on stretched images
                    self.get_logger().error(f"images of {image_size} px: {error}")
                    return
                if self._work is not None and self._work.model is work.model:
                    self._use(model)
            if image_size == self._image_size:
                return

    # --- diagnostics ------------------------------------------------------------------------------

    def _statuses(self) -> list[DiagnosticStatus]:
        camera = self._image_topic or self.resolve_topic_name("image_raw")
        work = self._work
        return [
            status(
                f"{self.get_name()}: camera",
                camera,
                self._camera_findings(),
                {
                    "topic": camera,
                    "encoding": self._encoding,
                    "size": "{}x{}".format(*self._image_size) if self._image_size else "",
                    "rate [Hz]": self._arrived.hertz(),
                    "last image [s ago]": self._arrived.age(),
                    "received": self._arrived.count,
                    "processed": self._served.count,
                    "dropped": self._dropped,
                    "lost on the way": self._lost.count,
                    "unreadable": self._bad,
                },
            ),
            status(
                f"{self.get_name()}: model",
                work.model.name if work else str(self.get_parameter("model").value),
                self._model_findings(),
                self._model_values(),
            ),
            status(
                f"{self.get_name()}: output",
                self.resolve_topic_name("items"),
                self._output_findings(),
                {
                    f"subscribers of {name}": publisher.get_subscription_count()
                    for name, publisher in list(self._outputs.items())
                },
            ),
        ]

    def _camera_findings(self) -> list[Finding]:
        topic, state = self._image_topic, self._state()
        if not topic or state != "active":
            return [(WARN, f"not active: {state}")]
        findings: list[Finding] = []
        if self._frame_problem:
            findings.append((ERROR, f"{topic}: {self._frame_problem}"))
        findings += self._publisher_findings(topic)
        age = min(self._arrived.age(), time.monotonic() - self._activated)
        if age > STALE_AFTER and not findings:
            findings.append(
                (ERROR, f"no image on {topic} for more than {STALE_AFTER:.0f} s: is the camera on?")
            )
        if self._lost.hertz() > 0.1 * self._arrived.hertz():
            findings.append(
                (
                    WARN,
                    f"{self._lost.hertz():.1f} images/s are lost on the way here: give the "
                    "camera's process the Fast DDS settings of config/fastdds.xml, or make it "
                    "send fewer or smaller images",
                )
            )
        if self._arrived.count:
            info = self.resolve_topic_name("camera_info")
            guess = "positions are guessed with a focal length of the image's width"
            if self._camera_info is None:
                findings.append((WARN, f"no camera_info on {info}: {guess}"))
            elif not is_calibrated(self._camera_info):
                findings.append((WARN, f"camera_info on {info} has no K: calibrate; {guess}"))
        return findings or [(OK, f"{self._served.hertz():.1f} images/s")]

    def _publisher_findings(self, topic: str) -> list[Finding]:
        """What keeps the publishers there are from being heard."""
        publishers = self.get_publishers_info_by_topic(topic)
        if not publishers:
            self._incompatible.pop(topic, None)
            return [
                (
                    ERROR,
                    f"nobody publishes {topic}: start the camera, or remap image_raw to its topic",
                )
            ]
        compressed = self.get_parameter("image_transport").value == "compressed"
        expected = "sensor_msgs/msg/" + ("CompressedImage" if compressed else "Image")
        findings: list[Finding] = []
        refused = False
        for publisher in publishers:
            who = f"{publisher.node_namespace.rstrip('/')}/{publisher.node_name} publishes {topic}"
            if publisher.topic_type != expected:
                other = "raw" if compressed else "compressed"
                findings.append(
                    (
                        ERROR,
                        f"{who} as {publisher.topic_type}, not {expected}: "
                        f"remap image_raw, or set image_transport to {other}",
                    )
                )
            else:
                match, _ = qos_check_compatible(publisher.qos_profile, self._image_qos)
                refused |= match == QoSCompatibility.ERROR
        if refused:
            self._incompatible.setdefault(topic, "RELIABILITY or DURABILITY")
            findings.append((ERROR, self._incompatible_text(topic)))
        else:
            self._incompatible.pop(topic, None)
        return findings

    def _output_findings(self) -> list[Finding]:
        """Listeners that cannot hear us."""
        findings: list[Finding] = []
        for publisher in list(self._outputs.values()):
            topic = publisher.topic_name
            if topic not in self._incompatible:
                continue
            if any(
                qos_check_compatible(publisher.qos_profile, listener.qos_profile)[0]
                == QoSCompatibility.ERROR
                for listener in self.get_subscriptions_info_by_topic(topic)
            ):
                findings.append((ERROR, self._incompatible_text(topic)))
            else:  # it has gone
                del self._incompatible[topic]
        return findings

    def _incompatible_text(self, topic: str) -> str:
        policy = self._incompatible.get(topic, "")
        way = "subscription" if topic == self._image_topic else "publisher"
        return (
            f"incompatible QoS on {topic}: no message passes, policy {policy} of both sides does "
            f"not fit; change it at the other node or by the parameter "
            f"qos_overrides.{topic}.{way}.{policy.split()[0].lower()}"
        )

    def _model_findings(self) -> list[Finding]:
        work = self._work
        if self._model_problem:
            return [(ERROR, self._model_problem)]
        if work is None:
            return [(WARN, f"no model loaded: {self._state()}")]
        if self._inference_problem:
            return [(ERROR, f"model '{work.model.name}' failed: {self._inference_problem}")]
        backend = work.model.backend
        if backend.notes:
            return [(WARN, note) for note in backend.notes]
        return [(OK, f"'{work.model.name}' on {backend.name}")]

    def _model_values(self) -> dict[str, object]:
        values: dict[str, object] = {"state": self._state()}
        if self._work is not None:
            model = self._work.model
            values |= {
                "bundle": model.bundle.path,
                "head": model.head,
                "classes": ", ".join(model.classes),
                "backend": model.backend.name,
                "backend check": model.backend.checked,
                "input": "{}x{}".format(*model.backend.input_size),
            }
            values |= {f"sha256 {k}": v for k, v in sorted(model.bundle.manifest.files.items())}
        for name, window in self._windows.items():
            for percent in (50, 99):
                values[f"{name} p{percent} [ms]"] = 1e3 * window.percentile(percent)
        values["memory [MB]"] = resident_megabytes()
        return values


def resident_megabytes() -> float:
    """Memory of this process that is in RAM (Linux) [MB]."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main(args: Sequence[str] | None = None) -> int:
    """Run the segmenter node."""
    return run_node(Segmenter, args)


if __name__ == "__main__":
    raise SystemExit(main())
