"""The synthetic line: a belt carrying waste, with exact labels, from nothing but a seed.

Two uses of one renderer: `synthetic_sample` draws independent scenes whose belt, light, camera and
items vary as widely as we could make them (to train from: domain randomisation, Tobin et al.,
arXiv 1703.06907), and `SyntheticLine` is one belt that moves (for the camera node).

The belt runs along +x of the rendered picture. The camera looks straight down, so one scale, in
metres per pixel, holds over the frame.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.cli import as_size
from waste_seg_ros.data.sample import BACKGROUND, CLASSES, IGNORE, Sample
from waste_seg_ros.data.sprites import (
    SPRITE_RESOLUTION,
    Array,
    Rng,
    Sprite,
    fractal_noise,
    render_sprite,
    value_noise,
)
from waste_seg_ros.files import write_png

MIN_VISIBLE_FRACTION = 0.08
"""Below this visible fraction an item is neither truth nor background: labelled IGNORE."""

_WINDOW = 320  # sprites that scenes near each other choose from; one new sprite a scene
_CACHE = 448


@dataclass(frozen=True)
class TruthItem:
    """What the synthetic line knows about an item in a frame.

    Attributes:
        id: unique along the belt, from 1.
        class_index: 1..C, its label id.
        instance: its id in ``sample.instances``.
        center: (x, y) centre of mass of its visible pixels [px].
        velocity: (vx, vy) [px/s].
        visible: visible part of the whole item, 0..1.
        truncated: it is cut by the image border.
    """

    id: int
    class_index: int
    instance: int
    center: tuple[float, float]
    velocity: tuple[float, float]
    visible: float
    truncated: bool


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of the moving line and the truth about it."""

    sample: Sample
    items: tuple[TruthItem, ...]


@dataclass(frozen=True)
class _Placed:
    """A sprite on the belt: centre [px], rotation [rad], scale (frame px per sprite px)."""

    id: int
    class_index: int
    sprite: Sprite
    center: tuple[float, float]
    angle: float
    scale: float
    mirrored: bool


@dataclass(eq=False)
class _Look:
    """Light and camera of a scene."""

    light_angle: float
    shadow_reach: float  # shadow length per item height
    shadow_depth: float  # 0..1
    illumination: NDArray[np.float32]  # (H, W, 3) gain
    curve: NDArray[np.uint8]  # (256,) tone curve
    motion: int  # px
    defocus: float  # sigma, px
    noise: float  # sigma, grey levels
    jpeg: int  # quality, 0 none


# --- belt and surroundings ------------------------------------------------------------------------


def _material(rng: Rng, shape: tuple[int, ...], mpp: float) -> Array:
    """(h, w, 3) float32 0..255: a belt surface with streaks along x, stains, specks and wear."""
    h, w = shape
    kind = rng.random()
    if kind < 0.5:  # rubber, clean to filthy
        v = rng.uniform(22, 105)
        base = np.array([v, v * rng.uniform(0.92, 1.03), v * rng.uniform(0.8, 1.06)])
    elif kind < 0.66:  # green, blue or other coloured PVC
        hue = rng.choice([rng.uniform(80, 150), rng.uniform(190, 240), rng.uniform(0, 360)])
        hsv = np.array([[[hue, rng.uniform(0.15, 0.7), rng.uniform(0.2, 0.6)]]], np.float32)
        base = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255
    elif kind < 0.8:  # steel
        v = rng.uniform(90, 185)
        base = np.array([v, v * 1.01, v * 1.03])
    elif kind < 0.9:  # white or cream food-grade belt
        v = rng.uniform(165, 225)
        base = np.array([v, v * rng.uniform(0.96, 1), v * rng.uniform(0.85, 1)])
    else:  # brown, earthy
        v = rng.uniform(50, 130)
        base = np.array([v * 1.1, v, v * rng.uniform(0.65, 0.9)])
    out = np.empty((h, w, 3), np.float32)
    out[:] = base
    cell = max(4.0, 0.06 / mpp)
    tone = np.float32(rng.uniform(0.01, 0.1)) * fractal_noise(rng, shape, cell * 2, 5)
    rows = np.float32(rng.uniform(0, 0.14)) * value_noise(rng, (h, 1), rng.uniform(3, 24))
    rows = rows + np.float32(rng.uniform(0, 0.05)) * value_noise(rng, (h, 1), 1.5)
    grain = np.float32(rng.uniform(0.005, 0.06)) * value_noise(rng, shape, rng.uniform(1.2, 2.2))
    out *= (1 + tone + rows + grain)[..., None]
    if rng.random() < 0.55:  # dried dirt, in patches
        stain = fractal_noise(rng, shape, cell * rng.uniform(0.4, 2.5), 5)
        amount = np.clip((stain - rng.uniform(0.0, 1.3)) * rng.uniform(0.6, 3), 0, 1)
        hsv = np.array([[[rng.uniform(20, 50), rng.uniform(0, 0.4), rng.uniform(0.1, 0.65)]]])
        dirt = cv2.cvtColor(hsv.astype(np.float32), cv2.COLOR_HSV2RGB)[0, 0] * 255
        out += (dirt - out) * (amount * np.float32(rng.uniform(0.2, 0.8)))[..., None]
    if rng.random() < 0.4:  # grit trodden into the belt: patches, drawn out along x, of fine mottle
        drawn = int(max(8, w / rng.uniform(1, 6)))
        patch = cv2.resize(fractal_noise(rng, (h, drawn), cell * rng.uniform(0.5, 1.5), 3), (w, h))
        patch = np.clip((patch - rng.uniform(-0.5, 0.9)) * rng.uniform(1, 4), 0, 1)
        mottle = fractal_noise(rng, shape, max(2.0, 0.02 / mpp * rng.uniform(0.4, 1.5)), 3)
        mottle = np.clip((mottle - rng.uniform(-0.6, 0.8)) * 1.5, 0, 1)
        grit = out.mean(axis=(0, 1)) * rng.uniform(0.4, 2.4) + rng.uniform(0, 40)
        grit = grit * np.array([1.05, 1, rng.uniform(0.75, 1)])
        amount = patch * mottle * np.float32(rng.uniform(0.2, 0.8))
        out += (np.clip(grit, 0, 255).astype(np.float32) - out) * amount[..., None]
    if rng.random() < 0.3:  # cleats, slats or a woven profile across the belt
        period = rng.uniform(0.012, 0.2) / mpp
        if period > 4:
            x = np.arange(w, dtype=np.float32)[None] / np.float32(period)
            if rng.random() < 0.4:  # chevrons
                y = np.abs(np.arange(h, dtype=np.float32)[:, None] - h / 2)
                x = x + y / np.float32(period * rng.uniform(0.8, 2.5))
            wave = x - np.floor(x)
            duty = rng.uniform(0.08, 0.5)
            edge = np.clip(np.minimum(wave, duty - wave) * period, -0.5, 0.5) + 0.5
            out *= (1 + np.float32(rng.uniform(-0.35, 0.35)) * edge)[..., None]
    if rng.random() < 0.4:  # wide bands along the belt: wear, worn middle, reflections
        for _ in range(int(rng.integers(1, 4))):
            y0 = rng.uniform(0, h)
            s = h * rng.uniform(0.02, 0.12)
            band = np.exp(-(((np.arange(h, dtype=np.float32) - y0) / s) ** 2))
            out *= (1 + np.float32(rng.uniform(-0.4, 0.5)) * band)[:, None, None]
    return out


def _scraps(rng: Rng, canvas: Array, mpp: float) -> None:
    """Crumbs too small to be items: part of the background, in place."""
    h, w = canvas.shape[:2]
    count = int(rng.choice([0, 6, 30, 120]) * rng.uniform(0.3, 1) * h * w * mpp * mpp / 0.5)
    for _ in range(count):
        r = rng.uniform(0.001, 0.006) if rng.random() < 0.93 else rng.uniform(0.006, 0.011)
        c = np.array([rng.uniform(0, w), rng.uniform(0, h)])
        t = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
        pts = c + np.stack([np.cos(t), np.sin(t)], 1) * (r / mpp) * rng.uniform(
            0.5, 1.2, (len(t), 1)
        )
        v = rng.uniform(10, 245)
        tint = tuple(float(np.clip(v * g, 0, 255)) for g in rng.uniform(0.7, 1.1, 3))
        cv2.fillPoly(canvas, [np.round(pts * 16).astype(np.int32)], tint, cv2.LINE_AA, 4)


def _background(rng: Rng, shape: tuple[int, ...], mpp: float, tidy: bool) -> NDArray[np.uint8]:
    """(h, w, 3) uint8: belt, side rails and floor, splice, scratches, crumbs."""
    h, w = shape
    out = _material(rng, shape, mpp)
    if rng.random() < 0.5:
        for _ in range(int(rng.integers(1, 14))):
            x, y = (float(v) for v in rng.uniform(0, (w, h)))
            length = rng.uniform(0.05, 0.8) * w
            p = (int(x), int(y)), (int(x + length), int(y + rng.normal(0, 0.02) * length))
            v = float(rng.uniform(20, 200))
            over = out.copy()
            cv2.line(over, p[0], p[1], (v, v, v), int(rng.integers(1, 3)), cv2.LINE_AA)
            k = np.float32(rng.uniform(0.1, 0.6))
            out += (over - out) * k
    if rng.random() < 0.2:  # splice across the belt
        x = int(rng.uniform(0, w))
        jag = (2 * value_noise(rng, (1, h), 6)[0]).astype(np.int32)
        pts = np.stack([x + jag, np.arange(h)], 1).astype(np.int32)
        v = float(rng.uniform(5, 220))
        cv2.polylines(out, [pts], False, (v, v * 0.95, v * 0.9), int(rng.integers(1, 4)))
    _scraps(rng, out, mpp)
    most = 0.12 if tidy else 0.26
    for side in (0, 1):
        if rng.random() < 0.55:
            edge = rng.uniform(0.01, most) * h
            while edge > 1:  # strips from the belt outwards
                n = max(1, int(edge))
                strip = _material(rng, (n, w), mpp)
                if rng.random() < 0.5:  # a rounded or bent profile
                    across = np.linspace(-1, 1, n, dtype=np.float32)[:, None, None]
                    strip *= 1 + np.float32(rng.uniform(-0.6, 0.6)) * across
                    glint = np.exp(-(((across - rng.uniform(-1, 1)) / rng.uniform(0.05, 0.4)) ** 2))
                    strip += glint * np.float32(rng.uniform(0, 150) * (rng.random() < 0.4))
                strip[-1 if side == 0 else 0] *= np.float32(rng.uniform(0.2, 1))
                out[:n] = strip if side == 0 else out[:n]
                if side == 1:
                    out[h - n :] = strip
                if rng.random() < 0.4:  # bolts
                    step = rng.uniform(0.05, 0.2) / mpp
                    yc = n / 2 if side == 0 else h - n / 2
                    for x in np.arange(rng.uniform(0, step), w, max(4.0, step)):
                        grey = float(rng.uniform(20, 160))
                        r = max(1, int(0.005 / mpp))
                        cv2.circle(out, (int(x), int(yc)), r, (grey, grey, grey), -1, cv2.LINE_AA)
                edge *= rng.uniform(0.0, 0.85)
    return np.clip(out, 0, 255).astype(np.uint8)


# --- light and camera -----------------------------------------------------------------------------


def _look(rng: Rng, size: tuple[int, int], tidy: bool) -> _Look:
    w, h = size
    x = np.linspace(-1, 1, w, dtype=np.float32)[None]
    y = np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    field = np.ones((h, w), np.float32)
    a = rng.uniform(0, 2 * np.pi)
    slope = np.float32(rng.uniform(0, 0.15 if tidy else 0.45))
    field += slope * (x * np.float32(np.cos(a)) + y * np.float32(np.sin(a)))
    field *= 1 - np.float32(rng.uniform(0, 0.25)) * (x * x + y * y) / 2
    if rng.random() < 0.35:  # a lamp's pool of light
        cx, cy = rng.uniform(-1, 1, 2)
        r2 = np.float32(rng.uniform(0.1, 0.8))
        field *= 1 + np.float32(rng.uniform(-0.4, 0.7)) * np.exp(
            -((x - cx) ** 2 + (y - cy) ** 2) / r2
        )
    if rng.random() < (0.25 if tidy else 0.45):  # cast shadows and patches of sun, sharp or soft
        for _ in range(int(rng.integers(1, 4))):
            mask: Array = np.zeros((h, w), np.uint8)
            if rng.random() < 0.65:
                c, t = np.array([rng.uniform(0, w), rng.uniform(0, h)]), rng.uniform(0, np.pi)
                d, n = np.array([np.cos(t), np.sin(t)]), np.array([-np.sin(t), np.cos(t)])
                half = rng.uniform(0.01, 0.25) * w
                taper = half * rng.uniform(0.4, 1.6)
                quad = [
                    c - d * 2 * w - n * half,
                    c + d * 2 * w - n * taper,
                    c + d * 2 * w + n * taper,
                    c - d * 2 * w + n * half,
                ]
                if rng.random() < 0.4:  # ends within the frame
                    quad[1], quad[2] = c - n * taper, c + n * taper
                pts = np.array(quad)
            else:
                corners = int(rng.integers(3, 7))
                turn = np.sort(rng.uniform(0, 2 * np.pi, corners))
                spokes = rng.uniform(0.15, 0.6, (corners, 1)) * w
                pts = np.stack([np.cos(turn), np.sin(turn)], 1) * spokes
                pts = pts + np.array([rng.uniform(0, w), rng.uniform(0, h)])
            cv2.fillPoly(mask, [np.clip(pts, -9999, 9999).astype(np.int32)], (255,))
            soft = cv2.blur(mask, (2 * int(rng.integers(0, max(2, w // 24))) + 1,) * 2)
            gain = rng.uniform(-0.65, -0.2) if rng.random() < 0.7 else rng.uniform(0.15, 0.7)
            field *= 1 + np.float32(gain / 255) * soft
    exposure = rng.uniform(0.85, 1.2) if tidy else float(np.exp(rng.normal(0.05, 0.22)))
    gains = np.exp(rng.normal(0, 0.03 if tidy else 0.065, 3)).astype(np.float32)
    ramp = np.linspace(0, 1, 256)
    curve = ramp ** (rng.uniform(0.85, 1.1) if tidy else rng.uniform(0.7, 1.25))
    k = rng.uniform(-0.1, 0.5)
    curve = curve + k * 0.5 * (curve - 0.5) * (1 - np.abs(2 * curve - 1))  # S-shaped contrast
    lift = rng.uniform(0, 0.02 if tidy else 0.09)  # haze, flare
    curve = lift + (1 - lift) * curve
    at_320 = w / 320
    return _Look(
        light_angle=float(rng.uniform(0, 2 * np.pi)),
        shadow_reach=float(rng.uniform(0.1, 1.4)),
        shadow_depth=float(rng.uniform(0.15, 0.75)),
        illumination=field[..., None] * gains * np.float32(exposure),
        curve=np.clip(curve * 255, 0, 255).astype(np.uint8),
        motion=int(rng.choice([0, rng.integers(0, 4), rng.integers(2, 9)]) * at_320),
        defocus=float(rng.choice([0, rng.uniform(0.2, 1.3)]) * at_320),
        noise=float(rng.choice([rng.uniform(0.5, 3), rng.uniform(1, 9)])),
        jpeg=int(rng.integers(35, 95)) if rng.random() < (0 if tidy else 0.3) else 0,
    )


@lru_cache(maxsize=1)
def _noise_bank() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(1 << 21, dtype=np.float32)


def _expose(canvas: NDArray[np.uint8], look: _Look, rng: Rng) -> NDArray[np.uint8]:
    """Light, lens, sensor and file format between the belt and the picture."""
    lit: Array = canvas.astype(np.float32)
    lit *= look.illumination
    if look.motion > 1:
        lit = cv2.blur(lit, (look.motion | 1, 1), borderType=cv2.BORDER_REFLECT)
    if look.defocus > 0.2:
        lit = cv2.GaussianBlur(lit, (0, 0), look.defocus)
    bank = _noise_bank()
    start = int(rng.integers(0, len(bank)))
    if start + lit.size <= len(bank):
        noise = bank[start : start + lit.size]
    else:
        rest = lit.size - (len(bank) - start)
        noise = np.resize(np.concatenate([bank[start:], bank[:rest]]), lit.size)
    lit += noise.reshape(lit.shape) * np.float32(look.noise)
    out = cv2.LUT(np.clip(lit, 0, 255).astype(np.uint8), look.curve)
    if look.jpeg:
        ok, data = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, look.jpeg])
        if ok:
            out = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    return np.asarray(out, np.uint8)


# --- putting items on the belt --------------------------------------------------------------------


def _affine(item: _Placed, sprite: Sprite, scale: float) -> NDArray[np.float64]:
    h, w = sprite.shadow.shape
    c, s = np.cos(item.angle) * scale, np.sin(item.angle) * scale
    m = np.array([[c, -s], [s, c]])
    if item.mirrored:
        m[:, 1] *= -1
    offset = np.array(item.center) - m @ np.array([(w - 1) / 2, (h - 1) / 2])
    return np.concatenate([m, offset[:, None]], 1)


def _window(
    m: NDArray[np.float64], shape: tuple[int, ...], size: tuple[int, int], pad: float
) -> tuple[int, int, int, int] | None:
    h, w = shape
    corners = m @ np.array([[0, w, w, 0], [0, 0, h, h], [1, 1, 1, 1]], np.float64)
    x0, y0 = np.floor(corners.min(1) - pad).astype(int)
    x1, y1 = np.ceil(corners.max(1) + pad).astype(int)
    x0, y0, x1, y1 = max(0, x0), max(0, y0), min(size[0], x1), min(size[1], y1)
    return (int(x0), int(y0), int(x1), int(y1)) if x0 < x1 and y0 < y1 else None


def _compose(
    background: NDArray[np.uint8],
    items: list[_Placed],
    look: _Look,
    mpp: float,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16], list[int]]:
    """Blend items over the belt, bottom first.

    Returns:
        canvas (H, W, 3), labels (H, W), instances (H, W) with item k as k + 1, and for each item
        the pixels it would show if nothing hid or cut it.
    """
    canvas = background.copy()
    h, w = canvas.shape[:2]
    labels = np.zeros((h, w), np.uint8)
    instances = np.zeros((h, w), np.uint16)
    whole: list[int] = []
    toward = np.array([np.cos(look.light_angle), np.sin(look.light_angle)])
    for k, item in enumerate(items):
        sprite, scale = item.sprite, item.scale
        full = sprite
        while scale < 0.55:
            sprite, scale = sprite.half, scale * 2
        m = _affine(item, sprite, scale)
        whole.append(int(np.count_nonzero(full.reflect[..., 3] > 127) * item.scale**2))
        cast = -toward * full.height * look.shadow_reach / mpp
        ms = m.copy()
        ms[:, 2] += cast
        box = _window(ms, sprite.shadow.shape, (w, h), 1)
        if box is not None:
            x0, y0, x1, y1 = box
            ms[:, 2] -= (x0, y0)
            dark = cv2.warpAffine(sprite.shadow, ms, (x1 - x0, y1 - y0))
            keep = cv2.convertScaleAbs(dark, alpha=-look.shadow_depth, beta=255)
            roi = canvas[y0:y1, x0:x1]
            cv2.multiply(roi, cv2.merge([keep, keep, keep]), dst=roi, scale=1 / 255)
        box = _window(m, sprite.shadow.shape, (w, h), 1)
        if box is None:
            continue
        x0, y0, x1, y1 = box
        m[:, 2] -= (x0, y0)
        size = (x1 - x0, y1 - y0)
        light = cv2.warpAffine(sprite.reflect, m, size)
        through = cv2.warpAffine(sprite.transmit, m, size, borderValue=(255, 255, 255))
        behind = cv2.multiply(canvas[y0:y1, x0:x1], through, scale=1 / 255)
        canvas[y0:y1, x0:x1] = cv2.add(behind, np.ascontiguousarray(light[..., :3]))
        solid = light[..., 3] > 127
        labels[y0:y1, x0:x1][solid] = item.class_index
        instances[y0:y1, x0:x1][solid] = k + 1
    return canvas, labels, instances, whole


def _settle_labels(
    labels: NDArray[np.uint8], instances: NDArray[np.uint16], whole: list[int], least: int
) -> NDArray[np.int64]:
    """Give up items of which too little shows (IGNORE); returns visible pixels by instance id."""
    seen = np.bincount(instances.ravel(), minlength=len(whole) + 1)
    lost = [
        k + 1
        for k, total in enumerate(whole)
        if 0 < seen[k + 1] < max(least, MIN_VISIBLE_FRACTION * total)
    ]
    if lost:
        gone = np.isin(instances, lost)
        labels[gone] = IGNORE
        instances[gone] = 0
        seen[lost] = 0
    return seen


@lru_cache(maxsize=_CACHE)
def _pool_sprite(seed: int, number: int) -> Sprite:
    rng = np.random.default_rng([seed, 1, number])
    return render_sprite(CLASSES[int(rng.integers(len(CLASSES)))], rng)


def _place(
    rng: Rng, count: int, size: tuple[int, int], mpp: float, look: _Look, seed: int, index: int
) -> list[_Placed]:
    w, h = size
    placed: list[_Placed] = []
    crowd = rng.random()
    for k in range(count):
        sprite = _pool_sprite(seed, index + int(rng.integers(_WINDOW)))
        mirrored = bool(rng.random() < 0.5)
        light = -sprite.light_angle if mirrored else sprite.light_angle
        angle = look.light_angle - light + rng.normal(0, 0.25)
        scale = SPRITE_RESOLUTION / mpp * rng.uniform(0.8, 1.2)
        reach = max(sprite.shadow.shape) * scale / 2
        for _attempt in range(12):
            if placed and crowd < 0.55 and rng.random() < 0.6:  # next to one that lies there
                other = placed[int(rng.integers(len(placed)))]
                d = (reach + max(other.sprite.shadow.shape) * other.scale / 2) * rng.uniform(
                    0.45, 0.95
                )
                t = rng.uniform(0, 2 * np.pi)
                center = (other.center[0] + d * np.cos(t), other.center[1] + d * np.sin(t))
            else:
                center = (rng.uniform(-0.05, 1.05) * w, rng.uniform(-0.02, 1.02) * h)
            gap = min(
                (
                    np.hypot(center[0] - o.center[0], center[1] - o.center[1])
                    / (reach + max(o.sprite.shadow.shape) * o.scale / 2)
                    for o in placed
                ),
                default=9.0,
            )
            if gap > (0.4 if crowd < 0.3 else 0.55 if crowd < 0.6 else 0.85):
                break
        else:
            continue
        index_of_class = CLASSES.index(sprite.kind.split("/")[0]) + 1
        placed.append(_Placed(k + 1, index_of_class, sprite, center, angle, scale, mirrored))
    return placed


def synthetic_sample(seed: int, index: int, size: tuple[int, int] = (320, 240)) -> Sample:
    """Draw scene `index` of the endless set `seed`; equal arguments give equal samples.

    Scenes near each other choose from common sprites (one new sprite a scene), so that going
    through the set in order is fast.

    Args:
        seed: the set; use other seeds for validation and test.
        index: number of the scene, from 0.
        size: (width, height) of the picture [px].

    Returns:
        A sample whose belt runs along any of the four image directions.
    """
    return synthetic_scene(seed, index, size)[0]


def synthetic_scene(
    seed: int, index: int, size: tuple[int, int] = (320, 240)
) -> tuple[Sample, dict[int, str]]:
    """`synthetic_sample` and the kind of each item by its instance id, such as "bottle/jug".

    Of ids that are not in the sample (hidden, or off the picture) kinds are told as well.
    """
    rng = np.random.default_rng([seed, 0, index])
    turned = bool(rng.random() < 0.5)
    w, h = size[::-1] if turned else size
    view = float(np.exp(rng.uniform(np.log(0.5), np.log(1.35))))  # metres across the longer side
    mpp = view / max(w, h)
    tidy = bool(rng.random() < 0.4)
    look = _look(rng, (w, h), tidy)
    background = _background(rng, (h, w), mpp, tidy)
    area = w * h * mpp * mpp
    count = 0 if rng.random() < 0.04 else int(1 + rng.poisson(min(16, rng.uniform(2, 20) * area)))
    items = _place(rng, count, (w, h), mpp, look, seed, index)
    canvas, labels, instances, whole = _compose(background, items, look, mpp)
    _settle_labels(labels, instances, whole, least=24)
    image = _expose(canvas, look, rng)
    picture: list[Array] = [image, labels, instances]
    if turned:
        picture = [np.ascontiguousarray(np.rot90(a)) for a in picture]
    sample = Sample(picture[0], picture[1], picture[2], f"synthetic:{seed}:{index}")
    return sample, {number: item.sprite.kind for number, item in enumerate(items, 1)}


def synthetic_crowd(seed: int, count: int, size: tuple[int, int] = (640, 480)) -> Sample:
    """Draw a scene of just so many items that lie apart: what items cost is measured on these.

    Args:
        seed: of belt, light and items.
        count: of items, from 0; each has a field of the picture to itself and is as large as
            fits in, at most as large as it is on the line.
        size: (width, height) of the picture [px].

    Raises:
        ValueError: there are so many that their fields are smaller than 8 px.
    """
    w, h = size
    columns = max(1, round(float(np.sqrt(count * w / h))))
    rows = max(1, -(-count // columns))
    field = np.array([w / columns, h / rows])
    if count < 0 or field.min() < 8:
        raise ValueError(f"{count} items do not fit into {w}x{h} px")
    rng = np.random.default_rng([seed, 5])
    mpp = 0.96 / w
    look = _look(rng, size, tidy=True)
    background = _background(rng, (h, w), mpp, tidy=True)
    items = []
    for k, spot in enumerate(np.sort(rng.permutation(columns * rows)[:count])):
        sprite = _pool_sprite(seed, int(rng.integers(64)))
        scale = min(SPRITE_RESOLUTION / mpp, 0.95 * field.min() / max(sprite.shadow.shape))
        slack = field - max(sprite.shadow.shape) * scale
        row, column = divmod(int(spot), columns)
        center = (np.array([column, row]) + 0.5) * field + rng.uniform(-0.4, 0.4, 2) * slack
        kind = CLASSES.index(sprite.kind.split("/")[0]) + 1
        angle = float(rng.uniform(-np.pi, np.pi))
        items.append(
            _Placed(k + 1, kind, sprite, (float(center[0]), float(center[1])), angle, scale, False)
        )
    canvas, labels, instances, whole = _compose(background, items, look, mpp)
    _settle_labels(labels, instances, whole, least=1)
    return Sample(_expose(canvas, look, rng), labels, instances, f"crowd:{seed}:{count}")


class SyntheticLine:
    """One belt, moving along +x of the image, that brings new items for ever.

    Args:
        seed: belt, light, camera and all items follow from it.
        size: (width, height) of the frames [px].
        speed: of the belt [m/s].
        view: width of the belt seen across the frame [m].
        density: items per metre of belt, on average.

    Raises:
        ValueError: an argument out of range; names it and the range.
    """

    def __init__(
        self,
        seed: int = 0,
        size: tuple[int, int] = (640, 480),
        speed: float = 0.25,
        view: float = 0.96,
        density: float = 9.0,
    ) -> None:
        if min(size) < 32 or max(size) > 4096:
            raise ValueError(f"size is {size[0]}x{size[1]} px; each side must be 32 to 4096")
        if not 0.1 <= view <= 5:
            raise ValueError(f"view is {view} m; it must be 0.1 to 5")
        if not 0 <= density <= 60:
            raise ValueError(f"density is {density} items/m; it must be 0 to 60")
        if not np.isfinite(speed) or abs(speed) > 20:
            raise ValueError(f"speed is {speed} m/s; it must be finite, at most 20 either way")
        self.seed, self.size, self.speed, self.density = seed, size, speed, density
        self.meters_per_pixel = view / size[0]
        rng = np.random.default_rng([seed, 2])
        self._look = _look(rng, size, tidy=True)
        self._look.motion = max(0, round(speed * 0.004 / self.meters_per_pixel))  # 4 ms exposure
        self._belt = _background(rng, (size[1], size[0] * 3), self.meters_per_pixel, tidy=True)
        self._cell = 0.25  # metres of belt that one draw of items fills
        self._cells: dict[int, list[_Placed]] = {}

    def _items_of_cell(self, cell: int) -> list[_Placed]:
        """Items whose centre lies in belt cell `cell`; x is relative to the cell's start [px]."""
        if cell in self._cells:
            return self._cells[cell]
        rng = np.random.default_rng([self.seed, 3, cell + (1 << 40)])
        w_cell = self._cell / self.meters_per_pixel
        h = self.size[1]
        items: list[_Placed] = []
        for k in range(min(15, int(rng.poisson(self.density * self._cell)))):
            class_index = int(rng.integers(len(CLASSES)))
            mirrored = bool(rng.random() < 0.5)
            angle = float(rng.uniform(-np.pi, np.pi))
            light = self._look.light_angle - angle
            sprite = render_sprite(CLASSES[class_index], rng, -light if mirrored else light)
            scale = SPRITE_RESOLUTION / self.meters_per_pixel
            for _attempt in range(8):
                center = (float(rng.uniform(0, w_cell)), float(rng.uniform(0.1, 0.9) * h))
                reach = max(sprite.shadow.shape) * scale / 2
                if all(
                    np.hypot(center[0] - o.center[0], center[1] - o.center[1])
                    > 0.6 * (reach + max(o.sprite.shadow.shape) * o.scale / 2)
                    for o in items
                ):
                    number = (cell % (1 << 27)) * 16 + k + 1
                    items.append(
                        _Placed(number, class_index + 1, sprite, center, angle, scale, mirrored)
                    )
                    break
        if len(self._cells) > 64:  # far behind the camera by now
            for old in sorted(self._cells, key=lambda c: abs(c - cell))[32:]:
                del self._cells[old]
        self._cells[cell] = items
        return items

    def frame(self, t: float) -> Frame:
        """The picture at time `t` [s] and the truth about it; equal `t` gives an equal frame."""
        w = self.size[0]
        mpp = self.meters_per_pixel
        moved = self.speed * t / mpp  # px that belt points have travelled along +x
        w_cell = self._cell / mpp
        margin = 0.25 / mpp
        first = int(np.floor((-margin - moved) / w_cell))
        last = int(np.floor((w + margin - moved) / w_cell))
        items: list[_Placed] = []
        for cell in range(first, last + 1):
            start = cell * w_cell + moved
            items += [
                _Placed(
                    i.id,
                    i.class_index,
                    i.sprite,
                    (i.center[0] + start, i.center[1]),
                    i.angle,
                    i.scale,
                    i.mirrored,
                )
                for i in self._items_of_cell(cell)
            ]
        length = self._belt.shape[1]
        offset = round(-moved) % length
        cut = self._belt[:, offset : offset + w]
        if cut.shape[1] < w:
            cut = np.concatenate([cut, self._belt[:, : w - cut.shape[1]]], 1)
        canvas, labels, instances, whole = _compose(cut, items, self._look, mpp)
        seen = _settle_labels(labels, instances, whole, least=24)
        rng = np.random.default_rng([self.seed, 4, int(abs(t) * 1e6)])
        image = _expose(canvas, self._look, rng)
        return Frame(
            Sample(image, labels, instances, f"line:{self.seed}:{t:.6f}"),
            self._truth(items, instances, seen, whole),
        )

    def _truth(
        self,
        items: list[_Placed],
        instances: NDArray[np.uint16],
        seen: NDArray[np.int64],
        whole: list[int],
    ) -> tuple[TruthItem, ...]:
        ys, xs = np.nonzero(instances)
        ids = instances[ys, xs]
        sum_x = np.bincount(ids, xs, minlength=len(items) + 1)
        sum_y = np.bincount(ids, ys, minlength=len(items) + 1)
        edge = np.concatenate([instances[0], instances[-1], instances[:, 0], instances[:, -1]])
        cut = set(np.unique(edge).tolist())
        out = []
        for k, item in enumerate(items, start=1):
            if seen[k] == 0:
                continue
            out.append(
                TruthItem(
                    id=item.id,
                    class_index=item.class_index,
                    instance=k,
                    center=(float(sum_x[k] / seen[k]), float(sum_y[k] / seen[k])),
                    velocity=(self.speed / self.meters_per_pixel, 0.0),
                    visible=float(min(1.0, seen[k] / max(1, whole[k - 1]))),
                    truncated=k in cut,
                )
            )
        return tuple(out)


# --- waste-seg contact-sheet ----------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``waste-seg contact-sheet``."""
    parser.description = "Tile scenes of the synthetic line into one PNG, to look at."
    parser.add_argument("--output", type=Path, default=Path("contact-sheet.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--size", type=as_size, default=(320, 240), metavar="WxH", help="(320x240)")
    parser.add_argument("--labels", action="store_true", help="tint the items by class")


def run(args: argparse.Namespace) -> int:
    """Write the contact sheet; returns the exit code."""
    if min(args.count, args.columns) < 1 or args.seed < 0:
        print(
            "waste-seg contact-sheet: --count and --columns must be at least 1, --seed at least 0",
            file=sys.stderr,
        )
        return 1
    w, h = args.size
    tint = np.array(
        [[0, 0, 0], [230, 159, 0], [0, 114, 178], [204, 121, 167], [0, 158, 115]], np.uint8
    )
    tiles = []
    for k in range(args.count):
        sample = synthetic_sample(args.seed, k, (w, h))
        tile = sample.image
        if args.labels:
            known = np.where(sample.labels == IGNORE, BACKGROUND, sample.labels)
            colour = tint[known]
            tile = np.where(
                (known > 0)[..., None], cv2.addWeighted(tile, 0.5, colour, 0.5, 0), tile
            )
        tiles.append(tile)
    while len(tiles) % args.columns:
        tiles.append(np.zeros((h, w, 3), np.uint8))
    rows = [np.hstack(tiles[k : k + args.columns]) for k in range(0, len(tiles), args.columns)]
    write_png(args.output, np.vstack(rows))
    print(f"{args.count} scenes of seed {args.seed}: {args.output}")
    return 0
