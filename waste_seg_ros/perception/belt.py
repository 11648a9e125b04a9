"""The camera over the belt: between pixels of its image and metres on the belt.

Pixels are those of OpenCV and of a CameraInfo: x right, y down, the middle of the first pixel at
(0, 0). The camera's optical frame is that of REP 103: x right, y down, z away from the camera.
The belt frame is right-handed, with its origin on the belt, x along the belt's motion, y to the
left of it and z up out of the belt; its yaw turns from x to y and lies in (-pi/2, pi/2].

Lenses follow the models of a CameraInfo (REP 104 and sensor_msgs/distortion_models): ``plumb_bob``
(Brown, 1966), ``rational_polynomial`` (Claus and Fitzgibbon, CVPR 2005, as OpenCV has it, thin
prism allowed) and ``equidistant`` (Kannala and Brandt, PAMI 2006). OpenCV undoes the first two by
a fixed-point iteration, which stops early or diverges at the corners of a wide lens; here it is
Newton's method from a table of the lens's radii, exact to rounding wherever the lens is one-to-one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from waste_seg_ros.files import write_file

Floats = NDArray[np.float64]

MODELS = ("none", "plumb_bob", "rational_polynomial", "equidistant")
VERSION = 1
"""Of the calibration file."""

_WIDEST = math.radians(88)
"""No pixel sees the belt at a larger angle from the optical axis than this."""


class BeltError(ValueError):
    """A calibration that cannot be used, or a place that the camera does not see."""


@dataclass(frozen=True, eq=False)
class Camera:
    """A camera and its lens.

    Attributes:
        matrix: (3, 3) float64, focal lengths and middle [px].
        distortion: (k,) float64; k1, k2, p1, p2[, k3[, k4, k5, k6[, s1, s2, s3, s4]]], or
            k1..k4 of an equidistant lens.
        model: one of ``MODELS``.
        size: (width, height) of the images that they hold for [px].

    Raises:
        BeltError: a value does not fit; names it.
    """

    matrix: Floats
    distortion: Floats
    model: str
    size: tuple[int, int]

    def __post_init__(self) -> None:
        matrix = np.array(self.matrix, np.float64)
        distortion = np.array(self.distortion, np.float64).ravel()
        if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
            raise BeltError("camera matrix: must be 3x3 numbers")
        if not (matrix[0, 0] > 0 and matrix[1, 1] > 0) or np.any(matrix[2] != (0, 0, 1)):
            raise BeltError("camera matrix: must be fx 0 cx, 0 fy cy, 0 0 1 with fx, fy above 0")
        if self.model not in MODELS:
            raise BeltError(f"camera model '{self.model}': must be one of {', '.join(MODELS)}")
        if not np.isfinite(distortion).all():
            raise BeltError("camera distortion: must be numbers")
        allowed = {"none": (0,), "equidistant": (4,)}.get(self.model, (0, 4, 5, 8, 12, 14))
        if self.model == "none" and not distortion.any():
            distortion = distortion[:0]
        if len(distortion) not in allowed:
            raise BeltError(
                f"camera distortion: has {len(distortion)} coefficients; {self.model} takes "
                f"{' or '.join(map(str, allowed))}"
            )
        if len(distortion) == 14 and distortion[12:].any():
            raise BeltError(
                "camera distortion: a tilted sensor (coefficients 13 and 14) is not supported; "
                "calibrate with rational_polynomial"
            )
        if min(self.size) < 1:
            raise BeltError(f"camera size {self.size}: must be (width, height) above 0")
        for name, value in (("matrix", matrix), ("distortion", distortion)):
            value.flags.writeable = False
            object.__setattr__(self, name, value)
        object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))

    def scaled(self, size: tuple[int, int]) -> Camera:
        """The camera of the same picture scaled to (width, height).

        Raises:
            BeltError: the aspect differs, so that it is another picture.
        """
        if tuple(size) == self.size:
            return self
        sx, sy = size[0] / self.size[0], size[1] / self.size[1]
        if abs(sx / sy - 1) > 0.01:
            raise BeltError(
                f"the images are {size[0]}x{size[1]}, but the camera was calibrated at "
                f"{self.size[0]}x{self.size[1]}, another aspect; set the camera to that size or "
                "calibrate anew"
            )
        # Pixel edges scale, and the middle of the first pixel is at 0.
        scaling = np.array([[sx, 0, (sx - 1) / 2], [0, sy, (sy - 1) / 2], [0, 0, 1]])
        return Camera(scaling @ self.matrix, self.distortion, self.model, size)

    @property
    def straight(self) -> bool:
        """Whether the lens bends nothing."""
        return self.model != "equidistant" and not self.distortion.any()

    def bend(self, places: Floats) -> tuple[Floats, Floats]:
        """What the lens does.

        Args:
            places: (N, 2) x/z, y/z of what is seen.

        Returns:
            (N, 2) bent places and (N, 2, 2) their derivatives by the places.
        """
        x, y = places.T
        r2 = x * x + y * y
        jacobian = np.empty((len(places), 2, 2))
        if self.model == "equidistant":
            k1, k2, k3, k4 = self.distortion
            r = np.sqrt(r2)
            theta = np.arctan(r)
            t2 = theta * theta
            bent = theta * (1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4))))
            slope = 1 + t2 * (3 * k1 + t2 * (5 * k2 + t2 * (7 * k3 + t2 * 9 * k4)))
            small = r < 1e-4
            safe = np.where(small, 1.0, r)
            gain = np.where(small, 1.0, bent / safe)
            growth = np.where(small, 2 * (k1 - 1 / 3), (slope / (1 + r2) - gain) / safe**2)
            jacobian[:] = growth[:, None, None] * places[:, :, None] * places[:, None, :]
            jacobian[:, 0, 0] += gain
            jacobian[:, 1, 1] += gain
            return places * gain[:, None], jacobian
        k = np.zeros(12)
        k[: min(len(self.distortion), 12)] = self.distortion[:12]
        k1, k2, p1, p2, k3, k4, k5, k6, s1, s2, s3, s4 = k.tolist()
        over = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
        under = 1 + r2 * (k4 + r2 * (k5 + r2 * k6))
        gain = over / under
        # By r squared.
        growth = (k1 + r2 * (2 * k2 + r2 * 3 * k3)) - gain * (k4 + r2 * (2 * k5 + r2 * 3 * k6))
        growth = growth / under
        xy = x * y
        both = 2 * (xy * growth + p1 * x + p2 * y)
        jacobian[:, 0, 0] = gain + 2 * x * x * growth + 2 * p1 * y + 6 * p2 * x
        jacobian[:, 1, 1] = gain + 2 * y * y * growth + 6 * p1 * y + 2 * p2 * x
        jacobian[:, 0, 1] = jacobian[:, 1, 0] = both
        result = np.stack(
            [
                x * gain + 2 * p1 * xy + p2 * (r2 + 2 * x * x),
                y * gain + 2 * p2 * xy + p1 * (r2 + 2 * y * y),
            ],
            axis=1,
        )
        if s1 or s2 or s3 or s4:
            result += np.stack([r2 * (s1 + r2 * s2), r2 * (s3 + r2 * s4)], axis=1)
            rise = 2 * np.stack([s1 + 2 * s2 * r2, s3 + 2 * s4 * r2], axis=1)
            jacobian += rise[:, :, None] * places[:, None, :]
        return result, jacobian

    def unbend(self, bent: Floats) -> Floats:
        """The places (N, 2) that the lens bends to these; NaN where there are none."""
        if self.straight:
            return bent
        radii, bent_radii = self._radii
        radius = np.hypot(bent[:, 0], bent[:, 1])
        safe = np.where(radius > 0, radius, 1.0)
        places = bent * (np.interp(radius, bent_radii, radii) / safe)[:, None]
        with np.errstate(all="ignore"):
            for _ in range(30):
                value, (((a, b), (c, d))) = _matrix(self.bend(places))
                ex, ey = (value - bent).T
                step = np.stack([d * ex - b * ey, a * ey - c * ex], axis=1)
                step /= (a * d - b * c)[:, None]
                places = places - step
                size = np.abs(step) / (1 + np.abs(places))
                if not np.any(size > 1e-14):  # NaN goes on being NaN
                    break
            off = np.abs(self.bend(places)[0] - bent).max(axis=1)
            lost = ~(off < 1e-9 * (1 + radius)) | ~(np.hypot(*places.T) <= radii[-1] * 1.001)
        places[lost] = np.nan
        return places

    @cached_property
    def _radii(self) -> tuple[Floats, Floats]:
        """Radii and what the lens makes of them, as far as it is one-to-one."""
        radii = np.tan(np.linspace(0, _WIDEST, 2048))
        k = self.distortion.copy()
        if self.model != "equidistant":
            k[2:4] = 0
            k[8:] = 0
        radial = Camera(self.matrix, k, self.model, self.size)
        with np.errstate(all="ignore"):
            bent = radial.bend(np.stack([radii, np.zeros_like(radii)], axis=1))[0][:, 0]
            stop = np.flatnonzero(~(np.diff(bent) > 0))
        count = int(stop[0]) + 1 if len(stop) else len(radii)
        if count < 2:
            raise BeltError("camera distortion: the lens bends everything to one place")
        return radii[:count], bent[:count]


@dataclass(frozen=True, eq=False)
class BeltPlane:
    """Where the belt is: the pose of the belt frame in the camera's optical frame.

    Attributes:
        rotation: (3, 3) float64; its columns are the belt's axes seen by the camera.
        translation: (3,) float64, the belt's origin [m].
        error_m: standard deviation of the belt's place along each axis, as calibrated [m].

    Raises:
        BeltError: it is no rotation, or the camera is not above the belt.
    """

    rotation: Floats
    translation: Floats
    error_m: float = 0.0

    def __post_init__(self) -> None:
        rotation = np.array(self.rotation, np.float64)
        translation = np.array(self.translation, np.float64).ravel()
        if rotation.shape != (3, 3) or not np.isfinite(rotation).all():
            raise BeltError("belt rotation: must be 3x3 numbers")
        if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-5 or np.linalg.det(rotation) < 0:
            raise BeltError("belt rotation: its columns must be right-handed unit axes")
        if translation.shape != (3,) or not np.isfinite(translation).all():
            raise BeltError("belt translation: must be 3 numbers [m]")
        if not (math.isfinite(self.error_m) and self.error_m >= 0):
            raise BeltError(f"belt error_m is {self.error_m}; it must be at least 0 [m]")
        for name, value in (("rotation", rotation), ("translation", translation)):
            value.flags.writeable = False
            object.__setattr__(self, name, value)
        if self.camera[2] <= 0:
            raise BeltError("belt pose: the camera is below the belt; z must point out of the belt")

    @property
    def camera(self) -> Floats:
        """(3,) the camera in the belt frame [m]; the last is its height above the belt."""
        return -self.rotation.T @ self.translation


@dataclass(frozen=True, eq=False)
class RobotBase:
    """Hand-eye: the pose of a robot's base in the belt frame.

    Attributes:
        xyz: its place [m].
        rpy: roll, pitch, yaw about the belt's fixed x, y, z axes (REP 103) [rad].
    """

    xyz: tuple[float, float, float]
    rpy: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def rotation(self) -> Floats:
        """(3, 3) its axes as columns, in the belt frame."""
        (cr, cp, cy), (sr, sp, sy) = np.cos(self.rpy), np.sin(self.rpy)
        return np.array(
            [
                [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
                [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
                [-sp, cp * sr, cp * cr],
            ]
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a calibration file holds.

    Attributes:
        camera, plane: the camera and the belt.
        robot: the robot's base, if it was given.
        speed: of the belt while it was calibrated [m/s], if it was measured.
        report: how good it is and what it was made from; for people.
    """

    camera: Camera
    plane: BeltPlane
    robot: RobotBase | None = None
    speed: float | None = None
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class BeltItem:
    """An item in the belt frame [m, rad].

    Attributes:
        position: (2,) centroid of its outline.
        yaw: of its long axis, (-pi/2, pi/2].
        length, width: sides of the smallest rectangle around it, length >= width.
        outline: (K, 2) counter-clockwise seen from above.
        covariance: (3, 3) of x, y, yaw.
        height: above the belt, None where it is not measured.
    """

    position: Floats
    yaw: float
    length: float
    width: float
    outline: Floats
    covariance: Floats
    height: float | None = None


def default_plane(distance: float) -> BeltPlane:
    """The belt of a camera that looks straight down on it, moving to the right in the image.

    Args:
        distance: from the camera to the belt [m].

    Raises:
        BeltError: the distance is not above 0.
    """
    return BeltPlane(np.diag([1.0, -1.0, -1.0]), np.array([0.0, 0.0, distance]))


def default_camera(size: tuple[int, int]) -> Camera:
    """A camera of which nothing is known: its focal length is the image's width."""
    width, height = size
    matrix = np.array([[width, 0, (width - 1) / 2], [0, width, (height - 1) / 2], [0, 0, 1.0]])
    return Camera(matrix, np.zeros(0), "none", size)


def camera_from_info(info: Any, image_size: tuple[int, int]) -> Camera:
    """The camera of a raw (not rectified) image.

    Args:
        info: sensor_msgs/CameraInfo, or any object with its fields, or None. Its K is of the full
            sensor image; region of interest, binning and later scaling are allowed for.
        image_size: (width, height) of the image [px].

    Returns:
        the camera; ``default_camera`` where there is no calibration (none, or K of zeros).

    Raises:
        BeltError: the fields do not fit together.
    """
    if info is None or not (info.k[0] > 0 and info.k[4] > 0):
        return default_camera(image_size)
    width, height = image_size
    roi = info.roi
    sx = width / (roi.width or info.width or width)
    sy = height / (roi.height or info.height or height)
    matrix = np.array(info.k, np.float64).reshape(3, 3)
    scaling = np.array(
        [
            [sx, 0, sx * (0.5 - roi.x_offset) - 0.5],
            [0, sy, sy * (0.5 - roi.y_offset) - 0.5],
            [0, 0, 1],
        ]
    )
    distortion = np.array(info.d, np.float64)
    model = info.distortion_model or ("plumb_bob" if len(distortion) else "none")
    if model != "equidistant" and not distortion.any():
        model, distortion = "none", distortion[:0]
    return Camera(scaling @ matrix, distortion, model, image_size)


def to_belt(
    camera: Camera, plane: BeltPlane, pixels: ArrayLike, height_m: ArrayLike = 0.0
) -> Floats:
    """Where on the belt pixels are seen.

    Args:
        camera: the camera.
        plane: the belt.
        pixels: (N, 2).
        height_m: of what is seen there, above the belt: one for all, or (N,) [m].

    Returns:
        (N, 2) x, y in the belt frame [m].

    Raises:
        BeltError: a pixel sees no belt: it is above the horizon, outside of what the lens maps, or
            the height is at or above the camera. An arm must not be sent to such a place.
    """
    return _rays(camera, plane, pixels, height_m)[0]


def to_pixels(camera: Camera, plane: BeltPlane, points: ArrayLike) -> Floats:
    """Where in the image places of the belt are seen.

    Args:
        camera: the camera.
        plane: the belt.
        points: (N, 2) on the belt, or (N, 3) above it [m].

    Returns:
        (N, 2) pixels, perhaps beside the image; NaN for what is behind the camera or where the
        lens's model folds back.
    """
    points = np.asarray(points, np.float64)
    if points.shape[1] == 2:
        points = np.column_stack([points, np.zeros(len(points))])
    return project(camera, points @ plane.rotation.T + plane.translation)


def project(camera: Camera, points: Floats) -> Floats:
    """Pixels (N, 2) of points (N, 3) in the optical frame; NaN as in ``to_pixels``."""
    depth = points[:, 2]
    seen = depth > 1e-9
    places = points[:, :2] / np.where(seen, depth, 1.0)[:, None]
    if not camera.straight:
        seen &= np.hypot(places[:, 0], places[:, 1]) <= camera._radii[0][-1] * 1.001
        with np.errstate(all="ignore"):
            places = camera.bend(places)[0]
    pixels = places @ camera.matrix[:2, :2].T + camera.matrix[:2, 2]
    pixels[~seen] = np.nan
    return pixels


def directions(camera: Camera, pixels: ArrayLike) -> Floats:
    """The x/z, y/z (N, 2) in the optical frame that pixels see; NaN where the lens maps nothing."""
    inverse = np.linalg.inv(camera.matrix[:2, :2])
    offsets: Floats = np.asarray(pixels, np.float64).reshape(-1, 2) - camera.matrix[:2, 2]
    return camera.unbend(offsets @ inverse.T)


def position_jacobian(
    camera: Camera, plane: BeltPlane, pixels: ArrayLike, height_m: ArrayLike = 0.0
) -> tuple[Floats, Floats]:
    """How places on the belt move.

    Returns:
        (N, 2, 2) derivative of x, y by the pixel [m/px], and (N, 2) by the height [m/m].

    Raises:
        BeltError: as ``to_belt``.
    """
    _, places, ray, reach = _rays(camera, plane, pixels, height_m)
    by_height = ray[:, :2] / ray[:, 2:]
    # The ray is R' (x, y, 1), and the place is the camera's plus reach times the ray.
    turn = plane.rotation.T
    by_place = reach[:, None, None] * (
        turn[None, :2, :2] - by_height[:, :, None] * turn[None, None, 2, :2]
    )
    lens = np.linalg.inv(camera.matrix[:2, :2])[None]
    if not camera.straight:
        lens = np.linalg.inv(camera.bend(places)[1]) @ lens
    return by_place @ lens, by_height


def position_covariance(
    camera: Camera,
    plane: BeltPlane,
    pixel: ArrayLike,
    pixel_sigma: float,
    height_m: float = 0.0,
    height_sigma_m: float = 0.0,
) -> Floats:
    """Covariance (2, 2) of a place on the belt [m^2].

    Args:
        camera: the camera.
        plane: the belt; its ``error_m`` along each axis adds to the covariance.
        pixel: (2,) where it is seen.
        pixel_sigma: standard deviation of each of its coordinates [px].
        height_m: of what is seen there above the belt.
        height_sigma_m: standard deviation of that height.

    Raises:
        BeltError: as ``to_belt``.
    """
    (by_pixel,), (by_height,) = position_jacobian(camera, plane, np.atleast_2d(pixel), height_m)
    up = plane.error_m**2 + height_sigma_m**2
    return (
        pixel_sigma**2 * (by_pixel @ by_pixel.T)
        + plane.error_m**2 * np.eye(2)
        + up * np.outer(by_height, by_height)
    )


def describe_on_belt(
    outline_px: ArrayLike,
    camera: Camera,
    plane: BeltPlane,
    *,
    pixel_sigma: float = 1.0,
    height_m: float | None = None,
    height_sigma_m: float = 0.0,
    tolerance_m: float = 0.002,
) -> BeltItem:
    """Measure an item on the belt.

    The outline is taken to lie half as high as the item: that is right for what is round, and
    between bottom and top for what is not; the covariance allows for either.

    Args:
        outline_px: (K, 2) its outline in the image, K >= 3.
        camera: the camera.
        plane: the belt.
        pixel_sigma: standard deviation of the outline's place in the image [px].
        height_m: of the item, None where it is not measured.
        height_sigma_m: standard deviation of the outline's height above the belt where the height
            is not measured.
        tolerance_m: how far the simplified outline may be from the full one.

    Raises:
        BeltError: the outline has fewer than 3 points, or as ``to_belt``.
    """
    pixels = np.asarray(outline_px, np.float64).reshape(-1, 2)
    if len(pixels) < 3:
        raise BeltError(f"an outline needs 3 points, not {len(pixels)}")
    rim = (height_m or 0.0) / 2
    rim_sigma = height_sigma_m if height_m is None else height_m / math.sqrt(12)
    outline = to_belt(camera, plane, pixels, rim)
    position, area = _centroid(outline)
    if area < 0:
        outline = outline[::-1]
    # Millimetres around the middle: OpenCV has 24 bits.
    local = ((outline - position) * 1000).astype(np.float32)
    _, (first, second), degrees = cv2.minAreaRect(local)
    yaw = math.radians(degrees)
    if first < second:
        first, second, yaw = second, first, yaw + math.pi / 2
    length, width = first / 1000, second / 1000
    simple = cv2.approxPolyDP(local, 1000 * tolerance_m, True)[:, 0] if tolerance_m > 0 else local
    if len(simple) >= 3:
        outline = simple.astype(np.float64) / 1000 + position
    seen = to_pixels(camera, plane, [[*position, rim]])[0]
    covariance = np.zeros((3, 3))
    covariance[:2, :2] = position_covariance(camera, plane, seen, pixel_sigma, rim, rim_sigma)
    (by_pixel,), _ = position_jacobian(camera, plane, seen[None], rim)
    side = pixel_sigma * math.sqrt(np.square(by_pixel).sum() / 2)
    # A round item has no long axis: its yaw is anything, evenly.
    spread = min(math.atan2(side, (length - width) / 2), math.pi / math.sqrt(12))
    covariance[2, 2] = spread**2
    yaw = math.remainder(yaw, math.pi)
    if yaw <= -math.pi / 2:
        yaw += math.pi
    return BeltItem(position, yaw, length, width, outline, covariance, height_m)


def height_from_depth(
    depth: NDArray[Any], outline_px: ArrayLike, camera: Camera, plane: BeltPlane
) -> float | None:
    """Height of an item above the belt [m].

    Args:
        depth: (H, W) registered to the camera's image, at any scale of it; floats in metres or
            uint16 in millimetres (REP 118), 0 or NaN where nothing was measured.
        outline_px: (K, 2) outline of the item in the camera's image.
        camera: the camera.
        plane: the belt.

    Returns:
        the height that a twentieth of the item's pixels exceeds, at least 0; None where fewer than
        a fifth of its pixels, or than 12, were measured.

    Raises:
        BeltError: the depth image is not (H, W) floats or uint16.
    """
    if depth.ndim != 2 or not (depth.dtype == np.uint16 or depth.dtype.kind == "f"):
        raise BeltError(f"depth is {depth.shape} {depth.dtype}; it must be (H, W) float or uint16")
    height, width = depth.shape
    scale = np.array([width / camera.size[0], height / camera.size[1]])
    outline = (np.asarray(outline_px, np.float64).reshape(-1, 2) + 0.5) * scale - 0.5
    corner = np.maximum(np.floor(outline.min(axis=0)).astype(int), 0)
    end = np.minimum(np.ceil(outline.max(axis=0)).astype(int) + 1, (width, height))
    if (end <= corner).any():
        return None
    inside = np.zeros((end - corner)[::-1], np.uint8)
    shift = 16
    cv2.fillPoly(inside, [np.round((outline - corner) * shift).astype(np.int32)], (1,), 8, 4)
    # Depth cameras smear edges: without the rim, unless nothing else is left.
    core = cv2.erode(inside, np.ones((3, 3), np.uint8), borderValue=(0,))
    rows, columns = np.nonzero(core if np.count_nonzero(core) >= 12 else inside)
    every = max(1, len(rows) // 800)
    rows, columns = rows[::every] + corner[1], columns[::every] + corner[0]
    distance = depth[rows, columns].astype(np.float64)
    if depth.dtype == np.uint16:
        distance /= 1000
    valid = np.isfinite(distance) & (distance > 0)
    if np.count_nonzero(valid) < max(12, 0.2 * len(rows)):
        return None
    distance = distance[valid]
    pixels = np.stack([columns[valid], rows[valid]], axis=1)
    rays = directions(camera, (pixels + 0.5) / scale - 0.5)
    points = np.column_stack([rays, np.ones(len(rays))]) * distance[:, None]
    up = (points - plane.translation) @ plane.rotation[:, 2]
    up = up[np.isfinite(up)]
    return max(0.0, float(np.percentile(up, 95))) if len(up) else None


def to_robot(robot: RobotBase, points: ArrayLike) -> Floats:
    """Points (N, 3) of the belt frame in the frame of the robot's base [m]."""
    return (np.asarray(points, np.float64).reshape(-1, 3) - robot.xyz) @ robot.rotation


def rotation_to_robot(robot: RobotBase, rotation: ArrayLike) -> Floats:
    """An orientation (3, 3) in the belt frame, such as a grasp's, in that of the robot's base."""
    return robot.rotation.T @ np.asarray(rotation, np.float64)


def yaw_rotation(yaw: float) -> Floats:
    """(3, 3) turn about z by yaw [rad]."""
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


# --- files ----------------------------------------------------------------------------------------

_HEAD = """\
# Written by waste-seg calibrate. Metres, radians, pixels.
# belt: pose of the belt frame (x along its motion, y to the left, z up) in the camera's optical
# frame: p_camera = rotation p_belt + translation.
# robot (optional): pose of the robot's base in the belt frame, xyz and rpy about fixed axes.
"""


def write_calibration(path: Path | str, calibration: Calibration) -> None:
    """Write a calibration file, whole or not at all. Raises OSError."""
    camera, plane = calibration.camera, calibration.plane
    data: dict[str, Any] = {
        "version": VERSION,
        "camera": {
            "width": camera.size[0],
            "height": camera.size[1],
            "model": camera.model,
            "matrix": camera.matrix.tolist(),
            "distortion": camera.distortion.tolist(),
        },
        "belt": {
            "rotation": plane.rotation.tolist(),
            "translation": plane.translation.tolist(),
            "error_m": float(plane.error_m),
        },
    }
    if calibration.robot is not None:
        data["robot"] = {
            "xyz": [float(v) for v in calibration.robot.xyz],
            "rpy": [float(v) for v in calibration.robot.rpy],
        }
    if calibration.speed is not None:
        data["speed_m_s"] = float(calibration.speed)
    if calibration.report:
        data["report"] = dict(calibration.report)
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)
    write_file(Path(path), (_HEAD + text).encode())


def read_calibration(path: Path | str) -> Calibration:
    """Read a calibration file.

    Raises:
        BeltError: it is missing, or a key of it is missing, not known or does not fit; names both.
    """
    top = _Section(path, _read_yaml(path))
    top.known("version", "camera", "belt", "robot", "speed_m_s", "report")
    version = top.value("version")
    if version != VERSION:
        raise top.error("version", f"is {version}; this version of waste_seg_ros reads {VERSION}")
    camera = _read_camera(top.section("camera"))
    belt = top.section("belt")
    belt.known("rotation", "translation", "error_m")
    try:
        plane = BeltPlane(
            belt.numbers("rotation", (3, 3)),
            belt.numbers("translation", (3,)),
            float(belt.numbers("error_m", ())),
        )
    except _NamedError:
        raise
    except BeltError as error:
        raise BeltError(f"{path}: {error}") from error
    robot = None
    if "robot" in top.data:
        part = top.section("robot")
        part.known("xyz", "rpy")
        x, y, z = part.numbers("xyz", (3,)).tolist()
        roll, pitch, yaw = part.numbers("rpy", (3,)).tolist()
        robot = RobotBase((x, y, z), (roll, pitch, yaw))
    speed = float(top.numbers("speed_m_s", ())) if "speed_m_s" in top.data else None
    report = top.section("report").data if "report" in top.data else {}
    return Calibration(camera, plane, robot, speed, report)


def read_camera_info(path: Path | str) -> Camera:
    """Read intrinsics: a YAML file of ROS's camera_calibration, or one of ours.

    Raises:
        BeltError: as ``read_calibration``.
    """
    top = _Section(path, _read_yaml(path))
    if "camera" in top.data and "camera_matrix" not in top.data:
        return _read_camera(top.section("camera"))
    size = int(top.numbers("image_width", ())), int(top.numbers("image_height", ()))
    matrix = top.section("camera_matrix").numbers("data", (9,)).reshape(3, 3)
    model = top.value("distortion_model") if "distortion_model" in top.data else "plumb_bob"
    distortion = np.zeros(0)
    if "distortion_coefficients" in top.data:
        distortion = top.section("distortion_coefficients").numbers("data", None)
    if model in ("plumb_bob", "rational_polynomial") and not distortion.any():
        model, distortion = "none", distortion[:0]
    try:
        return Camera(matrix, distortion, str(model), size)
    except BeltError as error:
        raise BeltError(f"{path}: {error}") from error


class _NamedError(BeltError):
    """One that names the file already."""


@dataclass(frozen=True, eq=False)
class _Section:
    """A mapping in a YAML file; errors name the file and the key."""

    path: Path | str
    data: Mapping[str, Any]
    name: str = ""

    def error(self, key: str, problem: str) -> BeltError:
        return _NamedError(f"{self.path}: {self.name}{key}: {problem}")

    def known(self, *keys: str) -> None:
        for key in self.data:
            if key not in keys:
                raise self.error(str(key), f"is not known here; known are {', '.join(keys)}")

    def value(self, key: str) -> Any:
        if key not in self.data:
            raise self.error(key, "is missing")
        return self.data[key]

    def section(self, key: str) -> _Section:
        data = self.value(key)
        if not isinstance(data, dict):
            raise self.error(key, "must be a mapping")
        return _Section(self.path, data, f"{self.name}{key}.")

    def numbers(self, key: str, shape: tuple[int, ...] | None) -> Floats:
        """Finite numbers of that shape; of any one-dimensional one for None."""
        value = self.value(key)
        try:
            if isinstance(value, bool):  # NumPy would read it
                raise ValueError
            # Also texts of numbers: YAML 1.1 takes 1e-5, without a point, for one.
            array = np.array(value, np.float64)
            fits = array.ndim == 1 if shape is None else array.shape == shape
        except (TypeError, ValueError):
            fits = False
        if not fits or not np.isfinite(array).all():
            what = "a list of numbers" if shape is None else "a number"
            if shape:
                what = "x".join(map(str, shape)) + " numbers"
            raise self.error(key, f"must be {what}")
        return array


def _read_yaml(path: Path | str) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BeltError(f"{path}: no such file") from error
    except OSError as error:
        raise BeltError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BeltError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise BeltError(f"{path}: must be a mapping of keys to values")
    return data


def _read_camera(section: _Section) -> Camera:
    section.known("width", "height", "model", "matrix", "distortion")
    size = int(section.numbers("width", ())), int(section.numbers("height", ()))
    matrix, distortion = section.numbers("matrix", (3, 3)), section.numbers("distortion", None)
    try:
        return Camera(matrix, distortion, str(section.value("model")), size)
    except _NamedError:
        raise
    except BeltError as error:
        raise BeltError(f"{section.path}: {error}") from error


# --- geometry -------------------------------------------------------------------------------------


def _matrix(bent: tuple[Floats, Floats]) -> tuple[Floats, Any]:
    """The value, and the four entries of the (N, 2, 2) matrices as arrays."""
    value, jacobian = bent
    return value, jacobian.transpose(1, 2, 0)


def _rays(
    camera: Camera, plane: BeltPlane, pixels: ArrayLike, height_m: ArrayLike
) -> tuple[Floats, Floats, Floats, Floats]:
    """Places on the belt (N, 2), in the image plane (N, 2), rays (N, 3) and how far (N,)."""
    pixels = np.asarray(pixels, np.float64).reshape(-1, 2)
    places = directions(camera, pixels)
    ray = places @ plane.rotation[:2] + plane.rotation[2]
    center = plane.camera
    rise = np.asarray(height_m, np.float64) - center[2]
    if np.any(rise >= 0):
        raise BeltError(
            f"height {np.max(height_m):.3f} m is not below the camera, "
            f"which is {center[2]:.3f} m above the belt"
        )
    # Below half a degree under the horizon a pixel spans metres of belt.
    low = ray[:, 2] < -0.008 * np.sqrt(1 + np.square(places).sum(axis=1))
    if not low.all():  # also where NaN
        x, y = pixels[~low][0]
        raise BeltError(
            f"pixel ({x:.1f}, {y:.1f}) sees no belt: it is above the horizon or outside of what "
            "the lens's model maps; leave such pixels out, or calibrate anew"
        )
    reach = rise / ray[:, 2]
    return center[:2] + reach[:, None] * ray[:, :2], places, ray, reach


def _centroid(polygon: Floats) -> tuple[Floats, float]:
    """Centre of area and signed area (counter-clockwise positive) of a polygon (K, 2)."""
    middle = polygon.mean(axis=0)
    local = polygon - middle
    following = np.roll(local, -1, axis=0)
    cross = local[:, 0] * following[:, 1] - local[:, 1] * following[:, 0]
    area = float(cross.sum()) / 2
    if abs(area) < 1e-10:  # a tenth of a square millimetre in a thousand: a line
        return middle, area
    center = ((local + following) * cross[:, None]).sum(axis=0) / (6 * area)
    return middle + center, area
