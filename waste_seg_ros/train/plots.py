"""Charts of experiments as PNG, drawn with OpenCV, so that none but it is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

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

_INK, _GRID = (60, 60, 60), (228, 228, 228)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
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

    canvas = np.full((height, width, 3), 255, np.uint8)
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


def _widen(low: float, high: float) -> tuple[float, float]:
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 0.1
    return low - margin, high + margin


def _write(
    canvas: NDArray[np.uint8],
    text: str,
    x: int,
    y: int,
    colour: tuple[int, int, int] = _INK,
    scale: float = 0.42,
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
    wide, high = cv2.getTextSize(text, _FONT, 0.42, 1)[0]
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
