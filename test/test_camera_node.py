"""The camera node as a process of its own: what it publishes, and how it fails and ends."""

import json
import logging
import signal
import struct

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (source its setup file, or use ./sorter test)")

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image

from waste_seg_ros.data.synthetic import SyntheticLine
from waste_seg_ros.msg import WasteItemArray
from waste_seg_ros.nodes import NodeError
from waste_seg_ros.nodes.camera import FolderSource, open_source
from waste_seg_ros.nodes.images import to_array

ALL = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
SMALL = {"width": 160, "height": 120, "wait_for_subscriber": True}


def stamp(message):
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def by_stamp(messages):
    return {stamp(message): message for message in messages}


def ended(node):
    return lambda: not node.alive()


def begin(ros, topics):
    """Let a paused camera begin, when it knows that all these topics are listened to."""
    diagnostics = ros.collect(DiagnosticArray, "/diagnostics")

    def known():
        values = {
            value.key: value.value
            for array in diagnostics
            for status in array.status
            for value in status.values
        }
        return all(values.get(f"subscribers of {topic}") == "1" for topic in topics)

    assert ros.spin_until(known, 30), diagnostics[-1:]
    value = Parameter("paused", value=False).to_parameter_msg()
    request = SetParameters.Request(parameters=[value])
    assert ros.call(SetParameters, "/camera/set_parameters", request).results[0].successful


def test_synthetic_line_with_camera_info_and_truth(ros, start_node):
    images = ros.collect(Image, "image_raw", ALL)
    infos = ros.collect(CameraInfo, "camera_info", ALL)
    labels = ros.collect(Image, "truth/labels", ALL)
    instances = ros.collect(Image, "truth/instances", ALL)
    items = ros.collect(WasteItemArray, "truth/items", ALL)
    line = SyntheticLine(seed=3, size=(160, 120), speed=0.5)
    node = start_node(
        "camera", {**SMALL, "seed": 3, "speed": 0.5, "rate": 10.0, "frames": 12, "paused": True}
    )
    begin(ros, ["image_raw", "camera_info", "truth/labels", "truth/instances", "truth/items"])
    assert ros.spin_until(ended(node), 60)
    ros.spin_until(lambda: len(items) == 12, 2)
    assert node.process.returncode == 0, node.output()
    assert [len(m) for m in (images, infos, labels, instances, items)] == [12] * 5

    tracks = {}
    for k, image in enumerate(images):
        # One stamp and frame on all that belongs together.
        same = [by_stamp(m)[stamp(image)] for m in (infos, labels, instances, items)]
        info, label, instance, truth = same
        assert {m.header.frame_id for m in (image, *same)} == {"camera_optical_frame"}

        # The very picture of the line at the moment that the name gives.
        kind, seed, t = truth.model.split(":")
        assert (kind, seed) == ("line", "3")
        frame = line.frame(float(t))
        assert image.encoding == "rgb8"
        assert (to_array(image) == frame.sample.image).all()
        assert (to_array(label) == frame.sample.labels).all()
        assert (to_array(instance) == frame.sample.instances).all()
        if k:
            moved = float(t) - float(items[0].model.split(":")[2])
            assert stamp(image) - stamp(images[0]) == pytest.approx(moved * 1e9, abs=2e6)

        # A pinhole over the belt in the scale of the line.
        assert (info.width, info.height) == (160, 120)
        assert info.k[0] == pytest.approx(1.0 / line.meters_per_pixel)
        assert (info.k[2], info.k[5]) == (79.5, 59.5)
        assert info.distortion_model == "plumb_bob" and not any(info.d)

        assert len(truth.items) == len(frame.items)
        for item, known in zip(truth.items, frame.items, strict=True):
            assert item.track_id == known.id
            x = (known.center[0] - 79.5) * line.meters_per_pixel
            y = (known.center[1] - 59.5) * line.meters_per_pixel
            assert item.pose.pose.position.x == pytest.approx(x, abs=1e-6)
            assert item.pose.pose.position.y == pytest.approx(y, abs=1e-6)
            assert item.belt_velocity.x == pytest.approx(0.5)
            tracks.setdefault(item.track_id, set()).add(item.class_id)
    assert len(tracks) > 1
    assert all(len(kinds) == 1 for kinds in tracks.values())  # an item keeps its class


def test_moments_that_cannot_be_kept_are_left_out_and_counted(ros, start_node):
    """No burst of pictures afterwards: each stamp is a moment of the rate, and none comes twice."""
    images = ros.collect(Image, "image_raw", ALL)
    diagnostics = ros.collect(DiagnosticArray, "/diagnostics")
    node = start_node("camera", {**SMALL, "width": 640, "height": 480, "rate": 1000.0})
    missed = lambda: [  # noqa: E731
        int(value.value)
        for array in diagnostics
        for status in array.status
        for value in status.values
        if status.name == "camera: source" and value.key == "missed moments"
    ]
    assert ros.spin_until(lambda: len(images) >= 20 and max(missed(), default=0) > 0), missed()
    assert node.alive()
    stamps = np.array([stamp(image) for image in images])
    steps = np.diff(stamps) / 1e6
    assert (steps > 0.5).all()
    assert np.abs(steps - steps.round()).max() < 0.2  # whole periods of 1 ms
    assert steps.mean() > 1.5


@pytest.fixture
def folder(tmp_path):
    """Images whose colour tells their number, of different sizes, and two files that are none."""
    path = tmp_path / "images"
    path.mkdir()
    for number in (1, 2, 10):
        picture = np.full((20 + number, 30 + number, 3), (number, 2 * number, 3 * number), np.uint8)
        assert cv2.imwrite(str(path / f"frame_{number}.png"), picture[:, :, ::-1])
    (path / "frame_5.png").write_bytes(b"not a picture")
    (path / "notes.txt").write_text("not looked at")
    return path


def test_folder_in_the_order_of_numbers_each_in_its_own_size(ros, start_node, folder):
    images = ros.collect(Image, "image_raw", ALL)
    infos = ros.collect(CameraInfo, "camera_info", ALL)
    node = start_node(
        "camera", {"source": folder, "rate": 50.0, "loop": False, "wait_for_subscriber": True}
    )
    assert ros.spin_until(ended(node))
    ros.spin_until(lambda: len(images) == 3, 1)
    assert node.process.returncode == 0, node.output()
    assert [(i.width, i.height) for i in images] == [(31, 21), (32, 22), (40, 30)]
    assert [to_array(i)[0, 0].tolist() for i in images] == [[n, 2 * n, 3 * n] for n in (1, 2, 10)]
    assert "frame_5.png" in node.output()
    assert all(not any(info.k) for info in infos)  # not calibrated, and says so


def test_folder_loops_and_scales(ros, start_node, folder):
    images = ros.collect(Image, "image_raw", ALL)
    start_node("camera", {"source": folder, "rate": 50.0, "width": 60, "wait_for_subscriber": True})
    assert ros.spin_until(lambda: len(images) >= 7)
    assert [(i.width, i.height) for i in images[:3]] == [(60, 41), (60, 41), (60, 45)]
    assert [to_array(i)[0, 0, 0] for i in images[:7]] == [1, 2, 10, 1, 2, 10, 1]


def test_folder_with_annotations_publishes_their_truth(ros, start_node, folder):
    annotations = folder.parent / "annotations.json"
    square = [5, 5, 15, 5, 15, 15, 5, 15]
    entry = {"id": 1, "image_id": 2, "category_id": 7, "segmentation": [square], "iscrowd": 0}
    coco = {
        "images": [{"id": 2, "file_name": "frame_2.png", "width": 32, "height": 22}],
        "categories": [{"id": 7, "name": "bottle"}],
        "annotations": [{**entry, "bbox": [5, 5, 10, 10], "area": 100}],
    }
    annotations.write_text(json.dumps(coco))
    labels = ros.collect(Image, "truth/labels", ALL)
    items = ros.collect(WasteItemArray, "truth/items", ALL)
    start_node("camera", {"source": folder, "truth": annotations, "rate": 10.0})
    assert ros.spin_until(lambda: labels and items)
    expected = np.zeros((22, 32), np.uint8)
    expected[5:15, 5:15] = 2
    assert (to_array(labels[0]) != expected).sum() <= 21  # which pixels a polygon's edge takes
    assert items[0].model.endswith("frame_2.png")
    assert [i.class_id for i in items[0].items] == ["bottle"]


def test_pictures_are_upright_unless_masks_are_drawn_on_them(tmp_path, caplog):
    path = tmp_path / "a.jpg"
    assert cv2.imwrite(str(path), np.zeros((20, 30, 3), np.uint8))
    jpeg = path.read_bytes()
    # EXIF orientation 6: to be turned by a quarter.
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    segment = struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(jpeg[:2] + b"\xff\xe1" + segment + jpeg[2:])
    (tmp_path / "c.jpg").write_bytes(jpeg[:-2])
    annotations = tmp_path / "annotations.json"
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "lost.jpg"}]
    annotations.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    log = logging.getLogger("camera")
    upright = FolderSource(tmp_path, (0, 0), False, None, log)
    assert [upright.take(0.0).image.shape[:2] for _ in "ab"] == [(30, 20)] * 2
    assert upright.take(0.0) is None and upright.skipped == 1
    assert "c.jpg: is cut short; it is left out" in caplog.text
    stored = FolderSource(tmp_path, (0, 0), False, annotations, log)
    assert [stored.take(0.0).image.shape[:2] for _ in "ab"] == [(20, 30)] * 2
    assert "lost.jpg: no such file" in caplog.text


def test_video_file(ros, start_node, tmp_path):
    file = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    assert writer.isOpened()
    for level in (40, 80, 120, 160):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    images = ros.collect(Image, "image_raw", ALL)
    node = start_node(
        "camera", {"source": file, "rate": 30.0, "loop": False, "wait_for_subscriber": True}
    )
    assert ros.spin_until(ended(node))
    ros.spin_until(lambda: len(images) == 4, 1)
    assert node.process.returncode == 0, node.output()
    means = [to_array(image).mean() for image in images]
    assert means == pytest.approx([40, 80, 120, 160], abs=4)


@pytest.mark.parametrize(
    "parameters, code, words",
    [
        ({"source": "/nowhere"}, 1, ["there is no '/nowhere'", "folder of images"]),
        ({"source": "."}, 1, ["no images in folder", ".png"]),
        ({"source": "v4l2:97"}, 1, ["there is no /dev/video97", "video devices here"]),
        ({"source": "notes.txt"}, 1, ["is not a video", ".mp4"]),
        ({"truth": "a.json"}, 1, ["truth", "folder of images"]),
        ({"width": 7}, 1, ["synthetic line", "32"]),
        ({"rate": 10}, 2, ["rate", "DOUBLE"]),
        ({"rate": -1.0}, 2, ["rate"]),
    ],
)
def test_wrong_parameters_end_it_with_the_mend(start_node, tmp_path, parameters, code, words):
    (tmp_path / "notes.txt").write_text("no video")
    node = start_node("camera", parameters)
    assert node.process.wait(30) == code
    for word in words:
        assert word in node.output()
    assert "Traceback" not in node.output()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_properly(ros, start_node, number):
    images = ros.collect(Image, "image_raw", ALL)
    node = start_node("camera", SMALL)
    assert ros.spin_until(lambda: images)
    node.process.send_signal(number)
    assert node.process.wait(10) == 0, node.output()
    assert "Traceback" not in node.output()


def open_frames(path, **changes):
    given = {"size": (0, 0), "rate": 30.0, "seed": 0, "speed": 0.0, "loop": True, "truth": ""}
    return open_source(str(path), log=None, **{**given, **changes})


def test_pictures_of_an_npy_file_go_round(tmp_path):
    frames = np.arange(3 * 4 * 6 * 3, dtype=np.uint8).reshape(3, 4, 6, 3)
    path = tmp_path / "frames.npy"
    np.save(path, frames)
    source = open_frames(path)
    for k in (0, 1, 2, 0, 1):
        assert np.array_equal(source.take(0.0).image, frames[k])
    once = open_frames(path, loop=False, size=(12, 8))
    assert [once.take(0.0).image.shape for _ in range(3)] == [(8, 12, 3)] * 3
    assert once.take(0.0) is None


@pytest.mark.parametrize(
    "content, problem",
    [
        (np.zeros((4, 6, 3), np.uint8), r"\(4, 6, 3\); pictures are"),
        (np.zeros((1, 4, 6, 3), np.float32), "float32"),
        (np.zeros((0, 4, 6, 3), np.uint8), "pictures are"),
        (np.array([{}], object), "is not a file of pictures"),  # would have to be unpickled
        (b"no array", "is not a file of pictures"),
    ],
)
def test_npy_files_of_something_else_are_refused(content, problem, tmp_path):
    path = tmp_path / "frames.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(NodeError, match=problem):
        open_frames(path)
