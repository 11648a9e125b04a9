"""Figures of merit, gathered frame by frame.

Every accumulator takes one frame at a time through ``update`` and can be asked at any time.
Figures that nothing was seen for are NaN, never a made-up 0 or 1.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
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
    truth_ids, true = ranked(truth)
    predicted_ids, predicted = ranked(prediction)
    rows, columns = len(truth_ids) + 1, len(predicted_ids) + 1
    # The void is one more row of the table.
    if void is not None:
        _alike(truth, void)
        true[void] = rows
    joint = np.bincount(
        (true * columns + predicted).ravel(), minlength=(rows + 1) * columns
    ).reshape(rows + 1, columns)
    known = joint[1:rows]
    seen = np.flatnonzero(known.sum(axis=1))
    return Overlap(
        truth_ids=truth_ids[seen],
        predicted_ids=predicted_ids,
        truth_areas=known.sum(axis=1)[seen],
        predicted_areas=joint[:rows, 1:].sum(axis=0),
        void=joint[rows, 1:],
        intersection=known[seen, 1:],
    )


def ranked(ids: NDArray[np.uint16]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The ids but 0 that an (H, W) image has, and the image with their ranks 1, 2, ... instead.

    Tables by rank stay small where ids are large, such as those of Cityscapes.
    """
    present = np.flatnonzero(np.bincount(ids.ravel())[1:]) + 1 if ids.size else np.zeros(0, np.intp)
    table = np.zeros(int(present.max(initial=0)) + 1, np.intp)
    table[present] = np.arange(1, len(present) + 1)
    return present, table[ids]


class PanopticQuality:
    """Panoptic quality of items (Kirillov et al., CVPR 2019), per class and class-agnostic.

    A true and a predicted item of one class match if their IoU exceeds 0.5, which no two can do
    for the same item. Then SQ is the mean IoU of the matches, RQ = TP / (TP + FP / 2 + FN / 2)
    and PQ = SQ * RQ. Pixels without truth belong to no union, and a predicted item of which more
    than half lies on them, or on a true item of unknown kind, is not a false one. The background
    ("stuff") is not counted. Crowds are pixels without truth, so that unlike in the authors'
    panopticapi they belong to no union either and excuse items of every class.

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


class AveragePrecision:
    """Average precision of the items' masks as COCO counts it, by pycocotools.

    AP is the mean over the IoU thresholds 0.5, 0.55, ..., 0.95, AP50 and AP75 are those at one;
    items of all sizes count, at most 100 of the highest scores a frame.

    Of crowds and items of unknown kind COCO knows only the first, and it calls a prediction on
    one false where the IoU threshold is above its share there. Here the rules are those of
    ``PanopticQuality`` at all thresholds: the void belongs to no mask, and a prediction of which
    more than half lies on it, or on an item of unknown kind, is passed over unless it matches an
    item of its class at IoU 0.5.

    Only run lengths are kept of the frames, some hundred bytes for an item.
    """

    #: A frame's items beyond so many are not looked at, as in COCO.
    MOST = 100

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._frames: list[dict[str, int]] = []
        # Annotations for COCO, with and without regard to classes.
        self._truth: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        self._found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])

    def update(
        self,
        truth: NDArray[np.uint16],
        truth_classes: Mapping[int, int],
        prediction: NDArray[np.uint16],
        predicted_classes: Mapping[int, int],
        scores: Mapping[int, float],
        void: NDArray[np.bool_] | None = None,
    ) -> None:
        """Add a frame; the arguments are those of ``PanopticQuality`` and each item's score.

        Raises:
            ValueError: if shapes differ.
        """
        seen = overlap(truth, prediction, void)
        height, width = truth.shape
        self._frames.append({"id": len(self._frames) + 1, "width": width, "height": height})
        if void is not None and void.any():
            truth, prediction = np.where(void, 0, truth), np.where(void, 0, prediction)
        true = np.array([truth_classes.get(int(i), 0) for i in seen.truth_ids], np.intp)
        true[true == OTHER] = 0
        kinds = np.array([predicted_classes.get(int(i), 0) for i in seen.predicted_ids], np.intp)
        whole = seen.predicted_areas + seen.void
        match = seen.iou() >= 0.5
        unknown = seen.void + seen.intersection[true == 0].sum(axis=0)
        right = match & (true[:, None] == kinds[None])
        dropped = (
            (unknown > 0.5 * whole) & ~right.any(axis=0),
            (seen.void > 0.5 * whole) & ~match.any(axis=0),
        )
        masks = run_lengths(truth)
        for index, kind in zip(seen.truth_ids.tolist(), true.tolist(), strict=True):
            self._add(self._truth, masks[index], kind, (kind > 0, True))
        masks = run_lengths(prediction)
        for column, index in enumerate(seen.predicted_ids.tolist()):
            kind = int(kinds[column])
            counted = (kind > 0 and not dropped[0][column], not dropped[1][column])
            if index in masks:
                self._add(self._found, masks[index], kind, counted, float(scores[index]))

    def _add(
        self,
        lists: tuple[list[dict[str, Any]], list[dict[str, Any]]],
        mask: tuple[dict[str, Any], int],
        kind: int,
        counted: tuple[bool, bool],
        score: float = 1.0,
    ) -> None:
        for entries, counts in zip(lists, counted, strict=True):
            if counts:
                entries.append(
                    {
                        "id": len(entries) + 1,
                        "image_id": len(self._frames),
                        "category_id": kind,
                        "segmentation": mask[0],
                        "area": mask[1],
                        "iscrowd": 0,
                        "score": score,
                    }
                )

    def per_class(self) -> NDArray[np.float64]:
        """(C, 3) AP, AP50 and AP75 of each class; NaN for a class that is not in the truth."""
        return self._evaluate(0)

    def mean(self) -> tuple[float, float, float]:
        """AP, AP50 and AP75, each a mean over the classes in the truth."""
        ap, ap50, ap75 = (_mean(column) for column in self.per_class().T)
        return ap, ap50, ap75

    def agnostic(self) -> tuple[float, float, float]:
        """AP, AP50 and AP75 of items whatever their class."""
        ap, ap50, ap75 = self._evaluate(1)[0].tolist()
        return ap, ap50, ap75

    def _evaluate(self, which: int) -> NDArray[np.float64]:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        agnostic = which == 1
        categories = [1] if agnostic else list(range(1, self.classes + 1))
        with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
            sides = []
            for entries in (self._truth[which], self._found[which]):
                side = COCO()
                # The evaluation writes into the entries.
                copies = [dict(e, category_id=1) if agnostic else dict(e) for e in entries]
                side.dataset = {
                    "images": self._frames,
                    "categories": [{"id": kind} for kind in categories],
                    "annotations": copies,
                }
                side.createIndex()
                sides.append(side)
            run = COCOeval(*sides, iouType="segm")
            run.params.maxDets = [self.MOST]
            run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
            result = np.full((len(categories), 3), np.nan)
            if not self._frames or not self._truth[which]:
                return result
            run.evaluate()
            run.accumulate()
        # (thresholds, recalls, classes); -1 for a class without truth.
        precision = run.eval["precision"][:, :, :, 0, 0]
        thresholds = run.params.iouThrs
        for column, rows in enumerate(
            (slice(None), np.isclose(thresholds, 0.5), np.isclose(thresholds, 0.75))
        ):
            mean = precision[rows].mean(axis=(0, 1))
            result[:, column] = np.where(mean >= 0, mean, np.nan)
        return result


def run_lengths(ids: NDArray[np.uint16]) -> dict[int, tuple[dict[str, Any], int]]:
    """COCO's compressed run lengths and the area [px] of each id but 0 in an (H, W) image.

    One pass over the image does for all ids, whatever their number.
    """
    from pycocotools import mask

    height, width = ids.shape
    column_wise = ids.ravel(order="F")
    starts = np.flatnonzero(column_wise[1:] != column_wise[:-1]) + 1
    starts = np.concatenate([[0], starts]) if ids.size else starts
    lengths = np.diff(starts, append=column_wise.size)
    owner = column_wise[starts]
    order = np.argsort(owner, kind="stable")
    result = {}
    for rows in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1):
        if len(rows) == 0 or owner[rows[0]] == 0:
            continue
        first, length = starts[rows], lengths[rows]
        # Gap, run, gap, run, ..., gap.
        counts = np.zeros(2 * len(rows) + 1, np.int64)
        counts[1::2] = length
        ends = first + length
        counts[0::2] = np.append(first, column_wise.size) - np.append(0, ends)
        # As pycocotools codes it, without an empty gap at the end.
        used = counts if counts[-1] else counts[:-1]
        plain = {"counts": used.tolist(), "size": [height, width]}
        coded = mask.frPyObjects(plain, height, width)
        result[int(owner[rows[0]])] = (coded, int(length.sum()))
    return result


class BoundaryF:
    """How well boundaries lie: the F measure of Csurka et al. (BMVC 2013), per class.

    In each frame a predicted boundary pixel is right if the true boundary of the class is not
    farther than the tolerance, and a true one is found likewise; F = 2PR / (P + R). A class has
    the mean over those frames in which it is, in the truth or in the prediction.

    Boundary pixels are those of a mask that have one of their four neighbours outside of it (as
    in Perazzi et al., CVPR 2016, not at the image's border). Pixels without truth are neither in
    a mask nor outside of it, so there is no boundary towards them.

    Attributes:
        tolerance: a share of the image's diagonal; 0.0075 is 3 px at 320x240.
    """

    def __init__(self, classes: int, tolerance: float = 0.0075) -> None:
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance is {tolerance}; it must be a share of the diagonal, 0..1")
        self.tolerance = tolerance
        # The first row is the foreground's.
        self._sum = np.zeros(classes + 1)
        self._frames = np.zeros(classes + 1, np.int64)
        self._true = np.zeros(classes + 1, bool)

    def update(
        self, truth: NDArray[np.uint8], prediction: NDArray[np.uint8], named: bool = True
    ) -> None:
        """Add a frame of (H, W) labels; ``named``: classes count, else foreground only.

        Raises:
            ValueError: if shapes differ or a label is not among the classes.
        """
        _alike(truth, prediction)
        reach = self.tolerance * math.hypot(*truth.shape)
        known = truth != IGNORE
        self._add(0, truth != BACKGROUND, prediction != BACKGROUND, known, reach)
        if not named:
            return
        true = np.flatnonzero(np.bincount(truth.ravel(), minlength=256)[:OTHER])
        present = np.flatnonzero(np.bincount(prediction.ravel(), minlength=256))
        known = truth < OTHER
        for kind in np.union1d(true, present).tolist():
            if kind >= len(self._sum):
                raise ValueError(f"label {kind} in a frame; there are 0..{len(self._sum) - 1}")
            if kind:
                self._add(kind, truth == kind, prediction == kind, known, reach)

    def _add(
        self,
        row: int,
        truth: NDArray[np.bool_],
        prediction: NDArray[np.bool_],
        known: NDArray[np.bool_],
        reach: float,
    ) -> None:
        # Nothing is to be seen far from both masks.
        x, y, width, height = cv2.boundingRect((truth | prediction).view(np.uint8))
        if width == 0:
            return
        part = np.s_[max(y - 1, 0) : y + height + 1, max(x - 1, 0) : x + width + 1]
        lines = [boundary(mask[part], known[part]) for mask in (truth, prediction)]
        self._true[row] |= bool(lines[0].any())
        counts = [int(np.count_nonzero(line)) for line in lines]
        if sum(counts) == 0:
            return
        self._frames[row] += 1
        if min(counts) == 0:
            return
        # A hair more, for distances are rounded to 32 bits.
        near = [_distance(line) <= reach + 1e-4 for line in lines]
        recall = np.count_nonzero(near[1] & lines[0]) / counts[0]
        precision = np.count_nonzero(near[0] & lines[1]) / counts[1]
        if precision + recall > 0:
            self._sum[row] += 2 * precision * recall / (precision + recall)

    def _figures(self) -> NDArray[np.float64]:
        # As for the IoU a class that is never in the truth has no figure.
        return np.where(self._true, self._sum / np.maximum(self._frames, 1), np.nan)

    def per_class(self) -> NDArray[np.float64]:
        """(C,) F of each class; NaN for one without a boundary in the truth."""
        return self._figures()[1:]

    def mean(self) -> float:
        """Mean over the classes in the truth."""
        return _mean(self.per_class())

    def foreground(self) -> float:
        """F of all items as one mask."""
        return float(self._figures()[0])


def boundary(mask: NDArray[np.bool_], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(H, W) the pixels of a mask beside a pixel outside of it, both of them known."""
    outside = (~mask & known).view(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    return mask & known & (cv2.dilate(outside, cross) > 0)


def _distance(line: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(H, W) distance of each pixel from the nearest one of a line."""
    return cv2.distanceTransform((~line).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE).astype(
        np.float32, copy=False
    )


class Calibration:
    """Whether scores are probabilities: the expected calibration error (Guo et al., ICML 2017).

    Pixels are sorted into bins by the score of their label. The error is the mean over all
    pixels of the distance between their bin's mean score and its share of right labels. That of
    the pixels taken for items is told apart, since the background is most pixels and easy.
    """

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise ValueError(f"there must be bins, not {bins}")
        self.bins = bins
        # Rows: taken for background, for items.
        self._pixels = np.zeros((2, bins), np.int64)
        self._right = np.zeros((2, bins), np.int64)
        self._score = np.zeros((2, bins))

    def update(
        self,
        truth: NDArray[np.uint8],
        labels: NDArray[np.uint8],
        scores: NDArray[np.float32],
        named: bool = True,
    ) -> None:
        """Add a frame.

        Args:
            truth: (H, W) labels; pixels of 255, and of 254 if named, are passed over.
            labels: (H, W) predicted labels.
            scores: (H, W) probability of each [0..1].
            named: a label is right if its class is; else if it is an item's as the truth is.

        Raises:
            ValueError: if shapes differ.
        """
        _alike(truth, labels)
        _alike(truth, scores)
        if named:
            counted, right = truth < OTHER, truth == labels
        else:
            counted, right = truth != IGNORE, (truth == BACKGROUND) == (labels == BACKGROUND)
        place = np.clip((scores * self.bins).astype(np.intp), 0, self.bins - 1)
        place += self.bins * (labels != BACKGROUND)
        place[~counted] = 2 * self.bins
        size = 2 * self.bins + 1
        shape = self._pixels.shape
        flat = place.ravel()
        self._pixels += np.bincount(flat, minlength=size)[:-1].reshape(shape)
        self._right += np.bincount(flat[right.ravel()], minlength=size)[:-1].reshape(shape)
        sums = np.bincount(flat, weights=scores.ravel(), minlength=size)
        self._score += sums[:-1].reshape(shape)

    def error(self, items: bool = False) -> float:
        """Expected calibration error of all pixels, or of those taken for items [0..1]."""
        pixels, right, score = self._rows(items)
        return _ratio(float(np.abs(score - right).sum()), float(pixels.sum()))

    def bias(self, items: bool = False) -> float:
        """Mean score less the share of right labels: below 0 the scores are too low."""
        pixels, right, score = self._rows(items)
        return _ratio(float(score.sum() - right.sum()), float(pixels.sum()))

    def reliability(
        self, items: bool = False
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(B,) mean score and share of right labels in each bin, NaN in an empty one; its share."""
        pixels, right, score = self._rows(items)
        some = np.where(pixels > 0, pixels, np.nan)
        return score / some, right / some, pixels / max(int(pixels.sum()), 1)

    def _rows(self, items: bool) -> Sequence[NDArray[Any]]:
        rows = slice(1 if items else 0, 2)
        return [table[rows].sum(axis=0) for table in (self._pixels, self._right, self._score)]


def _alike(first: np.ndarray, second: np.ndarray) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(f"truth {first.shape} and prediction {second.shape} must be (H, W) alike")


def _mean(values: ArrayLike) -> float:
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else float("nan")


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
