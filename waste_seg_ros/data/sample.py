"""The one sample type that every reader and generator gives: a photograph with its truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BACKGROUND = 0
#: An item of unknown kind: foreground for binary figures, ignored by semantic ones.
OTHER = 254
#: No truth is known here: the pixel counts in no figure and in no loss.
IGNORE = 255
#: Names of the kinds of waste; the label id of a kind is its index here plus one.
CLASSES: tuple[str, ...] = ("paper", "bottle", "aluminum", "nylon")


@dataclass(frozen=True, eq=False)
class Sample:
    """A photograph and what is on it.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        labels: (H, W) uint8: 0 background, 1..C kind of waste, 254 item of unknown kind
            (``OTHER``), 255 no truth (``IGNORE``).
        instances: (H, W) uint16: 0 none, 1..N the item that is seen in the pixel. Ids are
            those of this frame only.
        name: where the sample came from, for reports.
    """

    image: np.ndarray
    labels: np.ndarray
    instances: np.ndarray
    name: str = ""
