"""The overlay against the image it is drawn over, and scaling between the two resolutions."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from waste_seg_ros.perception.draw import class_color, contact_sheet, draw_overlay
from waste_seg_ros.perception.grasp import Gripper
from waste_seg_ros.perception.items import ItemParams, describe_items
from waste_seg_ros.perception.scaling import scale_ids, scale_image

NAMES = ("paper", "bottle", "aluminum", "nylon")


def scene(image_size=(640, 480), classes=(1, 2)):
    labels = np.zeros((240, 320), np.uint8)
    instances = np.zeros((240, 320), np.uint16)
    for index, kind in enumerate(classes):
        box = (slice(100, 140), slice(40 + 80 * index, 90 + 80 * index))
        labels[box], instances[box] = kind, index + 1
    items = describe_items(instances, labels, None, image_size)
    image = np.random.default_rng(0).integers(60, 90, (image_size[1], image_size[0], 3))
    return image.astype(np.uint8), instances, items


def test_overlay_has_the_size_of_the_image_and_leaves_it_alone():
    image, instances, items = scene()
    before = image.copy()
    overlay = draw_overlay(image, instances, items, NAMES)
    assert overlay.shape == image.shape and overlay.dtype == np.uint8
    np.testing.assert_array_equal(image, before)
    assert not np.shares_memory(overlay, image)


def test_overlay_in_place():
    image, instances, items = scene()
    expected = draw_overlay(image, instances, items, NAMES)
    assert draw_overlay(image, instances, items, NAMES, copy=False) is image
    np.testing.assert_array_equal(image, expected)


def test_fill_lies_on_the_item_and_nowhere_else():
    image, instances, items = scene()
    overlay = draw_overlay(image, instances, items, NAMES)
    # Off the grasp line, outline and name of the first item, which covers 80..179 by 200..279.
    inside = (slice(230, 276), slice(84, 110))
    for channel, color in enumerate(class_color(1)):
        blend = 0.6 * image[inside][..., channel] + 0.4 * color
        np.testing.assert_allclose(overlay[inside][..., channel], blend, atol=1.5)
    np.testing.assert_array_equal(overlay[300:], image[300:])
    np.testing.assert_array_equal(overlay[:, :70], image[:, :70])
    np.testing.assert_array_equal(overlay[:150], image[:150])


def test_fill_without_an_instance_image_follows_the_outline():
    image, instances, items = scene()
    np.testing.assert_allclose(
        draw_overlay(image, None, items, NAMES)[230:276, 84:110],
        draw_overlay(image, instances, items, NAMES)[230:276, 84:110],
    )


def test_no_items_draw_nothing():
    image, instances, _ = scene()
    np.testing.assert_array_equal(draw_overlay(image, instances * 0, (), NAMES), image)


@pytest.mark.parametrize("size", [(64, 48), (333, 251), (1920, 1080)])
def test_other_image_sizes(size):
    image, instances, items = scene(size)
    overlay = draw_overlay(image, instances, items, NAMES)
    assert overlay.shape == (size[1], size[0], 3)
    assert (overlay != image).any()


def test_a_read_only_image_can_be_drawn_over():
    image, instances, items = scene()
    image.setflags(write=False)
    assert (draw_overlay(image, instances, items, NAMES) != image).any()


def test_items_at_the_corners_are_named_inside_the_image():
    labels = np.zeros((240, 320), np.uint8)
    for box in ((slice(0, 30), slice(0, 30)), (slice(210, 240), slice(290, 320))):
        labels[box] = 1
    instances = (labels > 0).astype(np.uint16)
    instances[:, 200:] *= 2
    items = describe_items(instances, labels, None, (320, 240))
    image = np.zeros((240, 320, 3), np.uint8)
    overlay = draw_overlay(image, instances, items, NAMES)
    # The name's box is of the pure colour; the fill is a blend.
    pure = (overlay == class_color(1)).all(axis=2)
    assert pure[:60, :110].sum() > 100 and pure[190:, 200:].sum() > 100


def test_images_of_another_kind_are_refused():
    _, instances, items = scene()
    with pytest.raises(ValueError, match="must be"):
        draw_overlay(np.zeros((480, 640), np.uint8), instances, items)
    with pytest.raises(ValueError, match="must be"):
        draw_overlay(np.zeros((480, 640, 3), np.float32), instances, items)


def test_every_class_has_its_own_colour():
    colors = [class_color(index) for index in range(40)]
    assert len(set(colors)) == 40
    assert all(0 <= value <= 255 for color in colors for value in color)


def test_contact_sheet_keeps_every_image():
    images = [np.full((20 + index, 30, 3), 50 + index, np.uint8) for index in range(5)]
    sheet = contact_sheet(images, columns=3)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (2 * 24 + 3 * 4, 3 * 30 + 4 * 4, 3)
    for index, image in enumerate(images):
        assert (sheet == 50 + index).all(axis=2).sum() == image.shape[0] * image.shape[1]
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def test_images_are_scaled_by_their_means_when_they_shrink():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, ::2] = 200
    assert (scale_image(image, (2, 2)) == 100).all()
    assert scale_image(image, (4, 4)) is image
    assert scale_image(image, (8, 6)).shape == (6, 8, 3)


@pytest.mark.parametrize("size", [(640, 480), (1024, 576), (333, 251), (160, 120)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_ids_are_those_at_the_middle_of_the_pixels(size, kind):
    ids = np.random.default_rng(0).integers(0, 200, (240, 320)).astype(kind)
    columns = np.floor((np.arange(size[0]) + 0.5) * 320 / size[0]).astype(int)
    rows = np.floor((np.arange(size[1]) + 0.5) * 240 / size[1]).astype(int)
    scaled = scale_ids(ids, size)
    assert scaled.dtype == kind
    np.testing.assert_array_equal(scaled, ids[np.ix_(rows, columns)])


def test_a_cup_is_drawn_as_a_circle_and_dashed_where_it_is_not_for_picking():
    labels = np.zeros((240, 320), np.uint8)
    labels[60:160, 60:160] = 1
    instances = (labels > 0).astype(np.uint16)
    image = np.zeros((240, 320, 3), np.uint8)
    counts = []
    for diameter in (60.0, 120.0):  # of the 100 pixels there are
        params = ItemParams(gripper=Gripper(kind="suction", cup_diameter=diameter))
        (item,) = describe_items(instances, labels, None, (320, 240), params)
        assert item.pickable is (diameter < 100)
        white = draw_overlay(image, instances, [item]).min(axis=2) > (200 if item.pickable else 110)
        y, x = np.nonzero(white[62:158, 62:158])
        away = np.hypot(x + 62 - item.grasp_center[0], y + 62 - item.grasp_center[1])
        rim = np.abs(away - item.grasp_width / 2) < 1.5
        assert (rim | (away < 6)).all()  # a cross marks the middle
        counts.append(int(rim.sum()))
    assert 0 < counts[1] < 0.7 * counts[0]


@pytest.mark.parametrize("size", [(1920, 1080), (1280, 720), (1284, 963), (641, 479)])
def test_halving_first_gives_nearly_the_means_over_areas(size):
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (size[1], size[0], 3), np.uint8), (0, 0), 3)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    small = scale_image(image, (320, 240))
    means = cv2.resize(image.astype(np.float32), (320, 240), interpolation=cv2.INTER_AREA)
    off = small - means
    assert small.shape == (240, 320, 3)
    assert np.abs(off).mean() < 4.0 and abs(off.mean()) < 0.5
    # Not shifted: by a pixel either way it fits far worse.
    shifted = np.abs(small[:, 1:] - means[:, :-1]).mean()
    assert np.abs(off).mean() < 0.4 * shifted
