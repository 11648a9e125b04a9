"""From sightings in images to orders, without ROS."""

from __future__ import annotations

import math

import numpy as np
import pytest

from waste_seg_ros.perception.belt import BeltPlane, Camera, default_plane, to_pixels
from waste_seg_ros.perception.follow import Follower, Measuring, Sighting, View
from waste_seg_ros.perception.grasp import Gripper
from waste_seg_ros.perception.picks import Arm, SchedulerParams
from waste_seg_ros.perception.tracking import TRUNCATED, TrackerParams

CAMERA = Camera(
    np.array([[500.0, 0, 319.5], [0, 500.0, 239.5], [0, 0, 1]]), np.zeros(0), "none", (640, 480)
)
PLANE = default_plane(1.0)
SPEED = 0.5
HOOK = np.array([[0, 0], [3, 0], [3, 1], [1, 1], [1, 3], [0, 3.0]])
"""An L, whose middle lies near its inner corner."""


def box(length: float, width: float) -> np.ndarray:
    return np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [length / 2, width / 2]


def sighting(
    outline: np.ndarray, x: float, y: float, plane: BeltPlane = PLANE, kind: str = "paper"
) -> Sighting:
    pixels = to_pixels(CAMERA, plane, outline + np.array([x, y]))
    seen = np.clip(pixels, 0, [639, 479])
    return Sighting(seen, kind, 0.9, TRUNCATED if np.any(seen != pixels) else 0)


def follow(
    follower: Follower, outlines: dict[float, np.ndarray], until: float, y: float = 0.0
) -> list:
    """Show things that are at x at 0 s, ten times a second; returns the items with new orders."""
    given = []
    for number in range(round(10 * until)):
        now = number / 10
        seen = [
            sighting(outline, x + SPEED * now, y)
            for x, outline in outlines.items()
            if x + SPEED * now < 0.6
        ]
        alive = [arm.name for arm in follower.arms]
        view = View(100 + now, CAMERA, PLANE)
        given += follower.update(view, seen, 100 + now, alive=alive)[1]
    return given


def test_an_item_out_of_view_is_ordered_as_it_was_last_seen_whole() -> None:
    follower = Follower([Arm("far", 2.0)], names=["paper"])
    (item,) = follow(follower, {-0.5: box(0.08, 0.05)}, 4.9)
    assert item.order is not None and item.order.arm == "far" and item.sighting == -1
    assert item.order.pick_time_s == pytest.approx(105.0, abs=0.01)
    assert item.class_name == "paper" and item.reason == ""
    assert item.shape is not None
    np.testing.assert_allclose(np.ptp(item.shape.outline, axis=0), [0.08, 0.05], atol=1e-6)
    assert item.grasp is not None and item.grasp.width == pytest.approx(0.05, abs=1e-3)
    assert abs(item.grasp.angle) == pytest.approx(math.pi / 2, abs=0.02)
    assert math.hypot(*item.grasp.center) < 1e-3, "from the item's centre"


def test_each_arm_gets_what_its_gripper_holds() -> None:
    arms = [
        Arm("jaws", 0.9, opening=(0.0, 0.04), cycle_s=0.0),
        Arm("cup", 1.2, gripper="suction", cycle_s=0.0),
    ]
    follower = Follower(arms, Gripper(cup_diameter=0.03), names=["paper"])
    wide, narrow, tiny = box(0.1, 0.08), box(0.1, 0.03), box(0.06, 0.01)
    given = follow(follower, {-0.3: wide, -0.5: narrow, -0.1: tiny}, 4.0)
    arms_of = {round(item.track.width, 2): item.order.arm for item in given}
    assert arms_of == {0.08: "cup", 0.03: "jaws", 0.01: "jaws"}
    assert {item.grasp.kind for item in given if item.order.arm == "cup"} == {"suction"}


def test_what_no_arm_can_hold_has_a_reason_and_no_order() -> None:
    follower = Follower([Arm("only", 0.9, opening=(0.0, 0.04))], names=["paper"])
    assert follow(follower, {-0.3: box(0.1, 0.08)}, 1.0) == []
    items, _ = follower.update(View(101.0, CAMERA, PLANE), [], 101.0, alive=["only"])
    assert items[0].reason == "too wide: 80 mm above 40 mm"
    assert items[0].shape is not None
    part = Follower(names=["paper"])
    for number in range(5):
        view = View(number / 10, CAMERA, PLANE)
        items, _ = part.update(view, [sighting(box(0.2, 0.2), -0.66, 0.0)], number / 10)
    assert items[0].reason == "not yet seen whole" and items[0].grasp is None


def test_two_seen_as_one_do_not_change_the_shape() -> None:
    follower = Follower(names=["paper"])
    small, merged = box(0.06, 0.05), box(0.14, 0.06)
    for number in range(8):
        now = number / 10
        outline = merged if number == 7 else small
        view = View(now, CAMERA, PLANE)
        (item,) = follower.update(view, [sighting(outline, SPEED * now, 0.0)], now)[0] or (None,)
    assert item is not None and item.sighting == 0 and item.shape is not None
    assert np.ptp(item.shape.outline[:, 0]) == pytest.approx(0.06, abs=1e-6)


def test_a_second_camera_goes_on_with_the_same_number() -> None:
    """Two cameras a metre apart, both told in one belt frame."""
    ahead = BeltPlane(PLANE.rotation, PLANE.translation - np.array([1.0, 0.0, 0.0]))
    follower = Follower(tracking=TrackerParams(speed=SPEED), names=["paper"])
    numbers = set()
    seen_by = set()
    for number in range(45):
        now, x = number / 10, -0.6 + SPEED * number / 10
        for name, plane, middle in (("first", PLANE, 0.0), ("second", ahead, 1.0)):
            inside = abs(x - middle) < 0.55
            seen = [sighting(HOOK * 0.03, x, -0.1, plane)] if inside else []
            items, _ = follower.update(View(now, CAMERA, plane, name), seen, now)
            numbers |= {item.track.id for item in items}
            if inside and items:
                seen_by.add(name)
                assert items[0].track.position[0] - x == pytest.approx(0.03 * 1.1, abs=0.005)
    assert seen_by == {"first", "second"}
    assert numbers == {1}


def test_what_sees_no_belt_is_left_out_and_counted() -> None:
    follower = Follower(names=["paper"])
    nothing = Sighting(np.zeros((2, 2)), "paper", 0.9)
    items, given = follower.update(View(1.0, CAMERA, PLANE), [nothing], 1.0)
    assert items == given == () and follower.lost == 1


def test_a_repeated_image_changes_nothing() -> None:
    follower = Follower(names=["paper"])
    for number in range(5):
        view = View(number / 10, CAMERA, PLANE)
        items, _ = follower.update(view, [sighting(box(0.06, 0.05), 0.0, 0.0)], number / 10)
    shape = items[0].shape
    other = [sighting(box(0.2, 0.1), 0.3, 0.2), sighting(box(0.06, 0.06), 0.0, 0.0)]
    again, _ = follower.update(view, other, 0.45)
    assert follower.tracker.ignored == 1
    assert [item.track.id for item in again] == [items[0].track.id]
    assert again[0].shape is shape


def test_new_classes_are_added_and_parameters_may_change() -> None:
    follower = Follower(
        [Arm("only", 0.9, classes=("glass",))],
        picking=SchedulerParams(min_score=0.5),
        measuring=Measuring(pixel_sigma=0.5),
        names=["paper"],
    )
    assert follower.class_index("glass") == 2 and follower.class_index("item") == 0
    assert follower.class_index("cork") == 3 and follower.class_name(3) == "cork"
    follower.gripper = Gripper(jaw_width=0.02)
    assert follower.gripper.jaw_width == 0.02
    with pytest.raises(ValueError, match="jaw_width is -1"):
        Gripper(jaw_width=-1)
    with pytest.raises(ValueError, match="two arms are called 'a'"):
        Follower([Arm("a", 0.0), Arm("a", 1.0)])
