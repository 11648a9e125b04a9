"""Images on disk, and what every reader of annotated ones has in common.

Orientation is decided here, for all: the pixels of an annotated image are taken as the file stores
them, for its masks are drawn on those; an orientation in its EXIF data is not applied. What is to
be looked at, and data sets that were annotated on turned pictures, ask for ``upright``.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.data.sample import DataError, Sample

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

MAX_PIXELS = 100_000_000
"""Images of more pixels are refused: with its masks, one of these takes 700 MB."""


class Photographs:
    """Annotated images on disk, read when asked for by ``dataset[index]`` or in a loop.

    Attributes:
        classes: names of the classes; label id is index + 1.
        problems: one line for each thing that had to be passed over.
        things: label ids of the classes that have items; none of them if all classes have.
    """

    things: frozenset[int] = frozenset()

    def __init__(self, classes: Sequence[str], strict: bool, where: str = "") -> None:
        """Take the names; ``where`` goes before a problem where it is told outside ``problems``."""
        self.classes = tuple(classes)
        self.problems: list[str] = []
        self._strict = strict
        self._where = where
        self._told: set[str] = set()

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Read a sample. Raises DataError or OSError if it is broken."""
        raise NotImplementedError

    def sample(self, index: int, size: tuple[int, int] | None = None) -> Sample:
        """Sample ``index``; photographs have their own size, whatever ``size`` says."""
        return self[index]

    def __iter__(self) -> Iterator[Sample]:
        """All samples; those that cannot be read are named in ``problems`` and passed over."""
        for index in range(len(self)):
            try:
                sample = self[index]
            except (ValueError, OSError) as error:
                self._broken(str(error))
                continue
            yield sample

    def _broken(self, problem: str) -> None:
        if self._strict:
            raise DataError(f"{self._where}{problem}")
        if problem not in self._told:
            self._told.add(problem)
            self.problems.append(problem)


def read_image(path: Path | str, *, upright: bool = False) -> NDArray[np.uint8]:
    """Read a photograph as (H, W, 3) uint8 RGB.

    Args:
        path: the file.
        upright: turn it as its EXIF data say; else it is as stored, see the head of this module.

    Raises:
        DataError: if it is missing, no image, cut short or of more than ``MAX_PIXELS``.
    """
    flags = cv2.IMREAD_COLOR if upright else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.cvtColor(_decode(path, flags), cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def read_ids(path: Path | str, shape: tuple[int, ...] | None = None) -> NDArray[np.int32]:
    """Read a single-channel image of ids as (H, W) int32.

    Args:
        path: the file; 8 or 16 bits.
        shape: (H, W) that it must have.

    Raises:
        DataError: as `read_image`, or if it holds colours, or is of another shape.
    """
    image = _decode(path, cv2.IMREAD_UNCHANGED)
    if image.ndim == 3:
        if (image[..., :3] != image[..., :1]).any():
            raise DataError(
                f"{path}: holds colours or a palette; save it as a single-channel image of ids"
            )
        image = image[..., 0]
    if shape is not None and image.shape != tuple(shape):
        raise DataError(
            f"{path}: is {image.shape[1]}x{image.shape[0]}, its image {shape[1]}x{shape[0]}"
        )
    return image.astype(np.int32)


def check_image(path: Path | str) -> tuple[int, int] | None:
    """Look at an image's header and end without decoding it.

    Returns:
        (width, height) as stored; None if it is neither JPEG nor PNG.

    Raises:
        DataError: if it is missing, empty, cut short or of more than ``MAX_PIXELS``.
    """
    try:
        with (
            open(path, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _look_at(path, data)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is empty") from error  # what mmap says of no bytes
    except OSError as error:
        raise DataError(f"{path}: {_reason(error)}") from error


def _decode(path: Path | str, flags: int) -> NDArray[Any]:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {_reason(error)}") from error
    if not data:
        raise DataError(f"{path}: is empty")
    _look_at(path, data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise DataError(f"{path}: is not an image that can be read: {error.err}") from error
    if image is None:
        raise DataError(f"{path}: is not an image that can be read")
    _limit(path, image.shape[1], image.shape[0])
    return image


def _reason(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)


def _limit(path: Path | str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: is {width}x{height}; at most {MAX_PIXELS // 10**6} million pixels are read: "
            "scale it down or cut it up, its masks with it"
        )


def _look_at(path: Path | str, data: bytes | mmap.mmap) -> tuple[int, int] | None:
    """Size of a JPEG or PNG; OpenCV itself gives what it can of one that is cut short."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        if len(data) < 24 or data.rfind(b"IEND") < 0:
            raise DataError(f"{path}: is cut short")
        width, height = struct.unpack(">II", data[16:24])
    elif data[:3] == b"\xff\xd8\xff":
        found = _jpeg_size(data)
        if found is None:
            raise DataError(f"{path}: is cut short")
        width, height = found
    else:
        return None
    _limit(path, width, height)
    return width, height


def _jpeg_size(data: bytes | mmap.mmap) -> tuple[int, int] | None:
    """(width, height) of a JPEG (ITU-T T.81, annex B), or None if it ends before its end."""
    size, at = None, 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF or 0xD0 <= marker <= 0xD8:  # a fill byte, or a marker without a segment
            at += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 9 <= len(data):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            size = width, height
        if marker == 0xDA:
            # The scans. In an EXIF segment before them there may be a thumbnail with its own end.
            return size if data.rfind(b"\xff\xd9", at) >= 0 else None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
