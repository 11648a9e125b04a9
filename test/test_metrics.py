"""Metrics against cases worked by hand and against slow, plain implementations."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from waste_seg_ros.train.metrics import (
    BinaryIoU,
    ConfusionMatrix,
    ItemCounts,
    PanopticQuality,
    overlap,
)


def grid(rows, dtype=np.uint8):
    return np.array([[int(c, 16) for c in row] for row in rows.split()], dtype)


def boxes(*items, shape=(20, 20)):
    """Draw (x0, x1, y0, y1) boxes with ids 1.."""
    image = np.zeros(shape, np.uint16)
    for index, (x0, x1, y0, y1) in enumerate(items, 1):
        image[y0:y1, x0:x1] = index
    return image


# --- pixels


def test_iou_by_hand():
    matrix = ConfusionMatrix(2)
    matrix.update(grid("0011 0022"), grid("0012 0122"))
    # background: 3 of 4; class 1: 1 of 3; class 2: 2 of 3
    np.testing.assert_allclose(matrix.iou(), [3 / 4, 1 / 3, 2 / 3])
    assert matrix.mean_iou() == pytest.approx((3 / 4 + 1 / 3 + 2 / 3) / 3)
    assert matrix.mean_iou(background=False) == pytest.approx(0.5)
    assert matrix.pixel_accuracy() == pytest.approx(6 / 8)


def test_frames_add_up():
    once, twice = ConfusionMatrix(2), ConfusionMatrix(2)
    truth, found = grid("0011 0022"), grid("0012 0122")
    once.update(truth, found)
    twice.update(truth[:1], found[:1])
    twice.update(truth[1:], found[1:])
    np.testing.assert_array_equal(once.counts, twice.counts)


def test_classes_not_in_the_truth_are_left_out():
    matrix = ConfusionMatrix(3)
    matrix.update(grid("0011"), grid("0013"))
    np.testing.assert_allclose(matrix.iou(), [1.0, 0.5, math.nan, math.nan])
    assert matrix.mean_iou() == pytest.approx(0.75)


def test_ignored_pixels_do_not_count():
    truth = np.array([[0, 1, 255, 254]], np.uint8)
    found = np.array([[0, 1, 1, 2]], np.uint8)
    matrix, binary = ConfusionMatrix(2), BinaryIoU()
    matrix.update(truth, found)
    assert matrix.counts.sum() == 2
    assert matrix.mean_iou() == 1.0
    assert binary.update(truth, found) == 1.0  # 254 is foreground, 255 is passed over
    assert (binary.intersection, binary.union) == (2, 2)


def test_nothing_seen_is_nan():
    assert math.isnan(ConfusionMatrix(2).mean_iou())
    assert math.isnan(BinaryIoU().value())
    assert math.isnan(ItemCounts().recall())
    assert all(math.isnan(v) for v in PanopticQuality(2).agnostic())
    assert all(math.isnan(v) for v in PanopticQuality(2).mean())


def test_binary_iou_by_hand():
    binary = BinaryIoU()
    assert binary.update(grid("0012"), grid("0120")) == pytest.approx(1 / 3)
    assert math.isnan(binary.update(grid("0000"), grid("0000")))
    binary.update(grid("1111"), grid("3333"))
    assert binary.value() == pytest.approx(5 / 7)


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(ValueError, match="label 3 in the prediction"):
        ConfusionMatrix(2).update(grid("0000"), grid("0003"))
    with pytest.raises(ValueError, match="alike"):
        ConfusionMatrix(2).update(grid("0000"), grid("000"))


@pytest.mark.parametrize("seed", range(5))
def test_iou_against_a_plain_count(seed):
    random = np.random.default_rng(seed)
    truth = random.choice([0, 1, 2, 3, 254, 255], (30, 40)).astype(np.uint8)
    found = random.integers(0, 4, (30, 40)).astype(np.uint8)
    matrix = ConfusionMatrix(3)
    matrix.update(truth, found)
    for kind in range(4):
        both = either = 0
        for true, predicted in zip(truth.flat, found.flat, strict=True):
            if true < 254:
                both += true == kind and predicted == kind
                either += true == kind or predicted == kind
        assert matrix.iou()[kind] == pytest.approx(both / either)


# --- items


def test_perfect_items():
    truth = boxes((0, 5, 0, 5), (10, 15, 0, 5))
    quality, counts = PanopticQuality(2), ItemCounts()
    quality.update(truth, {1: 1, 2: 2}, truth, {1: 1, 2: 2})
    counts.update(truth, truth)
    assert quality.agnostic() == (1.0, 1.0, 1.0)
    assert quality.mean() == (1.0, 1.0, 1.0)
    assert counts.recall() == counts.precision() == 1.0


def test_panoptic_quality_by_hand():
    truth = boxes((0, 10, 0, 1), (0, 10, 5, 6), (0, 10, 10, 11))
    found = boxes((0, 8, 0, 1), (0, 5, 5, 6), (0, 10, 15, 16))
    # IoU 0.8 matches; 0.5 does not (it must exceed it); one is missed and one is false.
    quality = PanopticQuality(1)
    quality.update(truth, {1: 1, 2: 1, 3: 1}, found, {1: 1, 2: 1, 3: 1})
    assert quality.sq()[0] == pytest.approx(0.8)
    assert quality.rq()[0] == pytest.approx(1 / (1 + 1 + 1))
    assert quality.pq()[0] == pytest.approx(0.8 / 3)
    counts = ItemCounts()
    assert counts.update(truth, found) == (2, 1, 1)  # here one half is enough
    assert counts.recall() == pytest.approx(2 / 3)
    assert counts.precision() == pytest.approx(2 / 3)


def test_wrong_class_is_one_missed_and_one_false_but_found_class_agnostic():
    truth = boxes((0, 10, 0, 10))
    quality, counts = PanopticQuality(3), ItemCounts()
    quality.update(truth, {1: 1}, truth, {1: 2})
    assert quality.pq()[0] == quality.pq()[1] == 0.0
    assert math.isnan(quality.pq()[2]) and math.isnan(quality.sq()[0])
    assert quality.agnostic() == (1.0, 1.0, 1.0)
    counts.update(truth, truth, None, {1: 1}, {1: 2})
    assert counts.recall() == 1.0 and counts.naming() == 0.0


def test_split_and_merged_items():
    whole, halves = boxes((0, 10, 0, 4)), boxes((0, 6, 0, 4), (6, 10, 0, 4))
    split, merged = PanopticQuality(1), PanopticQuality(1)
    split.update(whole, {1: 1}, halves, {1: 1, 2: 1})
    assert split.pq()[0] == pytest.approx(0.6 / 1.5)
    merged.update(halves, {1: 1, 2: 1}, whole, {1: 1})
    assert merged.pq()[0] == pytest.approx(0.6 / 1.5)


def test_prediction_mostly_on_the_void_is_not_false():
    void = np.zeros((20, 20), bool)
    void[:, 10:] = True
    mostly, half = boxes((9, 20, 0, 2)), boxes((5, 15, 0, 2))
    for found, false in ((mostly, 0), (half, 1)):
        quality, counts = PanopticQuality(1), ItemCounts()
        quality.update(np.zeros_like(found), {}, found, {1: 1}, void)
        counts.update(np.zeros_like(found), found, void)
        assert quality.false_positives.tolist() == [false, false]
        assert (counts.false, counts.excused) == (false, 1 - false)


def test_the_void_belongs_to_no_union():
    truth, found = boxes((0, 10, 0, 2)), boxes((0, 19, 0, 2))
    void = np.zeros((20, 20), bool)
    void[:, 10:] = True
    quality = PanopticQuality(1)
    quality.update(truth, {1: 1}, found, {1: 1}, void)
    assert quality.pq()[0] == 1.0


def test_a_true_item_under_the_void_is_no_item():
    truth = boxes((12, 18, 0, 5))
    void = np.zeros((20, 20), bool)
    void[:, 10:] = True
    quality, counts = PanopticQuality(1), ItemCounts()
    quality.update(truth, {1: 1}, np.zeros_like(truth), {}, void)
    counts.update(truth, np.zeros_like(truth), void)
    assert quality.false_negatives.sum() == 0 and counts.missed == 0


def test_items_of_unknown_kind_count_class_agnostic_only():
    truth = boxes((0, 5, 0, 5), (10, 15, 0, 5))
    for unknown in (254, 0):
        quality = PanopticQuality(2)
        quality.update(truth, {1: 1, 2: unknown}, truth, {1: 1, 2: 2})
        assert quality.pq()[0] == 1.0
        assert math.isnan(quality.pq()[1])  # neither right nor wrong
        assert quality.agnostic() == (1.0, 1.0, 1.0)
        missed = PanopticQuality(2)
        missed.update(truth, {1: 1, 2: unknown}, boxes((0, 5, 0, 5)), {1: 1})
        assert missed.pq()[0] == 1.0
        assert missed.agnostic()[2] == pytest.approx(1 / 1.5)


def test_items_without_a_class_are_refused():
    truth = boxes((0, 5, 0, 5))
    with pytest.raises(ValueError, match="item 1 of the prediction has class None"):
        PanopticQuality(2).update(truth, {1: 1}, truth, {})
    with pytest.raises(ValueError, match="item 1 of the truth has class 3"):
        PanopticQuality(2).update(truth, {1: 3}, truth, {1: 1})


def test_overlap_with_large_ids():
    truth = np.array([[65535, 65535, 0]], np.uint16)
    found = np.array([[40000, 0, 0]], np.uint16)
    seen = overlap(truth, found)
    assert seen.truth_ids.tolist() == [65535] and seen.predicted_ids.tolist() == [40000]
    assert seen.iou().tolist() == [[0.5]]


def slow_panoptic(truth, truth_classes, found, found_classes, void, kind):
    """PQ, SQ, RQ of one class (None: of all as one), mask by mask, from the definition."""
    unknown = {i for i, c in truth_classes.items() if c in (0, 254)}
    true = [i for i, c in truth_classes.items() if kind in (None, c) and (kind is None or c != 254)]
    predicted = [i for i, c in found_classes.items() if kind in (None, c)]
    true = [i for i in true if ((truth == i) & ~void).any()]
    predicted = [i for i in predicted if (found == i).any()]
    nowhere = void.copy()
    if kind is not None:
        nowhere |= np.isin(truth, list(unknown)) & (truth > 0)
    matched, total = set(), 0.0
    hit = 0
    for i in true:
        for j in predicted:
            a, b = (truth == i) & ~void, (found == j) & ~void
            if a.any() and b.any():
                iou = (a & b).sum() / (a | b).sum()
                if iou > 0.5:
                    hit += 1
                    total += iou
                    matched.add(j)
    false = sum(
        1
        for j in predicted
        if j not in matched and ((found == j) & nowhere).sum() <= 0.5 * (found == j).sum()
    )
    weight = hit + 0.5 * false + 0.5 * (len(true) - hit)
    if weight == 0:
        return math.nan, math.nan, math.nan
    return total / weight, total / hit if hit else math.nan, hit / weight


@pytest.mark.parametrize("seed", range(12))
def test_panoptic_quality_against_the_definition(seed):
    random = np.random.default_rng(seed)
    truth = np.zeros((60, 80), np.uint16)
    found = np.zeros((60, 80), np.uint16)
    truth_classes, found_classes = {}, {}
    for index in range(1, 9):
        x, y, r = random.integers(5, 75), random.integers(5, 55), random.integers(4, 10)
        cv2.circle(truth, (int(x), int(y)), int(r), index, -1)
        truth_classes[index] = int(random.choice([1, 2, 3, 254]))
        if random.random() < 0.8:
            shift = random.integers(-3, 4, 2)
            cv2.circle(found, (int(x + shift[0]), int(y + shift[1])), int(r), index, -1)
            guess = truth_classes[index] if random.random() < 0.7 else random.integers(1, 4)
            found_classes[index] = int(guess) if guess != 254 else 1
    void = np.zeros(truth.shape, bool)
    void[:, int(random.integers(50, 75)) :] = True
    quality = PanopticQuality(3)
    quality.update(truth, truth_classes, found, found_classes, void)
    for kind in (1, 2, 3):
        expected = slow_panoptic(truth, truth_classes, found, found_classes, void, kind)
        got = [values[kind - 1] for values in (quality.pq(), quality.sq(), quality.rq())]
        np.testing.assert_allclose(got, expected)
    expected = slow_panoptic(truth, truth_classes, found, found_classes, void, None)
    np.testing.assert_allclose(quality.agnostic(), expected)


def test_recall_below_one_half_is_refused():
    with pytest.raises(ValueError, match="0.5"):
        ItemCounts(iou=0.3)
