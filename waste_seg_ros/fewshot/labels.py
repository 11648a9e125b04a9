"""What an operator says of an item, as a mask and a name."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from waste_seg_ros.data.sample import DataError
from waste_seg_ros.train.targets import MIN_PIXELS

MAX_NAME = 64
"""Characters of a class's name."""

RESERVED = frozenset({"background", "other", "ignore", "belt", "unknown"})
"""What readers of data give another meaning to."""

_FORBIDDEN = "/\\,:;@=\"'`<>|*?$#%&{}[]"
_REACH = 6  # px that a click may miss an item by


class LabelError(DataError):
    """A label cannot be used; the message says why and what would do."""


@dataclass(frozen=True, eq=False)
class Label:
    """One item of an image.

    Attributes:
        class_name: what it is, known or new.
        mask: (H, W) bool, where it is seen.
        how: it was labelled: "mask", "polygon", "box", "click" or whatever the caller says.
    """

    class_name: str
    mask: NDArray[np.bool_]
    how: str = "mask"


def check_class_name(name: str, known: Sequence[str] = ()) -> str:
    """A class's name as it is kept: of `known` names the one that it only differs from in case.

    Letters of any script are allowed, and what looks alike is made alike (Unicode's NFKC). Names
    stand in lists separated by commas, in keys such as "iou/NAME" and in messages of a line, so
    neither these signs nor control characters can be in one.

    Raises:
        LabelError: naming what is wrong.
    """
    if not isinstance(name, str):
        raise LabelError(f"class name {name!r}: must be text")
    parts = unicodedata.normalize("NFKC", name).split(" ")
    text = " ".join(part for part in parts if part)
    shown = repr(text if len(text) <= 40 else text[:37] + "...")
    if not text:
        raise LabelError("the class name is empty; say what the item is")
    if len(text) > MAX_NAME:
        raise LabelError(
            f"class name {shown}: has {len(text)} characters; at most {MAX_NAME} are kept"
        )
    for sign in text:
        kind = unicodedata.category(sign)
        if kind[0] == "C" or kind in ("Zl", "Zp"):
            raise LabelError(
                f"class name {shown}: holds the control character U+{ord(sign):04X}; leave it out"
            )
        if sign in _FORBIDDEN:
            raise LabelError(f"class name {shown}: cannot have {sign!r} in it; use '-' or a space")
    if not any(unicodedata.category(sign)[0] in "LN" for sign in text):
        raise LabelError(f"class name {shown}: needs a letter or a digit")
    if text[0] in ".-":
        raise LabelError(f"class name {shown}: cannot begin with {text[0]!r}")
    if text.casefold() in RESERVED:
        raise LabelError(f"class name {shown}: is reserved; choose another")
    return next((other for other in known if other.casefold() == text.casefold()), text)


def check_mask(mask: ArrayLike, size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask as (H, W) bool: what is not 0 is the item.

    Args:
        mask: (H, W) of any numbers or booleans.
        size: (width, height) of its image.

    Raises:
        LabelError: if it is of another size, is empty or nearly so, or holds NaN.
    """
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise LabelError(f"mask: expected (height, width) numbers, not {array.shape} {array.dtype}")
    if array.shape != size[::-1]:
        raise LabelError(
            f"mask: is {array.shape[1]}x{array.shape[0]}, its image {size[0]}x{size[1]}; send the "
            "mask of that image"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise LabelError("mask: holds numbers that are not finite")
    found = array != 0
    pixels = int(np.count_nonzero(found))
    if pixels < MIN_PIXELS:
        what = "is empty" if not pixels else f"has only {pixels} pixels"
        raise LabelError(f"mask: {what}; an item has at least {MIN_PIXELS}")
    return found


def mask_of_polygon(points: ArrayLike, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The inside of an outline, as (H, W) bool; what lies outside of the image is cut off.

    Args:
        points: (N, 2) x, y [px] of three or more corners.
        size: (width, height) of the image.

    Raises:
        LabelError: if the points are none, are not finite or far away, or enclose nothing.
    """
    corners = np.asarray(points, float)
    if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 3:
        raise LabelError(f"outline: needs three or more points x, y, not {corners.shape}")
    if not np.isfinite(corners).all():
        raise LabelError("outline: holds numbers that are not finite")
    if np.abs(corners).max() > 10 * max(size):
        raise LabelError(f"outline: lies far outside of the image of {size[0]}x{size[1]} pixels")
    canvas = np.zeros(size[::-1], np.uint8)
    cv2.fillPoly(canvas, [np.round(corners * 16).astype(np.int32)], (1,), shift=4)
    pixels = int(np.count_nonzero(canvas))
    hull = cv2.contourArea(cv2.convexHull(corners.astype(np.float32)))
    pixels = min(pixels, round(hull))  # of points on a line the line itself is drawn
    if pixels < MIN_PIXELS:
        raise LabelError(
            f"outline: encloses only {pixels} pixels of the image; an item has at least "
            f"{MIN_PIXELS}"
        )
    return canvas.astype(bool)


def mask_of_box(
    box: Sequence[float],
    image: NDArray[np.uint8],
    proposals: NDArray[np.uint16] | None = None,
) -> NDArray[np.bool_]:
    """The item in a box, as (H, W) bool.

    That of the proposals whose own box fits (IoU over 0.5); without one, what differs from the
    surroundings of the box: C. Rother, V. Kolmogorov, A. Blake, "GrabCut", SIGGRAPH 2004.

    Args:
        box: x, y of the corner nearest the origin, width, height [px].
        image: (H, W, 3) uint8 RGB.
        proposals: (H, W) ids of items that a network found, or None.

    Raises:
        LabelError: if the box is none, lies outside, or nothing in it stands out.
    """
    height, width = image.shape[:2]
    if len(box) != 4 or not np.isfinite(box).all():
        raise LabelError(f"box: expected x, y, width, height, all finite, not {list(box)}")
    left, top = max(0, round(box[0])), max(0, round(box[1]))
    right, bottom = min(width, round(box[0] + box[2])), min(height, round(box[1] + box[3]))
    if right - left < 4 or bottom - top < 4:
        raise LabelError(f"box: {list(box)} is too small or outside of the {width}x{height} image")
    if proposals is not None:
        best, found = 0.5, None
        for number in np.unique(_fitting(proposals, (width, height))[top:bottom, left:right]):
            if number == 0:
                continue
            mask = proposals == number
            x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
            shared = max(0, min(right, x + w) - max(left, x)) * max(
                0, min(bottom, y + h) - max(top, y)
            )
            iou = shared / (w * h + (right - left) * (bottom - top) - shared)
            if iou > best:
                best, found = iou, mask
        if found is not None:
            return check_mask(found, (width, height))
    if right - left == width and bottom - top == height:
        raise LabelError("box: is the whole image, so nothing shows what the belt looks like")
    cut = np.zeros((height, width), np.uint8)
    cv2.setRNGSeed(0)
    cv2.grabCut(
        np.ascontiguousarray(image),
        cut,
        (left, top, right - left, bottom - top),
        np.zeros((1, 65)),
        np.zeros((1, 65)),
        4,
        cv2.GC_INIT_WITH_RECT,
    )
    mask = (cut == cv2.GC_FGD) | (cut == cv2.GC_PR_FGD)
    if np.count_nonzero(mask) < max(MIN_PIXELS, 0.05 * (right - left) * (bottom - top)):
        raise LabelError("box: nothing in it stands out from around it; draw an outline instead")
    return mask


def mask_at_click(point: Sequence[float], proposals: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """The proposed item at a place, or nearest to it within a few pixels, as (H, W) bool.

    Args:
        point: x, y [px].
        proposals: (H, W) ids of items, 0 none, as `perception.items.extract_items` gives them.

    Raises:
        LabelError: if the place is outside of the image, or no item is proposed there.
    """
    height, width = proposals.shape
    if len(point) != 2 or not np.isfinite(point).all():
        raise LabelError(f"click: expected x, y, both finite, not {list(point)}")
    x, y = round(point[0]), round(point[1])
    if not (0 <= x < width and 0 <= y < height):
        raise LabelError(f"click: {x}, {y} is outside of the image of {width}x{height} pixels")
    top, left = max(0, y - _REACH), max(0, x - _REACH)
    near = proposals[top : y + _REACH + 1, left : x + _REACH + 1]
    rows, columns = np.nonzero(near)
    if not len(rows):
        raise LabelError(f"click: no item was found at {x}, {y}; draw an outline instead")
    nearest = int(np.argmin((rows + top - y) ** 2 + (columns + left - x) ** 2))
    return check_mask(proposals == near[rows[nearest], columns[nearest]], (width, height))


def _fitting(proposals: NDArray[np.uint16], size: tuple[int, int]) -> NDArray[np.uint16]:
    if proposals.shape != size[::-1]:
        raise LabelError(
            f"proposals: are {proposals.shape[1]}x{proposals.shape[0]}, the image "
            f"{size[0]}x{size[1]}"
        )
    return proposals
