"""ROS images to NumPy arrays and back.

The formats are those of ``sensor_msgs/image_encodings.hpp``. Messages are read by their fields
only (``height, width, encoding, is_bigendian, step, data``), so nothing here needs ROS; raw
images are decoded without cv_bridge and without copying where the layout allows it.

Conventions that the encodings themselves leave open:

* ``mono16`` and ``16UC1`` use the full 16 bit range; the picture is their high byte, so that
  65535 is white. (A sensor that fills only 12 of the bits looks dark, not garbled.)
* ``8UC1`` is grey. ``8UC3`` is blue, green, red, as OpenCV stores colour and RViz shows it.
* ``yuv422`` is ``uyvy`` and ``yuv422_yuy2`` is ``yuyv``, as in image_encodings.hpp; the values
  are ITU-R BT.601 limited range, as V4L2 cameras send them.
"""

from __future__ import annotations

import array
import functools
import importlib.util
import sys
from typing import Any

import cv2
import numpy as np

MAX_PIXELS = 100_000_000
"""Largest image accepted; a corrupt header must not make the node ask for all memory."""

# encoding -> (channels, bytes per channel, OpenCV colour conversion to RGB or None if it is RGB).
# ROS names a Bayer pattern by its first two rows from the top left pixel.
_FORMATS: dict[str, tuple[int, int, int | None]] = {
    "rgb8": (3, 1, None),
    "bgr8": (3, 1, cv2.COLOR_BGR2RGB),
    "rgba8": (4, 1, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, 1, cv2.COLOR_BGRA2RGB),
    "mono8": (1, 1, cv2.COLOR_GRAY2RGB),
    "mono16": (1, 2, cv2.COLOR_GRAY2RGB),
    "8UC1": (1, 1, cv2.COLOR_GRAY2RGB),
    "8UC3": (3, 1, cv2.COLOR_BGR2RGB),
    "16UC1": (1, 2, cv2.COLOR_GRAY2RGB),
    # OpenCV's older names count the pattern from the second pixel of the second row: what ROS
    # and everyone else call RGGB is cv2.COLOR_BayerBG2RGB there. These are its aliases by ROS's
    # way of counting.
    "bayer_rggb8": (1, 1, cv2.COLOR_BayerRGGB2RGB),
    "bayer_bggr8": (1, 1, cv2.COLOR_BayerBGGR2RGB),
    "bayer_gbrg8": (1, 1, cv2.COLOR_BayerGBRG2RGB),
    "bayer_grbg8": (1, 1, cv2.COLOR_BayerGRBG2RGB),
    "yuv422": (2, 1, cv2.COLOR_YUV2RGB_UYVY),
    "uyvy": (2, 1, cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": (2, 1, cv2.COLOR_YUV2RGB_YUY2),
    "yuyv": (2, 1, cv2.COLOR_YUV2RGB_YUY2),
}

ENCODINGS: tuple[str, ...] = tuple(_FORMATS)
"""Encodings of sensor_msgs/Image that :func:`to_rgb` reads."""


class ImageError(ValueError):
    """An image message that cannot be read; the text says what is wrong and how to mend it."""


def to_rgb(message: Any) -> np.ndarray:
    """Decode a sensor_msgs/Image or sensor_msgs/CompressedImage.

    Args:
        message: the message, or any object with its fields.

    Returns:
        (H, W, 3) uint8 RGB. For ``rgb8`` this is a read-only view of the message's own data
        (rows may be padded, so it need not be contiguous); for others a new array.

    Raises:
        ImageError: if the encoding is not supported or the fields contradict each other.
    """
    if not hasattr(message, "encoding"):
        return _decompress(message)
    pixels = to_array(message)
    if pixels.itemsize == 2:
        pixels = (pixels >> 8).astype(np.uint8)
    conversion = _FORMATS[message.encoding][2]
    if conversion is None:
        return pixels
    if pixels.ndim == 3 and pixels.shape[2] == 2 and message.width % 2:
        return _odd_yuv_to_rgb(message, conversion)
    return cv2.cvtColor(pixels, conversion)


def to_array(message: Any) -> np.ndarray:
    """View a sensor_msgs/Image as it is, with no conversion: label and id images, for instance.

    Args:
        message: the message, or any object with its fields.

    Returns:
        Read-only view of the message's data without row padding: (H, W) for one channel, else
        (H, W, channels); uint8, or uint16 in the message's byte order.

    Raises:
        ImageError: as :func:`to_rgb`.
    """
    channels, depth = _check(message)
    height, width, step = message.height, message.width, message.step
    dtype = np.dtype(np.uint8) if depth == 1 else np.dtype(">u2" if message.is_bigendian else "<u2")
    shape: tuple[int, ...] = (height, width)
    strides: tuple[int, ...] = (step, channels * depth)
    if channels > 1:
        shape, strides = (*shape, channels), (*strides, depth)
    view: np.ndarray = np.ndarray(shape, dtype, memoryview(message.data), 0, strides)
    view.flags.writeable = False
    return view


def to_depth(message: Any) -> np.ndarray:
    """View a sensor_msgs/Image of depths (REP 118).

    Args:
        message: the message, or any object with its fields.

    Returns:
        read-only view of the message's data, (H, W): float32 in metres for ``32FC1``, uint16 in
        millimetres for ``16UC1`` and ``mono16``.

    Raises:
        ImageError: another encoding, or the fields contradict each other.
    """
    if message.encoding in ("16UC1", "mono16"):
        return to_array(message)
    if message.encoding != "32FC1":
        raise ImageError(
            f"depth encoding '{message.encoding}' is not supported; make the camera send 32FC1 "
            "(metres) or 16UC1 (millimetres)"
        )
    height, width, step = message.height, message.width, message.step
    if not 0 < height * width <= MAX_PIXELS or step < 4 * width:
        raise ImageError(f"depth image of {width}x{height} with rows of {step} bytes")
    if len(message.data) < height * step:
        raise ImageError(f"depth image has {len(message.data)} bytes; {height * step} are needed")
    kind = np.dtype(">f4" if message.is_bigendian else "<f4")
    view: np.ndarray = np.ndarray((height, width), kind, memoryview(message.data), 0, (step, 4))
    view.flags.writeable = False
    return view


def to_image(pixels: np.ndarray, encoding: str, header: Any) -> Any:
    """Make a sensor_msgs/Image from an array.

    Args:
        pixels: (H, W) or (H, W, C) uint8 or uint16, as the encoding says.
        encoding: one of :data:`ENCODINGS`.
        header: std_msgs/Header, carried over untouched.

    Raises:
        ImageError: if the array does not fit the encoding.
    """
    from sensor_msgs.msg import Image  # the rest of this module works without ROS

    if encoding not in _FORMATS:
        raise ImageError(f"encoding '{encoding}' is not supported; use one of {_listed()}")
    channels, depth, _ = _FORMATS[encoding]
    found = 1 if pixels.ndim == 2 else pixels.shape[2] if pixels.ndim == 3 else 0
    if found != channels or pixels.dtype != (np.uint8 if depth == 1 else np.uint16):
        raise ImageError(
            f"encoding '{encoding}' takes {channels} channel(s) of {8 * depth} bit, "
            f"got an array of shape {pixels.shape} and type {pixels.dtype}"
        )
    message = Image()
    message.header = header
    message.height, message.width = pixels.shape[:2]
    message.encoding = encoding
    message.is_bigendian = int(sys.byteorder == "big")
    message.step = message.width * channels * depth
    # An array.array is taken as it is; of any other type rclpy checks each element in Python.
    data = array.array("B")
    data.frombytes(np.ascontiguousarray(pixels).view(np.uint8).data)
    message.data = data
    return message


def require_decompression() -> None:
    """Check that compressed images can be read here.

    Raises:
        ImageError: with the mend, if cv_bridge is missing or does not fit the NumPy here.
    """
    _cv_bridge()


def _check(message: Any) -> tuple[int, int]:
    """Channels and bytes per channel of a message whose fields agree, else ImageError."""
    encoding, width, height, step = message.encoding, message.width, message.height, message.step
    if encoding not in _FORMATS:
        named = f"encoding '{encoding}' is not supported" if encoding else "encoding is empty"
        raise ImageError(f"{named}; set the camera driver to one of {_listed()}")
    if width == 0 or height == 0:
        raise ImageError(
            f"{encoding} image of size {width}x{height} has no pixels; "
            "set the camera driver's width and height"
        )
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{encoding} image of size {width}x{height} is over the limit of "
            f"{MAX_PIXELS // 1_000_000} megapixels; check the driver's header, or scale it down"
        )
    channels, depth, _ = _FORMATS[encoding]
    row = width * channels * depth
    if step < row:
        raise ImageError(
            f"{encoding} image of width {width} needs {row} bytes a row but its step is {step}; "
            "the camera driver must set step to the length of a row in bytes, padding included"
        )
    size = len(message.data)
    if size < step * height:
        raise ImageError(
            f"{encoding} image of {height} rows of {step} bytes needs {step * height} bytes but "
            f"holds {size}; the frame was cut short, or height or step is wrong in the driver"
        )
    return channels, depth


def _odd_yuv_to_rgb(message: Any, conversion: int) -> np.ndarray:
    """YUV 4:2:2 of odd width: its last pixel shares colour with one that lies in the padding."""
    height, width, step = message.height, message.width, message.step
    if step < 2 * (width + 1):
        raise ImageError(
            f"{message.encoding} image of odd width {width} lacks half of its last pixel pair; "
            "set the camera driver to an even width"
        )
    pixels: np.ndarray = np.ndarray(
        (height, width + 1, 2), np.uint8, memoryview(message.data), 0, (step, 2, 1)
    )
    return cv2.cvtColor(pixels, conversion)[:, :width]


def _listed() -> str:
    return ", ".join(ENCODINGS)


def _decompress(message: Any) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a sensor_msgs/CompressedImage."""
    if "compressedDepth" in message.format:
        raise ImageError(
            f"compressed image of format '{message.format}' is a depth image; "
            "subscribe to the colour camera's topic"
        )
    if len(message.data) == 0:
        raise ImageError(f"compressed image of format '{message.format}' holds no data")
    try:
        pixels = _cv_bridge().compressed_imgmsg_to_cv2(message)
    except ImageError:
        raise
    except Exception as error:  # cv_bridge lets errors of OpenCV through as they are
        raise ImageError(
            f"compressed image of format '{message.format}' cannot be decoded ({error}); "
            "send jpeg or png, or use image_transport:=raw"
        ) from error
    if pixels is None or pixels.size == 0:
        raise ImageError(
            f"compressed image of format '{message.format}' and {len(message.data)} bytes cannot "
            "be decoded; send jpeg or png, or use image_transport:=raw"
        )
    if pixels.shape[0] * pixels.shape[1] > MAX_PIXELS:
        raise ImageError(
            f"compressed image of size {pixels.shape[1]}x{pixels.shape[0]} is over the limit of "
            f"{MAX_PIXELS // 1_000_000} megapixels; scale it down"
        )
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB)


@functools.cache
def _cv_bridge() -> Any:
    """cv_bridge's CvBridge, or ImageError with the mend where it cannot be had."""
    if importlib.util.find_spec("cv_bridge") is None:
        raise ImageError(
            "compressed images are decoded by cv_bridge, which is not installed: "
            "apt install ros-jazzy-cv-bridge, or pip install cv-bridge; or use image_transport:=raw"
        )
    mend = (
        "it is built for NumPy 1 and needs numpy<2: pip install 'numpy<2', "
        "or use image_transport:=raw"
    )
    # Looked at before the import: extension modules built for NumPy 1 may take the whole process
    # down under NumPy 2, which no `except` catches.
    if int(np.__version__.split(".")[0]) >= 2:
        raise ImageError(f"cv_bridge cannot be used with NumPy {np.__version__}: {mend}")
    try:
        from cv_bridge import CvBridge

        return CvBridge()
    except Exception as error:  # ImportError, or AttributeError "_ARRAY_API not found"
        raise ImageError(
            f"cv_bridge does not import with NumPy {np.__version__} "
            f"({type(error).__name__}: {error}): {mend}"
        ) from error
