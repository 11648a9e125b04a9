"""Items against a slow reference that looks at one item and its pixels at a time."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from waste_seg_ros.perception.grouping import group_items
from waste_seg_ros.perception.items import ItemParams, describe_items

SIZE = (704, 496)  # of the camera: four and three times the network's


def picture(seed, number):
    """Ids with gaps, items on items and at the border, and labels and scores that are not pure."""
    random = np.random.default_rng(seed)
    instances = np.zeros((124, 176), np.uint16)
    labels = np.zeros(instances.shape, np.uint8)
    for identity in random.choice(np.arange(1, 900), number, replace=False).tolist():
        center = random.integers(0, 176), random.integers(0, 124)
        axes = random.integers(2, 22), random.integers(2, 14)
        mask = np.zeros(instances.shape, np.uint8)
        cv2.ellipse(mask, center, axes, int(random.integers(180)), 0, 360, 1, -1)
        instances[mask > 0] = identity
        labels[mask > 0] = random.choice([1, 2, 3, 254])
    noisy = random.random(labels.shape) < 0.1
    labels[noisy] = random.integers(0, 5, labels.shape)[noisy]
    return instances, labels, random.uniform(0.3, 1.0, labels.shape).astype(np.float32)


def near_another(instances, identity, distance):
    """Whether a pixel of the item has one of another item within so many pixels."""
    for row, column in np.argwhere(instances == identity):
        around = instances[
            max(row - distance, 0) : row + distance + 1,
            max(column - distance, 0) : column + distance + 1,
        ]
        if ((around != 0) & (around != identity)).any():
            return True
    return False


@pytest.mark.parametrize("number", (1, 2, 9, 40))
@pytest.mark.parametrize("scored", (False, True))
@pytest.mark.parametrize("distance", (0, 1, 3))
def test_what_is_measured_at_once_is_what_is_measured_one_by_one(number, scored, distance):
    instances, labels, scores = picture(10 * number + distance, number)
    params = ItemParams(touching_px=distance, border_px=1 + distance)
    items = describe_items(instances, labels, scores if scored else None, SIZE, params)
    assert [item.id for item in items] == sorted(set(instances[instances > 0].tolist()))
    height, width = instances.shape
    for item in items:
        own = instances == item.id
        rows, columns = np.nonzero(own)
        assert item.area == pytest.approx(own.sum() * 16)
        assert item.center[0] == pytest.approx((columns.mean() + 0.5) * 4 - 0.5)
        assert item.center[1] == pytest.approx((rows.mean() + 0.5) * 4 - 0.5)
        left, top = 4 * columns.min(), 4 * rows.min()
        assert item.roi == (left, top, 4 * columns.max() + 4 - left, 4 * rows.max() + 4 - top)
        votes = {
            kind: float(scores[own & (labels == kind)].sum(dtype=float))
            if scored
            else int((own & (labels == kind)).sum())
            for kind in (1, 2, 3, 4)
        }
        total = sum(votes.values())
        counted = int((own & np.isin(labels, (1, 2, 3, 4))).sum())
        best, second = sorted(votes.values(), reverse=True)[:2]
        assert votes.get(item.class_index, 0.0) == pytest.approx(best) or total == 0
        score = total / counted * best / total if total else 1.0
        assert item.score == pytest.approx(score)
        tie = total > 0 and (best - second) / total < params.uncertain_margin
        assert item.uncertain == (tie or (total > 0 and total / counted < params.uncertain_score))
        edge = min(rows.min(), columns.min(), height - 1 - rows.max(), width - 1 - columns.max())
        assert item.truncated == (edge < params.border_px)
        assert item.touching == (distance > 0 and near_another(instances, item.id, distance))
        assert item.outline.dtype == np.float32 and item.outline.flags.c_contiguous
        assert (item.outline >= 0).all() and (item.outline <= (703, 495)).all()
        assert not (item.pickable and item.truncated)


def fill_slowly(foreground, largest):
    """Fill the holes of at most so many pixels, pixel by pixel."""
    height, width = foreground.shape
    filled, seen = foreground.copy(), foreground.copy()
    for row, column in np.argwhere(~foreground):
        if seen[row, column]:
            continue
        hole, open_to, rim = [], [(row, column)], False
        seen[row, column] = True
        while open_to:
            y, x = open_to.pop()
            hole.append((y, x))
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if not (0 <= v < height and 0 <= u < width):
                    rim = True
                elif not seen[v, u]:
                    seen[v, u] = True
                    open_to.append((v, u))
        if not rim and len(hole) <= largest:
            for y, x in hole:
                filled[y, x] = True
    return filled


@pytest.mark.parametrize("holes", (0, 1, 6, 60, 600))
def test_small_holes_are_filled_and_larger_ones_are_not(holes):
    random = np.random.default_rng(holes)
    foreground = np.zeros((96, 128), bool)
    foreground[8:60, :] = foreground[70:90, 10:60] = True
    for _ in range(holes):
        row, column = random.integers(0, 96), random.integers(0, 128)
        high, wide = random.integers(1, 8, 2) if random.random() < 0.5 else (1, 1)
        foreground[row : row + high, column : column + wide] = False
    foreground[40, 40] = True  # an island in whatever is there
    labels = foreground.astype(np.uint8)
    found = group_items(labels, np.ones(labels.shape, np.float32), min_area=40) > 0
    expected = fill_slowly(foreground, 20)
    # Pieces of less than 40 pixels are no items.
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(expected.astype(np.uint8))
    expected &= stats[pieces, cv2.CC_STAT_AREA] >= 40
    assert np.array_equal(found, expected)
    assert (found & ~foreground).any() == (holes > 0)


def test_a_hole_is_filled_where_all_around_is_foreground():
    labels = np.ones((40, 50), np.uint8)
    labels[20, 30] = 0
    assert (group_items(labels, np.ones(labels.shape, np.float32)) == 1).all()
