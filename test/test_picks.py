"""Picks: who gets which item, and that no two arms ever do."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from waste_seg_ros.perception.picks import (
    Arm,
    ArmsError,
    Scheduler,
    SchedulerParams,
    read_arms,
)
from waste_seg_ros.perception.tracking import Track

NAMES = ("paper", "bottle", "aluminum", "nylon")
STEP = 0.1


def item(number, x, y=0.0, *, now=0.0, speed=0.5, kind=1, width=0.05, sigma=1e-3, **other):
    values = {
        "id": number,
        "stamp_s": now,
        "position": np.array([x, y]),
        "velocity": np.array([speed, 0.0]),
        "covariance": np.eye(2) * 1e-6,
        "speed_sigma": sigma * abs(speed),
        "yaw": 0.0,
        "length": 0.1,
        "width": width,
        "class_index": kind,
        "score": 0.9,
        "age": 1.0,
        "hits": 10,
        "last_seen_s": now,
        "hidden_s": 0.0,
        "whole": True,
        "source": -1,
        "flags": 0,
    }
    return Track(**{**values, **other})


class Line:
    """Items that ride along a belt to the scheduler's arms."""

    def __init__(self, arms, places, params=None, speed=0.5):
        self.arms = {arm.name: arm for arm in arms}
        self.scheduler = Scheduler(arms, params, NAMES)
        self.items = dict(enumerate(places, 1))  # number -> [x, y, kind, width]
        self.speed, self.now, self.orders, self.lives = speed, 0.0, [], []

    def step(self, alive=None, **options):
        alive = set(self.arms) if alive is None else set(alive)
        tracks = [
            item(number, x, y, now=self.now, speed=self.speed, kind=kind, width=width)
            for number, (x, y, kind, width) in self.items.items()
        ]
        new = self.scheduler.update(self.now, tracks, alive, **options)
        self.orders += new
        self.lives.append((self.now, alive))
        for place in self.items.values():
            place[0] += self.speed * STEP
        self.now = round(self.now + STEP, 6)
        return new

    def run(self, seconds, alive=None, **options):
        return [
            order for _ in range(round(seconds / STEP)) for order in self.step(alive, **options)
        ]

    def of(self, number):
        return [order for order in self.orders if order.track_id == number]


def at(*xs, y=0.0, kind=1, width=0.05):
    return [[x, y, kind, width] for x in xs]


# --- who gets what --------------------------------------------------------------------------------


def test_each_item_is_announced_once_and_early_enough():
    line = Line([Arm("one", 1.0, cycle_s=0.0)], at(0.0, -0.3, -0.5, -0.52))
    line.run(6.0)
    assert sorted(order.track_id for order in line.orders) == [1, 2, 3, 4]
    for order in line.orders:
        x = dict(enumerate((0.0, -0.3, -0.5, -0.52), 1))[order.track_id]
        assert order.pick_time_s == pytest.approx((1.0 - x) / 0.5)
        assert 0.4 <= order.pick_time_s - order.announced_s <= 2.0
        assert order.expiry_s == pytest.approx(order.pick_time_s + 0.2)
    assert line.scheduler.late == 0 and line.scheduler.given == 4


def test_lane_class_and_gripper_are_kept_to():
    arms = [
        Arm("left", 1.0, (0.0, 0.5), ("bottle",), 0.0),
        Arm("right", 1.2, (-0.5, 0.0), (), 0.0, "suction", (0.04, 0.2)),
    ]
    places = [
        [0.0, 0.2, 2, 0.05],  # a bottle on the left
        [0.0, 0.2, 1, 0.05],  # paper on the left: nobody
        [0.0, -0.2, 2, 0.05],  # a bottle on the right
        [0.0, -0.2, 1, 0.02],  # too narrow for the cup
    ]
    line = Line(arms, places)
    line.run(4.0)
    assert {order.track_id: order.arm for order in line.orders} == {1: "left", 3: "right"}


def test_width_of_a_grasp_counts_before_that_of_the_item():
    line = Line([Arm("one", 1.0, opening=(0.0, 0.06))], at(0.0, width=0.2))
    line.run(1.0)
    assert not line.orders
    line.run(1.0, widths={1: 0.05})
    assert [order.track_id for order in line.orders] == [1]


def test_busy_arm_leaves_items_to_the_next():
    arms = [Arm("one", 1.0, cycle_s=1.0), Arm("two", 1.5, cycle_s=1.0)]
    line = Line(arms, at(0.0, -0.1, -0.2))  # 0.2 s apart
    line.run(5.0)
    assert {order.track_id: order.arm for order in line.orders} == {1: "one", 2: "two"}
    assert line.scheduler.late == 1


def test_slow_arm_is_busy_for_longer_than_its_orders_stand():
    line = Line([Arm("one", 1.0, cycle_s=2.5)], at(0.0, -0.75, -1.5))  # 1.5 s apart
    line.run(8.0)
    assert [order.track_id for order in line.orders] == [1, 3]


def test_arm_is_kept_free_for_what_no_other_takes():
    arms = [Arm("all", 1.0, cycle_s=1.0), Arm("paper", 1.1, classes=("paper",), cycle_s=1.0)]
    line = Line(arms, [[0.0, 0, 1, 0.05], [-0.1, 0, 2, 0.05]])
    line.run(4.0)
    assert {order.track_id: order.arm for order in line.orders} == {1: "paper", 2: "all"}


def test_what_is_not_known_well_waits_or_is_left():
    arm = Arm("one", 1.0)
    scheduler = Scheduler([arm], class_names=NAMES)
    doubtful = {"score": 0.3}, {"whole": False}, {"hidden_s": 0.5}, {"sigma": 0.1}
    for number, other in enumerate(doubtful, 1):
        assert not scheduler.update(0.0, [item(number, 0.5, **other)], ["one"])
    assert not scheduler.update(0.0, [item(9, 0.5)], ["one"], blocked=[9])
    assert scheduler.update(0.0, [item(9, 0.5)], ["one"])
    # 2 % of speed is 20 ms at a second: it waits to be known better, till the lead is nearly over.
    assert not scheduler.update(10.0, [item(10, 0.5, now=10.0, sigma=0.02)], ["one"])
    assert scheduler.update(10.55, [item(10, 0.775, now=10.55, sigma=0.02)], ["one"])


def test_belt_that_stands_gets_no_announcements():
    scheduler = Scheduler([Arm("one", 1.0)], class_names=NAMES)
    for speed in (0.0, -0.3):
        assert not scheduler.update(0.0, [item(1, 0.8, speed=speed)], ["one"])


def test_item_is_announced_again_only_if_the_belt_stood():
    line = Line([Arm("one", 1.0), Arm("two", 3.0)], at(0.2))
    (first,) = line.run(0.5)
    line.speed = 0.0
    line.run(3.0)
    assert len(line.orders) == 1
    line.speed = 0.5
    line.run(8.0)
    again = line.orders[1:]
    assert [order.arm for order in again] == ["one"]
    assert again[0].announced_s > first.expiry_s


# --- arms that die --------------------------------------------------------------------------------


def test_dead_arm_gets_nothing_and_others_take_over():
    arms = [Arm("one", 1.0, cycle_s=0.0), Arm("two", 2.0, cycle_s=0.0)]
    line = Line(arms, at(0.5, -0.5, -1.5))
    (first,) = line.run(0.3)
    assert first.arm == "one"
    # It dies with an order: the item is the other's when that order has expired.
    line.run(8.0, alive=["two"])
    assert [order.arm for order in line.of(1)] == ["one", "two"]
    assert line.of(1)[1].announced_s > first.expiry_s
    assert [order.arm for order in line.of(2) + line.of(3)] == ["two", "two"]


def test_silence_is_noticed_late_and_counts_from_its_beginning():
    line = Line([Arm("one", 1.0), Arm("two", 2.5)], at(0.5))
    (first,) = line.run(0.3)
    line.run(1.3)  # beyond the expiry, and nobody knows yet
    assert line.now > first.expiry_s
    line.run(4.0, alive=["two"])
    assert [order.arm for order in line.orders] == ["one", "two"]


def test_arm_that_lives_again_gets_new_items_but_not_those_of_others():
    arms = [Arm("one", 1.0, cycle_s=0.0), Arm("two", 1.4, cycle_s=0.0)]
    line = Line(arms, at(0.2, -0.5, -1.5))
    line.run(0.5, alive=["two"])
    assert [order.arm for order in line.of(1)] == ["two"]
    line.run(7.0)
    assert len(line.of(1)) == 1
    assert [order.arm for order in line.of(2) + line.of(3)] == ["one", "one"]


def test_last_arm_dead_means_late_not_wrong():
    line = Line([Arm("one", 1.0)], at(0.0))
    line.run(4.0, alive=[])
    assert not line.orders and line.scheduler.late == 1


def test_order_that_stands_can_be_asked_for():
    line = Line([Arm("one", 1.0)], at(0.5))
    line.run(0.3)
    assert line.scheduler.order_of(1).arm == "one" and line.scheduler.order_of(2) is None
    line.run(3.0)
    assert line.scheduler.order_of(1) is None


def test_time_that_begins_anew_forgets_orders():
    scheduler = Scheduler([Arm("one", 1.0, cycle_s=5.0)], class_names=NAMES)
    assert scheduler.update(100.0, [item(1, 0.5, now=100.0)], ["one"])
    assert not scheduler.update(99.5, [item(2, 0.5, now=99.5)], ["one"])  # the arm is busy
    assert scheduler.update(3.0, [item(2, 0.5, now=3.0)], ["one"])
    with pytest.raises(ValueError, match="now is nan"):
        scheduler.update(math.nan, [], [])


@st.composite
def stories(draw):
    """Arms, items, and for each second of a minute: the belt's speed and who lives."""
    count = draw(st.integers(1, 4))
    arms = []
    for number in range(count):
        low = draw(st.sampled_from([-0.5, -0.2, 0.0]))
        arms.append(
            Arm(
                f"arm{number}",
                draw(st.floats(0.8, 4.0)),
                (low, draw(st.sampled_from([0.1, 0.5]))),
                tuple(draw(st.sets(st.sampled_from(NAMES), max_size=3))),
                draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
                opening=(0.0, draw(st.sampled_from([0.08, 1.0]))),
            )
        )
    places = draw(
        st.lists(
            st.tuples(
                st.floats(-6.0, 0.5),
                st.floats(-0.5, 0.5),
                st.integers(0, 4),
                st.sampled_from([0.05, 0.1]),
            ),
            max_size=12,
        )
    )
    seconds = draw(
        st.lists(
            st.tuples(
                st.sampled_from([0.5, 0.5, 0.5, 0.4, 1.0, 0.0, -0.2]),
                st.sets(st.integers(0, count - 1)),
            ),
            min_size=5,
            max_size=25,
        )
    )
    return arms, [list(place) for place in places], seconds


@settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(stories())
def test_no_two_arms_ever_hold_an_item(story):
    arms, places, seconds = story
    line = Line(arms, places)
    params = line.scheduler.params
    for speed, dead in seconds:
        line.speed = speed
        alive = [arm.name for number, arm in enumerate(arms) if number not in dead]
        for _ in range(10):
            here = {number: list(place) for number, place in line.items.items()}
            new = line.step(alive)
            assert list(new) == sorted(new, key=lambda order: (order.pick_time_s, order.track_id))
            for order in new:
                arm = line.arms[order.arm]
                x, y, kind, width = here[order.track_id]
                assert order.arm in alive
                assert arm.lane[0] <= y <= arm.lane[1] and width <= arm.opening[1]
                assert not arm.classes or (kind and NAMES[kind - 1] in arm.classes)
                left = order.pick_time_s - order.announced_s
                assert params.lead_s <= left <= params.horizon_s
                assert x < arm.x_m
    steady = len({speed for speed, _ in seconds}) == 1
    for number in line.items:
        orders = line.of(number)
        for first, second in pairwise(orders):
            # Never do two stand at a time ...
            assert first.expiry_s < second.announced_s
            # ... and there is a reason for the second.
            until = first.expiry_s + params.silence_s
            died = any(
                first.announced_s <= t <= until and first.arm not in alive
                for t, alive in line.lives
            )
            assert died or not steady
            if steady:
                assert line.arms[first.arm].x_m < line.arms[second.arm].x_m
    for name, arm in line.arms.items():
        times = sorted(order.pick_time_s for order in line.orders if order.arm == name)
        assert all(b - a >= arm.cycle_s - 1e-9 for a, b in pairwise(times))


@settings(max_examples=50, deadline=None, database=None)
@given(
    st.lists(st.floats(-5.0, 0.0), min_size=1, max_size=15),
    st.lists(st.floats(0.6, 3.0), min_size=1, max_size=3, unique=True),
)
def test_arms_without_limits_get_everything_once(xs, lines):
    arms = [Arm(f"arm{number}", x, cycle_s=0.0) for number, x in enumerate(lines)]
    line = Line(arms, at(*xs))
    line.run((max(lines) + 5.0) / 0.5 + 1.0)
    assert sorted(order.track_id for order in line.orders) == list(range(1, len(xs) + 1))
    assert line.scheduler.late == 0


# --- the file -------------------------------------------------------------------------------------


def test_the_shipped_arms_can_be_read():
    shipped = Path(__file__).parents[1] / "config" / "arms.yaml"
    arms = read_arms(shipped)
    assert [arm.name for arm in arms] == ["arm_1", "arm_2"]
    assert arms[0].classes == ("bottle", "aluminum") and arms[1].gripper == "suction"
    Scheduler(arms, class_names=NAMES)


GOOD = "{name: a, x: 1.0, lane: [-1, 1]}"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("arms: [", "is no YAML"),
        ("- 1", "needs a list 'arms:'"),
        ("arms: 3", "needs a list 'arms:'"),
        (f"arms: [{GOOD}]\nspeed: 1", "key 'speed' is not known"),
        (f"arms: [{GOOD}, {GOOD}]", r"arms\[1\]: there is another arm called 'a'"),
        ("arms: [3]", r"arms\[0\]: must have the keys"),
        ("arms: [{name: a, x: 1.0}]", "key 'lane' is missing"),
        ("arms: [{name: a, x: 1.0, lane: [-1, 1], reach: 3}]", "key 'reach' is not known"),
        ("arms: [{name: 3, x: 1.0, lane: [-1, 1]}]", "name is 3; it must be a text"),
        ("arms: [{name: a, x: true, lane: [-1, 1]}]", "x is True"),
        ("arms: [{name: a, x: .nan, lane: [-1, 1]}]", "x is nan"),
        ("arms: [{name: a, x: 1.0, lane: [1, -1]}]", "lane is .*rising"),
        ("arms: [{name: a, x: 1.0, lane: [1]}]", "lane is .*list of two"),
        ("arms: [{name: a, x: 1, lane: [-1, 1], classes: paper}]", "classes is 'paper'"),
        ("arms: [{name: a, x: 1, lane: [-1, 1], cycle: -1}]", "cycle is -1"),
        ("arms: [{name: a, x: 1, lane: [-1, 1], gripper: magnet}]", "gripper is 'magnet'"),
        ("arms: [{name: a, x: 1, lane: [-1, 1], opening: [1, 0]}]", "opening is"),
    ],
)
def test_wrong_files_are_refused_by_name_and_key(tmp_path, text, what):
    path = tmp_path / "arms.yaml"
    path.write_text(text)
    with pytest.raises(ArmsError, match=f"arms.yaml: .*{what}"):
        read_arms(path)


def test_missing_file_wrong_class_and_wrong_params_are_refused(tmp_path):
    with pytest.raises(ArmsError, match="cannot be read"):
        read_arms(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="takes class 'glass', which the model lacks"):
        Scheduler([Arm("a", 1.0, classes=("glass",))], class_names=NAMES)
    with pytest.raises(ValueError, match="two arms are called 'a'"):
        Scheduler([Arm("a", 1.0), Arm("a", 2.0)])
    with pytest.raises(ValueError, match="horizon_s is 0.1"):
        SchedulerParams(horizon_s=0.1)
    with pytest.raises(ValueError, match="expiry_s is -1"):
        SchedulerParams(expiry_s=-1)
