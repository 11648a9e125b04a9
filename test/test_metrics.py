"""Metrics against cases worked by hand and against slow, plain implementations."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from waste_seg_ros.train.metrics import (
    AveragePrecision,
    BinaryIoU,
    BoundaryF,
    Calibration,
    ConfusionMatrix,
    ItemCounts,
    PanopticQuality,
    boundary,
    overlap,
    run_lengths,
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


def test_panoptic_quality_as_the_paper_counts_it():
    """All that its section on evaluation names, in one frame."""
    void = np.zeros((20, 20), bool)
    void[:, 16:] = True  # a crowd, or pixels without a label
    truth = boxes((0, 10, 0, 2), (10, 20, 4, 6), (0, 10, 8, 10))
    # 1: 8 of 10 columns. 2: exact where the truth is known (10..15), and 4 columns of void.
    # 3: too little of item 3. 4: on the void. 5: on nothing.
    found = boxes((2, 10, 0, 2), (10, 20, 4, 6), (0, 4, 8, 10), (15, 20, 12, 14), (0, 4, 16, 18))
    quality = PanopticQuality(1)
    quality.update(truth, dict.fromkeys((1, 2, 3), 1), found, dict.fromkeys(range(1, 6), 1), void)
    assert quality.true_positives[0] == 2
    assert quality.false_negatives[0] == 1
    assert quality.false_positives[0] == 2  # 3 and 5
    assert quality.sq()[0] == pytest.approx((0.8 + 1.0) / 2)
    assert quality.rq()[0] == pytest.approx(2 / (2 + 0.5 * 2 + 0.5 * 1))
    assert quality.pq()[0] == pytest.approx(1.8 / 3.5)


# --- average precision


def precision_of(*frames, classes=2):
    """Frames of (truth, truth classes, prediction, predicted classes, scores[, void])."""
    measure = AveragePrecision(classes)
    for frame in frames:
        measure.update(*frame)
    return measure


def test_average_precision_by_hand():
    truth = boxes((0, 10, 0, 2), (0, 10, 4, 6))
    # The best and the third are right, the second is false: precision 1 up to a recall of one
    # half, then 2/3. COCO reads it at the recalls 0, 0.01, ..., 1: 51 of them and 50.
    found = boxes((0, 10, 0, 2), (0, 10, 10, 12), (0, 10, 4, 6))
    kinds = dict.fromkeys((1, 2, 3), 1)
    measure = precision_of((truth, {1: 1, 2: 1}, found, kinds, {1: 0.9, 2: 0.8, 3: 0.7}))
    expected = (51 + 50 * 2 / 3) / 101
    np.testing.assert_allclose(measure.per_class()[0], [expected] * 3)
    assert np.isnan(measure.per_class()[1]).all()  # a class that is not in the truth
    assert measure.mean() == pytest.approx((expected,) * 3)
    # Sure of what is right, it would be perfect.
    sure = precision_of((truth, {1: 1, 2: 1}, found, kinds, {1: 0.9, 2: 0.1, 3: 0.7}))
    assert sure.mean() == pytest.approx((1.0, 1.0, 1.0))


def test_average_precision_over_the_thresholds():
    # IoU 13/20 = 0.65 or more holds at 0.5, 0.55 and 0.6 (0.65 is the threshold itself).
    truth, found = boxes((0, 20, 0, 1)), boxes((0, 13, 0, 1))
    ap, ap50, ap75 = precision_of((truth, {1: 1}, found, {1: 1}, {1: 0.5})).mean()
    assert (ap, ap50, ap75) == pytest.approx((0.4, 1.0, 0.0))


def test_average_precision_over_frames_sorts_all_by_score():
    item, none = boxes((0, 10, 0, 2)), np.zeros((20, 20), np.uint16)
    other = boxes((0, 10, 10, 12), shape=(24, 30))
    empty = np.zeros_like(other)
    frames = [(item, {1: 1}, item, {1: 1}, {1: 0.6}), (empty, {}, other, {1: 1}, {1: 0.9})]
    # What is false in a frame without truth comes first: precision 1/2.
    assert precision_of(*frames).mean()[0] == pytest.approx(0.5)
    missed = precision_of((item, {1: 1}, none, {}, {}))
    assert missed.mean() == (0.0, 0.0, 0.0)


def test_wrong_class_costs_average_precision_but_not_whatever_class():
    item = boxes((0, 10, 0, 2))
    measure = precision_of((item, {1: 1}, item, {1: 2}, {1: 0.6}))
    assert measure.per_class()[0].tolist() == [0.0, 0.0, 0.0]
    assert measure.agnostic() == pytest.approx((1.0, 1.0, 1.0))
    binary = precision_of((item, {1: 254}, item, {1: 0}, {1: 0.6}))
    assert all(math.isnan(value) for value in binary.mean())
    assert binary.agnostic() == pytest.approx((1.0, 1.0, 1.0))


def test_the_void_costs_no_average_precision():
    void = np.zeros((20, 20), bool)
    void[:, 10:] = True
    # The first is exact where the truth is known; the second lies mostly on the void.
    truth, found = boxes((0, 10, 0, 2)), boxes((0, 18, 0, 2), (6, 20, 10, 12))
    kinds, scores = {1: 1, 2: 1}, {1: 0.5, 2: 0.9}
    measure = precision_of((truth, {1: 1}, found, kinds, scores, void))
    assert (*measure.mean(), *measure.agnostic()) == pytest.approx((1.0,) * 6)
    counted = precision_of((truth, {1: 1}, found, kinds, scores))
    assert counted.mean()[1] == pytest.approx(0.5)


def test_items_of_unknown_kind_cost_no_average_precision():
    truth = boxes((0, 10, 0, 2), (0, 10, 10, 12))
    scores = {1: 0.5, 2: 0.9}
    measure = precision_of((truth, {1: 1, 2: 254}, truth, {1: 1, 2: 1}, scores))
    assert (*measure.mean(), *measure.agnostic()) == pytest.approx((1.0,) * 6)
    wrong = precision_of((truth, {1: 1, 2: 2}, truth, {1: 1, 2: 1}, scores))
    assert wrong.per_class()[0, 0] == pytest.approx(0.5)


def test_nothing_measured_has_no_average_precision():
    assert all(math.isnan(value) for value in AveragePrecision(2).agnostic())
    empty = np.zeros((20, 20), np.uint16)
    found = boxes((0, 5, 0, 5))
    measure = precision_of((empty, {}, found, {1: 1}, {1: 0.5}))
    assert all(math.isnan(value) for value in (*measure.agnostic(), *measure.mean()))


@pytest.mark.parametrize("seed", range(3))
def test_run_lengths_against_pycocotools(seed):
    mask = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(seed)
    ids = random.choice([0, 1, 7, 65535], (17, 23), p=[0.4, 0.3, 0.2, 0.1]).astype(np.uint16)
    ids[:, :3] = 7 if seed else 0  # an item from the very first pixel
    coded = run_lengths(ids)
    assert sorted(coded) == [1, 7, 65535]
    for index, (code, area) in coded.items():
        assert code == mask.encode(np.asfortranarray(ids == index, np.uint8))
        assert area == np.count_nonzero(ids == index)
    assert run_lengths(np.zeros((4, 5), np.uint16)) == {}


# --- boundaries


def test_boundary_of_a_box():
    mask = np.zeros((7, 8), bool)
    mask[2:6, 3:8] = True  # it touches the right border, where there is no boundary
    known = np.ones_like(mask)
    assert boundary(mask, known).astype(int).tolist() == [
        [0] * 8,
        [0] * 8,
        [0, 0, 0, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1],
        [0] * 8,
    ]
    known[:2] = False  # nothing is known above it
    assert boundary(mask, known)[2].astype(int).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_a_boundary_within_the_tolerance_is_right():
    truth = np.zeros((240, 320), np.uint8)
    truth[100:140, 100:160] = 1
    for shift, expected in ((0, 1.0), (3, 1.0)):  # 0.0075 of the diagonal is 3 px
        measure = BoundaryF(1)
        measure.update(truth, np.roll(truth, shift, axis=1))
        assert measure.mean() == measure.foreground() == expected
    measure = BoundaryF(1)
    measure.update(truth, np.roll(truth, 4, axis=1))
    # The two upright sides are missed but for what lies within 3 px of the others' ends.
    assert 0.6 < measure.mean() < 0.9


def test_frames_and_classes_of_boundaries():
    truth = np.zeros((40, 40), np.uint8)
    truth[10:20, 10:20] = 1
    measure = BoundaryF(3)
    measure.update(truth, truth)
    measure.update(truth, np.zeros_like(truth))  # missed: 0
    measure.update(np.zeros_like(truth), 2 * truth)  # class 2 is never in the truth
    np.testing.assert_allclose(measure.per_class(), [0.5, math.nan, math.nan])
    assert measure.mean() == 0.5
    assert measure.foreground() == pytest.approx(1 / 3)
    assert math.isnan(BoundaryF(2).mean()) and math.isnan(BoundaryF(2).foreground())
    with pytest.raises(ValueError, match="label 3"):
        BoundaryF(2).update(truth, 3 * truth)
    with pytest.raises(ValueError, match="tolerance"):
        BoundaryF(2, tolerance=1.5)


def slow_boundary_f(truth, prediction, known, reach):
    """From the definition, by the distances of all pairs of boundary pixels."""

    def points(mask):
        result = []
        for y, x in np.argwhere(mask & known):
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= v < mask.shape[0] and 0 <= u < mask.shape[1]
                if inside and known[v, u] and not mask[v, u]:
                    result.append((y, x))
                    break
        return np.array(result).reshape(-1, 2)

    true, found = points(truth), points(prediction)
    if len(true) + len(found) == 0:
        return None
    if len(true) == 0 or len(found) == 0:
        return 0.0
    far = np.hypot(*(true[:, None] - found[None]).transpose(2, 0, 1))
    recall, precision = (far.min(axis=1) <= reach).mean(), (far.min(axis=0) <= reach).mean()
    return 2 * recall * precision / (recall + precision) if recall + precision else 0.0


@pytest.mark.parametrize("seed", range(8))
def test_boundary_f_against_all_distances(seed):
    random = np.random.default_rng(seed)
    truth, found = np.zeros((48, 64), np.uint8), np.zeros((48, 64), np.uint8)
    for _ in range(6):
        x, y, r = (int(v) for v in random.integers((0, 0, 3), (64, 48, 12)))
        kind = int(random.integers(1, 4))
        cv2.circle(truth, (x, y), r, kind, -1)
        dx, dy, dr = (int(v) for v in random.integers(-3, 4, 3))
        cv2.circle(found, (x + dx, y + dy), max(r + dr, 1), kind, -1)
    truth[:, 50:56], truth[:6, :20] = 255, 254
    measure = BoundaryF(3, tolerance=0.03)
    measure.update(truth, found)
    reach = 0.03 * math.hypot(48, 64)
    for kind in (1, 2, 3):
        expected = slow_boundary_f(truth == kind, found == kind, truth < 254, reach)
        if ((truth == kind) & (truth < 254)).any():
            assert measure.per_class()[kind - 1] == pytest.approx(expected)
    expected = slow_boundary_f(truth > 0, found > 0, truth != 255, reach)
    assert measure.foreground() == pytest.approx(expected)


# --- scores


def test_calibration_by_hand():
    truth = np.array([[0, 0, 1, 1, 2, 255, 254]], np.uint8)
    labels = np.array([[0, 0, 1, 2, 2, 1, 1]], np.uint8)
    scores = np.array([[1.0, 1.0, 0.6, 0.6, 0.9, 0.1, 0.1]], np.float32)
    measure = Calibration(bins=2)
    measure.update(truth, labels, scores)
    # All in the upper bin: mean score 4.1 / 5, right 4 / 5. Of items: 2.1 / 3 and 2 / 3.
    assert measure.error() == pytest.approx(0.02)
    assert measure.error(items=True) == pytest.approx(0.1 / 3)
    assert measure.bias(items=True) == pytest.approx(0.1 / 3)  # too sure
    score, right, share = measure.reliability(items=True)
    np.testing.assert_allclose(score, [math.nan, 0.7], rtol=1e-6)
    np.testing.assert_allclose(right, [math.nan, 2 / 3])
    assert share.tolist() == [0.0, 1.0]
    # Whatever class, the fourth is right, and so is the item of unknown kind.
    measure = Calibration(bins=1)
    measure.update(truth, labels, scores, named=False)
    assert measure.error() == pytest.approx(1 - 4.2 / 6)
    assert math.isnan(Calibration().error())


# --- against torchmetrics


@pytest.fixture(scope="module")
def torchmetrics():
    return pytest.importorskip("torchmetrics", reason="an independent implementation")


@pytest.fixture(scope="module")
def pixels():
    random = np.random.default_rng(3)
    truth = random.choice([0, 1, 2, 3, 255], (3, 40, 60)).astype(np.uint8)
    right = random.random(truth.shape) < 0.6
    found = np.where(right & (truth < 255), truth, random.integers(0, 4, truth.shape))
    scores = random.random(truth.shape).astype(np.float32)
    return truth, found.astype(np.uint8), scores


def test_pixels_against_torchmetrics(torchmetrics, pixels):
    import torch
    from torchmetrics.classification import (
        BinaryCalibrationError,
        BinaryJaccardIndex,
        MulticlassConfusionMatrix,
        MulticlassJaccardIndex,
    )

    truth, found, scores = pixels
    matrix, binary, calibration = ConfusionMatrix(3), BinaryIoU(), Calibration()
    theirs = [
        MulticlassConfusionMatrix(4, ignore_index=255),
        MulticlassJaccardIndex(4, average="none", ignore_index=255),
        MulticlassJaccardIndex(4, average="macro", ignore_index=255),
    ]
    foreground = BinaryJaccardIndex(ignore_index=255)
    error = BinaryCalibrationError(15, norm="l1", ignore_index=255)
    for true, predicted, score in zip(truth, found, scores, strict=True):
        matrix.update(true, predicted)
        binary.update(true, predicted)
        calibration.update(true, predicted, score)
        target, guess = torch.from_numpy(true).long(), torch.from_numpy(predicted).long()
        for metric in theirs:
            metric.update(guess, target)
        unknown = torch.full_like(target, 255)
        foreground.update(
            (guess > 0).long(), torch.where(target == 255, unknown, (target > 0).long())
        )
        right = torch.where(target == 255, unknown, (target == guess).long())
        error.update(torch.from_numpy(score), right)
    np.testing.assert_array_equal(matrix.counts, theirs[0].compute().numpy())
    np.testing.assert_allclose(matrix.iou(), theirs[1].compute().numpy(), rtol=1e-6)
    assert matrix.mean_iou() == pytest.approx(float(theirs[2].compute()))
    assert binary.value() == pytest.approx(float(foreground.compute()))
    assert calibration.error() == pytest.approx(float(error.compute()), rel=1e-4)


def test_panoptic_quality_against_torchmetrics(torchmetrics):
    import torch
    from torchmetrics.detection import PanopticQuality as Theirs

    random = np.random.default_rng(5)
    ours = PanopticQuality(3)
    # Of theirs the background is the one stuff, and a category of no name is void.
    theirs = Theirs(things={1, 2, 3}, stuffs={0}, return_sq_and_rq=True, return_per_class=True)
    for _ in range(6):
        truth, found = np.zeros((60, 80), np.uint16), np.zeros((60, 80), np.uint16)
        kinds, guesses = {0: 0}, {0: 0}
        for index in range(1, 9):
            x, y, r = (int(v) for v in random.integers((5, 5, 4), (75, 55, 10)))
            cv2.circle(truth, (x, y), r, index, -1)
            kinds[index] = int(random.integers(1, 4))
            dx, dy = (int(v) for v in random.integers(-2, 3, 2))
            cv2.circle(found, (x + dx, y + dy), r, index, -1)
            guesses[index] = kinds[index] if random.random() < 0.7 else int(random.integers(1, 4))
        void = np.zeros(truth.shape, bool)
        void[:, int(random.integers(50, 75)) :] = True
        ours.update(truth, kinds, found, guesses, void)
        labels = np.vectorize(kinds.get)(truth)
        labels[void] = 9
        target = np.stack([labels, truth], -1).astype(np.int64)
        guess = np.stack([np.vectorize(guesses.get)(found), found], -1).astype(np.int64)
        theirs.update(torch.from_numpy(guess[None]), torch.from_numpy(target[None]))
    expected = theirs.compute().numpy()[:3]  # things come first
    np.testing.assert_allclose(np.stack([ours.pq(), ours.sq(), ours.rq()], 1), expected, rtol=1e-6)
