"""The doctor: what it finds, and whether what it finds is so."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (source its setup file, or use ./sorter test)")

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from waste_seg_ros import cli, doctor
from waste_seg_ros.doctor import FAIL, OK, WARN, Line, Options
from waste_seg_ros.nodes.images import to_image
from waste_seg_ros.perception.belt import (
    Calibration,
    default_camera,
    default_plane,
    write_calibration,
)

BEST_EFFORT = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
RELIABLE = QoSProfile(depth=5)


def options(**changes: Any) -> Options:
    values: dict[str, Any] = {
        "model": "enet-instance",
        "backends": ("onnxruntime",),
        "calibration": "",
        "namespace": "",
        "image_topic": "image_raw",
        "image_transport": "raw",
        "params_file": None,
        "folder": Path("."),
        "wait": 5.0,
        "camera": False,
    }
    return Options(**{**values, **changes})


def named(lines: Any, name: str) -> Line:
    """The one line of that name; each that is not ok tells a mend."""
    lines = list(lines)
    assert all(line.mend for line in lines if line.level != OK), lines
    (found,) = [line for line in lines if line.name == name]
    return found


# --- this machine ---------------------------------------------------------------------------------


def test_numpy_2_beside_cv_bridge_fails_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cv_bridge")
    assert named(doctor.check_numpy(), "NumPy").level == OK
    monkeypatch.setattr(np, "__version__", "2.1.0")
    line = named(doctor.check_numpy(), "NumPy")
    assert line.level == FAIL and "2.1.0" in line.text and "numpy<2" in line.mend


def test_packages_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "MODULES", (("no_such", "no-such", True), ("nor", "nor-this", False))
    )
    lines = list(doctor.check_python(options()))
    assert named(lines, "no-such") == Line("no-such", FAIL, "not installed", "pip install no-such")
    assert named(lines, "nor-this").level == WARN
    assert named(lines, "Python").level == OK


def test_a_container_with_fewer_cores_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    monkeypatch.setattr(doctor, "_quota", lambda: None)
    assert named(doctor.check_threads(options()), "threads").level == OK
    monkeypatch.setattr(doctor, "_quota", lambda: 1.5)
    line = named(doctor.check_threads(options()), "threads")
    assert line.level == WARN and "may use 1.5" in line.text and "threads to 1" in line.mend
    monkeypatch.setattr(doctor, "_quota", lambda: None)
    monkeypatch.setattr(os, "getloadavg", lambda: (30.0, 0.5, 0.5))
    assert named(doctor.check_threads(options()), "threads").level == WARN


@pytest.mark.parametrize(("free", "level"), [(1e8, FAIL), (2e9, WARN), (1e11, OK)])
def test_a_full_disk_is_told_of(monkeypatch: pytest.MonkeyPatch, free: float, level: str) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(1e12, 1e12 - free, free))
    assert named(doctor.check_disk(options()), "disk").level == level


def test_no_gpu_is_fine_and_a_broken_driver_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        line = named(doctor.check_gpu(options()), "GPU")
        assert line.level == OK and "fine" in line.text
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(program))
    program.write_text("#!/bin/sh\necho 'Small GPU, 550.1'\n")
    program.chmod(0o755)
    assert named(doctor.check_gpu(options()), "GPU") == Line("GPU", OK, "Small GPU, 550.1")
    program.write_text("#!/bin/sh\necho 'Driver/library version mismatch' >&2; exit 18\n")
    line = named(doctor.check_gpu(options()), "GPU")
    assert line.level == WARN and "mismatch" in line.text


def test_little_shared_memory_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
        monkeypatch.delenv(name, raising=False)  # earlier tests may have started nodes here
    memory = collections.namedtuple("memory", "f_frsize f_bavail f_blocks")
    monkeypatch.setattr(os, "statvfs", lambda path: memory(4096, 12_000, 16_384))
    lines = list(doctor.check_shared_memory(options()))
    line = named(lines, "shared memory")
    assert line.level == WARN and "46 MB free of 64 MB" in line.text and "--shm-size" in line.mend
    monkeypatch.setattr(os, "statvfs", lambda path: memory(4096, 1 << 20, 1 << 20))
    lines = list(doctor.check_shared_memory(options()))
    assert named(lines, "shared memory").level == OK
    assert named(lines, "Fast DDS profile").text.endswith("fastdds.xml")


def test_a_profile_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRTPS_DEFAULT_PROFILES_FILE", "/nowhere/profile.xml")
    line = named(doctor.check_shared_memory(options()), "Fast DDS profile")
    assert line.level == FAIL and "/nowhere/profile.xml" in line.text and "unset" in line.mend


# --- ROS ------------------------------------------------------------------------------------------


def test_ros_as_it_is_here_is_fine() -> None:
    lines = list(doctor.check_ros(options()))
    assert named(lines, "middleware").level == OK
    assert named(lines, "interfaces").level == OK
    assert named(lines, "discovery").level == OK


def test_a_middleware_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMW_IMPLEMENTATION", "rmw_nonsense_cpp")
    monkeypatch.setenv("ROS_DISTRO", "humble")
    lines = list(doctor.check_ros(options()))
    line = named(lines, "middleware")
    assert line.level == FAIL and "rmw_nonsense_cpp" in line.text
    assert "ros-jazzy-rmw-nonsense-cpp" in line.mend
    assert named(lines, "ROS").level == WARN


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("ROS_DOMAIN_ID", "150", WARN),
        ("ROS_DOMAIN_ID", "x", FAIL),
        ("ROS_AUTOMATIC_DISCOVERY_RANGE", "OFF", FAIL),
        ("ROS_LOCALHOST_ONLY", "1", WARN),
    ],
)
def test_settings_by_which_nodes_miss_each_other_are_told_of(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, level: str
) -> None:
    monkeypatch.setenv(name, value)
    line = doctor._discovery()
    assert line.level == level and name in line.text and line.mend


def test_two_processes_reach_each_other_and_are_missed_where_they_do_not() -> None:
    trips = [
        doctor.RoundTrip({}),
        doctor.RoundTrip({"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"}, within=2.0),
    ]
    try:
        works, fails = (trip.result() for trip in trips)
    finally:
        for trip in trips:
            trip.close()
    assert works["small"] == doctor.PINGS, works
    assert works["images"] >= 0.5 * doctor.PINGS and works["milliseconds"] > 0
    assert "did not find each other" in fails["problem"]


def test_what_the_round_trip_tells_becomes_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, Any]] = []

    class Trip:
        def __init__(self, environment: Any) -> None:
            self.udp = bool(environment)

        def result(self) -> dict[str, Any]:
            return answers[self.udp]

        def close(self) -> None:
            pass

    monkeypatch.setattr(doctor, "RoundTrip", Trip)
    good = {"small": 10, "images": 10, "milliseconds": 1.0}
    bad = {"problem": "they did not find each other in 20 s"}

    def level(*given: dict[str, Any]) -> tuple[Line, list[Line]]:
        answers[:] = given
        lines = list(doctor.check_network(options()))
        return named(lines, "round trip"), [line for line in lines if line.name == "UDP"]

    line, (udp,) = level(good, good)
    assert (line.level, udp.level) == (OK, OK)
    line, (udp,) = level(good, bad)
    assert (line.level, udp.level) == (OK, WARN) and "firewall" in udp.mend
    line, _ = level({**good, "images": 3}, good)
    assert line.level == WARN and "3 of 10" in line.text
    line, _ = level(bad, good)
    assert line.level == FAIL and "rm /dev/shm/fastrtps_*" in line.mend
    line, _ = level(bad, bad)
    assert line.level == FAIL and "firewall" in line.mend


# --- the camera -----------------------------------------------------------------------------------


@contextlib.contextmanager
def repeating(publish: Callable[[], None]) -> Iterator[None]:
    """Publish ten times a second while the block runs."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.1):
            publish()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def image(node: Any, encoding: str = "rgb8", ago: int = 0) -> Image:
    stamp = node.get_clock().now().to_msg()
    stamp.sec -= ago
    message = to_image(np.zeros((48, 64, 3), np.uint8), "rgb8", Header(stamp=stamp, frame_id="cam"))
    message.encoding = encoding
    return message


def test_a_camera_that_is_as_it_should_be(ros: Any) -> None:
    images = ros.node.create_publisher(Image, "line1/image_raw", BEST_EFFORT)
    infos = ros.node.create_publisher(CameraInfo, "line1/camera_info", RELIABLE)
    info = CameraInfo(width=64, height=48)
    info.k = [60.0, 0.0, 32.0, 0.0, 60.0, 24.0, 0.0, 0.0, 1.0]

    def publish() -> None:
        images.publish(image(ros.node))
        infos.publish(info)

    with repeating(publish):
        lines = list(doctor.check_camera(options(namespace="line1", camera=True)))
    assert [(line.name, line.level) for line in lines] == [("camera", OK), ("camera_info", OK)]
    assert "/test publishes /line1/image_raw: 64x48 rgb8" in lines[0].text


def test_pictures_that_are_not_as_they_should_be(ros: Any) -> None:
    images = ros.node.create_publisher(Image, "image_raw", 5)
    infos = ros.node.create_publisher(CameraInfo, "camera_info", 5)

    def publish() -> None:
        images.publish(image(ros.node, ago=3600))
        infos.publish(CameraInfo(width=64, height=48))

    with repeating(publish):
        lines = list(doctor.check_camera(options()))
    stamps = named(lines, "stamps")
    assert stamps.level == WARN and "3600" in stamps.text and "chrony" in stamps.mend
    assert named(lines, "camera_info").level == WARN
    with repeating(lambda: images.publish(image(ros.node, encoding="rgb10"))):
        line = named(doctor.check_camera(options()), "camera")
    assert line.level == FAIL and "'rgb10' is not supported" in line.text


def test_qos_that_does_not_fit_is_named_with_both_sides(ros: Any, tmp_path: Path) -> None:
    ros.node.create_publisher(Image, "image_raw", BEST_EFFORT)
    file = tmp_path / "line.yaml"
    key = "qos_overrides./image_raw.subscription.reliability"
    file.write_text(f"/**:\n  ros__parameters:\n    {key}: reliable\n")
    line = named(doctor.check_camera(options(params_file=file)), "QoS")
    assert line.level == FAIL
    assert "/test and the segmenter" in line.text
    assert "reliability best_effort is offered, reliable asked for" in line.text
    assert key in line.mend


def test_listeners_there_are_that_hear_nothing_are_named(ros: Any) -> None:
    images = ros.node.create_publisher(Image, "image_raw", RELIABLE)
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    ros.node.create_subscription(Image, "image_raw", lambda message: None, latched)
    with repeating(lambda: images.publish(image(ros.node))):
        lines = list(doctor.check_camera(options(wait=3.0)))
    line = named(lines, "QoS")
    assert line.level == WARN
    assert "durability volatile is offered, transient_local asked for" in line.text
    assert named(lines, "camera").level == OK


def test_a_topic_of_another_type_is_named(ros: Any) -> None:
    ros.node.create_publisher(CompressedImage, "image_raw", 5)
    line = named(doctor.check_camera(options()), "camera")
    assert line.level == FAIL
    assert "CompressedImage" in line.text and "image_transport to compressed" in line.mend


def test_a_camera_that_sends_nothing_is_told_from_none(ros: Any) -> None:
    publisher = ros.node.create_publisher(Image, "cam/image_raw", 5)
    line = named(doctor.check_camera(options(image_topic="cam/image_raw", wait=2.0)), "camera")
    assert line.level == FAIL and "no image came" in line.text
    # Where nobody publishes the topic, those that there are instead are named.
    line = named(doctor.check_camera(options(wait=2.0)), "camera")
    assert line.level == WARN and "there are images on /cam/image_raw" in line.text
    assert "image_topic:=/cam/image_raw" in line.mend
    ros.node.destroy_publisher(publisher)
    line = named(doctor.check_camera(options(wait=0.5, camera=True)), "camera")
    assert line.level == FAIL and "nobody publishes /image_raw" in line.text


# --- calibration and model ------------------------------------------------------------------------


def test_calibration_files_are_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "belt.yaml"
    write_calibration(file, Calibration(default_camera((640, 480)), default_plane(1.0)))
    line = named(doctor.check_calibration(options(calibration=str(file))), "calibration")
    assert line.level == OK and "640x480" in line.text
    file.write_text(file.read_text().replace("translation", "translatoin"))
    line = named(doctor.check_calibration(options(calibration=str(file))), "calibration")
    assert line.level == FAIL and "belt.yaml" in line.text and "translat" in line.text
    assert named(doctor.check_calibration(options()), "calibration").level == WARN


def test_a_model_is_hashed_and_run(colour_bundles: Path) -> None:
    lines = list(
        doctor.check_model(
            options(model=str(colour_bundles / "colours"), backends=("openvino", "onnxruntime"))
        )
    )
    assert [line.level for line in lines] == [OK, OK, OK]
    assert "model.onnx" in lines[0].text
    assert "100.0% of pixels as openvino" in lines[2].text


def test_a_model_that_is_damaged_or_does_not_run_fails(colour_bundles: Path) -> None:
    line = named(doctor.check_model(options(model=str(colour_bundles / "damaged"))), "model")
    assert line.level == FAIL and "model.onnx" in line.text
    lines = list(doctor.check_model(options(model=str(colour_bundles / "fragile"))))
    assert named(lines, "backend onnxruntime").level == WARN
    assert named(lines, "backends").level == FAIL
    line = named(doctor.check_model(options(model="no-such-model")), "model")
    assert line.level == FAIL and "no-such-model" in line.text


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(["doctor", *arguments])
    return code, out.getvalue()


def test_the_command_tells_lines_and_mends_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def good(given: Options) -> Iterator[Line]:
        yield Line("this", OK, "is fine")
        yield Line("that", WARN, "is not", "do this")

    def breaks(given: Options) -> Iterator[Line]:
        yield Line("first", OK, "came")
        raise RuntimeError("out of order")

    monkeypatch.setattr(doctor, "CHECKS", (("disk", good),))
    code, text = run("--json", str(tmp_path / "lines.json"))
    assert code == 0
    assert text.splitlines() == ["ok    this: is fine", "warn  that: is not", "      -> do this",
                                 "1 ok, 1 warn, 0 FAIL"]  # fmt: skip
    written = json.loads((tmp_path / "lines.json").read_text())
    assert written["healthy"] and written["lines"][1]["mend"] == "do this"

    # A check that breaks does not hide the others.
    monkeypatch.setattr(doctor, "CHECKS", (("disk", breaks), ("model", good)))
    code, text = run("--json")
    assert code == 1
    read = json.loads(text)
    assert not read["healthy"] and read["counts"] == {"ok": 2, "warn": 1, "FAIL": 1}
    assert "out of order" in read["lines"][1]["text"]
    code, text = run("--only", "model")
    assert code == 0 and "out of order" not in text


def test_a_parameter_file_that_cannot_be_read_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["doctor", "--params-file", str(tmp_path / "gone.yaml")]) == 1
    assert "gone.yaml" in capsys.readouterr().err
