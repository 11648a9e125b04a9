"""``waste-seg calibrate``: the camera and the belt under it, from a board that lies on the belt.

The intrinsics come from views of a board held at various tilts (Zhang, PAMI 2000, by OpenCV), or
from a file. The belt is the plane of the board in the views in which it lies on the belt, fitted to
the corners of all of them at once. The belt frame has its origin under the middle of the board in
the first of these views (or where ``--at`` says), x along the belt's motion, y to the left of it
and z up.

Every view must pass: the board found, large enough in the image, not blurred, not seen too
obliquely. What is reported as error is measured on the belt: how far corners lie from their place
on the board, what each corner would be off by if the fit had not known it (leave-one-out, exact to
first order), and how uncertain places all over the image are for the fit's covariance.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.data.photographs import SUFFIXES, read_image
from waste_seg_ros.files import write_png
from waste_seg_ros.perception.belt import (
    BeltError,
    BeltPlane,
    Calibration,
    Camera,
    Floats,
    RobotBase,
    camera_from_info,
    directions,
    position_jacobian,
    project,
    read_camera_info,
    to_belt,
    to_pixels,
    write_calibration,
)

Image = NDArray[np.uint8]

LEAST_VIEWS = 4
"""For intrinsics."""
LEAST_CORNERS = 8
LEAST_SPACING = 8.0
"""Between neighbouring corners [px]."""
MOST_OBLIQUE = 65.0
"""Between the board's normal and the line of sight [deg]."""
LEAST_SPREAD = 10.0
"""Between the tilts of two of the views for intrinsics [deg]."""
MOST_OFF_PLANE = 0.01
"""By which a board may be off the plane of all [m]."""
MOST_DIRECTION_ERROR = 0.5
"""Of the belt's motion [deg]."""

_LEAST_NOISE = 0.02
"""Of corners [px]: a fit that claims less was lucky."""


# --- boards ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Board:
    """A calibration board. Its own frame: x along its rows, y down its columns, as it is looked at.

    Attributes:
        kind: "checkerboard", "charuco" or "aruco" (a grid of markers).
        columns, rows: of inner corners (checkerboard, as ROS counts), squares (charuco) or
            markers (aruco).
        square: side of a square, or of a marker of an aruco board [m].
        inner: side of the marker within a square (charuco), or gap between markers (aruco) [m].
        dictionary: of the markers, such as "4X4_50".
        legacy: a charuco board of OpenCV before 4.6, whose first square is white.
    """

    kind: str
    columns: int
    rows: int
    square: float
    inner: float = 0.0
    dictionary: str = ""
    legacy: bool = False

    @property
    def turns(self) -> int:
        """In how many ways it looks the same."""
        if self.kind != "checkerboard":
            return 1
        return 4 if self.columns == self.rows else 2

    def corners(self) -> Floats:
        """(N, 2) all its corners, by their ids [m]."""
        if self.kind == "checkerboard":
            grid = np.mgrid[: self.rows, : self.columns].reshape(2, -1)[::-1].T
            return grid * self.square
        if self.kind == "charuco":
            return np.asarray(self._cv().getChessboardCorners(), np.float64)[:, :2]
        return np.concatenate(self._cv().getObjPoints()).astype(np.float64)[:, :2]

    def edges(self) -> NDArray[np.intp]:
        """(M, 3) ids of the two ends of each edge between black and white, and its direction."""
        if self.kind == "aruco":
            side = np.array([[0, 1, 0], [1, 2, 1], [2, 3, 0], [3, 0, 1]])
            start = 4 * np.arange(self.columns * self.rows)[:, None, None] * np.array([1, 1, 0])
            return (side + start).reshape(-1, 3)
        columns, rows = self.columns, self.rows
        if self.kind == "charuco":
            columns, rows = columns - 1, rows - 1
        ids = np.arange(columns * rows).reshape(rows, columns)
        across = np.stack([ids[:, :-1].ravel(), ids[:, 1:].ravel()], axis=1)
        down = np.stack([ids[:-1].ravel(), ids[1:].ravel()], axis=1)
        kind = np.repeat([0, 1], [len(across), len(down)])
        return np.column_stack([np.concatenate([across, down]), kind])

    def find(self, grey: Image) -> tuple[NDArray[np.intp], Floats]:
        """Ids (N,) and pixels (N, 2) of its corners in an image; none where it is not seen."""
        nothing = np.zeros(0, np.intp), np.zeros((0, 2))
        if self.kind == "checkerboard":
            flags = cv2.CALIB_CB_NORMALIZE_IMAGE | cv2.CALIB_CB_EXHAUSTIVE | cv2.CALIB_CB_ACCURACY
            found, pixels = cv2.findChessboardCornersSB(
                grey, (self.columns, self.rows), flags=flags
            )
            if not found:
                return nothing
            grid = pixels.reshape(self.rows, self.columns, 2).astype(np.float64)
            return np.arange(grid.size // 2), _turned_to_the_right(grid).reshape(-1, 2)
        if self.kind == "charuco":
            corners, ids, _, _ = cv2.aruco.CharucoDetector(self._cv()).detectBoard(grey)
            if ids is None or len(ids) == 0:
                return nothing
            return np.asarray(ids, np.intp).ravel(), self._refined(grey, corners, ids.ravel())
        dictionary = self._cv().getDictionary()
        detector = cv2.aruco.ArucoDetector(dictionary)
        markers, names, _ = detector.detectMarkers(grey)
        if names is None:
            return nothing
        known = {int(name): place for place, name in enumerate(self._cv().getIds().ravel())}
        found_ids, found_pixels = [], []
        for marker, name in zip(markers, names.ravel(), strict=True):
            if int(name) in known:
                found_ids.append(4 * known[int(name)] + np.arange(4))
                quad = np.asarray(marker, np.float64).reshape(4, 2)
                cell = 1 / (dictionary.markerSize + 2)  # the black rim is one wide
                near = min(cell, self.inner / self.square)
                found_pixels.append(_fitted_quad(grey, quad, near))
        if not found_ids:
            return nothing
        return np.concatenate(found_ids).astype(np.intp), np.concatenate(found_pixels)

    def _refined(self, grey: Image, corners: Any, ids: Any) -> Floats:
        """Corners of a charuco board to a fraction of a pixel.

        The detector's own are half a pixel too far right and down before OpenCV 4.13 (its issue
        25539). The window keeps clear of the markers.
        """
        points = self.corners()[ids]
        pixels = np.asarray(corners, np.float32).reshape(-1, 1, 2)
        margin = 3.0
        if len(points) > 3:
            spans = [np.linalg.norm(c - c.mean(axis=0)) for c in (pixels[:, 0], points)]
            margin = (self.square - self.inner) / 2 * float(spans[0] / spans[1])
        window = max(2, min(10, int(margin)))
        stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_COUNT, 50, 0.001)
        fine = cv2.cornerSubPix(grey, pixels, (window, window), (-1, -1), stop)
        return np.asarray(fine, np.float64).reshape(-1, 2)

    def picture(self, scale: float) -> tuple[Image, Floats]:
        """The board to print.

        Args:
            scale: pixels per metre.

        Returns:
            (H, W) uint8 with a white margin of a square, and the place (2,) in the board's frame
            of the picture's upper left corner [m].
        """
        side = round(self.square * scale)
        if self.kind == "checkerboard":
            squares = np.indices((self.rows + 1, self.columns + 1)).sum(axis=0) % 2
            whole = np.kron(squares, np.ones((side, side))).astype(np.uint8) * 255
            first = -self.square
        elif self.kind == "charuco":
            whole = self._cv().generateImage((side * self.columns, side * self.rows))
            first = 0.0
        else:  # OpenCV's own picture of a grid is off by a pixel here and there
            step = (self.square + self.inner) * scale
            size = [round((n - 1) * step) + side for n in (self.rows, self.columns)]
            whole = np.full(size, 255, np.uint8)
            grid = self._cv()
            for place, name in enumerate(grid.getIds().ravel()):
                top, left = (round(n * step) for n in divmod(place, self.columns))
                marker = cv2.aruco.generateImageMarker(grid.getDictionary(), int(name), side)
                whole[top : top + side, left : left + side] = marker
            first = 0.0
        padded = cv2.copyMakeBorder(
            whole, side, side, side, side, cv2.BORDER_CONSTANT, value=(255,)
        )
        return np.asarray(padded, np.uint8), np.full(2, first - side / scale)

    def _cv(self) -> Any:
        # Loaded here, so that a checkerboard needs no aruco.
        if not hasattr(cv2, "aruco") or not hasattr(cv2.aruco, "CharucoDetector"):
            raise BeltError(
                f"OpenCV {cv2.__version__} is too old for {self.kind} boards: "
                "pip install 'opencv-python-headless>=4.7,<4.12', or use a checkerboard"
            )
        code = getattr(cv2.aruco, f"DICT_{self.dictionary}", None)
        if code is None:
            names = [name[5:] for name in dir(cv2.aruco) if name.startswith("DICT_")]
            raise BeltError(
                f"--board: dictionary '{self.dictionary}' is not known; known are "
                f"{', '.join(sorted(names))}"
            )
        dictionary = cv2.aruco.getPredefinedDictionary(code)
        count = self.columns * self.rows
        needed = count // 2 if self.kind == "charuco" else count
        if needed > len(dictionary.bytesList):
            raise BeltError(
                f"--board: {needed} markers are needed, but dictionary '{self.dictionary}' has "
                f"{len(dictionary.bytesList)}; take a larger one"
            )
        size = (self.columns, self.rows)
        if self.kind == "charuco":
            board = cv2.aruco.CharucoBoard(size, self.square, self.inner, dictionary)
            board.setLegacyPattern(self.legacy)
            return board
        return cv2.aruco.GridBoard(size, self.square, self.inner, dictionary)


def parse_board(text: str) -> Board:
    """Read ``--board``.

    Raises:
        BeltError: it is none of the forms, or a number is out of range.
    """
    forms = (
        "checkerboard:COLUMNSxROWS:SQUARE (inner corners, as ROS counts), "
        "charuco:COLUMNSxROWS:SQUARE:MARKER:DICT[:legacy] (squares) or "
        "aruco:COLUMNSxROWS:MARKER:GAP:DICT (markers); lengths in metres, "
        "such as charuco:7x5:0.04:0.03:4X4_50"
    )
    kind, *parts = text.split(":")
    legacy = kind == "charuco" and len(parts) == 5 and parts[-1] == "legacy"
    parts = parts[:-1] if legacy else parts
    size = re.fullmatch(r"(\d+)x(\d+)", parts[0]) if parts else None
    count = {"checkerboard": 2, "charuco": 4, "aruco": 4}.get(kind)
    if count is None or len(parts) != count or size is None:
        raise BeltError(f"--board {text}: must be {forms}")
    try:
        lengths = [float(part) for part in parts[1:3]]
    except ValueError as error:
        raise BeltError(f"--board {text}: a length is no number; it must be {forms}") from error
    columns, rows = int(size[1]), int(size[2])
    least = {"checkerboard": 3, "charuco": 3, "aruco": 1}[kind]
    if not (least <= min(columns, rows) and max(columns, rows) <= 100):
        raise BeltError(f"--board {text}: columns and rows must be {least} to 100")
    for length in lengths:
        if not 0.0005 <= length <= 2:
            raise BeltError(f"--board {text}: {length} m is no such length; give metres")
    if kind == "charuco" and lengths[1] >= lengths[0]:
        raise BeltError(f"--board {text}: the marker must be smaller than its square")
    if kind == "checkerboard":
        return Board(kind, columns, rows, lengths[0])
    dictionary = parts[3].upper().removeprefix("DICT_")
    # OpenCV's own names, which mix cases.
    names = {name[5:].upper(): name[5:] for name in dir(getattr(cv2, "aruco", None))}
    name = names.get(dictionary, parts[3])
    board = Board(kind, columns, rows, lengths[0], lengths[1], name, legacy)
    board.corners()  # refuses what OpenCV has not
    return board


def _fitted_quad(grey: Image, quad: Floats, near: float) -> Floats:
    """Corners (4, 2) of a black marker where lines along its sides meet.

    OpenCV's refinements pull corners of markers inwards by half a pixel and more.

    Args:
        grey: the image.
        quad: (4, 2) its corners to a pixel or two.
        near: how far on both sides of a side nothing else is, as a share of the side.
    """
    for _ in range(2):
        following = np.roll(quad, -1, axis=0)
        along = following - quad
        length = np.hypot(*along.T)
        out = np.stack([along[:, 1], -along[:, 0]], axis=1) / length[:, None]
        reach = max(1.5, 0.9 * near * float(length.mean()))
        steps = np.arange(-reach, reach + 0.2, 0.25)
        ways = np.linspace(0.12, 0.88, 25)
        feet = quad[:, None] + along[:, None] * ways[None, :, None]
        places = feet[:, :, None] + out[:, None, None] * steps[None, None, :, None]
        flat = places.reshape(4, -1, 2).astype(np.float32)
        values = cv2.remap(
            grey, flat[..., 0], flat[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        rise = np.diff(values.reshape(4, len(ways), -1).astype(np.float64), axis=2)
        rise = np.maximum(rise, 0) ** 2  # black to white; noise counts for little
        middle = (steps[1:] + steps[:-1]) / 2
        shift = (rise @ middle) / np.maximum(rise.sum(axis=2), 1e-9)
        edge = feet + out[:, None] * shift[:, :, None]
        lines = []
        for points in edge:
            x, y, px, py = np.ravel(
                cv2.fitLine(points.astype(np.float32), cv2.DIST_HUBER, 0, 0.01, 0.01)
            )
            normal = np.array([-y, x])
            lines.append((*normal, float(normal @ (px, py))))
        meet = [np.cross(lines[k - 1], lines[k]) for k in range(4)]
        if any(abs(m[2]) < 1e-6 for m in meet):
            return quad
        quad = np.array([-m[:2] / m[2] for m in meet])
    return quad


def _turned_to_the_right(grid: Floats) -> Floats:
    """Order (rows, columns, 2) corners so that the rows run to the right and the columns down.

    A checkerboard looks the same turned by half (a square one by a quarter, too), and OpenCV
    starts at any of its corners.
    """
    along = grid[:, -1].mean(axis=0) - grid[:, 0].mean(axis=0)
    down = grid[-1].mean(axis=0) - grid[0].mean(axis=0)
    if along[0] * down[1] - along[1] * down[0] < 0:  # as in a mirror
        grid = grid[::-1]
    ways = [grid, grid[::-1, ::-1]]
    if grid.shape[0] == grid.shape[1]:
        ways += [np.rot90(grid), np.rot90(grid, 3)]
    return max(ways, key=lambda way: float(way[:, -1, 0].mean() - way[:, 0, 0].mean()))


# --- views ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class View:
    """A board seen in an image.

    Attributes:
        name: of the image.
        size: (width, height) of the image [px].
        points: (N, 2) corners in the board's frame [m].
        pixels: (N, 2) where they are seen.
        outer: (4, 2) where the board's outermost corners are, seen or not [px].
        spacing: between neighbouring corners [px].
        blur: width of an edge between black and white [px].
        time: when it was taken [s], if that is known.
    """

    name: str
    size: tuple[int, int]
    points: Floats
    pixels: Floats
    outer: Floats
    spacing: float
    blur: float
    time: float | None = None


def see_board(name: str, image: Image, board: Board, at: float | None = None) -> View:
    """Find the board in an image (H, W, 3) RGB.

    Raises:
        BeltError: it is not found, or the view is of no use; says what to do.
    """
    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
    ids, pixels = board.find(grey)
    if len(ids) == 0:
        raise BeltError(
            f"{name}: no {board.kind} of {board.columns}x{board.rows} is found: have all of it in "
            "the image, flat, sharp, evenly lit and with a white margin, and check the numbers of "
            "--board"
        )
    corners = board.corners()
    points = corners[ids]
    if len(ids) < LEAST_CORNERS:
        raise BeltError(
            f"{name}: only {len(ids)} corners are found, {LEAST_CORNERS} are needed: "
            "show more of the board, larger"
        )
    spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
    if spread[1] < 0.1 * spread[0]:
        raise BeltError(
            f"{name}: the corners found lie on a line, which leaves the board's tilt open: "
            "show more rows of it"
        )
    edges = board.edges()
    place = np.full(len(corners), -1)
    place[ids] = np.arange(len(ids))
    ends = place[edges[:, :2]]
    seen = (ends >= 0).all(axis=1)
    starts, stops, kinds = pixels[ends[seen, 0]], pixels[ends[seen, 1]], edges[seen, 2]
    spacing = float(np.median(np.hypot(*(stops - starts).T))) if seen.any() else 0.0
    if spacing < LEAST_SPACING:
        raise BeltError(
            f"{name}: corners are only {spacing:.1f} px apart, {LEAST_SPACING:g} are needed: "
            "bring the board nearer, use a larger one or a higher resolution"
        )
    widths = _edge_widths(grey, starts, stops, spacing, points, pixels)
    blur = max(float(np.median(widths[kinds == k])) for k in (0, 1) if (kinds == k).any())
    if blur > max(3.5, 0.15 * spacing):
        raise BeltError(
            f"{name}: edges are blurred over {blur:.1f} px: hold the board still (stop the belt), "
            "take more light and a shorter exposure, focus the lens"
        )
    transform, _ = cv2.findHomography(points, pixels)
    low, high = corners.min(axis=0), corners.max(axis=0)
    outer = np.array([[low, [high[0], low[1]], high, [low[0], high[1]]]]).reshape(1, 4, 2)
    outer = cv2.perspectiveTransform(outer, transform)[0]
    size = (image.shape[1], image.shape[0])
    return View(name, size, points, pixels, outer, spacing, blur, at)


def _edge_widths(
    grey: Image, starts: Floats, stops: Floats, spacing: float, points: Floats, pixels: Floats
) -> Floats:
    """Width of each edge [px]: the step from black to white over the steepest slope across it."""
    left, top = np.maximum(np.floor(pixels.min(axis=0)).astype(int), 0)
    right, bottom = np.ceil(pixels.max(axis=0)).astype(int) + 1
    dark, bright = np.percentile(grey[top:bottom, left:right], (10, 90))
    along = stops - starts
    length = np.hypot(*along.T)[:, None]
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) / length
    reach = max(3.0, 0.4 * spacing)
    across = np.arange(-reach, reach + 0.25, 0.5)
    ways = np.linspace(0.3, 0.7, 9)
    places = (
        starts[:, None, None]
        + along[:, None, None] * ways[None, :, None, None]
        + normal[:, None, None] * across[None, None, :, None]
    ).astype(np.float32)
    flat = places.reshape(len(starts), -1, 2)
    values = cv2.remap(
        grey, flat[..., 0], flat[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    ).reshape(places.shape[:3])
    profile = values.astype(np.float64).mean(axis=1)
    slope = np.abs(profile[:, 2:] - profile[:, :-2]).max(axis=1)  # over a pixel
    return max(float(bright - dark), 1.0) / np.maximum(slope, 1e-3)


@dataclass(eq=False)
class Collector:
    """Picks out of a stream of images the views worth keeping.

    Attributes:
        board: what to look for.
        still: keep only views in which the board has come to rest.
        reason: why the last image was not kept.
    """

    board: Board
    still: bool = True
    reason: str = ""
    _last: Floats | None = None
    _kept: list[Floats] = field(default_factory=list)

    def offer(self, name: str, image: Image, at: float | None) -> View | None:
        """The view, if it is to be kept: usable, still, and unlike those kept before."""
        try:
            view = see_board(name, image, self.board, at)
        except BeltError as error:
            self.reason, self._last = str(error), None
            return None
        moved = math.inf if self._last is None else float(np.abs(view.outer - self._last).max())
        self._last = view.outer
        if self.still and moved > 2.0:
            self.reason = "the board moves"
            return None
        away = [float(np.hypot(*(view.outer - kept).T).mean()) for kept in self._kept]
        if away and min(away) < 0.03 * view.size[0]:
            self.reason = "the board is where it was before"
            return None
        self._kept.append(view.outer)
        return view


# --- intrinsics -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Intrinsics:
    """A camera as calibrated.

    Attributes:
        camera: it.
        rms: of the corners [px].
        focal_error: standard deviation of the focal lengths [px].
        middle_error: of the place of the optical axis [px].
        covariance: of fx, fy, cx, cy and the coefficients that were free.
        views: how many it is made from.
    """

    camera: Camera
    rms: float
    focal_error: float
    middle_error: float
    covariance: Floats
    views: int


def calibrate_camera(views: Sequence[View], model: str = "plumb_bob") -> Intrinsics:
    """Intrinsics from views of a board at various tilts.

    Args:
        views: at least ``LEAST_VIEWS``, of one size.
        model: of the lens: plumb_bob (k1, k2, p1, p2), rational_polynomial or equidistant.

    Raises:
        BeltError: the views do not settle the intrinsics; says what to do.
    """
    more = "hold the board at tilts of 20 to 40 degrees to all sides, and all over the image"
    if len(views) < LEAST_VIEWS:
        raise BeltError(
            f"intrinsics need {LEAST_VIEWS} usable views, better 12, not {len(views)}: {more}; "
            "or give --camera-info"
        )
    if len({view.size for view in views}) > 1:
        raise BeltError(f"the images have several sizes ({_named(views)}): use one camera's own")
    objects = [
        np.column_stack([v.points, np.zeros(len(v.points))]).astype(np.float32) for v in views
    ]
    images = [v.pixels.astype(np.float32) for v in views]
    size = views[0].size
    try:
        if model == "equidistant":
            guess = np.array(
                [[size[0] / 2, 0, size[0] / 2], [0, size[0] / 2, size[1] / 2], [0, 0, 1.0]]
            )
            flags = (
                cv2.fisheye.CALIB_RECOMPUTE_EXTRINSIC
                | cv2.fisheye.CALIB_FIX_SKEW
                | cv2.fisheye.CALIB_USE_INTRINSIC_GUESS
            )
            _, matrix, lens, turns, shifts = cv2.fisheye.calibrate(
                [o[:, None].astype(np.float64) for o in objects],
                [i[:, None].astype(np.float64) for i in images],
                size,
                guess,
                np.zeros(4),
                flags=flags,
            )
            matrix[0, 1] = 0.0
        else:
            flags = cv2.CALIB_RATIONAL_MODEL if model == "rational_polynomial" else 0
            flags |= 0 if flags else cv2.CALIB_FIX_K3
            _, matrix, lens, turns, shifts = cv2.calibrateCamera(
                objects, images, size, np.eye(3), np.zeros(5), flags=flags
            )
            lens = np.ravel(lens)[: 8 if flags & cv2.CALIB_RATIONAL_MODEL else 5]
        camera = Camera(np.array(matrix), np.array(lens), model, size)
    except (cv2.error, BeltError) as error:
        raise BeltError(f"the intrinsics cannot be found from these views: {more}") from error
    poses = [_transform(r, t) for r, t in zip(turns, shifts, strict=True)]
    normals = np.array([turn[:, 2] for turn, _ in poses])
    tilts = np.degrees(np.arccos(np.clip(normals @ normals.T, -1, 1)))
    if tilts.max() < LEAST_SPREAD:
        raise BeltError(
            f"all views are parallel to within {tilts.max():.0f} degrees, which leaves focal "
            f"length and distance open: {more}; or give --camera-info"
        )
    errors, covariance = _intrinsics_covariance(camera, views, poses)
    spread = np.sqrt(np.diag(covariance))
    rms = math.sqrt(float(np.concatenate(errors).mean()))
    worst = max(range(len(views)), key=lambda k: float(errors[k].mean()))
    if not rms < 1.5:
        raise BeltError(
            f"corners are off by {rms:.1f} px, most in {views[worst].name}: check the numbers of "
            "--board, leave out views in which it is bent, or try --model rational_polynomial or "
            "equidistant for a wide lens"
        )
    if not spread[0] < 0.01 * matrix[0, 0]:
        raise BeltError(
            f"the focal length is only known to {spread[0]:.0f} of {matrix[0, 0]:.0f} px: {more}"
        )
    return Intrinsics(
        camera, rms, float(spread[0]), float(max(spread[2:4])), covariance, len(views)
    )


def _free(camera: Camera) -> tuple[Floats, Floats]:
    """What calibration finds, fx, fy, cx, cy and coefficients, and steps to differentiate by."""
    lens = camera.distortion[:4] if camera.model == "plumb_bob" else camera.distortion
    values = np.array([*camera.matrix[[0, 1, 0, 1], [0, 1, 2, 2]], *lens])
    return values, np.array([*[1e-3] * 4, *[1e-6] * len(lens)])


def _with(camera: Camera, values: Floats) -> Camera:
    """The camera with other values of what `_free` gives."""
    fx, fy, cx, cy, *free = values.tolist()
    lens = camera.distortion.copy()
    lens[: len(free)] = free
    matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    return Camera(matrix, lens, camera.model, camera.size)


def _intrinsics_covariance(
    camera: Camera, views: Sequence[View], poses: Sequence[tuple[Floats, Floats]]
) -> tuple[list[Floats], Floats]:
    """Squared errors of the corners of each view, and the covariance of what `_free` gives.

    The poses are eliminated view by view (Schur complement).
    """
    start, steps = _free(camera)
    total = np.zeros((len(start), len(start)))
    errors, count = [], 0
    for view, (turn, shift) in zip(views, poses, strict=True):
        points = view.points @ turn[:, :2].T + shift
        here = project(camera, points)
        errors.append(np.square(here - view.pixels).sum(axis=1))
        own = np.stack(
            [
                (project(_with(camera, start + step), points) - here).ravel() / step.sum()
                for step in np.diag(steps)
            ],
            axis=1,
        )
        pose = []
        for k in range(6):
            if k < 3:
                bit = cv2.Rodrigues(np.eye(3)[k] * 1e-6)[0]
                moved = view.points @ (turn @ bit)[:, :2].T + shift
            else:
                moved = points + np.eye(3)[k - 3] * 1e-6
            pose.append((project(camera, moved) - here).ravel() / 1e-6)
        other = np.stack(pose, axis=1)
        total += own.T @ own - own.T @ other @ np.linalg.pinv(other.T @ other) @ other.T @ own
        count += own.shape[0] - 6
    noise = sum(float(e.sum()) for e in errors) / max(count - len(start), 1)
    # Scaled to ones on the diagonal: focal lengths and lens coefficients differ by 10^6.
    size = np.sqrt(np.maximum(np.diag(total), 1e-30))
    values, axes = np.linalg.eigh(total / np.outer(size, size))
    inverse = (axes / np.maximum(values, 1e-14)) @ axes.T  # what is left open becomes huge, not 0
    return errors, noise * inverse / np.outer(size, size)


# --- the belt -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BeltFit:
    """The plane of boards on the belt.

    Attributes:
        rotation, translation: of the first board's frame in the optical frame.
        places: (V, 3) x, y [m], yaw [rad] of each board in the frame of the first.
        covariance: of the 6 of the first (turn in its own axes, then shift), and then of x, y, yaw
            of each further one.
        rms_px: of the corners.
        rms, worst, left_out: of corners on the belt [m]: root mean square, largest, and root mean
            square of each corner left out.
        off_plane: (V,) by which each board on its own is off the plane of all [m].
        points: (N, 3) all corners in the optical frame [m].
        response: (6, 2 N) by which the pose of the first moves with residuals of the corners.
    """

    rotation: Floats
    translation: Floats
    places: Floats
    covariance: Floats
    rms_px: float
    rms: float
    worst: float
    left_out: float
    off_plane: Floats
    points: Floats
    response: Floats


def fit_belt(camera: Camera, views: Sequence[View]) -> BeltFit:
    """Fit one plane to boards that lie on the belt.

    Raises:
        BeltError: a view is degenerate, or one of the boards does not lie on the plane of all.
    """
    from scipy.optimize import least_squares

    poses = [_pose(camera, view) for view in views]
    turn0, shift0 = poses[0]
    start = np.zeros(6 + 3 * (len(views) - 1))
    for k, (turn, shift) in enumerate(poses[1:]):
        axis = turn0.T @ turn[:, 0]
        x, y, _ = turn0.T @ (shift - shift0)
        start[6 + 3 * k : 9 + 3 * k] = x, y, math.atan2(axis[1], axis[0])

    def pose(values: Floats) -> tuple[Floats, Floats]:
        return turn0 @ cv2.Rodrigues(values[:3])[0], shift0 + values[3:6]

    def laid(values: Floats) -> list[Floats]:
        places = np.concatenate([np.zeros(3), values[6:]]).reshape(-1, 3)
        return [_moved(v.points, place) for v, place in zip(views, places, strict=True)]

    def residuals(values: Floats) -> Floats:
        turn, shift = pose(values)
        parts = [
            project(camera, points @ turn[:, :2].T + shift) - view.pixels
            for view, points in zip(views, laid(values), strict=True)
        ]
        return np.nan_to_num(np.concatenate(parts).ravel(), nan=1e3)

    found = least_squares(residuals, start, method="lm", x_scale="jac")
    jacobian, off = np.asarray(found.jac, np.float64), np.asarray(found.fun, np.float64)
    noise = max(float(off @ off) / max(len(off) - len(start), 1), _LEAST_NOISE**2)
    inverse = np.linalg.pinv(jacobian.T @ jacobian, hermitian=True)
    turn, shift = pose(found.x)
    board_plane = _upright(turn, shift)

    # Leverage: a fit without a corner would be off there by (1 - h)^-1 of what it is off by now.
    blocks = jacobian.reshape(-1, 2, len(start))
    hat = np.einsum("nij,jk,nlk->nil", blocks, inverse, blocks)
    alone = np.linalg.solve(np.eye(2) - hat, off.reshape(-1, 2, 1))[..., 0]
    pixels = np.concatenate([view.pixels for view in views])
    by_pixel, _ = position_jacobian(camera, board_plane, pixels)
    left_out = np.einsum("nij,nj->ni", by_pixel, alone)
    there = to_belt(camera, board_plane, pixels) * (1, -1)  # the board's y runs down
    away = np.hypot(*(there - np.concatenate(laid(found.x))).T)

    off_plane = np.zeros(len(views))
    for k, (view, (own_turn, own_shift)) in enumerate(zip(views, poses, strict=True)):
        low, high = view.points.min(axis=0), view.points.max(axis=0)
        # Its middle: the tilt of a single board is known far less well than its distance.
        middle = own_turn[:, :2] @ (low + high) / 2 + own_shift
        off_plane[k] = abs(float((middle - shift) @ turn[:, 2])) if len(views) > 1 else 0.0
    if off_plane.max() > MOST_OFF_PLANE:
        worst = views[int(off_plane.argmax())].name
        raise BeltError(
            f"{worst}: the board is {1000 * off_plane.max():.0f} mm off the plane of all views on "
            "the belt: it must lie flat on it in each; leave out views in which it does not "
            "(--belt), and use a board that does not bend"
        )
    rms_px = math.sqrt(float(np.square(off).mean()) * 2)
    if rms_px > 2.0:
        raise BeltError(
            f"the corners on the belt are off by {rms_px:.1f} px: the intrinsics are not those of "
            "these images, the board is bent, or the numbers of --board are wrong"
        )
    return BeltFit(
        turn,
        shift,
        np.concatenate([np.zeros(3), found.x[6:]]).reshape(-1, 3),
        noise * inverse,
        rms_px,
        math.sqrt(float(np.square(away).mean())),
        float(away.max()),
        math.sqrt(float(np.square(left_out).sum(axis=1).mean())),
        off_plane,
        np.concatenate(laid(found.x)) @ turn[:, :2].T + shift,
        -(inverse @ jacobian.T)[:6],
    )


def place_error(
    camera: Camera, fit: BeltFit, intrinsics: Intrinsics | None = None
) -> tuple[float, float]:
    """How uncertain places on the belt are: standard deviation [m] over the image.

    Args:
        camera: the camera.
        fit: of the belt.
        intrinsics: where they were calibrated, too: how far the lens is known counts then, all the
            more where no board was seen.

    Returns:
        the median over the image, and what nine in ten places do not exceed.
    """

    def moved(step: Floats) -> BeltPlane:
        return _upright(
            fit.rotation @ cv2.Rodrigues(step[:3])[0].astype(np.float64), fit.translation + step[3:]
        )

    plane = moved(np.zeros(6))
    pixels = _belt_pixels(camera, plane, 9, 7)
    here = to_belt(camera, plane, pixels)
    shifts = [to_belt(camera, moved(s), pixels) - here for s in 1e-6 * np.eye(6)]
    slope = np.stack(shifts, axis=2) / 1e-6
    variance = np.einsum("nij,jk,nik->n", slope, fit.covariance[:6, :6], slope)
    if intrinsics is not None:
        values, steps = _free(intrinsics.camera)
        seen, shifts = project(camera, fit.points), []
        for step in np.diag(steps):
            other = _with(intrinsics.camera, values + step).scaled(camera.size)
            # Another lens, and the pose that the same corners give with it.
            follow = fit.response @ (project(other, fit.points) - seen).ravel()
            shifts.append((to_belt(other, moved(follow), pixels) - here) / step.sum())
        slope = np.stack(shifts, axis=2)
        variance += np.einsum("nij,jk,nik->n", slope, intrinsics.covariance, slope)
    errors = np.sqrt(variance / 2)
    # The belt may stand out from the plane where no board lay.
    flatness = float(np.sqrt(np.square(fit.off_plane).mean()))
    middle, most = np.percentile(errors, (50, 90))
    return math.hypot(middle, flatness), math.hypot(most, flatness)


def _pose(camera: Camera, view: View) -> tuple[Floats, Floats]:
    """Rotation and translation of a board in the optical frame. Raises BeltError."""
    rays = directions(camera, view.pixels)
    if not np.isfinite(rays).all():
        raise BeltError(
            f"{view.name}: corners lie outside of what the lens's model maps: the intrinsics are "
            "not those of these images, or the board is too near the image's border"
        )
    points = np.column_stack([view.points, np.zeros(len(view.points))])
    poses = []
    try:
        # Collins and Bartoli, IJCV 2014: both poses under which a flat board looks much alike.
        _, turns, shifts, _ = cv2.solvePnPGeneric(
            points, rays[:, None], np.eye(3), np.zeros(0), flags=cv2.SOLVEPNP_IPPE
        )
        for start in zip(turns, shifts, strict=True):
            pose = _transform(
                *cv2.solvePnPRefineLM(points, rays[:, None], np.eye(3), np.zeros(0), *start)
            )
            seen = view.points @ pose[0][:, :2].T + pose[1]
            off = float(np.square(seen[:, :2] / seen[:, 2:] - rays).sum())
            poses.append((off, *pose))
    except cv2.error as error:
        raise BeltError(f"{view.name}: the board's pose cannot be found: {error.err}") from error
    poses.sort(key=lambda pose: pose[0])
    best, turn, shift = poses[0]
    noise = max(best / (2 * len(rays) - 6), (_LEAST_NOISE / camera.matrix[0, 0]) ** 2)
    for off, other, _ in poses[1:]:
        apart = math.degrees(math.acos(np.clip(turn[:, 2] @ other[:, 2], -1, 1)))
        if apart > 3 and off - best < 25 * noise:
            raise BeltError(
                f"{view.name}: the board is too small or too far to tell its tilt (two of them, "
                f"{apart:.0f} degrees apart, look the same): bring it nearer, or use a larger one"
            )
    middle = turn[:, :2] @ view.points.mean(axis=0) + shift
    sight = abs(float(turn[:, 2] @ middle)) / float(np.linalg.norm(middle))
    oblique = math.degrees(math.acos(min(1.0, sight)))
    if oblique > MOST_OBLIQUE:
        raise BeltError(
            f"{view.name}: the board is seen too obliquely, {oblique:.0f} degrees from straight "
            f"on, {MOST_OBLIQUE:g} at most: lay it more below the camera, or mount the camera "
            "more above the belt"
        )
    return turn, shift


def _transform(turn: Any, shift: Any) -> tuple[Floats, Floats]:
    """OpenCV's two vectors as a matrix (3, 3) and a vector (3,)."""
    return np.asarray(cv2.Rodrigues(turn)[0], np.float64), np.ravel(shift).astype(np.float64)


def _upright(turn: Floats, shift: Floats) -> BeltPlane:
    """The board's frame, whose z points into it, as a plane with z up and y to the left of x."""
    return BeltPlane(turn * (1, -1, -1), shift)


def _moved(points: Floats, place: Floats) -> Floats:
    x, y, yaw = place
    c, s = math.cos(yaw), math.sin(yaw)
    return points @ np.array([[c, s], [-s, c]]) + (x, y)


# --- the belt frame -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Motion:
    """Where the belt goes, in the frame of the first board.

    Attributes:
        angle: of its direction, from the board's x to its y [rad].
        error: standard deviation of the angle [rad]; 0 where it was told.
        text: how it was found, for people.
        speed, speed_error: [m/s], where views with times tell them.
    """

    angle: float
    error: float
    text: str
    speed: float | None = None
    speed_error: float | None = None


def find_motion(
    how: str, camera: Camera, board: Board, fit: BeltFit, views: Sequence[View]
) -> Motion:
    """The direction in which the belt moves.

    Args:
        how: "image:DEGREES" (0 to the right in the image, 90 down, at the first board),
            "board:AXIS" with AXIS x, -x, y or -y (x along its rows, y down its columns; the rows
            of a checkerboard are taken to run to the right in the image), or "views": the belt
            carried the board from the first view to the last.
        camera: the camera.
        board: the board.
        fit: from the views.
        views: those on the belt, in the order they were taken.

    Raises:
        BeltError: it is none of these, or the views do not tell the direction.
    """
    kind, _, value = how.partition(":")
    middle = board.corners().mean(axis=0)
    axes = {"x": 0.0, "+x": 0.0, "y": 90.0, "+y": 90.0, "-x": 180.0, "-y": -90.0}
    if kind == "board" and value in axes:
        return Motion(math.radians(axes[value]), 0.0, f"along the board's {value}")
    if kind == "image":
        try:
            degrees = float(value)
            if not math.isfinite(degrees):
                raise ValueError
        except ValueError as error:
            raise BeltError(f"--motion {how}: image:DEGREES takes a number") from error
        plane = _upright(fit.rotation, fit.translation)
        here = to_pixels(camera, plane, [middle * (1, -1)])
        step = 0.5 * np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
        ahead, behind = to_belt(camera, plane, np.concatenate([here + step, here - step]))
        x, y = (ahead - behind) * (1, -1)
        text = f"{degrees:g} degrees in the image (0 to the right, 90 down)"
        return Motion(math.atan2(y, x), 0.0, text)
    if how != "views":
        raise BeltError(
            f"--motion {how}: must be image:DEGREES, board:x, board:-x, board:y, board:-y or views"
        )
    return _motion_of_views(board, fit, views)


def _motion_of_views(board: Board, fit: BeltFit, views: Sequence[View]) -> Motion:
    if len(views) < 2:
        raise BeltError(
            "--motion views needs two views on the belt, between which the belt carried the board: "
            "give both to --belt, or tell the direction by --motion image:DEGREES"
        )
    middle = board.corners().mean(axis=0)
    places = np.array([_moved(middle[None], place)[0] for place in fit.places])
    turned = np.degrees(fit.places[:, 2])
    turned = np.abs((turned + 180 / board.turns) % (360 / board.turns) - 180 / board.turns)
    if turned.max() > 2:
        raise BeltError(
            f"{views[int(turned.argmax())].name}: the board is turned by {turned.max():.1f} degrees"
            f" against {views[0].name}: only the belt may move it between the views"
        )
    times = [view.time for view in views]
    known = [t for t in times if t is not None]
    if len(known) == len(times) and (np.diff(known) <= 0).any():
        raise BeltError("--times must rise from view to view; the views go by their names")
    way = places[-1] - places[0]
    distance = float(np.hypot(*way))
    last = len(fit.covariance) - 3
    turn = middle[None] @ np.array([[0, 1], [-1, 0]])  # moves with yaw about the origin
    slope = np.column_stack([np.eye(2), turn[0]])
    block = slope @ fit.covariance[last : last + 3, last : last + 3] @ slope.T
    if distance < 5 * math.sqrt(np.trace(block)) or distance == 0:
        raise BeltError(
            f"the board moved by only {1000 * distance:.1f} mm between the views: let the belt "
            "carry it through most of the image"
        )
    along = way / distance
    across = np.array([-along[1], along[0]])
    error = math.sqrt(float(across @ block @ across)) / distance
    if math.degrees(error) > MOST_DIRECTION_ERROR:
        raise BeltError(
            f"the direction of {1000 * distance:.0f} mm of motion is only known to "
            f"{math.degrees(error):.1f} degrees: let the belt carry the board further"
        )
    aside = np.abs((places - places[0]) @ across)
    if aside.max() > max(0.003, 0.02 * distance):
        raise BeltError(
            f"{views[int(aside.argmax())].name}: the board is {1000 * aside.max():.0f} mm beside "
            "the line of the belt's motion: only the belt may move it between the views"
        )
    speed = speed_error = None
    if len(known) == len(times):
        t = np.array(known)
        x = (places - places[0]) @ along
        t, x = t - t.mean(), x - x.mean()
        speed = float(t @ x / (t @ t))
        noise = max(
            float(along @ block @ along),
            float(np.square(x - speed * t).sum()) / max(len(t) - 2, 1),
        )
        speed_error = math.sqrt(noise / float(t @ t))
    text = f"the way of the board from {views[0].name} to {views[-1].name}, {distance:.3f} m"
    return Motion(math.atan2(way[1], way[0]), error, text, speed, speed_error)


def belt_frame(
    board: Board,
    fit: BeltFit,
    motion: Motion,
    *,
    at: tuple[float, float] = (0.0, 0.0),
    thickness: float = 0.0,
    error_m: float = 0.0,
) -> BeltPlane:
    """The belt frame.

    Args:
        board: the board.
        fit: its place in the first view on the belt.
        motion: gives x.
        at: where in the belt frame the middle of the board's corners lies [m].
        thickness: of the board [m]; the belt is so much below its print.
        error_m: see `BeltPlane`.
    """
    c, s = math.cos(motion.angle), math.sin(motion.angle)
    x = fit.rotation @ (c, s, 0.0)
    up = -fit.rotation[:, 2]
    rotation = np.stack([x, np.cross(up, x), up], axis=1)
    middle = fit.rotation[:, :2] @ board.corners().mean(axis=0) + fit.translation
    translation = middle - thickness * up - rotation @ (*at, 0.0)
    return BeltPlane(rotation, translation, error_m)


# --- picture --------------------------------------------------------------------------------------


def draw_belt(
    image: Image, camera: Camera, plane: BeltPlane, view: View, lines: Sequence[str] = ()
) -> Image:
    """Draw the belt frame, a grid and the corners found over an image (RGB)."""
    canvas = np.array(image, order="C")
    size = max(1, round(min(canvas.shape[:2]) / 400))
    places = to_belt(camera, plane, _belt_pixels(camera, plane, 17, 13))
    reach = 6 * plane.camera[2]  # as far as a grid can be told
    low = np.maximum(places.min(axis=0), plane.camera[:2] - reach)
    high = np.minimum(places.max(axis=0), plane.camera[:2] + reach)
    step = 0.1 if max(high - low) < 6 else 1.0
    for axis in (0, 1):
        for value in np.arange(math.floor(low[axis] / step), high[axis] / step) * step:
            line = np.empty((60, 2))
            line[:, axis] = value
            line[:, 1 - axis] = np.linspace(low[1 - axis], high[1 - axis], 60)
            bold = size if abs(value) < 1e-9 else max(1, size // 2)
            _draw_line(canvas, to_pixels(camera, plane, line), (90, 160, 255), bold)
    for place in view.pixels:
        cv2.circle(canvas, _pixel(place), 3 * size, (255, 220, 0), size, cv2.LINE_AA)
    middle = to_belt(camera, plane, view.outer.mean(axis=0)[None])[0]
    reach = max(0.1, float(np.hypot(*(to_belt(camera, plane, view.outer[:1])[0] - middle))))
    origin = to_pixels(camera, plane, [[0.0, 0.0]])[0]
    for name, tip, color in (
        ("x: motion", (reach, 0.0, 0.0), (255, 60, 60)),
        ("y", (0.0, reach, 0.0), (60, 220, 60)),
        ("z", (0.0, 0.0, min(0.5 * reach, 0.5 * plane.camera[2])), (80, 120, 255)),
    ):
        end = to_pixels(camera, plane, [tip])[0]
        if not np.isfinite([*origin, *end]).all() or np.abs([*origin, *end]).max() > 1e5:
            continue
        for shade, thick in (((0, 0, 0), 3 * size + 2), (color, 2 * size)):
            cv2.arrowedLine(canvas, _pixel(origin), _pixel(end), shade, thick, cv2.LINE_AA, 0, 0.08)
        _write(canvas, name, (end[0] + 6 * size, end[1]), size, color)
    for k, text in enumerate((*lines, f"grid of {step:g} m")):
        _write(canvas, text, (8 * size, (k + 1) * 20 * size), size, (255, 255, 255))
    return canvas


def _belt_pixels(camera: Camera, plane: BeltPlane, columns: int, rows: int) -> Floats:
    """Pixels (N, 2) all over the image that see the belt, 3 degrees or more below the horizon."""
    width, height = camera.size
    x, y = np.meshgrid(np.linspace(0, width - 1, columns), np.linspace(0, height - 1, rows))
    pixels = np.stack([x, y], axis=-1).reshape(-1, 2)
    rays = np.column_stack([directions(camera, pixels), np.ones(len(pixels))])
    return pixels[rays @ plane.rotation[:, 2] < -0.05 * np.linalg.norm(rays, axis=1)]


def _draw_line(canvas: Image, pixels: Floats, color: tuple[int, int, int], bold: int) -> None:
    limit = 4 * max(canvas.shape[:2])
    with np.errstate(invalid="ignore"):
        good = (np.abs(pixels) < limit).all(axis=1)
    for k in np.flatnonzero(good[:-1] & good[1:]):
        cv2.line(canvas, _pixel(pixels[k]), _pixel(pixels[k + 1]), color, bold, cv2.LINE_AA)


def _write(
    canvas: Image, text: str, place: tuple[float, float], size: int, color: tuple[int, int, int]
) -> None:
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5 * size, size)
    x = int(min(max(place[0], 2), max(canvas.shape[1] - width - 4, 2)))
    y = int(min(max(place[1], height + 2), canvas.shape[0] - below - 2))
    cv2.rectangle(
        canvas, (x - 2, y - height - 2), (x + width + 2, y + below + 1), (0, 0, 0), cv2.FILLED
    )
    cv2.putText(
        canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5 * size, color, size, cv2.LINE_AA
    )


def _pixel(place: Floats) -> tuple[int, int]:
    return round(float(place[0])), round(float(place[1]))


# --- images ---------------------------------------------------------------------------------------


def read_images(source: Path, every: float) -> Iterator[tuple[str, Image, float | None]]:
    """Name, RGB image and time of each image of a folder, or of a video every so many seconds.

    Raises:
        BeltError: there are none, or one cannot be read.
    """
    if source.is_dir():
        files = [f for f in source.iterdir() if f.suffix.lower() in SUFFIXES]
        if not files:
            raise BeltError(f"--images {source}: no images there; it takes {', '.join(SUFFIXES)}")
        # Numbers in names count as such.
        files.sort(key=lambda f: [int(p) if p.isdecimal() else p for p in _digits(f.name)])
        for file in files:
            try:
                # As stored: a camera node gives no turned pictures.
                yield file.name, read_image(file), None
            except ValueError as error:
                raise BeltError(str(error)) from error
        return
    if not source.exists():
        raise BeltError(f"--images {source}: no such folder or video")
    video = cv2.VideoCapture(str(source))
    try:
        rate = video.get(cv2.CAP_PROP_FPS)
        if not video.isOpened() or not rate > 0:
            raise BeltError(f"--images {source}: is no folder, and no video that OpenCV reads")
        gap = max(1, round(every * rate))
        number = 0
        while video.grab():
            if number % gap == 0:
                read, image = video.retrieve()
                if read:
                    rgb = np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)
                    yield f"{source.stem}:{number:05d}", rgb, number / rate
            number += 1
        if number == 0:
            raise BeltError(f"--images {source}: the video holds no frames")
    finally:
        video.release()


def _digits(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def watch_topic(
    topic: str,
    board: Board,
    camera: Camera | None,
    counts: tuple[int, int],
    *,
    moving: bool,
    wait: float,
) -> tuple[list[tuple[View, Image]], Camera | None]:
    """Take views from a live topic while a person moves the board, telling them what is wanted.

    Args:
        topic: of sensor_msgs/Image; its ``camera_info`` beside it gives intrinsics, if it has any.
        board: what to look for.
        camera: intrinsics, if they are known.
        counts: views for intrinsics, not taken where they are known, and views on the belt.
        moving: take views on the belt while it runs.
        wait: for a view at most so long [s].

    Returns:
        the views, those on the belt named "belt1" and so on, and the intrinsics if known.

    Raises:
        BeltError: no usable view came in time.
    """
    import rclpy
    from rclpy.context import Context
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import CameraInfo
    from sensor_msgs.msg import Image as ImageMessage

    from waste_seg_ros.nodes.images import to_rgb

    context = Context()
    rclpy.init(args=[], context=context)
    newest: dict[str, Any] = {}
    try:
        node = rclpy.create_node("calibrate", context=context)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        node.create_subscription(
            ImageMessage, topic, lambda m: newest.update(image=m), qos_profile_sensor_data
        )
        beside = topic.rpartition("/")[0]
        node.create_subscription(
            CameraInfo,
            f"{beside}/camera_info" if beside else "camera_info",
            lambda m: newest.update(info=m),
            qos_profile_sensor_data,
        )
        taken: list[tuple[View, Image]] = []
        wanted = [f"view{k + 1}" for k in range(counts[0])]
        wanted += [f"belt{k + 1}" for k in range(counts[1])]
        collector = Collector(board)
        before = ""
        while wanted:
            name = wanted[0]
            if name.startswith("belt") and not before.startswith("belt"):
                print("now lay the board flat on the belt", flush=True)
                collector = Collector(board, still=not moving)
            before = name
            end, told = time.monotonic() + wait, ""
            view = None
            while view is None:
                executor.spin_once(timeout_sec=0.1)
                if time.monotonic() > end:
                    why = collector.reason or f"no image came on {topic}: is the camera running?"
                    raise BeltError(f"no view for {name} in {wait:g} s: {why}")
                if "image" not in newest:
                    continue
                if camera is None and "info" in newest:
                    info, message = newest["info"], newest["image"]
                    if info.k[0] > 0:
                        camera = camera_from_info(info, (message.width, message.height))
                        wanted = [w for w in wanted if w.startswith("belt")]
                        break
                message = newest.pop("image")
                image = np.ascontiguousarray(to_rgb(message))
                stamp = message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec
                view = collector.offer(name, image, stamp)
                if view is None and collector.reason != told:
                    told = collector.reason
                    print(f"  {told}", flush=True)
            if view is not None:
                taken.append((view, image))
                wanted.pop(0)
                print(f"{name} taken; {len(wanted)} to go: move the board", flush=True)
        return taken, camera
    finally:
        rclpy.try_shutdown(context=context)


# --- command --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``waste-seg calibrate``."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, help="folder of images, or a video")
    source.add_argument("--topic", help="live topic of sensor_msgs/Image, such as image_raw")
    add(
        "--board",
        required=True,
        help="checkerboard:9x6:0.025 (inner corners, square in m), charuco:7x5:0.04:0.03:4X4_50 "
        "(squares, square and marker in m) or aruco:5x4:0.04:0.01:4X4_50 (markers, marker and gap)",
    )
    add("--camera-info", type=Path, help="YAML of ROS's camera_calibration, or an earlier output")
    add(
        "--belt",
        help="names of the images in which the board lies on the belt, as patterns with commas "
        "(default: belt*; with known intrinsics all)",
    )
    add(
        "--motion",
        default="image:0",
        help="where the belt moves: image:DEGREES (0 right, 90 down), board:x (-x, y, -y), or "
        "views: as it carried the board through those of --belt (default: %(default)s)",
    )
    add("--times", help="of the views on the belt [s], with commas: measures the belt's speed")
    add(
        "--at",
        default="0,0",
        help="place of the board's middle in the belt frame, as --at=x,y [m] (%(default)s)",
    )
    add("--thickness", type=float, default=0.0, help="of the board [m] (%(default)s)")
    add(
        "--robot",
        help="pose of the robot's base in the belt frame, as --robot=x,y,z,roll,pitch,yaw [m, rad]",
    )
    add("--model", default="plumb_bob", choices=("plumb_bob", "rational_polynomial", "equidistant"))
    add("--max-error", type=float, default=2.0, help="refuse a belt less sure [mm] (%(default)s)")
    add("--every", type=float, default=0.5, help="video: take an image every so many s")
    add("--views", type=int, default=12, help="topic: views for intrinsics (%(default)s)")
    add("--wait", type=float, default=60.0, help="topic: longest wait for a view [s] (%(default)s)")
    add("--output", type=Path, default=Path("belt.yaml"), help="(default: %(default)s)")
    add("--picture", type=Path, help="PNG of the belt frame (default: the output's name)")
    add("--print-board", type=Path, metavar="PNG", help="write the board to print, and end")


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg calibrate``; 1 if the views or files cannot be used."""
    try:
        board = parse_board(args.board)
        if args.print_board:
            return _print_board(board, args.print_board)
        _calibrate(args, board)
    except (BeltError, OSError) as error:
        print(f"waste-seg calibrate: {error}", file=sys.stderr)
        return 1
    return 0


def _calibrate(args: argparse.Namespace, board: Board) -> None:
    if args.images is None and not args.topic:
        raise BeltError("give --images FOLDER, --images VIDEO or --topic TOPIC")
    at = _numbers("--at", args.at, 2)
    robot = None
    if args.robot:
        x, y, z, roll, pitch, yaw = _numbers("--robot", args.robot, 6)
        robot = RobotBase((x, y, z), (roll, pitch, yaw))
    if not 0 <= args.thickness < 0.2:
        raise BeltError(f"--thickness {args.thickness}: must be 0 to 0.2 m")
    if not (args.every > 0 and args.max_error > 0 and args.wait > 0 and args.views >= LEAST_VIEWS):
        raise BeltError(
            f"--every, --max-error and --wait must be above 0, --views at least {LEAST_VIEWS}"
        )
    camera = read_camera_info(args.camera_info) if args.camera_info else None
    patterns = args.belt.split(",") if args.belt else []

    views: list[View] = []
    pictures: dict[str, Image] = {}
    refused: list[str] = []
    if args.topic:
        on_belt = 2 if args.motion == "views" else 1
        counts = (0 if camera else args.views, on_belt)
        taken, camera = watch_topic(
            args.topic, board, camera, counts, moving=args.motion == "views", wait=args.wait
        )
        views = [view for view, _ in taken]
        pictures = {view.name: image for view, image in taken}
        patterns = ["belt*"]
    else:
        for name, image, when in read_images(args.images, args.every):
            try:
                views.append(see_board(name, image, board, when))
            except BeltError as error:
                refused.append(str(error))
                continue
            if _matches(name, patterns or ["belt*"]) or not pictures:
                pictures[name] = image
    for line in refused:
        print(f"left out: {line}")
    if not views:
        raise BeltError("the board is of use in none of the images; see above")
    if not patterns:
        named = any(_matches(view.name, ["belt*"]) for view in views)
        patterns = ["*"] if camera and not named else ["belt*"]
    belt = [view for view in views if _matches(view.name, patterns)]
    if not belt:
        raise BeltError(
            f"no usable view is named {' or '.join(patterns)}: name the images in which the board "
            f"lies on the belt so, or tell their names by --belt; usable are {_named(views)}"
        )
    if args.times:
        times = _numbers("--times", args.times, len(belt))
        belt = [View(**(vars(v) | {"time": t})) for v, t in zip(belt, times, strict=True)]

    report: dict[str, Any] = {"board": args.board, "views": len(views), "left_out": len(refused)}
    intrinsics = None
    if camera is None:
        intrinsics = calibrate_camera(views, args.model)
        camera = intrinsics.camera
        print(
            f"camera: {camera.size[0]}x{camera.size[1]} {camera.model}, focal length "
            f"{camera.matrix[0, 0]:.1f} ± {intrinsics.focal_error:.1f} px, middle "
            f"({camera.matrix[0, 2]:.1f}, {camera.matrix[1, 2]:.1f}) ± "
            f"{intrinsics.middle_error:.1f} px, {intrinsics.views} views, "
            f"corners {intrinsics.rms:.2f} px rms"
        )
        report["camera_rms_px"] = round(intrinsics.rms, 4)
    camera = camera.scaled(belt[0].size)
    fit = fit_belt(camera, belt)
    unsure, most = place_error(camera, fit, intrinsics)
    if 1000 * unsure > args.max_error:
        raise BeltError(
            f"places on the belt would be uncertain by {1000 * unsure:.1f} mm, {args.max_error:g} "
            "are allowed: use a larger board, lay it at several places of the belt (--belt), or "
            "allow more by --max-error"
        )
    motion = find_motion(args.motion, camera, board, fit, belt)
    x, y = at
    plane = belt_frame(
        board, fit, motion, at=(x, y), thickness=args.thickness, error_m=round(unsure, 6)
    )
    report |= {
        "belt_views": [view.name for view in belt],
        "motion": motion.text,
        "corners_rms_px": round(fit.rms_px, 4),
        "corners_rms_mm": round(1000 * fit.rms, 4),
        "corners_worst_mm": round(1000 * fit.worst, 4),
        "corners_left_out_rms_mm": round(1000 * fit.left_out, 4),
        "places_mm": round(1000 * unsure, 4),
        "places_90_percent_mm": round(1000 * most, 4),
    }
    if len(belt) > 1:
        report["off_plane_mm"] = round(1000 * float(fit.off_plane.max()), 4)
    tilt = math.degrees(math.acos(min(1.0, -float(plane.rotation[2, 2]))))
    lines = [
        f"camera {plane.camera[2]:.3f} m above the belt, {tilt:.1f} deg from straight down",
        f"corners on the belt: {1000 * fit.rms:.2f} mm rms, {1000 * fit.worst:.2f} at most, "
        f"{1000 * fit.left_out:.2f} rms left out",
        f"places in the image: {1000 * unsure:.2f} mm, nine in ten below {1000 * most:.2f}",
    ]
    for line in lines:
        print(line.replace(" deg ", " degrees "))
    if 1000 * most > 3 * args.max_error:
        print(
            "towards the image's border places are unsure: have the board there, too, in some views"
        )
    print(f"origin: the middle of the board in {belt[0].name} is at ({x:g}, {y:g}) m")
    sure = f", ± {math.degrees(motion.error):.2f} degrees" if motion.error else ""
    print(f"x, the belt's motion: {motion.text}{sure}; y to the left of it, z up")
    if motion.speed is not None:
        print(f"speed: {motion.speed:.4f} ± {motion.speed_error:.1g} m/s")
    if args.times and motion.speed is None:
        print("speed: not measured, for it needs --motion views")
    picture = args.picture or args.output.with_suffix(".png")
    seen = pictures.get(belt[0].name)
    if seen is None:  # only the last pass tells which image is wanted
        seen = next(i for n, i, _ in read_images(args.images, args.every) if n == belt[0].name)
    write_png(picture, draw_belt(seen, camera, plane, belt[0], lines))
    write_calibration(args.output, Calibration(camera, plane, robot, motion.speed, report))
    print(f"wrote {args.output} and {picture}: look whether the axes lie right")


def _print_board(board: Board, path: Path) -> int:
    scale = 300 / 0.0254
    image, _ = board.picture(scale)
    write_png(path, image)
    height, width = (1000 * n / scale for n in image.shape)
    print(f"wrote {path}: print it {width:.1f} mm wide and {height:.1f} mm high (300 dpi), glue it "
          "to a stiff plate, and measure a square")  # fmt: skip
    return 0


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern.strip()) for pattern in patterns)


def _named(views: Sequence[View]) -> str:
    names = [view.name for view in views]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _numbers(flag: str, text: str, count: int) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count or not all(math.isfinite(value) for value in values):
        raise BeltError(f"{flag} {text}: must be {count} numbers with commas between")
    return values
