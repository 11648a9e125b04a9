"""Grasps of jaws against a slow reference that takes one item, one line and one edge at a time."""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest

from waste_seg_ros.perception.grasp import Gripper, find_grasp, find_grasps, normalize_angle

JAWS = Gripper(max_opening=100.0, jaw_width=20.0, jaw_thickness=10.0, clearance=4.0)
GRIPPERS = {
    "usual": JAWS,
    "any opening": replace(JAWS, max_opening=math.inf),
    "narrow opening": replace(JAWS, max_opening=30.0, min_opening=20.0),
    "thick": replace(JAWS, jaw_thickness=40.0, jaw_width=50.0),
    "points": Gripper(max_opening=80.0),
    "slippery": replace(JAWS, friction_angle=0.02),
}
SIDES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Chord:
    """A place to grip: where the jaws touch, how well, and what is in the way of each."""

    first: complex
    second: complex
    quality: float
    own: bool = False
    others: tuple[bool, bool] = (False, False)
    walls: tuple[bool, bool] = (False, False)

    @property
    def width(self):
        return abs(self.second - self.first)

    @property
    def free(self):
        return not (self.own or any(self.others) or any(self.walls))

    def fits(self, gripper):
        widest = gripper.max_opening - 2 * gripper.clearance
        return gripper.min_opening <= self.width <= widest


def edges_of(ring):
    return [(ring[k], ring[(k + 1) % len(ring)]) for k in range(len(ring))]


def along_ring(ring, way):
    """The place that is so far along a ring, from its first corner."""
    lengths = [abs(b - a) for a, b in edges_of(ring)]
    way %= sum(lengths)
    for (a, b), length in zip(edges_of(ring), lengths, strict=True):
        if way <= length:
            return a + (b - a) * (way / length)
        way -= length
    return ring[0]


def crosses_box(a, b, near, far, half):
    """Whether the edge has more than a point within near < x < far, |y| < half (Liang, Barsky)."""
    enter, leave = 0.0, 1.0
    for start, step, low, high in (
        (a.real, b.real - a.real, near, far),
        (a.imag, b.imag - a.imag, -half, half),
    ):
        if step == 0:
            if not low < start < high:
                return False
            continue
        first, last = sorted(((low - start) / step, (high - start) / step))
        enter, leave = max(enter, first), min(leave, last)
    return enter < leave


def contains(ring, point):
    inside = False
    for a, b in edges_of(ring):
        if (a.imag > point.imag) != (b.imag > point.imag):
            x = a.real + (point.imag - a.imag) / (b.imag - a.imag) * (b.real - a.real)
            inside ^= x > point.real
    return inside


def with_obstacles(chord, direction, ring, others, walls, gripper, tolerance):
    deep = gripper.jaw_thickness + gripper.clearance
    half = gripper.jaw_width / 2
    bulge = max(half * math.tan(gripper.friction_angle), tolerance, 1e-3 * deep)
    own, in_way, behind = False, [], []
    for contact, outward in ((chord.first, -direction), (chord.second, direction)):

        def seen(shape, contact=contact, outward=outward):
            return [(p - contact) / outward for p in shape]

        if deep > bulge:
            own |= any(crosses_box(a, b, bulge, deep, half) for a, b in edges_of(seen(ring)))
        far, wide = deep + gripper.clearance, half + gripper.clearance
        in_way.append(
            any(
                any(crosses_box(a, b, -tolerance, far, wide) for a, b in edges_of(seen(other)))
                or contains(seen(other), far / 2)
                for other in others
            )
        )
        corners = [contact + outward * complex(x, y) for x in (0, far) for y in (-wide, wide)]
        behind.append(any(p.real * x + p.imag * y > d for p in corners for x, y, d in walls))
    return replace(chord, own=own, others=tuple(in_way), walls=tuple(behind))


def all_chords(outline, gripper, center, angle, others, walls, tolerance):
    """Every chord that holds, the best first."""
    ring = [complex(x, y) - center for x, y in outline]
    if sum((a.conjugate() * b).imag for a, b in edges_of(ring)) < 0:
        ring.reverse()
    others = [[complex(x, y) - center for x, y in other] for other in others]
    walls = [(x, y, d - x * center.real - y * center.imag) for x, y, d in walls]
    length = sum(abs(b - a) for a, b in edges_of(ring))
    patch = min(max(gripper.jaw_width, 8 * tolerance), length / 8) or 0.01 * length
    farthest = max(abs(p) for p in ring)
    limit = min(gripper.max_opening, 3 * farthest)

    directions = [cmath.exp(1j * (angle + math.pi / 2 + k * math.pi / 8)) for k in range(8)]
    corners = np.array([(p.real, p.imag) for p in ring], np.float32)
    simple = cv2.approxPolyDP(corners, 0.03 * cv2.arcLength(corners, True), True)[:, 0]
    sides = [b - a for a, b in edges_of([complex(*p) for p in simple.astype(float)])]
    sides = sorted(sides, key=lambda side: -abs(side))[:6]
    directions += [1j * side / abs(side) for side in sides if side]

    found = []
    for direction in directions:
        local = [p / direction for p in ring]
        low, high = min(p.imag for p in local), max(p.imag for p in local)
        for place in (-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8):
            offset = place * (high if place >= 0 else -low)
            met, way = [], 0.0
            for a, b in edges_of(local):
                if (a.imag > offset) != (b.imag > offset):
                    share = (offset - a.imag) / (b.imag - a.imag)
                    met.append((a.real + share * (b.real - a.real), way + share * abs(b - a)))
                way += abs(b - a)
            met.sort()
            pairs = list(zip(met[0::2], met[1::2], strict=True))
            if len(met) > 2:
                pairs.append((met[0], met[-1]))
            for (first, first_way), (second, second_way) in pairs:
                if second <= first:
                    continue
                tilt, even = 0.0, 1.0
                for way, outward in ((first_way, -direction), (second_way, direction)):
                    covered = along_ring(ring, way + patch / 2) - along_ring(ring, way - patch / 2)
                    even = min(even, abs(covered) / patch)
                    tilt = max(tilt, abs(cmath.phase(-1j * covered / outward)) if covered else 9.0)
                middle = (first + second) / 2 + 1j * offset
                quality = max(1 - (tilt / gripper.friction_angle) ** 2, 0.0) * even**2
                quality *= 1 - 0.5 * min((second - first) / limit, 1.0)
                quality /= 1 + (abs(middle) / (0.5 * farthest)) ** 2
                if quality > 0:
                    chord = Chord(
                        (first + 1j * offset) * direction,
                        (second + 1j * offset) * direction,
                        quality,
                    )
                    found.append((direction, chord))
    found.sort(key=lambda entry: -entry[1].quality)
    return [
        with_obstacles(chord, direction, ring, others, walls, gripper, tolerance)
        for direction, chord in found
    ]


def told(chord):
    """The reason of one that is blocked."""
    along = chord.second - chord.first
    lying = abs(along.real) >= abs(along.imag)
    names = SIDES[:2] if lying else SIDES[2:]
    if (along.real if lying else along.imag) < 0:
        names = names[::-1]
    parts = []
    for what, which in (("neighbour", chord.others), ("guide", chord.walls)):
        where = sorted(name for name, is_so in zip(names, which, strict=True) if is_so)
        if where:
            parts.append(f"{what} at {' and '.join(where)}")
    return "blocked by " + " and ".join(parts)


def check(grasp, chords, gripper, center):
    """A grasp must be the reference's best, or one of those that are as good."""
    fits = [chord for chord in chords if chord.fits(gripper)]
    best = next((chord for chord in fits if chord.free), None)
    aside = next((chord for chord in fits if not chord.own), None)
    beyond = [chord for chord in chords if not chord.fits(gripper)]
    quality, reason = 0.0, ""
    if best:
        quality = best.quality
        equals = [c for c in fits if c.free and c.quality > quality - 1e-9]
    elif not chords:
        assert grasp.reason.startswith("no two sides") and grasp.quality == 0
        return "slips"
    elif aside:
        equals = [c for c in fits if not c.own and c.quality > aside.quality - 1e-9]
        reason = told(aside)
    elif beyond:
        widest = gripper.max_opening - 2 * gripper.clearance
        if beyond[0].width > widest:
            reason = "too wide"
            nearest = min(c.width for c in beyond if c.width > widest)
        else:
            reason = "too narrow"
            nearest = max(c.width for c in beyond if c.width < gripper.min_opening)
        equals = [c for c in beyond if abs(c.width - nearest) < 1e-6]
    else:
        equals = [c for c in fits if c.quality > fits[0].quality - 1e-9]
        reason = "no room for the jaws"
    assert grasp.quality == pytest.approx(quality, abs=1e-9)
    assert grasp.reason.startswith(reason) and grasp.pickable == bool(best)
    place = complex(*grasp.center) - center
    near = min(equals, key=lambda c: abs((c.first + c.second) / 2 - place))
    assert abs((near.first + near.second) / 2 - place) < 1e-6
    assert grasp.width == pytest.approx(near.width, abs=1e-6)
    turn = normalize_angle(cmath.phase(near.second - near.first) - grasp.angle)
    assert abs(turn) < 1e-6
    return reason.split(" at")[0] or "free"


def star(random, center, size):
    """Up to fourteen corners around a place, some of them far in."""
    count = int(random.integers(3, 15))
    turn = (np.arange(count) + random.uniform(0, 0.8, count)) * (2 * math.pi / count)
    radii = size * random.uniform(0.3, 1.0, count)
    ring = np.stack([np.cos(turn), np.sin(turn)], axis=1) * radii[:, None] + center
    return ring if random.random() < 0.7 else ring[::-1]


def pixel_bar(random, center, size):
    """The outline of a slanting bar of pixels of 3.5 units a side, with all its stairs."""
    canvas = np.zeros((64, 64), np.uint8)
    sides = (size / 3.5 * random.uniform(1.0, 1.6), size / 3.5 * random.uniform(0.3, 0.9))
    corners = cv2.boxPoints(((32, 32), sides, float(random.uniform(0, 180))))
    cv2.fillPoly(canvas, [corners.astype(np.int32)], 1)
    (ring,), _ = cv2.findContours(canvas, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return (ring[:, 0] - 32.0) * 3.5 + center


def crowd(seed, count=10):
    random = np.random.default_rng(seed)
    outlines = []
    for _ in range(count):
        center, size = random.uniform(0, 260, 2), random.uniform(15, 60)
        outlines.append((star, pixel_bar)[int(random.integers(2))](random, center, size))
    return outlines


@pytest.mark.parametrize("name", GRIPPERS)
@pytest.mark.parametrize("guides", ((), ((0.6, 0.8, 210.0), (-1.0, 0.0, -40.0))))
def test_items_together_are_gripped_as_one_by_one_and_line_by_line(name, guides):
    gripper, outlines, seen = GRIPPERS[name], crowd(sorted(GRIPPERS).index(name)), set()
    random = np.random.default_rng(7)
    centers = [tuple(ring.mean(axis=0) + random.uniform(-3, 3, 2)) for ring in outlines]
    angles = random.uniform(-1.5, 1.5, len(outlines)).tolist()
    grasps = find_grasps(
        outlines, gripper, centers=centers, angles=angles, guides=guides, tolerance=2.0
    )
    for index, (ring, grasp) in enumerate(zip(outlines, grasps, strict=True)):
        others, center = outlines[:index] + outlines[index + 1 :], complex(*centers[index])
        if name == "points":  # which need no room
            others = []
        chords = all_chords(ring, gripper, center, angles[index], others, guides, 2.0)
        seen.add(check(grasp, chords, gripper, center))
        alone = find_grasp(
            ring,
            gripper,
            center=centers[index],
            angle=angles[index],
            neighbours=others,
            guides=guides,
            tolerance=2.0,
        )
        assert alone == grasp or (
            alone.reason == grasp.reason and alone.quality == pytest.approx(grasp.quality)
        )
    # Each gripper is there for what happens with it.
    expected = {"slippery": "slips", "narrow opening": "too wide", "thick": "blocked by neighbour"}
    assert expected.get(name, "free") in seen


def test_centers_and_angles_are_those_of_the_outline_by_default():
    outlines = crowd(11)
    for ring, grasp in zip(outlines, find_grasps(outlines, Gripper()), strict=True):
        points = [complex(*p) - complex(*ring[0]) for p in ring]
        cross = [(a.conjugate() * b).imag for a, b in edges_of(points)]
        moment = sum((a + b) * c for (a, b), c in zip(edges_of(points), cross, strict=True))
        center = moment / (3 * sum(cross)) + complex(*ring[0])
        _, (first, second), degrees = cv2.minAreaRect((ring - ring[0]).astype(np.float32))
        angle = math.radians(degrees + 90 * (first < second))
        given = find_grasp(ring, Gripper(), center=(center.real, center.imag), angle=angle)
        assert grasp.quality == pytest.approx(given.quality, abs=1e-6)
        assert grasp.reason == given.reason


def test_among_others_one_without_area_and_one_without_its_center_are_told():
    box = np.array([(0, 0), (60, 0), (60, 30), (0, 30)], float)
    line = np.array([(200, 0), (210, 0), (220, 0)], float)
    grasps = find_grasps(
        [box, line, box, np.repeat(box, 2, axis=0)],
        Gripper(),
        centers=[(30, 15), (210, 0), (9000.0, 777.0), (30, 15)],
        angles=[0.0, 0.0, 0.0, 0.0],
    )
    assert [grasp.reason[:11] for grasp in grasps] == ["", "its outline", "no two side", ""]
    assert grasps[2].center == (9000.0, 777.0) and grasps[2].width == 0
    assert grasps[3].width == pytest.approx(30) and grasps[0].width == pytest.approx(30)
    (lost,) = find_grasps([box], Gripper(), centers=[(9000.0, 777.0)], angles=[0.0])
    assert lost == replace(grasps[2], center=(9000.0, 777.0))
