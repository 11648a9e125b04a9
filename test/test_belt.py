"""Pixels to metres on the belt and back, against OpenCV's lenses and against geometry by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import yaml

from waste_seg_ros.perception.belt import (
    BeltError,
    BeltPlane,
    Calibration,
    Camera,
    RobotBase,
    camera_from_info,
    default_camera,
    default_plane,
    describe_on_belt,
    directions,
    height_from_depth,
    position_covariance,
    position_jacobian,
    project,
    read_calibration,
    read_camera_info,
    rotation_to_robot,
    to_belt,
    to_pixels,
    to_robot,
    write_calibration,
    yaw_rotation,
)

SIZE = (1280, 960)
MATRIX = np.array([[900.0, 0, 655.3], [0, 905.0, 470.8], [0, 0, 1]])
LENSES = {
    "none": ("none", []),
    "barrel": ("plumb_bob", [-0.35, 0.13, 0.002, -0.0015, -0.02]),
    "pincushion": ("plumb_bob", [0.3, 0.1, -0.002, 0.001]),
    # The lens of a wide RGB camera: large coefficients above and below the line.
    "rational": ("rational_polynomial", [7.5, 4.2, 1e-3, -8e-4, 0.2, 7.8, 6.6, 1.1]),
    "prism": (
        "rational_polynomial",
        [-0.2, 0.05, 1e-3, 2e-3, 0.0, 0.1, 0.02, 0.0, 2e-3, -1e-3, -3e-3, 5e-4],
    ),
    "fisheye": ("equidistant", [-0.05, 0.02, -0.01, 0.002]),
}


def camera(lens="none", focal=1.0):
    model, coefficients = LENSES[lens]
    matrix = MATRIX * np.array([[focal, 1, 1], [1, focal, 1], [1, 1, 1]])
    return Camera(matrix, np.array(coefficients), model, SIZE)


def tilted(degrees=(20.0, -12.0, 35.0), distance=1.1):
    """A belt under a camera that looks at it at an angle and is turned."""
    turn = cv2.Rodrigues(np.radians(degrees))[0]
    return BeltPlane(turn @ np.diag([1.0, -1.0, -1.0]), np.array([0.03, -0.05, distance]))


def corners(inset=0.0):
    w, h = SIZE[0] - 1, SIZE[1] - 1
    i = inset
    return np.array(
        [[i, i], [w - i, i], [i, h - i], [w - i, h - i], [w / 2, i], [i, h / 2], [655.3, 470.8]]
    )


@pytest.mark.parametrize("lens", [name for name in LENSES if name != "fisheye"])
def test_pixels_are_those_of_opencv(lens):
    view, plane = camera(lens), tilted()
    points = np.random.default_rng(0).uniform(-0.4, 0.4, (50, 3)) * (1, 1, 0.2)
    rvec = cv2.Rodrigues(plane.rotation)[0]
    expected, _ = cv2.projectPoints(points, rvec, plane.translation, MATRIX, view.distortion)
    np.testing.assert_allclose(to_pixels(view, plane, points), expected[:, 0], atol=1e-9)


def test_pixels_of_a_fisheye_are_those_of_opencv():
    view, plane = camera("fisheye"), tilted()
    points = np.random.default_rng(0).uniform(-0.8, 0.8, (50, 3)) * (1, 1, 0.2)
    rvec = cv2.Rodrigues(plane.rotation)[0]
    expected, _ = cv2.fisheye.projectPoints(
        points[:, None], rvec, plane.translation, MATRIX, view.distortion
    )
    np.testing.assert_allclose(to_pixels(view, plane, points), expected[:, 0], atol=1e-9)


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("height", [0.0, 0.08])
def test_there_and_back_at_the_corners(lens, height):
    view, plane = camera(lens), tilted()
    grid = np.stack(np.meshgrid(np.linspace(0, 1279, 9), np.linspace(0, 959, 7)), -1).reshape(-1, 2)
    pixels = np.concatenate([corners(), grid])
    places = to_belt(view, plane, pixels, height)
    back = to_pixels(view, plane, np.column_stack([places, np.full(len(places), height)]))
    assert np.abs(back - pixels).max() < 1e-6
    assert np.abs(to_belt(view, plane, back, height) - places).max() < 1e-6


def test_lenses_of_the_test_do_bend():
    for lens in LENSES:
        if lens != "none":
            moved = to_belt(camera(lens), default_plane(1.0), corners()) - to_belt(
                camera(), default_plane(1.0), corners()
            )
            assert np.abs(moved[:4]).max() > 0.01, lens


def test_a_fisheye_sees_far_to_the_side():
    view = camera("fisheye", focal=0.7)
    plane = default_plane(1.0)
    places = to_belt(view, plane, corners())
    assert np.hypot(*places[0]) > 2.0
    np.testing.assert_allclose(to_pixels(view, plane, places), corners(), atol=1e-6)


def test_default_plane_lies_as_rep_103_says():
    view, plane = camera(), default_plane(2.0)
    origin, right, up = to_belt(
        view, plane, [[655.3, 470.8], [655.3 + 90, 470.8], [655.3, 470.8 - 90.5]]
    )
    np.testing.assert_allclose(origin, [0, 0], atol=1e-12)
    np.testing.assert_allclose(right, [0.2, 0], atol=1e-12)
    np.testing.assert_allclose(up, [0, 0.2], atol=1e-12)  # left of the motion, seen from above
    np.testing.assert_allclose(np.cross(*plane.rotation.T[:2]), plane.rotation[:, 2])
    assert plane.camera.tolist() == [0, 0, 2.0]


def test_height_moves_a_place_towards_the_camera():
    view, plane = camera(), default_plane(1.0)
    pixel = [[655.3 + 450, 470.8]]  # half a metre to the side
    assert to_belt(view, plane, pixel)[0, 0] == pytest.approx(0.5)
    assert to_belt(view, plane, pixel, 0.2)[0, 0] == pytest.approx(0.4)
    both = to_belt(view, plane, pixel * 2, np.array([0.0, 0.2]))
    np.testing.assert_allclose(both[:, 0], [0.5, 0.4])


def test_what_sees_no_belt_is_refused():
    view = camera()
    with pytest.raises(BeltError, match="not below the camera"):
        to_belt(view, default_plane(1.0), [[10, 10]], 1.0)
    steep = tilted((65.0, 0.0, 0.0))
    with pytest.raises(BeltError, match=r"pixel \(640.0, 959.0\) sees no belt"):
        to_belt(view, steep, [[640, 100], [640, 959]])
    # The image of this lens ends at 0.6 of the focal length: 540 px.
    folds = Camera(MATRIX, [-0.4, 0, 0, 0], "plumb_bob", SIZE)
    assert np.isnan(directions(folds, [[655.3 + 560, 470.8]])).all()
    assert np.isfinite(directions(folds, [[655.3 + 540, 470.8]])).all()
    with pytest.raises(BeltError, match="sees no belt"):
        to_belt(folds, default_plane(1.0), [[655.3 + 560, 470.8]])
    # What the lens would fold back into the picture has no pixel.
    assert np.isnan(to_pixels(folds, default_plane(1.0), [[1.6, 0.0]])).all()
    assert np.isnan(project(view, np.array([[0.1, 0.1, -1.0]]))).all()


@pytest.mark.parametrize("lens", LENSES)
def test_jacobian_is_the_derivative(lens):
    view, plane, h = camera(lens), tilted(), 0.05
    pixels = corners(inset=30)
    by_pixel, by_height = position_jacobian(view, plane, pixels, h)
    step = 1e-3
    for axis in range(2):
        shift = np.eye(2)[axis] * step
        slope = to_belt(view, plane, pixels + shift, h) - to_belt(view, plane, pixels - shift, h)
        np.testing.assert_allclose(by_pixel[:, :, axis], slope / (2 * step), rtol=1e-5, atol=1e-9)
    slope = to_belt(view, plane, pixels, h + 1e-4) - to_belt(view, plane, pixels, h - 1e-4)
    np.testing.assert_allclose(by_height, slope / 2e-4, rtol=1e-5, atol=1e-9)


def test_covariance_is_what_noise_does():
    view, plane = camera("barrel"), tilted()
    plane = BeltPlane(plane.rotation, plane.translation, error_m=0.002)
    pixel, sigma, height_sigma = np.array([1150.0, 90.0]), 1.5, 0.004
    rng = np.random.default_rng(1)
    pixels = pixel + rng.normal(0, sigma, (40_000, 2))
    # The belt is off by (dx, dy, dz): what is seen lies that much higher, and not where it seems.
    off = rng.normal(0, plane.error_m, (len(pixels), 3))
    heights = off[:, 2] + rng.normal(0, height_sigma, len(pixels))
    places = to_belt(view, plane, pixels, heights) - off[:, :2]
    drawn = np.cov(places.T)
    found = position_covariance(view, plane, pixel, sigma, 0.0, height_sigma)
    np.testing.assert_allclose(found, drawn, rtol=0.04, atol=0.04 * drawn.max())
    # Each part has its share.
    exact = BeltPlane(plane.rotation, plane.translation)
    only_pixel = position_covariance(view, exact, pixel, sigma)
    assert np.trace(only_pixel) < 0.5 * np.trace(found)
    assert (np.linalg.eigvalsh(found - only_pixel) > 0).all()


def box(center, length, width, yaw, height=0.0):
    local = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * (length / 2, width / 2)
    edges = np.concatenate(
        [
            np.linspace(a, b, 12, endpoint=False)
            for a, b in zip(local, np.roll(local, -1, axis=0), strict=True)
        ]
    )
    points = edges @ yaw_rotation(yaw)[:2, :2].T + center
    return np.column_stack([points, np.full(len(points), height)])


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("yaw", [0.4, -1.2, math.pi / 2 - 0.01])
def test_item_is_measured_in_the_belt_frame(lens, yaw):
    view, plane = camera(lens), tilted()
    outline = to_pixels(view, plane, box((0.12, -0.08), 0.21, 0.07, yaw))
    item = describe_on_belt(outline, view, plane, pixel_sigma=0.5)
    np.testing.assert_allclose(item.position, [0.12, -0.08], atol=1e-5)
    assert item.length == pytest.approx(0.21, abs=2e-5)
    assert item.width == pytest.approx(0.07, abs=2e-5)
    assert abs(math.remainder(item.yaw - yaw, math.pi)) < 1e-3
    assert -math.pi / 2 < item.yaw <= math.pi / 2
    assert item.height is None
    # Simplified to its four corners, counter-clockwise.
    assert len(item.outline) == 4
    x, y = (item.outline - item.position).T
    area = 0.5 * np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)
    assert area == pytest.approx(0.21 * 0.07, rel=1e-3)
    assert (np.linalg.eigvalsh(item.covariance) > 0).all()


def test_outline_is_simplified_within_the_tolerance():
    view, plane = camera(), default_plane(1.0)
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1) * 0.05
    for tolerance, most in ((0.001, 40), (0.005, 12)):
        item = describe_on_belt(to_pixels(view, plane, circle), view, plane, tolerance_m=tolerance)
        contour = (item.outline * 1e4).astype(np.float32)
        off = [abs(cv2.pointPolygonTest(contour, p, True)) for p in (circle * 1e4).tolist()]
        assert max(off) <= tolerance * 1e4 * 1.01
        assert 6 <= len(item.outline) <= most
    full = describe_on_belt(to_pixels(view, plane, circle), view, plane, tolerance_m=0.0)
    assert len(full.outline) == 200
    # A disc has no long axis.
    assert math.sqrt(full.covariance[2, 2]) > 0.7
    bar = describe_on_belt(to_pixels(view, plane, box((0, 0), 0.2, 0.05, 0)), view, plane)
    assert math.sqrt(bar.covariance[2, 2]) < 0.02


def test_known_height_takes_away_the_parallax():
    view, plane = camera("barrel"), tilted()
    # A lying bottle, 8 cm thick: its outline is seen half as high.
    outline = to_pixels(view, plane, box((0.3, 0.2), 0.22, 0.08, 0.7, height=0.04))
    known = describe_on_belt(outline, view, plane, height_m=0.08)
    unknown = describe_on_belt(outline, view, plane, height_sigma_m=0.03)
    np.testing.assert_allclose(known.position, [0.3, 0.2], atol=1e-5)
    assert known.length == pytest.approx(0.22, abs=5e-5)
    off = unknown.position - (0.3, 0.2)
    assert np.hypot(*off) > 0.01
    # ... and the covariance owns up to it.
    assert off @ np.linalg.inv(unknown.covariance[:2, :2]) @ off < 9
    assert known.height == 0.08


def test_an_outline_of_two_points_is_refused():
    with pytest.raises(BeltError, match="3 points, not 2"):
        describe_on_belt([[1, 1], [2, 2]], camera(), default_plane(1.0))


def depth_image(view, plane, size, top, outline_m):
    """Depth along z of the belt with a block of that height on it, seen by the camera."""
    x, y = np.meshgrid(
        (np.arange(size[0]) + 0.5) * view.size[0] / size[0] - 0.5,
        (np.arange(size[1]) + 0.5) * view.size[1] / size[1] - 0.5,
    )
    pixels = np.stack([x, y], -1).reshape(-1, 2)
    places = to_belt(view, plane, pixels, top)
    contour = (outline_m[:, :2] * 1e4).astype(np.float32)
    inside = np.array(
        [cv2.pointPolygonTest(contour, p, False) >= 0 for p in (places * 1e4).tolist()]
    )
    heights = np.where(inside, top, 0.0)
    places = to_belt(view, plane, pixels, heights)
    points = np.column_stack([places, heights]) @ plane.rotation.T + plane.translation
    return points[:, 2].reshape(size[1], size[0])


def test_height_from_depth():
    view, plane = camera("barrel"), tilted()
    block = box((0.1, 0.05), 0.2, 0.1, 0.3, height=0.06)
    outline = to_pixels(view, plane, block)
    depth = depth_image(view, plane, (160, 120), 0.06, block)
    assert height_from_depth(depth, outline, view, plane) == pytest.approx(0.06, abs=0.002)
    millimetres = np.round(depth * 1000).astype(np.uint16)
    assert height_from_depth(millimetres, outline, view, plane) == pytest.approx(0.06, abs=0.002)
    # Holes: some are borne, most are not.
    rng = np.random.default_rng(0)
    holes = np.where(rng.random(depth.shape) < 0.5, np.nan, depth).astype(np.float32)
    assert height_from_depth(holes, outline, view, plane) == pytest.approx(0.06, abs=0.002)
    gone = np.where(rng.random(depth.shape) < 0.95, 0.0, depth)
    assert height_from_depth(gone, outline, view, plane) is None
    flat = depth_image(view, plane, (160, 120), 0.0, block)
    assert height_from_depth(flat, outline, view, plane) == pytest.approx(0.0, abs=1e-6)
    assert height_from_depth(depth, outline + 5000, view, plane) is None
    with pytest.raises(BeltError, match="uint8"):
        height_from_depth(depth.astype(np.uint8), outline, view, plane)


def info(**fields):
    values = dict(width=1280, height=960, distortion_model="plumb_bob", d=[-0.1, 0, 0, 0, 0],
                  k=MATRIX.ravel().tolist(), binning_x=0, binning_y=0,
                  roi=SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0))  # fmt: skip
    return SimpleNamespace(**(values | fields))


def test_camera_from_info():
    view = camera_from_info(info(), SIZE)
    np.testing.assert_array_equal(view.matrix, MATRIX)
    assert view.model == "plumb_bob" and view.distortion[0] == -0.1
    # A region of the sensor, binned by 2: the same ray at the pixel's new place.
    roi = SimpleNamespace(x_offset=200, y_offset=100, width=800, height=600)
    part = camera_from_info(info(roi=roi), (400, 300))
    there = (np.array([[700.0, 500.0]]) + 0.5 - (200, 100)) / 2 - 0.5
    np.testing.assert_allclose(directions(part, there), directions(view, [[700, 500]]), atol=1e-12)
    half = view.scaled((640, 480))
    np.testing.assert_allclose(
        directions(half, (np.array([[700.0, 500]]) + 0.5) / 2 - 0.5),
        directions(view, [[700, 500]]), atol=1e-12)  # fmt: skip
    assert view.scaled(SIZE) is view
    with pytest.raises(BeltError, match="another aspect"):
        view.scaled((1280, 720))
    for nothing in (None, info(k=[0.0] * 9)):
        guess = camera_from_info(nothing, (640, 480))
        assert guess.matrix.tolist() == default_camera((640, 480)).matrix.tolist()
        assert guess.matrix[0, 0] == 640 and guess.straight


def test_cameras_that_cannot_be_are_refused():
    for change, problem in (
        (dict(matrix=np.diag([0.0, 1, 1])), "fx, fy above 0"),
        (dict(matrix=np.eye(2)), "3x3"),
        (dict(model="pinhole"), "must be one of"),
        (dict(distortion=[1, 2, 3]), "3 coefficients; plumb_bob takes 0 or 4"),
        (dict(distortion=[math.nan] * 5), "must be numbers"),
        (dict(model="equidistant", distortion=[0.1] * 5), "equidistant takes 4"),
        (dict(distortion=[0.0] * 12 + [0.1, 0]), "tilted sensor"),
        (dict(size=(0, 4)), "size"),
    ):
        values = dict(matrix=MATRIX, distortion=np.zeros(5), model="plumb_bob", size=SIZE)
        with pytest.raises(BeltError, match=problem):
            Camera(**(values | change))
    good = default_plane(1.0)
    with pytest.raises(BeltError, match="right-handed"):
        BeltPlane(np.diag([1.0, 1, -1]), good.translation)
    with pytest.raises(BeltError, match="below the belt"):
        BeltPlane(np.eye(3), good.translation)
    with pytest.raises(BeltError, match="error_m"):
        BeltPlane(good.rotation, good.translation, -1.0)
    with pytest.raises(BeltError, match="below the belt"):
        default_plane(-1.0)


def test_robot_sees_the_belt_from_its_base():
    # The base stands 0.5 m ahead and 0.3 m to the right, looking to the left over the belt.
    robot = RobotBase((0.5, -0.3, 0.1), (0.0, 0.0, math.pi / 2))
    np.testing.assert_allclose(
        to_robot(robot, [[0.5, 0.0, 0.1], [0.4, 0.0, 0.0]]),
        [[0.3, 0.0, 0.0], [0.3, 0.1, -0.1]], atol=1e-12)  # fmt: skip
    turned = rotation_to_robot(robot, yaw_rotation(0.25))
    np.testing.assert_allclose(turned, yaw_rotation(0.25 - math.pi / 2), atol=1e-12)
    hung = RobotBase((0.0, 0.0, 1.0), (math.pi, 0.0, 0.0))  # from the ceiling
    np.testing.assert_allclose(to_robot(hung, [[0.1, 0.2, 0.0]]), [[0.1, -0.2, 1.0]], atol=1e-12)
    turn = RobotBase((0, 0, 0), (0.3, -0.2, 1.1)).rotation
    about = [cv2.Rodrigues(np.eye(3)[i] * a)[0] for i, a in enumerate((0.3, -0.2, 1.1))]
    np.testing.assert_allclose(turn, about[2] @ about[1] @ about[0], atol=1e-12)


@pytest.mark.parametrize("lens", LENSES)
def test_calibration_file_holds_all(tmp_path, lens):
    plane = BeltPlane(tilted().rotation, tilted().translation, 0.0007)
    robot = RobotBase((0.5, -0.3, 0.1), (0.0, 0.01, 1.5))
    file = tmp_path / "new" / "belt.yaml"
    write_calibration(file, Calibration(camera(lens), plane, robot, 0.31, {"board": "x"}))
    read = read_calibration(file)
    np.testing.assert_array_equal(read.camera.matrix, MATRIX)
    np.testing.assert_array_equal(read.camera.distortion, camera(lens).distortion)
    assert (read.camera.model, read.camera.size) == (LENSES[lens][0], SIZE)
    np.testing.assert_array_equal(read.plane.rotation, plane.rotation)
    np.testing.assert_array_equal(read.plane.translation, plane.translation)
    assert read.plane.error_m == 0.0007
    assert read.robot is not None and (read.robot.xyz, read.robot.rpy) == (robot.xyz, robot.rpy)
    assert read.speed == 0.31 and read.report == {"board": "x"}
    assert [p.name for p in file.parent.iterdir()] == ["belt.yaml"]
    again = read_camera_info(file)
    np.testing.assert_array_equal(again.matrix, MATRIX)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "version: is 2"),
        ({"version": None}, "version: is missing"),
        ({"belt": None}, "belt: is missing"),
        ({"belt": [1]}, "belt: must be a mapping"),
        ({"surprise": 1}, "surprise: is not known"),
        ({"camera.width": "wide"}, "camera.width: must be a number"),
        ({"camera.matrix": [[1, 2], [3, 4]]}, "camera.matrix: must be 3x3 numbers"),
        ({"camera.model": "mirror"}, "camera model 'mirror'"),
        ({"camera.distortion": [0.1]}, "camera distortion: has 1 coefficients"),
        ({"belt.translation": [0, 0]}, "belt.translation: must be 3 numbers"),
        ({"belt.translation": [0, 0, math.inf]}, "belt.translation: must be 3 numbers"),
        ({"belt.rotation": [[2, 0, 0], [0, 1, 0], [0, 0, 1]]}, "belt rotation: its columns"),
        ({"belt.error_m": None}, "belt.error_m: is missing"),
        ({"belt.error_m": True}, "belt.error_m: must be a number"),
        ({"belt.errorm": 1}, "belt.errorm: is not known"),
        ({"robot": {"xyz": [0, 0, 0]}}, "robot.rpy: is missing"),
        ({"robot": {"xyz": [0, 0], "rpy": [0, 0, 0]}}, "robot.xyz: must be 3 numbers"),
        ({"speed_m_s": []}, "speed_m_s: must be a number"),
    ],
)
def test_broken_calibration_files_name_the_key(tmp_path, change, problem):
    file = tmp_path / "belt.yaml"
    write_calibration(file, Calibration(camera("barrel"), tilted()))
    data = yaml.safe_load(file.read_text())
    for key, value in change.items():
        *way, last = key.split(".")
        part = data
        for name in way:
            part = part[name]
        if value is None:
            del part[last]
        else:
            part[last] = value
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(BeltError) as caught:
        read_calibration(file)
    assert problem in str(caught.value) and str(caught.value).count(str(file)) == 1


def test_files_that_are_none(tmp_path):
    with pytest.raises(BeltError, match="no such file"):
        read_calibration(tmp_path / "none.yaml")
    for text, problem in (("a: [", "is not YAML"), ("- 1", "must be a mapping"),
                          ("!!python/object/apply:os.getcwd []", "is not YAML")):  # fmt: skip
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(BeltError, match=problem):
            read_calibration(tmp_path / "bad.yaml")


def test_intrinsics_in_the_format_of_ros(tmp_path):
    file = tmp_path / "camera.yaml"
    file.write_text(
        """image_width: 1280
image_height: 960
camera_name: narrow
camera_matrix: {rows: 3, cols: 3, data: [900, 0, 655.3, 0, 905, 470.8, 0, 0, 1]}
distortion_model: plumb_bob
distortion_coefficients: {rows: 1, cols: 5, data: [-0.35, 0.13, 2e-3, -1.5e-3, 0]}
rectification_matrix: {rows: 3, cols: 3, data: [1, 0, 0, 0, 1, 0, 0, 0, 1]}
projection_matrix: {rows: 3, cols: 4, data: [900, 0, 655, 0, 0, 905, 471, 0, 0, 0, 1, 0]}
"""
    )
    read = read_camera_info(file)
    np.testing.assert_array_equal(read.matrix, MATRIX)
    assert read.distortion.tolist() == [-0.35, 0.13, 0.002, -0.0015, 0]
    assert (read.model, read.size) == ("plumb_bob", SIZE)
    file.write_text(file.read_text().replace("655.3, ", ""))
    with pytest.raises(BeltError, match=r"camera.yaml: camera_matrix.data: must be 9 numbers"):
        read_camera_info(file)
