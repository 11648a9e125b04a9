"""The demo and the watch node: the whole graph as processes over DDS, judged by its summary."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (source its setup file, or use ./sorter test)")

from rclpy.qos import QoSProfile
from std_msgs.msg import Header

from waste_seg_ros.msg import StageLatency, WasteItem, WasteItemArray

# What the shipped bundle enet-instance must reach on seed 1000, which it was not trained on.
LEAST_MIOU = 0.6
LEAST_RECALL = 0.85


def start_demo(tmp_path, *arguments, **options):
    command = [sys.executable, "-m", "waste_seg_ros.cli", "demo", "--output", tmp_path / "out"]
    return subprocess.Popen(
        [str(part) for part in (*command, *arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
        **options,
    )


def finish(process, timeout=240):
    """Wait for it; returns what it printed. Nothing that it started may be left."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    left = [p for p in psutil.process_iter(["cmdline"]) if started_here(p)]
    assert not left
    return output


def started_here(process):
    try:
        domain = process.environ().get("ROS_DOMAIN_ID")
        return domain == os.environ["ROS_DOMAIN_ID"] and any(
            "waste_seg_ros.nodes" in part for part in process.info["cmdline"] or ()
        )
    except psutil.Error:
        return False


def summary_of(tmp_path):
    return json.loads((tmp_path / "out" / "summary.json").read_text())


def test_shipped_weights_on_the_synthetic_line(tmp_path):
    # Slow enough that every picture is served, on a busy machine too: here only quality counts.
    demo = start_demo(tmp_path, "--frames", 40, "--rate", 2, "--seed", 1000)
    output = finish(demo)
    assert demo.returncode == 0, output
    summary = summary_of(tmp_path)
    truth = summary["truth"]
    assert summary["model"] == "enet-instance" and summary["head"] == "instance"
    assert truth["frames"] >= 15
    assert truth["items"]["found"] + truth["items"]["missed"] >= 100
    assert truth["miou"] >= LEAST_MIOU, output
    assert truth["item_recall"] >= LEAST_RECALL, output
    assert f"mIoU {truth['miou']:.3f}" in output

    film = cv2.VideoCapture(str(tmp_path / "out" / "overlay.mp4"))
    assert (film.get(cv2.CAP_PROP_FRAME_WIDTH), film.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (640, 480)
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) >= 15
    last = cv2.imread(str(tmp_path / "out" / "last.png"))
    assert last.shape == (480, 640, 3)
    contact = cv2.imread(str(tmp_path / "out" / "contact.png"))
    assert contact.shape[0] > 2 * 480 and contact.shape[1] > 3 * 640


def test_arms_pick_on_the_synthetic_line(tmp_path):
    demo = start_demo(tmp_path, "--frames", 50, "--rate", 4, "--seed", 1000, "--arms", 2)
    output = finish(demo)
    assert demo.returncode == 0, output
    arms = summary_of(tmp_path)["arms"]
    assert set(arms["by_arm"]) == {"arm_1", "arm_2"}
    assert arms["right"] >= 1 and arms["right"] > arms["wrong"], output
    assert arms["right"] + arms["wrong"] + arms["missed"] <= arms["orders"]
    assert arms["items_ordered_twice"] == 0
    assert arms["purity"] == arms["right"] / (arms["right"] + arms["wrong"])
    for result in ("right", "wrong", "missed"):
        assert arms[result] == sum(arm[result] for arm in arms["by_arm"].values())
        assert arms[result] == sum(kind[result] for kind in arms["by_class"].values())
    assert 0 < arms["of_them_ordered"] <= arms["items_that_came"]
    assert f"purity {arms['purity']:.2f}" in output


def test_arms_need_a_line_whose_truth_is_known(tmp_path):
    demo = start_demo(tmp_path, "--source", tmp_path, "--arms", 1)
    assert "--arms needs the synthetic line" in finish(demo)
    assert demo.returncode == 2


# --- with a network whose answers are known -------------------------------------------------------


@pytest.fixture
def photographs(tmp_path):
    """A folder of pictures of red and green cards, with their annotations beside it."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "non-contamination"}]}
    for number in range(6):
        picture = np.full((120, 160, 3), 30, np.uint8)
        boxes = [(20 + 10 * number, 20, 30, 20), (60, 70, 40, 30)]
        for (x, y, width, height), colour in zip(boxes, ((200, 0, 0), (0, 200, 0)), strict=True):
            picture[y : y + height, x : x + width] = colour
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "segmentation": [corners],
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        name = f"photo_{number}.png"
        assert cv2.imwrite(str(folder / name), picture[:, :, ::-1])
        coco["images"].append({"id": number, "file_name": name, "width": 160, "height": 120})
    (tmp_path / "annotations.json").write_text(json.dumps(coco))
    return folder


def test_annotated_photographs_once_through(tmp_path, photographs, colour_bundles):
    demo = start_demo(
        tmp_path, "--source", photographs, "--model", colour_bundles / "colours", "--rate", 4
    )
    output = finish(demo)
    assert demo.returncode == 0, output
    summary = summary_of(tmp_path)
    assert summary["frames"]["published"] == summary["frames"]["served"] == 6
    assert summary["items_seen"] == {"paper": 6, "bottle": 6}
    truth = summary["truth"]
    assert truth["frames"] == 6
    assert truth["items"] == {"found": 12, "missed": 0, "false": 0}
    assert truth["item_recall"] == truth["item_precision"] == 1.0
    assert truth["binary_iou"] > 0.93  # which pixels a polygon's edge takes
    assert "miou" not in truth  # the annotations' classes are not the network's
    assert summary["latency_ms"]["p50"] <= summary["latency_ms"]["p99"]


def test_photographs_without_annotations(tmp_path, photographs, colour_bundles):
    (tmp_path / "annotations.json").rename(tmp_path / "elsewhere.json")
    model = colour_bundles / "colours"
    demo = start_demo(tmp_path, "--source", photographs, "--model", model, "--frames", 9)
    output = finish(demo)
    assert demo.returncode == 0, output
    summary = summary_of(tmp_path)
    assert summary["frames"]["published"] == 9  # from the start again
    assert "truth" not in summary
    assert "not known for this source" in output
    truth = ["--truth", tmp_path / "elsewhere.json"]
    demo = start_demo(tmp_path, "--source", photographs, "--model", model, "--rate", 4, *truth)
    output = finish(demo)
    assert demo.returncode == 0, output
    # Three in each of four pictures, of which a busy machine may drop one.
    items = summary_of(tmp_path)["truth"]["items"]
    assert items["missed"] == items["false"] == 0 and 9 <= items["found"] <= 12


def test_head_of_the_command_line_is_used(tmp_path, photographs, colour_bundles):
    model = colour_bundles / "colours"
    demo = start_demo(tmp_path, "--source", photographs, "--model", model, "--head", "binary")
    output = finish(demo)
    assert demo.returncode == 0, output
    assert summary_of(tmp_path)["items_seen"].keys() == {"item"}


def test_keeps_running_until_interrupted_and_sums_up(tmp_path, photographs, colour_bundles):
    model = colour_bundles / "colours"
    demo = start_demo(tmp_path, "--source", photographs, "--model", model, "--keep-running")
    # More pictures than there are, said by the line a second that it prints.
    lines = []
    for line in demo.stdout:
        lines.append(line)
        if (match := re.search(r"(\d+) images,", line)) and int(match[1]) > 8:
            break
    demo.send_signal(signal.SIGINT)
    output = "".join(lines) + finish(demo)
    assert demo.returncode == 0, output
    assert summary_of(tmp_path)["frames"]["served"] > 8
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "nonesuch"], ["nonesuch", "model"]),
        (["--source", "/nowhere"], ["camera", "exit code 1", "there is no '/nowhere'"]),
        (["--rate", "0"], ["--rate"]),
        (["--frames", "0"], ["--frames"]),
        (["--truth", "a.json"], ["--truth", "folder of images"]),
        (["--source", ".", "--truth", "a.json"], ["--truth", "a.json"]),
    ],
)
def test_what_cannot_run_ends_with_the_reason(tmp_path, colour_bundles, arguments, words):
    if "--model" not in arguments:
        arguments = [*arguments, "--model", colour_bundles / "colours"]
    demo = start_demo(tmp_path, *arguments)
    output = finish(demo)
    assert demo.returncode not in (0, None)
    for word in words:
        assert word in output
    assert "Traceback" not in output


def test_a_node_that_dies_ends_the_demo(tmp_path, colour_bundles):
    demo = start_demo(tmp_path, "--model", colour_bundles / "colours", "--keep-running")
    for line in demo.stdout:
        if re.search(r"[1-9]\d* images,", line):
            break
    for process in psutil.Process(demo.pid).children(recursive=True):
        if "waste_seg_ros.nodes.segmenter" in process.cmdline():
            process.kill()
    output = finish(demo)
    assert demo.returncode == 1
    assert "segmenter ended with exit code 137" in output


# --- watch ----------------------------------------------------------------------------------------


def array(ros):
    item = WasteItem(track_id=5, class_id="bottle", score=0.875, length=0.2, width=0.1)
    item.pose.pose.position.x, item.pose.pose.position.y = 0.123, -0.045
    item.reason = "truncated by the image border"
    header = Header(stamp=ros.node.get_clock().now().to_msg())
    return WasteItemArray(header=header, model="enet", items=[item], latency=StageLatency())


def test_watch_prints_lines_where_there_is_no_terminal(ros, start_node):
    publisher = ros.node.create_publisher(WasteItemArray, "line1/items", QoSProfile(depth=10))
    node = start_node("watch", namespace="line1")

    def shown():
        publisher.publish(array(ros))
        ros.spin_until(lambda: False, 0.1)
        return "bottle (+123, -45) 0.88" in node.output()

    assert ros.spin_until(shown), node.output()
    assert re.search(r"images/s +latency p50 \d+ ms, p99 \d+ ms", node.output())
    assert node.stop() == 0
    assert "Traceback" not in node.output()


def test_watch_draws_a_table_on_a_terminal(ros):
    publisher = ros.node.create_publisher(WasteItemArray, "items", QoSProfile(depth=10))
    ours, theirs = pty.openpty()
    node = subprocess.Popen(
        [sys.executable, "-m", "waste_seg_ros.nodes.watch"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    seen = b""

    def shown():
        nonlocal seen
        publisher.publish(array(ros))
        ros.spin_until(lambda: False, 0.1)
        with contextlib.suppress(BlockingIOError):
            seen += os.read(ours, 1 << 16)
        text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen).decode(errors="replace")
        row = r"5 +│ bottle +│ +\+123 │ +-45 │ +200 x 100 │ +0\.8[78] │ truncated by"
        return re.search(row, text)

    try:
        assert ros.spin_until(shown), seen.decode(errors="replace")[-3000:]
        node.send_signal(signal.SIGINT)
        end = time.monotonic() + 10
        while node.poll() is None and time.monotonic() < end:
            try:
                os.read(ours, 1 << 16)
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # the other side is closed
                break
        assert node.wait(10) == 0
    finally:
        node.kill()
        os.close(ours)


def test_output_folder_is_named_and_made(tmp_path, photographs, colour_bundles):
    """The default one lies where the command is run."""
    command = [sys.executable, "-m", "waste_seg_ros.cli", "demo", "--source", str(photographs)]
    command += ["--model", str(colour_bundles / "colours"), "--frames", "3"]
    demo = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert demo.returncode == 0, demo.stderr
    folder = Path(tmp_path / "sorter-demo")
    names = {"contact.png", "last.png", "nodes.log", "overlay.mp4", "summary.json"}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert name in demo.stdout
