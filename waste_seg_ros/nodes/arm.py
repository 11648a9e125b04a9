"""A simulated arm on a line whose truth is known, such as the synthetic one.

Takes the orders for its own name from ``picks``, and at each pick time grips where it is told to.
What it then holds is what ``truth/items`` says to lie there at that time: the right thing, the
wrong one, or nothing. It says on ``arms/state`` that it is there, and in its diagnostics what it
has picked, by class.

As a real arm would, it leaves out orders that have expired, which one that comes late may hear.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.qos_overriding_options import QoSOverridingOptions
from std_msgs.msg import Header

from waste_seg_ros.msg import ArmState, Pick, WasteItem, WasteItemArray
from waste_seg_ros.nodes import declare, run_node
from waste_seg_ros.nodes.diagnostics import OK, WARN, Finding, Reporter, publish, status
from waste_seg_ros.nodes.tracks import to_seconds
from waste_seg_ros.perception.belt import BeltPlane, default_plane, read_calibration
from waste_seg_ros.perception.follow import UNKNOWN

HELD = 0.01
"""The gripper holds what it meets within this distance [m]."""
MEMORY = 60.0
"""Items are remembered for so long after they were last in view [s]."""
RESULTS = ("right", "wrong", "missed")


@dataclass(frozen=True)
class TrueItem:
    """What lies on the belt; in the belt frame [m, s].

    Attributes:
        number: along the belt.
        class_name: what it is.
        seen_s: the moment that the place is for.
        x, y, yaw: its middle and long axis.
        length, width: of the box around it.
        velocity: of the belt along x and y.
    """

    number: int
    class_name: str
    seen_s: float
    x: float
    y: float
    yaw: float
    length: float
    width: float
    velocity: tuple[float, float]

    def distance(self, x: float, y: float, at_s: float) -> float:
        """From a place to the box around it at a moment; 0 within [m]."""
        dx = x - self.x - self.velocity[0] * (at_s - self.seen_s)
        dy = y - self.y - self.velocity[1] * (at_s - self.seen_s)
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        along, across = abs(dx * c + dy * s), abs(dy * c - dx * s)
        return math.hypot(max(0.0, along - self.length / 2), max(0.0, across - self.width / 2))


def true_item(item: WasteItem, plane: BeltPlane) -> TrueItem:
    """An item of ``truth/items``, which are in the camera's frame, in the belt frame."""
    pose = item.pose.pose
    turn = plane.rotation.T
    place = turn @ ([pose.position.x, pose.position.y, pose.position.z] - plane.translation)
    yaw = 2 * math.atan2(pose.orientation.z, pose.orientation.w)
    axis = turn @ [math.cos(yaw), math.sin(yaw), 0.0]
    velocity = turn @ [item.belt_velocity.x, item.belt_velocity.y, item.belt_velocity.z]
    return TrueItem(
        number=int(item.track_id),
        class_name=item.class_id,
        seen_s=to_seconds(item.header.stamp),
        x=float(place[0]),
        y=float(place[1]),
        yaw=math.atan2(axis[1], axis[0]),
        length=float(item.length),
        width=float(item.width),
        velocity=(float(velocity[0]), float(velocity[1])),
    )


class Arm(Node):
    """The simulated arm."""

    def __init__(self) -> None:
        super().__init__("arm")
        self.exit_code: int | None = None
        once = {"read_only": True}
        self._arm = declare(
            self, "arm", "", "Name of the arm, as in arms.yaml; '': the node's.", **once
        )
        self._arm = self._arm or self.get_name()
        file = declare(
            self,
            "calibration",
            "",
            "File of waste-seg calibrate; '': the camera looks straight down on the belt.",
            **once,
        )
        distance = declare(
            self,
            "belt_distance",
            1.0,
            "Without a calibration: from the camera to the belt [m].",
            low=0.01,
            high=100.0,
            **once,
        )
        declare(self, "ready", True, "Whether it takes orders; false: as in a fault.")
        self._plane = read_calibration(file).plane if file else default_plane(distance)

        self._fresh: list[Pick] = []
        self._orders: list[Pick] = []
        self._known: deque[tuple[int, int, int]] = deque(maxlen=256)
        self._truth: dict[int, TrueItem] = {}
        self._taken: set[int] = set()
        self._ended: deque[int] = deque(maxlen=16)
        self._results: Counter[tuple[str, str]] = Counter()
        self._expired = 0

        options = {"qos_overriding_options": QoSOverridingOptions.with_default_policies()}
        standing = QoSProfile(depth=64, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.create_subscription(Pick, "picks", self._on_pick, standing, **options)
        self.create_subscription(WasteItemArray, "truth/items", self._on_truth, 10, **options)
        self._state = self.create_publisher(ArmState, "arms/state", QoSProfile(depth=10), **options)
        self._reporter = Reporter(self, self._statuses)
        self.create_timer(0.25, self._say_state)
        # What it holds is known for the very pick time, however late it looks.
        self.create_timer(0.05, self._work)
        self._say_state()

    def close(self) -> bool:
        """There are no threads to end."""
        return True

    # --- what it hears ----------------------------------------------------------------------------

    def _now(self) -> float:
        return float(self.get_clock().now().nanoseconds) * 1e-9

    def _on_pick(self, pick: Pick) -> None:
        if pick.arm != self._arm or not self.get_parameter("ready").value:
            return
        key = (int(pick.track_id), int(pick.pick_time.sec), int(pick.pick_time.nanosec))
        if key in self._known:
            return
        self._known.append(key)
        self._fresh.append(pick)

    def _on_truth(self, array: WasteItemArray) -> None:
        now = to_seconds(array.header.stamp)
        for item in array.items:
            seen = true_item(item, self._plane)
            # Of what the border cuts only a part is measured.
            if not item.flags & WasteItem.FLAG_TRUNCATED or seen.number not in self._truth:
                self._truth[seen.number] = seen
        for number in [n for n, item in self._truth.items() if abs(now - item.seen_s) > MEMORY]:
            del self._truth[number]

    # --- what it does -----------------------------------------------------------------------------

    def _work(self) -> None:
        now = self._now()
        if not now:  # a simulated clock that has not begun
            return
        for pick in self._fresh:
            if to_seconds(pick.expiry) < now:
                self._expired += 1
            else:
                self._orders.append(pick)
        self._fresh.clear()
        self._orders.sort(key=lambda order: to_seconds(order.pick_time))
        while self._orders and to_seconds(self._orders[0].pick_time) <= now:
            pick = self._orders.pop(0)
            result = self._grip(pick)
            self._results[result, pick.item.class_id] += 1
            self._ended.append(int(pick.track_id))
            self._say_state()
            self._reporter.report_change()

    def _grip(self, pick: Pick) -> str:
        """What the gripper holds after the pick: one of ``RESULTS``."""
        at, place = to_seconds(pick.pick_time), pick.item.grasp.position
        near = [
            (item.distance(place.x, place.y, at), number)
            for number, item in self._truth.items()
            if number not in self._taken
        ]
        distance, number = min(near, default=(math.inf, 0))
        if distance > HELD:
            return "missed"
        self._taken.add(number)
        wanted = pick.item.class_id
        return "right" if wanted in (UNKNOWN, self._truth[number].class_name) else "wrong"

    def _count(self, result: str) -> int:
        return sum(count for (what, _), count in self._results.items() if what == result)

    def _say_state(self) -> None:
        state = ArmState(arm=self._arm, ready=self.get_parameter("ready").value)
        state.header = Header(stamp=self.get_clock().now().to_msg())
        state.picked = self._count("right") + self._count("wrong")
        state.missed = self._count("missed")
        state.last_track_ids = list(self._ended)
        publish(self, self._state, state)

    def _statuses(self) -> list[DiagnosticStatus]:
        right, wrong, missed = (self._count(result) for result in RESULTS)
        findings: list[Finding] = []
        if not self.get_parameter("ready").value:
            findings.append((WARN, "not ready: set the parameter ready to true"))
        elif not self.count_publishers(self.resolve_topic_name("picks")):
            findings.append((WARN, "nobody publishes picks: start the tracker, or remap picks"))
        elif self._orders and not self._truth:
            findings.append(
                (WARN, "truth/items is silent, without which nothing is gripped: start the camera")
            )
        else:
            text = f"{right} right, {wrong} wrong, {missed} missed"
            if right + wrong:
                text += f", purity {right / (right + wrong):.2f}"
            findings.append((OK, text))
        values: dict[str, object] = {
            "arm": self._arm,
            "waiting": len(self._orders),
            "expired": self._expired,
        }
        values |= {
            f"{result} {name}": count for (result, name), count in sorted(self._results.items())
        }
        return [status(f"{self.get_name()}: picks", self._arm, findings, values)]


def main(args: Sequence[str] | None = None) -> int:
    """Run a simulated arm."""
    return run_node(Arm, args)


if __name__ == "__main__":
    raise SystemExit(main())
