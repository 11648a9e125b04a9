"""From tracks to messages in the belt frame: one place for its geometry and field order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Point, TransformStamped
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from waste_seg_ros.msg import Pick, WasteItem
from waste_seg_ros.perception.belt import BeltPlane
from waste_seg_ros.perception.draw import class_color
from waste_seg_ros.perception.follow import Followed, Sighting
from waste_seg_ros.perception.picks import PickOrder
from waste_seg_ros.perception.tracking import crossing

PATH = 1.0
"""So much of an item's way to come is shown [s]."""


def to_seconds(stamp: Any) -> float:
    """Seconds of a builtin_interfaces/Time; exact to a microsecond until the year 2242."""
    return float(stamp.sec) + 1e-9 * float(stamp.nanosec)


def to_stamp(seconds: float) -> Time:
    """The builtin_interfaces/Time of a number of seconds, zero for what it cannot hold."""
    if not 0 <= seconds < 2**31:
        return Time()
    whole = math.floor(seconds)
    nanosec = min(round((seconds - whole) * 1e9), 999_999_999)
    return Time(sec=whole, nanosec=nanosec)


def sighting(item: WasteItem) -> Sighting:
    """What the tracker takes of a segmenter's item."""
    outline = np.array([(p.x, p.y) for p in item.outline.points], np.float64).reshape(-1, 2)
    return Sighting(outline, item.class_id, float(item.score), int(item.flags))


def track_message(
    item: Followed, header: Header, pick_line: float, seen: WasteItem | None = None
) -> WasteItem:
    """An item along the belt, in the belt frame.

    Args:
        item: the item.
        header: stamp of the image, frame of the belt.
        pick_line: x of the line that ``pick_time`` is for [m].
        seen: what the segmenter found of it in the image; gives the fields in pixels.
    """
    track, shape = item.track, item.shape
    message = WasteItem(header=header, track_id=track.id, class_id=item.class_name)
    message.score = float(track.score)
    message.length, message.width = track.length, track.width
    height = shape.height if shape is not None and shape.height is not None else 0.0
    message.height = height
    x, y = track.position.tolist()
    _put_on_belt(message, item, x, y, height)
    message.belt_velocity.x, message.belt_velocity.y = track.velocity.tolist()
    message.pick_time = to_stamp(crossing(track, pick_line)[0])
    message.flags = track.flags
    message.pickable, message.reason = not item.reason, item.reason
    if seen is not None:
        message.roi, message.outline = seen.roi, seen.outline
    return message


def pick_message(item: Followed, order: PickOrder, x_m: float, frame: str) -> Pick:
    """An order for an arm that picks at ``x_m`` [m] of the belt frame."""
    stamped = Header(stamp=to_stamp(item.track.stamp_s), frame_id=frame)
    entry = track_message(item, stamped, x_m)
    height = item.shape.height if item.shape and item.shape.height else 0.0
    _put_on_belt(entry, item, x_m, float(item.track.position[1]), height)
    pick = Pick(track_id=order.track_id, arm=order.arm, item=entry)
    pick.header = Header(stamp=to_stamp(order.announced_s), frame_id=frame)
    pick.pick_time = entry.pick_time = to_stamp(order.pick_time_s)
    pick.pick_time_std = float(order.pick_time_sigma_s)
    pick.expiry = to_stamp(order.expiry_s)
    return pick


def _put_on_belt(message: WasteItem, item: Followed, x: float, y: float, height: float) -> None:
    """Fill pose, covariance and grasp of an item whose centre is at x, y [m]."""
    track, shape = item.track, item.shape
    pose = message.pose.pose
    pose.position.x, pose.position.y, pose.position.z = x, y, height / 2
    pose.orientation.z, pose.orientation.w = math.sin(track.yaw / 2), math.cos(track.yaw / 2)
    known = shape is not None and shape.height is not None
    covariance = [0.0] * 36
    covariance[0], covariance[1] = track.covariance[0].tolist()
    covariance[6], covariance[7] = track.covariance[1].tolist()
    # An unknown height is at most about 10 cm; things lie.
    covariance[14] = 0.01**2 if known else 0.05**2
    covariance[21] = covariance[28] = 0.2**2
    covariance[35] = (shape.yaw_sigma if shape is not None else math.pi / math.sqrt(12)) ** 2
    message.pose.covariance = covariance
    grasp = item.grasp
    if grasp is None:
        message.grasp.position = pose.position
        message.grasp.orientation.x, message.grasp.orientation.w = 1.0, 0.0
        return
    place = message.grasp.position
    place.x, place.y = x + grasp.center[0], y + grasp.center[1]
    # A cup comes down on top, jaws close half way up.
    place.z = height if grasp.kind == "suction" else height / 2
    message.grasp_width = float(grasp.width)
    # Half a turn about an axis in the belt turns z down and y to where the jaws close.
    half = grasp.angle / 2 + math.pi / 4
    turn = message.grasp.orientation
    turn.x, turn.y, turn.z, turn.w = math.cos(half), math.sin(half), 0.0, 0.0


def transform(plane: BeltPlane, header: Header, belt_frame: str) -> TransformStamped:
    """The belt frame in the camera's optical frame, which is the header's."""
    message = TransformStamped(header=header, child_frame_id=belt_frame)
    place = message.transform.translation
    place.x, place.y, place.z = plane.translation.tolist()
    turn = message.transform.rotation
    turn.x, turn.y, turn.z, turn.w = quaternion(plane.rotation)
    return message


def quaternion(rotation: Any) -> tuple[float, float, float, float]:
    """x, y, z, w of a rotation (3, 3), by the largest of the four (Shepperd 1978)."""
    r = np.asarray(rotation, np.float64)
    squares = np.array(
        [
            1 + r[0, 0] - r[1, 1] - r[2, 2],
            1 - r[0, 0] + r[1, 1] - r[2, 2],
            1 - r[0, 0] - r[1, 1] + r[2, 2],
            1 + r[0, 0] + r[1, 1] + r[2, 2],
        ]
    )
    products = np.array(
        [
            [0, r[1, 0] + r[0, 1], r[0, 2] + r[2, 0], r[2, 1] - r[1, 2]],
            [r[1, 0] + r[0, 1], 0, r[2, 1] + r[1, 2], r[0, 2] - r[2, 0]],
            [r[0, 2] + r[2, 0], r[2, 1] + r[1, 2], 0, r[1, 0] - r[0, 1]],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], 0],
        ]
    )
    best = int(squares.argmax())
    values = products[best]
    values[best] = squares[best]
    x, y, z, w = (values / np.linalg.norm(values)).tolist()
    return x, y, z, w


def track_markers(
    items: Sequence[Followed], header: Header, classes: Sequence[str], now_s: float
) -> MarkerArray:
    """Outline, box, grasp, name and way to come of each item, in place of those before."""
    shown = [Marker(header=header, action=Marker.DELETEALL)]

    def marker(name: str, kind: int, number: int, color: ColorRGBA, width: float) -> Marker:
        made = Marker(header=header, ns=name, id=number, type=kind, color=color)
        made.pose.orientation.w = 1.0
        made.scale.x = width
        shown.append(made)
        return made

    for item in items:
        track, shape = item.track, item.shape
        message = track_message(item, header, math.inf)
        known = item.class_name in classes
        red, green, blue = class_color(classes.index(item.class_name) + 1 if known else 0)
        seen = 1.0 if not item.reason else 0.4
        color = ColorRGBA(r=red / 255, g=green / 255, b=blue / 255, a=seen)
        faint = ColorRGBA(r=color.r, g=color.g, b=color.b, a=0.3 * seen)
        x, y = track.position.tolist()
        height = max(message.height, 0.005)

        box = marker("boxes", Marker.CUBE, track.id, faint, track.length)
        box.pose = message.pose.pose
        box.scale.y, box.scale.z = max(track.width, 1e-3), height
        box.scale.x = max(track.length, 1e-3)
        if shape is not None:
            outline = marker("outlines", Marker.LINE_STRIP, track.id, color, 0.003)
            corners = (shape.outline + track.position).tolist()
            outline.points = [Point(x=u, y=v, z=height) for u, v in [*corners, corners[0]]]
        grasp = item.grasp
        if grasp is not None and grasp.kind == "suction":
            cup = marker("grasps", Marker.CYLINDER, track.id, color, max(grasp.width, 1e-3))
            cup.pose.position.x, cup.pose.position.y = x + grasp.center[0], y + grasp.center[1]
            cup.pose.position.z = height
            cup.scale.y, cup.scale.z = cup.scale.x, 0.002
        elif grasp is not None:
            jaws = marker("grasps", Marker.LINE_LIST, track.id, color, 0.005)
            jaws.pose = message.grasp
            jaws.points = [Point(y=-grasp.width / 2), Point(y=grasp.width / 2)]
        way = marker("paths", Marker.ARROW, track.id, faint, 0.004)
        ahead = (track.position + PATH * track.velocity).tolist()
        way.points = [Point(x=x, y=y, z=height), Point(x=ahead[0], y=ahead[1], z=height)]
        way.scale.y, way.scale.z = 0.012, 0.02
        text = marker("names", Marker.TEXT_VIEW_FACING, track.id, color, 0.0)
        text.pose.position.x, text.pose.position.y = x, y
        text.pose.position.z = height + 0.02
        text.scale.z = 0.025
        text.text = f"{track.id} {item.class_name} {track.score:.2f}"
        if item.order is not None:
            text.text += f"\n{item.order.arm} in {item.order.pick_time_s - now_s:.1f} s"
        elif item.reason:
            text.text += f"\n{item.reason}"
    return MarkerArray(markers=shown)
