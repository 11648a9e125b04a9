"""Drawing of items over the camera image they were found in."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.perception.items import Item
from waste_seg_ros.perception.scaling import scale_ids

#: RGB of an item of unknown kind and of the first classes. The hues are those of Okabe and Ito
#: (2008), which people with the common colour vision deficiencies tell apart.
COLORS: tuple[tuple[int, int, int], ...] = (
    (240, 240, 240),
    (230, 159, 0),
    (0, 114, 178),
    (204, 121, 167),
    (0, 158, 115),
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
)
FILL = 0.4
_FONT = cv2.FONT_HERSHEY_SIMPLEX
#: Fractional bits of coordinates given to OpenCV, to draw at a sixteenth of a pixel.
_SHIFT = 4


def class_color(class_index: int) -> tuple[int, int, int]:
    """The RGB colour of a class, 1..C; 0 is an item of unknown kind. The same at every call."""
    if 0 <= class_index < len(COLORS):
        return COLORS[class_index]
    # Beyond the table each next hue goes on by the golden ratio, which never comes back.
    extra = class_index - len(COLORS)
    hue = (0.11 + 0.618034 * extra) % 1.0
    value = (0.95, 0.7, 0.5)[extra % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_overlay(
    image: NDArray[np.uint8],
    instances: NDArray[np.uint16] | None,
    items: Sequence[Item],
    class_names: Sequence[str] = (),
    *,
    copy: bool = True,
) -> NDArray[np.uint8]:
    """Draw items over the image they were found in.

    Each item gets a translucent fill in the colour of its class, its outline, its class and
    score, and the line along which the jaws close, or the circle that is free for a suction cup
    (dashed grey if it is not pickable).

    Args:
        image: (H, W, 3) uint8 RGB, the very image of the camera.
        instances: (h, w) uint16 at any resolution, ids as in the items; None fills the outlines.
        items: places in pixels of the image.
        class_names: the name of class i is at i - 1.
        copy: leave the image as it is; otherwise it must be writable and is drawn on.

    Returns:
        (H, W, 3) uint8 RGB of the size of the image.

    Raises:
        ValueError: if the image is not (H, W, 3) uint8.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"the image is {image.shape} {image.dtype}; it must be (H, W, 3) uint8")
    canvas = np.array(image, order="C") if copy else image
    if not items:
        return canvas
    height, width = image.shape[:2]
    if instances is not None:
        instances = scale_ids(instances, (width, height))
    bold = max(1, round(min(height, width) / 400))
    for item in items:
        _fill(canvas, instances, item)
    outlines = [np.round(item.outline * 2**_SHIFT).astype(np.int32) for item in items]
    for item, outline in zip(items, outlines, strict=True):
        cv2.polylines(
            canvas, [outline], True, class_color(item.class_index), bold, cv2.LINE_AA, _SHIFT
        )
    for item in items:
        _draw_grasp(canvas, item, bold)
    taken: list[tuple[int, int, int, int]] = []
    for item in items:
        _draw_name(canvas, item, class_names, taken)
    return canvas


def contact_sheet(
    images: Sequence[NDArray[np.uint8]], columns: int = 4, gap: int = 4
) -> NDArray[np.uint8]:
    """Tile RGB images to one, row by row; smaller ones are centred in their cell.

    Raises:
        ValueError: if there are no images or columns.
    """
    if not images or columns < 1:
        raise ValueError("a contact sheet needs at least one image and one column")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    sheet = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 32, dtype=np.uint8
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        y = gap + row * (height + gap) + (height - image.shape[0]) // 2
        x = gap + column * (width + gap) + (width - image.shape[1]) // 2
        tile = image if image.ndim == 3 else image[:, :, None]
        sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return sheet


def _fill(canvas: NDArray[np.uint8], instances: NDArray[np.uint16] | None, item: Item) -> None:
    x, y, width, height = item.roi
    # Rounding of a scale that does not divide may put a pixel just beside the roi.
    x0, y0 = max(x - 1, 0), max(y - 1, 0)
    area = canvas[y0 : y + height + 1, x0 : x + width + 1]
    if area.size == 0:
        return
    if instances is not None:
        own = (instances[y0 : y + height + 1, x0 : x + width + 1] == item.id).view(np.uint8)
    else:
        own = np.zeros(area.shape[:2], np.uint8)
        points = np.round((item.outline - (x0, y0)) * 2**_SHIFT).astype(np.int32)
        cv2.fillPoly(own, [points], (1,), cv2.LINE_8, _SHIFT)
    solid = np.empty_like(area)
    solid[:] = class_color(item.class_index)
    tinted = cv2.addWeighted(area, 1.0 - FILL, solid, FILL, 0.0)
    cv2.copyTo(tinted, own, area)


def _draw_grasp(canvas: NDArray[np.uint8], item: Item, bold: int) -> None:
    color = (255, 255, 255) if item.pickable else (128, 128, 128)
    along = np.array([math.cos(item.grasp_angle), math.sin(item.grasp_angle)])
    across = np.array([-along[1], along[0]])
    middle = np.array(item.grasp_center)
    ends = [middle + sign * 0.5 * item.grasp_width * along for sign in (-1, 1)]
    jaw = 4.0 * bold * across
    lines = [(end - jaw, end + jaw) for end in ends]
    if item.grasp_kind == "suction":
        lines = _circle(middle, 0.5 * item.grasp_width, bold, item.pickable)
    elif item.pickable:
        lines.append((ends[0], ends[1]))
    else:
        dashes = max(3, 2 * round(item.grasp_width / (16 * bold)) + 1)
        step = (ends[1] - ends[0]) / dashes
        lines += [(ends[0] + i * step, ends[0] + (i + 1) * step) for i in range(0, dashes, 2)]
    segments = [np.round(np.array(line) * 2**_SHIFT).astype(np.int32) for line in lines]
    for shade, thickness in (((0, 0, 0), bold + 2), (color, bold)):
        cv2.polylines(canvas, segments, False, shade, thickness, cv2.LINE_AA, _SHIFT)


def _circle(
    middle: NDArray[np.float64], radius: float, bold: int, whole: bool
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Lines of a circle with a cross in its middle, dashed unless it is to be whole."""
    count = max(16, 4 * round(radius / (4 * bold)))
    turn = np.arange(count + 1) * (2 * math.pi / count)
    rim = middle + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    lines = [(rim[i], rim[i + 1]) for i in range(0, count, 1 if whole else 2)]
    for arm in (np.array([4.0 * bold, 0.0]), np.array([0.0, 4.0 * bold])):
        lines.append((middle - arm, middle + arm))
    return lines


def _draw_name(
    canvas: NDArray[np.uint8],
    item: Item,
    class_names: Sequence[str],
    taken: list[tuple[int, int, int, int]],
) -> None:
    if item.class_index == 0:
        name = "item"
    elif item.class_index <= len(class_names):
        name = class_names[item.class_index - 1]
    else:
        name = f"class {item.class_index}"
    text = f"{name} {item.score:.2f}"
    height, width = canvas.shape[:2]
    size = max(0.35, min(height, width) / 1100)
    (text_width, text_height), below = cv2.getTextSize(text, _FONT, size, 1)
    text_width, text_height = text_width + 4, text_height + below + 4
    left, top = item.roi[:2]
    bottom = top + item.roi[3]
    x = min(max(left, 0), max(width - text_width, 0))
    # Above the item, or below, or within: the first place that is free and in the image.
    places = [top - text_height, bottom, top + 1, (top + bottom) // 2]
    places = [y for y in places if 0 <= y <= height - text_height] or [0]
    y = next((y for y in places if _free((x, y, text_width, text_height), taken)), places[0])
    taken.append((x, y, text_width, text_height))
    color = class_color(item.class_index)
    cv2.rectangle(canvas, (x, y), (x + text_width - 1, y + text_height - 1), color, cv2.FILLED)
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 110
    ink = (0, 0, 0) if dark else (255, 255, 255)
    cv2.putText(
        canvas, text, (x + 2, y + text_height - below - 2), _FONT, size, ink, 1, cv2.LINE_AA
    )


def _free(box: tuple[int, int, int, int], taken: Sequence[tuple[int, int, int, int]]) -> bool:
    x, y, width, height = box
    return all(
        x >= left + w or left >= x + width or y >= top + h or top >= y + height
        for left, top, w, h in taken
    )
