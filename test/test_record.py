"""Recording the topics to MCAP, and replaying them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="needs ROS 2 (source its setup file, or use ./sorter test)")

from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message, serialize_message
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header, String

from waste_seg_ros import cli, record, replay
from waste_seg_ros.msg import WasteItem, WasteItemArray
from waste_seg_ros.nodes.images import to_image
from waste_seg_ros.record import Bag, BagWriter, RecordingError, Topic

IMAGE = "sensor_msgs/msg/Image"
SECOND = 10**9
RED, GREEN = (255, 0, 0), (0, 200, 0)


def topic(name: str, kind: str, **more: Any) -> Topic:
    return Topic(name, kind, record.message_definition(kind), **more)


def header(number: int) -> Header:
    message = Header(frame_id="camera")
    message.stamp.sec = 100 + number
    return message


def scene(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, labels and instances: a red box (paper, 1) and a green one (bottle, 2)."""
    image = np.zeros((120, 160, 3), np.uint8)
    labels, instances = np.zeros((120, 160), np.uint8), np.zeros((120, 160), np.uint16)
    for k, (colour, left) in enumerate(((RED, 16 + 8 * number), (GREEN, 96)), 1):
        box = np.s_[40:80, left : left + 40]
        image[box], labels[box], instances[box] = colour, k, k
    return image, labels, instances


def write_scenes(
    folder: Path,
    frames: int = 3,
    truth: bool = True,
    encoding: str = "rgb8",
    name: str = "/image_raw",
) -> Path:
    bag = BagWriter(folder)
    bag.add_topic(topic(name, IMAGE))
    bag.add_topic(topic("/camera_info", "sensor_msgs/msg/CameraInfo"))
    for part in ("labels", "instances") if truth else ():
        bag.add_topic(topic(f"/truth/{part}", IMAGE))
    for number in range(frames):
        image, labels, instances = scene(number)
        at = number * SECOND // 10 + SECOND
        info = CameraInfo(header=header(number), width=160, height=120)
        info.k = [200.0, 0.0, 79.5, 0.0, 200.0, 59.5, 0.0, 0.0, 1.0]
        bag.write("/camera_info", serialize_message(info), at, at)
        message = to_image(image, "rgb8", header(number))
        message.encoding = encoding
        bag.write(name, serialize_message(message), at, at)
        if truth:
            for part, ids, kind in (
                ("labels", labels, "mono8"),
                ("instances", instances, "16UC1"),
            ):
                data = serialize_message(to_image(ids, kind, header(number)))
                bag.write(f"/truth/{part}", data, at + 1, at + 1)
    bag.close()
    return folder


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object) -> Result:
    """Run waste-seg in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts waste-seg; what still runs after the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object, before: Sequence[str] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "waste_seg_ros.cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for_subscribers(ros: Any, *publishers: Any) -> None:
    assert ros.spin_until(lambda: all(p.get_subscription_count() for p in publishers), 30)
    ros.spin_until(lambda: False, 0.3)  # the other side may know of us a little later


# --- the file -------------------------------------------------------------------------------------


def test_definitions_hold_all_that_they_refer_to() -> None:
    text = record.message_definition("waste_seg_ros/msg/WasteItemArray")
    sections = text.split("=" * 80 + "\n")
    named = [section.splitlines()[0] for section in sections[1:]]
    assert len(named) == len(set(named))
    for name in ("std_msgs/Header", "builtin_interfaces/Time", "waste_seg_ros/WasteItem",
                 "geometry_msgs/Point32", "sensor_msgs/RegionOfInterest",
                 "waste_seg_ros/StageLatency"):  # fmt: skip
        assert f"MSG: {name}" in named
    with pytest.raises(RecordingError, match="nonsense_msgs"):
        record.message_definition("nonsense_msgs/msg/Thing")


def test_other_readers_decode_what_is_written_without_our_package(tmp_path: Path) -> None:
    kind = "waste_seg_ros/msg/WasteItemArray"
    array = WasteItemArray(header=header(7), model="enet")
    array.items = [WasteItem(header=header(7), track_id=5, class_id="paper", score=0.5)]
    array.items[0].outline.points = []
    array.items[0].pose.covariance[35] = 0.25
    bag = BagWriter(tmp_path / "bag", compression="zstd")
    bag.add_topic(topic("/items", kind))
    bag.write("/items", serialize_message(array), 20, 10)
    bag.close()
    with (tmp_path / "bag" / "bag_0.mcap").open("rb") as stream:
        reader = make_reader(stream, decoder_factories=[DecoderFactory()], validate_crcs=True)
        assert reader.get_header().profile == "ros2"
        ((schema, channel, message, decoded),) = reader.iter_decoded_messages()
    assert (schema.name, schema.encoding, channel.message_encoding) == (kind, "ros2msg", "cdr")
    assert (message.log_time, message.publish_time) == (20, 10)
    (item,) = decoded.items
    assert (item.track_id, item.class_id, item.score) == (5, "paper", 0.5)
    assert item.pose.covariance[35] == 0.25
    assert decoded.header.stamp.sec == 107


def test_metadata_is_as_rosbag2_of_jazzy_reads_it(tmp_path: Path) -> None:
    qos = record.qos_record(QoSProfile(depth=3, durability=DurabilityPolicy.TRANSIENT_LOCAL))
    bag = BagWriter(tmp_path / "bag")
    bag.add_topic(topic("/word", "std_msgs/msg/String", qos=(qos,), type_hash="RIHS01_00"))
    for at in (5, 9):
        bag.write("/word", serialize_message(String(data="hello")), at * SECOND, at * SECOND)
    bag.close()
    whole = yaml.safe_load((tmp_path / "bag" / "metadata.yaml").read_text())
    information = whole["rosbag2_bagfile_information"]
    # What rosbag2_storage's yaml.hpp reads of version 9.
    assert information["version"] == 9
    assert information["storage_identifier"] == "mcap"
    assert information["starting_time"] == {"nanoseconds_since_epoch": 5 * SECOND}
    assert information["duration"] == {"nanoseconds": 4 * SECOND}
    assert information["message_count"] == 2
    assert information["relative_file_paths"] == ["bag_0.mcap"]
    (file,) = information["files"]
    assert file["path"] == "bag_0.mcap" and file["message_count"] == 2
    (entry,) = information["topics_with_message_count"]
    assert entry["message_count"] == 2
    metadata = entry["topic_metadata"]
    assert metadata["type_description_hash"] == "RIHS01_00"
    (profile,) = metadata["offered_qos_profiles"]
    assert profile["durability"] == "transient_local"
    assert profile["history"] == "keep_last" and profile["depth"] == 3
    assert profile["deadline"] == {"sec": 9223372036, "nsec": 854775807}
    # rosbag2 also reads a file without its folder.
    with (tmp_path / "bag" / "bag_0.mcap").open("rb") as stream:
        reader = make_reader(stream)
        (held,) = reader.iter_metadata()
        assert held.name == "rosbag2"
        assert yaml.safe_load(held.metadata["serialized_metadata"])["message_count"] == 2
        (channel,) = reader.get_summary().channels.values()
        assert yaml.safe_load(channel.metadata["offered_qos_profiles"]) == [qos]
    assert record.offered_qos(Bag(tmp_path / "bag").topics["/word"]).durability == (
        DurabilityPolicy.TRANSIENT_LOCAL
    )


def test_files_are_split_by_size_and_the_newest_kept(tmp_path: Path) -> None:
    def write(folder: Path, keep: int) -> Bag:
        bag = BagWriter(folder, compression="none", split_bytes=100_000, keep=keep)
        bag.add_topic(topic("/word", "std_msgs/msg/String"))
        for number in range(40):
            word = String(data=f"{number} " + "x" * 20_000)
            bag.write("/word", serialize_message(word), number + 1, number + 1)
            bag.flush()
        bag.close()
        return Bag(folder)

    def numbers(bag: Bag) -> list[int]:
        return [
            int(deserialize_message(entry.data, String).data.split()[0]) for entry in bag.entries()
        ]

    everything = write(tmp_path / "all", 0)
    files = sorted((tmp_path / "all").glob("*.mcap"))
    assert len(files) == 8
    assert all(100_000 <= file.stat().st_size < 130_000 for file in files)
    assert numbers(everything) == list(range(40))
    # Each file stands alone.
    assert numbers(Bag(files[3])) == list(range(15, 20))

    kept = write(tmp_path / "some", 2)
    assert sorted(f.name for f in (tmp_path / "some").glob("*.mcap")) == [
        "some_6.mcap",
        "some_7.mcap",
    ]
    assert numbers(kept) == list(range(30, 40))
    information = yaml.safe_load((tmp_path / "some" / "metadata.yaml").read_text())
    information = information["rosbag2_bagfile_information"]
    assert information["message_count"] == 10
    assert information["relative_file_paths"] == ["some_6.mcap", "some_7.mcap"]
    assert information["starting_time"]["nanoseconds_since_epoch"] == 31


def test_a_bag_is_not_written_over(tmp_path: Path) -> None:
    write_scenes(tmp_path / "bag")
    with pytest.raises(RecordingError, match="bag is there already.*--output"):
        BagWriter(tmp_path / "bag")


# --- recordings that are damaged ------------------------------------------------------------------


def small_chunks(folder: Path, count: int = 5) -> Path:
    """A bag of which each message is a chunk."""
    bag = BagWriter(folder)
    bag.add_topic(topic("/image_raw", IMAGE))
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), np.uint8)
        data = serialize_message(to_image(pixels, "rgb8", header(number)))
        bag.write("/image_raw", data, number + 1, number + 1)
        bag.flush()
    bag.close()
    return folder / f"{folder.name}_0.mcap"


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_what_is_there_of_a_cut_file_is_read_and_can_be_saved(tmp_path: Path, share: float) -> None:
    file = small_chunks(tmp_path / "bag")
    (tmp_path / "cut.mcap").write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    bag = Bag(tmp_path / "cut.mcap")
    read = [entry.log_time for entry in bag.entries()]
    assert read == list(range(1, len(read) + 1)) and 1 <= len(read) < 5
    (problem,) = bag.problems
    assert "cut.mcap is cut short" in problem and f"{len(read)} messages can be read" in problem

    result = command("replay", tmp_path / "cut.mcap", "--repair", tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    assert "cut short" in result.stderr
    saved = Bag(tmp_path / "whole")
    assert not saved.problems
    assert [e.data for e in saved.entries()] == [e.data for e in bag.entries()]


def test_a_damaged_part_is_told_of_and_the_rest_can_be_saved(tmp_path: Path) -> None:
    file = small_chunks(tmp_path / "bag")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(content)
    bag = Bag(tmp_path / "bag")
    with pytest.raises(RecordingError, match=r"bag_0.mcap is damaged.*--repair"):
        list(bag.entries())
    saved = [entry.log_time for entry in bag.salvage()]
    assert len(saved) == 4 and {1, 2, 4, 5} <= set(saved)
    assert "1 chunks are damaged" in bag.problems[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"SQLite format 3\0" + bytes(100), "is not an MCAP file"),
        (b"\x89MCAP0\r\n", "is cut short"),
        (b"\x89MCAP0\r\n" + b"\xff" * 64, "is cut short or damaged"),
    ],
)
def test_what_is_no_recording_is_refused_by_name(
    tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "thing.mcap"
    file.write_bytes(content)
    with pytest.raises(RecordingError, match=f"thing.mcap {words}"):
        Bag(file)


def test_a_recording_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"there is no .*gone.mcap"):
        Bag(tmp_path / "gone.mcap")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RecordingError, match=r"no .mcap file \(notes.txt\)"):
        Bag(tmp_path)


def test_damage_of_any_kind_ends_in_one_kind_of_error(tmp_path: Path) -> None:
    content = small_chunks(tmp_path / "bag", 3).read_bytes()
    rng = np.random.default_rng(0)
    file = tmp_path / "damaged.mcap"
    readable = 0
    for number in range(150):
        damaged = bytearray(content)
        if number % 3 == 0:
            del damaged[rng.integers(len(damaged)) :]
        else:
            at = rng.integers(8, len(damaged) - 8)
            damaged[at : at + 8] = rng.bytes(8)
        file.write_bytes(damaged)
        with contextlib.suppress(RecordingError):
            bag = Bag(file)
            readable += bool(list(bag.salvage()))
            list(bag.entries())
    assert readable > 50


# --- recording over DDS ---------------------------------------------------------------------------


def test_what_is_published_is_recorded_byte_for_byte(ros: Any, start: Any, tmp_path: Path) -> None:
    latched = QoSProfile(depth=5, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    best_effort = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
    # Told before the recorder is there, and heard of nevertheless.
    picks = ros.node.create_publisher(String, "line1/picks", latched)
    picks.publish(String(data="early"))
    camera = ros.node.create_publisher(Image, "line1/image_raw", best_effort)
    items = ros.node.create_publisher(WasteItemArray, "line1/items", 10)
    ros.node.create_publisher(String, "line1/other", 10)
    process = start("record", "--namespace", "line1", "--output", "bag")
    wait_for_subscribers(ros, picks, camera, items)
    array = WasteItemArray(header=header(1), items=[WasteItem(track_id=3)])
    images = [to_image(scene(k)[0], "rgb8", header(k)) for k in range(3)]
    for image in images:
        camera.publish(image)
        items.publish(array)
        ros.spin_until(lambda: False, 0.1)
    ros.spin_until(lambda: False, 0.3)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    assert "/line1/image_raw 3" in output

    bag = Bag(tmp_path / "bag")
    assert not bag.problems
    assert bag.counts == {"/line1/image_raw": 3, "/line1/items": 3, "/line1/picks": 1}
    heard: dict[str, list[bytes]] = {}
    for entry in bag.entries():
        heard.setdefault(entry.topic, []).append(entry.data)
        assert abs(entry.log_time - time.time_ns()) < 120 * SECOND
        assert entry.publish_time <= entry.log_time
    assert [deserialize_message(d, Image) for d in heard["/line1/image_raw"]] == images
    assert deserialize_message(heard["/line1/items"][0], WasteItemArray) == array
    assert deserialize_message(heard["/line1/picks"][0], String).data == "early"
    (offer,) = bag.topics["/line1/picks"].qos
    assert (offer["durability"], offer["reliability"]) == ("transient_local", "reliable")
    assert bag.topics["/line1/image_raw"].qos[0]["reliability"] == "best_effort"
    assert bag.topics["/line1/items"].type_hash.startswith("RIHS01_")


def test_a_recorder_that_is_killed_leaves_what_it_had(ros: Any, start: Any, tmp_path: Path) -> None:
    words = ros.node.create_publisher(String, "word", 10)
    process = start("record", "--topics", "word", "--output", "bag")
    wait_for_subscribers(ros, words)
    sent: list[float] = []

    def written() -> bool:
        words.publish(String(data=str(len(sent))))
        sent.append(time.monotonic())
        ros.spin_until(lambda: False, 0.05)
        return sent[-1] - sent[0] > 4

    assert ros.spin_until(written, 10)
    process.kill()
    killed = time.monotonic()
    process.wait(10)
    assert not (tmp_path / "bag" / "metadata.yaml").exists()
    bag = Bag(tmp_path / "bag")
    assert "cut short" in bag.problems[0]
    read = [int(deserialize_message(entry.data, String).data) for entry in bag.entries()]
    # A second may be lost, and here another for a machine that is busy.
    assert read == list(range(len(read)))
    assert len(read) >= sum(at < killed - 2 for at in sent) > 10


def test_a_publisher_that_offers_less_is_recorded_too(ros: Any, start: Any, tmp_path: Path) -> None:
    first = ros.node.create_publisher(String, "word", 10)
    process = start("record", "--topics", "word", "--output", "bag")
    wait_for_subscribers(ros, first)
    second = ros.node.create_publisher(
        String, "word", QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
    )
    wait_for_subscribers(ros, first, second)
    for number in range(20):
        second.publish(String(data="second"))
        first.publish(String(data=f"first {number}"))
        ros.spin_until(lambda: False, 0.02)
    ros.spin_until(lambda: False, 0.3)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    read = [deserialize_message(e.data, String).data for e in Bag(tmp_path / "bag").entries()]
    assert "second" in read and any(word.startswith("first") for word in read)


def test_compressed_images_are_recorded_where_there_are_no_others() -> None:
    raw, compressed = "/cam/image", "/cam/image/compressed"

    def takes(images: str, name: str, *there: str) -> bool:
        return record.Selection(("/cam/items",), raw, images).takes(name, there)

    assert takes("auto", raw, raw, compressed) and not takes("auto", compressed, raw, compressed)
    assert takes("auto", compressed, compressed)
    assert takes("both", raw, raw, compressed) and takes("both", compressed, raw, compressed)
    assert takes("compressed", compressed, raw, compressed)
    assert not takes("compressed", raw, raw, compressed)
    assert not takes("none", raw, raw) and takes("none", "/cam/items", raw)


def test_a_disk_that_is_full_ends_the_recording_with_what_it_had(
    ros: Any, start: Any, tmp_path: Path
) -> None:
    images = ros.node.create_publisher(Image, "image_raw", 10)
    limit = ("bash", "-c", 'ulimit -f 300; exec "$0" "$@"')  # of 1 kB: no file may be larger
    process = start("record", "--compression", "none", "--output", "bag", before=limit)
    wait_for_subscribers(ros, images)
    message = to_image(scene(0)[0], "rgb8", header(0))

    def ended() -> bool:
        images.publish(message)
        ros.spin_until(lambda: False, 0.1)
        return process.poll() is not None

    assert ros.spin_until(ended, 30)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 1
    assert "File too large" in output and "--repair" in output and "Traceback" not in output
    bag = Bag(tmp_path / "bag")
    assert "cut short" in bag.problems[0]
    assert {deserialize_message(e.data, Image) == message for e in bag.entries()} == {True}


def test_nothing_to_record_is_told_with_what_there_is(ros: Any, start: Any) -> None:
    elsewhere = ros.node.create_publisher(String, "elsewhere", 10)
    process = start("record", "--topics", "word", "elsewhere", "--output", "bag")
    wait_for_subscribers(ros, elsewhere)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 1
    assert "nothing came" in output and "/elsewhere" in output and "waste-seg doctor" in output


def test_record_refuses_options_that_cannot_be(tmp_path: Path) -> None:
    assert command("record", "--keep", 2).returncode == 2
    result = command("record", "--output", tmp_path)
    assert result.returncode == 1 and "is there already" in result.stderr


# --- playing --------------------------------------------------------------------------------------


def test_a_recording_is_played_in_its_pace_with_its_qos(
    ros: Any, start: Any, tmp_path: Path
) -> None:
    latched = record.qos_record(QoSProfile(depth=5, durability=DurabilityPolicy.TRANSIENT_LOCAL))
    bag = BagWriter(tmp_path / "bag")
    bag.add_topic(topic("/word", "std_msgs/msg/String"))
    bag.add_topic(topic("/latched", "std_msgs/msg/String", qos=(latched,)))
    begin = 1000 * SECOND
    bag.write("/latched", serialize_message(String(data="kept")), begin, begin)
    for number in range(5):
        at = begin + number * SECOND
        bag.write("/word", serialize_message(String(data=str(number))), at, at)
    bag.close()
    arrived: list[tuple[float, str]] = []
    clock: list[float] = []
    ros.node.create_subscription(
        String, "told", lambda m: arrived.append((time.monotonic(), m.data)), 10
    )
    ros.node.create_subscription(
        Clock, "/clock", lambda m: clock.append(m.clock.sec + m.clock.nanosec * 1e-9), 50
    )
    kept = ros.collect(
        String, "latched", QoSProfile(depth=5, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    )
    process = start(
        "replay", tmp_path / "bag", "--rate", 4, "--clock", 50, "--wait", 20,
        "--remap", "/word:=/told",
    )  # fmt: skip
    assert ros.spin_until(lambda: len(arrived) == 5 and kept, 40)
    assert [data for _, data in arrived] == list("01234")
    assert kept[0].data == "kept"
    # Four recorded seconds at four times the pace; the machine may be late, but never early.
    assert 0.8 < arrived[-1][0] - arrived[0][0] < 3.0
    assert clock == sorted(clock) and clock[0] >= 1000 and 1002 < clock[-1] < 1005
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 0 and "6 messages sent" in output


def test_a_recording_is_played_over_and_over_until_ctrl_c(
    ros: Any, start: Any, tmp_path: Path
) -> None:
    write_scenes(tmp_path / "bag", truth=False)
    images = ros.collect(Image, "image_raw", 50)
    process = start("replay", tmp_path / "bag", "--loop", "--topics", "image_raw", "--wait", 20)
    assert ros.spin_until(lambda: len(images) >= 7, 40)
    assert [image.header.stamp.sec for image in images[:6]] == [100, 101, 102] * 2
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 0, output
    assert "/camera_info" not in output


def test_topics_that_are_not_there_are_named(tmp_path: Path) -> None:
    write_scenes(tmp_path / "bag")
    bag = Bag(tmp_path / "bag")
    assert replay.chosen(bag, ["truth/*"]) == {"/truth/labels", "/truth/instances"}
    with pytest.raises(RecordingError, match=r"has no \*/speed; it has /camera_info"):
        replay.chosen(bag, ["speed"])


# --- the perception on a recording ----------------------------------------------------------------


def offline(colour_bundles: Path, recording: Path, *more: object) -> Any:
    return command(
        "replay", recording, "--offline", "--model", colour_bundles / "colours",
        "--backend", "onnxruntime", *more,
    )  # fmt: skip


def test_a_recording_is_measured_against_its_truth(colour_bundles: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "bag")
    result = offline(
        colour_bundles, tmp_path / "bag", "--json", tmp_path / "figures.json",
        "--output", tmp_path / "items",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["frames"], figures["images"], figures["items_seen"]) == (3, 3, 6)
    assert figures["miou"] == pytest.approx(1.0, abs=0.02)
    assert figures["pq"] == pytest.approx(1.0, abs=0.02)
    assert figures["item_recall"] == 1.0
    assert "item recall" in result.stdout and "mIoU" in result.stdout

    written = Bag(tmp_path / "items")
    assert written.counts == {"/items": 3}
    arrays = [deserialize_message(e.data, WasteItemArray) for e in written.entries()]
    assert [array.header.stamp.sec for array in arrays] == [100, 101, 102]
    assert [e.log_time for e in written.entries()] == [
        e.log_time for e in Bag(tmp_path / "bag").entries({"/image_raw"})
    ]
    by_class = {item.class_id: item for item in arrays[0].items}
    assert set(by_class) == {"paper", "bottle"}
    # Of the recorded camera_info: 200 px of focal length, 1 m away.
    assert by_class["paper"].length == pytest.approx(0.2, abs=0.01)
    assert by_class["paper"].pose.pose.position.x == pytest.approx((35.5 - 79.5) / 200, abs=0.005)


def test_wrong_predictions_are_measured_as_such(colour_bundles: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "bag")
    result = offline(
        colour_bundles, tmp_path / "bag", "--model", colour_bundles / "shifted",
        "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    # All items are there, and all of the wrong class.
    assert figures["item_recall"] == 1.0 and figures["item_naming"] == 0.0
    assert figures["pq"] == 0.0


def test_measuring_takes_no_ros(colour_bundles: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "bag")
    script = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('rclpy', 'sensor_msgs', 'std_msgs') or name == "
        "'waste_seg_ros.msg':\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "from waste_seg_ros import cli\n"
        f"sys.exit(cli.main(['replay', {str(tmp_path / 'bag')!r}, '--offline', '--model', "
        f"{str(colour_bundles / 'colours')!r}, '--backend', 'onnxruntime'] + sys.argv[1:]))\n"
    )
    run = [sys.executable, "-c", script]
    result = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "3 frames, 6 items" in result.stdout
    # Only to write items takes it.
    run += ["--output", str(tmp_path / "items")]
    result = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "waste_seg_ros" in result.stderr


def test_a_recording_without_truth_is_worked_on_all_the_same(
    colour_bundles: Path, tmp_path: Path
) -> None:
    write_scenes(tmp_path / "bag", truth=False)
    result = offline(colour_bundles, tmp_path / "bag")
    assert result.returncode == 0, result.stderr
    assert "3 images of /image_raw, 6 items" in result.stdout
    assert "no truth in the recording" in result.stdout


def test_compressed_images_are_read(colour_bundles: Path, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    pytest.importorskip("cv_bridge")
    bag = BagWriter(tmp_path / "bag")
    bag.add_topic(topic("/image_raw/compressed", "sensor_msgs/msg/CompressedImage"))
    png = cv2.imencode(".png", np.ascontiguousarray(scene(0)[0][..., ::-1]))[1].tobytes()
    message = CompressedImage(header=header(0), format="rgb8; png compressed bgr8", data=png)
    bag.write("/image_raw/compressed", serialize_message(message), 1, 1)
    bag.close()
    result = offline(colour_bundles, tmp_path / "bag")
    assert result.returncode == 0, result.stderr
    assert "1 images of /image_raw/compressed, 2 items" in result.stdout


def test_an_unknown_encoding_is_told_of_with_those_known(
    colour_bundles: Path, tmp_path: Path
) -> None:
    write_scenes(tmp_path / "bag", encoding="rgb10")
    result = offline(colour_bundles, tmp_path / "bag")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "/image_raw" in line and "'rgb10' is not supported" in line and "bgr8" in line


def test_image_topics_are_found_or_those_there_are_named(tmp_path: Path) -> None:
    bag = BagWriter(tmp_path / "bag")
    bag.add_topic(topic("/a/mask", IMAGE))
    bag.write("/a/mask", serialize_message(to_image(scene(0)[1], "mono8", header(0))), 1, 1)
    bag.close()
    with pytest.raises(RecordingError, match=r"no topic with a camera's images; it has /a/mask"):
        replay.find_inputs(Bag(tmp_path / "bag"))
    with pytest.raises(RecordingError, match=r"no images on /b, but on /a/mask"):
        replay.find_inputs(Bag(tmp_path / "bag"), "b")
    assert replay.find_inputs(Bag(tmp_path / "bag"), "a/mask").image == "/a/mask"

    bag = BagWriter(tmp_path / "two")
    for name in ("/left/image_raw", "/right/image_raw", "/right/image_raw/compressed"):
        kind = "sensor_msgs/msg/" + ("CompressedImage" if name.endswith("ed") else "Image")
        bag.add_topic(topic(name, kind))
        bag.write(name, serialize_message(CompressedImage()), 1, 1)
    bag.close()
    with pytest.raises(RecordingError, match=r"/left/image_raw, /right/image_raw: choose one"):
        replay.find_inputs(Bag(tmp_path / "two"))


def test_parameters_of_the_segmenter_are_taken_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "line.yaml"
    file.write_text("/**/segmenter:\n  ros__parameters: {min_area: 7}\n")
    values = replay.segmenter_parameters(file)
    assert values["min_area"] == 7 and values["backend"] == "auto"
    file.write_text("- 1\n")
    with pytest.raises(RecordingError, match=r"line.yaml is not a file of ROS parameters"):
        replay.segmenter_parameters(file)
