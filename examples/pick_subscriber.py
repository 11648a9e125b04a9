#!/usr/bin/env python3
"""The least that an arm controller needs: hears its orders, and says that it is there.

    python3 examples/pick_subscriber.py arm_1

Prints one line for each order when the item comes to the arm. Put your robot's motion in the
place of the print.
"""

import sys

import rclpy
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.time import Time

from waste_seg_ros.msg import ArmState, Pick


class PickSubscriber(Node):
    """An arm that prints in place of picking."""

    def __init__(self, arm: str) -> None:
        super().__init__("pick_subscriber")
        self.arm = arm
        self.orders: list[Pick] = []
        self.state = ArmState(arm=arm, ready=True)
        # Transient local: an arm that starts late, or again, hears the orders that still stand.
        standing = QoSProfile(depth=64, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.create_subscription(Pick, "picks", self.on_pick, standing)
        self.publisher = self.create_publisher(ArmState, "arms/state", 10)
        # An arm that is silent for a second counts as dead, and others get its items.
        self.create_timer(0.25, self.say_state)
        self.create_timer(0.01, self.work)

    def on_pick(self, pick: Pick) -> None:
        """Take an order that is for us and still stands."""
        if pick.arm == self.arm and Time.from_msg(pick.expiry) > self.get_clock().now():
            self.orders.append(pick)
            self.orders.sort(key=lambda order: (order.pick_time.sec, order.pick_time.nanosec))

    def say_state(self) -> None:
        """Say that we are there."""
        self.state.header.stamp = self.get_clock().now().to_msg()
        self.publisher.publish(self.state)

    def work(self) -> None:
        """Pick what has come."""
        while self.orders and Time.from_msg(self.orders[0].pick_time) <= self.get_clock().now():
            pick = self.orders.pop(0)
            grasp = pick.item.grasp.position  # in the belt frame, as it is at pick_time
            print(
                f"{pick.track_id} {pick.item.class_id} at {grasp.x:.3f} {grasp.y:.3f} "
                f"{grasp.z:.3f}, opening {pick.item.grasp_width:.3f}",
                flush=True,
            )
            self.state.picked += 1
            self.state.last_track_ids = [*self.state.last_track_ids, pick.track_id][-16:]
            self.say_state()


def main() -> None:
    """Run until Ctrl-C."""
    rclpy.init(args=sys.argv)
    arguments = rclpy.utilities.remove_ros_args(sys.argv)
    node = PickSubscriber(arguments[1] if len(arguments) > 1 else "arm_1")
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, rclpy.executors.ExternalShutdownException):
        pass
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
