"""The segmenter node as a process of its own, over DDS.

The network tells red, green and blue (see `colour_bundles`), so that what must come out of the node
is known exactly. What a trained network does is tested elsewhere.
"""

import dataclasses
import math
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (source its setup file, or use ./sorter test)")

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import GetParameters, SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header
from visualization_msgs.msg import MarkerArray

from waste_seg_ros.data.sample import CLASSES
from waste_seg_ros.msg import WasteItem, WasteItemArray
from waste_seg_ros.nodes.images import to_array, to_image
from waste_seg_ros.runtime.bundle import GRAPH
from waste_seg_ros.srv import SelectModel

WIDTH, HEIGHT = 160, 120
RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
FOCAL, CX, CY = 100.0, 79.5, 59.5


# --- the line -----------------------------------------------------------------------------------


class Line:
    """What is around the segmenter: a camera to show pictures with, and ears for what it says."""

    def __init__(self, ros, start_node, bundles):
        self.ros, self._start, self._bundles = ros, start_node, bundles
        self.images = ros.node.create_publisher(Image, "image_raw", 10)
        self.infos = ros.node.create_publisher(CameraInfo, "camera_info", 10)
        self.items = ros.collect(WasteItemArray, "items", 50)
        self.diagnostics = ros.collect(DiagnosticArray, "/diagnostics", 50)
        self.shown = 0

    def start(self, model="colours", active=True, remaps=None, **parameters):
        # ONNX Runtime loads faster than OpenVINO, which the tests of the demo run on.
        fixed = {"model": model, "bundles_dir": self._bundles, "backend": "onnxruntime"}
        parameters = {**fixed, **parameters}
        self.process = self._start("segmenter", parameters, remaps)
        if active:
            assert self.ros.spin_until(lambda: self.state() == "active", 60), self.problem()
            assert self.ros.spin_until(lambda: self.images.get_subscription_count() or remaps)
        return self.process

    def problem(self):
        return self.process.output()

    def state(self):
        return self.ros.call(
            GetState, "/segmenter/get_state", GetState.Request()
        ).current_state.label

    def change(self, transition):
        request = ChangeState.Request(transition=Transition(id=transition))
        return self.ros.call(ChangeState, "/segmenter/change_state", request).success

    def set(self, name, value):
        parameter = Parameter(name, value=value).to_parameter_msg()
        request = SetParameters.Request(parameters=[parameter])
        return self.ros.call(SetParameters, "/segmenter/set_parameters", request, 60).results[0]

    def select(self, model, backend=""):
        request = SelectModel.Request(model=str(model), backend=backend)
        return self.ros.call(SelectModel, "/segmenter/select_model", request, 60)

    def calibrate(self):
        info = CameraInfo(width=WIDTH, height=HEIGHT)
        info.k = [FOCAL, 0.0, CX, 0.0, FOCAL, CY, 0.0, 0.0, 1.0]
        self.infos.publish(info)

    def show(self, picture, encoding="rgb8"):
        """Show a picture once; returns its header."""
        self.shown += 1
        header = Header(stamp=Time(sec=1000 + self.shown, nanosec=7), frame_id="belt_camera")
        self.images.publish(to_image(picture, encoding, header))
        return header

    def see(self, picture, encoding="rgb8", until=lambda array: True):
        """Show a picture until its items have come, and fit."""
        begin = len(self.items)
        first = 1001 + self.shown
        for _ in range(100):
            self.show(picture, encoding)
            if self.ros.spin_until(
                lambda: any(a.header.stamp.sec >= first and until(a) for a in self.items[begin:]),
                0.3,
            ):
                return next(
                    a for a in self.items[begin:] if a.header.stamp.sec >= first and until(a)
                )
        raise AssertionError(f"no fitting items came\n{self.problem()}")

    def status(self, name):
        """The newest diagnostic of that name, or None."""
        for array in reversed(self.diagnostics):
            for status in array.status:
                if status.name == name:
                    return status
        return None

    def await_status(self, name, level, *words, timeout=20.0):
        """Wait for a diagnostic of that level with these words in its message."""

        def fits():
            status = self.status(name)
            return (
                status is not None
                and status.level == level
                and all(word in status.message for word in words)
            )

        assert self.ros.spin_until(fits, timeout), (self.status(name), self.problem())
        return self.status(name)

    def value(self, name, key):
        assert self.ros.spin_until(lambda: self.status(name)), f"no diagnostic '{name}'"
        status = self.status(name)
        return {v.key: v.value for v in status.values}[key]


@pytest.fixture
def line(ros, start_node, colour_bundles):
    return Line(ros, start_node, colour_bundles)


CAMERA, MODEL = "segmenter: camera", "segmenter: model"
OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


def picture(*rectangles, size=(WIDTH, HEIGHT)):
    """Dark belt with rectangles (x, y, width, height, colour)."""
    image = np.full((size[1], size[0], 3), 30, np.uint8)
    for x, y, width, height, colour in rectangles:
        image[y : y + height, x : x + width] = colour
    return image


ONE = picture((40, 30, 48, 20, RED))


def yaw(orientation):
    assert orientation.x == orientation.y == 0
    return 2 * math.atan2(orientation.z, orientation.w)


# --- what it says of a picture ------------------------------------------------------------------


def test_item_in_metres_with_the_images_own_stamp_and_frame(line):
    line.start(belt_distance=2.0)
    line.calibrate()
    line.await_status(CAMERA, ERROR, "no image")
    array = line.see(picture((40, 30, 48, 20, RED), (100, 90, 10, 30, BLUE)))
    assert array.header.frame_id == "belt_camera"
    assert array.header.stamp.nanosec == 7
    assert array.model == "colours"
    by_class = {item.class_id: item for item in array.items}
    assert set(by_class) == {"paper", "aluminum"}

    paper = by_class["paper"]
    assert paper.header == array.header
    assert paper.score == pytest.approx(0.9, abs=1e-3)
    position = paper.pose.pose.position
    # Middle of columns 40..87 and rows 30..49, 2 m below a camera with a focal length of 100 px.
    assert position.x == pytest.approx((63.5 - CX) * 2.0 / FOCAL)
    assert position.y == pytest.approx((39.5 - CY) * 2.0 / FOCAL)
    assert position.z == pytest.approx(2.0)
    assert paper.length == pytest.approx(48 * 2.0 / FOCAL, rel=0.03)
    assert paper.width == pytest.approx(20 * 2.0 / FOCAL, rel=0.05)
    assert yaw(paper.pose.pose.orientation) == pytest.approx(0.0, abs=0.02)
    # The jaws close across the item, along the grasp's own y axis.
    assert abs(yaw(paper.grasp.orientation)) % math.pi == pytest.approx(0.0, abs=0.02)
    assert paper.grasp_width == pytest.approx(20 * 2.0 / FOCAL, rel=0.05)
    assert paper.pose.covariance[0] > 0 and paper.pose.covariance[35] > 0
    roi = paper.roi
    assert (roi.x_offset, roi.y_offset, roi.width, roi.height) == (40, 30, 48, 20)
    xs, ys = [p.x for p in paper.outline.points], [p.y for p in paper.outline.points]
    assert (min(xs), max(xs), min(ys), max(ys)) == pytest.approx((39.5, 87.5, 29.5, 49.5), abs=0.6)
    assert paper.flags == 0 and paper.pickable and paper.reason == ""

    foil = by_class["aluminum"]  # upright, and cut by the lower border
    assert abs(yaw(foil.pose.pose.orientation)) == pytest.approx(math.pi / 2, abs=0.02)
    assert foil.flags & WasteItem.FLAG_TRUNCATED
    assert not foil.pickable and "border" in foil.reason


def test_mask_instances_overlay_and_markers_belong_to_the_very_image(line, ros):
    """The overlay came late and was shifted against the camera's image (yolov7_ros 20)."""
    size = (320, 240)  # the camera's; the network sees half of it
    topics = {
        name: ros.collect(kind, name, QoSProfile(depth=50))
        for name, kind in (
            ("mask", Image),
            ("instances", Image),
            ("overlay", Image),
            ("markers", MarkerArray),
        )
    }
    line.start()
    scene = picture((80, 60, 96, 40, RED), (200, 100, 60, 60, GREEN), size=size)
    array = line.see(scene)

    def of_image(message):
        markers = getattr(message, "markers", None)
        return (markers[0] if markers else message).header == array.header

    assert ros.spin_until(lambda: all(any(map(of_image, t)) for t in topics.values()))
    mask, instances, overlay, markers = (
        next(filter(of_image, topics[name])) for name in ("mask", "instances", "overlay", "markers")
    )
    assert mask.encoding == "mono8" and instances.encoding == "16UC1"
    assert overlay.encoding == "rgb8"
    for image in (mask, instances, overlay):
        assert (image.width, image.height) == size

    expected = np.zeros((240, 320), np.uint8)
    expected[60:100, 80:176] = 1
    expected[100:160, 200:260] = 2
    assert (to_array(mask) == expected).all()
    kinds = {item.track_id: CLASSES.index(item.class_id) + 1 for item in array.items}
    named = np.array([0, *(kinds[k] for k in sorted(kinds))])[to_array(instances)]
    assert sorted(kinds) == [1, 2]
    assert (named == expected).all()

    drawn = np.abs(to_array(overlay).astype(int) - scene).sum(axis=2) > 0
    far = cv2.dilate(expected, np.ones((61, 61), np.uint8)) == 0  # labels stand beside the items
    assert drawn[70:90, 90:160].mean() > 0.5
    assert not drawn[far].any()

    texts = [m.text.split()[0] for m in markers.markers if m.text]
    assert sorted(texts) == ["bottle", "paper"]


@pytest.mark.parametrize(
    "encoding, pixels",
    [
        ("bgr8", ONE[:, :, ::-1]),
        ("rgba8", np.dstack([ONE, np.full((HEIGHT, WIDTH), 255, np.uint8)])),
        ("mono16", ONE[:, :, 0].astype(np.uint16) << 8),
    ],
)
def test_other_encodings(line, encoding, pixels):
    line.start()
    array = line.see(np.ascontiguousarray(pixels), encoding)
    # Grey is as strong in red as in the others, and the first of equals wins.
    assert [item.class_id for item in array.items] == ["paper"]
    assert array.items[0].roi.x_offset == 40


def test_compressed_images_beside_a_remapped_image(line, ros):
    pytest.importorskip("cv_bridge", reason="compressed images are decoded by cv_bridge")
    line.start(image_transport="compressed", remaps={"image_raw": "cam/image"})
    publisher = ros.node.create_publisher(CompressedImage, "cam/image/compressed", 10)
    data = cv2.imencode(".png", ONE[:, :, ::-1])[1].tobytes()
    message = CompressedImage(header=Header(frame_id="c"), format="rgb8; png", data=data)

    def seen():
        publisher.publish(message)
        return ros.spin_until(lambda: line.items, 0.3)

    assert ros.spin_until(seen)
    assert [item.class_id for item in line.items[0].items] == ["paper"]
    assert line.value(CAMERA, "topic") == "/cam/image/compressed"
    assert math.isnan(line.items[0].latency.total)  # no stamp, no latency


def test_without_camera_info_positions_are_guessed_and_it_says_so(line):
    line.start()
    array = line.see(ONE)
    assert array.items[0].pose.pose.position.x == pytest.approx((63.5 - CX) / WIDTH)
    line.await_status(CAMERA, WARN, "no camera_info", "/camera_info")
    line.infos.publish(CameraInfo(width=WIDTH, height=HEIGHT))
    line.see(ONE)
    line.await_status(CAMERA, WARN, "no K")
    line.calibrate()
    x = (63.5 - CX) / FOCAL
    line.see(ONE, until=lambda a: a.items[0].pose.pose.position.x == pytest.approx(x))
    line.await_status(CAMERA, OK)


def test_newest_image_wins_and_the_others_are_counted(line, ros):
    """Work in the callback served stale images (aiformula 172)."""
    line.start("slow")
    line.see(ONE)
    begin, first = len(line.items), line.shown + 1
    for _ in range(40):
        line.show(ONE)
        time.sleep(0.01)
    last = line.shown
    done = lambda: line.items[-1].header.stamp.sec == 1000 + last  # noqa: E731
    assert ros.spin_until(done), "the last image was never worked on"
    served = [a.header.stamp.sec - 1000 for a in line.items[begin:]]
    served = [number for number in served if number >= first]
    assert served == sorted(set(served))
    # A queue would have served the first ones first; here they are jumped over.
    assert len(served) < 30

    def accounted():
        received, processed, dropped = (
            int(line.value(CAMERA, key)) for key in ("received", "processed", "dropped")
        )
        return processed == len(line.items) and received == processed + dropped and dropped > 0

    assert ros.spin_until(accounted), line.status(CAMERA)


def test_images_of_another_format_get_a_network_of_their_aspect(line, ros):
    line.start()
    line.see(ONE)
    assert line.value(MODEL, "input") == "160x120"
    wide = picture((100, 40, 60, 30, GREEN), size=(256, 96))
    array = line.see(wide)  # served at once, if distorted
    assert [item.class_id for item in array.items] == ["bottle"]

    def fits():
        line.see(wide)
        width, height = map(int, line.value(MODEL, "input").split("x"))
        return width / height > 2.2

    assert ros.spin_until(fits, 30)
    roi = line.see(wide).items[0].roi
    assert (roi.x_offset, roi.y_offset, roi.width, roi.height) == pytest.approx(
        (100, 40, 60, 30), abs=3
    )


# --- what goes wrong ----------------------------------------------------------------------------


def test_bad_images_are_a_diagnostic_and_the_node_lives_on(line):
    line.start()
    line.see(ONE)
    message = to_image(ONE, "rgb8", Header())
    message.encoding = "32FC1"
    line.images.publish(message)
    line.await_status(CAMERA, ERROR, "/image_raw", "'32FC1'", "rgb8, bgr8")
    line.see(ONE)
    line.await_status(CAMERA, WARN, "camera_info")  # only that is left
    message = to_image(ONE, "rgb8", Header())
    message.step = 7
    line.images.publish(message)
    line.await_status(CAMERA, ERROR, "/image_raw", "step is 7", "480 bytes a row")
    line.see(ONE)
    assert int(line.value(CAMERA, "unreadable")) >= 1
    assert line.process.alive()


def test_failing_network_is_a_diagnostic_and_the_node_lives_on(line):
    line.start("fragile", verify_backend=False)  # which would find it out
    line.see(ONE)
    line.show(picture((40, 30, 48, 20, (255, 0, 0))))
    line.await_status(MODEL, ERROR, "'fragile'", "failed")
    line.see(ONE)
    line.await_status(MODEL, OK)


def test_a_backend_that_fails_on_the_test_frame_is_refused(line):
    line.start("fragile", active=False)
    line.await_status(MODEL, ERROR, "onnxruntime", "'fragile'", "test frame", timeout=60)
    assert line.state() == "unconfigured"
    assert line.set("verify_backend", False).successful
    line.see(ONE)
    assert line.value(MODEL, "backend check") == ""
    assert line.select("colours").success
    assert line.set("verify_backend", True).successful
    line.ros.spin_until(lambda: "openvino" in line.value(MODEL, "backend check"), 5)
    assert "same labels on 100.00%" in line.value(MODEL, "backend check")


def test_missing_camera_is_a_diagnostic(line, ros):
    ros.node.destroy_publisher(line.images)
    line.start(active=False)
    line.await_status(CAMERA, ERROR, "nobody publishes /image_raw", "remap", timeout=60)
    line.images = ros.node.create_publisher(Image, "image_raw", 10)
    line.see(ONE)
    line.await_status(CAMERA, ERROR, "no image on /image_raw for more than 2 s")


@pytest.mark.parametrize(
    "model, words",
    [("nonesuch", ["model", "'nonesuch'", "colours"]), ("damaged", ["SHA-256", "copy the bundle"])],
)
def test_bad_model_at_the_start_can_be_mended(line, model, words):
    line.start(model, active=False)
    line.await_status(MODEL, ERROR, *words, timeout=60)
    assert line.state() == "unconfigured"
    assert line.process.alive()
    again = line.select("damaged")
    assert not again.success and "SHA-256" in again.message and again.active_model == ""
    answer = line.select("colours")
    assert answer.success and answer.active_model == "colours", answer
    assert line.state() == "active"
    line.await_status(MODEL, OK)
    line.see(ONE)


def test_a_parameter_mends_the_start_as_well(line, ros):
    line.start("nonesuch", active=False)
    line.await_status(MODEL, ERROR, "nonesuch", timeout=60)
    assert line.set("model", "colours").successful
    assert ros.spin_until(lambda: line.state() == "active", 30)
    line.see(ONE)


# --- changes at run time ------------------------------------------------------------------------


def test_parameters_take_effect_or_are_refused_with_a_reason(line):
    line.start()
    line.calibrate()
    scene = picture((40, 30, 48, 20, RED), (100, 60, 40, 40, GREEN))
    both = {"paper", "bottle"}
    classes = lambda array: {item.class_id for item in array.items}  # noqa: E731
    assert classes(line.see(scene)) == both

    assert line.set("classes", ["bottle"]).successful
    line.see(scene, until=lambda a: classes(a) == {"bottle"})
    answer = line.set("classes", ["glass"])
    assert not answer.successful and "glass" in answer.reason and "nylon" in answer.reason
    assert classes(line.see(scene)) == {"bottle"}
    assert line.set("classes", [""]).successful
    array = line.see(scene, until=lambda a: classes(a) == both)

    x = {item.class_id: item.pose.pose.position.x for item in array.items}
    assert line.set("belt_distance", 3.0).successful
    line.see(
        scene,
        until=lambda a: (
            {i.class_id: i.pose.pose.position.x for i in a.items}
            == pytest.approx({k: 3 * v for k, v in x.items()})
        ),
    )
    assert not line.set("belt_distance", -1.0).successful
    assert not line.set("pixel_threshold", 1.5).successful

    assert line.set("score_threshold", 0.95).successful  # the network is sure to 0.9
    array = line.see(scene, until=lambda a: not any(i.pickable for i in a.items))
    assert all("0.95" in item.reason for item in array.items)
    assert line.set("pixel_threshold", 0.95).successful
    line.see(scene, until=lambda a: not a.items)
    assert line.set("pixel_threshold", 0.5).successful

    assert line.set("head", "binary").successful
    line.see(scene, until=lambda a: classes(a) == {"item"} and len(a.items) == 2)
    for name, value, words in (
        ("head", "instance", ["semantic", "instance"]),
        ("head", "panoptic", ["panoptic", "binary, semantic, instance"]),
        ("backend", "abacus", ["abacus", "openvino"]),
        ("model", "nonesuch", ["nonesuch", "colours"]),
        ("model", "damaged", ["SHA-256"]),
        ("input_width", 64, ["input_height"]),
        ("autostart", False, ["read-only"]),
    ):
        answer = line.set(name, value)
        assert not answer.successful, name
        for word in words:
            assert word in answer.reason
    line.see(scene, until=lambda a: classes(a) == {"item"})  # what was refused changed nothing
    request = GetParameters.Request(names=["model", "head"])
    values = line.ros.call(GetParameters, "/segmenter/get_parameters", request).values
    assert [value.string_value for value in values] == ["colours", "binary"]


def test_models_are_swapped_between_images(line, ros):
    """Nothing comes from a mix of two models, with images coming in all the while."""
    line.start()
    line.see(ONE)
    client = ros.node.create_client(SelectModel, "/segmenter/select_model")
    assert ros.spin_until(client.service_is_ready)
    begin = len(line.items)
    for model in ("shifted", "colours", "shifted"):
        future = client.call_async(SelectModel.Request(model=model))

        def answered():
            line.show(ONE)
            ros.spin_until(lambda: False, 0.01)
            return future.done()  # noqa: B023

        assert ros.spin_until(answered, 30)
        assert future.result().success and future.result().active_model == model
        line.see(ONE, until=lambda a, model=model: a.model == model)
    pairs = {(a.model, *(item.class_id for item in a.items)) for a in line.items[begin:]}
    assert pairs == {("colours", "paper"), ("shifted", "bottle")}
    answer = line.select("nonesuch")
    assert not answer.success and answer.active_model == "shifted"
    line.see(ONE, until=lambda a: a.model == "shifted")


def test_a_path_names_a_model_too(line, colour_bundles):
    line.start(str(colour_bundles / "shifted"))
    assert line.see(ONE).items[0].class_id == "bottle"
    assert Path(line.value(MODEL, "bundle")) == colour_bundles / "shifted"


# --- life ---------------------------------------------------------------------------------------


def test_lifecycle_by_hand(line, ros):
    line.start(active=False, autostart=False)
    assert line.state() == "unconfigured"
    assert line.change(Transition.TRANSITION_CONFIGURE)
    assert line.state() == "inactive"
    assert ros.spin_until(lambda: line.images.get_subscription_count())
    line.await_status(CAMERA, WARN, "not active")
    line.show(ONE)
    ros.spin_until(lambda: False, 0.5)
    assert not line.items
    assert line.change(Transition.TRANSITION_ACTIVATE)
    line.see(ONE)
    assert line.change(Transition.TRANSITION_DEACTIVATE)
    count = len(line.items)
    line.show(ONE)
    ros.spin_until(lambda: False, 0.5)
    assert len(line.items) == count
    assert line.change(Transition.TRANSITION_CLEANUP)
    assert line.change(Transition.TRANSITION_CONFIGURE)
    assert line.change(Transition.TRANSITION_ACTIVATE)
    line.see(ONE)
    assert line.change(Transition.TRANSITION_ACTIVE_SHUTDOWN)
    assert line.process.process.wait(10) == 0, line.problem()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_properly_in_the_middle_of_work(line, number):
    line.start("slow")
    line.see(ONE)
    for _ in range(3):
        line.show(ONE)
        time.sleep(0.02)
    line.process.process.send_signal(number)
    assert line.process.process.wait(10) == 0, line.problem()
    assert "Traceback" not in line.problem()


def test_latency_and_memory_are_told(line, ros):
    line.start()
    picture_now = to_image(ONE, "rgb8", Header(frame_id="c"))
    for _ in range(20):
        picture_now.header.stamp = ros.node.get_clock().now().to_msg()
        line.images.publish(picture_now)
        ros.spin_until(lambda: False, 0.05)
    assert ros.spin_until(lambda: line.items)
    for array in line.items:
        latency = array.latency
        stages = [latency.transport, latency.conversion, latency.inference, latency.extraction]
        assert all(stage > 0 for stage in stages)
        assert sum(stages) <= latency.total + 1e-4  # what is left is the wait for the thread
        assert latency.total < 10
    line.await_status(MODEL, OK)
    assert float(line.value(MODEL, "total p50 [ms]")) > 0
    assert float(line.value(MODEL, "memory [MB]")) > 10
    assert len(line.value(MODEL, f"sha256 {GRAPH}")) == 64
    # Whoever runs ONNX Runtime does not pay for torch.
    assert "libtorch" not in Path(f"/proc/{line.process.process.pid}/maps").read_text()


def test_the_gripper_of_the_parameters_is_in_metres(line):
    line.start(belt_distance=2.0, max_opening=0.5)
    line.calibrate()
    # 48 by 20 px are 0.96 by 0.4 m; the second item stands 2 px, or 0.04 m, above the first.
    scene = picture((40, 30, 48, 20, RED), (40, 8, 48, 20, BLUE))
    line.see(scene, until=lambda a: [i.pickable for i in a.items] == [True, True])
    assert line.set("jaw_thickness", 0.05).successful
    array = line.see(scene, until=lambda a: not any(i.pickable for i in a.items))
    reasons = {item.class_id: item.reason for item in array.items}
    assert reasons == {
        "paper": "blocked by neighbour at top",
        "aluminum": "blocked by neighbour at bottom",
    }
    assert line.set("max_opening", 0.3).successful
    line.see(
        scene, until=lambda a: {i.reason for i in a.items} == {"too wide: 400 mm above 292 mm"}
    )

    assert line.set("gripper", "suction").successful
    array = line.see(scene, until=lambda a: all(i.pickable for i in a.items) and len(a.items) == 2)
    paper = next(item for item in array.items if item.class_id == "paper")
    assert paper.grasp_width == pytest.approx(0.4, rel=0.05)
    assert paper.grasp.position.x == pytest.approx((63.5 - CX) * 2.0 / FOCAL, abs=0.02)
    assert line.set("cup_diameter", 0.5).successful
    line.see(scene, until=lambda a: all("smaller than the cup" in i.reason for i in a.items))

    for name, value, word in (
        ("gripper", "tongs", "tongs"),
        ("min_opening", 0.3, "max_opening"),
        ("jaw_width", -0.1, "jaw_width"),
        ("friction_angle", 2.0, "friction_angle"),
    ):
        answer = line.set(name, value)
        assert not answer.successful and word in answer.reason, (name, answer.reason)


def test_every_parameter_is_described_and_typed(line, ros):
    from rcl_interfaces.msg import ParameterType
    from rcl_interfaces.srv import DescribeParameters

    line.start(active=False, autostart=False)
    names = [f.name for f in dataclasses.fields(_Names)]
    request = DescribeParameters.Request(names=names)
    found = ros.call(DescribeParameters, "/segmenter/describe_parameters", request).descriptors
    assert [d.name for d in found] == names
    for descriptor in found:
        assert len(descriptor.description) > 10, descriptor.name
        assert descriptor.type != ParameterType.PARAMETER_NOT_SET
        assert not descriptor.dynamic_typing
        numeric = descriptor.type in (
            ParameterType.PARAMETER_DOUBLE,
            ParameterType.PARAMETER_INTEGER,
        )
        ranges = [*descriptor.floating_point_range, *descriptor.integer_range]
        assert len(ranges) == (1 if numeric else 0), descriptor.name


@dataclasses.dataclass
class _Names:
    """The segmenter's parameters."""

    model: str
    head: str
    backend: str
    threads: int
    input_width: int
    input_height: int
    bundles_dir: str
    verify_backend: bool
    classes: list
    pixel_threshold: float
    center_threshold: float
    score_threshold: float
    min_area: int
    max_items: int
    belt_distance: float
    gripper: str
    min_opening: float
    max_opening: float
    jaw_width: float
    jaw_thickness: float
    grasp_clearance: float
    friction_angle: float
    cup_diameter: float
    image_transport: str
    autostart: bool
