"""Grouping of foreground pixels to items.

With an instance head this follows Panoptic-DeepLab (Cheng et al., CVPR 2020): each foreground
pixel votes for the place ``pixel + offset`` and belongs to the nearest centre. It departs from
the paper where a picker would be hurt by it:

* pixels choose only among the centres which their own connected component votes for, so that
  noise in the offsets never mixes items which do not touch;
* a component that votes for no centre is an item nevertheless;
* votes that agree on a place where the heat map has no peak make a centre of their own;
* two centres among which the votes make out no valley are one;
* two large regions of different classes are two items unless the votes clearly say otherwise,
  whereas a small patch of another class belongs to the item around it;
* loose splinters go to the item they touch.

Without an instance head an item is a connected component of one class.

Coordinates are those of pixel indices: the middle of the pixel in column 3 is x = 3.0, and the
middle of the heat map's cell j is x = step * j + (step - 1) / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

#: A patch of another class below this share of its component belongs to the item it is on ...
PATCH_SHARE = 0.04
#: ... and so does a larger one, up to this share, which the item surrounds.
ENCLOSED_PATCH_SHARE = 0.12
#: Below this share of an item a region of another class is never an item of its own.
CLASS_SPLIT_SHARE = 0.2
#: Mean probability at which two regions of different classes are two items whatever they vote.
CLASS_SPLIT_SCORE = 0.8
#: Share of a component's cells that must agree on a place for it to count as a missed centre.
MISSED_CENTER_SHARE = 0.05
#: Small holes are looked for around each, or in the whole image if there are more of them.
MOST_WINDOWS = 20
#: A splinter larger than this share of its item's main piece stays with its item.
SPLINTER_SHARE = 0.15


@dataclass(frozen=True, eq=False)
class _Cells:
    """The foreground cells of the heat map, one row each."""

    row: NDArray[np.intp]
    column: NDArray[np.intp]
    component: NDArray[np.int32]
    label: NDArray[np.uint8]
    vote: NDArray[np.float32]  # (n, 2) x, y
    step: int


def group_items(
    labels: NDArray[np.uint8],
    scores: NDArray[np.float32],
    centers: NDArray[np.float32] | None = None,
    offsets: NDArray[np.float32] | None = None,
    *,
    pixel_threshold: float = 0.0,
    center_threshold: float = 0.3,
    min_area: int = 40,
    max_centers: int = 256,
) -> NDArray[np.uint16]:
    """Group the foreground to items.

    Args:
        labels: (H, W) uint8, 0 background, everything else foreground of that class.
        scores: (H, W) float32 in 0..1, probability of the pixel's label.
        centers: (H / s, W / s) float32 heat map in which all but local maxima are 0, or None.
        offsets: (2, H / s, W / s) float32, (dx, dy) in pixels from the middle of the cell to the
            centre of mass of its item; needed if there are centers.
        pixel_threshold: foreground below this probability is taken for background.
        center_threshold: peaks of the heat map below it are no centres.
        min_area: no item is smaller [px].
        max_centers: only so many of the highest peaks are looked at.

    Returns:
        (H, W) uint16: 0 no item, 1..N ids without gaps.

    Raises:
        ValueError: if shapes do not fit together.
    """
    step = _check(labels, scores, centers, offsets)
    foreground = (labels != 0).view(np.uint8)
    if pixel_threshold > 0:
        foreground &= (scores >= pixel_threshold).view(np.uint8)
    _fill_holes(foreground, max(min_area // 2, 4))
    count, components, stats, _ = cv2.connectedComponentsWithStats(foreground, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area
    keep[0] = False
    if not keep.any():
        return np.zeros(labels.shape, np.uint16)

    inside = np.flatnonzero(foreground.view(bool))  # four times as fast as of numbers
    kinds = int(labels.max()) + 1
    histogram = np.bincount(
        components.ravel()[inside] * kinds + labels.ravel()[inside], minlength=count * kinds
    ).reshape(count, kinds)
    histogram[:, 0] = 0  # filled holes have no say in what an item is
    largest = histogram.max(axis=1)
    others = histogram.sum(axis=1) - largest

    plan = _Plan(np.zeros(count, np.int32))
    if centers is None or offsets is None:
        mixed = keep & (others >= np.maximum(min_area, PATCH_SHARE * largest))
        for component in np.flatnonzero(keep & ~mixed):
            plan.whole(component)
        for component in np.flatnonzero(mixed):
            window = _window(stats[component], 1, labels.shape)
            mask = components[window] == component
            plan.parts(window, _split_by_class(labels[window], mask, min_area))
    else:
        peaks, heights = _peaks(centers, center_threshold, max_centers, step)
        cells = _cells(components, keep, labels, offsets, step)
        mixed = keep & (others >= np.maximum(2 * min_area, CLASS_SPLIT_SHARE * largest))
        _group_by_votes(
            plan, labels, scores, components, stats, keep, mixed, cells, peaks, heights, min_area
        )
    return plan.paint(components)


class _Plan:
    """Which id each component gets, or each part of one that holds several items."""

    def __init__(self, table: NDArray[np.int32]) -> None:
        self.table = table
        self.count = 0
        self.of_center: dict[int, int] = {}
        self._parts: list[tuple[tuple[slice, slice], NDArray[np.int32]]] = []

    def new(self) -> int:
        self.count += 1
        return self.count

    def center(self, index: int) -> int:
        """The id of the item around a centre, which may lie in several components."""
        if index not in self.of_center:
            self.of_center[index] = self.new()
        return self.of_center[index]

    def whole(self, component: int, identity: int = 0) -> None:
        self.table[component] = identity or self.new()

    def parts(
        self,
        window: tuple[slice, slice],
        parts: NDArray[np.int32],
        identities: list[int] | None = None,
    ) -> None:
        """Take the parts 1..N of one component; 0 is what does not belong to it."""
        number = int(parts.max())
        if identities is None:
            identities = [self.new() for _ in range(number)]
        self._parts.append((window, np.array([0, *identities], np.int32)[parts]))

    def paint(self, components: NDArray[np.int32]) -> NDArray[np.uint16]:
        result = np.take(self.table.astype(np.uint16), components, mode="clip")
        for window, parts in self._parts:
            np.copyto(result[window], parts, where=parts > 0, casting="unsafe")
        if self._parts:  # a part may have lost all its pixels
            present = np.zeros(self.count + 1, bool)
            present[self.table] = True
            for _, parts in self._parts:
                present[parts] = True
            present[0] = False
            if not present[1:].all():
                table = np.zeros(self.count + 1, np.uint16)
                table[present] = np.arange(1, int(present.sum()) + 1)
                result = table[result]
        return result


def _check(
    labels: np.ndarray,
    scores: np.ndarray,
    centers: np.ndarray | None,
    offsets: np.ndarray | None,
) -> int:
    """Check the shapes; return how many pixels a cell of the heat map is wide (1 without one)."""
    if labels.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must be (H, W) alike")
    if centers is None:
        return 1
    if offsets is None or centers.ndim != 2 or offsets.shape != (2, *centers.shape):
        shape = None if offsets is None else offsets.shape
        raise ValueError(f"centers {centers.shape} need offsets (2, h, w) alike, not {shape}")
    step = labels.shape[0] // max(centers.shape[0], 1)
    if step < 1 or (centers.shape[0] * step, centers.shape[1] * step) != labels.shape:
        raise ValueError(f"centers {centers.shape} are no even fraction of labels {labels.shape}")
    return step


def _fill_holes(foreground: NDArray[np.uint8], largest: int) -> None:
    """Fill holes of at most ``largest`` pixels, in place."""
    contours, tree = cv2.findContours(foreground, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) == 0:
        return
    # A hole's contour runs around it, and its pixels hang together. Mostly there is none so small.
    windows = [cv2.boundingRect(contours[hole]) for hole in np.flatnonzero(tree[0, :, 3] >= 0)]
    windows = [window for window in windows if window[2] + window[3] - 5 <= largest]
    if len(windows) > MOST_WINDOWS:
        windows = [(0, 0, foreground.shape[1], foreground.shape[0])]
    for x, y, width, height in windows:
        part = foreground[y : y + height, x : x + width]
        _, holes, stats, _ = cv2.connectedComponentsWithStats(1 - part, connectivity=4)
        left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
        fill = (
            (stats[:, cv2.CC_STAT_AREA] <= largest)
            & (left > 0)
            & (top > 0)
            & (left + stats[:, cv2.CC_STAT_WIDTH] < width)
            & (top + stats[:, cv2.CC_STAT_HEIGHT] < height)
        )
        fill[0] = False
        if fill.any():
            part |= fill.view(np.uint8)[holes]


def _window(stats: NDArray[np.int32], step: int, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """The bounding box of a component, widened to whole cells."""
    x, y, width, height = (int(value) for value in stats[:4])
    return (
        slice(y // step * step, min(-(-(y + height) // step) * step, shape[0])),
        slice(x // step * step, min(-(-(x + width) // step) * step, shape[1])),
    )


def _fill_nearest(parts: NDArray[np.int32], mask: NDArray[np.bool_]) -> None:
    """Give every pixel of the mask that is in no part to the nearest part, in place."""
    missing = mask & (parts == 0)
    if not missing.any():
        return
    seeds = parts > 0
    if not seeds.any():
        parts[mask] = 1
        return
    source = (~seeds).view(np.uint8)
    _, index = cv2.distanceTransformWithLabels(
        source, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    table = np.zeros(int(index.max()) + 1, np.int32)
    table[index[seeds]] = parts[seeds]
    parts[missing] = table[index[missing]]


def _split_by_class(
    labels: NDArray[np.uint8], mask: NDArray[np.bool_], min_area: int
) -> NDArray[np.int32]:
    """Split a component to connected regions of one class; small patches join their neighbour."""
    parts = np.zeros(labels.shape, np.int32)
    total = int(mask.sum())
    number = 0
    best: tuple[int, NDArray[np.bool_]] | None = None
    for kind in np.flatnonzero(np.bincount(labels[mask])):
        if kind == 0:
            continue
        of_kind = (mask & (labels == kind)).view(np.uint8)
        count, regions, stats, _ = cv2.connectedComponentsWithStats(of_kind, connectivity=8)
        for region in range(1, count):
            area = int(stats[region, cv2.CC_STAT_AREA])
            if area < max(min_area, PATCH_SHARE * total) and (best and area <= best[0]):
                continue
            piece = regions == region
            if best is None or area > best[0]:
                best = (area, piece)
            if area < max(min_area, PATCH_SHARE * total):
                continue
            if area < ENCLOSED_PATCH_SHARE * total and _enclosed(piece, mask) > 0.6:
                continue
            number += 1
            parts[piece] = number
    if number == 0 and best is not None:
        parts[best[1]] = 1
    _fill_nearest(parts, mask)
    return parts


def _enclosed(piece: NDArray[np.bool_], mask: NDArray[np.bool_]) -> float:
    """The share of a piece's rim which lies on the rest of its component."""
    rim = cv2.dilate(piece.view(np.uint8), np.ones((3, 3), np.uint8)).view(bool) & ~piece
    around = int(rim.sum())
    return float((rim & mask).sum()) / around if around else 1.0


def _peaks(
    centers: NDArray[np.float32], threshold: float, most: int, step: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Positions (k, 2) x, y in pixels and heights (k,) of the peaks, highest first."""
    flat = centers.ravel()
    found = np.flatnonzero(flat > max(threshold, 0.0))
    found = found[np.argsort(-flat[found], kind="stable")][:most]
    rows, columns = np.divmod(found, centers.shape[1])
    places = np.stack([columns, rows], axis=1).astype(np.float32) * step + (step - 1) / 2
    return places.astype(np.float32), flat[found]


def _cells(
    components: NDArray[np.int32],
    keep: NDArray[np.bool_],
    labels: NDArray[np.uint8],
    offsets: NDArray[np.float32],
    step: int,
) -> _Cells:
    """The cells whose middle lies on a component, and where they vote to.

    Those on the rim, of which less is seen, are left out: they point anywhere.
    """
    middle = step // 2
    of_cell = components[middle::step, middle::step].copy()
    of_cell *= keep[of_cell]
    rows, columns = np.nonzero(of_cell)
    vote = np.empty((len(rows), 2), np.float32)
    vote[:, 0] = columns * step + (step - 1) / 2 + offsets[0, rows, columns]
    vote[:, 1] = rows * step + (step - 1) / 2 + offsets[1, rows, columns]
    label = labels[middle::step, middle::step][rows, columns]
    return _Cells(rows, columns, of_cell[rows, columns], label, vote, step)


def _distances(votes: NDArray[np.float32], places: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, k) squared distances."""
    dx = votes[:, :1] - places[None, :, 0]
    dy = votes[:, 1:] - places[None, :, 1]
    dx *= dx
    dy *= dy
    dx += dy
    return dx


def _group_by_votes(
    plan: _Plan,
    labels: NDArray[np.uint8],
    scores: NDArray[np.float32],
    components: NDArray[np.int32],
    stats: NDArray[np.int32],
    keep: NDArray[np.bool_],
    mixed: NDArray[np.bool_],
    cells: _Cells,
    peaks: NDArray[np.float32],
    heights: NDArray[np.float32],
    min_area: int,
) -> None:
    count, number = len(stats), len(peaks)
    radius = np.sqrt(stats[:, cv2.CC_STAT_AREA] / np.pi)
    cell_count = np.bincount(cells.component, minlength=count)
    if number:
        distance = _distances(cells.vote, peaks)
        nearest = distance.argmin(axis=1)
        gap = np.sqrt(distance[np.arange(len(nearest)), nearest])
        key = cells.component * number + nearest
        votes = np.bincount(key, minlength=count * number).reshape(count, number)
        spread = np.bincount(key, weights=gap, minlength=count * number).reshape(count, number)
        spread = spread / np.maximum(votes, 1)
        home = votes.argmax(axis=0)
        reach = np.sqrt(votes.sum(axis=0) * cells.step**2 / np.pi)
        at_home = home[None, :] == np.arange(count)[:, None]
        # Votes from another component must meet a centre well to make both one item.
        limit = np.where(at_home, 0.8 * radius[:, None], 0.3 * reach[None, :])
        least = max(2.0, min_area / cells.step**2)
        known = (votes >= np.minimum(least, 0.5 * cell_count[:, None])) & (votes > 0)
        known &= spread <= np.maximum(limit, 1.5 * cells.step)
        far = gap > np.maximum(0.5 * radius[cells.component], 2 * cells.step)
        far_count = np.bincount(cells.component, weights=far, minlength=count)
        missed = far_count >= np.maximum(MISSED_CENTER_SHARE * cell_count, least)
    else:
        known = np.zeros((count, 0), bool)
        missed = np.zeros(count, bool)
    centers_of = known.sum(axis=1)
    simple = keep & ~mixed & ~missed & (centers_of <= 1)
    for component in np.flatnonzero(simple):
        if centers_of[component]:
            plan.whole(component, plan.center(int(known[component].argmax())))
        else:
            plan.whole(component)
    for component in np.flatnonzero(keep & ~simple):
        window = _window(stats[component], cells.step, labels.shape)
        mask = components[window] == component
        of_component = np.flatnonzero(cells.component == component)
        chosen = np.flatnonzero(known[component])
        if len(of_component) == 0 or (len(chosen) == 0 and not missed[component]):
            plan.parts(window, _split_by_class(labels[window], mask, min_area))
            continue
        part, origin = _split_by_votes(
            cells, of_component, peaks[chosen], heights[chosen], radius[component], min_area
        )
        parts = _to_pixels(cells, of_component, part, len(origin), labels, mask, window)
        parts, origin = _mend(parts, origin, cells, of_component, mask, window, min_area)
        if mixed[component]:
            parts, origin = _split_classes(
                parts, origin, cells, of_component, labels[window], scores[window], window, min_area
            )
        identities = [plan.center(int(chosen[o])) if o >= 0 else plan.new() for o in origin]
        plan.parts(window, parts, identities)


def _split_by_votes(
    cells: _Cells,
    of_component: NDArray[np.intp],
    places: NDArray[np.float32],
    heights: NDArray[np.float32],
    radius: float,
    min_area: int,
) -> tuple[NDArray[np.intp], list[int]]:
    """Assign the cells of one component to its items.

    Returns:
        the item (0..n-1) of each cell, and for each item the index of its centre among
        ``places``, or -1 for one that the heat map did not show.
    """
    vote = cells.vote[of_component]
    origin = list(range(len(places)))
    height = [float(h) for h in heights]
    least = max(2, round(min_area / cells.step**2))
    for _ in range(8):
        new = _missed_center(cells, vote, places, radius, least)
        if new is None:
            break
        places = np.concatenate([places, new[None]]).astype(np.float32)
        origin.append(-1)
        height.append(0.0)

    if len(places) == 0:
        return np.zeros(len(vote), np.intp), [-1]
    part = _distances(vote, places).argmin(axis=1)
    while len(places) > 1:
        size = np.bincount(part, minlength=len(places))
        few = np.flatnonzero(size < least)  # a peak that hardly any cell votes for is none
        if len(few):
            # Not all at once: the votes of the first to go may save the others.
            gone = few[np.argsort(size[few], kind="stable")[: (len(few) + 1) // 2]].tolist()
        else:
            gone = []
            for kept, other in _same_items(cells, of_component, vote, part, size, height, least):
                places[kept] = vote[(part == kept) | (part == other)].mean(axis=0)
                gone.append(other)
        if not gone:
            break
        places = np.delete(places, gone, axis=0)
        for index in sorted(gone, reverse=True):
            del origin[index], height[index]
        part = _distances(vote, places).argmin(axis=1)
    return part, origin


def _missed_center(
    cells: _Cells,
    vote: NDArray[np.float32],
    places: NDArray[np.float32],
    radius: float,
    least: int,
) -> NDArray[np.float32] | None:
    """A place far from all centres which a good part of the cells agree on, if there is one."""
    if len(places):
        gap = np.sqrt(_distances(vote, places).min(axis=1))
        loose = vote[gap > max(0.5 * radius, 2 * cells.step)]
    else:
        loose = vote
    need = max(MISSED_CENTER_SHARE * len(vote), 2 * least)
    if len(loose) < need:
        return None
    # Densest place of a coarse histogram, then the mean around it: one step of mean shift.
    bin_size = 2.0 * cells.step
    corner = loose.min(axis=0)
    index = ((loose - corner) / bin_size).astype(np.intp)
    columns = int(index[:, 0].max()) + 1
    grid = np.bincount(index[:, 1] * columns + index[:, 0]).astype(np.float32)
    rows = int(index[:, 1].max()) + 1
    grid = np.pad(grid, (0, rows * columns - len(grid))).reshape(rows, columns)
    smooth = cv2.blur(grid, (3, 3), borderType=cv2.BORDER_CONSTANT)
    row, column = np.unravel_index(int(smooth.argmax()), smooth.shape)
    place = corner + (np.array([column, row], np.float32) + 0.5) * bin_size
    own = np.sqrt(len(loose) * cells.step**2 / np.pi)
    away = np.sqrt(_distances(loose, place[None].astype(np.float32))[:, 0])
    reach = max(0.5 * own, bin_size)
    near = away <= reach
    # Votes of an item are dense about its middle; those of a false peak's surroundings are not.
    if near.sum() < max(need, 0.6 * np.count_nonzero(away <= 2 * reach)):
        return None
    return loose[near].mean(axis=0)


def _same_items(
    cells: _Cells,
    of_component: NDArray[np.intp],
    vote: NDArray[np.float32],
    part: NDArray[np.intp],
    size: NDArray[np.intp],
    height: list[float],
    least: int,
) -> list[tuple[int, int]]:
    """Pairs of parts that are one item, no part in two of them; of each the higher peak first.

    The votes of one item are one cloud. Cut in two by two centres, the halves' means lie 1.3
    (normal) to 1.7 (uniform) times the sum of their deviations apart; for two clouds it is more.
    A weak peak must be more clearly apart to stand for an item.
    """
    number = len(size)
    total = np.stack([np.bincount(part, weights=vote[:, axis]) for axis in (0, 1)], axis=1)
    mean = total / size[:, None]
    rest = vote - mean[part]
    xx, xy, yy = (
        np.bincount(part, weights=product, minlength=number) / size
        for product in (rest[:, 0] ** 2, rest[:, 0] * rest[:, 1], rest[:, 1] ** 2)
    )
    difference = mean[:, None] - mean[None]
    apart = np.sqrt((difference**2).sum(axis=2))
    unit = difference / np.maximum(apart, 1e-6)[:, :, None]
    ux, uy = unit[..., 0], unit[..., 1]
    deviation = np.sqrt(
        np.maximum(ux**2 * xx[:, None] + 2 * ux * uy * xy[:, None] + uy**2 * yy[:, None], 0)
    )
    ratio = apart / np.maximum(deviation + deviation.T, 2.0)
    # An item's own pixels have their centroid where they vote to. Scattered pixels, or an end of
    # an item that votes for less than the way to its middle, do not, and need a wider valley.
    place = np.stack([cells.column[of_component], cells.row[of_component]], axis=1) * cells.step
    total = np.stack([np.bincount(part, weights=place[:, axis]) for axis in (0, 1)], axis=1)
    middle = total / size[:, None] + (cells.step - 1) / 2
    astray = np.hypot(*(middle - mean).T) > 0.6 * np.sqrt(size * cells.step**2 / np.pi)
    doubtful = astray[:, None] | astray[None]
    doubtful |= np.sqrt(((middle[:, None] - middle[None]) ** 2).sum(axis=2)) < 0.5 * apart
    lower = np.minimum.outer(height, height)
    union = np.sqrt((size[:, None] + size[None]) * cells.step**2 / np.pi)
    same = (ratio < 2.0 - 0.5 * lower + doubtful) | (apart < np.maximum(0.2 * union, cells.step))

    kinds = int(cells.label.max()) + 1
    histogram = np.bincount(
        part * kinds + cells.label[of_component], minlength=number * kinds
    ).reshape(number, kinds)
    histogram[:, 0] = 0
    main = histogram.argmax(axis=1)
    pure = (histogram.max(axis=1) >= 0.7 * size) & (size >= 2 * least)
    different = (main[:, None] != main[None]) & pure[:, None] & pure[None]
    same &= ~different
    same[np.tril_indices(number)] = False
    first, second = np.nonzero(same)
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for index in np.argsort(ratio[first, second], kind="stable"):
        one, other = int(first[index]), int(second[index])
        if one not in taken and other not in taken:
            taken |= {one, other}
            pairs.append((one, other) if height[one] >= height[other] else (other, one))
    return pairs


def _to_pixels(
    cells: _Cells,
    of_component: NDArray[np.intp],
    part: NDArray[np.intp],
    number: int,
    labels: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    window: tuple[slice, slice],
) -> NDArray[np.int32]:
    """Carry the parts of the cells over to the pixels, with a boundary finer than the cells.

    Between cells of different parts the boundary is where their linear interpolation is equal,
    and where classes differ it follows the labels, which are known at every pixel.
    """
    parts = np.zeros(mask.shape, np.int32)
    if number == 1:
        parts[mask] = 1
        return parts
    step = cells.step
    row = cells.row[of_component] - window[0].start // step
    column = cells.column[of_component] - window[1].start // step
    rows, columns = mask.shape[0] // step, mask.shape[1] // step
    label = labels[window]
    of_cell = cells.label[of_component]
    best = np.full(mask.shape, 1e-3, np.float32)
    for index in range(number):
        mine = part == index
        y, x = row[mine], column[mine]
        y0, y1 = max(int(y.min()) - 1, 0), min(int(y.max()) + 2, rows)
        x0, x1 = max(int(x.min()) - 1, 0), min(int(x.max()) + 2, columns)
        weight = np.zeros((y1 - y0, x1 - x0), np.float32)
        weight[y - y0, x - x0] = 1.0
        weight = cv2.resize(weight, ((x1 - x0) * step, (y1 - y0) * step)).astype(np.float32)
        area = (slice(y0 * step, y1 * step), slice(x0 * step, x1 * step))
        votes = np.bincount(of_cell[mine])
        votes[0] = 0
        weight[label[area] == votes.argmax()] *= 2.0
        better = weight > best[area]
        np.copyto(best[area], weight, where=better)
        parts[area][better] = index + 1
    parts *= mask
    _fill_nearest(parts, mask)
    return parts


def _votes_of(
    piece: NDArray[np.bool_],
    cells: _Cells,
    of_component: NDArray[np.intp],
    window: tuple[slice, slice],
) -> NDArray[np.float32]:
    """(n, 2) votes of the cells whose middle lies on a piece of the window."""
    middle = cells.step // 2
    row = cells.row[of_component] * cells.step + middle - window[0].start
    column = cells.column[of_component] * cells.step + middle - window[1].start
    return cells.vote[of_component[piece[row, column]]]


def _apart(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Distance between the means of two sets of votes; 0 if one is empty."""
    if len(first) == 0 or len(second) == 0:
        return 0.0
    dx, dy = first.mean(axis=0) - second.mean(axis=0)
    return float(np.hypot(dx, dy))


def _mend(
    parts: NDArray[np.int32],
    origin: list[int],
    cells: _Cells,
    of_component: NDArray[np.intp],
    mask: NDArray[np.bool_],
    window: tuple[slice, slice],
    min_area: int,
) -> tuple[NDArray[np.int32], list[int]]:
    """Give splinters to what they touch; large pieces that vote for elsewhere become items."""
    origin = list(origin)
    loose = False
    for identity in range(1, len(origin) + 1):
        own = (parts == identity).view(np.uint8)
        count, regions, stats, _ = cv2.connectedComponentsWithStats(own, connectivity=8)
        area = stats[1:, cv2.CC_STAT_AREA]
        if count == 1 or (count == 2 and area[0] >= min_area):
            continue
        main = int(area.argmax())
        for region, size in enumerate(area):
            piece = regions == region + 1
            if size < min_area or (region != main and size < SPLINTER_SHARE * area[main]):
                parts[piece] = 0
                loose = True
            elif region != main:
                apart = _apart(
                    _votes_of(regions == main + 1, cells, of_component, window),
                    _votes_of(piece, cells, of_component, window),
                )
                if apart > max(0.5 * np.sqrt((area[main] + size) / np.pi), 2 * cells.step):
                    origin.append(-1)
                    parts[piece] = len(origin)
    if loose:
        _fill_nearest(parts, mask)
    return parts, origin


def _split_classes(
    parts: NDArray[np.int32],
    origin: list[int],
    cells: _Cells,
    of_component: NDArray[np.intp],
    labels: NDArray[np.uint8],
    scores: NDArray[np.float32],
    window: tuple[slice, slice],
    min_area: int,
) -> tuple[NDArray[np.int32], list[int]]:
    """Split the parts that hold large regions of two classes, unless votes and scores say one."""
    origin = list(origin)
    for identity in range(1, len(origin) + 1):
        own = parts == identity
        histogram = np.bincount(labels[own], minlength=1)
        histogram[0] = 0
        total = int(histogram.sum())
        main = int(histogram.argmax())
        least = max(2 * min_area, CLASS_SPLIT_SHARE * total)
        for kind in np.flatnonzero(histogram >= least):
            if kind == main:
                continue
            of_kind = (own & (labels == kind)).view(np.uint8)
            _, regions, stats, _ = cv2.connectedComponentsWithStats(of_kind, connectivity=8)
            region = int(stats[1:, cv2.CC_STAT_AREA].argmax()) + 1
            if stats[region, cv2.CC_STAT_AREA] < least:
                continue
            piece = regions == region
            rest = own & (labels == main)
            apart = _apart(
                _votes_of(piece, cells, of_component, window),
                _votes_of(rest, cells, of_component, window),
            )
            if (
                apart > 0.4 * np.sqrt(total / np.pi)
                or min(float(scores[piece].mean()), float(scores[rest].mean())) > CLASS_SPLIT_SCORE
            ):
                origin.append(-1)
                parts[piece] = len(origin)
    return parts, origin
