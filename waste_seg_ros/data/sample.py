"""The one sample type that every reader and the synthetic belt produce."""

from __future__ import annotations

from collections.abc import Sequence
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


class DataError(ValueError):
    """Data cannot be used; the message names the file and the entry, and where it can, the mend."""


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


def rename_labels(
    labels: NDArray[np.uint8], source: Sequence[str], target: Sequence[str]
) -> NDArray[np.uint8]:
    """Label ids of one list of classes as those of another; classes it lacks become 254."""
    if tuple(source) == tuple(target):
        return labels
    table = np.arange(256, dtype=np.uint8)
    for index, name in enumerate(source, 1):
        table[index] = target.index(name) + 1 if name in target else OTHER
    return table[labels]
