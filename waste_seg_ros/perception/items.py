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


#: An outline runs no farther than this from the edges of its pixels [px of the network's image].
OUTLINE_ERROR_PX = 0.75


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
    runs = _runs(instances, labels)
    if len(runs.identity) == 0:
        return ()
    present, start = np.unique(runs.identity, return_index=True)
    count = len(present)
    number = np.searchsorted(present, runs.identity)  # from 0, without gaps
    # Unknown labels are put on class 0, which no known item has.
    label = np.where((runs.label > 0) & (runs.label < 254), runs.label, 0).astype(np.intp)
    kinds = int(label.max()) + 1
    key = number * kinds + label
    length = runs.end - runs.first
    pixels = np.bincount(key, weights=length, minlength=count * kinds).reshape(count, kinds)
    votes = pixels
    if scores is not None:
        weight = np.add.reduceat(scores.ravel(), runs.begin, dtype=np.float64)[runs.which]
        votes = np.bincount(key, weights=weight, minlength=count * kinds).reshape(count, kinds)
    area = pixels.sum(axis=1)
    middle = np.stack([(runs.first + runs.end - 1) / 2, runs.row])
    center = np.add.reduceat(length * middle, start, axis=1) / area
    center = (center.T + 0.5) * scale - 0.5
    boxes = np.stack(
        [
            np.minimum.reduceat(runs.first, start),
            np.minimum.reduceat(runs.row, start),
            np.maximum.reduceat(runs.end, start),
            np.maximum.reduceat(runs.row, start) + 1,
        ],
        axis=1,
    )
    touching = _touching(instances, present, boxes, params.touching_px)

    contours = []
    holes: list[list[NDArray[np.float64]]] | None = None
    if params.gripper.kind == "suction":  # jaws do not reach into holes
        holes = []
    for identity, (x0, y0, x1, y1) in zip(present.tolist(), boxes.tolist(), strict=True):
        own = instances[y0:y1, x0:x1] == identity
        contours.append(_contour(own) + np.array([x0, y0]))
        if holes is not None:
            holes.append(_holes(own, (x0, y0), scale))
    ends = np.cumsum([len(contour) for contour in contours])[:-1]
    points = (np.concatenate(contours) * scale - 0.5).astype(np.float32)
    outlines = np.split(points, ends)
    seen = np.split(np.clip(points, 0, np.array(image_size, np.float32) - 1), ends)
    rectangles = [_oriented_box(outline) for outline in outlines]
    places = [(x, y) for x, y in center.tolist()]
    grasps = find_grasps(
        outlines,
        params.gripper,
        centers=places,
        angles=[angle for angle, _, _ in rectangles],
        holes=holes,
        tolerance=float(scale.mean()),
    )

    named = votes.copy()
    named[:, 0] = 0.0
    total, counted = named.sum(axis=1), pixels[:, 1:].sum(axis=1)
    some = total > 0
    kind = np.where(some, named.argmax(axis=1), 0)
    probability = np.where(counted > 0, total / np.maximum(counted, 1.0), 1.0)
    ranked = np.sort(named, axis=1) / np.where(some, total, 1.0)[:, None]
    share = np.where(some, ranked[:, -1], 1.0)
    second = ranked[:, -2] if kinds > 1 else np.zeros(count)
    if params.class_agnostic:
        kind, share, second = np.zeros(count, np.intp), np.ones(count), np.zeros(count)
    score = probability * share
    unsure = share - second < params.uncertain_margin
    uncertain = unsure | (probability < params.uncertain_score)
    border = params.border_px
    truncated = (boxes[:, :2] < border).any(axis=1)
    truncated |= (boxes[:, 2:] > np.array([width, height]) - border).any(axis=1)
    low = np.floor(boxes[:, :2] * scale).astype(np.intp)
    high = np.minimum(np.ceil(boxes[:, 2:] * scale).astype(np.intp), image_size)
    rois = np.concatenate([low, high - low], axis=1)

    numbers = zip(
        present.tolist(),
        kind.tolist(),
        score.tolist(),
        share.tolist(),
        second.tolist(),
        area.tolist(),
        unsure.tolist(),
        uncertain.tolist(),
        truncated.tolist(),
        touching.tolist(),
        rois.tolist(),
        strict=True,
    )
    items = []
    for entry, outline, place, rectangle, grasp in zip(
        numbers, seen, places, rectangles, grasps, strict=True
    ):
        identity, class_index, value, most, next_most, size, tie, doubt, cut, touches, roi = entry
        if cut:
            reason = "truncated by the image border"
        elif size < params.min_pick_area_px:
            reason = f"too small: {size:.0f} px below {params.min_pick_area_px}"
        elif value < params.score_threshold:
            reason = f"score {value:.2f} below {params.score_threshold:.2f}"
        elif tie:
            reason = f"unsure of class: {most:.2f} of the votes, {next_most:.2f} for another"
        else:
            reason = grasp.reason
        angle, long_side, short_side = rectangle
        items.append(
            Item(
                id=identity,
                class_index=class_index,
                score=value,
                area=size * float(scale[0] * scale[1]),
                roi=tuple(roi),
                outline=outline,
                center=place,
                angle=angle,
                length=long_side,
                width=short_side,
                grasp_kind=grasp.kind,
                grasp_center=grasp.center,
                grasp_angle=grasp.angle,
                grasp_width=grasp.width,
                grasp_quality=grasp.quality,
                touching=touches,
                truncated=cut,
                uncertain=doubt,
                pickable=not reason,
                reason=reason,
            )
        )
    return tuple(items)


@dataclass(frozen=True, eq=False)
class _Runs:
    """Pixels beside each other in a row that have one id, not 0, and one label; sorted by id.

    They are about a tenth of the pixels.

    Attributes:
        identity, label: (r,) theirs.
        row, first, end: (r,) the row, the first column and the one after the last.
        begin: (a,) where all runs begin, those of no item too, in the flat image.
        which: (r,) the index of these runs among all.
    """

    identity: NDArray[np.uint16]
    label: NDArray[np.uint8]
    row: NDArray[np.intp]
    first: NDArray[np.intp]
    end: NDArray[np.intp]
    begin: NDArray[np.intp]
    which: NDArray[np.intp]


def _runs(instances: NDArray[np.uint16], labels: NDArray[np.uint8]) -> _Runs:
    width = instances.shape[1]
    identity, label = instances.ravel(), labels.ravel()
    change = np.ones(len(identity), bool)
    np.not_equal(identity[1:], identity[:-1], out=change[1:])
    change[1:] |= label[1:] != label[:-1]
    change[::width] = True
    begin = np.flatnonzero(change)
    own = identity[begin]
    which = np.flatnonzero(own)
    which = which[np.argsort(own[which], kind="stable")]  # 16 bits: radix sort
    start = begin[which]
    row, first = np.divmod(start, width)
    end = np.append(begin, len(identity))[which + 1] - row * width
    return _Runs(identity[start], label[start], row, first, end, begin, which)


def _touching(
    instances: NDArray[np.uint16],
    present: NDArray[np.uint16],
    boxes: NDArray[np.intp],
    distance: int,
) -> NDArray[np.bool_]:
    """Which ids have a pixel of another id within so many pixels.

    Args:
        instances: (H, W).
        present: (n,) the ids, ascending.
        boxes: (n, 4) x0, y0, x1, y1 of each, the last two exclusive.
        distance: [px].
    """
    result = np.zeros(len(present), bool)
    if distance < 1 or len(present) < 2:
        return result
    low, high = boxes[:, :2], boxes[:, 2:] + distance
    near = ((low[:, None] < high) & (low < high[:, None])).all(axis=2)
    first, second = np.nonzero(np.triu(near, 1))
    if len(first) == 0:
        return result
    # Only there can two meet.
    x0, y0 = np.maximum(np.maximum(low[first], low[second]) - distance, 0).T.tolist()
    x1, y1 = np.minimum(high[first], high[second]).T.tolist()
    windows = [instances[part] for part in map(_slices, x0, y0, x1, y1)]
    if 3 * sum(window.size for window in windows) > instances.size:
        windows = [instances]
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    for window in windows:
        highest = cv2.dilate(window, kernel)
        lowest = np.negative(cv2.dilate(np.negative(window), kernel))  # 0 stays 0, others turn
        meets = window[(window != 0) & ((highest != window) | (lowest != window))]
        result[np.searchsorted(present, meets)] = True
    return result


def _slices(x0: int, y0: int, x1: int, y1: int) -> tuple[slice, slice]:
    return slice(y0, y1), slice(x0, x1)


def _contour(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """(K, 2) the largest outer contour along the edges of the pixels, from the mask's corner.

    ``cv2.findContours`` runs through the middles of the outermost pixels and so loses half a
    pixel all around; on the grid of pixel corners it runs along their edges.
    """
    height, width = mask.shape
    corners = np.zeros((height + 1, width + 1), np.uint8)
    corners[:-1, :-1] = mask
    cv2.dilate(corners, np.ones((2, 2), np.uint8), dst=corners, anchor=(1, 1))
    found, _ = cv2.findContours(corners, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contour = found[0] if len(found) == 1 else max(found, key=cv2.contourArea)
    simple = cv2.approxPolyDP(contour, OUTLINE_ERROR_PX, True)
    if len(simple) < 3:
        simple = contour
    # OpenCV runs counter-clockwise on the screen.
    return np.asarray(simple[::-1, 0])


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
        place = np.array([x + corner[0] - 1, y + corner[1] - 1])
        holes.append((_contour(hole) + place) * scale - 0.5)
    return holes


def _oriented_box(outline: NDArray[np.float32]) -> tuple[float, float, float]:
    """Angle of the long axis, length and width of the smallest rectangle around the outline."""
    _, (first, second), degrees = cv2.minAreaRect(outline)
    angle = math.radians(degrees)
    if first < second:
        first, second, angle = second, first, angle + math.pi / 2
    return normalize_angle(angle), float(first), float(second)
