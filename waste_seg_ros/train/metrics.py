"""Figures of merit, gathered frame by frame.

Every accumulator takes one frame at a time through ``update`` and can be asked at any time.
Figures that nothing was seen for are NaN, never a made-up 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from waste_seg_ros.data.sample import BACKGROUND, IGNORE, OTHER


class ConfusionMatrix:
    """Pixels by true and predicted class.

    Attributes:
        counts: (C + 1, C + 1) int64, rows the truth, columns the prediction, 0 the background.
    """

    def __init__(self, classes: int) -> None:
        self.counts = np.zeros((classes + 1, classes + 1), np.int64)

    def update(self, truth: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> None:
        """Add a frame.

        Args:
            truth: (H, W) labels; pixels of 254 (other item) and 255 (ignore) are passed over.
            prediction: (H, W) labels 0..C.

        Raises:
            ValueError: if shapes differ or a label is not among the classes.
        """
        _alike(truth, prediction)
        size = len(self.counts)
        counted = truth < OTHER
        true, predicted = truth[counted].astype(np.intp), prediction[counted].astype(np.intp)
        for name, values in (("truth", true), ("prediction", predicted)):
            if len(values) and int(values.max()) >= size:
                raise ValueError(f"label {values.max()} in the {name}; there are 0..{size - 1}")
        self.counts += np.bincount(true * size + predicted, minlength=size * size).reshape(
            size, size
        )

    def iou(self) -> NDArray[np.float64]:
        """(C + 1,) intersection over union per class, background first.

        NaN for a class that is not in the truth: what was predicted of it wrongly is counted
        against the classes it was taken from.
        """
        hit = np.diag(self.counts).astype(float)
        true = self.counts.sum(axis=1)
        union = true + self.counts.sum(axis=0) - hit
        return np.where(true > 0, hit / np.maximum(union, 1), np.nan)

    def mean_iou(self, background: bool = True) -> float:
        """Mean over the classes in the truth, with or without the background."""
        return _mean(self.iou() if background else self.iou()[1:])

    def pixel_accuracy(self) -> float:
        """The share of pixels whose class is right."""
        return _ratio(float(np.trace(self.counts)), float(self.counts.sum()))


class BinaryIoU:
    """Intersection over union of all foreground, whatever its class."""

    def __init__(self) -> None:
        self.intersection = 0
        self.union = 0

    def update(self, truth: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> float:
        """Add a frame of (H, W) labels; returns its own IoU (NaN if neither has foreground).

        Items of unknown kind (254) are foreground; pixels of 255 are passed over.

        Raises:
            ValueError: if shapes differ.
        """
        _alike(truth, prediction)
        counted = truth != IGNORE
        true = (truth != BACKGROUND) & counted
        predicted = (prediction != BACKGROUND) & counted
        intersection = int(np.count_nonzero(true & predicted))
        union = int(np.count_nonzero(true | predicted))
        self.intersection += intersection
        self.union += union
        return _ratio(intersection, union)

    def value(self) -> float:
        """IoU over the pixels of all frames."""
        return _ratio(self.intersection, self.union)


@dataclass(frozen=True, eq=False)
class Overlap:
    """How the items of a truth and of a prediction lie over each other, one row an item.

    Attributes:
        truth_ids, predicted_ids: the items that have pixels outside the void.
        truth_areas, predicted_areas: their pixels outside the void.
        void: pixels of each predicted item on the void.
        intersection: (truth, predicted) pixels.
    """

    truth_ids: NDArray[np.intp]
    predicted_ids: NDArray[np.intp]
    truth_areas: NDArray[np.int64]
    predicted_areas: NDArray[np.int64]
    void: NDArray[np.int64]
    intersection: NDArray[np.int64]

    def iou(self) -> NDArray[np.float64]:
        """(truth, predicted) intersection over union; the void belongs to no union."""
        union = self.truth_areas[:, None] + self.predicted_areas[None] - self.intersection
        return self.intersection / np.maximum(union, 1)


def overlap(
    truth: NDArray[np.uint16],
    prediction: NDArray[np.uint16],
    void: NDArray[np.bool_] | None = None,
) -> Overlap:
    """Count how (H, W) instance images lie over each other; ``void`` is where no truth is known.

    Raises:
        ValueError: if shapes differ.
    """
    _alike(truth, prediction)
    columns = int(prediction.max(initial=0)) + 1
    rows = int(truth.max(initial=0)) + 1
    # The void is one more row of the table.
    true = truth.astype(np.intp)
    if void is not None:
        _alike(truth, void)
        true[void] = rows
    joint = np.bincount(
        (true * columns + prediction).ravel(), minlength=(rows + 1) * columns
    ).reshape(rows + 1, columns)
    known = joint[:rows]
    truth_ids = np.flatnonzero(known[1:].sum(axis=1)) + 1
    predicted_ids = np.flatnonzero(joint[:, 1:].sum(axis=0)) + 1
    return Overlap(
        truth_ids=truth_ids,
        predicted_ids=predicted_ids,
        truth_areas=known.sum(axis=1)[truth_ids],
        predicted_areas=known.sum(axis=0)[predicted_ids],
        void=joint[rows, predicted_ids],
        intersection=known[np.ix_(truth_ids, predicted_ids)],
    )


class PanopticQuality:
    """Panoptic quality of items (Kirillov et al., CVPR 2019), per class and class-agnostic.

    A true and a predicted item of one class match if their IoU exceeds 0.5, which no two can do
    for the same item. Then SQ is the mean IoU of the matches, RQ = TP / (TP + FP / 2 + FN / 2)
    and PQ = SQ * RQ. Pixels without truth belong to no union, and a predicted item of which more
    than half lies on them, or on a true item of unknown kind, is not a false one. The background
    ("stuff") is not counted.

    Class-agnostic figures take all items for one class; those of unknown kind are among them.
    """

    def __init__(self, classes: int) -> None:
        # The last row is class-agnostic.
        self.true_positives = np.zeros(classes + 1, np.int64)
        self.false_positives = np.zeros(classes + 1, np.int64)
        self.false_negatives = np.zeros(classes + 1, np.int64)
        self.iou_sum = np.zeros(classes + 1)

    def update(
        self,
        truth: NDArray[np.uint16],
        truth_classes: Mapping[int, int],
        prediction: NDArray[np.uint16],
        predicted_classes: Mapping[int, int],
        void: NDArray[np.bool_] | None = None,
    ) -> None:
        """Add a frame.

        Args:
            truth: (H, W) instance ids, 0 none.
            truth_classes: class of each id: 1..C, or 0 or 254 for an item of unknown kind.
            prediction: (H, W) instance ids, 0 none.
            predicted_classes: class of each id: 1..C, or 0 for unknown (then it counts in the
                class-agnostic figures only).
            void: (H, W) where no truth is known.

        Raises:
            ValueError: if shapes differ or an id has no class among 1..C.
        """
        found = overlap(truth, prediction, void)
        self._add(-1, found, np.ones(len(found.truth_ids), bool), None, found.void)
        true = self._classes(found.truth_ids, truth_classes, "truth")
        predicted = self._classes(found.predicted_ids, predicted_classes, "prediction")
        # What lies on items of unknown kind can be neither right nor wrong of class.
        unknown = found.void + found.intersection[true == 0].sum(axis=0)
        for kind in np.unique(np.concatenate([true, predicted])):
            if kind:
                self._add(int(kind) - 1, found, true == kind, predicted == kind, unknown)

    def _classes(
        self, ids: NDArray[np.intp], classes: Mapping[int, int], side: str
    ) -> NDArray[np.intp]:
        result = np.zeros(len(ids), np.intp)
        for row, index in enumerate(ids):
            kind = classes.get(int(index))
            if kind is None or not (0 <= kind < len(self.iou_sum) or kind == OTHER):
                raise ValueError(
                    f"item {index} of the {side} has class {kind}, not one of "
                    f"0..{len(self.iou_sum) - 1} or {OTHER}"
                )
            result[row] = 0 if kind == OTHER else kind
        return result

    def _add(
        self,
        row: int,
        found: Overlap,
        true: NDArray[np.bool_],
        predicted: NDArray[np.bool_] | None,
        void: NDArray[np.int64],
    ) -> None:
        if predicted is None:
            predicted = np.ones(len(found.predicted_ids), bool)
        iou = found.iou()[np.ix_(true, predicted)]
        match = iou > 0.5
        whole = (found.predicted_areas + found.void)[predicted]
        excused = void[predicted] > 0.5 * whole
        self.true_positives[row] += int(match.sum())
        self.false_negatives[row] += int((~match.any(axis=1)).sum())
        self.false_positives[row] += int((~match.any(axis=0) & ~excused).sum())
        self.iou_sum[row] += float(iou[match].sum())

    def _figures(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        hit = self.true_positives.astype(float)
        weight = hit + 0.5 * self.false_positives + 0.5 * self.false_negatives
        seen = weight > 0
        pq = np.where(seen, self.iou_sum / np.where(seen, weight, 1), np.nan)
        rq = np.where(seen, hit / np.where(seen, weight, 1), np.nan)
        sq = np.where(hit > 0, self.iou_sum / np.maximum(hit, 1), np.nan)
        return pq, sq, rq

    def pq(self) -> NDArray[np.float64]:
        """(C,) panoptic quality per class; NaN for a class neither in truth nor predicted."""
        return self._figures()[0][:-1]

    def sq(self) -> NDArray[np.float64]:
        """(C,) segmentation quality per class; NaN for a class without a match."""
        return self._figures()[1][:-1]

    def rq(self) -> NDArray[np.float64]:
        """(C,) recognition quality per class; NaN for a class neither in truth nor predicted."""
        return self._figures()[2][:-1]

    def mean(self) -> tuple[float, float, float]:
        """PQ, SQ and RQ, each a mean over classes that have it."""
        pq, sq, rq = (_mean(values[:-1]) for values in self._figures())
        return pq, sq, rq

    def agnostic(self) -> tuple[float, float, float]:
        """PQ, SQ and RQ of items whatever their class."""
        pq, sq, rq = (float(values[-1]) for values in self._figures())
        return pq, sq, rq


class ItemCounts:
    """Items found, missed and false, whatever their class.

    A true item is found if a predicted one overlaps it with at least the given IoU. Pixels
    without truth count as for ``PanopticQuality``.

    Attributes:
        found, missed, false, excused: counts of items; excused ones are predictions mostly on
            pixels without truth.
        named: found items whose class was right, among those of known kind (``nameable``).
    """

    def __init__(self, iou: float = 0.5) -> None:
        if not 0.5 <= iou < 1.0:
            # Below one half two predictions could claim the same item.
            raise ValueError(f"iou is {iou}; it must lie in 0.5..1")
        self.iou = iou
        self.found = self.missed = self.false = self.excused = 0
        self.named = self.nameable = 0

    def update(
        self,
        truth: NDArray[np.uint16],
        prediction: NDArray[np.uint16],
        void: NDArray[np.bool_] | None = None,
        truth_classes: Mapping[int, int] | None = None,
        predicted_classes: Mapping[int, int] | None = None,
    ) -> tuple[int, int, int]:
        """Add a frame of (H, W) instance ids; returns its own found, missed and false items.

        Raises:
            ValueError: if shapes differ.
        """
        seen = overlap(truth, prediction, void)
        iou = seen.iou()
        match = iou >= self.iou
        # At exactly one half a tie is possible; each side then keeps its first.
        match &= np.cumsum(match, axis=1) == 1
        match &= np.cumsum(match, axis=0) == 1
        excused = ~match.any(axis=0) & (seen.void > 0.5 * (seen.predicted_areas + seen.void))
        found = int(match.sum())
        missed = len(seen.truth_ids) - found
        false = len(seen.predicted_ids) - found - int(excused.sum())
        self.found += found
        self.missed += missed
        self.false += false
        self.excused += int(excused.sum())
        if truth_classes is not None and predicted_classes is not None:
            for row, column in np.argwhere(match):
                kind = truth_classes.get(int(seen.truth_ids[row]), 0)
                if kind not in (0, OTHER):
                    self.nameable += 1
                    self.named += kind == predicted_classes.get(int(seen.predicted_ids[column]))
        return found, missed, false

    def recall(self) -> float:
        """The share of true items that were found."""
        return _ratio(self.found, self.found + self.missed)

    def precision(self) -> float:
        """The share of predicted items that are true ones."""
        return _ratio(self.found, self.found + self.false)

    def naming(self) -> float:
        """The share of found items of known kind whose class is right."""
        return _ratio(self.named, self.nameable)


def _alike(first: np.ndarray, second: np.ndarray) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(f"truth {first.shape} and prediction {second.shape} must be (H, W) alike")


def _mean(values: ArrayLike) -> float:
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else float("nan")


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
