"""The generated interfaces, from Python and from C++."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import pytest

SOURCES = Path(__file__).resolve().parent


def test_items_travel_whole_between_python_nodes(ros) -> None:
    from geometry_msgs.msg import Point32

    from waste_seg_ros.msg import WasteItem, WasteItemArray

    item = WasteItem(class_id="bottle", score=0.75, track_id=7, pickable=True)
    item.header.stamp.sec, item.header.stamp.nanosec = 12, 345
    item.outline.points = [Point32(x=1.0, y=2.0), Point32(x=3.0, y=4.0), Point32(x=5.0, y=0.0)]
    item.flags = WasteItem.FLAG_TRUNCATED | WasteItem.FLAG_UNCERTAIN
    sent = WasteItemArray(model="enet", items=[item, WasteItem(class_id="paper")])
    sent.latency.inference = 0.25

    received = ros.collect(WasteItemArray, "items")
    publisher = ros.node.create_publisher(WasteItemArray, "items", 10)
    assert ros.spin_until(lambda: publisher.get_subscription_count())
    publisher.publish(sent)
    assert ros.spin_until(lambda: received)
    assert received == [sent]


def test_services_and_the_action_are_there() -> None:
    from waste_seg_ros.action import FewShotTrain
    from waste_seg_ros.srv import AddSample, PromoteModel, RollBackModel, SelectModel

    fields = {
        SelectModel.Request: {"model", "backend"},
        AddSample.Request: {"image", "mask", "outline", "class_id"},
        AddSample.Response: {"success", "message", "sample_id"},
        PromoteModel.Request: {"candidate"},
        RollBackModel.Request: set(),
        FewShotTrain.Goal: {"classes", "base_model", "max_seconds"},
        FewShotTrain.Feedback: {"step", "steps", "loss", "held_out_iou", "eta"},
        FewShotTrain.Result: {"success", "message", "candidate", "iou_before", "iou_after"},
    }
    for response in (SelectModel.Response, PromoteModel.Response, RollBackModel.Response):
        fields[response] = {"success", "message", "active_model"}
    for message, expected in fields.items():
        present = set(message.get_fields_and_field_types()) - {
            "structure_needs_at_least_one_member"
        }
        assert present == expected, message


def test_the_version_is_that_of_package_xml() -> None:
    package = ElementTree.parse(SOURCES.parent / "package.xml").getroot()
    assert metadata.version("waste_seg_ros") == package.findtext("version")


def test_a_cpp_program_reads_the_items(ros, tmp_path: Path) -> None:
    """An own CMake project finds the package, builds against it and hears Python over DDS."""
    from waste_seg_ros.msg import WasteItem, WasteItemArray

    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed; it is needed to build a C++ program")
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", SOURCES / "cpp_consumer", "-B", build],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    item = WasteItem(class_id="aluminum", score=0.5, reason="too wide", grasp_width=0.0625)
    item.grasp.position.x, item.grasp.position.z = -0.125, 1.0
    item.flags = WasteItem.FLAG_TOUCHING
    message = WasteItemArray(items=[item, WasteItem(class_id="nylon", score=1.0, pickable=True)])
    message.header.frame_id = "camera_optical_frame"

    publisher = ros.node.create_publisher(WasteItemArray, "items", 10)
    program = subprocess.Popen([build / "print_items", "1"], stdout=subprocess.PIPE, text=True)
    try:
        assert ros.spin_until(lambda: publisher.get_subscription_count()), "no subscription seen"
        publisher.publish(message)
        output, _ = program.communicate(timeout=30)
    finally:
        program.kill()
    assert program.returncode == 0
    assert output.splitlines() == [
        "camera_optical_frame aluminum 0.50 grasp -0.125 0.000 1.000 jaw 0.062 too wide touching",
        "camera_optical_frame nylon 1.00 grasp 0.000 0.000 0.000 jaw 0.000 pickable",
    ]


def test_the_cpp_example_of_an_arm_picks_and_says_so(ros, tmp_path: Path) -> None:
    from builtin_interfaces.msg import Time
    from rclpy.qos import DurabilityPolicy, QoSProfile

    from waste_seg_ros.msg import ArmState, Pick

    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed; it is needed to build a C++ program")
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", SOURCES.parent / "examples" / "cpp", "-B", build],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    def order(number: int, arm: str, ahead: float, stands: float) -> Pick:
        now = ros.node.get_clock().now().nanoseconds
        times = [divmod(now + int(1e9 * s), 10**9) for s in (ahead, stands)]
        pick_time, expiry = (Time(sec=sec, nanosec=nanosec) for sec, nanosec in times)
        pick = Pick(track_id=number, arm=arm, pick_time=pick_time, expiry=expiry)
        pick.item.class_id, pick.item.grasp_width = "aluminum", 0.0625
        pick.item.grasp.position.x, pick.item.grasp.position.y = 1.2, -0.125
        return pick

    # All but one are there before the program, which is to hear those that stand.
    standing = QoSProfile(depth=64, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    picks = ros.node.create_publisher(Pick, "picks", standing)
    states = ros.collect(ArmState, "arms/state", 50)
    picks.publish(order(1, "arm_1", -2.0, -1.0))
    picks.publish(order(2, "arm_2", 0.1, 60.0))
    picks.publish(order(3, "arm_1", 0.2, 60.0))
    program = subprocess.Popen(
        [build / "pick_subscriber", "arm_1", "2"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert ros.spin_until(lambda: states), "it does not say that it is there"
        picks.publish(order(4, "arm_1", 0.2, 60.0))
        assert ros.spin_until(lambda: states[-1].picked == 2)
        output, _ = program.communicate(timeout=30)
    finally:
        program.kill()
    assert program.returncode == 0
    assert output.splitlines() == [
        f"{number} aluminum at 1.200 -0.125 0.000, opening 0.062" for number in (3, 4)
    ]
    assert (states[-1].arm, states[-1].ready) == ("arm_1", True)
    assert list(states[-1].last_track_ids) == [3, 4]
