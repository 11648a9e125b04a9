"""Grouping on drawn scenes, whose right answer is known by construction."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from waste_seg_ros.perception.grouping import group_items

STEP = 4


def scene(*items, size=(320, 240)):
    """Draw discs (class, x, y, radius), later ones in front: labels and instances."""
    labels = np.zeros((size[1], size[0]), np.uint8)
    instances = np.zeros_like(labels, np.uint16)
    for index, (kind, x, y, radius) in enumerate(items, 1):
        cv2.circle(labels, (x, y), radius, kind, -1)
        cv2.circle(instances, (x, y), radius, index, -1)
    return labels, instances


def centers_and_offsets(instances, noise=0.0, height=0.9, without=()):
    """What a perfect instance head would say of these instances, with noise in the offsets."""
    rows, columns = instances.shape[0] // STEP, instances.shape[1] // STEP
    centers = np.zeros((rows, columns), np.float32)
    offsets = np.zeros((2, rows, columns), np.float32)
    cell = instances[STEP // 2 :: STEP, STEP // 2 :: STEP]
    cell_y, cell_x = np.mgrid[:rows, :columns] * STEP + (STEP - 1) / 2
    for index in np.unique(instances[instances > 0]):
        y, x = (axis.mean() for axis in np.nonzero(instances == index))
        if index not in without:
            centers[int(y) // STEP, int(x) // STEP] = height
        here = cell == index
        offsets[0][here] = (x - cell_x)[here]
        offsets[1][here] = (y - cell_y)[here]
    random = np.random.default_rng(0)
    return centers, offsets + random.normal(0.0, noise, offsets.shape).astype(np.float32)


def scores_of(labels, value=0.95):
    return np.full(labels.shape, value, np.float32)


def same_partition(found, truth):
    """Least IoU over the true items with the found item that fits best, and the counts."""
    ids = [i for i in np.unique(truth) if i]
    worst = 1.0
    for index in ids:
        mask = truth == index
        best = 0.0
        for other in np.unique(found[mask]):
            if other:
                own = found == other
                best = max(best, float((own & mask).sum() / (own | mask).sum()))
        worst = min(worst, best)
    return worst, len(ids), int(found.max())


def test_nothing_gives_nothing():
    labels = np.zeros((240, 320), np.uint8)
    centers, offsets = centers_and_offsets(labels)
    assert not group_items(labels, scores_of(labels), centers, offsets).any()
    assert not group_items(labels, scores_of(labels)).any()


def test_ids_are_without_gaps_and_of_16_bits():
    labels, truth = scene((1, 50, 50, 20), (2, 200, 100, 30), (3, 280, 200, 15))
    found = group_items(labels, scores_of(labels), *centers_and_offsets(truth))
    assert found.dtype == np.uint16 and found.shape == labels.shape
    assert sorted(np.unique(found)) == [0, 1, 2, 3]


@pytest.mark.parametrize("noise", [0.0, 3.0, 6.0])
def test_touching_discs_of_one_class_separate(noise):
    labels, truth = scene((2, 130, 120, 25), (2, 178, 120, 25))
    found = group_items(labels, scores_of(labels), *centers_and_offsets(truth, noise))
    worst, expected, number = same_partition(found, truth)
    assert number == expected == 2
    assert worst > 0.95


def test_without_centers_touching_discs_of_one_class_are_one():
    labels, _ = scene((2, 130, 120, 25), (2, 178, 120, 25))
    assert group_items(labels, scores_of(labels)).max() == 1


def test_without_centers_touching_discs_of_two_classes_are_two():
    labels, truth = scene((2, 130, 120, 25), (3, 178, 120, 25))
    assert same_partition(group_items(labels, scores_of(labels)), truth) == (1.0, 2, 2)


def test_side_by_side_bottles_separate_along_their_long_sides():
    truth = np.zeros((240, 320), np.uint16)
    truth[60:80, 100:220] = 1
    truth[80:100, 104:224] = 2
    labels = (truth > 0).astype(np.uint8) * 2
    found = group_items(labels, scores_of(labels), *centers_and_offsets(truth, noise=2.0))
    worst, _, number = same_partition(found, truth)
    assert number == 2 and worst > 0.9


def test_missed_center_of_a_touching_disc_is_found_by_the_votes():
    labels, truth = scene((2, 130, 120, 25), (2, 178, 120, 25))
    found = group_items(
        labels, scores_of(labels), *centers_and_offsets(truth, noise=2.0, without=(2,))
    )
    worst, _, number = same_partition(found, truth)
    assert number == 2 and worst > 0.95


def test_component_without_a_center_is_an_item():
    labels, truth = scene((1, 60, 60, 20), (2, 200, 120, 30))
    centers, offsets = centers_and_offsets(truth, without=(1, 2))
    worst, _, number = same_partition(
        group_items(labels, scores_of(labels), centers, offsets), truth
    )
    assert number == 2 and worst == 1.0


def test_false_center_does_not_split_an_item():
    labels, truth = scene((2, 150, 120, 40))
    for noise in (0.0, 4.0):
        centers, offsets = centers_and_offsets(truth, noise)
        centers[110 // STEP, 170 // STEP] = 0.4
        centers[120 // STEP + 2, 150 // STEP] = 0.7
        assert group_items(labels, scores_of(labels), centers, offsets).max() == 1


def test_false_center_on_the_belt_makes_nothing():
    labels, truth = scene((2, 150, 120, 30))
    centers, offsets = centers_and_offsets(truth)
    centers[5, 5] = 0.9
    found = group_items(labels, scores_of(labels), centers, offsets)
    assert same_partition(found, truth) == (1.0, 1, 1)


def test_noise_does_not_mix_items_that_do_not_touch():
    labels, truth = scene((2, 100, 120, 20), (2, 146, 120, 20))
    found = group_items(labels, scores_of(labels), *centers_and_offsets(truth, noise=12.0))
    assert same_partition(found, truth) == (1.0, 2, 2)


def test_item_parted_by_a_gap_is_one_item():
    labels, truth = scene((2, 150, 120, 40))
    labels[:, 147:153] = 0
    truth[:, 147:153] = 0
    found = group_items(labels, scores_of(labels), *centers_and_offsets(truth, noise=2.0))
    assert same_partition(found, truth) == (1.0, 1, 1)


def test_item_parted_by_an_occluder_of_its_class_is_one_item():
    truth = np.zeros((240, 320), np.uint16)
    truth[100:130, 60:260] = 1
    truth[40:150, 165:190] = 2  # lies across, off the middle of the first
    labels = (truth > 0).astype(np.uint8) * 2
    found = group_items(labels, scores_of(labels), *centers_and_offsets(truth, noise=1.5))
    worst, _, number = same_partition(found, truth)
    assert number == 2 and worst > 0.9


def test_ring_is_one_item_with_its_hole():
    labels, _ = scene((3, 150, 120, 40))
    cv2.circle(labels, (150, 120), 20, 0, -1)
    truth = (labels > 0).astype(np.uint16)
    found = group_items(labels, scores_of(labels), *centers_and_offsets(truth))
    np.testing.assert_array_equal(found, truth)


def test_small_patch_of_another_class_goes_to_the_item_around_it():
    labels, truth = scene((2, 150, 120, 40))
    cv2.circle(labels, (160, 125), 7, 4, -1)
    for head in ((), centers_and_offsets(truth)):
        assert same_partition(group_items(labels, scores_of(labels), *head), truth) == (1.0, 1, 1)


def test_large_touching_items_of_two_classes_never_merge():
    labels, truth = scene((2, 130, 120, 25), (3, 178, 120, 25))
    # One centre in the middle between both, and votes that agree on it.
    joint = (truth > 0).astype(np.uint16)
    found = group_items(labels, scores_of(labels), *centers_and_offsets(joint))
    worst, _, number = same_partition(found, truth)
    assert number == 2 and worst > 0.99


def test_unsure_second_class_does_not_split_what_votes_hold_together():
    labels, truth = scene((2, 150, 120, 40))
    labels[truth > 0] = np.where(np.nonzero(truth)[1] > 155, 4, 2)
    found = group_items(labels, scores_of(labels, 0.6), *centers_and_offsets(truth))
    assert same_partition(found, truth) == (1.0, 1, 1)


def test_tiny_holes_are_filled_and_specks_dropped():
    labels, truth = scene((1, 150, 120, 30))
    labels[118:121, 148:151] = 0
    labels[10:13, 10:13] = 2
    found = group_items(labels, scores_of(labels))
    np.testing.assert_array_equal(found, truth)


def test_pixels_below_the_threshold_are_background():
    labels, _ = scene((1, 80, 120, 30), (1, 220, 120, 30))
    scores = scores_of(labels)
    scores[:, 160:] = 0.45
    found = group_items(labels, scores, pixel_threshold=0.5)
    assert found[:, :160].any() and not found[:, 160:].any()


def test_stray_votes_leave_no_splinters():
    labels, truth = scene((2, 130, 120, 30), (2, 186, 120, 30))
    centers, offsets = centers_and_offsets(truth, noise=1.0)
    # A clump of cells deep in the first disc votes for the second.
    for row, column in ((30, 28), (30, 29), (31, 28), (31, 29)):
        offsets[:, row, column] = 186 - 4 * column, 120 - 4 * row
    found = group_items(labels, scores_of(labels), centers, offsets)
    assert found.max() == 2
    for index in (1, 2):
        assert cv2.connectedComponents((found == index).astype(np.uint8))[0] == 2
    assert same_partition(found, truth)[0] > 0.95


def test_items_at_the_border_and_in_corners():
    labels, truth = scene((1, 0, 0, 30), (2, 319, 120, 25), (2, 319, 165, 21), (3, 160, 239, 20))
    found = group_items(labels, scores_of(labels), *centers_and_offsets(truth, noise=1.0))
    worst, _, number = same_partition(found, truth)
    assert number == 4 and worst > 0.93


def test_two_hundred_items():
    items = [(1 + i % 4, 8 + 16 * (i % 20), 12 + 24 * (i // 20), 7) for i in range(200)]
    labels, truth = scene(*items)
    found = group_items(labels, scores_of(labels), *centers_and_offsets(truth, noise=1.0))
    assert same_partition(found, truth) == (1.0, 200, 200)


def test_heap_of_touching_items():
    items = [(2, 60 + 36 * (i % 5), 60 + 36 * (i // 5), 19) for i in range(20)]
    labels, truth = scene(*items)
    found = group_items(labels, scores_of(labels), *centers_and_offsets(truth, noise=2.0))
    worst, _, number = same_partition(found, truth)
    assert number == 20 and worst > 0.85


def test_ids_do_not_depend_on_the_run():
    labels, truth = scene((2, 130, 120, 25), (2, 178, 120, 25), (1, 60, 60, 25))
    head = centers_and_offsets(truth, noise=4.0)
    first = group_items(labels, scores_of(labels), *head)
    np.testing.assert_array_equal(first, group_items(labels, scores_of(labels), *head))


def test_shapes_that_do_not_fit_are_refused():
    labels = np.zeros((240, 320), np.uint8)
    with pytest.raises(ValueError, match="scores"):
        group_items(labels, np.zeros((240, 319), np.float32))
    with pytest.raises(ValueError, match="offsets"):
        group_items(labels, scores_of(labels), np.zeros((60, 80), np.float32))
    with pytest.raises(ValueError, match="fraction"):
        group_items(
            labels,
            scores_of(labels),
            np.zeros((50, 80), np.float32),
            np.zeros((2, 50, 80), np.float32),
        )


@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_network_says_the_result_is_well_formed(seed):
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 5, (15, 20)).astype(np.uint8)
    labels = cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_NEAREST)
    noisy = random.random(labels.shape) < (0.0, 0.1, 0.5)[seed % 3]
    labels[noisy] = random.integers(0, 5, int(noisy.sum()))
    scores = random.random(labels.shape).astype(np.float32)
    centers = random.random((60, 80)).astype(np.float32)
    centers[random.random(centers.shape) < 0.9] = 0.0
    offsets = random.normal(0, 20, (2, 60, 80)).astype(np.float32)
    for head in ((), (centers, offsets)):
        found = group_items(labels, scores, *head, pixel_threshold=0.2, min_area=40)
        areas = np.bincount(found.ravel())[1:]
        assert len(areas) > 0 and (areas > 0).all()
        # Holes of an item may be filled, but nothing large is made of background.
        made = (found > 0) & ((labels == 0) | (scores < 0.2))
        stats = cv2.connectedComponentsWithStats(made.astype(np.uint8), connectivity=4)[2]
        assert stats[1:, cv2.CC_STAT_AREA].max(initial=0) <= 20
