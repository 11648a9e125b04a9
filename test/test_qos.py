"""Publishers and subscribers that do not fit are told of, and those that may fit do.

A QoS mismatch was nothing but silence (yolact_ros 14).
"""

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (source its setup file, or use ./sorter test)")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from waste_seg_ros.msg import WasteItemArray
from waste_seg_ros.nodes.images import to_image

RELIABLE = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
BEST_EFFORT = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)


class Diagnostics:
    def __init__(self, ros):
        self._ros = ros
        self._arrays = ros.collect(DiagnosticArray, "/diagnostics", 50)

    def newest(self, name):
        found = [s for array in self._arrays for s in array.status if s.name == name]
        return found[-1] if found else None

    def expect(self, name, level, *words):
        def fits():
            status = self.newest(name)
            return (
                status is not None
                and status.level == level
                and all(word in status.message for word in words)
            )

        assert self._ros.spin_until(fits, 30), self.newest(name)


@pytest.fixture
def diagnostics(ros):
    return Diagnostics(ros)


@pytest.fixture
def model(colour_bundles):
    return colour_bundles / "colours"


def image():
    return to_image(np.zeros((48, 64, 3), np.uint8), "rgb8", Header(frame_id="camera"))


@pytest.mark.parametrize("qos", [RELIABLE, BEST_EFFORT], ids=["reliable", "best_effort"])
def test_cameras_of_either_reliability_are_heard(ros, start_node, model, qos):
    items = ros.collect(WasteItemArray, "items")
    camera = ros.node.create_publisher(Image, "image_raw", qos)
    start_node("segmenter", {"model": model, "backend": "onnxruntime"})

    def shown():
        camera.publish(image())
        return ros.spin_until(lambda: items, 0.2)

    assert ros.spin_until(shown, 60)


def test_camera_that_does_not_fit_is_told_of(ros, start_node, diagnostics, model):
    camera = ros.node.create_publisher(Image, "image_raw", BEST_EFFORT)
    node = start_node(
        "segmenter",
        {
            "model": model,
            "backend": "onnxruntime",
            "qos_overrides./image_raw.subscription.reliability": "reliable",
        },
    )
    words = ("incompatible QoS", "/image_raw", "RELIABILITY")
    diagnostics.expect("segmenter: camera", DiagnosticStatus.ERROR, *words)
    # Its output may come after its diagnostics.
    assert ros.spin_until(lambda: all(word in node.output() for word in words), 10), node.output()
    # The mend is named, and with a camera that fits all is well.
    mend = "qos_overrides./image_raw.subscription.reliability"
    assert mend in diagnostics.newest("segmenter: camera").message
    ros.node.destroy_publisher(camera)
    items = ros.collect(WasteItemArray, "items")
    camera = ros.node.create_publisher(Image, "image_raw", RELIABLE)

    def shown():
        camera.publish(image())
        return ros.spin_until(lambda: items, 0.2)

    assert ros.spin_until(shown)

    def clear():
        camera.publish(image())
        ros.spin_until(lambda: False, 0.2)
        return "QoS" not in diagnostics.newest("segmenter: camera").message

    assert ros.spin_until(clear), diagnostics.newest("segmenter: camera")


def test_listener_that_does_not_fit_is_told_of(ros, start_node, diagnostics, model):
    listener = ros.node.create_subscription(
        WasteItemArray,
        "items",
        lambda array: None,
        QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL),
    )
    start_node("segmenter", {"model": model, "backend": "onnxruntime"})
    words = ("incompatible QoS", "/items", "DURABILITY", "qos_overrides./items.publisher")
    diagnostics.expect("segmenter: output", DiagnosticStatus.ERROR, *words)
    ros.node.destroy_subscription(listener)
    diagnostics.expect("segmenter: output", DiagnosticStatus.OK)


def test_images_of_another_type_are_told_of(ros, start_node, diagnostics, model):
    ros.node.create_publisher(CompressedImage, "image_raw", 10)
    start_node("segmenter", {"model": model, "backend": "onnxruntime"})
    words = ("/test", "/image_raw", "sensor_msgs/msg/CompressedImage", "image_transport")
    diagnostics.expect("segmenter: camera", DiagnosticStatus.ERROR, *words)


def test_camera_serves_listeners_of_either_reliability(ros, start_node):
    """Best effort too: with Fast DDS as it comes, most images of this size are lost on the way."""
    reliable = ros.collect(Image, "image_raw", RELIABLE)
    best_effort = ros.collect(Image, "image_raw", BEST_EFFORT)
    node = start_node(
        "camera", {"frames": 40, "rate": 20.0, "wait_for_subscriber": True, "start_delay": 1.0}
    )
    assert ros.spin_until(lambda: not node.alive(), 60)
    assert len(reliable) == 40
    assert len(best_effort) >= 30


def test_items_qos_can_be_overridden(ros, start_node, diagnostics, model):
    items = ros.collect(
        WasteItemArray, "items", QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    )
    camera = ros.node.create_publisher(Image, "image_raw", RELIABLE)
    start_node(
        "segmenter",
        {
            "model": model,
            "backend": "onnxruntime",
            "qos_overrides./items.publisher.durability": "transient_local",
        },
    )

    def shown():
        camera.publish(image())
        return ros.spin_until(lambda: items, 0.2)

    assert ros.spin_until(shown, 60)
    diagnostics.expect("segmenter: output", DiagnosticStatus.OK)
