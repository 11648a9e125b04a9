"""Tracks along a belt, against a belt whose truth is known."""

import math

import numpy as np
import pytest

from waste_seg_ros import cli, track
from waste_seg_ros.data.synthetic import SyntheticLine
from waste_seg_ros.perception.picks import Arm
from waste_seg_ros.perception.tracking import (
    TRUNCATED,
    Detection,
    SpeedEstimator,
    Tracker,
    TrackerParams,
    crossing,
)

VIEW = (0.0, 1.0, -0.4, 0.4)
RATE = 30.0


class Belt:
    """Items of 8 x 4 cm, some 15 cm apart, on a belt that goes as `travel(t)` says."""

    def __init__(self, travel, seed=0, start=-6.0, end=0.9, sigma=0.001):
        rng = np.random.default_rng(seed)
        x = np.arange(start, end, 0.15)
        self.place = np.stack([x, rng.uniform(-0.3, 0.3, len(x))], axis=1)
        self.place[:, 0] += rng.uniform(-0.03, 0.03, len(x))
        self.kind = rng.integers(1, 5, len(x))
        self.travel, self.sigma, self.rng = travel, sigma, rng

    def at(self, t):
        return self.place + np.array([self.travel(t), 0.0])

    def seen(self, t, view=VIEW, hidden=()):
        """Detections of the items in view, those at its ends cut; `source` is the item."""
        found = []
        for number, (x, y) in enumerate(self.at(t)):
            low, high = max(x - 0.04, view[0]), min(x + 0.04, view[1])
            if number in hidden or high - low < 0.01:
                continue
            cut = high - low < 0.0799
            noise = self.rng.normal(0, self.sigma, 2)
            found.append(
                self.item((low + high) / 2 + noise[0], y + noise[1], high - low, number, cut)
            )
        return found

    def item(self, x, y, length, number, cut=False, width=0.04, score=0.9, kind=None):
        long = length >= width
        return Detection(
            position=np.array([x, y]),
            covariance=np.eye(2) * self.sigma**2,
            yaw=0.0 if long else math.pi / 2,
            length=max(length, width),
            width=min(length, width),
            class_index=int(self.kind[number]) if kind is None else kind,
            score=score,
            flags=TRUNCATED * cut,
            source=number,
        )


class Log:
    """Runs a tracker and keeps which numbers each item had, and how far off its place was."""

    def __init__(self, belt, params=None):
        self.belt, self.tracker = belt, Tracker(params)
        self.numbers, self.gaps, self.tracks = {}, [], ()

    def step(self, t, stamp=None, detections=None, **options):
        stamp = t if stamp is None else stamp
        detections = self.belt.seen(t) if detections is None else detections
        options.setdefault("view", VIEW)
        self.tracks = self.tracker.update(stamp, detections, **options)
        truth = self.belt.at(stamp)
        cut = {d.source for d in detections if d.flags & TRUNCATED}
        for one in self.tracks:
            if one.source >= 0:
                self.numbers.setdefault(one.source, set()).add(one.id)
            if one.source >= 0 and one.source not in cut:
                self.gaps.append(float(np.hypot(*(one.position - truth[one.source]))))
        return self.tracks

    def near(self, x):
        """The track whose place along the belt is the nearest."""
        return min(self.tracks, key=lambda one: abs(one.position[0] - x))

    @property
    def switches(self):
        return sum(len(numbers) - 1 for numbers in self.numbers.values())


def steady(speed):
    return lambda t: speed * t


def times(seconds, start=0.0, rate=RATE):
    return start + np.arange(round(seconds * rate)) / rate


# --- speed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("true", "told", "sigma"), [(1.0, 0.5, 0.3), (0.25, 0.0, 1.0), (2, 0, 1)])
def test_wrong_speed_is_found_out_and_tracks_do_not_drift(true, told, sigma):
    log = Log(Belt(steady(true)), TrackerParams(speed=told, speed_sigma=sigma))
    for t in times(2.5):
        log.step(t)
    assert log.tracker.belt.speed == pytest.approx(true, rel=0.005)
    assert abs(log.tracker.belt.speed - true) < 4 * log.tracker.belt.sigma
    assert log.switches == 0 and len(log.numbers) > 4
    assert np.percentile(log.gaps, 95) < 0.003


def test_encoder_overrides_the_estimate_and_its_scale_is_measured():
    # It says 4 % too much, and alone tells of a sudden stop.
    def travel(t):
        return 0.8 * min(t, 2.0)

    log = Log(Belt(travel))
    for t in times(2.0):
        log.step(t, speed=0.832, speed_sigma=0.03)
    scale, sigma = log.tracker.belt.encoder_scale
    assert scale == pytest.approx(1 / 1.04, abs=0.005) and sigma < 0.01
    assert log.tracker.belt.speed == pytest.approx(0.8, rel=0.005)
    log.step(2.0 + 1 / RATE, speed=0.0, speed_sigma=0.03)
    assert log.tracker.belt.speed == 0.0
    # It falls silent: the estimate goes on.
    log.step(2.0 + 2 / RATE)
    assert log.tracker.belt.encoder_scale is None and abs(log.tracker.belt.speed) < 0.02
    assert log.switches == 0


def test_jitter_of_stamps_is_found_out_and_evened_out():
    rng = np.random.default_rng(5)
    log = Log(Belt(steady(1.0)))
    errors = []
    for t in times(4.0):
        tracks = log.step(t, stamp=t + rng.normal(0, 0.01))
        if t > 2:
            for one in tracks:
                time_s, sigma = crossing(one, 1.5)
                if one.source >= 0 and one.whole:
                    true = 1.5 - log.belt.place[one.source, 0]
                    errors.append((time_s - true, sigma))
    errors = np.array(errors)
    assert 0.006 < log.tracker.belt.stamp_sigma_s < 0.016
    assert log.switches == 0
    assert np.percentile(log.gaps, 95) < 0.01
    assert np.percentile(abs(errors[:, 0]), 95) < 0.015
    # Not only good, but known to be.
    assert 0.3 < np.sqrt(np.mean((errors[:, 0] / errors[:, 1]) ** 2)) < 2.0


@pytest.mark.parametrize("encoder", [False, True])
def test_belt_that_stops_and_starts_again_keeps_its_items(encoder):
    # 0.6 m/s, stopped within 0.3 s at 2 s, started at 4 s.
    def speed(t):
        return 0.6 * float(np.clip(min(1 - (t - 2) / 0.3, 1), 0, 1) + np.clip((t - 4) / 0.3, 0, 1))

    fine = np.arange(0, 7, 1e-3)
    run = np.concatenate([[0], np.cumsum([speed(t) * 1e-3 for t in fine])])
    log = Log(Belt(lambda t: float(np.interp(t, np.append(fine, 7), run))))
    for t in times(6.0):
        told = {"speed": speed(t), "speed_sigma": 0.01} if encoder else {}
        tracks = log.step(t, **told)
        if 3.5 < t < 3.9:
            assert abs(log.tracker.belt.speed) < 0.005
            assert all(crossing(one, 5.0) == (math.inf, math.inf) for one in tracks)
    assert log.switches == 0
    assert np.percentile(log.gaps, 95) < 0.005
    assert log.tracker.belt.speed == pytest.approx(0.6, rel=0.02)


def test_belt_that_runs_backwards_is_followed_but_nothing_is_foretold():
    log = Log(Belt(lambda t: 0.5 * t if t < 1.5 else 0.75 - 0.2 * (t - 1.5)))
    for t in times(3.0):
        tracks = log.step(t)
    assert log.tracker.belt.speed == pytest.approx(-0.2, abs=0.01)
    assert crossing(tracks[0], 5.0) == (math.inf, math.inf)
    assert log.switches == 0


def test_speed_estimator_alone_knows_how_well_it_knows():
    rng = np.random.default_rng(1)
    scores = []
    for _ in range(60):
        belt = SpeedEstimator(TrackerParams(speed=0.5, speed_sigma=0.5))
        for number in range(40):
            t = number / RATE
            belt.advance(t)
            if number == 0:
                belt.anchor()
            belt.correct(t, 0.7 * (t + rng.normal(0, 0.01)), 1e-6)
        scores.append((belt.speed - 0.7) / belt.sigma)
    assert 0.4 < np.std(scores) < 1.6 and abs(np.mean(scores)) < 0.5


# --- what is not seen well ------------------------------------------------------------------------


def test_item_that_is_hidden_for_a_while_keeps_its_number():
    log = Log(Belt(steady(0.5)))
    for t in times(1.0):
        log.step(t)
    target = log.near(0.28)
    item = target.source
    for t in times(0.7, 1.0):
        tracks = log.step(t, detections=log.belt.seen(t, hidden=[item]))
        (hidden,) = [o for o in tracks if o.id == target.id]
        assert hidden.source == -1
        assert np.hypot(*(hidden.position - log.belt.at(t)[item])) < 0.004
    assert hidden.hidden_s == pytest.approx(0.7, abs=0.05)
    tracks = log.step(1.7)
    assert [o.id for o in tracks if o.source == item] == [target.id]
    assert log.switches == 0


def test_item_that_is_taken_away_is_forgotten_and_what_left_the_view_is_not():
    log = Log(Belt(steady(0.5)), TrackerParams(forget_x=1.6))
    for t in times(1.0):
        log.step(t)
    target = log.near(0.25)
    leaving = log.near(0.93)
    for t in times(1.15, 1.0):
        log.step(t, detections=log.belt.seen(t, hidden=[target.source]))
    assert target.id not in {o.id for o in log.tracks}
    (left,) = [o for o in log.tracks if o.id == leaving.id]
    assert left.position[0] > 1.3 and left.source == -1 and left.hidden_s == 0
    for t in times(0.5, 2.15):
        log.step(t)
    assert leaving.id not in {o.id for o in log.tracks}
    assert all(o.position[0] <= 1.6 for o in log.tracks)


def test_cut_items_do_not_pull_their_tracks():
    log = Log(Belt(steady(0.3)), TrackerParams(min_hits=2))
    after = []
    for t in times(4.0):
        for one in log.step(t):
            if one.whole:
                truth = log.belt.at(t)[one.source] if one.source >= 0 else None
                if truth is not None and not VIEW[0] + 0.04 < truth[0] < VIEW[1] - 0.04:
                    after.append(one.position[0] - truth[0])
    assert len(after) > 50  # leaving the view
    assert max(map(abs, after)) < 0.004
    assert log.switches == 0


@pytest.mark.parametrize("frames", [1, 5])
def test_two_items_seen_as_one_stay_two(frames):
    log = Log(Belt(steady(0.5)))
    for t in times(1.0):
        log.step(t)
    known = {o.source: o.id for o in log.tracks}
    first = log.near(0.3)
    second = log.near(first.position[0] + 0.15)
    assert first.id != second.id
    pair = [first.source, second.source]
    count = log.tracker._next
    for t in times(frames / RATE, 1.0):
        seen = log.belt.seen(t, hidden=pair)
        middle = log.belt.at(t)[pair].mean(axis=0)
        gap = log.belt.at(t)[pair[1]] - log.belt.at(t)[pair[0]]
        merged = Detection(
            position=middle,
            covariance=np.eye(2) * 1e-6,
            yaw=math.atan2(gap[1], gap[0]),
            length=float(np.hypot(*gap)) + 0.08,
            width=0.08,
            class_index=1,
            source=-5,
        )
        tracks = log.tracker.update(t, [*seen, merged], view=VIEW)
        assert {first.id, second.id} <= {o.id for o in tracks}
    for t in times(0.3, 1.0 + frames / RATE):
        log.step(t)
    assert {o.source: o.id for o in log.tracks if o.source in pair} == {
        number: known[number] for number in pair
    }
    # No other number was given in between than to items that came into view.
    assert log.tracker._next - count <= 2 and log.switches == 0


def test_item_seen_as_two_for_a_moment_stays_one():
    log = Log(Belt(steady(0.5)))
    for t in times(1.0):
        log.step(t)
    target = log.near(0.28)
    for t in times(0.15, 1.0):
        x, y = log.belt.at(t)[target.source]
        halves = [log.belt.item(x + d, y, 0.035, target.source) for d in (-0.02, 0.02)]
        log.tracker.update(t, [*log.belt.seen(t, hidden=[target.source]), *halves], view=VIEW)
    for t in times(0.5, 1.15):
        log.step(t)
    near = [o for o in log.tracks if abs(o.position - target.position)[1] < 0.01]
    here = log.belt.at(t)[target.source]
    assert [o.id for o in near if np.hypot(*(o.position - here)) < 0.05] == [target.id]


def test_item_that_looks_now_so_now_so_is_one():
    # From its first sight on its middle is now here, now 1 cm further on: too far for one track.
    log = Log(Belt(steady(0.3)))
    numbers = set()
    for number, t in enumerate(times(2.0)):
        one = log.belt.item(0.2 + 0.3 * t + 0.01 * (number % 2), 0.35, 0.14, 0, width=0.08)
        other = log.belt.seen(t, hidden=np.flatnonzero(log.belt.place[:, 1] > 0.2))
        tracks = log.tracker.update(t, [one, *other], view=VIEW)
        if number > 20:
            here = [o for o in tracks if o.position[1] > 0.3]
            assert len(here) == 1 and abs(here[0].position[0] - 0.3 * t - 0.205) < 0.02
            numbers.add(here[0].id)
    assert len(numbers) == 1


def test_pair_that_parts_for_good_becomes_two():
    log = Log(Belt(steady(0.2)))
    y = 0.35
    for t in times(0.5):  # one of 16 cm
        whole = log.belt.item(0.2 + 0.2 * t, y, 0.16, 0, width=0.05)
        tracks = log.tracker.update(t, [whole], view=VIEW)
    assert len(tracks) == 1
    for t in times(1.0, 0.5):
        parts = [log.belt.item(0.2 + 0.2 * t + d, y, 0.07, 0, width=0.05) for d in (-0.04, 0.04)]
        tracks = log.tracker.update(t, parts, view=VIEW)
    assert len([o for o in tracks if o.source >= 0]) == 2
    found = sorted(o.position[0] - 0.2 - 0.2 * t for o in tracks if o.source >= 0)
    assert found == pytest.approx([-0.04, 0.04], abs=0.004)


def test_item_found_twice_is_one():
    log = Log(Belt(steady(0.5)))
    for t in times(1.5):
        seen = log.belt.seen(t)
        again = [
            Detection(d.position + 0.003, d.covariance, d.yaw, d.length, d.width, 4, 0.3)
            for d in seen
            if not d.flags
        ]
        tracks = log.step(t, detections=[*again, *seen])
    assert len(tracks) == len(log.numbers)
    assert all(o.class_index == log.belt.kind[o.source] for o in tracks if o.source >= 0)


def test_class_is_what_most_say_weighed_by_score():
    log = Log(Belt(steady(0.3)))
    rng = np.random.default_rng(0)
    for t in times(1.5):
        seen = [
            Detection(
                d.position,
                d.covariance,
                d.yaw,
                d.length,
                d.width,
                *((9, 0.4) if rng.random() < 0.55 else (d.class_index, 0.9)),
                flags=d.flags,
                source=d.source,
            )
            for d in log.belt.seen(t)
        ]
        log.step(t, detections=seen)
    for one in log.tracks:
        if one.source >= 0 and one.hits > 20:
            assert one.class_index == log.belt.kind[one.source]
            assert 0.2 < one.score < 0.7  # the doubt shows


def test_yaw_is_smoothed_as_an_axis():
    tracker = Tracker()
    rng = np.random.default_rng(2)
    for t in times(1.0):
        yaw = math.pi / 2 + rng.normal(0, 0.1)
        d = Detection(np.array([0.2 * t, 0]), np.eye(2) * 1e-6, yaw, 0.1, 0.03)
        (*_, one) = (None, *tracker.update(t, [d]))
    assert abs(abs(one.yaw) - math.pi / 2) < 0.08
    assert -math.pi / 2 < one.yaw <= math.pi / 2


# --- time -----------------------------------------------------------------------------------------


def test_repeated_stamp_changes_nothing():
    log = Log(Belt(steady(0.5)))
    for t in times(0.5):
        log.step(t)
    before = [(o.id, o.hits) for o in log.tracks]
    tracks = log.tracker.update(t, log.belt.seen(t + 0.3), view=VIEW)
    assert [(o.id, o.hits) for o in tracks] == before and log.tracker.ignored == 1


def test_picture_that_comes_late_is_used_at_its_own_time():
    log = Log(Belt(steady(0.8)))
    order = times(2.0)
    for k in range(10, len(order) - 1, 7):  # some change places with the next
        order[[k, k + 1]] = order[[k + 1, k]]
    for t in order:
        log.step(t)
    assert log.switches == 0 and log.tracker.ignored == 0
    assert np.percentile(log.gaps, 95) < 0.003


def test_time_that_begins_anew_begins_anew():
    log = Log(Belt(steady(0.5)))
    for t in times(1.0, 100.0):
        log.step(t, detections=log.belt.seen(t - 100))
    old = {o.id for o in log.tracks}
    speed = log.tracker.belt.speed
    for t in times(1.0, 3.0):
        tracks = log.step(t)
    assert log.tracker.restarts == 1
    assert tracks and not old & {o.id for o in tracks}
    assert log.tracker.belt.speed == pytest.approx(speed, abs=0.01)


def test_clock_that_is_set_back_a_little_costs_no_number():
    log = Log(Belt(steady(0.5)))
    for t in times(1.0):
        log.step(t)
    known = {o.source: o.id for o in log.tracks if o.source >= 0}
    for t in times(1.0, 1.0):
        log.tracks = log.tracker.update(t - 0.4, log.belt.seen(t), view=VIEW)
    same = {o.source: o.id for o in log.tracks if o.source in known}
    assert same and all(known[number] == same[number] for number in same)


def test_two_cameras_hand_over_by_the_belt_frame():
    # The second sees 1.6 to 2.4 m, at other moments and a little late.
    far = (1.6, 2.4, -0.4, 0.4)
    log = Log(Belt(steady(0.8)))
    first, second = {}, {}
    for t in times(5.0):
        for one in log.step(t, camera="first"):
            if one.source >= 0:
                first[one.source] = one.id
        earlier = t - 0.02
        tracks = log.tracker.update(earlier, log.belt.seen(earlier, far), camera="second", view=far)
        for one in tracks:
            if one.source >= 0:
                second.setdefault(one.source, set()).add(one.id)
    both = [number for number in second if number in first]
    assert len(both) > 10
    assert all(second[number] == {first[number]} for number in both)


# --- the rest -------------------------------------------------------------------------------------


def test_covariance_is_as_large_as_the_error():
    scores = []
    for seed in range(6):
        log = Log(Belt(steady(0.7), seed=seed, sigma=0.002))
        for t in times(1.5):
            tracks = log.step(t)
        for one in tracks:
            if one.source >= 0 and one.whole and not one.flags:
                gap = one.position - log.belt.at(t)[one.source]
                scores.append(gap @ np.linalg.inv(one.covariance) @ gap)
    assert 0.8 < np.mean(scores) < 4.0  # 2 for what is Gaussian and independent


def test_nothing_seen_and_nothing_ever_seen():
    tracker = Tracker()
    assert tracker.update(0.0, []) == ()
    assert tracker.update(0.1, [], 0.5, 0.01) == ()
    log = Log(Belt(steady(0.5)))
    for t in times(1.0):
        log.step(t)
    count = len(log.tracks)
    assert len(log.tracker.update(1.05, [], view=VIEW)) == count
    assert log.tracker.update(60.0, [], view=VIEW) == ()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"speed": -0.5}, "turn the frame"),
        ({"speed": math.nan}, "speed is nan"),
        ({"speed_sigma": 0}, "speed_sigma is 0"),
        ({"min_hits": 0}, "min_hits is 0"),
        ({"hidden_s": -1}, "hidden_s is -1"),
    ],
)
def test_wrong_params_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        TrackerParams(**options)


def test_wrong_input_is_refused_and_leaves_the_tracker_as_it_was():
    good = Detection(np.zeros(2), np.eye(2) * 1e-6, 0.0, 0.1, 0.05)
    tracker = Tracker(TrackerParams(min_hits=1))
    tracker.update(0.0, [good])
    for bad in (
        Detection(np.array([np.nan, 0]), np.eye(2), 0.0, 0.1, 0.05),
        Detection(np.zeros(2), np.zeros((2, 2)), 0.0, 0.1, 0.05),
        Detection(np.zeros(2), np.eye(2), 0.0, -0.1, 0.05),
    ):
        with pytest.raises(ValueError, match="detection 1 cannot be used"):
            tracker.update(0.1, [good, bad])
    with pytest.raises(ValueError, match="stamp is inf"):
        tracker.update(math.inf, [])
    with pytest.raises(ValueError, match="speed is nan"):
        tracker.update(0.1, [], math.nan)
    assert [o.id for o in tracker.update(0.1, [good])] == [1]


def test_crossing_of_a_line_behind_is_in_the_past():
    log = Log(Belt(steady(0.5)))
    for t in times(1.0):
        log.step(t)
    one = log.tracks[0]
    time_s, sigma = crossing(one, float(one.position[0]) - 0.1)
    assert time_s == pytest.approx(t - 0.2, abs=0.01) and 0 < sigma < 0.01


# --- waste-seg track ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording():
    line = SyntheticLine(seed=3, size=(320, 240), speed=1.0, view=0.64, density=9.0)
    return track.record(line, 30.0, 10, beyond=0.5)


def test_the_synthetic_line_is_followed_as_well_as_asked(recording):
    arm = Arm("all", 0.7, cycle_s=0.0)
    figures = track.follow(recording, track.Condition(), [arm])
    assert figures["items"] >= 8
    assert track.shortfalls(figures) == []
    shaken = track.follow(recording, track.Condition(0.01, 0.01), [arm])
    assert shaken["switches"] == 0 and shaken["missed"] == 0 and shaken["double"] == 0
    assert shaken["pick_time_error_ms"]["median"] < 15


def test_figures_show_what_goes_wrong(recording):
    arm = Arm("all", 0.7, cycle_s=0.0)
    blind = track.follow(recording, track.Condition(lost=0.97), [arm])
    assert blind["missed"] > 0
    assert any("missed" in text for text in track.shortfalls(blind))
    # With the arm thought to be elsewhere than it is, nothing else would show it.
    wrong = track.follow(recording, track.Condition(encoder_error=0.4), [arm])
    assert wrong["position_error_mm"]["p95"] > 0


def test_command_measures_updates(capsys, tmp_path):
    report = tmp_path / "bench.json"
    args = ["track", "--bench", "--items", "30", "--updates", "3", "--output", str(report)]
    assert cli.main(args) == 0
    assert "tracker" in capsys.readouterr().out and report.exists()


def test_command_says_what_is_wrong(capsys, tmp_path):
    assert cli.main(["track", "--arms", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml: cannot be read" in capsys.readouterr().err
    assert cli.main(["track", "--items", "0"]) == 2
