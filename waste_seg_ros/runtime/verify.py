"""Whether two runtimes say the same of a network: a test frame through both.

The same graph in floats gives the same labels on every runtime but for ties. In 8 bits runtimes
round and fuse differently: of the bundles shipped, OpenVINO and ONNX Runtime agree on 85 to 99.7 %
of the test frame, which is harsher than a belt is, as it shows no item that is sure of itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from waste_seg_ros.runtime.backends import Prediction

AGREEMENT = 0.995
"""Share of a test frame's pixels that must get the same label, and of its numbers be alike."""

COARSE_AGREEMENT = 0.8
"""The same where a network computes in 8 bits or in bf16, of labels only."""


def test_frame(size: tuple[int, int]) -> NDArray[np.uint8]:
    """A frame (H, W, 3) of coloured blobs and noise to compare two runs of a network on."""
    import cv2

    rng = np.random.default_rng(7)
    width, height = size
    coarse = rng.integers(0, 256, (8, 10, 3), np.uint8)
    smooth = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(smooth + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Difference:
    """How two predictions differ.

    Attributes:
        labels: share of pixels of the same label, 0..1.
        alike: the least share, over scores, centres and offsets, of numbers that differ by no more
            than 1 % of 1 + their size.
        largest: of the differences of a score, 0..1; NaN of different shapes.
    """

    labels: float
    alike: float
    largest: float

    def fits(self, coarse: bool) -> bool:
        """Whether it is small enough; ``coarse``: the network computes in 8 bits or in bf16."""
        if coarse:
            return self.labels >= COARSE_AGREEMENT
        return min(self.labels, self.alike) >= AGREEMENT

    def __str__(self) -> str:
        return (
            f"same labels on {self.labels:.2%}, numbers alike on {self.alike:.2%}, "
            f"scores off by up to {self.largest:.2g}"
        )


def compare(found: Prediction, expected: Prediction) -> Difference:
    """How a prediction differs from what another runtime gives for the same frame."""
    if found.labels.shape != expected.labels.shape:
        return Difference(0.0, 0.0, float("nan"))
    pairs: list[tuple[Any, Any]] = [
        (found.scores, expected.scores),
        (found.centers, expected.centers),
        (found.offsets, expected.offsets),
    ]
    shares = [_alike(one, other) for one, other in pairs if one is not None or other is not None]
    return Difference(
        float((found.labels == expected.labels).mean()),
        min(shares),
        float(np.abs(found.scores - expected.scores).max()),
    )


def _alike(one: NDArray[np.float32] | None, other: NDArray[np.float32] | None) -> float:
    if one is None or other is None or one.shape != other.shape:
        return 0.0
    # A pixel of another label has another score, and a near tie turns a maximum: hence a share.
    return float((np.abs(one - other) <= 1e-2 * (1 + np.abs(other))).mean())
