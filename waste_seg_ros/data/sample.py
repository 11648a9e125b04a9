"""The one sample type that every reader and the synthetic belt produce."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLASSES: tuple[str, ...] = ("paper", "bottle", "aluminum", "nylon")
"""Default class names; a class's label id is its index + 1."""

BACKGROUND = 0
"""Label of the belt and of all that is not an item."""

OTHER = 254
"""Label of an item whose class is not among the model's: foreground of unknown kind.

Counts as foreground in binary training and metrics, is ignored in semantic ones.
"""

IGNORE = 255
"""Label of pixels that neither training nor metrics look at."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated image.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        labels: (H, W) uint8: 0 background, 1..C class, 254 other item, 255 ignore.
        instances: (H, W) uint16: 0 no item, 1..N id of the item seen at the pixel.
        name: where it came from, for messages and galleries.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    instances: NDArray[np.uint16]
    name: str = ""
