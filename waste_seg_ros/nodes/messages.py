"""From pixels of an image to messages in metres: one place for geometry and field order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from geometry_msgs.msg import Point, Point32, Polygon, Pose
from std_msgs.msg import ColorRGBA
from visualization_msgs.msg import Marker, MarkerArray

from waste_seg_ros.msg import WasteItem, WasteItemArray
from waste_seg_ros.perception.draw import class_color
from waste_seg_ros.perception.items import Item

UNKNOWN_CLASS = "item"
"""``class_id`` of an item of which only is known that it is one."""


@dataclass(frozen=True)
class BeltPlane:
    """The belt as the plane z = distance in the camera's optical frame (REP 103).

    Attributes:
        fx, fy: focal lengths [px].
        cx, cy: where the optical axis meets the image [px].
        distance: from the camera to the belt [m].
    """

    fx: float
    fy: float
    cx: float
    cy: float
    distance: float

    def point(self, u: float, v: float) -> tuple[float, float]:
        """Place on the belt (x, y) [m] that is seen at column u and row v."""
        return self.vector(u - self.cx, v - self.cy)

    def vector(self, du: float, dv: float) -> tuple[float, float]:
        """Way on the belt (x, y) [m] that appears as so many columns and rows."""
        return du * self.distance / self.fx, dv * self.distance / self.fy

    @property
    def pixels_per_metre(self) -> float:
        """On the belt, the mean of both axes."""
        return math.sqrt(self.fx * self.fy) / self.distance


def belt_plane(camera_info: Any, image_size: tuple[int, int], distance: float) -> BeltPlane:
    """Intrinsics of an image.

    Args:
        camera_info: sensor_msgs/CameraInfo, or None. Its K is of the full sensor image; region of
            interest, binning and a later scaling of the image are allowed for.
        image_size: (width, height) of the image [px].
        distance: from the camera to the belt [m].

    Returns:
        the plane; without calibration (none, or K of zeros) with focal lengths of the image's
        width and the optical axis in its middle.
    """
    width, height = image_size
    if not is_calibrated(camera_info):
        return BeltPlane(width, width, (width - 1) / 2, (height - 1) / 2, distance)
    k, roi = camera_info.k, camera_info.roi
    seen_width = roi.width or camera_info.width or width
    seen_height = roi.height or camera_info.height or height
    # Binning and scaling alike: the image's pixels per pixel of the region of the sensor. Pixel
    # edges scale, and the middle of the first pixel is at 0.
    sx, sy = width / seen_width, height / seen_height
    cx = (k[2] - roi.x_offset + 0.5) * sx - 0.5
    cy = (k[5] - roi.y_offset + 0.5) * sy - 0.5
    return BeltPlane(k[0] * sx, k[4] * sy, cx, cy, distance)


def is_calibrated(camera_info: Any) -> bool:
    """Whether a sensor_msgs/CameraInfo is there and holds intrinsics."""
    return camera_info is not None and camera_info.k[0] > 0 and camera_info.k[4] > 0


def item_message(
    item: Item, header: Any, class_names: Sequence[str], plane: BeltPlane, pixel_error: float
) -> WasteItem:
    """Put an item on the belt.

    Args:
        item: in pixels of the camera's image.
        header: of that image.
        class_names: of the labels 1..C.
        plane: the belt.
        pixel_error: standard deviation of a place in the image [px], about a network pixel.
    """
    message = WasteItem(header=header, track_id=item.id, score=item.score)
    message.class_id = class_names[item.class_index - 1] if item.class_index else UNKNOWN_CLASS
    message.length, yaw = _span(item.length, item.angle, plane)
    message.width, _ = _span(item.width, item.angle + math.pi / 2, plane)
    _set_pose(message.pose.pose, item.center, yaw, plane)
    message.pose.covariance = _covariance(item, plane, pixel_error)
    message.grasp_width, jaws = _span(item.grasp_width, item.grasp_angle, plane)
    # The jaws close along the grasp frame's y axis.
    _set_pose(message.grasp, item.grasp_center, jaws - math.pi / 2, plane)
    roi = message.roi
    roi.x_offset, roi.y_offset, roi.width, roi.height = item.roi
    points = [Point32(x=x, y=y) for x, y in item.outline.tolist()]
    message.outline = Polygon(points=points)
    message.pickable, message.reason = item.pickable, item.reason
    message.flags = (
        WasteItem.FLAG_TOUCHING * item.touching
        | WasteItem.FLAG_TRUNCATED * item.truncated
        | WasteItem.FLAG_UNCERTAIN * item.uncertain
    )
    return message


def markers(array: WasteItemArray, classes: Sequence[str]) -> MarkerArray:
    """Box, grasp and name of each item, in place of those of the image before."""
    shown = [Marker(header=array.header, action=Marker.DELETEALL)]
    for item in array.items:
        known = item.class_id in classes
        red, green, blue = class_color(classes.index(item.class_id) + 1 if known else 0)
        color = ColorRGBA(r=red / 255, g=green / 255, b=blue / 255, a=1.0 if item.pickable else 0.4)
        box = Marker(header=array.header, ns="items", id=item.track_id, type=Marker.CUBE)
        box.pose = item.pose.pose
        box.scale.x, box.scale.y, box.scale.z = item.length, item.width, 0.01
        box.color = ColorRGBA(r=color.r, g=color.g, b=color.b, a=0.5 * color.a)
        grasp = Marker(header=array.header, ns="grasps", id=item.track_id, type=Marker.LINE_LIST)
        grasp.pose = item.grasp
        grasp.scale.x = 0.004
        grasp.color = color
        half = item.grasp_width / 2
        grasp.points = [Point(y=-half), Point(y=half)]
        text = Marker(header=array.header, ns="names", id=item.track_id)
        text.type = Marker.TEXT_VIEW_FACING
        text.pose = item.pose.pose
        text.scale.z = 0.03
        text.color = color
        text.text = f"{item.class_id} {item.score:.2f}"
        if not item.pickable:
            text.text += f"\n{item.reason}"
        shown += [box, grasp, text]
    return MarkerArray(markers=shown)


def _span(pixels: float, angle: float, plane: BeltPlane) -> tuple[float, float]:
    """Length [m] and direction on the belt of a line of so many pixels at an angle in the image.

    Image axes (x right, y down) are the optical frame's, so that an angle from x to y is a turn
    about its z axis; they differ only where pixels are not square.
    """
    x, y = plane.vector(pixels * math.cos(angle), pixels * math.sin(angle))
    dx, dy = plane.vector(math.cos(angle), math.sin(angle))
    return math.hypot(x, y), math.atan2(dy, dx)


def _set_pose(pose: Pose, pixel: tuple[float, float], yaw: float, plane: BeltPlane) -> None:
    pose.position.x, pose.position.y = plane.point(*pixel)
    pose.position.z = plane.distance
    pose.orientation.z, pose.orientation.w = math.sin(yaw / 2), math.cos(yaw / 2)


def _covariance(item: Item, plane: BeltPlane, pixel_error: float) -> list[float]:
    """Row-major 6x6 covariance of x, y, z, and turns about x, y, z."""
    x, y = plane.vector(pixel_error, pixel_error)
    # A round item has no long axis: its direction is anything.
    yaw = math.atan2(pixel_error, max(item.length - item.width, 0.0) / 2)
    # Height above the belt and tilt are not measured: items are up to about 10 cm high and lie.
    deviations = (x, y, 0.05, 0.2, 0.2, yaw)
    covariance = [0.0] * 36
    for k, deviation in enumerate(deviations):
        covariance[7 * k] = deviation**2
    return covariance
