"""The tracker and the simulated arm as processes of their own, over DDS.

What the tracker sees is a belt whose items lie at known places. Its clock is the test's (`/clock`),
so that times do not depend on how fast this machine is.
"""

import importlib.util
import math
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (source its setup file, or use ./sorter test)")

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Point32
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Float32, Header
from visualization_msgs.msg import Marker, MarkerArray

from waste_seg_ros.msg import ArmState, Pick, WasteItem, WasteItemArray
from waste_seg_ros.nodes.images import ImageError, to_depth
from waste_seg_ros.nodes.tracks import quaternion, to_seconds, to_stamp, track_message, transform
from waste_seg_ros.perception.belt import Camera, default_plane, to_pixels
from waste_seg_ros.perception.follow import Followed, Shape
from waste_seg_ros.perception.grasp import Grasp
from waste_seg_ros.perception.tracking import Track

WIDTH, HEIGHT, FOCAL = 640, 480, 500.0
"""Of a camera 1 m above the belt, which sees x in -0.64..0.64 and y in -0.48..0.48."""
CAMERA = Camera(
    np.array([[FOCAL, 0, 319.5], [0, FOCAL, 239.5], [0, 0, 1]]), np.zeros(0), "none", (640, 480)
)
SPEED = 0.5
START = 1000.0
PICK_TIME_BOUND = 0.02
"""Pick times are right to this [s]: 10 mm, with stamps that jitter by 10 ms."""
ARMS = """
arms:
  - {name: first, x: 0.9, lane: [-0.5, 0.5], classes: [paper], cycle: 0.2, opening: [0.0, 0.2]}
  - {name: second, x: 1.6, lane: [-0.5, 0.5], cycle: 0.2, gripper: suction, opening: [0.0, 0.2]}
"""


class Belt:
    """What is around the tracker: a segmenter, a camera, arms and an encoder."""

    def __init__(self, ros, start_node, tmp_path):
        self.ros, self._start, self._tmp = ros, start_node, tmp_path
        self.rng = np.random.default_rng(1)
        self.now = self.begin = START
        self.things = []  # (x at begin, y, yaw, length, width, class)
        self.arms = {"first": True, "second": True}
        self.with_info = True
        self.clock = ros.node.create_publisher(Clock, "/clock", 10)
        self.items = ros.node.create_publisher(WasteItemArray, "items", 10)
        self.infos = ros.node.create_publisher(CameraInfo, "camera_info", 10)
        self.states = ros.node.create_publisher(ArmState, "arms/state", 50)
        self.encoder = ros.node.create_publisher(Float32, "belt/speed", 10)
        self.tracks = ros.collect(WasteItemArray, "tracks", 100)
        self.picks = self.listen()
        self.diagnostics = ros.collect(DiagnosticArray, "/diagnostics", 100)

    def listen(self):
        standing = QoSProfile(depth=64, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        return self.ros.collect(Pick, "picks", standing)

    def launch(self, **parameters):
        arms = self._tmp / "arms.yaml"
        arms.write_text(ARMS)
        # Arms that are silent here are so on purpose.
        fixed = {"use_sim_time": True, "arms": str(arms), "arm_timeout": 30.0, "height_sigma": 0.0}
        self.process = self._start("tracker", {**fixed, **parameters})

    def start(self, **parameters):
        self.launch(**parameters)
        self.meet()

    def meet(self):
        """Wait until the tracker knows us, and we it."""
        heard = (self.items, self.infos, self.states, self.encoder, self.clock)
        said = ("picks", "tracks")

        def known():
            return all(p.get_subscription_count() for p in heard) and all(
                map(self.ros.node.count_publishers, said)
            )

        assert self.ros.spin_until(known, 60), self.process.output()
        self.ros.spin_until(lambda: False, 0.3)
        self.say()
        for _ in range(60):
            if not self.with_info or self.value("input", "cameras known") == "1":
                return
            self.wait(0.25)
            self.say()
        raise AssertionError("it does not know the camera")

    def wait(self, seconds):
        """Let time go on while the belt stands still; the nodes' timers go by this clock."""
        self.now += seconds
        self.begin += seconds
        self.clock.publish(Clock(clock=to_stamp(self.now)))
        self.ros.spin_until(lambda: False, seconds)

    def say(self):
        """All that is not an image: the time, camera_info, and that the arms are there."""
        self.clock.publish(Clock(clock=to_stamp(self.now)))
        if self.with_info:
            info = CameraInfo(width=WIDTH, height=HEIGHT)
            info.k = CAMERA.matrix.ravel().tolist()
            self.infos.publish(info)
        for name, ready in self.arms.items():
            if ready is not None:
                self.states.publish(ArmState(arm=name, ready=ready))

    def add(self, x, y, kind, yaw=0.3, length=0.08, width=0.05):
        self.things.append((x, y, yaw, length, width, kind))

    def array(self, jitter=0.0, noise=0.0, hidden=()):
        """What a segmenter says of the belt now."""
        late = self.rng.normal(0, jitter) if jitter else 0.0
        array = WasteItemArray(model="test")
        array.header = Header(stamp=to_stamp(self.now + late), frame_id="camera_optical_frame")
        order = list(enumerate(self.things))
        self.rng.shuffle(order)  # a segmenter's numbers mean nothing from image to image
        for number, (x, y, yaw, length, width, kind) in order:
            x += SPEED * (self.now - self.begin)
            box = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [length / 2, width / 2]
            turn = np.array([[math.cos(yaw), math.sin(yaw)], [-math.sin(yaw), math.cos(yaw)]])
            outline = to_pixels(CAMERA, default_plane(1.0), box @ turn + [x, y])
            outline += self.rng.normal(0, noise, outline.shape) if noise else 0.0
            if outline.min() < 0 or (outline > [WIDTH - 1, HEIGHT - 1]).any() or number in hidden:
                continue
            item = WasteItem(header=array.header, class_id=kind, score=0.9)
            item.track_id = len(array.items) + 1
            item.outline.points = [Point32(x=u, y=v) for u, v in outline.tolist()]
            array.items.append(item)
        return array

    def step(self, dt=0.1, **seen):
        """Show the belt a moment later; returns the tracks that come of it."""
        self.now += dt
        self.say()
        self.ros.spin_until(lambda: False, 0.01)  # the time is there before the image
        before = len(self.tracks)
        array = self.array(**seen)
        self.items.publish(array)
        assert self.ros.spin_until(lambda: len(self.tracks) > before, 30), self.process.output()
        tracks = self.tracks[-1]
        assert tracks.header.stamp == array.header.stamp
        return tracks

    def thing_of(self, item, at):
        """Number of the thing on the belt that an item of a message is."""
        place = item.pose.pose.position
        gaps = [
            math.hypot(x + SPEED * (at - self.begin) - place.x, y - place.y)
            for x, y, *_ in self.things
        ]
        number = int(np.argmin(gaps))
        return number if gaps[number] < 0.03 else None

    def status(self, name):
        for array in reversed(self.diagnostics):
            for entry in array.status:
                if entry.name == f"tracker: {name}":
                    return entry
        return DiagnosticStatus(level=DiagnosticStatus.STALE)

    def value(self, name, key):
        return {value.key: value.value for value in self.status(name).values}.get(key)

    def tells(self, name, text, level=None):
        """Whether a diagnostic comes to say so."""

        def told():
            entry = self.status(name)
            return text in entry.message and (level is None or entry.level == level)

        for _ in range(60):
            if told():
                return True
            self.wait(0.25)
        return False

    def set(self, name, value):
        parameter = Parameter(name, value=value).to_parameter_msg()
        request = SetParameters.Request(parameters=[parameter])
        return self.ros.call(SetParameters, "/tracker/set_parameters", request).results[0]


@pytest.fixture
def belt(ros, start_node, tmp_path):
    return Belt(ros, start_node, tmp_path)


def test_items_keep_their_numbers_and_are_announced_once(belt):
    shown = belt.ros.collect(MarkerArray, "track_markers", 100)
    for number in range(8):
        kind = "paper" if number % 2 else "bottle"
        belt.add(-0.62 - 0.2 * number, (-0.3, 0.1, 0.25)[number % 3], kind, yaw=0.4 * number)
    belt.start()
    numbers = {}  # thing -> numbers that it had
    stands = []
    late = None
    for count in range(70):
        # One is hidden for a while, as by a hand.
        hidden = {2} if 24 <= count < 28 else ()
        tracks = belt.step(jitter=0.01, noise=0.3, hidden=hidden)
        for item in tracks.items:
            thing = belt.thing_of(item, to_seconds(tracks.header.stamp))
            assert thing is not None
            numbers.setdefault(thing, set()).add(item.track_id)
        if late is None and len(belt.picks) >= 4:
            late = belt.listen()
            stands = [p for p in belt.picks if to_seconds(p.expiry) > belt.now]
    tracks = belt.tracks[-1]
    assert tracks.header.frame_id == "belt" and tracks.model == "test"
    assert sorted(numbers) == list(range(8))
    assert all(len(own) == 1 for own in numbers.values()), numbers
    assert len(set.union(*numbers.values())) == 8, "no two have the same"

    assert len(belt.picks) == 8
    assert len({pick.track_id for pick in belt.picks}) == 8, "each once"
    places = {"first": 0.9, "second": 1.6}
    for pick in belt.picks:
        (thing,) = (t for t, own in numbers.items() if pick.track_id in own)
        x, y, yaw, length, width, kind = belt.things[thing]
        assert pick.item.class_id == kind
        assert pick.arm == ("first" if kind == "paper" else "second")
        true = belt.begin + (places[pick.arm] - x) / SPEED
        assert abs(to_seconds(pick.pick_time) - true) < PICK_TIME_BOUND
        assert 0 < pick.pick_time_std < 0.05
        assert to_seconds(pick.pick_time) - to_seconds(pick.header.stamp) > 0.3, "early enough"
        assert to_seconds(pick.expiry) > to_seconds(pick.pick_time)
        assert pick.header.frame_id == pick.item.header.frame_id == "belt"
        assert pick.item.pose.pose.position.x == pytest.approx(places[pick.arm], abs=1e-9)
        assert pick.item.pose.pose.position.y == pytest.approx(y, abs=0.004)
        turn = pick.item.pose.pose.orientation
        gap = 2 * math.atan2(turn.z, turn.w) - yaw
        assert abs(math.remainder(gap, math.pi)) < 0.06
        assert pick.item.length == pytest.approx(length, abs=0.006)
        assert pick.item.width == pytest.approx(width, abs=0.006)
        assert pick.item.belt_velocity.x == pytest.approx(SPEED, abs=0.02)
        assert pick.item.pickable
        # Jaws close across the item; a cup comes down near its middle.
        if pick.arm == "first":
            assert pick.item.grasp_width == pytest.approx(width, abs=0.01)
        grasp = pick.item.grasp.position
        assert math.hypot(grasp.x - places[pick.arm], grasp.y - y) < 0.03

    # Who comes late hears what stands.
    assert stands
    heard = [(pick.track_id, pick.arm) for pick in late]
    assert all((pick.track_id, pick.arm) in heard for pick in stands)

    assert belt.ros.spin_until(lambda: shown)
    kinds = {marker.ns for array in shown for marker in array.markers[1:]}
    assert kinds == {"boxes", "outlines", "grasps", "paths", "names"}
    assert shown[-1].markers[0].action == Marker.DELETEALL
    assert all(m.header.frame_id == "belt" for array in shown for m in array.markers)


def test_another_arm_takes_over_from_a_dead_one(belt):
    for number in range(6):
        belt.add(-0.1 - 0.2 * number, 0.1 * (number % 3), "paper")
    belt.start(arm_timeout=1.0)
    while not belt.picks:
        belt.step()
    assert {pick.arm for pick in belt.picks} == {"first"}, "the first along the belt"
    orphans = {pick.track_id for pick in belt.picks}
    belt.arms["first"] = None  # it dies with its orders
    time.sleep(1.2)
    for _ in range(50):
        belt.step()
    assert belt.tells("arms", "first: dead", DiagnosticStatus.WARN)
    after = [pick for pick in belt.picks if pick.arm == "second"]
    assert {pick.track_id for pick in after} == {pick.track_id for pick in belt.picks}
    assert len(after) == 6, "each once"
    for old in (pick for pick in belt.picks if pick.track_id in orphans and pick.arm == "first"):
        (new,) = (pick for pick in after if pick.track_id == old.track_id)
        assert to_seconds(new.header.stamp) > to_seconds(old.expiry), "never two at a time"
    belt.arms["second"] = False
    belt.step()
    assert belt.tells("arms", "second: dead or not ready", DiagnosticStatus.ERROR)


def test_diagnostics_name_what_is_missing_and_the_mend(belt):
    belt.with_info = False
    belt.arms = {}
    belt.add(-0.5, 0.0, "paper")
    belt.start()
    for _ in range(3):
        belt.now += 0.1
        belt.say()
        belt.items.publish(belt.array())
    assert belt.tells("input", "no camera_info on /camera_info", DiagnosticStatus.ERROR)
    assert belt.tells("arms", "no arm speaks on /arms/state", DiagnosticStatus.WARN)
    assert belt.tells("belt", "run waste-seg calibrate", DiagnosticStatus.OK)
    assert not belt.tracks

    belt.with_info, belt.arms = True, {"first": True, "third": True}
    for _ in range(6):
        tracks = belt.step()
    assert [item.class_id for item in tracks.items] == ["paper"]
    assert belt.tells("input", "images/s", DiagnosticStatus.OK)
    assert belt.tells("arms", "third speak on arms/state but are not in", DiagnosticStatus.WARN)
    assert belt.tells("arms", "second: dead or not ready")
    there = importlib.util.find_spec("tf2_msgs") is not None
    assert belt.value("belt", "tf").startswith("belt" if there else "belt is not published")

    # The clock goes back, as that of a recording that starts over.
    number = tracks.items[0].track_id
    belt.now = belt.begin = START - 3.0
    belt.things = [(-0.5, 0.0, 0.3, 0.08, 0.05, "paper")]
    for _ in range(5):
        tracks = belt.step()
    assert belt.tells("belt", "the clock went back", DiagnosticStatus.WARN)
    assert [item.track_id for item in tracks.items] == [number + 1], "numbers are not used again"

    # Stamps of another clock are no times to tell an arm.
    belt.now += 100.0
    belt.clock.publish(Clock(clock=to_stamp(belt.now)))
    belt.ros.spin_until(lambda: False, 0.1)
    array = belt.array()
    array.header.stamp = to_stamp(belt.now - 50.0)
    belt.items.publish(array)
    assert belt.tells("input", "set use_sim_time", DiagnosticStatus.ERROR)


def test_the_encoder_tells_the_speed_until_it_is_silent(belt):
    belt.add(-0.5, 0.0, "paper")
    belt.start(estimate_speed=False, speed=0.3, encoder_timeout=0.5)
    for _ in range(4):
        belt.encoder.publish(Float32(data=SPEED))
        belt.ros.spin_until(lambda: False, 0.05)
        tracks = belt.step()
    assert tracks.items[0].belt_velocity.x == pytest.approx(SPEED, abs=0.01)
    assert belt.tells("belt", "the encoder on /belt/speed is silent; the speed is taken as 0.3")
    belt.encoder.publish(Float32(data=math.nan))
    assert belt.tells("belt", "belt/speed was not a number 1 times", DiagnosticStatus.WARN)


def test_depth_gives_heights(belt):
    images = belt.ros.node.create_publisher(Image, "depth/image", 10)
    belt.add(-0.4, 0.1, "bottle", yaw=0.0)
    belt.start(depth=True)
    assert belt.ros.spin_until(images.get_subscription_count)

    def show(stamp, depth):
        # At a quarter of the size; a whole one may be lost on the way.
        image = Image(height=HEIGHT // 4, width=WIDTH // 4, encoding="32FC1", step=WIDTH)
        image.header.stamp = to_stamp(stamp)
        image.data = np.full((HEIGHT // 4, WIDTH // 4), depth, np.float32).tobytes()
        images.publish(image)

    for _ in range(4):
        show(belt.now + 0.1, 0.93)  # all that is seen is as high as this
        show(belt.now + 0.14, 0.5)  # another image's
        belt.ros.spin_until(lambda: False, 0.1)
        tracks = belt.step()
    (item,) = tracks.items
    assert item.height == pytest.approx(0.07, abs=0.002)
    assert item.pose.pose.position.z == pytest.approx(0.035, abs=0.001)
    # What is higher is nearer to the camera, and so less far from the middle than it seems.
    seen = SPEED * (belt.now - belt.begin) - 0.4
    assert item.pose.pose.position.x == pytest.approx(seen * (1 - 0.035), abs=0.002)


def test_parameters_take_effect_or_are_refused_with_the_reason(belt, tmp_path):
    belt.add(-0.5, 0.0, "paper")
    belt.launch(calibration=str(tmp_path / "none.yaml"))
    assert belt.tells("input", "none.yaml: no such file", DiagnosticStatus.ERROR)
    assert belt.set("calibration", "").successful, "what is mended starts"
    belt.meet()
    for _ in range(4):
        tracks = belt.step()
    assert tracks.items[0].pickable
    refused = belt.set("pick_line", 2.0)
    assert not refused.successful and "pick_line" in refused.reason
    refused = belt.set("lead_time", 5.0)
    assert not refused.successful and "horizon_s is 2.0" in refused.reason
    assert not belt.set("min_score", 1.5).successful
    assert belt.set("min_score", 0.95).successful
    tracks = belt.step()
    assert not tracks.items[0].pickable
    assert tracks.items[0].reason == "score 0.90 below 0.95"


# --- the simulated arm ----------------------------------------------------------------------------


def test_a_simulated_arm_tells_right_from_wrong_and_from_nothing(ros, start_node):
    states = ros.collect(ArmState, "arms/state", 50)
    diagnostics = ros.collect(DiagnosticArray, "/diagnostics", 50)
    standing = QoSProfile(depth=64, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    picks = ros.node.create_publisher(Pick, "picks", standing)
    truth = ros.node.create_publisher(WasteItemArray, "truth/items", 10)
    clock = ros.node.create_publisher(Clock, "/clock", 10)
    now = START

    def order(number, kind, x, y, arm="sorter", at=4.0, expiry=60.0):
        pick = Pick(track_id=number, arm=arm)
        pick.pick_time, pick.expiry = to_stamp(now + at), to_stamp(now + expiry)
        pick.item.class_id = kind
        pick.item.grasp.position.x, pick.item.grasp.position.y = x, y
        picks.publish(pick)

    # At `at` 4 s the belt has gone 2 m. The camera's y points against the belt's.
    order(1, "bottle", 2.02, 0.1)
    order(2, "paper", 1.8, -0.2)
    order(3, "bottle", 2.5, 0.3)
    order(4, "bottle", 2.02, 0.1, at=4.5)  # nothing is there any more
    order(5, "bottle", 2.02, 0.1, arm="another")
    order(6, "bottle", 2.02, 0.1, expiry=-1.0)
    arm = start_node("arm", {"arm": "sorter", "use_sim_time": True})
    met = (truth, clock, picks)
    assert ros.spin_until(lambda: all(p.get_subscription_count() for p in met), 60), arm.output()
    clock.publish(Clock(clock=to_stamp(now)))
    ros.spin_until(lambda: False, 0.5)
    array = WasteItemArray(header=Header(stamp=to_stamp(now)))
    for number, x, y, kind in ((11, 0.0, -0.1, "bottle"), (12, -0.2, 0.2, "aluminum")):
        item = WasteItem(header=array.header, track_id=number, class_id=kind)
        item.pose.pose.position.x, item.pose.pose.position.y = x, y
        item.pose.pose.position.z = 1.0
        item.length, item.width = 0.08, 0.06
        item.belt_velocity.x = 0.5
        array.items.append(item)
    truth.publish(array)
    ros.spin_until(lambda: False, 0.5)
    for seconds in (3.9, 4.1, 4.3, 4.6, 5.0, 5.5, 6.6):
        assert seconds > 4 or not any(state.picked + state.missed for state in states)
        clock.publish(Clock(clock=to_stamp(now + seconds)))
        ros.spin_until(lambda: False, 0.3)
    assert ros.spin_until(lambda: states and states[-1].picked + states[-1].missed == 4, 30)
    state = states[-1]
    assert (state.arm, state.ready, state.picked, state.missed) == ("sorter", True, 2, 2)
    assert list(state.last_track_ids) == [1, 2, 3, 4] or list(state.last_track_ids) == [2, 1, 3, 4]

    def told():
        for array in diagnostics:
            for entry in array.status:
                if entry.message == "1 right, 1 wrong, 2 missed, purity 0.50":
                    return {value.key: value.value for value in entry.values}
        return None

    assert ros.spin_until(told)
    values = told()
    assert values["right bottle"] == "1" and values["wrong paper"] == "1"
    assert values["missed bottle"] == "2" and values["expired"] == "1"
    assert len(states) >= 2


# --- messages -------------------------------------------------------------------------------------


def rotation_of(orientation):
    x, y, z, w = orientation.x, orientation.y, orientation.z, orientation.w
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def a_track(**changes):
    values = {
        "id": 7,
        "stamp_s": 10.0,
        "position": np.array([0.2, -0.1]),
        "velocity": np.array([0.5, 0.0]),
        "covariance": np.eye(2) * 1e-6,
        "speed_sigma": 0.001,
        "yaw": 0.5,
        "length": 0.1,
        "width": 0.05,
        "class_index": 1,
        "score": 0.9,
        "age": 1.0,
        "hits": 5,
        "last_seen_s": 10.0,
        "hidden_s": 0.0,
        "whole": True,
        "source": -1,
        "flags": 0,
        **changes,
    }
    return Track(**values)


@pytest.mark.parametrize("angle", [-1.5, -0.4, 0.0, 0.7, math.pi / 2])
def test_the_gripper_points_into_the_belt_and_closes_along_y(angle):
    grasp = Grasp("jaws", (0.01, 0.02), angle, 0.05, 0.8, "")
    shape = Shape(np.zeros((3, 2)), 0.1, 0.04, {"arm": grasp})
    item = Followed(a_track(), "paper", shape, "")
    message = track_message(item, Header(frame_id="belt"), 1.2)
    rotation = rotation_of(message.grasp.orientation)
    np.testing.assert_allclose(rotation[:, 2], [0, 0, -1], atol=1e-9)
    np.testing.assert_allclose(rotation[:, 1], [math.cos(angle), math.sin(angle), 0], atol=1e-9)
    place = message.grasp.position
    assert (place.x, place.y, place.z) == pytest.approx((0.21, -0.08, 0.02))
    assert to_seconds(message.pick_time) == pytest.approx(12.0)
    standing = Followed(a_track(velocity=np.zeros(2)), "paper", shape, "")
    assert track_message(standing, Header(), 1.2).pick_time == Time(), "the belt stands"


def test_transforms_and_times_survive_the_way_to_messages():
    rng = np.random.default_rng(3)
    for _ in range(50):
        axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        axes *= np.sign(np.linalg.det(axes))
        x, y, z, w = quaternion(axes)
        turn = transform(default_plane(1.0), Header(), "belt").transform.rotation
        turn.x, turn.y, turn.z, turn.w = x, y, z, w
        np.testing.assert_allclose(rotation_of(turn), axes, atol=1e-12)
    plane = transform(default_plane(0.8), Header(frame_id="camera"), "belt")
    assert (plane.header.frame_id, plane.child_frame_id) == ("camera", "belt")
    assert plane.transform.translation.z == 0.8
    np.testing.assert_allclose(rotation_of(plane.transform.rotation), np.diag([1, -1, -1]))
    for seconds in (0.0, 1.75, 1.8e9 + 0.25):
        assert to_seconds(to_stamp(seconds)) == seconds
    assert to_stamp(0.9999999999) == Time(sec=0, nanosec=999_999_999)
    assert to_stamp(math.inf) == to_stamp(-1.0) == to_stamp(math.nan) == Time()


def test_depth_images_are_read_as_they_are():
    image = Image(height=2, width=3, step=16, encoding="32FC1")
    rows = np.zeros((2, 4), "<f4")
    rows[:, :3] = [[1, 2, 3], [4, 5, math.nan]]
    image.data = rows.tobytes()
    np.testing.assert_array_equal(to_depth(image), [[1, 2, 3], [4, 5, math.nan]])
    image.is_bigendian, image.data = 1, rows.astype(">f4").tobytes()
    np.testing.assert_array_equal(to_depth(image), [[1, 2, 3], [4, 5, math.nan]])
    image.height = 3
    with pytest.raises(ImageError, match="has 32 bytes; 48 are needed"):
        to_depth(image)
    short = Image(height=1, width=2, step=4, encoding="16UC1", data=b"\x01\x02\x03\x04")
    np.testing.assert_array_equal(to_depth(short), [[0x0201, 0x0403]])
    with pytest.raises(ImageError, match="rgb8"):
        to_depth(Image(height=1, width=1, step=3, encoding="rgb8", data=b"abc"))


def test_the_python_example_picks_and_says_so(ros, start_node, tmp_path):
    import subprocess
    import sys

    standing = QoSProfile(depth=64, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    picks = ros.node.create_publisher(Pick, "picks", standing)
    states = ros.collect(ArmState, "arms/state", 50)
    script = Path(__file__).resolve().parent.parent / "examples" / "pick_subscriber.py"
    process = subprocess.Popen(
        [sys.executable, str(script), "arm_1"], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        assert ros.spin_until(lambda: states, 60)
        now = ros.node.get_clock().now().nanoseconds * 1e-9
        pick = Pick(track_id=9, arm="arm_1")
        pick.pick_time, pick.expiry = to_stamp(now + 0.5), to_stamp(now + 60)
        pick.item.class_id, pick.item.grasp_width = "bottle", 0.0625
        pick.item.grasp.position.x, pick.item.grasp.position.y = 1.2, -0.125
        picks.publish(Pick(track_id=8, arm="arm_2"))
        picks.publish(pick)
        assert ros.spin_until(lambda: states[-1].picked == 1, 30)
        assert list(states[-1].last_track_ids) == [9]
        assert to_seconds(states[-1].header.stamp) >= now + 0.5
        process.terminate()
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert output == "9 bottle at 1.200 -0.125 0.000, opening 0.062\n"
