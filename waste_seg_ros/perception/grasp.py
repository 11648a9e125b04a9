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
from functools import cached_property
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
PLACES_A_SIDE = 5
PLACES = np.arange(1 - PLACES_A_SIDE, PLACES_A_SIDE) / PLACES_A_SIDE
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
    count = len(outlines)
    for name, given in (("centers", centers), ("angles", angles), ("holes", holes)):
        if given is not None and len(given) != count:
            raise ValueError(f"{len(given)} {name} are given for {count} outlines")
    if count == 0:
        return ()
    rings = _as_rings(outlines)
    reach = _reach(gripper)
    near = np.zeros((count, count), bool)
    if gripper.kind == "jaws" and reach > 0 and count > 1:
        places = np.array([rings.points.real, rings.points.imag])
        low, high = rings.each(np.minimum, places), rings.each(np.maximum, places) + reach
        near = ((low[:, None] <= high[..., None]) & (high[:, None] >= low[..., None])).all(axis=0)
        np.fill_diagonal(near, False)
    return _find(
        rings,
        rings,
        near,
        gripper,
        None if centers is None else np.array([complex(x, y) for x, y in centers]),
        None if angles is None else np.array(angles, np.float64),
        None if holes is None else [[_as_rings([h]).points for h in own] for own in holes],
        guides,
        tolerance,
        sides,
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
    item, others = _as_rings([outline]), _as_rings(neighbours)
    near = np.ones((1, 1 + len(others.size)), bool)
    near[0, 0] = False
    (grasp,) = _find(
        item,
        _Rings(
            np.concatenate([item.points, others.points]), np.concatenate([item.size, others.size])
        ),
        near,
        gripper,
        None if center is None else np.array([complex(*center)]),
        None if angle is None else np.array([angle], np.float64),
        [[_as_rings([hole]).points for hole in holes]],
        guides,
        tolerance,
        sides,
    )
    return grasp


@dataclass(frozen=True, eq=False)
class _Rings:
    """Outlines one behind the other, so that all are worked on at once.

    Attributes:
        points: (T,) x + iy of the corners. Turning is multiplication in this form.
        size: (n,) how many of them each ring has, at least one.
    """

    points: Complex
    size: NDArray[np.intp]

    @cached_property
    def start(self) -> NDArray[np.intp]:
        """(n,) where each ring begins."""
        return np.cumsum(self.size) - self.size

    @cached_property
    def ring(self) -> NDArray[np.intp]:
        """(T,) the ring of each corner."""
        return np.repeat(np.arange(len(self.size)), self.size)

    @cached_property
    def after(self) -> NDArray[np.intp]:
        """(T,) which corner follows each."""
        after = np.arange(1, len(self.points) + 1)
        after[self.start + self.size - 1] = self.start
        return after

    def each(self, how: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
        """(..., n) sum, least or greatest, for each ring, of (..., T) numbers of its corners."""
        return np.asarray(how.reduceat(values, self.start, axis=-1))

    def of(self, index: int) -> Complex:
        """The corners of one ring."""
        return self.points[self.start[index] : self.start[index] + self.size[index]]


def _as_rings(outlines: Sequence[ArrayLike]) -> _Rings:
    rings = [np.asarray(outline) for outline in outlines]
    for points in rings:
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
            raise ValueError(
                f"an outline has the shape {points.shape}; it must be (K, 2) with K >= 3"
            )
    together = np.concatenate([np.zeros((0, 2)), *rings])
    if not np.isfinite(together).all():
        raise ValueError("an outline has a corner that is not finite")
    size = np.array([len(points) for points in rings], np.intp)
    return _Rings(together.view(np.complex128)[:, 0], size)


def _reach(gripper: Gripper) -> float:
    """How far an open jaw and what is left free around it may lie from the item."""
    deep = gripper.jaw_thickness + 2 * gripper.clearance
    return math.hypot(deep, gripper.jaw_width / 2 + gripper.clearance) if deep > 0 else 0.0


def _find(
    items: _Rings,
    rings: _Rings,
    near: NDArray[np.bool_],
    gripper: Gripper,
    center: Complex | None,
    angle: NDArray[np.float64] | None,
    holes: Sequence[Sequence[Complex]] | None,
    guides: Sequence[tuple[float, float, float]],
    tolerance: float,
    sides: Sequence[str],
) -> tuple[Grasp, ...]:
    """The best grasp of each of (n) items, which are the first of (m) rings.

    `near` (n, m) says which other rings are to be looked at for each item; `center` and `angle` are
    (n,) if they are given. For the rest see `find_grasp`.
    """
    # Numbers are kept small, as is due to single precision and to the belt's kilometres.
    origin = items.points[items.start]
    shapes = _Rings(items.points - origin[items.ring], items.size)
    following = shapes.points[shapes.after]
    cross = (shapes.points.conj() * following).imag
    area = 0.5 * shapes.each(np.add, cross)
    if center is None:
        moment = shapes.each(np.add, (shapes.points + following) * cross)
        middle = shapes.each(np.add, shapes.points) / shapes.size
        center = np.where(area == 0, middle, moment / (6 * np.where(area == 0, 1.0, area))) + origin
    if angle is None:
        angle = np.array([_long_axis(shapes.of(index)) for index in range(len(shapes.size))])
    across = angle + math.pi / 2

    # From here on the centre of mass is the origin, and all run from x towards y.
    points = shapes.points + (origin - center)[shapes.ring]
    if (area < 0).any():
        mirror = 2 * shapes.start + shapes.size - 1
        index = np.arange(len(points))
        points = points[np.where((area < 0)[shapes.ring], mirror[shapes.ring] - index, index)]
    shapes = _Rings(points, shapes.size)
    different = shapes.points != shapes.points[shapes.after]
    size = shapes.each(np.add, different.astype(np.intp))
    good = (area != 0) & (size >= 3)
    kept = np.flatnonzero(good)
    if not (good.all() and different.all()):
        shapes = _Rings(points[different & good[shapes.ring]], size[good])

    walls = np.array(guides, np.float64).reshape(-1, 3)
    found: Sequence[Grasp] = ()
    if len(kept) and gripper.kind == "jaws":
        obstacles = _Obstacles(rings, walls, kept, near[kept], center[kept])
        found = _jaws(shapes, gripper, across[kept], center[kept], obstacles, tolerance, sides)
    elif len(kept):
        found = [
            _suction(
                shapes.of(number),
                [hole - center[index] for hole in holes[index]] if holes else [],
                gripper,
                normalize_angle(float(across[index])),
                complex(center[index]),
                walls,
            )
            for number, index in enumerate(kept)
        ]
    if len(found) == len(good):
        return tuple(found)
    result = _nowhere(gripper, center, across, "its outline has no area")
    for index, grasp in zip(kept, found, strict=True):
        result[index] = grasp
    return tuple(result)


def _nowhere(
    gripper: Gripper, center: Complex, across: NDArray[np.float64], reason: str
) -> list[Grasp]:
    return [
        Grasp(gripper.kind, place, normalize_angle(angle), 0.0, 0.0, reason)
        for place, angle in zip(_places(center), across.tolist(), strict=True)
    ]


def _places(points: Complex) -> list[tuple[float, float]]:
    return list(zip(points.real.tolist(), points.imag.tolist(), strict=True))


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


def _central(away: Any, farthest: Any) -> Any:
    """1 at the centre of mass, 0.5 half way to the farthest point of the outline."""
    return 1.0 / (1.0 + (away / (0.5 * farthest)) ** 2)


# --- jaws -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Chords:
    """Places where jaws could close, of several items; all are (c,).

    Those of an item come in the order of their directions, and across each from one side to the
    other. The origin is the item's centre of mass.
    """

    item: NDArray[np.intp]
    direction: Complex
    offset: NDArray[np.float64]  # of the line, to the left of the direction
    first: NDArray[np.float64]  # where the jaws touch, along the direction
    second: NDArray[np.float64]
    worst: NDArray[np.float64]  # cosine between the jaws and the less square contact
    even: NDArray[np.float64]  # 1 where the contact is a straight line

    @cached_property
    def width(self) -> NDArray[np.float64]:
        return self.second - self.first

    def points(self, which: Any) -> tuple[Complex, Complex]:
        """Where the jaws of some of them touch."""
        direction, offset = self.direction[which], 1j * self.offset[which]
        return (self.first[which] + offset) * direction, (self.second[which] + offset) * direction


def _directions(shapes: _Rings, across: NDArray[np.float64]) -> Complex:
    """(D, n) unit directions worth a try: a fan, and those across the longest sides.

    Where an item has fewer sides they are 0, across which there is nothing.
    """
    directions = np.zeros((FAN + LONGEST_SIDES, len(shapes.size)), np.complex128)
    turns = np.arange(FAN)[:, None] * (math.pi / FAN)
    directions[:FAN] = np.exp(1j * (across + turns))
    points = _points(shapes.points)
    corners = []
    for start, size in zip(shapes.start.tolist(), shapes.size.tolist(), strict=True):
        outline = points[start : start + size]
        length = cv2.arcLength(outline, True)
        corners.append(cv2.approxPolyDP(outline, SIMPLIFY * length, True))
    simple = _Rings(
        np.concatenate(corners).astype(np.float64).view(np.complex128).ravel(),
        np.array([len(corner) for corner in corners]),
    )
    side = simple.points[simple.after] - simple.points
    size = np.abs(side)
    order = np.lexsort((-size, simple.ring))
    rank = np.arange(len(order)) - simple.start[simple.ring]
    longest = (rank < LONGEST_SIDES) & (size[order] > 0)
    order, rank = order[longest], rank[longest]
    directions[FAN + rank, simple.ring[order]] = 1j * side[order] / size[order]
    return directions


def _chords(shapes: _Rings, directions: Complex, patch: NDArray[np.float64]) -> _Chords:
    """All chords of counter-clockwise shapes along some directions, at `PLACES`.

    Of a line that crosses the outline more than twice these are each piece within the outline, and
    the whole from the first crossing to the last.

    Args:
        shapes: (n).
        directions: (D, n).
        patch: (n,) the part of the outline that a jaw covers.
    """
    ring, total = shapes.ring, len(shapes.points)
    local = shapes.points * directions.conj()[:, ring]  # (D, T); jaws close along the real axis
    along, across = local.real.ravel(), np.ascontiguousarray(local.imag)
    # From the centre of mass outwards.
    low, high = shapes.each(np.minimum, across), shapes.each(np.maximum, across)
    place = np.where(PLACES < 0, -low[..., None], high[..., None]) * PLACES  # (D, n, P)
    # Which of the evenly spread lines lies next above each corner. An edge crosses those between.
    below, beyond = (PLACES_A_SIDE / np.where(end > 0, end, np.inf) for end in (-low, high))
    level = across * np.where(
        across > 0, beyond.repeat(shapes.size, axis=1), below.repeat(shapes.size, axis=1)
    )
    np.ceil(level, out=level)
    np.minimum(level, PLACES_A_SIDE, out=level)
    level = np.maximum(level, 1 - PLACES_A_SIDE).astype(np.int8)
    following = level[:, shapes.after]
    edge = np.flatnonzero(level != following)
    start, end = level.ravel()[edge], following.ravel()[edge]
    crossings, step = _runs(np.minimum(start, end) + (PLACES_A_SIDE - 1), np.abs(end - start))
    edge = edge[crossings]
    turn = edge // total
    corner = edge - turn * total
    item = ring[corner]
    line = (item * len(directions) + turn) * len(PLACES) + step

    offset = place.ravel()[(turn * len(shapes.size) + item) * len(PLACES) + step]
    follower = turn * total + shapes.after[corner]
    across = across.ravel()
    before, position = across[edge], along[edge]
    share = (offset - before) / (across[follower] - before)
    position += share * (along[follower] - position)

    # The patch that a jaw covers, half of it to either side along the outline. All outlines lie one
    # behind the other, each three times, as the patch may begin before it or end behind it. The
    # order of the edges suits np.interp, which begins each search where the last one ended.
    _, corners = _runs(np.repeat(shapes.start, 3), np.repeat(shapes.size, 3))
    path = shapes.points[corners]
    arc = np.zeros(len(path))
    np.cumsum(np.abs(path[1:] - path[:-1]), out=arc[1:])
    corner += (2 * shapes.start + shapes.size)[item]
    reached = arc[corner]
    reached += share * (arc[corner + 1] - reached)
    patch = patch[item]
    near, far = np.interp(np.array([reached - 0.5 * patch, reached + 0.5 * patch]), arc, path)
    covered = far - near
    size = np.abs(covered)
    direction = directions.ravel()[turn * len(shapes.size) + item]
    # The outward normal of a counter-clockwise ring is its tangent turned by -90 degrees.
    square = (covered * direction.conj()).imag / np.maximum(size, 1e-9 * patch)
    even = np.minimum(size / patch, 1.0)

    # Every line crosses a ring an even number of times, so that sorted crossings pair off.
    order = np.argsort(_small(line, len(shapes.size) * place[:, 0].size), kind="stable")
    line = line[order]
    ends = np.flatnonzero(line[1:] != line[:-1]) + 1
    begin, end = np.concatenate([[0], ends]), np.concatenate([ends, [len(line)]])
    crossings = end - begin
    more = crossings > 2
    if more.any():
        many = np.flatnonzero(np.repeat(more, crossings))
        order[many] = order[many][np.lexsort((position[order[many]], line[many]))]
    first, second = order[0::2], order[1::2]
    swap = position[first] > position[second]
    first, second = np.where(swap, second, first), np.where(swap, first, second)
    first = np.concatenate([first, order[begin[more]]])
    second = np.concatenate([second, order[end[more] - 1]])
    return _Chords(
        item[first],
        direction[first],
        offset[first],
        position[first],
        position[second],
        np.minimum(-square[first], square[second]),
        np.minimum(even[first], even[second]),
    )


def _small(values: NDArray[np.intp], limit: int) -> NDArray[Any]:
    """The same numbers, below a limit, so that they sort fastest: 16 bits by their digits."""
    return values.astype(np.uint16) if limit <= 1 << 16 else values


def _jaws(
    shapes: _Rings,
    gripper: Gripper,
    across: NDArray[np.float64],
    center: Complex,
    obstacles: _Obstacles,
    tolerance: float,
    sides: Sequence[str],
) -> list[Grasp]:
    number = len(shapes.size)
    length = shapes.each(np.add, np.abs(shapes.points[shapes.after] - shapes.points))
    farthest = shapes.each(np.maximum, np.abs(shapes.points))
    patch = np.minimum(max(gripper.jaw_width, SMOOTH_ERRORS * tolerance), SMOOTH_SHARE * length)
    patch = np.where(patch > 0, patch, 0.01 * length)
    chords = _chords(shapes, _directions(shapes, across), patch)
    item, width = chords.item, chords.width
    tilt = np.arccos(np.minimum(np.maximum(chords.worst, -1.0), 1.0))
    limit = np.minimum(gripper.max_opening, 3.0 * farthest)
    away = np.sqrt((0.5 * (chords.first + chords.second)) ** 2 + chords.offset**2)
    quality = (
        np.maximum(1.0 - (tilt / gripper.friction_angle) ** 2, 0.0)
        * chords.even**2
        * (1.0 - 0.5 * np.minimum(width / limit[item], 1.0))
        * _central(away, farthest[item])
    )
    quality[width <= 0] = 0.0
    wide = width + 2 * gripper.clearance > gripper.max_opening
    narrow = width < gripper.min_opening

    # Those that hold, item by item, the best first.
    order = np.flatnonzero(quality > 0)
    order = order[np.lexsort((-quality[order], item[order]))]
    fits = order[~(wide | narrow)[order]]
    best, blocked = obstacles.free(chords, fits, gripper, tolerance, sides)
    degrees = math.degrees(gripper.friction_angle)
    slips = f"no two sides face each other within {degrees:.0f}°"
    reasons = [""] * number
    for index in np.flatnonzero(best < 0).tolist():
        held = order[item[order] == index]
        fit = fits[item[fits] == index]
        if len(held) == 0:
            reasons[index] = slips
            own = np.flatnonzero(item == index)
            if len(own):
                best[index] = own[(chords.worst[own] - 10 * (width[own] <= 0)).argmax()]
        elif len(fit) == 0:
            best[index], reasons[index] = _beyond_limits(width, held, gripper)
        elif index in blocked:
            best[index], reasons[index] = blocked[index]
        elif len(fit) < len(held):  # a notch or a tip is of the right width, but cannot be held
            held = held[(wide | narrow)[held]]
            best[index], reasons[index] = _beyond_limits(width, held, gripper)
        else:
            best[index], reasons[index] = fit[0], "no room for the jaws beside its own limbs"

    # Where the centre of mass is far away no line may cross the outline.
    crossed = best >= 0
    best = best[crossed]
    direction = chords.direction[best]
    first, second = chords.points(best)
    grasps = dict(enumerate(() if crossed.all() else _nowhere(gripper, center, across, slips)))
    for index, place, angle, opening, value in zip(
        np.flatnonzero(crossed).tolist(),
        _places(0.5 * (first + second) + center[crossed]),
        np.arctan2(direction.imag, direction.real).tolist(),
        np.abs(second - first).tolist(),
        np.minimum(quality[best], 1.0).tolist(),
        strict=True,
    ):
        reason = reasons[index]
        value = 0.0 if reason else value
        grasps[index] = Grasp("jaws", place, normalize_angle(angle), opening, value, reason)
    return [grasps[index] for index in range(number)]


def _beyond_limits(
    width: NDArray[np.float64], order: NDArray[np.intp], gripper: Gripper
) -> tuple[int, str]:
    """Of chords that are all too wide or too narrow, best first, what comes nearest to the best."""
    wide = width[order] + 2 * gripper.clearance > gripper.max_opening
    if wide[0]:
        best = int(order[wide][width[order[wide]].argmin()])
        most = gripper.max_opening - 2 * gripper.clearance
        reason = f"too wide: {_told(width[best], gripper)} above {_told(most, gripper)}"
    else:
        best = int(order[~wide][width[order[~wide]].argmax()])
        least = gripper.min_opening
        reason = f"too narrow: {_told(width[best], gripper)} below {_told(least, gripper)}"
    return best, reason


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
    """What jaws must not come down on: the item itself, rings near it, and walls."""

    def __init__(
        self,
        rings: _Rings,
        walls: NDArray[np.float64],
        own: NDArray[np.intp],
        near: NDArray[np.bool_],
        center: Complex,
    ) -> None:
        """Look at (n) items.

        Args:
            rings: (m) all that may be in the way, the items among them.
            walls: (w, 3) see `find_grasp`.
            own: (n,) the ring of each item.
            near: (n, m) which others are to be looked at.
            center: (n,) the centre of mass of each.
        """
        self._rings, self._walls, self._own, self._center = rings, walls, own, center
        looked_at = near.copy()
        looked_at[np.arange(len(own)), own] = True
        self._looked_at = np.nonzero(looked_at)[1]
        self._number = np.count_nonzero(looked_at, axis=1)
        self._begin = np.cumsum(self._number) - self._number

    def free(
        self,
        chords: _Chords,
        fits: NDArray[np.intp],
        gripper: Gripper,
        tolerance: float,
        sides: Sequence[str],
    ) -> tuple[NDArray[np.intp], dict[int, tuple[int, str]]]:
        """Find the best chord of each item beside which the jaws have room.

        `fits` are the chords that come into question, item by item, the best first.

        Returns:
            (n,) its index, -1 where there is none; and for the items whose jaws never have room
            because of others the best chord but for them, and what is in the way there.
        """
        best = np.full(len(self._own), -1)
        blocked: dict[int, tuple[int, str]] = {}
        item = chords.item[fits]
        rank = np.arange(len(fits)) - np.searchsorted(item, item)
        if _reach(gripper) == 0 and len(self._walls) == 0:
            best[item[rank == 0]] = fits[rank == 0]
            return best, blocked
        # The best mostly is free, so that not all need to be looked at.
        for first, last in ((0, 1), (1, 8), (8, 64), (64, len(fits))):
            few = np.flatnonzero((rank >= first) & (rank < last) & (best[item] < 0))
            if len(few) == 0:
                break
            own, other, wall = self.below(chords, fits[few], gripper, tolerance)
            aside = ~own.any(axis=0)
            for k in np.flatnonzero(aside & (other | wall).any(axis=0)).tolist():
                if (index := int(item[few[k]])) not in blocked:
                    chord = int(fits[few[k]])
                    told = _blocked(chords.direction[chord], other[:, k], wall[:, k], sides)
                    blocked[index] = chord, told
            free = few[aside & ~(other | wall).any(axis=0)][::-1]  # the best is written last
            best[item[free]] = fits[free]
        return best, blocked

    def below(
        self, chords: _Chords, which: NDArray[np.intp], gripper: Gripper, tolerance: float
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """What lies below the open jaws, each (2, c): the item, a neighbour, a wall."""
        item, direction = chords.item[which], chords.direction[which]
        contact = np.array(chords.points(which))  # (2, c)
        outward = np.array([-direction, direction])
        far = gripper.jaw_thickness + gripper.clearance
        half = gripper.jaw_width / 2 + gripper.clearance
        # Within the cone the item may bulge beside the contact; the jaw then touches there.
        bulge = 0.5 * gripper.jaw_width * math.tan(gripper.friction_angle)
        bulge = max(bulge, tolerance, 1e-3 * far)
        if bulge >= far:
            bulge = math.inf  # nothing of the item counts

        # Of each chord the item itself, then those near it, and all their edges (E).
        chord, ring = _runs(self._begin[item], self._number[item])
        ring = self._looked_at[ring]
        mine = ring == self._own[item[chord]]
        size = self._rings.size[ring]
        begin = np.cumsum(size) - size
        pair, corner = _runs(self._rings.start[ring], size)
        after = self._rings.after[corner] + (begin - self._rings.start[ring])[pair]
        edge_chord = chord[pair]
        start = self._rings.points[corner] - self._center[item][edge_chord]
        # The real axis points away from the item.
        start = (start - contact[:, edge_chord]) * outward.conj()[:, edge_chord]
        x0, y0 = start.real.copy(), start.imag.copy()  # in one piece, which is faster
        x1, y1 = x0[:, after], y0[:, after]
        low, high, side = np.where(
            mine,
            [[bulge], [far], [gripper.jaw_width / 2]],
            [[-tolerance], [far + gripper.clearance], [half]],
        )[:, pair]
        hits = np.logical_or.reduceat(_hits(x0, y0, x1, y1, low, high, side), begin, axis=1)
        own = hits[:, mine]
        far += gripper.clearance
        other = np.zeros(outward.shape, bool)
        if len(chord) > len(which):
            # A neighbour that is larger than the jaw may have no edge below it.
            up = y1 > 0
            middle = far / 2
            beyond = ((y0 > 0) != up) & ((((x0 - middle) * y1 - y0 * (x1 - middle)) > 0) == up)
            hits |= np.add.reduceat(beyond, begin, axis=1, dtype=np.intp) % 2 == 1
            jaw, pair = np.nonzero(hits & ~mine)
            other[jaw, chord[pair]] = True
        wall = np.zeros(outward.shape, bool)
        for x, y, distance in self._walls:
            # The farthest corner of the jaw, along the normal of the wall.
            normal = complex(x, y)
            base = ((contact + self._center[item]) * normal.conjugate()).real
            ahead = (outward * normal.conjugate()).real
            beside = np.abs((outward * normal.conjugate()).imag)
            wall |= base + np.maximum(ahead * far, 0.0) + beside * half > distance
        return own, other, wall


def _runs(
    start: NDArray[np.intp], size: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Runs of whole numbers one behind the other: of each number the index of its run, and it."""
    run = np.repeat(np.arange(len(size)), size)
    return run, np.arange(len(run)) + (start - np.cumsum(size) + size)[run]


def _hits(
    x0: NDArray[np.float64],
    y0: NDArray[np.float64],
    x1: NDArray[np.float64],
    y1: NDArray[np.float64],
    near: NDArray[np.float64],
    far: NDArray[np.float64],
    half: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Which edges meet the box near <= x <= far, |y| <= half (by separating axes)."""
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
    center: complex,
    walls: NDArray[np.float64],
) -> Grasp:
    walls = walls.copy()
    walls[:, 2] -= walls[:, 0] * center.real + walls[:, 1] * center.imag
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
    middle = best + center
    grasp = Grasp(
        "suction", (float(middle.real), float(middle.imag)), across, 2 * max(room, 0.0), 0.0, ""
    )
    beyond = any(x * best.real + y * best.imag + need > distance for x, y, distance in walls)
    if beyond and (
        room >= need or not _suction(shape, holes, gripper, across, center, walls[:0]).reason
    ):
        return replace(grasp, reason="blocked by guide")
    if room < need or room <= 0:
        told = f"{_told(2 * max(room, 0.0), gripper)} below {_told(2 * need, gripper)}"
        return replace(grasp, reason=f"smaller than the cup: {told}")
    fit = min(0.5 * room / need, 1.0) if need else 1.0
    return replace(grasp, quality=float(fit * _central(abs(best), np.abs(shape).max())))


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
