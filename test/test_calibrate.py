"""Calibration against boards drawn at known places, through a known lens, with noise."""

from __future__ import annotations

import functools
import math
import threading
import time

import cv2
import numpy as np
import pytest
import yaml

from waste_seg_ros import cli
from waste_seg_ros.calibrate import (
    Collector,
    View,
    belt_frame,
    calibrate_camera,
    draw_belt,
    find_motion,
    fit_belt,
    parse_board,
    place_error,
    read_images,
    see_board,
)
from waste_seg_ros.files import write_png
from waste_seg_ros.perception.belt import (
    BeltError,
    BeltPlane,
    Camera,
    directions,
    project,
    read_calibration,
    to_belt,
    to_pixels,
)

SIZE = (640, 480)
MATRIX = np.array([[620.0, 0, 322], [0, 618, 236], [0, 0, 1]])
CAMERA = Camera(MATRIX, np.array([-0.25, 0.08, 0.001, -0.001, 0]), "plumb_bob", SIZE)
CHECKERBOARD = "checkerboard:9x6:0.03"
CHARUCO = "charuco:8x6:0.04:0.03:4X4_50"
ARUCO = "aruco:5x4:0.048:0.012:4X4_50"
BOARDS = [CHECKERBOARD, CHARUCO, ARUCO]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(before)


@functools.cache
def rays(up):
    """Directions of all pixels of the camera, of `up` by `up` parts each."""
    # Every other pixel, and evenly between.
    few = CAMERA.scaled((SIZE[0] // 2, SIZE[1] // 2))
    x, y = np.meshgrid(np.arange(few.size[0]), np.arange(few.size[1]))
    seen = directions(few, np.stack([x, y], -1).reshape(-1, 2)).reshape(*x.shape, 2)
    seen = cv2.resize(seen, (SIZE[0] * up, SIZE[1] * up), interpolation=cv2.INTER_LINEAR)
    return np.dstack([seen, np.ones(seen.shape[:2])])


def pose(board, degrees, middle):
    """Rotation and translation of a board whose middle is there, in the optical frame."""
    turn = cv2.Rodrigues(np.radians(np.array(degrees, float)))[0]
    return turn, np.array(middle, float) - turn[:, :2] @ board.corners().mean(axis=0)


def render(board, turn, shift, *, noise=2.0, smear=0, seed=0):
    """The picture that CAMERA takes of the board, (H, W, 3) uint8."""
    up = 2
    # Gaps and cells fall on whole pixels of the texture.
    side = 12 * max(1, round(board.square * up * 1.1 * MATRIX[0, 0] / shift[2] / 12))
    texture, corner = board.picture(side / board.square)
    ways = rays(up)
    normal = turn[:, 2]
    reach = (normal @ shift) / (ways @ normal)
    local = (ways * reach[..., None] - shift) @ turn[:, :2]
    at = ((local - corner) * (side / board.square) - 0.5).astype(np.float32)
    image = cv2.remap(texture, at[..., 0], at[..., 1], cv2.INTER_LINEAR, borderValue=(90,))
    image = cv2.resize(image.astype(np.float32) * 0.8 + 20, SIZE, interpolation=cv2.INTER_AREA)
    if smear:
        image = cv2.blur(image, (smear, 1))
    image += np.random.default_rng(seed).normal(0, noise, image.shape)
    return np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def view_of(board, turn, shift, name="view", *, camera=CAMERA, noise=0.05, seed=0, at=None):
    """What would be found in such a picture, with noise [px] on the corners."""
    points = board.corners()
    pixels = project(camera, points @ turn[:, :2].T + shift)
    pixels = pixels + np.random.default_rng(seed).normal(0, noise, pixels.shape)
    low, high = points.min(axis=0), points.max(axis=0)
    outer = np.array([low, (high[0], low[1]), high, (low[0], high[1])])
    outer = project(camera, outer @ turn[:, :2].T + shift)
    return View(name, camera.size, points, pixels, outer, 30.0, 1.5, at)


def tilted_views(board, camera=CAMERA, count=10, most=35.0, reach=1.0, **options):
    views = []
    for k in range(count):
        angle = 2 * math.pi * k / count
        degrees = (most * math.cos(angle), most * math.sin(angle), 25.0 * (k % 3))
        x, y = 0.12 * reach * math.sin(2.4 * angle), 0.1 * reach * math.cos(1.7 * angle)
        middle = (x, y, 0.62 + 0.03 * (k % 4))
        views.append(view_of(board, *pose(board, degrees, middle), f"v{k}", camera=camera, seed=k,
                             **options))  # fmt: skip
    return views


def true_plane(board, turn, shift, x=(1.0, 0.0)):
    """The belt frame that is meant: at the board's middle, x along `x` of the board."""
    along = turn[:, :2] @ np.array(x)
    up = -turn[:, 2]
    return BeltPlane(
        np.stack([along, np.cross(up, along), up], axis=1),
        turn[:, :2] @ board.corners().mean(axis=0) + shift,
    )


# --- boards ---------------------------------------------------------------------------------------


def test_board_is_parsed():
    board = parse_board(CHARUCO)
    assert (board.kind, board.columns, board.rows) == ("charuco", 8, 6)
    assert (board.square, board.inner, board.dictionary) == (0.04, 0.03, "4X4_50")
    assert parse_board("charuco:8x6:0.04:0.03:DICT_APRILTAG_36h11:legacy").legacy
    assert len(parse_board(CHECKERBOARD).corners()) == 54
    assert len(board.corners()) == 35 and len(parse_board(ARUCO).corners()) == 80
    np.testing.assert_allclose(np.ptp(parse_board(ARUCO).corners(), axis=0), [0.288, 0.228])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("checkerboard:9x6", "must be checkerboard:COLUMNSxROWS"),
        ("chess:9x6:0.03", "must be checkerboard"),
        ("checkerboard:9by6:0.03", "must be checkerboard"),
        ("checkerboard:9x6:30mm", "a length is no number"),
        ("checkerboard:9x6:30", "give metres"),
        ("checkerboard:9x2:0.03", "must be 3 to 100"),
        ("charuco:8x6:0.03:0.04:4X4_50", "smaller than its square"),
        ("charuco:8x6:0.04:0.03:4X4_51", "'4X4_51' is not known; known are"),
        ("aruco:9x6:0.04:0.01:4X4_50", "54 markers are needed, but dictionary '4X4_50' has 50"),
    ],
)
def test_boards_that_are_none_are_refused(text, problem):
    with pytest.raises(BeltError) as caught:
        parse_board(text)
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", BOARDS)
@pytest.mark.parametrize("degrees", [(5, 8, 10), (-25, 20, 100)])
def test_corners_are_found_to_a_fraction_of_a_pixel(text, degrees):
    board = parse_board(text)
    turn, shift = pose(board, degrees, (0.03, -0.02, 0.8))
    view = see_board("a.png", render(board, turn, shift), board)
    assert len(view.points) == len(board.corners())
    true = project(CAMERA, board.corners() @ turn[:, :2].T + shift)
    found = view.pixels[np.lexsort(view.points.T[::-1])]
    ways = [true, true[::-1]] if board.turns == 2 else [true]
    ways = [way[np.lexsort(board.corners().T[::-1])] for way in ways]
    off = min((found - way for way in ways), key=lambda d: np.abs(d).max())
    assert np.sqrt(np.square(off).sum(axis=1).mean()) < 0.15
    assert np.abs(off.mean(axis=0)).max() < 0.04  # OpenCV's own charuco corners are half off
    assert 1.0 < view.blur < 2.5
    assert view.name == "a.png" and view.size == SIZE


def test_a_checkerboard_has_its_rows_to_the_right():
    board = parse_board(CHECKERBOARD)
    for yaw in (10, 80, 170, 260):
        turn, shift = pose(board, (0, 0, yaw), (0, 0, 0.8))
        view = see_board("a", render(board, turn, shift), board)
        row = view.pixels[8] - view.pixels[0]
        down = view.pixels[45] - view.pixels[0]
        assert row[0] > 0 and row[0] * down[1] - row[1] * down[0] > 0


def test_part_of_a_charuco_board_will_do():
    board = parse_board(CHARUCO)
    turn, shift = pose(board, (5, 10, 20), (0.35, 0.0, 0.75))
    view = see_board("a", render(board, turn, shift), board)
    assert 8 <= len(view.points) < 35
    fit = fit_belt(CAMERA, [view])
    assert math.degrees(math.acos(fit.rotation[:, 2] @ turn[:, 2])) < 0.5


# --- views that are of no use ---------------------------------------------------------------------


def refused(board, turn, shift, **options):
    with pytest.raises(BeltError) as caught:
        see_board("x.png", render(board, turn, shift, **options), board)
    assert str(caught.value).startswith("x.png: ")
    return str(caught.value)


@pytest.mark.parametrize("text", BOARDS)
def test_no_board_is_said(text):
    board = parse_board(text)
    with pytest.raises(BeltError, match=r"x.png: no \w+ of \dx\d is found: .*--board"):
        see_board("x.png", np.full((*SIZE[::-1], 3), 90, np.uint8), board)


@pytest.mark.parametrize("text", BOARDS)
def test_motion_blur_is_refused(text):
    board = parse_board(text)
    where = pose(board, (5, 8, 10), (0.0, 0.0, 0.7))
    clear = see_board("x.png", render(board, *where), board)
    share = {"checkerboard": 0.3, "charuco": 0.18, "aruco": 0.2}[board.kind]  # else not found
    smear = round(share * clear.spacing)
    assert "hold the board still (stop the belt)" in refused(board, *where, smear=smear)
    slight = see_board("x.png", render(board, *where, smear=3), board)
    assert slight.blur > clear.blur + 0.5


def test_a_board_too_far_is_refused():
    board = parse_board(CHECKERBOARD)
    assert "bring the board nearer" in refused(board, *pose(board, (5, 8, 10), (0, 0, 2.6)))


def test_few_corners_and_corners_on_a_line_are_refused(monkeypatch):
    board = parse_board(CHECKERBOARD)
    image = render(board, *pose(board, (5, 8, 10), (0, 0, 0.8)))
    ids, pixels = board.find(image[..., 0].copy())
    monkeypatch.setattr(type(board), "find", lambda self, grey: (ids[:9], pixels[:9]))
    with pytest.raises(BeltError, match="lie on a line"):
        see_board("x.png", image, board)
    monkeypatch.setattr(type(board), "find", lambda self, grey: (ids[:5], pixels[:5]))
    with pytest.raises(BeltError, match="only 5 corners are found, 8 are needed"):
        see_board("x.png", image, board)


def test_a_board_too_oblique_is_refused():
    board = parse_board(CHARUCO)
    view = view_of(board, *pose(board, (70, 0, 0), (0, 0, 0.8)), "x.png")
    with pytest.raises(BeltError, match="x.png: the board is seen too obliquely, 70 degrees"):
        fit_belt(CAMERA, [view])


def test_a_board_whose_tilt_cannot_be_told_is_refused():
    # 6 by 4 cm from 3 m: the picture of it leaning to one side or the other is the same.
    board = parse_board("checkerboard:4x3:0.02")
    view = view_of(board, *pose(board, (30, 0, 0), (0, 0, 3.0)), "x.png", noise=0.2)
    with pytest.raises(BeltError, match="x.png: the board is too small or too far to tell"):
        fit_belt(CAMERA, [view])


def test_wrong_intrinsics_are_noticed():
    board = parse_board(CHARUCO)
    view = view_of(board, *pose(board, (25, 5, 0), (0.15, 0.1, 0.5)))
    other = Camera(MATRIX, [0.6, 0.5, 0, 0, 0], "plumb_bob", SIZE)
    with pytest.raises(BeltError, match="the intrinsics are not those of these images"):
        fit_belt(other, [view])


# --- intrinsics -----------------------------------------------------------------------------------

LENSES = {
    "plumb_bob": Camera(MATRIX, [-0.3, 0.1, 0.001, -0.002, 0], "plumb_bob", SIZE),
    "rational_polynomial": Camera(
        MATRIX, [0.6, -0.3, 5e-4, 1e-3, 0.01, 0.9, -0.1, 0.02], "rational_polynomial", SIZE
    ),
    "equidistant": Camera(
        MATRIX * [[0.6, 1, 1], [1, 0.6, 1], [1, 1, 1]], [-0.05, 0.01, 0, 0], "equidistant", SIZE
    ),
}


@pytest.mark.parametrize("model", LENSES)
def test_intrinsics_are_recovered(model):
    camera, board = LENSES[model], parse_board(CHARUCO)
    reach = 5.0 if model == "equidistant" else 1.5  # into the corners of the image
    found = calibrate_camera(tilted_views(board, camera, count=14, reach=reach), model)
    assert found.camera.model == model and found.views == 14
    assert found.camera.matrix[0, 0] == pytest.approx(camera.matrix[0, 0], rel=0.005)
    assert 0.03 < found.rms < 0.1  # the noise is 0.05 px along each axis
    # The error it claims is of the size of what it is off by.
    off = abs(found.camera.matrix[0, 0] - camera.matrix[0, 0])
    assert off < 4 * found.focal_error < 8
    # What counts is where on the belt pixels are seen, and that it owns up to what it is off by.
    turn, shift = pose(board, (14, -10, 5), (0.05, 0.02, 0.75))
    view = view_of(board, turn, shift, camera=camera, seed=99)
    fit = fit_belt(found.camera, [view])
    plane = belt_frame(board, fit, find_motion("board:x", found.camera, board, fit, [view]))
    x, y = np.meshgrid(np.linspace(0, 639, 9), np.linspace(0, 479, 7))
    pixels = np.stack([x, y], -1).reshape(-1, 2)
    true = to_belt(camera, true_plane(board, turn, shift), pixels)
    away = np.hypot(*(to_belt(found.camera, plane, pixels) - true).T)
    middle, most = place_error(found.camera, fit, found)
    known, _ = place_error(found.camera, fit)
    assert np.median(away) < 3 * middle and np.percentile(away, 90) < 4 * most
    assert known < middle < 0.003
    assert away[np.hypot(*(true.T)) < 0.25].max() < 0.001


def test_too_few_views_for_intrinsics():
    with pytest.raises(BeltError, match="need 4 usable views, better 12, not 3: hold the board"):
        calibrate_camera(tilted_views(parse_board(CHARUCO), count=3))


def test_parallel_views_are_refused():
    board = parse_board(CHARUCO)
    flat = [view_of(board, *pose(board, (0, 0, 40 * k), (0.08 * (k % 3 - 1), 0.05 * (k % 2),
            0.6 + 0.02 * k)), f"v{k}", seed=k) for k in range(8)]  # fmt: skip
    with pytest.raises(
        BeltError, match=r"(parallel|focal length is only known).*tilts of 20 to 40"
    ):
        calibrate_camera(flat)
    leaning = [view_of(board, *pose(board, (30, 0, 0), (0.1 * (k % 3 - 1), 0.08 * (k // 3 - 1),
               0.7)), f"v{k}", seed=k) for k in range(9)]  # fmt: skip
    with pytest.raises(
        BeltError, match=r"(parallel|focal length is only known).*tilts of 20 to 40"
    ):
        calibrate_camera(leaning)


def test_views_that_contradict_each_other_are_refused():
    board = parse_board(CHARUCO)
    views = tilted_views(board, count=8)
    bad = views[3]
    views[3] = View(
        **(vars(bad) | {"pixels": bad.pixels[::-1] + 15.0 * (np.arange(35) % 2)[:, None]})
    )
    with pytest.raises(BeltError, match="corners are off by .* most in v3"):
        calibrate_camera(views)
    other = Camera(MATRIX, CAMERA.distortion, "plumb_bob", (1280, 480))
    with pytest.raises(BeltError, match="several sizes"):
        calibrate_camera([*tilted_views(board, count=5), view_of(
            board, *pose(board, (20, 0, 0), (0, 0, 0.7)), camera=other)])  # fmt: skip


# --- the belt -------------------------------------------------------------------------------------


def belt_error(plane, true, reach=None):
    """Largest distance [m] on the belt between where two calibrations put pixels."""
    x, y = np.meshgrid(np.linspace(0, SIZE[0] - 1, 9), np.linspace(0, SIZE[1] - 1, 7))
    pixels = np.stack([x, y], -1).reshape(-1, 2)
    places = to_belt(CAMERA, true, pixels)
    off = np.hypot(*(to_belt(CAMERA, plane, pixels) - places).T)
    return float(off[np.hypot(*places.T) < (reach or np.inf)].max())


@pytest.mark.parametrize("text", BOARDS)
def test_plane_is_recovered_from_a_picture(text):
    board = parse_board(text)
    turn, shift = pose(board, (14, -10, 5), (0.05, 0.02, 0.85))
    view = see_board("belt.png", render(board, turn, shift), board)
    fit = fit_belt(CAMERA, [view])
    motion = find_motion("board:x", CAMERA, board, fit, [view])
    plane = belt_frame(board, fit, motion)
    true = true_plane(board, turn, shift)
    assert belt_error(plane, true, reach=0.2) < 0.0005
    assert belt_error(plane, true) < 0.002
    # What it says of itself: corners, and places all over the image.
    assert 0.00002 < fit.rms < fit.worst < 0.001
    assert fit.rms < fit.left_out < 1.3 * fit.rms
    middle, most = place_error(CAMERA, fit)
    assert belt_error(plane, true) < 5 * most and middle < most < 0.0015


def test_claimed_error_is_that_of_many_fits():
    board = parse_board(CHARUCO)
    turn, shift = pose(board, (14, -10, 5), (0.05, 0.02, 0.85))
    pixels = np.array([[40.0, 40], [320, 240], [600, 440]])
    places, claims = [], []
    for seed in range(40):
        view = view_of(board, turn, shift, noise=0.1, seed=seed)
        fit = fit_belt(CAMERA, [view])
        places.append(to_belt(CAMERA, belt_frame(
            board, fit, find_motion("board:x", CAMERA, board, fit, [view])), pixels))  # fmt: skip
        claims.append(place_error(CAMERA, fit))
    drawn = np.sqrt(np.var(places, axis=0).mean(axis=1))
    middle, most = np.mean(claims, axis=0)
    assert drawn[1] < middle < max(drawn)
    assert most == pytest.approx(max(drawn), rel=0.5)


def test_more_boards_make_a_better_plane():
    board = parse_board(CHARUCO)
    turn, shift = pose(board, (14, -10, 5), (0.0, 0.0, 0.85))
    places = [(0, 0, 0), (0.25, 0.1, 0.3), (-0.28, -0.12, -0.5), (0.2, -0.15, 2.0)]
    views = []
    for k, (x, y, yaw) in enumerate(places):
        spin = cv2.Rodrigues(np.array([0.0, 0.0, yaw]))[0]
        views.append(
            view_of(board, turn @ spin, shift + turn @ (x, y, 0), f"b{k}", noise=0.1, seed=k)
        )
    one, all_ = fit_belt(CAMERA, views[:1]), fit_belt(CAMERA, views)
    np.testing.assert_allclose(all_.places, places, atol=0.001)
    assert place_error(CAMERA, all_)[1] < 0.7 * place_error(CAMERA, one)[1]
    assert 0 < all_.off_plane.max() < 0.002
    # A board that lies on something 3 cm high is no part of the belt.
    high = view_of(board, turn, shift + turn @ (0.2, 0.1, -0.03), "high.png")
    with pytest.raises(BeltError, match=r"the board is \d+ mm off the plane of all"):
        fit_belt(CAMERA, [*views[:2], high])


def test_origin_axes_and_thickness():
    board = parse_board(CHARUCO)
    turn, shift = pose(board, (10, 5, 0), (0.05, 0.02, 0.85))
    view = view_of(board, turn, shift, noise=0.0)
    fit = fit_belt(CAMERA, [view])
    motion = find_motion("board:-y", CAMERA, board, fit, [view])
    plane = belt_frame(board, fit, motion, at=(1.5, -0.2), thickness=0.004, error_m=0.001)
    middle = project(CAMERA, np.array([[0.05, 0.02, 0.85]]))
    # The board's print lies 4 mm above the belt.
    np.testing.assert_allclose(to_belt(CAMERA, plane, middle, 0.004), [[1.5, -0.2]], atol=1e-6)
    # x goes up along the board's columns, y to the left of that, z to the camera.
    np.testing.assert_allclose(plane.rotation[:, 0], -turn[:, 1], atol=1e-6)
    np.testing.assert_allclose(plane.rotation[:, 1], -turn[:, 0], atol=1e-6)
    assert plane.rotation[:, 2] @ (0.05, 0.02, 0.85) < 0
    assert plane.error_m == 0.001


@pytest.mark.parametrize("degrees", [0.0, 90.0, -145.0])
def test_motion_told_in_the_image(degrees):
    board = parse_board(CHARUCO)
    view = view_of(board, *pose(board, (10, 15, 70), (0.05, 0.02, 0.85)), noise=0.0)
    fit = fit_belt(CAMERA, [view])
    motion = find_motion(f"image:{degrees}", CAMERA, board, fit, [view])
    plane = belt_frame(board, fit, motion)
    a, b = to_pixels(CAMERA, plane, [[0.0, 0.0], [0.001, 0.0]])
    assert math.degrees(math.atan2(*(b - a)[::-1])) == pytest.approx(degrees, abs=0.1)


def carried(board, distances, *, angle=0.6, spin=0.0, times=None, noise=0.05, aside=0.0):
    """Views of a board that the belt carries along `angle` from the board's x."""
    turn, shift = pose(board, (12, -8, 5), (-0.1, -0.06, 0.85))
    way = np.array([math.cos(angle), math.sin(angle), 0.0])
    across = np.array([-way[1], way[0], 0.0])
    views = []
    for k, distance in enumerate(distances):
        bit = cv2.Rodrigues(np.array([0, 0, spin * (k > 0)]))[0]
        place = shift + turn @ (distance * way + aside * (k == 1) * across)
        at = None if times is None else times[k]
        views.append(view_of(board, turn @ bit, place, f"b{k}", noise=noise, seed=k, at=at))
    return views


def test_motion_and_speed_from_a_board_that_the_belt_carries():
    board = parse_board(CHARUCO)
    views = carried(board, [0.0, 0.1, 0.2, 0.3], times=[10.0, 10.5, 11.0, 11.5])
    fit = fit_belt(CAMERA, views)
    motion = find_motion("views", CAMERA, board, fit, views)
    assert math.degrees(abs(motion.angle - 0.6)) < 0.1
    assert abs(motion.angle - 0.6) < 4 * motion.error < math.radians(0.5)
    assert motion.speed == pytest.approx(0.2, abs=0.0005)
    assert abs(motion.speed - 0.2) < 4 * motion.speed_error < 0.002
    # Two views tell the direction, and without times no speed.
    two = carried(board, [0.0, 0.25])
    motion = find_motion("views", CAMERA, board, fit_belt(CAMERA, two), two)
    assert math.degrees(abs(motion.angle - 0.6)) < 0.2 and motion.speed is None


@pytest.mark.parametrize(
    ("how", "views", "problem"),
    [
        ("views", dict(distances=[0.0]), "needs two views on the belt"),
        ("views", dict(distances=[0.0, 0.25], spin=0.1), "b1: the board is turned by 5.7 degrees"),
        ("views", dict(distances=[0.0, 0.0]), "the board moved by only"),
        ("views", dict(distances=[0.0, 0.006], noise=0.3), "only"),
        ("views", dict(distances=[0, 0.1, 0.2], aside=0.02), "b1: the board is 20 mm beside"),
        ("views", dict(distances=[0, 0.1], times=[2.0, 1.0]), "--times must rise"),
        ("image:left", dict(distances=[0.0]), "takes a number"),
        ("image:nan", dict(distances=[0.0]), "takes a number"),
        ("board:z", dict(distances=[0.0]), "must be image:DEGREES, board:x"),
    ],
)
def test_motion_that_cannot_be_told_is_refused(how, views, problem):
    board = parse_board(CHARUCO)
    seen = carried(board, **views)
    with pytest.raises(BeltError, match=problem):
        find_motion(how, CAMERA, board, fit_belt(CAMERA, seen), seen)


def test_collector_keeps_views_that_are_still_and_new():
    board = parse_board(CHARUCO)
    here = render(board, *pose(board, (5, 8, 10), (0.0, 0.0, 0.8)))
    there = render(board, *pose(board, (5, 8, 10), (0.08, 0.0, 0.8)))
    collector = Collector(board)
    assert collector.offer("a", here, 0.0) is None and collector.reason == "the board moves"
    kept = collector.offer("a", here, 0.1)
    assert kept is not None and kept.time == 0.1
    assert collector.offer("b", here, 0.2) is None and "where it was" in collector.reason
    assert collector.offer("b", there, 0.3) is None and collector.reason == "the board moves"
    assert collector.offer("b", there, 0.4) is not None
    assert collector.offer("c", np.zeros_like(here), 0.5) is None and "c: no" in collector.reason
    assert Collector(board, still=False).offer("a", here, 0.0) is not None


# --- command --------------------------------------------------------------------------------------


def write_info(folder, camera=CAMERA):
    file = folder / "camera.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "image_width": camera.size[0],
                "image_height": camera.size[1],
                "camera_name": "belt",
                "camera_matrix": {"rows": 3, "cols": 3, "data": camera.matrix.ravel().tolist()},
                "distortion_model": camera.model,
                "distortion_coefficients": {"data": camera.distortion.tolist()},
            }
        )
    )
    return file


def test_command_from_one_image_and_camera_info(tmp_path, capsys):
    board = parse_board(CHARUCO)
    turn, shift = pose(board, (14, -10, 5), (0.05, 0.02, 0.85))
    folder = tmp_path / "images"
    write_png(folder / "one.png", render(board, turn, shift))
    write_png(folder / "two.png", np.full((*SIZE[::-1], 3), 90, np.uint8))
    output = tmp_path / "out" / "belt.yaml"
    code = cli.main(
        ["calibrate", "--images", str(folder), "--board", CHARUCO, "--motion", "board:x",
         "--camera-info", str(write_info(tmp_path)), "--robot=0.5,-0.4,0.1,0,0,1.57",
         "--output", str(output)]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "left out: two.png: no charuco of 8x6 is found" in said.out
    assert "mm rms" in said.out and "x, the belt's motion: along the board's x" in said.out
    read = read_calibration(output)
    assert belt_error(read.plane, true_plane(board, turn, shift)) < 0.002
    np.testing.assert_array_equal(read.camera.distortion, CAMERA.distortion)
    assert read.robot is not None and read.robot.xyz == (0.5, -0.4, 0.1)
    assert 0 < read.plane.error_m < 0.001
    assert read.report["belt_views"] == ["one.png"] and read.report["left_out"] == 1
    drawn = cv2.imread(str(output.with_suffix(".png")))
    assert drawn.shape == (480, 640, 3)


def test_command_from_images_alone(tmp_path, capsys):
    board = parse_board(CHARUCO)
    folder = tmp_path / "images"
    for k in range(9):
        angle = 2 * math.pi * k / 9
        tilt = (30 * math.cos(angle), 30 * math.sin(angle), 25.0 * (k % 3))
        middle = (0.1 * math.sin(2.4 * angle), 0.07 * math.cos(1.7 * angle), 0.66)
        write_png(folder / f"hand{k}.png", render(board, *pose(board, tilt, middle), seed=k))
    turn, shift = pose(board, (14, -10, 5), (0.05, 0.02, 0.75))
    write_png(folder / "belt.png", render(board, turn, shift))
    output = tmp_path / "belt.yaml"
    arguments = ["calibrate", "--images", str(folder), "--board", CHARUCO, "--output", str(output)]
    assert cli.main([*arguments, "--motion", "board:x"]) == 0, capsys.readouterr().err
    read = read_calibration(output)
    assert read.camera.matrix[0, 0] == pytest.approx(620, rel=0.01)
    # Against the truth with its true lens: what counts is the place on the belt.
    true = true_plane(board, turn, shift)
    x, y = np.meshgrid(np.linspace(100, 540, 5), np.linspace(80, 400, 5))
    pixels = np.stack([x, y], -1).reshape(-1, 2)
    off = to_belt(read.camera, read.plane, pixels) - to_belt(CAMERA, true, pixels)
    assert np.abs(off).max() < 0.001
    (folder / "belt.png").unlink()
    assert cli.main(arguments) == 1
    assert "no usable view is named belt*" in capsys.readouterr().err


def test_command_from_a_video_measures_the_speed(tmp_path, capsys):
    board = parse_board(CHARUCO)
    file = tmp_path / "belt.avi"
    video = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, SIZE)
    turn, shift = pose(board, (12, -8, 5), (-0.12, 0.0, 0.85))
    for k in range(9):  # 0.2 m/s along the board's x
        video.write(render(board, turn, shift + turn @ (0.02 * k, 0, 0), seed=k))
    video.release()
    assert [t for _, _, t in read_images(file, 0.2)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    output = tmp_path / "belt.yaml"
    code = cli.main(
        ["calibrate", "--images", str(file), "--board", CHARUCO, "--motion", "views",
         "--every", "0.4", "--camera-info", str(write_info(tmp_path)), "--output", str(output)]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    read = read_calibration(output)
    assert read.speed == pytest.approx(0.2, abs=0.003) and "speed: 0.2" in said.out
    assert read.plane.rotation[:, 0] @ turn[:, 0] > math.cos(math.radians(0.5))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "give --images"),
        (["--images", "none"], "--images none: no such folder or video"),
        (["--images", "."], "no images there"),
        (["--images", "camera.yaml"], "no video that OpenCV reads"),
        (["--images", ".", "--at", "1"], "--at 1: must be 2 numbers"),
        (["--images", ".", "--robot", "1,2,3"], "--robot 1,2,3: must be 6 numbers"),
        (["--images", ".", "--thickness", "3"], "--thickness 3.0: must be 0 to 0.2 m"),
        (["--images", ".", "--every", "0"], "--every"),
        (["--images", ".", "--camera-info", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_command_says_what_is_wrong(arguments, problem, tmp_path, monkeypatch, capsys):
    write_info(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["calibrate", "--board", CHARUCO, *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("waste-seg calibrate: ") and problem in said
    assert not (tmp_path / "belt.yaml").exists()


def test_an_unsure_belt_is_refused(tmp_path, capsys):
    text = "checkerboard:5x4:0.02"
    board = parse_board(text)
    write_png(tmp_path / "a.png", render(board, *pose(board, (20, 15, 0), (-0.2, 0.15, 0.7))))
    arguments = ["calibrate", "--images", str(tmp_path), "--board", text,
                 "--camera-info", str(write_info(tmp_path)), "--max-error", "0.2"]  # fmt: skip
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert "uncertain by" in said and "use a larger board" in said


def test_board_to_print_is_found_in_its_own_picture(tmp_path):
    for text in BOARDS:
        file = tmp_path / "board.png"
        assert cli.main(["calibrate", "--board", text, "--print-board", str(file)]) == 0
        image = cv2.imread(str(file))
        scale = 300 / 0.0254
        board = parse_board(text)
        small = np.asarray(cv2.resize(image, None, fx=0.2, fy=0.2, interpolation=cv2.INTER_AREA))
        view = see_board("board", small, board)
        assert len(view.points) == len(board.corners())
        assert view.spacing == pytest.approx(board.square * scale * 0.2, rel=0.02)


def test_picture_shows_axes_at_the_origin():
    board = parse_board(CHARUCO)
    turn, shift = pose(board, (14, -10, 5), (0.05, 0.02, 0.85))
    view = view_of(board, turn, shift)
    plane = true_plane(board, turn, shift)
    grey = np.full((*SIZE[::-1], 3), 128, np.uint8)
    drawn = draw_belt(grey, CAMERA, plane, view, ["a line of text"])
    assert drawn.shape == grey.shape and (grey == 128).all()
    x, y = to_pixels(CAMERA, plane, [[0.05, 0.0], [0.0, 0.05]]).round().astype(int)
    assert drawn[x[1], x[0]].tolist() == [255, 60, 60]  # red along x
    assert drawn[y[1], y[0]].tolist() == [60, 220, 60]  # green along y


# --- live topic -----------------------------------------------------------------------------------


def test_command_from_a_live_topic(tmp_path, capsys):
    rclpy = pytest.importorskip("rclpy")
    from rclpy.context import Context
    from sensor_msgs.msg import CameraInfo
    from std_msgs.msg import Header

    from sensor_msgs.msg import Image as ImageMessage  # isort: skip

    from waste_seg_ros.nodes.images import to_image

    board = parse_board(CHARUCO)
    turn, shift = pose(board, (14, -10, 5), (0.05, 0.02, 0.85))
    picture = render(board, turn, shift)
    context = Context()
    rclpy.init(args=[], context=context)
    node = rclpy.create_node("fake_camera", context=context)
    images = node.create_publisher(ImageMessage, "line/image_raw", 1)
    infos = node.create_publisher(CameraInfo, "line/camera_info", 1)
    done = threading.Event()

    def publish():
        while not done.wait(0.1):
            header = Header(stamp=node.get_clock().now().to_msg(), frame_id="camera")
            info = CameraInfo(header=header, width=SIZE[0], height=SIZE[1])
            info.distortion_model, info.d = CAMERA.model, CAMERA.distortion.tolist()
            info.k = MATRIX.ravel().tolist()
            infos.publish(info)
            images.publish(to_image(picture, "rgb8", header))

    thread = threading.Thread(target=publish)
    thread.start()
    output = tmp_path / "belt.yaml"
    try:
        arguments = [
            "calibrate",
            "--board",
            CHARUCO,
            "--motion",
            "board:x",
            "--output",
            str(output),
        ]
        start = time.monotonic()
        code = cli.main([*arguments, "--topic", "line/image_raw"])
        assert code == 0, capsys.readouterr().err
        assert time.monotonic() - start < 50
        assert cli.main([*arguments, "--topic", "nothing", "--wait", "0.5"]) == 1
        assert "no image came on nothing: is the camera running?" in capsys.readouterr().err
    finally:
        done.set()
        thread.join()
        node.destroy_node()
        rclpy.shutdown(context=context)
    read = read_calibration(output)
    assert belt_error(read.plane, true_plane(board, turn, shift)) < 0.002
    np.testing.assert_allclose(read.camera.matrix, MATRIX)
