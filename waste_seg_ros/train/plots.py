"""Charts as images, drawn with OpenCV, so that no more than it is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from waste_seg_ros.files import write_png

#: Colours (RGB) that people with any colour vision tell apart: M. Okabe, K. Ito, 2008.
PALETTE = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (90, 90, 90),
    (150, 120, 0),
)

_INK, _FAINT, _GRID, _PAPER = (60, 60, 60), (150, 150, 150), (228, 228, 228), (255, 255, 255)
_FULL = np.array((8, 69, 148), float)  # of a share of 1; lesser ones are between it and the paper
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_SCALE = 0.42  # of the font
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 30, 46, 62


@dataclass(frozen=True)
class Series:
    """Points (x, y) under one name.

    Attributes:
        name: as it is written.
        points: drawn in this order.
        line: joined by a line, with its name at the last point; else the name is at each one.
        areas: of the points' discs, in any unit; the chart's largest is drawn 34 px wide. Empty:
            small dots.
    """

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = False
    areas: Sequence[float] = ()


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within low..high, about so many, 1, 2 or 5 times a power of ten apart."""
    raw = max(high - low, 1e-9) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    *,
    x_values: Sequence[float] = (),
    logarithmic: bool = False,
    size: tuple[int, int] = (900, 560),
) -> NDArray[np.uint8]:
    """Draw series of points.

    Args:
        series: what to draw; points that are not finite are left out.
        title: over the chart.
        x_label: under the x axis.
        y_label: over the y axis.
        x_values: where the x axis is marked; none: at round numbers.
        logarithmic: the x axis, for values above 0.
        size: (width, height) [px].

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        ValueError: there is no finite point.
    """
    points = np.array(
        [p for one in series for p in one.points if all(map(math.isfinite, p))], np.float64
    )
    if not len(points):
        raise ValueError(f"chart {title!r}: there are no figures to draw")

    def scaled(x: float) -> float:
        return math.log(x) if logarithmic else x

    xs = [scaled(x) for x in (*points[:, 0], *x_values)]
    x_low, x_high = _widen(min(xs), max(xs))
    if not logarithmic and min(xs) >= 0:
        x_low = min(0.0, min(xs))
    y_low, y_high = _widen(float(points[:, 1].min()), float(points[:, 1].max()))
    width, height = size
    wide, high = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[int, int]:
        return (
            round(_LEFT + wide * (scaled(x) - x_low) / (x_high - x_low)),
            round(_TOP + high * (y_high - y) / (y_high - y_low)),
        )

    canvas = _canvas(width, height)
    for value in ticks(y_low, y_high):
        row = place(points[0, 0], value)[1]
        cv2.line(canvas, (_LEFT, row), (width - _RIGHT, row), _GRID, 1)
        _write(canvas, f"{value:g}", _LEFT - 8, row + 4, right=True)
    for value in x_values or ticks(x_low, x_high, 8):
        column = place(value, y_low)[0]
        cv2.line(canvas, (column, _TOP), (column, height - _BOTTOM), _GRID, 1)
        _write(canvas, f"{value:g}", column, height - _BOTTOM + 18, middle=True)
    cv2.rectangle(canvas, (_LEFT, _TOP), (width - _RIGHT, height - _BOTTOM), (170, 170, 170), 1)
    _write(canvas, title, _LEFT, 20, scale=0.55)
    _write(canvas, y_label, 8, _TOP - 10)
    _write(canvas, x_label, _LEFT + wide // 2, height - 16, middle=True)

    largest = max((area for one in series for area in one.areas), default=1.0)
    taken: list[tuple[int, int, int, int]] = []
    for number, one in enumerate(series):
        colour = PALETTE[number % len(PALETTE)]
        spots = []
        for k, (x, y) in enumerate(one.points):
            if math.isfinite(x) and math.isfinite(y):
                radius = round(17 * math.sqrt(one.areas[k] / largest)) if one.areas else 5
                spots.append((place(x, y), max(3, radius)))
        if one.line and spots:
            path = np.array([spot for spot, _ in spots], np.int32)
            cv2.polylines(canvas, [path], False, colour, 2, cv2.LINE_AA)
        for spot, radius in spots:
            disc = canvas.copy()
            cv2.circle(disc, spot, radius, colour, -1, cv2.LINE_AA)
            cv2.addWeighted(
                disc, 0.7 if one.areas else 1.0, canvas, 0.3 * bool(one.areas), 0, canvas
            )
            cv2.circle(canvas, spot, radius, colour, 1, cv2.LINE_AA)
        for spot, radius in spots[-1:] if one.line else spots:
            _name(canvas, one.name, spot, radius, colour, taken, over=one.line)
    return canvas


def write_chart(path: Path, *arguments: Any, **options: Any) -> None:
    """`draw_chart` to a PNG. Raises ValueError as it does, or OSError."""
    write_png(path, draw_chart(*arguments, **options))


def draw_confusion(matrix: ArrayLike, names: Sequence[str]) -> NDArray[np.uint8]:
    """Draw a confusion matrix: which share of each true class was taken for what.

    Args:
        matrix: (N, N) counts, rows the truth, columns the prediction.
        names: of the N classes.

    Returns:
        an image whose cells tell the share of their row in percent; the row of a class that is
        not in the truth is grey.

    Raises:
        ValueError: if the matrix is not (N, N).
    """
    counts = np.asarray(matrix, float)
    count = len(names)
    if counts.shape != (count, count) or count == 0:
        raise ValueError(f"matrix {counts.shape} must be (N, N) for {count} names")
    whole = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(whole, 1)
    cell = 54 if count <= 8 else 40
    words = [_word(name) for name in names]
    room = max(word.shape[1] for word in words) + 12
    left, top = 26 + room, 26 + room
    canvas = _canvas(left + count * cell + 12, top + count * cell + 12)
    for row in range(count):
        for column in range(count):
            x, y = left + column * cell, top + row * cell
            value = share[row, column]
            color = _PAPER + value * (_FULL - _PAPER) if whole[row, 0] else np.array(_GRID)
            cv2.rectangle(canvas, (x, y), (x + cell - 2, y + cell - 2), color.tolist(), cv2.FILLED)
            if whole[row, 0] and counts[row, column]:
                ink = _PAPER if value > 0.5 else _INK
                _centred(canvas, _percent(value), (x + cell // 2 - 1, y + cell // 2 - 1), ink)
    for index, word in enumerate(words):
        middle = index * cell + cell // 2
        height, width = word.shape[:2]
        y, x = top + middle - height // 2, left - 6 - width
        canvas[y : y + height, x : x + width] = word
        turned = np.rot90(word)
        y, x = top - 6 - width, left + middle - height // 2
        canvas[y : y + width, x : x + height] = turned
    _centred(canvas, "prediction", (left + count * cell // 2, 14), _INK)
    title = np.rot90(_word("truth (rows add up to 100 %)" if count > 4 else "truth"))
    y = top + (count * cell - title.shape[0]) // 2
    canvas[y : y + title.shape[0], 6 : 6 + title.shape[1]] = title
    return canvas


def draw_reliability(
    confidence: ArrayLike, accuracy: ArrayLike, share: ArrayLike, error: float, what: str = ""
) -> NDArray[np.uint8]:
    """Draw how often pixels are right against how sure the network is of them.

    Args:
        confidence: (B,) mean score of each bin, NaN for an empty one.
        accuracy: (B,) the share of its pixels that are right [0..1].
        share: (B,) its share of all pixels [0..1], drawn as bars below; bins with less than
            0.0005 have no point, for a few pixels say nothing.
        error: the expected calibration error, for the title.
        what: whose scores these are.

    Raises:
        ValueError: if the three are not of one length.
    """
    sure, right, part = (np.asarray(v, float) for v in (confidence, accuracy, share))
    if sure.ndim != 1 or not sure.shape == right.shape == part.shape:
        raise ValueError(f"{sure.shape}, {right.shape} and {part.shape} must be (B,) alike")
    side, left, top, low = 300, 52, 56, 60
    canvas = _canvas(left + side + 20, top + side + 18 + low + 48)

    def place(x: float, y: float) -> tuple[int, int]:
        return left + round(x * side), top + round((1 - y) * side)

    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        cv2.line(canvas, place(0, tick), place(1, tick), _GRID, 1)
        cv2.line(canvas, place(tick, 0), place(tick, 1), _GRID, 1)
        _centred(canvas, f"{tick:g}", (left - 22, place(0, tick)[1]), _INK)
    cv2.line(canvas, place(0, 0), place(1, 1), _FAINT, 1, cv2.LINE_AA)
    drawn = np.isfinite(sure + right) & (part >= 0.0005)
    points = [place(x, y) for x, y in zip(sure[drawn], right[drawn], strict=True)]
    for point, x in zip(points, sure[drawn], strict=True):
        cv2.line(canvas, point, place(x, x), PALETTE[1], 2, cv2.LINE_AA)
    if points:
        cv2.polylines(canvas, [np.array(points, np.int32)], False, PALETTE[0], 2, cv2.LINE_AA)
    for point in points:
        cv2.circle(canvas, point, 4, PALETTE[0], cv2.FILLED, cv2.LINE_AA)
    base = top + side + 18 + low
    for index, value in enumerate(part / max(float(part.max(initial=0)), 1e-9)):
        x0 = left + round(index * side / len(part))
        x1 = left + round((index + 1) * side / len(part)) - 2
        cv2.rectangle(canvas, (x0, base - round(value * low)), (x1, base), _FAINT, cv2.FILLED)
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        _centred(canvas, f"{tick:g}", (place(tick, 0)[0], base + 12), _INK)
    _centred(canvas, what, (left + side // 2, 14), _INK)
    _centred(canvas, f"share of right pixels (ECE {error:.3f})", (left + side // 2, 36), _INK)
    _centred(canvas, "score; bars: share of pixels", (left + side // 2, base + 34), _INK)
    return canvas


def _canvas(width: int, height: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), _PAPER, np.uint8)


def _percent(share: float) -> str:
    """Two places below ten percent, of which most cells are."""
    value = 100 * share
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.05 else "<.1"


def _word(text: str) -> NDArray[np.uint8]:
    """A word, tightly on paper; a very long one is cut."""
    text = text if len(text) <= 28 else f"{text[:26]}.."
    (width, height), below = cv2.getTextSize(text, _FONT, _SCALE, 1)
    image = _canvas(width + 2, height + below + 2)
    cv2.putText(image, text, (1, height + 1), _FONT, _SCALE, _INK, 1, cv2.LINE_AA)
    return image


def _centred(
    canvas: NDArray[np.uint8], text: str, middle: tuple[int, int], ink: tuple[int, int, int]
) -> None:
    (width, height), _ = cv2.getTextSize(text, _FONT, _SCALE, 1)
    origin = (middle[0] - width // 2, middle[1] + height // 2)
    cv2.putText(canvas, text, origin, _FONT, _SCALE, ink, 1, cv2.LINE_AA)


def _widen(low: float, high: float) -> tuple[float, float]:
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 0.1
    return low - margin, high + margin


def _write(
    canvas: NDArray[np.uint8],
    text: str,
    x: int,
    y: int,
    colour: tuple[int, int, int] = _INK,
    scale: float = _SCALE,
    right: bool = False,
    middle: bool = False,
) -> None:
    wide = cv2.getTextSize(text, _FONT, scale, 1)[0][0]
    x -= wide if right else wide // 2 if middle else 0
    cv2.putText(canvas, text, (x, y), _FONT, scale, colour, 1, cv2.LINE_AA)


def _name(
    canvas: NDArray[np.uint8],
    text: str,
    spot: tuple[int, int],
    radius: int,
    colour: tuple[int, int, int],
    taken: list[tuple[int, int, int, int]],
    over: bool,
) -> None:
    """Write a point's name beside or over it, inside the canvas and where no other name is."""
    wide, high = cv2.getTextSize(text, _FONT, _SCALE, 1)[0]
    x, y, gap = spot[0], spot[1], radius + 5
    places = [(x + gap, y + 4), (x - gap - wide, y + 4)]
    for lift in (gap, gap + 14, gap + 28):
        places += [(x - wide // 2, y - lift), (x - wide // 2, y + lift + high)]
    if over:  # off the line, which comes from the left
        places.insert(0, (min(x - wide // 2, canvas.shape[1] - _RIGHT - wide), y - gap - 4))
    for left, base in places:
        box = (left, base - high, left + wide, base + 3)
        inside = box[0] >= _LEFT and box[2] <= canvas.shape[1] and box[1] >= _TOP
        if inside and all(
            box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken
        ):
            break
    else:
        left, base = places[0]
        box = (left, base - high, left + wide, base + 3)
    taken.append(box)
    _write(canvas, text, left, base, tuple(c * 3 // 4 for c in colour))  # type: ignore[arg-type]
