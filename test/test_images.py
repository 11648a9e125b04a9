"""Image messages to RGB: every format against pixels worked out by hand."""

import array
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from waste_seg_ros.nodes.images import ENCODINGS, MAX_PIXELS, ImageError, to_array, to_rgb


def image(encoding, width, height, data, step=None, big_endian=0):
    """A message by its fields; the default step has no padding."""
    data = bytes(data)
    return SimpleNamespace(
        encoding=encoding,
        width=width,
        height=height,
        step=len(data) // height if step is None else step,
        is_bigendian=big_endian,
        data=array.array("B", data),
    )


RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (7, 7, 7)

# encoding -> bytes of one row of the two pixels (10, 20, 30) and (40, 50, 60)
COLOUR_ROWS = {
    "rgb8": [10, 20, 30, 40, 50, 60],
    "bgr8": [30, 20, 10, 60, 50, 40],
    "8UC3": [30, 20, 10, 60, 50, 40],
    "rgba8": [10, 20, 30, 255, 40, 50, 60, 0],
    "bgra8": [30, 20, 10, 255, 60, 50, 40, 0],
}


@pytest.mark.parametrize("encoding", COLOUR_ROWS)
@pytest.mark.parametrize("padding", [0, 1, 5])
def test_colour_orders_with_row_padding(encoding, padding):
    row = COLOUR_ROWS[encoding] + [99] * padding
    rgb = to_rgb(image(encoding, 2, 2, row * 2))
    assert rgb.dtype == np.uint8
    assert rgb.tolist() == [[[10, 20, 30], [40, 50, 60]]] * 2


@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
@pytest.mark.parametrize("padding", [0, 3])
def test_grey_is_read_alike_as_mono8_and_8uc1(encoding, padding):
    """8UC1 was refused where mono8 was expected (vision_opencv 175)."""
    row = [0, 7, 255] + [99] * padding
    rgb = to_rgb(image(encoding, 3, 2, row * 2))
    assert rgb.tolist() == [[[0, 0, 0], list(GREY), list(WHITE)]] * 2


@pytest.mark.parametrize("encoding", ["mono16", "16UC1"])
@pytest.mark.parametrize("big_endian", [0, 1])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_sixteen_bits_keep_their_high_byte(encoding, big_endian, padding):
    """mono16 read as 8 bits kept the low byte, or took each value for two pixels
    (vision_opencv 255)."""
    values = [0x0000, 0x00FF, 0x07F3, 0xFFFF, 0x8000]
    row = b"".join(v.to_bytes(2, "big" if big_endian else "little") for v in values)
    row += b"\x63" * padding
    rgb = to_rgb(image(encoding, 5, 2, row * 2, big_endian=big_endian))
    assert rgb.shape == (2, 5, 3)
    for channel in range(3):
        assert rgb[:, :, channel].tolist() == [[0x00, 0x00, 0x07, 0xFF, 0x80]] * 2


def test_big_endian_flag_does_not_touch_eight_bit_images():
    rgb = to_rgb(image("bgr8", 2, 1, COLOUR_ROWS["bgr8"], big_endian=1))
    assert rgb.tolist() == [[[10, 20, 30], [40, 50, 60]]]


# What the four cells of the pattern's top left 2x2 block see.
BAYER = {
    "bayer_rggb8": ("RG", "GB"),
    "bayer_bggr8": ("BG", "GR"),
    "bayer_gbrg8": ("GB", "RG"),
    "bayer_grbg8": ("GR", "BG"),
}


@pytest.mark.parametrize("encoding", BAYER)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("colour", [(200, 90, 30), RED, GREEN, BLUE])
def test_bayer_pattern_of_an_even_colour_gives_that_colour(encoding, padding, colour):
    """A surface of one colour: each cell measures its own channel and the rest is filled in.
    A pattern shifted by one cell, as OpenCV's own names are, would swap red and blue."""
    level = dict(zip("RGB", colour, strict=True))
    rows = [bytes([level[cell] for cell in row * 4] + [99] * padding) for row in BAYER[encoding]]
    rgb = to_rgb(image(encoding, 8, 6, b"".join(rows * 3)))
    assert rgb.shape == (6, 8, 3)
    assert (rgb == colour).all()


@pytest.mark.parametrize("encoding", BAYER)
def test_bayer_keeps_measured_values_in_place(encoding):
    """One bright cell in a dark picture stays in its own pixel and its own channel."""
    raw = np.zeros((8, 8), np.uint8)
    raw[4, 4] = 200  # even row, even column: the first cell of the pattern
    rgb = to_rgb(image(encoding, 8, 8, raw.tobytes()))
    channel = "RGB".index(BAYER[encoding][0][0])
    assert rgb[4, 4, channel] == 200
    assert rgb[:, :, channel].max() == 200
    assert not rgb[:, :, [c for c in range(3) if c != channel]].any()


# BT.601 limited range, by its formula: luma and chroma of full red, green, blue; and of white.
YUV = {RED: (81, 90, 240), GREEN: (145, 54, 34), BLUE: (41, 240, 110), WHITE: (235, 128, 128)}


def yuv_pair(order, first, second, u, v):
    return [{"y": first, "z": second, "u": u, "v": v}[c] for c in order]


@pytest.mark.parametrize(
    "encoding, order",
    [("yuv422", "uyvz"), ("uyvy", "uyvz"), ("yuv422_yuy2", "yuzv"), ("yuyv", "yuzv")],
)
@pytest.mark.parametrize("padding", [0, 6])
def test_yuv_byte_orders(encoding, order, padding):
    for colour, (y, u, v) in YUV.items():
        row = yuv_pair(order, y, y, u, v) * 2 + [99] * padding
        rgb = to_rgb(image(encoding, 4, 2, row * 2)).astype(int)
        assert rgb.shape == (2, 4, 3)
        assert np.abs(rgb - colour).max() <= 3, colour  # the coefficients are rounded
    # The two pixels of a pair have their own brightness, in this order.
    dark_light = to_rgb(image(encoding, 2, 2, yuv_pair(order, 16, 235, 128, 128) * 2))
    assert dark_light.tolist() == [[[0, 0, 0], [255, 255, 255]]] * 2


@pytest.mark.parametrize("encoding, order", [("uyvy", "uyvz"), ("yuyv", "yuzv")])
def test_yuv_of_odd_width_ends_within_a_pair(encoding, order):
    row = yuv_pair(order, 235, 235, 128, 128) + yuv_pair(order, 81, 99, 90, 240)
    rgb = to_rgb(image(encoding, 3, 2, row * 2)).astype(int)
    assert rgb.shape == (2, 3, 3)
    assert np.abs(rgb[:, 2] - RED).max() <= 3
    with pytest.raises(ImageError, match="even width"):
        to_rgb(image(encoding, 3, 2, row[:6] * 2))


def test_rgb8_is_not_copied():
    message = image("rgb8", 2, 1, COLOUR_ROWS["rgb8"])
    rgb = to_rgb(message)
    assert np.shares_memory(rgb, np.frombuffer(message.data, np.uint8))
    assert not rgb.flags.writeable


def test_reading_an_image_as_what_it_already_is():
    """Asking for the encoding that the image has already raised (rospypi/simple 11)."""
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    assert (to_rgb(image("rgb8", 6, 4, pixels.tobytes())) == pixels).all()


def test_raw_view_keeps_ids():
    values = [1, 300, 65535]
    for big_endian, order in ((0, "little"), (1, "big")):
        data = b"".join(v.to_bytes(2, order) for v in values)
        ids = to_array(image("16UC1", 3, 1, data, big_endian=big_endian))
        assert ids.tolist() == [values]
    assert to_array(image("mono8", 2, 2, [1, 2, 99, 3, 4, 99], step=3)).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("make", [bytes, bytearray, lambda d: np.frombuffer(bytes(d), np.uint8)])
def test_any_buffer_may_hold_the_data(make):
    message = image("bgr8", 2, 1, COLOUR_ROWS["bgr8"])
    message.data = make(message.data)
    assert to_rgb(message).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(encoding="bayer_rggb16"), ["'bayer_rggb16'", "rgb8", "yuyv"]),
        (dict(encoding=""), ["encoding is empty", "rgb8"]),
        (dict(width=0), ["0x2", "no pixels"]),
        (dict(height=0), ["2x0", "no pixels"]),
        (dict(step=5), ["step is 5", "6 bytes a row", "padding"]),
        (dict(data=array.array("B", bytes(11))), ["12 bytes", "holds 11", "cut short"]),
        (dict(data=array.array("B")), ["12 bytes", "holds 0"]),
        (dict(width=MAX_PIXELS, step=3 * MAX_PIXELS), ["100 megapixels"]),
    ],
)
def test_inconsistent_messages_say_what_is_wrong_and_the_mend(fields, words):
    message = image("rgb8", 2, 2, bytes(12))
    for name, value in fields.items():
        setattr(message, name, value)
    with pytest.raises(ImageError) as caught:
        to_rgb(message)
    for word in words:
        assert word in str(caught.value)


def test_every_listed_encoding_is_tested_here():
    tested = {*COLOUR_ROWS, "mono8", "8UC1", "mono16", "16UC1", *BAYER}
    tested |= {"yuv422", "uyvy", "yuv422_yuy2", "yuyv"}
    assert tested == set(ENCODINGS)


def test_images_survive_the_way_through_a_message():
    messages = pytest.importorskip("sensor_msgs.msg", reason="needs ROS 2's sensor_msgs")
    from std_msgs.msg import Header

    from waste_seg_ros.nodes.images import to_image

    header = Header(frame_id="camera")
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    ids = np.array([[0, 1], [300, 65535]], np.uint16)
    message = to_image(rgb[:, ::-1], "rgb8", header)  # not contiguous
    assert isinstance(message, messages.Image)
    assert (message.width, message.height, message.step) == (7, 5, 21)
    assert message.header.frame_id == "camera"
    assert (to_rgb(message) == rgb[:, ::-1]).all()
    assert (to_array(to_image(ids, "16UC1", header)) == ids).all()
    for pixels, encoding in [(rgb, "mono8"), (ids, "mono8"), (rgb[:, :, 0], "rgb8"), (rgb, "x")]:
        with pytest.raises(ImageError, match=f"'{encoding}'"):
            to_image(pixels, encoding, header)


# --- compressed ---------------------------------------------------------------------------------


def compressed(pixels, extension=".png"):
    encoded = cv2.imencode(extension, pixels)[1]
    return SimpleNamespace(format=extension[1:], data=array.array("B", encoded.tobytes()))


def test_compressed_colour_and_grey():
    pytest.importorskip("cv_bridge", reason="compressed images are decoded by cv_bridge")
    bgr = np.array([[[30, 20, 10], [60, 50, 40]]], np.uint8)
    assert to_rgb(compressed(bgr)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    grey = np.array([[7, 255]], np.uint8)
    assert to_rgb(compressed(grey)).tolist() == [[list(GREY), list(WHITE)]]
    jpeg = to_rgb(compressed(np.full((16, 16, 3), (0, 0, 255), np.uint8), ".jpg")).astype(int)
    assert np.abs(jpeg - RED).max() <= 3


def test_compressed_rubbish_is_an_error_with_a_mend():
    pytest.importorskip("cv_bridge", reason="compressed images are decoded by cv_bridge")
    for data in (b"", b"not a jpeg"):
        with pytest.raises(ImageError, match="'jpeg'"):
            to_rgb(SimpleNamespace(format="jpeg", data=array.array("B", data)))
    with pytest.raises(ImageError, match="depth image"):
        to_rgb(SimpleNamespace(format="16UC1; compressedDepth png", data=array.array("B", b"1")))


def run_python(code, *path):
    """Run code in a fresh interpreter: what is tested happens at import."""
    lines = [f"sys.path.insert(0, {str(p)!r})" for p in path]
    code = "\n".join(["import sys", *lines, textwrap.dedent(code)])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


READ_ONE = """
from types import SimpleNamespace
from waste_seg_ros.nodes.images import ImageError, to_rgb
try:
    to_rgb(SimpleNamespace(format="png", data=b"x"))
except ImageError as error:
    print(error)
"""


def test_numpy_2_beside_cv_bridge_is_a_message_not_a_crash(tmp_path):
    """vision_opencv 535. The stand-in for the extension module ends the process when imported, as
    a segmentation fault would, so that only looking before the import can pass."""
    (tmp_path / "cv_bridge.py").write_text("import os; os._exit(139)")
    result = run_python("import numpy; numpy.__version__ = '2.3.1'\n" + READ_ONE, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "cv_bridge" in result.stdout
    assert "NumPy 2.3.1" in result.stdout
    assert "pip install 'numpy<2'" in result.stdout


def test_cv_bridge_that_fails_to_import_is_a_message(tmp_path):
    (tmp_path / "cv_bridge.py").write_text("raise AttributeError('_ARRAY_API not found')")
    result = run_python(READ_ONE, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "_ARRAY_API not found" in result.stdout
    assert "pip install 'numpy<2'" in result.stdout


def test_missing_cv_bridge_is_a_message():
    hide = """
    import importlib.util
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name == "cv_bridge" else find_spec(name, *a)
    """
    result = run_python(textwrap.dedent(hide) + READ_ONE)
    assert result.returncode == 0, result.stderr
    assert "pip install cv-bridge" in result.stdout


def test_raw_images_need_neither_cv_bridge_nor_ros():
    result = run_python(
        """
        for name in ("cv_bridge", "rclpy", "sensor_msgs"):
            sys.modules[name] = None  # importing it raises
        from types import SimpleNamespace
        from waste_seg_ros.nodes.images import to_rgb
        message = SimpleNamespace(
            encoding="bgr8", width=1, height=1, step=3, is_bigendian=0, data=bytes([3, 2, 1]))
        print(to_rgb(message).tolist())
        """
    )
    assert result.stdout.strip() == "[[[1, 2, 3]]]", result.stderr
