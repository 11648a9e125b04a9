"""Where to grip an item whose outline is known: with parallel jaws, or with a suction cup.

Everything lies in one plane, in any unit, which may be pixels of an image or metres on the belt. An
angle is measured from the x axis towards the y axis and lies in (-pi/2, pi/2].

*Jaws* close along a line across the outline. A grasp is antipodal (Nguyen, "Constructing
force-closure grasps", IJRR 1988): the line lies within the friction cones of both contacts. The
normal of a contact is that of the patch that the jaw covers, so that the teeth of a pixel outline
do not count. Besides, the opening must be within the gripper's limits, and the open jaws must come
down on free belt: not on a neighbour, not on another limb of the item, not behind a guide. Of what
remains the best has sides square to the jaws, even contacts, a short opening, and the centre of
mass near the middle, in that order of force; see `Grasp.quality`.

*Suction* needs the largest circle within the outline and beside its holes, or one with plenty of
room for the cup near the centre of mass. The cup comes from straight above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Complex = NDArray[np.complex128]

GRIPPERS = ("jaws", "suction")
#: Names of the sides towards lower x, higher x, lower y and higher y, in an image ...
IMAGE_SIDES = ("left", "right", "top", "bottom")
#: ... and on the belt, whose x axis runs along its motion and whose y axis to the left of it.
BELT_SIDES = ("rear", "front", "right", "left")

#: Directions that the jaws are tried in, evenly spread from the short axis on ...
FAN = 8
#: ... and across so many of the longest sides of the outline, simplified by this share of its
#: length.
LONGEST_SIDES = 6
SIMPLIFY = 0.03
#: Where lines across the outline are tried: shares of the way from the centre of mass to its end.
PLACES = np.array([-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8])
#: A contact is smoothed over the jaw's width or so many times the outline's error, whichever is
#: more, but over no more than this share of the outline.
SMOOTH_ERRORS = 8.0
SMOOTH_SHARE = 0.125
#: Cells along the longer side of the outline in the search for a circle.
CELLS = 64


@dataclass(frozen=True)
class Gripper:
    """What grips. Lengths are in the plane's unit, angles in radians.

    Attributes:
        kind: "jaws" or "suction".
        min_opening, max_opening: what the jaws can hold, and how far they open.
        jaw_width: of a jaw's face, across the direction in which the jaws close.
        jaw_thickness: of a jaw, along that direction.
        clearance: left free on every side of a jaw when it comes down, and between the rim of the
            cup and the item's edge.
        friction_angle: half the angle of the friction cone, atan of the coefficient; 0.35 are a
            coefficient of 0.36, as of hard plastic on rubber that is not quite clean.
        cup_diameter: of the suction cup; 0 if it is not known.
        metre: how many of the plane's units are a metre, for what is said of a grasp; 0 if unknown.
    """

    kind: str = "jaws"
    min_opening: float = 0.0
    max_opening: float = math.inf
    jaw_width: float = 0.0
    jaw_thickness: float = 0.0
    clearance: float = 0.0
    friction_angle: float = 0.35
    cup_diameter: float = 0.0
    metre: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in GRIPPERS:
            raise ValueError(f"gripper '{self.kind}' is none of {', '.join(GRIPPERS)}")
        for name in ("min_opening", "jaw_width", "jaw_thickness", "clearance", "cup_diameter"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not self.max_opening > self.min_opening:
            raise ValueError(
                f"max_opening is {self.max_opening}; it must be above min_opening, which is "
                f"{self.min_opening}"
            )
        if not 0.0 < self.friction_angle < math.pi / 2:
            raise ValueError(
                f"friction_angle is {self.friction_angle}; it must lie between 0 and pi/2"
            )

    def scaled(self, per_metre: float) -> Gripper:
        """Turn a gripper told in metres into that of a plane with so many units per metre."""
        lengths = {
            name: getattr(self, name) * per_metre
            for name in (
                "min_opening",
                "max_opening",
                "jaw_width",
                "jaw_thickness",
                "clearance",
                "cup_diameter",
            )
        }
        return replace(self, **lengths, metre=per_metre)


@dataclass(frozen=True)
class Grasp:
    """Where and how to grip.

    Attributes:
        kind: "jaws" or "suction".
        center: the middle between the jaws, or of the cup.
        angle: direction in which the jaws close; across the long axis for suction.
        width: distance between the jaws where they touch the outline; for suction the diameter of
            the largest circle around the centre that is free of edges and holes.
        quality: 0..1, and 0 where there is a reason. With jaws the product of four numbers, each 1
            at best: contacts square to the jaws (0 at the cone's edge), even contacts (0.5 on a
            right-angled corner), short opening (0.5 at the limit, or where it is 1.5 times as long
            as the item), centre of mass in the middle (0.5 where it is half way to the item's
            farthest point). With suction that of room (0.5 where the
            cup just fits, 1 where twice the cup does) and of the centre of mass.
        reason: why it will not do, or "".
    """

    kind: str
    center: tuple[float, float]
    angle: float
    width: float
    quality: float
    reason: str

    @property
    def pickable(self) -> bool:
        """Whether there is nothing against it."""
        return not self.reason


def normalize_angle(angle: float) -> float:
    """The same undirected axis with an angle in (-pi/2, pi/2]."""
    angle = math.remainder(angle, math.pi)
    return angle + math.pi if angle <= -math.pi / 2 else angle


def find_grasps(
    outlines: Sequence[ArrayLike],
    gripper: Gripper,
    *,
    centers: Sequence[tuple[float, float]] | None = None,
    angles: Sequence[float] | None = None,
    holes: Sequence[Sequence[ArrayLike]] | None = None,
    guides: Sequence[tuple[float, float, float]] = (),
    tolerance: float = 0.0,
    sides: Sequence[str] = IMAGE_SIDES,
) -> tuple[Grasp, ...]:
    """The best grasp of each of several items, the others of which may be in the way.

    Args:
        outlines: (K, 2) each.
        gripper: its lengths in the outlines' unit.
        centers: of mass, one per outline; as the following see `find_grasp`.
        angles: of the long axes, one per outline.
        holes: those of each outline.
        guides: walls along the belt.
        tolerance: of the outlines.
        sides: names.

    Raises:
        ValueError: as `find_grasp`, or if the sequences differ in length.
    """
    shapes = [_as_complex(outline) for outline in outlines]
    for name, given in (("centers", centers), ("angles", angles), ("holes", holes)):
        if given is not None and len(given) != len(shapes):
            raise ValueError(f"{len(given)} {name} are given for {len(shapes)} outlines")
    reach = _reach(gripper)
    near = np.zeros((len(shapes), len(shapes)), bool)
    if gripper.kind == "jaws" and reach > 0 and len(shapes) > 1:
        low = np.array([(s.real.min(), s.imag.min()) for s in shapes])
        high = np.array([(s.real.max(), s.imag.max()) for s in shapes])
        near = ((low[None] <= high[:, None] + reach) & (high[None] >= low[:, None] - reach)).all(2)
        np.fill_diagonal(near, False)
    return tuple(
        _find(
            shape,
            gripper,
            None if centers is None else complex(*centers[index]),
            None if angles is None else angles[index],
            () if holes is None else [_as_complex(hole) for hole in holes[index]],
            [shapes[other] for other in np.flatnonzero(near[index])],
            guides,
            tolerance,
            sides,
        )
        for index, shape in enumerate(shapes)
    )


def find_grasp(
    outline: ArrayLike,
    gripper: Gripper,
    *,
    center: tuple[float, float] | None = None,
    angle: float | None = None,
    holes: Sequence[ArrayLike] = (),
    neighbours: Sequence[ArrayLike] = (),
    guides: Sequence[tuple[float, float, float]] = (),
    tolerance: float = 0.0,
    sides: Sequence[str] = IMAGE_SIDES,
) -> Grasp:
    """The best grasp of an item.

    Args:
        outline: (K, 2) corners of its outer edge, in either sense of rotation.
        gripper: its lengths in the outline's unit.
        center: its centre of mass, by default that of the outline.
        angle: of its long axis, by default that of the smallest rectangle around the outline.
        holes: (K, 2) each, on which a cup finds no hold. Jaws do not reach into them.
        neighbours: (K, 2) each, outlines of what jaws must not come down on. What lies within a
            neighbour's outline lies on the neighbour.
        guides: (nx, ny, d) each, a wall along the belt: the belt is where nx x + ny y <= d, with
            (nx, ny) of length 1.
        tolerance: by how much an outline may be wrong, such as the size of a network's pixel.
        sides: what the sides towards lower x, higher x, lower y and higher y are called.

    Returns:
        the best grasp; where none will do, one that nearly does, and the reason.

    Raises:
        ValueError: an outline that is not (K, 2) with at least three corners, or not finite.
    """
    return _find(
        _as_complex(outline),
        gripper,
        None if center is None else complex(*center),
        angle,
        [_as_complex(hole) for hole in holes],
        [_as_complex(neighbour) for neighbour in neighbours],
        guides,
        tolerance,
        sides,
    )


def _as_complex(outline: ArrayLike) -> Complex:
    """(K,) x + iy of the corners. Turning is multiplication in this form."""
    points = np.ascontiguousarray(outline, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
        raise ValueError(f"an outline has the shape {points.shape}; it must be (K, 2) with K >= 3")
    if not np.isfinite(points).all():
        raise ValueError("an outline has a corner that is not finite")
    return points.view(np.complex128)[:, 0]


def _reach(gripper: Gripper) -> float:
    """How far an open jaw and what is left free around it may lie from the item."""
    deep = gripper.jaw_thickness + 2 * gripper.clearance
    return math.hypot(deep, gripper.jaw_width / 2 + gripper.clearance) if deep > 0 else 0.0


def _find(
    outline: Complex,
    gripper: Gripper,
    center: complex | None,
    angle: float | None,
    holes: Sequence[Complex],
    neighbours: Sequence[Complex],
    guides: Sequence[tuple[float, float, float]],
    tolerance: float,
    sides: Sequence[str],
) -> Grasp:
    # Numbers are kept small, as is due to single precision and to the belt's kilometres.
    origin = complex(outline[0])
    shape = outline - origin
    cross = (shape.conj() * _next(shape)).imag
    area = 0.5 * float(cross.sum())
    if center is None:
        moved = ((shape + _next(shape)) * cross).sum() / (6 * area) if area else shape.mean()
        center = complex(moved) + origin
    if angle is None:
        angle = _long_axis(shape)
    shape += origin - center
    if area < 0:
        shape = shape[::-1]
    shape = shape[shape != _next(shape)]
    here = (center.real, center.imag)
    across = normalize_angle(angle + math.pi / 2)
    if len(shape) < 3 or area == 0:
        return Grasp(gripper.kind, here, across, 0.0, 0.0, "its outline has no area")
    walls = np.array(guides, np.float64).reshape(-1, 3)
    walls[:, 2] -= walls[:, 0] * center.real + walls[:, 1] * center.imag
    if gripper.kind == "suction":
        grasp = _suction(shape, [hole - center for hole in holes], gripper, across, walls)
    else:
        others = [other - center for other in neighbours]
        grasp = _jaws(shape, gripper, across, others, walls, tolerance, sides)
    x, y = grasp.center
    return replace(grasp, center=(x + center.real, y + center.imag))


def _next(values: NDArray[Any]) -> NDArray[Any]:
    """What follows each entry of a ring, along the last axis."""
    return np.concatenate([values[..., 1:], values[..., :1]], axis=-1)


def _points(shape: Complex) -> NDArray[np.float32]:
    return shape.astype(np.complex64).view(np.float32).reshape(-1, 2)


def _long_axis(shape: Complex) -> float:
    _, (first, second), degrees = cv2.minAreaRect(_points(shape))
    return math.radians(degrees) + (math.pi / 2 if first < second else 0.0)


def _told(length: float, gripper: Gripper) -> str:
    return f"{1e3 * length / gripper.metre:.0f} mm" if gripper.metre else f"{length:.3g}"


def _central(away: Any, shape: Complex) -> Any:
    """1 at the centre of mass, 0.5 half way to the farthest point of the outline."""
    return 1.0 / (1.0 + (away / (0.5 * np.abs(shape).max())) ** 2)


# --- jaws -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Chords:
    """Places where jaws could close; all are (n,), the origin is the centre of mass."""

    direction: Complex
    first: Complex  # where the jaw on the side of -direction touches
    second: Complex
    worst: NDArray[np.float64]  # cosine between the jaws and the less square contact
    even: NDArray[np.float64]  # 1 where the contact is a straight line

    @property
    def width(self) -> NDArray[np.float64]:
        return np.abs(self.second - self.first)

    @property
    def middle(self) -> Complex:
        return 0.5 * (self.first + self.second)

    def __getitem__(self, which: Any) -> _Chords:
        return _Chords(
            self.direction[which],
            self.first[which],
            self.second[which],
            self.worst[which],
            self.even[which],
        )


def _directions(shape: Complex, across: float) -> Complex:
    """(D,) unit directions worth a try: a fan, and those across the longest sides."""
    fan = np.exp(1j * (across + np.arange(FAN) * (math.pi / FAN)))
    points = _points(shape)
    length = cv2.arcLength(points, True)
    corners = cv2.approxPolyDP(points, SIMPLIFY * length, True)[:, 0].astype(np.float64)
    corner = corners.view(np.complex128)[:, 0]
    side = _next(corner) - corner
    size = np.abs(side)
    longest = np.argsort(-size, kind="stable")[:LONGEST_SIDES]
    longest = longest[size[longest] > 0]
    return np.concatenate([fan, 1j * side[longest] / size[longest]])


def _chords(shape: Complex, directions: Complex, patch: float) -> _Chords:
    """All chords of a counter-clockwise shape along some directions, at `PLACES`.

    Of a line that crosses the outline more than twice these are each piece within the outline, and
    the whole from the first crossing to the last.
    """
    local = shape * directions.conj()[:, None]  # (D, K); the jaws close along the real axis
    along, across = np.ascontiguousarray(local.real), np.ascontiguousarray(local.imag)
    end = np.where(
        PLACES < 0, -across.min(axis=1)[:, None], across.max(axis=1)[:, None]
    )  # (D, P), from the centre of mass outwards
    place = PLACES * end
    above = across[:, None] > place[:, :, None]
    # Much faster than np.nonzero, and sorted by line all the same.
    line, corner = np.divmod(np.flatnonzero(above != _next(above)), len(shape))
    turn = line // len(PLACES)
    following = (corner + 1) % len(shape)
    offset = place.ravel()[line]
    before = across[turn, corner]
    share = (offset - before) / (across[turn, following] - before)
    start = along[turn, corner]
    position = start + share * (along[turn, following] - start)

    # Every line crosses a ring an even number of times, so that sorted crossings pair off.
    order = np.lexsort((position, line))
    count = np.bincount(line)
    last = np.cumsum(count)[count > 2]
    first = np.concatenate([order[0::2], order[last - count[count > 2]]])
    second = np.concatenate([order[1::2], order[last - 1]])

    # The patch that a jaw covers, half of it to either side along the outline.
    edge = _next(shape) - shape
    length = np.abs(edge)
    arc = np.concatenate([[0.0], np.cumsum(length)])
    whole = arc[-1]
    reached = arc[corner] + share * length[corner]
    arc = np.concatenate([arc[:-1] - whole, arc[:-1], arc + whole])
    ring = np.concatenate([shape, shape, shape, shape[:1]])
    covered = np.interp(reached + patch / 2, arc, ring) - np.interp(reached - patch / 2, arc, ring)
    size = np.maximum(np.abs(covered), 1e-9 * whole)
    direction = directions[turn]
    # The outward normal of a counter-clockwise ring is its tangent turned by -90 degrees.
    square = (-1j * covered * direction.conj()).real / size
    even = np.minimum(size / patch, 1.0)
    point = (position + 1j * offset) * direction
    return _Chords(
        direction[first],
        point[first],
        point[second],
        np.minimum(-square[first], square[second]),
        np.minimum(even[first], even[second]),
    )


def _jaws(
    shape: Complex,
    gripper: Gripper,
    across: float,
    neighbours: Sequence[Complex],
    walls: NDArray[np.float64],
    tolerance: float,
    sides: Sequence[str],
) -> Grasp:
    length = float(np.abs(_next(shape) - shape).sum())
    patch = min(max(gripper.jaw_width, SMOOTH_ERRORS * tolerance), SMOOTH_SHARE * length)
    chords = _chords(shape, _directions(shape, across), patch or 0.01 * length)
    width = chords.width
    tilt = np.arccos(np.clip(chords.worst, -1.0, 1.0))
    limit = min(gripper.max_opening, 3.0 * float(np.abs(shape).max()))
    quality = (
        np.maximum(1.0 - (tilt / gripper.friction_angle) ** 2, 0.0)
        * chords.even**2
        * (1.0 - 0.5 * np.minimum(width / limit, 1.0))
        * _central(np.abs(chords.middle), shape)
    )
    quality[width <= 0] = 0.0
    holds = quality > 0
    if not holds.any():
        degrees = math.degrees(gripper.friction_angle)
        best = int((chords.worst - 10 * (width <= 0)).argmax())
        return _as_grasp(chords, best, 0.0, f"no two sides face each other within {degrees:.0f}°")
    wide = width + 2 * gripper.clearance > gripper.max_opening
    narrow = width < gripper.min_opening
    order = np.argsort(-quality, kind="stable")
    order = order[holds[order]]
    fits = order[~(wide | narrow)[order]]
    if len(fits) == 0:
        return _beyond_limits(chords, order, gripper)
    if _reach(gripper) == 0 and len(walls) == 0:
        return _as_grasp(chords, int(fits[0]), float(quality[fits[0]]), "")

    # The best mostly is free, so that not all need to be looked at.
    obstacles = _Obstacles([shape, *neighbours], walls)
    blocked = ""
    for few in (fits[:4], fits[4:32], fits[32:]):
        if len(few) == 0:
            break
        own, other, wall = obstacles.below(chords[few], gripper, tolerance)
        free = ~(own | other | wall).any(axis=0)
        if free.any():
            best = int(few[free.argmax()])
            return _as_grasp(chords, best, float(quality[best]), "")
        if not blocked and not own.any(axis=0).all():
            index = int((~own.any(axis=0)).argmax())
            best = int(few[index])
            blocked = _blocked(chords.direction[best], other[:, index], wall[:, index], sides)
    if blocked:
        return _as_grasp(chords, best, 0.0, blocked)
    if len(fits) < len(order):  # a notch or a tip is of the right width, but no place to hold it by
        return _beyond_limits(chords, order[(wide | narrow)[order]], gripper)
    return _as_grasp(chords, int(fits[0]), 0.0, "no room for the jaws beside its own limbs")


def _beyond_limits(chords: _Chords, order: NDArray[np.intp], gripper: Gripper) -> Grasp:
    """Of chords that are all too wide or too narrow, best first, what comes nearest to the best."""
    width = chords.width
    wide = width[order] + 2 * gripper.clearance > gripper.max_opening
    if wide[0]:
        best = int(order[wide][width[order[wide]].argmin()])
        most = gripper.max_opening - 2 * gripper.clearance
        reason = f"too wide: {_told(width[best], gripper)} above {_told(most, gripper)}"
    else:
        best = int(order[~wide][width[order[~wide]].argmax()])
        least = gripper.min_opening
        reason = f"too narrow: {_told(width[best], gripper)} below {_told(least, gripper)}"
    return _as_grasp(chords, best, 0.0, reason)


def _as_grasp(chords: _Chords, index: int, quality: float, reason: str) -> Grasp:
    middle, direction = chords.middle[index], chords.direction[index]
    angle = normalize_angle(math.atan2(direction.imag, direction.real))
    width = float(np.abs(chords.second[index] - chords.first[index]))
    center = (float(middle.real), float(middle.imag))
    return Grasp("jaws", center, angle, width, min(quality, 1.0), reason)


def _blocked(
    direction: complex, other: NDArray[np.bool_], wall: NDArray[np.bool_], sides: Sequence[str]
) -> str:
    """Say what is in the way of the two jaws, given whether it is at -direction, +direction."""
    lying = abs(direction.real) >= abs(direction.imag)
    names = list(sides[:2] if lying else sides[2:])
    if (direction.real if lying else direction.imag) < 0:
        names.reverse()

    def where(which: NDArray[np.bool_]) -> str:
        return " and ".join(sorted(name for name, is_so in zip(names, which, strict=True) if is_so))

    told = []
    if other.any():
        told.append(f"neighbour at {where(other)}")
    if wall.any():
        told.append(f"guide at {where(wall)}")
    return "blocked by " + " and ".join(told)


class _Obstacles:
    """What jaws must not come down on: rings, the first of which is the item, and walls."""

    def __init__(self, rings: Sequence[Complex], walls: NDArray[np.float64]) -> None:
        self._start = np.concatenate(rings)
        self._end = np.concatenate([_next(ring) for ring in rings])
        self._own = len(rings[0])
        sizes = [len(ring) for ring in rings[1:]]
        self._first = np.cumsum([0, *sizes[:-1]]) if sizes else np.zeros(0, np.intp)
        self._walls = walls

    def below(
        self, chords: _Chords, gripper: Gripper, tolerance: float
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """What lies below the open jaws, each (2, n): the item, a neighbour, a wall."""
        clearance = gripper.clearance
        outward = np.stack([-chords.direction, chords.direction])[..., None]  # (2, n, 1)
        contact = np.stack([chords.first, chords.second])[..., None]
        # (2, n, E): the real axis points away from the item.
        start = (self._start - contact) * outward.conj()
        end = (self._end - contact) * outward.conj()
        count = self._own
        # Within the cone the item may bulge beside the contact; the jaw then touches there.
        far = clearance + gripper.jaw_thickness
        bulge = 0.5 * gripper.jaw_width * math.tan(gripper.friction_angle)
        bulge = max(bulge, tolerance, 1e-3 * far)
        own = np.zeros(start.shape[:2], bool)
        if far > bulge:
            hits = _hits(start[..., :count], end[..., :count], bulge, far, gripper.jaw_width / 2)
            own = hits.any(axis=-1)
        other = np.zeros_like(own)
        half = gripper.jaw_width / 2 + clearance
        far += clearance
        if len(self._first):
            start, end = start[..., count:], end[..., count:]
            other = _hits(start, end, -tolerance, far, half).any(axis=-1)
            # A neighbour that is larger than the jaw may have no edge below it.
            low, high = start.imag > 0, end.imag > 0
            turned = ((start - far / 2).conj() * (end - far / 2)).imag
            beyond = (low != high) & ((turned > 0) == high)
            inside = np.add.reduceat(beyond, self._first, axis=-1, dtype=np.intp) % 2 == 1
            other |= inside.any(axis=-1)
        wall = np.zeros_like(own)
        for x, y, distance in self._walls:
            # The farthest corner of the jaw, along the normal of the wall.
            normal = complex(x, y)
            base = (contact * normal.conjugate()).real[..., 0]
            ahead = (outward * normal.conjugate()).real[..., 0]
            beside = np.abs((outward * normal.conjugate()).imag[..., 0])
            wall |= base + np.maximum(ahead * far, 0.0) + beside * half > distance
        return own, other, wall


def _hits(start: Complex, end: Complex, near: float, far: float, half: float) -> NDArray[np.bool_]:
    """Which edges meet the box near <= x <= far, |y| <= half (by separating axes)."""
    x0, x1 = start.real.copy(), end.real.copy()  # in one piece, which is faster
    y0, y1 = start.imag.copy(), end.imag.copy()
    middle, reach = (near + far) / 2, (far - near) / 2
    dx, dy = x1 - x0, y1 - y0
    return (
        (np.minimum(x0, x1) < far)
        & (np.maximum(x0, x1) > near)
        & (np.minimum(y0, y1) < half)
        & (np.maximum(y0, y1) > -half)
        & (np.abs(dx * y0 - dy * (x0 - middle)) < reach * np.abs(dy) + half * np.abs(dx))
    )


# --- suction --------------------------------------------------------------------------------------


def _suction(
    shape: Complex,
    holes: Sequence[Complex],
    gripper: Gripper,
    across: float,
    walls: NDArray[np.float64],
) -> Grasp:
    need = gripper.cup_diameter / 2 + gripper.clearance
    # More than twice the room is no better; nearer to the centre of mass then is.
    enough = 2 * need or math.inf

    def value(point: Complex, depth: NDArray[Any]) -> NDArray[Any]:
        for x, y, distance in walls:
            depth = np.minimum(depth, distance - x * point.real - y * point.imag)
        return np.minimum(depth, enough) - 0.1 * np.abs(point)

    low = complex(shape.real.min(), shape.imag.min())
    size = complex(shape.real.max(), shape.imag.max()) - low
    cell = max(size.real, size.imag) / CELLS
    columns, rows = round(size.real / cell) + 3, round(size.imag / cell) + 3
    mask = np.zeros((rows, columns), np.uint8)
    # Several rings in one call are filled by the even-odd rule: a hole stays free.
    rings = [np.round(_points((ring - low) / cell + (1 + 1j))).astype(np.int32) for ring in holes]
    outer = np.round(_points((shape - low) / cell + (1 + 1j))).astype(np.int32)
    cv2.fillPoly(mask, [outer, *rings], (1,))
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 5) * cell
    grid = (np.arange(columns) - 1) * cell + 1j * ((np.arange(rows) - 1) * cell)[:, None] + low
    best = grid.ravel()[int(np.where(mask > 0, value(grid, depth), -np.inf).argmax())]

    start = np.concatenate([shape, *holes])
    end = np.concatenate([_next(ring) for ring in (shape, *holes)])
    around = np.arange(-3, 4) / 3
    near = (around + 1j * around[:, None]).ravel()
    for step in (1.2 * cell, 0.4 * cell, 0.13 * cell):
        points = best + step * near
        exact = _depth(points, start, end)
        best = points[int(value(points, exact).argmax())]
    room = float(_depth(np.array([best]), start, end)[0])
    grasp = Grasp(
        "suction", (float(best.real), float(best.imag)), across, 2 * max(room, 0.0), 0.0, ""
    )
    beyond = any(x * best.real + y * best.imag + need > distance for x, y, distance in walls)
    if beyond and (room >= need or not _suction(shape, holes, gripper, across, walls[:0]).reason):
        return replace(grasp, reason="blocked by guide")
    if room < need or room <= 0:
        told = f"{_told(2 * max(room, 0.0), gripper)} below {_told(2 * need, gripper)}"
        return replace(grasp, reason=f"smaller than the cup: {told}")
    fit = min(0.5 * room / need, 1.0) if need else 1.0
    return replace(grasp, quality=float(fit * _central(abs(best), shape)))


def _depth(points: Complex, start: Complex, end: Complex) -> NDArray[np.float64]:
    """(n,) distance of points to the nearest edge, negative outside (even-odd rule)."""
    edge = end - start
    away = points[:, None] - start
    ahead = edge.conj() * away
    size = np.abs(edge) ** 2
    share = np.clip(ahead.real / np.where(size > 0, size, 1.0), 0.0, 1.0)
    distance = np.abs(away - share * edge).min(axis=1)
    up = end.imag > points.imag[:, None]
    crosses = (away.imag < 0) != up  # (start above) differs from (end above)
    inside = (crosses & ((ahead.imag > 0) == up)).sum(axis=1) % 2 == 1
    return np.where(inside, distance, -distance)
