"""Measured items against shapes whose sizes, places and angles are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from waste_seg_ros.perception.items import (
    ItemParams,
    describe_items,
    extract_items,
    label_image,
    normalize_angle,
)
from waste_seg_ros.runtime.backends import Prediction


def prediction(labels, scores=None):
    if scores is None:
        scores = np.full(labels.shape, 0.9, np.float32)
    return SimpleNamespace(labels=labels, scores=scores, centers=None, offsets=None)


def items_of(labels, image_size=None, scores=None, **params):
    size = image_size or (labels.shape[1], labels.shape[0])
    return extract_items(prediction(labels, scores), size, ItemParams(**params))


def bar(center, length, width, degrees, kind=1, size=(320, 240)):
    """A bar of the pixels whose middle lies in the exact rectangle."""
    box = cv2.boxPoints((center, (length, width), degrees))
    labels = np.zeros((size[1], size[0]), np.uint8)
    y, x = np.mgrid[: size[1], : size[0]]
    inside = np.ones(labels.shape, bool)
    for (x0, y0), (x1, y1) in zip(box, np.roll(box, -1, axis=0), strict=True):
        inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    labels[inside] = kind
    return labels


def angle_between(first, second):
    return abs(normalize_angle(first - second))


def test_no_items():
    instances, items = items_of(np.zeros((240, 320), np.uint8))
    assert items == () and not instances.any()


def test_rectangle_at_network_resolution():
    labels = np.zeros((240, 320), np.uint8)
    labels[100:120, 50:110] = 2  # pixels 50..109 by 100..119
    instances, (item,) = items_of(labels)
    assert item.id == 1 and (instances[labels > 0] == 1).all()
    assert item.class_index == 2
    assert item.area == 60 * 20
    assert item.roi == (50, 100, 60, 20)
    assert item.center == pytest.approx((79.5, 109.5))
    assert item.length == pytest.approx(60.0) and item.width == pytest.approx(20.0)
    assert item.angle == pytest.approx(0.0)
    assert item.outline.dtype == np.float32
    assert sorted(map(tuple, item.outline)) == [
        (49.5, 99.5),
        (49.5, 119.5),
        (109.5, 99.5),
        (109.5, 119.5),
    ]
    assert item.grasp_center == pytest.approx((79.5, 109.5))
    assert item.grasp_width == pytest.approx(20.0)
    assert item.grasp_angle == pytest.approx(math.pi / 2)
    assert item.pickable and item.reason == ""
    assert not (item.touching or item.truncated or item.uncertain)


def test_network_pixels_map_to_the_camera_pixels_they_cover():
    labels = np.zeros((240, 320), np.uint8)
    labels[100:120, 50:110] = 2
    _, (item,) = items_of(labels, (960, 720))  # three camera pixels a side
    assert item.roi == (150, 300, 180, 60)
    # Camera pixels 150..329 by 300..359 are covered.
    assert item.center == pytest.approx((239.5, 329.5))
    assert item.outline.min(axis=0) == pytest.approx((149.5, 299.5))
    assert item.outline.max(axis=0) == pytest.approx((329.5, 359.5))
    assert item.area == 180 * 60
    assert item.length == pytest.approx(180.0) and item.width == pytest.approx(60.0)


def test_another_aspect_scales_both_axes_apart():
    labels = np.zeros((240, 320), np.uint8)
    labels[100:140, 100:140] = 1
    _, (item,) = items_of(labels, (1280, 240))
    assert item.length == pytest.approx(160.0) and item.width == pytest.approx(40.0)
    assert item.angle == pytest.approx(0.0)


@pytest.mark.parametrize("degrees", range(-90, 90, 15))
def test_angle_and_size_of_a_bar(degrees):
    labels = bar((160, 120), 100, 30, degrees)
    _, (item,) = items_of(labels)
    assert angle_between(item.angle, math.radians(degrees)) < math.radians(1.5)
    assert -math.pi / 2 < item.angle <= math.pi / 2
    assert item.length == pytest.approx(100, abs=2.5)
    assert item.width == pytest.approx(30, abs=2.5)
    assert item.center == pytest.approx((160, 120), abs=0.5)
    assert cv2.contourArea(item.outline) == pytest.approx(item.area, rel=0.04)
    # The jaws close across the bar, at its middle.
    assert angle_between(item.grasp_angle, math.radians(degrees + 90)) < math.radians(1.5)
    assert -math.pi / 2 < item.grasp_angle <= math.pi / 2
    assert item.grasp_width == pytest.approx(30, abs=2.5)
    assert item.grasp_center == pytest.approx((160, 120), abs=1.0)


def test_angles_are_those_of_undirected_axes():
    assert normalize_angle(math.pi / 2) == pytest.approx(math.pi / 2)
    assert normalize_angle(-math.pi / 2) == pytest.approx(math.pi / 2)
    assert normalize_angle(math.pi) == pytest.approx(0.0)
    assert normalize_angle(math.radians(100)) == pytest.approx(math.radians(-80))


def test_grasp_takes_the_waist_of_an_hourglass():
    labels = np.zeros((240, 320), np.uint8)
    cv2.fillPoly(
        labels,
        [np.array([[80, 80], [160, 110], [240, 80], [240, 160], [160, 130], [80, 160]])],
        3,
    )
    _, (item,) = items_of(labels)
    assert item.grasp_width == pytest.approx(21, abs=1.5)
    assert angle_between(item.grasp_angle, math.pi / 2) < 0.05


def test_grasp_chord_ends_on_the_outline():
    random = np.random.default_rng(3)
    for _ in range(20):
        labels = np.zeros((240, 320), np.uint8)
        points = random.uniform((90, 60), (230, 180), (7, 2)).astype(np.int32)
        cv2.fillPoly(labels, [cv2.convexHull(points)], 1)
        _, (item,) = items_of(labels, (640, 480))
        half = item.grasp_width / 2
        along = np.array([math.cos(item.grasp_angle), math.sin(item.grasp_angle)])
        for sign in (-1, 1):
            x, y = np.array(item.grasp_center) + sign * half * along
            assert abs(cv2.pointPolygonTest(item.outline, (float(x), float(y)), True)) < 0.1
        assert item.grasp_width <= item.length + 1e-3


def test_grasp_of_a_crescent_lies_on_it():
    labels = np.zeros((240, 320), np.uint8)
    cv2.ellipse(labels, (160, 120), (60, 60), 0, 0, 180, 1, 14)
    _, (item,) = items_of(labels)
    x, y = (round(v) for v in item.center)
    assert labels[y, x] == 0  # the centroid itself is beside it
    x, y = (round(v) for v in item.grasp_center)
    assert labels[y, x] == 1
    assert item.grasp_width < 20


def test_ring_is_grasped_across():
    labels = np.zeros((240, 320), np.uint8)
    cv2.circle(labels, (160, 120), 40, 3, -1)
    cv2.circle(labels, (160, 120), 25, 0, -1)
    _, (item,) = items_of(labels)
    assert item.grasp_width == pytest.approx(81, abs=2)
    assert item.center == pytest.approx((160, 120), abs=0.1)
    assert item.area == (labels > 0).sum()


def test_truncated_at_each_border():
    for rows, columns in (
        (slice(0, 40), slice(100, 140)),
        (slice(200, 240), slice(100, 140)),
        (slice(100, 140), slice(0, 40)),
        (slice(100, 140), slice(280, 320)),
    ):
        labels = np.zeros((240, 320), np.uint8)
        labels[rows, columns] = 1
        _, (item,) = items_of(labels, (640, 480))
        assert item.truncated and not item.pickable
        assert item.reason == "truncated by the image border"
        x, y, width, height = item.roi
        assert min(x, y) >= 0 and x + width <= 640 and y + height <= 480
        assert (item.outline >= 0).all()
        assert (item.outline <= (639, 479)).all()
    labels = np.zeros((240, 320), np.uint8)
    labels[1:239, 1:319] = 1
    assert not items_of(labels)[1][0].truncated


def test_roi_of_a_scale_that_does_not_divide_stays_in_the_image():
    labels = np.zeros((240, 320), np.uint8)
    labels[200:240, 290:320] = 1
    _, (item,) = items_of(labels, (1001, 563))
    x, y, width, height = item.roi
    assert (x + width, y + height) == (1001, 563)


def test_touching_needs_another_item_within_two_pixels():
    for gap, touching in ((1, True), (2, False), (5, False)):
        labels = np.zeros((240, 320), np.uint8)
        labels[100:140, 100:140] = 1
        labels[100:140, 140 + gap : 180 + gap] = 2
        _, items = items_of(labels)
        assert [item.touching for item in items] == [touching, touching]


def test_score_is_mean_probability_times_share_of_votes():
    labels = np.zeros((240, 320), np.uint8)
    labels[100:140, 100:150] = 2
    labels[100:120, 100:105] = 4  # 100 of 2000 pixels
    scores = np.full(labels.shape, 0.8, np.float32)
    instances = (labels > 0).astype(np.uint16)
    (item,) = describe_items(instances, labels, scores, (320, 240))
    assert item.class_index == 2
    assert item.score == pytest.approx(0.8 * 0.95)
    assert not item.uncertain


def test_class_is_decided_by_the_weight_of_the_votes():
    labels = np.zeros((240, 320), np.uint8)
    labels[100:140, 100:150] = 2
    labels[100:140, 100:122] = 4  # 44 % of the pixels, but sure
    scores = np.where(labels == 4, 0.95, 0.5).astype(np.float32)
    (item,) = describe_items((labels > 0).astype(np.uint16), labels, scores, (320, 240))
    assert item.class_index == 4
    assert item.uncertain  # a close vote


def test_low_score_is_not_pickable_and_says_why():
    labels = np.zeros((240, 320), np.uint8)
    labels[100:140, 100:150] = 2
    scores = np.full(labels.shape, 0.41, np.float32)
    _, (item,) = items_of(labels, scores=scores, pixel_threshold=0.3, score_threshold=0.6)
    assert not item.pickable and item.uncertain
    assert item.reason == "score 0.41 below 0.60"


def test_small_item_is_not_pickable_and_smaller_is_none():
    labels = np.zeros((240, 320), np.uint8)
    labels[100:107, 100:110] = 2
    _, (item,) = items_of(labels, min_area_px=50, min_pick_area_px=80)
    assert not item.pickable and item.reason == "too small: 70 px below 80"
    assert items_of(labels, min_area_px=71)[1] == ()


def test_binary_head_gives_items_of_unknown_class():
    labels = np.zeros((240, 320), np.uint8)
    labels[100:140, 100:150] = 1
    _, (item,) = items_of(labels, class_agnostic=True)
    assert item.class_index == 0
    assert item.score == pytest.approx(0.9)
    assert item.pickable


def test_unknown_classes_are_dropped_with_their_pixels():
    labels = np.zeros((240, 320), np.uint8)
    labels[100:140, 40:80] = 1
    labels[100:140, 140:180] = 2
    labels[100:140, 240:280] = 3
    instances, items = items_of(labels, classes=frozenset({1, 3}))
    assert [item.class_index for item in items] == [1, 3]
    assert [item.id for item in items] == [1, 2]
    assert not instances[labels == 2].any()
    assert (instances[labels == 3] == 2).all()


def test_the_surest_items_are_kept():
    labels = np.zeros((240, 320), np.uint8)
    scores = np.zeros((240, 320), np.float32)
    for index in range(5):
        labels[100:120, 20 + 60 * index : 50 + 60 * index] = 1
        scores[100:120, 20 + 60 * index : 50 + 60 * index] = (0.7, 0.9, 0.6, 0.95, 0.8)[index]
    instances, items = items_of(labels, scores=scores, max_items=3)
    assert [round(item.score, 2) for item in items] == [0.9, 0.95, 0.8]
    assert sorted(np.unique(instances)) == [0, 1, 2, 3]


def test_truth_with_gaps_in_ids_and_labels_without_class():
    instances = np.zeros((240, 320), np.uint16)
    labels = np.zeros((240, 320), np.uint8)
    instances[10:50, 10:50], labels[10:50, 10:50] = 7, 3
    instances[10:50, 100:150], labels[10:50, 100:150] = 9, 254
    first, second = describe_items(instances, labels, None, (640, 480))
    assert (first.id, first.class_index, first.score) == (7, 3, 1.0)
    assert (second.id, second.class_index) == (9, 0)


def test_a_line_of_single_pixels_is_measured():
    labels = np.zeros((240, 320), np.uint8)
    labels[100, 50:200] = 1
    _, (item,) = items_of(labels)
    assert item.length == pytest.approx(150) and item.width == pytest.approx(1.0)
    assert item.grasp_width == pytest.approx(1.0)


def test_two_hundred_items():
    labels = np.zeros((480, 640), np.uint8)
    for index in range(200):
        cv2.circle(labels, (20 + 30 * (index % 20), 24 + 44 * (index // 20)), 10, 1 + index % 4, -1)
    _, items = items_of(labels)
    assert len(items) == 200
    assert len({item.id for item in items}) == 200
    assert {item.class_index for item in items} == {1, 2, 3, 4}


def test_parameters_out_of_range_are_refused_by_name():
    for name, value in (("score_threshold", 1.5), ("pixel_threshold", -0.1), ("max_items", 0)):
        with pytest.raises(ValueError, match=name):
            ItemParams(**{name: value})
    with pytest.raises(ValueError, match="image size"):
        describe_items(np.ones((4, 4), np.uint16), np.ones((4, 4), np.uint8), None, (0, 4))


def test_the_label_image_gives_every_pixel_of_an_item_its_class():
    labels = np.zeros((60, 80), np.uint8)
    labels[10:30, 10:40] = 2
    labels[12:14, 12:16] = 3  # what the network mistook
    labels[40:55, 50:70] = 4
    prediction = Prediction(labels, np.full(labels.shape, 0.9, np.float32))
    instances, items = extract_items(prediction, (80, 60))
    picture = label_image(instances, items)
    assert picture.dtype == np.uint8
    assert sorted({i.class_index for i in items} | {0}) == sorted(set(np.unique(picture)))
    for item in items:
        assert (picture[instances == item.id] == item.class_index).all()
    assert not picture[instances == 0].any()
    agnostic = extract_items(prediction, (80, 60), ItemParams(class_agnostic=True))
    assert set(np.unique(label_image(*agnostic))) == {0, 1}
    assert not label_image(np.zeros((4, 4), np.uint16), ()).any()
