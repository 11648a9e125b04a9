"""Items: what a picker needs to know of each thing on the belt.

All places and lengths are in pixels of the camera's image, x right and y down, with the middle of
the pixel in column 3 at x = 3.0 (the convention of OpenCV and of a CameraInfo). Pixel edges of
an image scaled by s map by ``x_camera = (x_network + 0.5) * s - 0.5``. An angle is measured
from the x axis towards the y axis, hence clockwise on the screen, and lies in (-pi/2, pi/2].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.perception.grasp import Gripper, find_grasps, normalize_angle
from waste_seg_ros.perception.grouping import group_items

if TYPE_CHECKING:
    from waste_seg_ros.runtime.backends import Prediction

__all__ = [
    "Item",
    "ItemParams",
    "describe_items",
    "extract_items",
    "label_image",
    "normalize_angle",
]


@dataclass(frozen=True)
class ItemParams:
    """How items are made of a prediction.

    Attributes:
        pixel_threshold: pixels whose label is less probable than this are background [0..1]; at
            0 the likeliest label stands.
        center_threshold: least height of a peak of the centre heat map [0..1].
        min_area_px: smallest item [px of the network's image].
        min_pick_area_px: smallest item to pick [px of the network's image].
        score_threshold: least score of an item to pick [0..1].
        uncertain_score: an item whose mean probability is below is flagged uncertain [0..1].
        uncertain_margin: so is one whose class leads the next by less, as a share of votes; it is
            not for picking then.
        touching_px: items this near are flagged touching [px of the network's image].
        border_px: an item this near to the image's border is flagged truncated [px of the
            network's image]; 1 means that it must touch the border.
        max_items: only so many items, those of the highest scores, are kept.
        class_agnostic: labels only tell foreground (the binary head): all items get class 0.
        classes: label ids of the classes to keep, or None for all.
        gripper: what is to grip them, its lengths in pixels of the camera's image. The default
            takes any width and needs no room beside the item.
    """

    pixel_threshold: float = 0.0
    center_threshold: float = 0.3
    min_area_px: int = 40
    min_pick_area_px: int = 80
    score_threshold: float = 0.5
    uncertain_score: float = 0.6
    uncertain_margin: float = 0.3
    touching_px: int = 2
    border_px: int = 1
    max_items: int = 200
    class_agnostic: bool = False
    classes: frozenset[int] | None = None
    gripper: Gripper = field(default_factory=Gripper)

    def __post_init__(self) -> None:
        for name in (
            "pixel_threshold",
            "center_threshold",
            "score_threshold",
            "uncertain_score",
            "uncertain_margin",
        ):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}; it must lie in 0..1")
        for name, least in (
            ("min_area_px", 1),
            ("min_pick_area_px", 0),
            ("touching_px", 0),
            ("border_px", 0),
            ("max_items", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True, eq=False)
class Item:
    """One item. Places and lengths are in camera pixels, angles in radians.

    Attributes:
        id: its id in the instance image, from 1.
        class_index: 1..C, or 0 if its kind is unknown (binary head).
        score: mean probability of its pixels times the share of them that vote for its class.
        area: of its mask [px^2].
        roi: x, y, width, height of the pixels that hold its mask, within the image.
        outline: (K, 2) float32, its outer contour, clockwise on the screen.
        center: centroid of its mask.
        angle: direction of its long axis.
        length, width: sides of the smallest rectangle around it, length >= width.
        grasp_kind: "jaws" or "suction".
        grasp_center: the middle between the jaws, or of the cup.
        grasp_angle: direction in which the jaws close.
        grasp_width: distance between the jaws where they touch it; for suction the diameter of the
            largest circle around the centre without edges and holes.
        grasp_quality: 0..1, see ``Grasp``.
        touching, truncated, uncertain: flags, see ``ItemParams``.
        pickable: whether a picker may try it.
        reason: why not, or "".
    """

    id: int
    class_index: int
    score: float
    area: float
    roi: tuple[int, int, int, int]
    outline: NDArray[np.float32]
    center: tuple[float, float]
    angle: float
    length: float
    width: float
    grasp_kind: str
    grasp_center: tuple[float, float]
    grasp_angle: float
    grasp_width: float
    grasp_quality: float
    touching: bool
    truncated: bool
    uncertain: bool
    pickable: bool
    reason: str


def extract_items(
    prediction: Prediction, image_size: tuple[int, int], params: ItemParams | None = None
) -> tuple[NDArray[np.uint16], tuple[Item, ...]]:
    """Find the items in a prediction.

    Args:
        prediction: what a backend gives, at the network's resolution (H, W).
        image_size: (width, height) of the camera's image.
        params: see ``ItemParams``.

    Returns:
        the instance image, (H, W) uint16 at the network's resolution, 0 where there is no item,
        and the items in the order of their ids 1..N.

    Raises:
        ValueError: if the prediction's shapes do not fit together, or the size is not positive.
    """
    params = params or ItemParams()
    instances = group_items(
        prediction.labels,
        prediction.scores,
        prediction.centers,
        prediction.offsets,
        pixel_threshold=params.pixel_threshold,
        center_threshold=params.center_threshold,
        min_area=params.min_area_px,
    )
    items = describe_items(instances, prediction.labels, prediction.scores, image_size, params)
    dropped = [
        item.id
        for item in items
        if params.classes is not None
        and not params.class_agnostic
        and item.class_index not in params.classes
    ]
    if len(items) - len(dropped) > params.max_items:
        gone = set(dropped)
        rest = sorted((i for i in items if i.id not in gone), key=lambda i: (-i.score, i.id))
        dropped += [item.id for item in rest[params.max_items :]]
    if dropped:
        table = np.ones(len(items) + 1, np.uint16)
        table[[0, *dropped]] = 0
        table *= np.cumsum(table, dtype=np.uint16)
        instances = table[instances]
        # What is not reported lies on the belt all the same, in the way of the jaws.
        items = tuple(replace(item, id=int(table[item.id])) for item in items if table[item.id])
    return instances, items


def label_image(instances: NDArray[np.uint16], items: Sequence[Item]) -> NDArray[np.uint8]:
    """(H, W) uint8: label of the item at each pixel, 0 where there is none.

    The pixels of an item have its class, whatever the network said of each; items of unknown class
    (the binary head) have label 1.
    """
    table = np.zeros(max((item.id for item in items), default=0) + 1, np.uint8)
    for item in items:
        table[item.id] = item.class_index or 1
    return table[instances]


def describe_items(
    instances: NDArray[np.uint16],
    labels: NDArray[np.uint8],
    scores: NDArray[np.float32] | None,
    image_size: tuple[int, int],
    params: ItemParams | None = None,
) -> tuple[Item, ...]:
    """Measure the items of an instance image, be it grouped or the truth.

    Args:
        instances: (H, W) uint16, 0 none; the ids need not be without gaps.
        labels: (H, W) uint8; 0, 254 and 255 have no say in an item's class.
        scores: (H, W) float32 probability of the label, or None for a truth (1 everywhere).
        image_size: (width, height) of the image whose pixels the items are measured in.
        params: see ``ItemParams``; thresholds on pixels are not applied again.

    Raises:
        ValueError: if shapes do not fit together, or the size is not positive.
    """
    params = params or ItemParams()
    if instances.ndim != 2 or labels.shape != instances.shape:
        raise ValueError(f"instances {instances.shape} and labels {labels.shape} must be alike")
    if image_size[0] <= 0 or image_size[1] <= 0:
        raise ValueError(f"image size {image_size} must be positive (width, height)")
    height, width = instances.shape
    scale = np.array([image_size[0] / width, image_size[1] / height])
    inside = np.flatnonzero(instances)
    if len(inside) == 0:
        return ()
    identity = instances.ravel()[inside].astype(np.intp)
    count = int(identity.max()) + 1
    label = labels.ravel()[inside]
    known = (label > 0) & (label < 254)
    # Unknown labels are put on class 0, which no known item has.
    label = np.where(known, label, 0)
    kinds = int(label.max()) + 1
    key = identity * kinds + label
    if scores is None:
        votes = np.bincount(key, minlength=count * kinds).reshape(count, kinds).astype(float)
        pixels = votes
    else:
        weight = scores.ravel()[inside]
        votes = np.bincount(key, weights=weight, minlength=count * kinds).reshape(count, kinds)
        pixels = np.bincount(key, minlength=count * kinds).reshape(count, kinds)
    area = np.bincount(identity, minlength=count)
    row, column = np.divmod(inside, width)
    divisor = np.maximum(area, 1)
    center_x = np.bincount(identity, weights=column, minlength=count) / divisor
    center_y = np.bincount(identity, weights=row, minlength=count) / divisor
    boxes = _boxes(identity, row, column, count)
    touching = _touching(instances, inside, params.touching_px, count)

    present = np.flatnonzero(area)
    shapes = []
    for index in present:
        x0, y0, x1, y1 = (int(v) for v in boxes[index])
        own = instances[y0 : y1 + 1, x0 : x1 + 1] == index
        outline = _outline(own, (x0, y0), scale)
        center = (np.array([center_x[index], center_y[index]]) + 0.5) * scale - 0.5
        # Jaws do not reach into holes.
        holes = _holes(own, (x0, y0), scale) if params.gripper.kind == "suction" else []
        place = (float(center[0]), float(center[1]))
        shapes.append((outline, place, _oriented_box(outline), holes))
    grasps = find_grasps(
        [outline for outline, _, _, _ in shapes],
        params.gripper,
        centers=[center for _, center, _, _ in shapes],
        angles=[angle for _, _, (angle, _, _), _ in shapes],
        holes=[holes for _, _, _, holes in shapes],
        tolerance=float(scale.mean()),
    )

    items = []
    for index, shape, grasp in zip(present, shapes, grasps, strict=True):
        named = votes[index].copy()
        named[0] = 0.0
        total = float(named.sum())
        class_index = int(named.argmax()) if total > 0 else 0
        counted = int(pixels[index, 1:].sum())
        probability = total / counted if counted else 1.0
        ranked = np.sort(named)[::-1]
        share = float(ranked[0]) / total if total else 1.0
        second = float(ranked[1]) / total if total and len(ranked) > 1 else 0.0
        if params.class_agnostic:
            class_index, share, second = 0, 1.0, 0.0
        score = probability * share

        x0, y0, x1, y1 = (int(v) for v in boxes[index])
        truncated = (
            x0 < params.border_px
            or y0 < params.border_px
            or x1 >= width - params.border_px
            or y1 >= height - params.border_px
        )
        unsure = share - second < params.uncertain_margin
        if truncated:
            reason = "truncated by the image border"
        elif area[index] < params.min_pick_area_px:
            reason = f"too small: {area[index]} px below {params.min_pick_area_px}"
        elif score < params.score_threshold:
            reason = f"score {score:.2f} below {params.score_threshold:.2f}"
        elif unsure:
            reason = f"unsure of class: {share:.2f} of the votes, {second:.2f} for another"
        else:
            reason = grasp.reason
        left, top = math.floor(x0 * scale[0]), math.floor(y0 * scale[1])
        right = min(math.ceil((x1 + 1) * scale[0]), image_size[0])
        bottom = min(math.ceil((y1 + 1) * scale[1]), image_size[1])
        limit = np.array(image_size, np.float32) - 1
        outline, center_xy, (angle, length, breadth), _ = shape
        items.append(
            Item(
                id=int(index),
                class_index=class_index,
                score=score,
                area=float(area[index] * scale[0] * scale[1]),
                roi=(left, top, right - left, bottom - top),
                outline=np.clip(outline, 0, limit),
                center=center_xy,
                angle=angle,
                length=length,
                width=breadth,
                grasp_kind=grasp.kind,
                grasp_center=grasp.center,
                grasp_angle=grasp.angle,
                grasp_width=grasp.width,
                grasp_quality=grasp.quality,
                touching=bool(touching[index]),
                truncated=truncated,
                uncertain=unsure or probability < params.uncertain_score,
                pickable=not reason,
                reason=reason,
            )
        )
    return tuple(items)


def _boxes(
    identity: NDArray[np.intp], row: NDArray[np.intp], column: NDArray[np.intp], count: int
) -> NDArray[np.intp]:
    """(count, 4) first and last column and row of each id: x0, y0, x1, y1."""
    boxes = np.zeros((count, 4), np.intp)
    # Rows come in ascending order, so assignment in reverse leaves the first, forward the last.
    boxes[identity[::-1], 1] = row[::-1]
    boxes[identity, 3] = row
    order = np.argsort(column.astype(np.uint16), kind="stable")  # 16 bits: radix sort
    by_column = identity[order]
    boxes[by_column[::-1], 0] = column[order][::-1]
    boxes[by_column, 2] = column[order]
    return boxes


def _touching(
    instances: NDArray[np.uint16], inside: NDArray[np.intp], distance: int, count: int
) -> NDArray[np.bool_]:
    """Which ids have a pixel of another id within so many pixels."""
    result = np.zeros(count, bool)
    if distance < 1 or count < 3:
        return result
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    own = instances.ravel()[inside]
    highest = cv2.dilate(instances, kernel).ravel()[inside]
    reverse = np.where(instances > 0, np.uint16(65535) - instances, np.uint16(0))
    lowest = np.uint16(65535) - cv2.dilate(reverse, kernel).ravel()[inside]
    result[own[(highest != own) | (lowest != own)]] = True
    return result


def _outline(
    mask: NDArray[np.bool_], corner: tuple[int, int], scale: NDArray[np.float64]
) -> NDArray[np.float32]:
    """The largest outer contour along the edges of the pixels, in camera pixels.

    ``cv2.findContours`` runs through the middles of the outermost pixels and so loses half a
    pixel all around; on the grid of pixel corners it runs along their edges.
    """
    height, width = mask.shape
    corners = np.zeros((height + 1, width + 1), np.uint8)
    corners[:-1, :-1] = mask
    corners[1:, :-1] |= mask
    corners[:-1, 1:] |= mask
    corners[1:, 1:] |= mask
    found, _ = cv2.findContours(corners, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contour = found[0] if len(found) == 1 else max(found, key=cv2.contourArea)
    simple = cv2.approxPolyDP(contour, 0.75, True)
    if len(simple) < 3:
        simple = contour
    points = (simple[:, 0] + np.array(corner, np.float64)) * scale - 0.5
    # OpenCV runs counter-clockwise on the screen.
    return np.ascontiguousarray(points[::-1].astype(np.float32))


def _holes(
    mask: NDArray[np.bool_], corner: tuple[int, int], scale: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """The edges of the holes, in camera pixels."""
    other = np.pad(~mask, 1, constant_values=True).view(np.uint8)
    count, regions, stats, _ = cv2.connectedComponentsWithStats(other, connectivity=4)
    holes = []
    for region in range(2, count):  # 1 is what lies around the item, as its corner comes first
        x, y, width, height = stats[region, :4]
        hole = regions[y : y + height, x : x + width] == region
        holes.append(
            _outline(hole, (int(x) + corner[0] - 1, int(y) + corner[1] - 1), scale).astype(float)
        )
    return holes


def _oriented_box(outline: NDArray[np.float32]) -> tuple[float, float, float]:
    """Angle of the long axis, length and width of the smallest rectangle around the outline."""
    _, (first, second), degrees = cv2.minAreaRect(outline)
    angle = math.radians(degrees)
    if first < second:
        first, second, angle = second, first, angle + math.pi / 2
    return normalize_angle(angle), float(first), float(second)
