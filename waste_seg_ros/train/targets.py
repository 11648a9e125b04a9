"""From a sample's masks to what the heads are trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.data.sample import IGNORE

CELL = 4
"""Input pixels per cell of the heat map and the offsets."""

MIN_PIXELS = 24
"""Items of which less is seen are no centres to learn; the heat map is unknown there."""

SIGMA_RANGE = (4.0, 10.0)
"""Width of a centre's Gaussian in input pixels: a tenth of its item's size, within these."""


def make_targets(
    labels: NDArray[np.uint8], instances: NDArray[np.uint16]
) -> dict[str, NDArray[np.generic]]:
    """Targets of all heads for one image.

    Args:
        labels: (H, W) uint8 as in `Sample`, H and W multiples of 4.
        instances: (H, W) uint16 item ids as in `Sample`.

    Returns:
        With h = H/4, w = W/4:

        - ``labels`` (H, W) uint8, as given;
        - ``heat`` (1, h, w) float32: Gaussians about the cell that holds each item's centre of
          mass (of its visible pixels), exactly 1 there;
        - ``heat_weight`` (1, h, w) float32: 0 where ignored or where an item is too small;
        - ``offsets`` (2, h, w) float32: (dx, dy) in pixels from the cell's centre to the centre of
          mass of the item that the cell shows;
        - ``offset_weight`` (1, h, w) float32: 0 off the items, on them 1/sqrt(cells of the item),
          so that a small item counts for more than its area and less than a large one.
    """
    height, width = labels.shape
    h, w = height // CELL, width // CELL
    flat = instances.ravel()
    # Only the items' pixels are looked at: they are few.
    where = np.flatnonzero(flat)
    ids = flat[where]
    count = int(ids.max()) + 1 if len(ids) else 1
    area = np.bincount(ids, minlength=count)
    safe = np.maximum(area, 1)
    center_x = np.bincount(ids, where % width, count) / safe
    center_y = np.bincount(ids, where // width, count) / safe
    kept = area >= MIN_PIXELS
    kept[0] = False

    # The cell's item is the one in its middle.
    shown = instances[CELL // 2 :: CELL, CELL // 2 :: CELL].astype(np.intp)
    on_item = kept[shown]
    column = CELL * np.arange(w, dtype=np.float32) + (CELL - 1) / 2
    row = CELL * np.arange(h, dtype=np.float32)[:, None] + (CELL - 1) / 2
    offsets = np.zeros((2, h, w), np.float32)
    offsets[0] = np.where(on_item, center_x[shown] - column, 0.0)
    offsets[1] = np.where(on_item, center_y[shown] - row, 0.0)
    cells = np.bincount(shown.ravel(), minlength=count)
    per_item = np.where(kept, 1.0 / np.sqrt(np.maximum(cells, 1)), 0.0)
    offset_weight = per_item[shown].astype(np.float32)

    heat = np.zeros((h, w), np.float32)
    for item in np.flatnonzero(kept):
        sigma = float(np.clip(np.sqrt(area[item]) / 10, *SIGMA_RANGE)) / CELL
        i = min(h - 1, int(center_y[item] + 0.5) // CELL)
        j = min(w - 1, int(center_x[item] + 0.5) // CELL)
        reach = int(np.ceil(3 * sigma))
        top, left = max(0, i - reach), max(0, j - reach)
        rows = np.arange(top, min(h, i + reach + 1)) - i
        columns = np.arange(left, min(w, j + reach + 1)) - j
        bell = np.exp(-(rows**2) / (2 * sigma**2))[:, None] * np.exp(-(columns**2) / (2 * sigma**2))
        view = heat[top : top + len(rows), left : left + len(columns)]
        np.maximum(view, bell, out=view, casting="same_kind")
    heat_weight = ((shown == 0) | on_item) & (
        labels[CELL // 2 :: CELL, CELL // 2 :: CELL] != IGNORE
    )
    # A centre is known even if its own cell is ignored or shows another item's scrap.
    heat_weight |= heat == 1.0
    return {
        "labels": labels,
        "heat": heat[None],
        "heat_weight": heat_weight[None].astype(np.float32),
        "offsets": offsets,
        "offset_weight": offset_weight[None],
    }
