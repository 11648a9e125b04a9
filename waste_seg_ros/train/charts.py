"""Charts of figures, drawn with OpenCV: (H, W, 3) uint8 RGB, for ``files.write_png``."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_SIZE = 0.45
_INK, _FAINT, _PAPER = (30, 30, 30), (150, 150, 150), (255, 255, 255)
#: Of a share of 1; lesser ones are between it and the paper.
_FULL = np.array((8, 69, 148), float)
_EMPTY = (235, 235, 235)
_WRONG, _RIGHT = (213, 94, 0), (0, 114, 178)


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
            color = _PAPER + value * (_FULL - _PAPER) if whole[row, 0] else np.array(_EMPTY)
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
        cv2.line(canvas, place(0, tick), place(1, tick), _EMPTY, 1)
        cv2.line(canvas, place(tick, 0), place(tick, 1), _EMPTY, 1)
        _centred(canvas, f"{tick:g}", (left - 22, place(0, tick)[1]), _INK)
    cv2.line(canvas, place(0, 0), place(1, 1), _FAINT, 1, cv2.LINE_AA)
    drawn = np.isfinite(sure + right) & (part >= 0.0005)
    points = [place(x, y) for x, y in zip(sure[drawn], right[drawn], strict=True)]
    for point, x in zip(points, sure[drawn], strict=True):
        cv2.line(canvas, point, place(x, x), _WRONG, 2, cv2.LINE_AA)
    if points:
        cv2.polylines(canvas, [np.array(points, np.int32)], False, _RIGHT, 2, cv2.LINE_AA)
    for point in points:
        cv2.circle(canvas, point, 4, _RIGHT, cv2.FILLED, cv2.LINE_AA)
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
    (width, height), below = cv2.getTextSize(text, _FONT, _SIZE, 1)
    image = _canvas(width + 2, height + below + 2)
    cv2.putText(image, text, (1, height + 1), _FONT, _SIZE, _INK, 1, cv2.LINE_AA)
    return image


def _centred(
    canvas: NDArray[np.uint8], text: str, middle: tuple[int, int], ink: tuple[int, int, int]
) -> None:
    (width, height), _ = cv2.getTextSize(text, _FONT, _SIZE, 1)
    origin = (middle[0] - width // 2, middle[1] + height // 2)
    cv2.putText(canvas, text, origin, _FONT, _SIZE, ink, 1, cv2.LINE_AA)
