"""Grasps of shapes of which it is known where they can be held."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from waste_seg_ros.perception.grasp import (
    BELT_SIDES,
    Gripper,
    find_grasp,
    find_grasps,
    normalize_angle,
)
from waste_seg_ros.perception.items import ItemParams, describe_items

#: Lengths in millimetres throughout, unless said otherwise.
JAWS = Gripper(max_opening=100.0, jaw_width=20.0, jaw_thickness=10.0, clearance=4.0)
CUP = Gripper(kind="suction", cup_diameter=30.0)
THIN_JAWS = Gripper()


def box(x, y, width, height):
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], float)


def ellipse(center, first, second=None, count=90):
    turn = np.arange(count) * (2 * math.pi / count)
    radii = (first, second or first)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1) * radii + center


def turned(points, degrees, about=(0.0, 0.0)):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (np.asarray(points) - about) @ np.array([[c, s], [-s, c]]) + about


def crescent(outer=60.0, inner=44.0):
    """The lower half of a ring around the origin."""
    turn = np.linspace(0, math.pi, 60)
    arc = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return np.concatenate([outer * arc, inner * arc[::-1]])


L_SHAPE = np.array([(0, 0), (120, 0), (120, 40), (40, 40), (40, 120), (0, 120)], float)


def contacts(grasp):
    along = np.array([math.cos(grasp.angle), math.sin(grasp.angle)])
    return [np.array(grasp.center) + sign * 0.5 * grasp.width * along for sign in (-1, 1)]


def distance(point, outline):
    """From a point to an outline, by brute force."""
    start, end = np.asarray(outline, float), np.roll(outline, -1, axis=0)
    edge = end - start
    share = ((point - start) * edge).sum(1) / np.maximum((edge**2).sum(1), 1e-300)
    nearest = start + np.clip(share, 0, 1)[:, None] * edge
    return float(np.hypot(*(point - nearest).T).min())


def is_inside(point, outline):
    x, y = point
    inside = False
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            inside = not inside
    return inside


# --- jaws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", (0, 17, 45, 90, 133))
@pytest.mark.parametrize("reverse", (False, True))
def test_a_rectangle_is_gripped_across_its_middle(degrees, reverse):
    outline = turned(box(100, 200, 120, 40), degrees, (160, 220))
    grasp = find_grasp(outline[::-1] if reverse else outline, JAWS)
    assert grasp.kind == "jaws" and grasp.pickable and grasp.reason == ""
    assert grasp.center == pytest.approx((160, 220), abs=0.01)
    assert grasp.width == pytest.approx(40, abs=0.01)
    assert abs(normalize_angle(grasp.angle - math.radians(degrees + 90))) < 1e-3
    assert -math.pi / 2 < grasp.angle <= math.pi / 2
    # Square, even, in the middle; a fifth of the quality goes with the opening of 40 of 100.
    assert grasp.quality == pytest.approx(0.8, abs=0.01)


def test_a_short_opening_a_central_and_a_square_contact_are_better():
    narrow = find_grasp(box(0, 0, 120, 20), JAWS).quality
    assert narrow > find_grasp(box(0, 0, 120, 60), JAWS).quality
    bar = box(0, 0, 120, 20)
    assert narrow > find_grasp(bar, JAWS, center=(30, 10), neighbours=[box(20, 21, 60, 40)]).quality
    wedge = np.array([(-60, -10), (60, -20), (60, 20), (-60, 10)], float)
    assert narrow > find_grasp(wedge, JAWS).quality > 0.5


def test_a_disc_is_gripped_through_its_middle():
    grasp = find_grasp(ellipse((30, -20), 25), JAWS)
    assert grasp.center == pytest.approx((30, -20), abs=0.05)
    assert grasp.width == pytest.approx(50, abs=0.1)
    assert grasp.quality > 0.6


def test_an_l_is_gripped_by_one_leg_near_the_elbow():
    grasp = find_grasp(L_SHAPE, JAWS)
    assert grasp.pickable
    assert grasp.width == pytest.approx(40, abs=0.5)
    for contact in contacts(grasp):
        assert distance(contact, L_SHAPE) < 1e-6
    # The jaw in the corner, 20 wide and 14 deep with what is left free, does not touch a leg.
    x, y = grasp.center
    assert max(x, y) > 50 and min(x, y) == pytest.approx(20, abs=0.5)


def test_a_crescent_is_gripped_through_its_band():
    outline = crescent()
    grasp = find_grasp(outline, JAWS)
    assert grasp.pickable and grasp.width == pytest.approx(16, abs=1.0)
    assert is_inside(grasp.center, outline)
    # Its lowest place is the nearest to the centre of mass.
    assert grasp.center == pytest.approx((0, 52), abs=3)


def test_a_jaw_that_does_not_fit_into_the_hollow_goes_elsewhere():
    # A U whose hollow is 12 wide: jaws of 10 and 4 left free on the far side do not go in.
    u = np.array(
        [(0, 0), (20, 0), (20, 90), (32, 90), (32, 0), (52, 0), (52, 110), (0, 110)], float
    )
    grasp = find_grasp(u, JAWS)
    assert grasp.pickable
    assert grasp.width == pytest.approx(52, abs=0.5)  # both limbs together
    short = replace(JAWS, max_opening=50.0)
    refused = find_grasp(u, short)
    assert not refused.pickable and refused.reason.startswith("too wide")
    slim = find_grasp(u, replace(short, jaw_thickness=3.0, clearance=2.0))
    assert slim.pickable and slim.width == pytest.approx(20, abs=0.5)


def test_a_waist_and_a_neck_are_found():
    hourglass = np.array([(-80, -40), (0, -10), (80, -40), (80, 40), (0, 10), (-80, 40)], float)
    grasp = find_grasp(hourglass, THIN_JAWS)
    assert grasp.width == pytest.approx(20, abs=0.1)
    assert grasp.center == pytest.approx((0, 0), abs=0.1)
    bottle = np.array(
        [(0, 0), (150, 0), (180, 45), (240, 45), (240, 75), (180, 75), (150, 120), (0, 120)], float
    )
    neck = find_grasp(bottle, JAWS)
    assert neck.pickable and neck.width == pytest.approx(30, abs=0.1) and neck.center[0] > 185
    body = find_grasp(bottle, replace(JAWS, max_opening=200.0))
    assert body.width == pytest.approx(120, abs=0.1) and body.quality > neck.quality


def test_wider_than_the_opening_and_narrower_than_the_jaws_hold():
    sheet = box(0, 0, 210, 148)
    grasp = find_grasp(sheet, JAWS)
    assert not grasp.pickable and grasp.quality == 0
    assert grasp.reason == "too wide: 148 above 92"  # what is left free on both sides is needed
    assert grasp.width == pytest.approx(148) and grasp.center == pytest.approx((105, 74))
    on_edge = find_grasp(box(0, 0, 80, 2), replace(JAWS, min_opening=3.0, max_opening=60.0))
    assert on_edge.reason == "too narrow: 2 below 3"
    metres = Gripper(max_opening=0.1).scaled(1500.0)
    assert metres.max_opening == pytest.approx(150) and metres.metre == 1500
    assert find_grasp(box(0, 0, 300, 225), metres).reason == "too wide: 150 mm above 100 mm"


def test_of_two_touching_bars_the_shared_side_is_blocked():
    first, second = box(0, 0, 30, 80), box(30, 0, 30, 80)
    short = replace(JAWS, max_opening=60.0)
    left, right = find_grasps([first, second], short)
    assert left.reason == "blocked by neighbour at right"
    assert right.reason == "blocked by neighbour at left"
    assert not left.pickable and left.quality == 0 and left.width == pytest.approx(30)
    # Jaws that open wide enough take them by their ends.
    for grasp, x in zip(find_grasps([first, second], JAWS), (15, 45), strict=True):
        assert grasp.pickable and grasp.width == pytest.approx(80)
        assert abs(grasp.angle) == pytest.approx(math.pi / 2, abs=1e-3)
        assert grasp.center == pytest.approx((x, 40), abs=0.1)
    # With 18 between them, jaw and what is to be left free on both its sides go in.
    for gap, free in ((17.9, False), (18.1, True)):
        grasps = find_grasps([first, box(30 + gap, 0, 30, 80)], short)
        assert [grasp.pickable for grasp in grasps] == [free, free]


def test_sides_are_named_as_the_plane_is_looked_at():
    lying = box(0, 0, 80, 30)
    short = replace(JAWS, max_opening=60.0)
    above, below = box(-40, -60, 160, 58), box(-40, 32, 160, 60)
    assert find_grasp(lying, short, neighbours=[above]).reason == "blocked by neighbour at top"
    both = find_grasp(lying, short, neighbours=[above, below])
    assert both.reason == "blocked by neighbour at bottom and top"
    belt = find_grasp(lying, short, neighbours=[below], sides=BELT_SIDES)
    assert belt.reason == "blocked by neighbour at left"


def test_a_neighbour_in_the_middle_moves_the_grasp_along_the_bar():
    bar = box(0, 0, 200, 30)
    grasp = find_grasp(bar, JAWS, neighbours=[box(80, 32, 40, 30)])
    assert grasp.pickable and grasp.width == pytest.approx(30)
    # 14 to either side of the jaw's middle have to keep off 80..120.
    assert not 66 < grasp.center[0] < 134


def test_what_lies_on_a_sheet_is_not_for_jaws():
    can, sheet = box(100, 100, 60, 30), box(0, 0, 300, 300)
    grasp = find_grasp(can, JAWS, neighbours=[sheet])
    assert grasp.reason == "blocked by neighbour at bottom and top"
    # A second sheet around both does not undo that.
    assert not find_grasp(can, JAWS, neighbours=[sheet, box(-50, -50, 400, 400)]).pickable
    assert find_grasp(can, CUP, neighbours=[sheet]).reason.startswith("smaller") is False


def test_a_guide_is_kept_clear_of():
    bar = box(0, 0, 120, 30)
    short = replace(JAWS, max_opening=60.0)
    for wall, free in ((47.9, False), (48.1, True)):
        grasp = find_grasp(bar, short, guides=[(0.0, 1.0, wall)])
        assert grasp.pickable is free
        assert grasp.reason == ("" if free else "blocked by guide at bottom")
    # A wall across the bar leaves its other end.
    grasp = find_grasp(bar, short, guides=[(-1.0, 0.0, -55.0)])
    assert grasp.pickable and grasp.center[0] > 55 + 14
    far = find_grasp(box(1e4, 5e3, 120, 30), short, guides=[(0.0, 1.0, 5047.9)])
    assert far.reason == "blocked by guide at bottom"


def test_friction_decides_whether_a_wedge_holds():
    # Sides that are off parallel by 24 degrees: 12 at either jaw.
    half = 60 * math.tan(math.radians(12))
    wedge = np.array([(-60, -5), (60, -5 - 2 * half), (60, 5 + 2 * half), (-60, 5)], float)
    slippery = replace(JAWS, friction_angle=math.radians(8), jaw_width=0.0)
    assert find_grasp(wedge, slippery).reason == "too wide: 120 above 92"  # the ends are parallel
    assert find_grasp(wedge, replace(slippery, friction_angle=math.radians(20))).pickable
    triangle = np.array([(0, 0), (100, 0), (63, 41)], float)
    refused = find_grasp(triangle, replace(slippery, friction_angle=math.radians(1)))
    assert refused.reason == "no two sides face each other within 1°" and not refused.pickable


def test_the_teeth_of_a_pixel_outline_do_not_matter():
    # A slanting bar, its long sides stairs of 2 by 1.
    steps = np.array([(x + dx, x / 2) for x in range(0, 120, 2) for dx in (0, 2)])
    outline = np.concatenate([steps, steps[::-1] + np.array([0, 34])])
    grasp = find_grasp(outline, replace(JAWS, jaw_width=0.0), tolerance=2.0)
    assert grasp.pickable and grasp.quality > 0.4
    assert abs(normalize_angle(grasp.angle - math.radians(90 + 26.6))) < math.radians(8)


# --- suction ------------------------------------------------------------------------------------


def test_the_circle_of_a_rectangle_lies_around_its_middle():
    grasp = find_grasp(box(0, 0, 120, 40), CUP)
    assert grasp.kind == "suction" and grasp.pickable
    assert grasp.center == pytest.approx((60, 20), abs=0.5)
    assert grasp.width == pytest.approx(40, abs=1.0)
    assert abs(grasp.angle) == pytest.approx(math.pi / 2, abs=1e-3)
    # Room for 1.33 of the cup: 0.5 at one, 1 at two.
    assert grasp.quality == pytest.approx(0.5 * 40 / 30, abs=0.03)


def test_a_disc_and_the_cup_that_just_fits():
    disc = ellipse((7, 9), 20)
    assert find_grasp(disc, replace(CUP, cup_diameter=38.0)).pickable
    refused = find_grasp(disc, replace(CUP, cup_diameter=42.0))
    assert refused.reason == "smaller than the cup: 40 below 42" and refused.quality == 0
    rim = find_grasp(disc, replace(CUP, cup_diameter=38.0, clearance=2.0))
    assert rim.reason == "smaller than the cup: 40 below 42"
    told = find_grasp(disc, replace(CUP, cup_diameter=42.0, metre=1000.0))
    assert told.reason == "smaller than the cup: 40 mm below 42 mm"
    assert find_grasp(disc, replace(CUP, cup_diameter=0.0)).width == pytest.approx(40, abs=0.3)


def test_an_l_is_sucked_at_its_elbow():
    grasp = find_grasp(L_SHAPE, replace(CUP, cup_diameter=0.0))
    # The circle that touches both outer sides and the inner corner: r = 40 (2 - sqrt 2).
    radius = 40 * (2 - math.sqrt(2))
    assert grasp.width == pytest.approx(2 * radius, abs=0.6)
    assert grasp.center == pytest.approx((radius, radius), abs=1.0)


def test_a_ring_is_sucked_beside_its_hole():
    outer, hole = ellipse((0, 0), 60), ellipse((12, 0), 30)
    grasp = find_grasp(outer, CUP, holes=[hole])
    # The band is widest at the left, from -60 to -18.
    assert grasp.center == pytest.approx((-39, 0), abs=4)
    assert grasp.width == pytest.approx(42, abs=1)
    assert find_grasp(outer, CUP).center == pytest.approx((0, 0), abs=1)
    narrow = find_grasp(outer, CUP, holes=[ellipse((0, 0), 50)])
    assert narrow.reason == "smaller than the cup: 9.99 below 30"


def test_a_crescent_is_sucked_on_its_band():
    outline = crescent()
    grasp = find_grasp(outline, replace(CUP, cup_diameter=10.0))
    assert grasp.pickable and grasp.width == pytest.approx(16, abs=0.5)
    assert is_inside(grasp.center, outline)
    assert not find_grasp(outline, CUP).pickable


def test_a_thin_sheet_is_for_suction_only():
    sheet = box(0, 0, 210, 297)
    assert not find_grasp(sheet, JAWS).pickable
    grasp = find_grasp(sheet, CUP)
    assert grasp.pickable and grasp.quality > 0.95
    # With plenty of room everywhere it is taken at its centre of mass.
    assert grasp.center == pytest.approx((105, 148.5), abs=2)
    assert find_grasp(sheet, CUP, center=(90, 200)).center == pytest.approx((90, 200), abs=2)


def test_a_cup_keeps_clear_of_a_guide():
    disc = ellipse((0, 0), 50)
    grasp = find_grasp(disc, CUP, guides=[(1.0, 0.0, 5.0)])
    assert grasp.pickable and grasp.center[0] <= 5 - 15
    assert find_grasp(disc, CUP, guides=[(1.0, 0.0, -40.0)]).reason == "blocked by guide"


# --- what holds for all of them -----------------------------------------------------------------


#: The same in every run, and nothing is written.
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def outlines(draw):
    """Stars around a point: up to twelve corners at growing angles and any distance."""
    count = draw(st.integers(3, 12))
    radii = draw(st.lists(st.floats(10, 100), min_size=count, max_size=count))
    jitter = draw(st.lists(st.floats(0, 0.8), min_size=count, max_size=count))
    turn = (np.arange(count) + np.array(jitter)) * (2 * math.pi / count)
    points = np.array(radii)[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return points + draw(st.tuples(st.floats(-500, 500), st.floats(-500, 500)))


@EXAMPLES
@given(outlines(), st.sampled_from([JAWS, THIN_JAWS, replace(JAWS, jaw_width=5.0)]))
def test_jaws_touch_the_outline_at_the_opening_they_need(outline, gripper):
    grasp = find_grasp(outline, gripper)
    first, second = contacts(grasp)
    assert distance(first, outline) < 1e-6 and distance(second, outline) < 1e-6
    assert np.hypot(*(second - first)) == pytest.approx(grasp.width)
    assert 0.0 <= grasp.quality <= 1.0 and -math.pi / 2 < grasp.angle <= math.pi / 2
    assert (grasp.quality > 0) == grasp.pickable
    if grasp.pickable:
        assert grasp.width + 2 * gripper.clearance <= gripper.max_opening


@EXAMPLES
@given(outlines(), st.floats(0, 60))
def test_the_circle_touches_but_does_not_leave_the_outline(outline, diameter):
    grasp = find_grasp(outline, replace(CUP, cup_diameter=diameter))
    assert is_inside(grasp.center, outline) or grasp.width == 0
    assert distance(np.array(grasp.center), outline) == pytest.approx(grasp.width / 2, abs=1e-6)
    assert grasp.pickable == (grasp.width >= diameter and grasp.width > 0)
    # No circle around any of many places is larger by much where the cup wants all the room.
    if not grasp.pickable:
        low, high = outline.min(axis=0), outline.max(axis=0)
        for x in np.linspace(low[0], high[0], 12):
            for y in np.linspace(low[1], high[1], 12):
                if is_inside((x, y), outline):
                    room = 2 * distance(np.array((x, y)), outline)
                    away = np.hypot(*(outline - outline.mean(axis=0)).T).max()
                    assert room <= grasp.width + 0.5 * away


@EXAMPLES
@given(
    outlines(),
    st.sampled_from([JAWS, CUP]),
    st.floats(0.01, 100),
    st.tuples(st.floats(-1000, 1000), st.floats(-1000, 1000)),
    st.floats(0, 360),
)
def test_the_grasp_goes_with_the_item(outline, gripper, scale, shift, degrees):
    """Another unit, place and direction change nothing but the side on which equals are taken."""
    angle = 0.3  # of no meaning, so long as it turns along
    plain = find_grasp(outline, gripper, angle=angle)
    moved = (turned(outline, degrees) + np.array(shift)) * scale
    grasp = find_grasp(moved, gripper.scaled(scale), angle=angle + math.radians(degrees))
    if gripper.kind == "jaws":
        assert grasp.pickable == plain.pickable
        assert grasp.quality == pytest.approx(plain.quality, abs=0.01)
    else:  # the search starts on a grid that does not turn
        assert grasp.width == pytest.approx(
            plain.width * scale, abs=(0.1 * plain.width + 1) * scale
        )


LOPSIDED = np.array(
    [(0, 0), (150, 10), (170, 45), (230, 50), (228, 78), (172, 75), (9, 101)], float
)


@pytest.mark.parametrize("gripper", (JAWS, replace(CUP, cup_diameter=20.0)))
@pytest.mark.parametrize("degrees", range(0, 360, 40))
def test_where_there_are_no_equals_the_very_grasp_goes_with_the_item(gripper, degrees):
    plain = find_grasp(LOPSIDED, gripper)
    assert plain.pickable
    moved = (turned(LOPSIDED, degrees) + np.array([300.0, -40.0])) * 0.7
    grasp = find_grasp(moved, gripper.scaled(0.7))
    exact = 0.01 if gripper is JAWS else 2.0
    place = (turned([plain.center], degrees)[0] + np.array([300.0, -40.0])) * 0.7
    assert grasp.center == pytest.approx(tuple(place), abs=exact)
    assert grasp.width == pytest.approx(plain.width * 0.7, abs=exact)
    assert grasp.quality == pytest.approx(plain.quality, abs=exact / 50)
    assert abs(normalize_angle(grasp.angle - plain.angle - math.radians(degrees))) < 1e-3


@EXAMPLES
@given(st.floats(10, 90), st.floats(0, 180), st.floats(0, 60), st.integers(0, 1))
def test_free_jaws_do_not_reach_into_a_neighbour(width, degrees, gap, side):
    """By brute force: no point of either open jaw is within the other item."""
    item = turned(box(-60, -width / 2, 120, width), degrees)
    other = turned(box(-30, width / 2 + gap, 90, 50), degrees + 180 * side)
    grasp = find_grasp(item, JAWS, neighbours=[other])
    assume(grasp.pickable)
    along = np.array([math.cos(grasp.angle), math.sin(grasp.angle)])
    beside = np.array([-along[1], along[0]])
    for sign, contact in zip((-1, 1), contacts(grasp), strict=True):
        for depth in np.linspace(4.0, 14.0, 5):
            for place in np.linspace(-10, 10, 5):
                point = contact + sign * depth * along + place * beside
                assert not is_inside(point, other) and distance(point, other) > 4.0 - 1e-6
                assert not is_inside(point, item)


def test_bad_input_is_refused_by_name():
    for bad in (
        {"kind": "tongs"},
        {"jaw_width": -1.0},
        {"min_opening": 5.0, "max_opening": 5.0},
        {"friction_angle": 0.0},
        {"cup_diameter": math.nan},
    ):
        with pytest.raises(ValueError, match="tongs" if "kind" in bad else list(bad)[-1]):
            Gripper(**bad)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        find_grasp([(0, 0), (1, 1)], JAWS)
    with pytest.raises(ValueError, match="finite"):
        find_grasp([(0, 0), (1, math.nan), (2, 2)], JAWS)
    with pytest.raises(ValueError, match="1 centers are given for 2"):
        find_grasps([L_SHAPE, L_SHAPE], JAWS, centers=[(0, 0)])


@pytest.mark.parametrize("gripper", (JAWS, CUP))
def test_an_outline_without_area_is_no_item(gripper):
    for line in ([(5, 5), (5, 5), (5, 5)], [(0, 0), (10, 0), (20, 0)]):
        grasp = find_grasp(line, gripper)
        assert not grasp.pickable and grasp.width == 0 and grasp.quality == 0
        assert np.isfinite(grasp.center).all()
    assert find_grasps([], gripper) == ()


# --- items of an image --------------------------------------------------------------------------


def items_of(labels, instances, gripper, scale=2):
    height, width = labels.shape
    size = (scale * width, scale * height)
    return describe_items(instances, labels, None, size, ItemParams(gripper=gripper))


def test_items_tell_what_is_in_the_way_of_their_jaws():
    labels = np.zeros((240, 320), np.uint8)
    instances = np.zeros((240, 320), np.uint16)
    for index, columns in enumerate((slice(100, 115), slice(115, 130), slice(200, 215))):
        labels[80:120, columns] = 1
        instances[80:120, columns] = index + 1
    # Two pixels of the camera are a millimetre, and four camera pixels one of the network.
    first, second, alone = items_of(labels, instances, replace(JAWS, max_opening=60.0), 2)
    assert first.reason == "blocked by neighbour at right" and not first.pickable
    assert second.reason == "blocked by neighbour at left" and second.touching
    assert alone.pickable and alone.grasp_kind == "jaws" and alone.grasp_quality > 0.5
    assert alone.grasp_width == pytest.approx(30) and first.grasp_quality == 0


def test_holes_of_an_item_are_kept_clear_of_by_the_cup():
    labels = np.zeros((240, 320), np.uint8)
    labels[60:160, 100:240] = 2
    labels[80:140, 120:170] = 0  # a hole, with another item in it
    labels[100:110, 140:150] = 3
    instances = (labels == 2).astype(np.uint16) + 2 * (labels == 3).astype(np.uint16)
    plate, within = items_of(labels, instances, CUP)
    assert plate.pickable and plate.grasp_kind == "suction"
    x, y = ((v + 0.5) / 2 - 0.5 for v in plate.grasp_center)
    rows, columns = np.mgrid[:240, :320]
    disc = np.hypot(columns - x, rows - y) < plate.grasp_width / 4 - 0.75
    assert (labels[disc] == 2).all() and disc.sum() > 600
    assert within.reason.startswith("smaller than the cup")


def test_an_item_of_doubtful_class_is_not_picked():
    labels = np.zeros((240, 320), np.uint8)
    labels[100:140, 100:150] = 2
    labels[100:140, 100:120] = 4
    instances = (labels > 0).astype(np.uint16)
    (item,) = describe_items(instances, labels, None, (320, 240), ItemParams(score_threshold=0.4))
    assert item.reason == "unsure of class: 0.60 of the votes, 0.40 for another"
    assert item.uncertain and not item.pickable
    agnostic = ItemParams(class_agnostic=True)
    assert describe_items(instances, labels, None, (320, 240), agnostic)[0].pickable


def test_what_is_not_reported_is_in_the_way_all_the_same():
    from waste_seg_ros.perception.items import extract_items
    from waste_seg_ros.runtime.backends import Prediction

    labels = np.zeros((240, 320), np.uint8)
    labels[80:120, 100:115] = 1
    labels[80:120, 115:130] = 2
    prediction = Prediction(labels, np.full(labels.shape, 0.9, np.float32))
    gripper = replace(JAWS, max_opening=60.0)
    params = ItemParams(gripper=gripper, classes=frozenset({2}))
    instances, (item,) = extract_items(prediction, (640, 480), params)
    assert item.id == 1 and (instances[labels == 2] == 1).all() and not instances[labels == 1].any()
    assert item.reason == "blocked by neighbour at left" and item.touching
