"""Procedural pictures of waste items, seen from straight above.

An item is rendered once, from a seed, as a `Sprite`: the light that it reflects and the light that
it lets through, at a fixed resolution on the belt. A scene then only has to warp and blend sprites,
which is what makes the synthetic line fast enough to train from. Shapes are height fields; shading
is Lambert + Blinn-Phong for dielectrics and a small analytic environment map for metal.

All colours here are float32 RGB in 0..1 unless said otherwise; image axes, x right and y down.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # float32; OpenCV's annotations know no element types
Rng = np.random.Generator

SPRITE_RESOLUTION = 0.0015
"""Metres on the belt per sprite pixel."""


@dataclass(frozen=True, eq=False)
class Sprite:
    """One rendered item: what reaches the camera is ``belt * transmit + reflect``.

    Attributes:
        kind: what it is, for example ``"paper/newspaper"``; the part before the slash is the class.
        reflect: (h, w, 4) uint8: RGB of the reflected light, and coverage 0..255.
        transmit: (h, w, 3) uint8 per-channel transmission; 255 where there is no item.
        shadow: (h, w) uint8: how much light the item keeps from the belt, blurred.
        light_angle: direction towards the light [rad], in the sprite's image axes.
        height: height of the item above the belt [m]; sets the length of the cast shadow.
    """

    kind: str
    reflect: NDArray[np.uint8]
    transmit: NDArray[np.uint8]
    shadow: NDArray[np.uint8]
    light_angle: float
    height: float

    @cached_property
    def half(self) -> Sprite:
        """The sprite at half size, area-averaged: minifying by a warp alone would alias."""
        reflect, transmit, shadow = (
            np.asarray(cv2.resize(a, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), np.uint8)
            for a in (self.reflect, self.transmit, self.shadow)
        )
        return Sprite(self.kind, reflect, transmit, shadow, self.light_angle, self.height)


@dataclass(frozen=True)
class _Light:
    angle: float
    elevation: float
    ambient: float

    @property
    def vector(self) -> tuple[float, float, float]:
        c = np.cos(self.elevation)
        return (
            float(c * np.cos(self.angle)),
            float(c * np.sin(self.angle)),
            float(np.sin(self.elevation)),
        )


@dataclass(eq=False)
class _Canvas:
    """What a painter hands back: geometry and colour before it is packed into a sprite."""

    coverage: Array  # (h, w) 0..1
    colour: Array  # (h, w, 3) shaded, reflected light
    opacity: Array  # (h, w) 1 opaque .. 0 clear
    tint: tuple[float, float, float]  # colour of the transmitted light
    height: float  # metres


# --- noise, shapes and prints ---------------------------------------------------------------------


def value_noise(rng: Rng, shape: tuple[int, ...], cell: float) -> Array:
    """(h, w) smooth noise, about unit variance, with features of `cell` pixels."""
    h, w = shape
    grid = rng.standard_normal((int(h / cell) + 3, int(w / cell) + 3), dtype=np.float32)
    big = cv2.resize(grid, None, fx=cell, fy=cell, interpolation=cv2.INTER_CUBIC)
    y, x = (int(v) for v in rng.integers(0, max(1, int(cell)), 2))
    if big.shape[0] < h + y or big.shape[1] < w + x:
        return np.asarray(cv2.resize(big, (w, h)), np.float32)
    return np.asarray(big[y : y + h, x : x + w], np.float32)


def fractal_noise(rng: Rng, shape: tuple[int, ...], cell: float, octaves: int = 4) -> Array:
    """(h, w) sum of octaves of `value_noise`, the first with features of `cell` pixels."""
    out = np.zeros(shape, np.float32)
    for k in range(octaves):
        size = cell / 2**k
        if size < 1.0:
            break
        out += value_noise(rng, shape, size) * np.float32(0.55**k)
    return out


def _grid(shape: tuple[int, ...]) -> tuple[Array, Array]:
    h, w = shape
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    return x - np.float32((w - 1) / 2), y - np.float32((h - 1) / 2)


def _creases(rng: Rng, shape: tuple[int, ...], cell: float, count: int, warp: float) -> Array:
    """Height field of straight folds in random directions, `cell` px apart, bent by `warp` px."""
    x, y = _grid(shape)
    wx = value_noise(rng, shape, cell * 1.2) * np.float32(warp)
    wy = value_noise(rng, shape, cell * 1.2) * np.float32(warp)
    out = np.zeros(shape, np.float32)
    for _ in range(count):
        a = rng.uniform(0, np.pi)
        period = cell * rng.uniform(0.7, 2.2)
        phase = ((x + wx) * np.float32(np.cos(a)) + (y + wy) * np.float32(np.sin(a))) / period
        phase += np.float32(rng.uniform(0, 1))
        out += np.abs(phase - np.floor(phase) - 0.5).astype(np.float32) * np.float32(period)
    return out / np.float32(max(1, count) ** 0.5)


def _polar_blob(
    rng: Rng, shape: tuple[int, ...], ax: float, ay: float, rough: float, waves: int = 6
) -> Array:
    """Coverage of a closed blob with half axes `ax`, `ay` px and a wavy outline."""
    x, y = _grid(shape)
    theta = np.arctan2(y / ay, x / ax)
    rho = np.sqrt((x / ax) ** 2 + (y / ay) ** 2)
    r = np.ones(shape, np.float32)
    for k in range(2, 2 + waves):
        r += np.float32(rough * rng.normal() / k**0.8) * np.cos(
            k * theta + np.float32(rng.uniform(0, 2 * np.pi))
        )
    return _soft((np.clip(r, 0.35, 1.45) - rho) * np.float32(min(ax, ay)))


def _soft(signed_distance: Array) -> Array:
    return np.clip(signed_distance + 0.5, 0, 1).astype(np.float32)


def _polygon(shape: tuple[int, ...], points: NDArray[np.float64]) -> Array:
    canvas = np.zeros(shape, np.uint8)
    cv2.fillPoly(canvas, [np.round(points * 16).astype(np.int32)], (255,), cv2.LINE_AA, 4)
    return canvas.astype(np.float32) / 255


def _hsv(h: float, s: float, v: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(h % 1, min(1, max(0, s)), min(1, max(0, v)))


def _vivid(rng: Rng) -> tuple[float, float, float]:
    return _hsv(rng.uniform(0, 1), rng.uniform(0.55, 1), rng.uniform(0.35, 0.95))


def _neutral(rng: Rng, low: float, high: float, tint: float = 0.04) -> tuple[float, float, float]:
    v = rng.uniform(low, high)
    return (
        float(np.clip(v + rng.normal(0, tint / 2), 0, 1)),
        float(np.clip(v, 0, 1)),
        float(np.clip(v - abs(rng.normal(0, tint)), 0, 1)),
    )


def _fill(shape: tuple[int, ...], colour: tuple[float, float, float]) -> Array:
    out = np.empty((*shape, 3), np.float32)
    out[:] = colour
    return out


def _text_rows(
    rng: Rng, img: Array, box: tuple[int, int, int, int], pitch: int, ink: tuple[float, ...]
) -> None:
    """Rows of word-like dashes inside box = (x, y, w, h)."""
    x0, y0, w, h = box
    for y in range(y0, y0 + h - pitch + 1, pitch):
        x = x0
        stop = x0 + w if rng.random() > 0.2 else x0 + int(w * rng.uniform(0.3, 0.9))
        while x < stop - 2:
            n = int(min(rng.integers(3, 12), stop - x))
            cv2.rectangle(img, (x, y), (x + n - 1, y + max(0, pitch // 2 - 1)), ink, -1)
            x += n + 2


_WORDS = ("NEWS", "SALE", "ECO", "FRESH", "COLA", "MILK", "PURE", "TEA", "500", "XL", "BIO", "SOAP")


def _word(rng: Rng, img: Array, box: tuple[int, int, int, int], ink: tuple[float, ...]) -> None:
    x, y, w, h = box
    word = _WORDS[int(rng.integers(len(_WORDS)))]
    font = int(rng.choice([cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX]))
    (tw, th), _ = cv2.getTextSize(word, font, 1.0, 2)
    scale = min(w / tw, h / th)
    thick = max(1, round(2.2 * scale))
    cv2.putText(img, word, (x, y + int(th * scale)), font, scale, ink, thick, cv2.LINE_AA)


def _artwork(rng: Rng, shape: tuple[int, ...]) -> Array:
    """A printed design: bands, waves, discs and words in two to four colours."""
    h, w = shape
    base = _vivid(rng) if rng.random() < 0.7 else _neutral(rng, 0.75, 0.95)
    img = _fill(shape, base)
    inks = [_vivid(rng), _neutral(rng, 0.85, 1.0), _vivid(rng), _neutral(rng, 0.02, 0.2)]
    for _ in range(int(rng.integers(1, 5))):
        ink = inks[int(rng.integers(len(inks)))]
        style = rng.integers(4)
        if style == 0:
            x = int(rng.integers(0, w))
            cv2.rectangle(img, (x, 0), (x + int(rng.integers(2, max(3, w // 3))), h), ink, -1)
        elif style == 1:
            y = int(rng.integers(0, h))
            cv2.rectangle(img, (0, y), (w, y + int(rng.integers(2, max(3, h // 3)))), ink, -1)
        elif style == 2:
            centre = (int(rng.integers(0, w)), int(rng.integers(0, h)))
            r = int(rng.integers(3, max(4, min(h, w) // 2)))
            cv2.circle(img, centre, r, ink, -1, cv2.LINE_AA)
        else:
            xs = np.arange(0, w + 4, 4)
            ys = h * (0.5 + 0.25 * np.sin(xs * rng.uniform(0.02, 0.12) + rng.uniform(0, 6)))
            pts = np.stack([xs, ys], 1).astype(np.int32)
            cv2.polylines(img, [pts], False, ink, int(rng.integers(2, 14)), cv2.LINE_AA)
    if rng.random() < 0.8:
        ww, hh = int(w * rng.uniform(0.3, 0.8)), int(h * rng.uniform(0.15, 0.5))
        box = (int(rng.integers(0, max(1, w - ww))), int(rng.integers(0, max(1, h - hh))), ww, hh)
        _word(rng, img, box, inks[1] if rng.random() < 0.6 else inks[3])
    if rng.random() < 0.5:
        box = (w // 8, int(h * rng.uniform(0.4, 0.8)), w * 3 // 4, h // 4)
        _text_rows(rng, img, box, 4, inks[3])
    return img


def _stain(rng: Rng, colour: Array, amount: float) -> None:
    """Dirt: brown and grey blotches and specks, in place."""
    shape = colour.shape[:2]
    n = fractal_noise(rng, shape, rng.uniform(18, 60), 4)
    patch = np.clip((n - rng.uniform(0.3, 1.2)) * 1.5, 0, 1)[..., None] * np.float32(amount)
    dirt = np.array(_hsv(rng.uniform(0.05, 0.12), rng.uniform(0.1, 0.5), rng.uniform(0.15, 0.4)))
    colour += (dirt.astype(np.float32) - colour) * patch
    if rng.random() < 0.6:
        for _ in range(int(rng.integers(2, 16))):
            p = (int(rng.integers(shape[1])), int(rng.integers(shape[0])))
            cv2.circle(colour, p, int(rng.integers(1, 3)), tuple(map(float, dirt)), -1, cv2.LINE_AA)


# --- shading --------------------------------------------------------------------------------------


def _normals(height: Array) -> tuple[Array, Array, Array]:
    gx = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    gy = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
    inv = 1 / np.sqrt(1 + gx * gx + gy * gy)
    return -gx * inv, -gy * inv, inv


def _diffuse(normals: tuple[Array, Array, Array], light: _Light) -> Array:
    """Lambert shade, 1 on a surface that lies flat on the belt."""
    nx, ny, nz = normals
    lx, ly, lz = light.vector
    direct = np.clip(nx * np.float32(lx) + ny * np.float32(ly) + nz * np.float32(lz), 0, None)
    shade = light.ambient * (0.45 + 0.55 * nz) + (1 - light.ambient) * direct / max(lz, 0.35)
    return np.clip(shade, 0, 1.7).astype(np.float32)


def _specular(normals: tuple[Array, Array, Array], light: _Light, power: float) -> Array:
    nx, ny, nz = normals
    half = np.add(light.vector, (0, 0, 1))
    hx, hy, hz = (np.float32(v) for v in half / np.linalg.norm(half))
    return np.clip(nx * hx + ny * hy + nz * hz, 0, 1).astype(np.float32) ** np.float32(power)


def _metal(rng: Rng, normals: tuple[Array, Array, Array], light: _Light, contrast: float) -> Array:
    """Grey reflection of a small made-up hall (lamps, dark corners) in bare aluminium."""
    nx, ny, nz = normals
    rx, ry = 2 * nz * nx, 2 * nz * ny
    env = np.zeros(nx.shape, np.float32)
    for _ in range(4):
        a, f = rng.uniform(0, 2 * np.pi), rng.uniform(2.0, 7.0)
        env += np.sin(
            np.float32(f) * (rx * np.float32(np.cos(a)) + ry * np.float32(np.sin(a)))
            + np.float32(rng.uniform(0, 6.3))
        )
    env = 0.56 + np.float32(0.2 * contrast) * env
    lx, ly, _ = light.vector
    sun = np.exp(-((rx - np.float32(lx)) ** 2 + (ry - np.float32(ly)) ** 2) / np.float32(0.06))
    return np.clip(env + 0.7 * sun, 0.08, 1.5).astype(np.float32)


def _glossy(albedo: Array, height: Array, light: _Light, gloss: float, power: float = 40) -> Array:
    n = _normals(height)
    return albedo * _diffuse(n, light)[..., None] + (gloss * _specular(n, light, power))[..., None]


# --- solids of revolution (bottles and cans lying on their side) ----------------------------------


@dataclass(eq=False)
class _Lathe:
    coverage: Array
    height: Array  # px
    u: Array  # 0..1 along the axis
    v: Array  # -1..1 across
    radius: Array  # px, per pixel


def _lathe(
    rng: Rng,
    length: float,
    profile: list[tuple[float, float]],
    dent: float,
    flatten: float,
    margin: int = 10,
) -> _Lathe:
    """Lay a body of revolution on the belt.

    Args:
        rng: source of the dents.
        length: along x [px].
        profile: (position 0..1, radius px) along the axis, linear in between.
        dent: 0 factory new .. 1 trodden on.
        flatten: factor of the height (1 round).
        margin: empty pixels around the body.
    """
    r_max = max(r for _, r in profile)
    h = int(2 * r_max * (1.15 + 0.25 * dent)) + 2 * margin
    w = int(length) + 2 * margin
    shape = (h, w)
    x, y = _grid(shape)
    u = np.clip(x / np.float32(length) + 0.5, 0, 1)
    us = np.linspace(0, 1, w, dtype=np.float32)
    radius = np.interp(us, [p for p, _ in profile], [r for _, r in profile]).astype(np.float32)
    radius = cv2.GaussianBlur(radius[None], (0, 0), 1.2, borderType=cv2.BORDER_REPLICATE)[0]
    top, bottom = radius.copy(), radius.copy()
    bend = np.zeros(w, np.float32)
    if dent > 0:
        for side in (top, bottom):
            wobble = value_noise(rng, (1, w), max(8.0, length / 6))[0]
            side *= np.clip(1 + np.float32(0.13 * dent) * wobble, 0.6, 1.3)
        bend = np.float32(0.12 * dent * r_max) * value_noise(rng, (1, w), max(10.0, length / 3))[0]
    cols = np.clip(np.round(x + (w - 1) / 2), 0, w - 1).astype(np.int32)[0]
    ratio = np.float32((w - 1) / max(length, 1))
    cols = np.clip(np.round((cols - (w - 1) / 2) * ratio + (w - 1) / 2), 0, w - 1).astype(np.int32)
    yy = y - bend[cols][None]
    rr = np.where(yy < 0, top[cols][None], bottom[cols][None]).astype(np.float32)
    v = np.clip(yy / np.maximum(rr, 0.5), -1, 1)
    ends = np.float32(length / 2) - np.abs(x)
    coverage = _soft(np.minimum(rr - np.abs(yy), ends))
    dome = np.sqrt(np.clip(1 - v * v, 0, 1)) * rr * np.float32(flatten)
    if dent > 0:
        crumple = _creases(rng, shape, rng.uniform(14, 34), 3, 6)
        dome = dome * (1 - 0.35 * np.float32(dent)) + crumple * np.float32(0.9 * dent)
        dome -= np.float32(dent * 0.25 * r_max) * np.clip(
            value_noise(rng, shape, max(12.0, r_max)), 0, 2
        )
    return _Lathe(coverage, cv2.GaussianBlur(dome, (0, 0), 0.8), u, v, rr)


def _wrap_print(rng: Rng, lathe: _Lathe, art: Array) -> Array:
    """Look up a print wrapped around the body: foreshortened towards the sides."""
    h, w = art.shape[:2]
    around = np.arcsin(lathe.v * np.float32(0.995)) / np.float32(np.pi) + 0.5
    mx = lathe.u * np.float32(w - 1)
    my = around * np.float32(h - 1)
    return np.asarray(cv2.remap(art, mx, my.astype(np.float32), cv2.INTER_LINEAR), np.float32)


def _px(metres: float) -> float:
    return metres / SPRITE_RESOLUTION


# --- paper ----------------------------------------------------------------------------------------


def _sheet_geometry(
    rng: Rng, art: Array, tear: float, skew: float, margin: int = 10
) -> tuple[Array, Array]:
    """Put a rectangular print on a canvas with displaced corners and torn edges."""
    h, w = art.shape[:2]
    shape = (h + 2 * margin, w + 2 * margin)
    src = np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float32)
    dst = src + margin + rng.normal(0, skew * min(h, w), (4, 2)).astype(np.float32)
    dst = np.clip(dst, 2, [shape[1] - 3, shape[0] - 3]).astype(np.float32)
    m = cv2.getPerspectiveTransform(src, dst)
    flat = cv2.warpPerspective(art, m, shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    inside = _polygon(shape, dst.astype(np.float64))
    if tear > 0:
        d = cv2.distanceTransform((inside > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
        rag = fractal_noise(rng, shape, 26, 4) * np.float32(tear)
        inside = inside * _soft(d - np.clip(rag + np.float32(tear * 0.6), 0, None))
    if rng.random() < 0.25:  # a corner torn or folded away
        cut = dst[int(rng.integers(4))]
        x, y = _grid(shape)
        x, y = x + (shape[1] - 1) / 2 - cut[0], y + (shape[0] - 1) / 2 - cut[1]
        a = np.arctan2(shape[0] / 2 - cut[1], shape[1] / 2 - cut[0]) + rng.normal(0, 0.3)
        reach = np.float32(min(h, w) * rng.uniform(0.15, 0.4))
        inside = inside * _soft(x * np.float32(np.cos(a)) + y * np.float32(np.sin(a)) - reach)
    return flat, inside


def _office_art(rng: Rng, shape: tuple[int, ...]) -> Array:
    h, w = shape
    if rng.random() < 0.8:
        base = _neutral(rng, 0.8, 0.96)
    else:
        base = _hsv(rng.uniform(0, 1), rng.uniform(0.1, 0.45), 0.92)
    img = _fill(shape, base)
    ink = _neutral(rng, 0.05, 0.35)
    pad = max(4, w // 10)
    y = pad
    if rng.random() < 0.6:
        _word(rng, img, (pad, y, w // 2, h // 12), ink)
        y += h // 9
    _text_rows(rng, img, (pad, y, w - 2 * pad, h - y - pad), int(rng.integers(4, 8)), ink)
    if rng.random() < 0.35:
        bx, by = (
            int(rng.integers(pad, max(pad + 1, w // 2))),
            int(rng.integers(y, max(y + 1, h // 2))),
        )
        img[by : by + h // 4, bx : bx + w // 3] = _artwork(
            rng, img[by : by + h // 4, bx : bx + w // 3].shape[:2]
        )
    return img


def _news_art(rng: Rng, shape: tuple[int, ...]) -> Array:
    h, w = shape
    img = _fill(shape, _neutral(rng, 0.66, 0.84, 0.06))
    ink = _neutral(rng, 0.12, 0.35)
    columns = int(rng.integers(2, 5))
    cw = w // columns
    _word(rng, img, (6, 5, int(w * rng.uniform(0.5, 0.9)), h // 8), ink)
    for c in range(columns):
        y = h // 6 + int(rng.integers(0, h // 10))
        if rng.random() < 0.45:
            ph = int(h * rng.uniform(0.15, 0.3))
            block = img[y : y + ph, c * cw + 4 : (c + 1) * cw - 2]
            tone = fractal_noise(rng, (block.shape[0], block.shape[1]), 16, 4)
            grey = np.clip(0.45 + 0.2 * tone, 0.05, 0.9)[..., None]
            block[:] = grey * (1 if rng.random() < 0.6 else np.array(_vivid(rng), np.float32) + 0.3)
            y += ph + 4
        _text_rows(rng, img, (c * cw + 4, y, cw - 7, h - y - 5), 4, ink)
    return img


def _cardboard_art(rng: Rng, shape: tuple[int, ...]) -> Array:
    h, w = shape
    base = _hsv(rng.uniform(0.07, 0.105), rng.uniform(0.3, 0.52), rng.uniform(0.5, 0.78))
    img = _fill(shape, base)
    flutes = np.sin(np.arange(w, dtype=np.float32) * np.float32(2 * np.pi / rng.uniform(4, 6)))
    img *= 1 + np.float32(rng.uniform(0.0, 0.05)) * flutes[None, :, None]
    img *= 1 + np.float32(0.04) * fractal_noise(rng, shape, 30, 5)[..., None]
    ink = _neutral(rng, 0.05, 0.25) if rng.random() < 0.7 else _vivid(rng)
    if rng.random() < 0.6:
        box = (int(w * 0.1), int(h * rng.uniform(0.1, 0.6)), int(w * 0.6), int(h * 0.25))
        _word(rng, img, box, ink)
    if rng.random() < 0.3:
        _text_rows(rng, img, (w // 8, h * 2 // 3, w // 2, h // 5), 6, ink)
    if rng.random() < 0.4:
        y = int(h * rng.uniform(0.2, 0.7))
        tape = np.array(_hsv(0.1, rng.uniform(0.05, 0.35), rng.uniform(0.7, 0.9)), np.float32)
        band = img[y : y + max(6, h // 6)]
        band += (tape - band) * np.float32(rng.uniform(0.4, 0.8))
    return img


def _paper(rng: Rng, light: _Light) -> tuple[str, _Canvas]:
    style = rng.choice(
        ["office", "newspaper", "magazine", "crumpled", "cardboard", "carton", "strip"],
        p=[0.17, 0.15, 0.08, 0.27, 0.2, 0.08, 0.05],
    )
    if style == "crumpled":
        return "crumpled", _paper_ball(rng, light)
    sizes = {
        "office": (0.297, 0.21),
        "newspaper": (0.29, 0.21),
        "magazine": (0.28, 0.2),
        "cardboard": (0.28, 0.19),
        "carton": (0.24, 0.15),
        "strip": (0.24, 0.075),
    }
    w, h = sizes[style]
    k = rng.uniform(0.45, 1.0)
    w, h = w * k, h * k * rng.uniform(0.65, 1.05)
    shape = (max(24, int(_px(h))), max(24, int(_px(w))))
    if style in ("office", "strip"):
        art = _office_art(rng, shape)
    elif style == "newspaper":
        art = _news_art(rng, shape)
    elif style == "cardboard":
        art = _cardboard_art(rng, shape)
    else:
        art = _artwork(rng, shape)
    thick = style in ("cardboard", "carton")
    torn = rng.random() < (0.45 if thick else 0.35)
    albedo, coverage = _sheet_geometry(
        rng, art, tear=rng.uniform(2, 7) if torn else 0, skew=0.02 if thick else 0.05
    )
    cshape = coverage.shape
    crease = _creases(rng, cshape, rng.uniform(35, 80), int(rng.integers(1, 5)), 4)
    crease *= np.float32(rng.uniform(0.05, 0.2) if thick else rng.uniform(0.08, 0.45))
    curl = value_noise(rng, cshape, 60) * np.float32(1.5 if thick else rng.uniform(1.5, 5))
    if rng.random() < 0.6:
        _stain(rng, albedo, rng.uniform(0.1, 0.5))
    gloss = rng.uniform(0.05, 0.25) if style in ("magazine", "carton") else 0.0
    colour = _glossy(albedo, crease + curl, light, gloss, 20)
    if thick:  # the lighter, cut edge of the board
        rim = cv2.GaussianBlur(coverage, (0, 0), 1.5)
        edge = np.clip((1 - rim) * 2, 0, 1)[..., None]
        colour += (np.float32(0.8) * colour + 0.1 - colour) * edge
    height = rng.uniform(0.004, 0.05) if thick else rng.uniform(0.001, 0.02)
    return str(style), _Canvas(coverage, colour, np.ones(cshape, np.float32), (1, 1, 1), height)


def _paper_ball(rng: Rng, light: _Light) -> _Canvas:
    size = _px(rng.uniform(0.06, 0.15))
    ax, ay = size / 2, size / 2 * rng.uniform(0.6, 1.0)
    shape = (int(2 * ay * 1.35) + 16, int(2 * ax * 1.35) + 16)
    n = int(rng.integers(9, 18))
    t = np.sort(rng.uniform(0, 2 * np.pi, n))
    r = rng.uniform(0.78, 1.15, n)
    points = np.stack([ax * r * np.cos(t) + shape[1] / 2, ay * r * np.sin(t) + shape[0] / 2], 1)
    coverage = _polygon(shape, points)
    kind = rng.random()
    if kind < 0.5:
        albedo = _fill(shape, _neutral(rng, 0.74, 0.95))
    elif kind < 0.65:
        albedo = _fill(shape, _hsv(rng.uniform(0.07, 0.1), rng.uniform(0.25, 0.5), 0.68))
    else:
        art = _news_art(rng, shape) if kind < 0.88 else _artwork(rng, shape)
        x, y = _grid(shape)
        amp = np.float32(10)
        mx = x + shape[1] / 2 + amp * value_noise(rng, shape, 14)
        my = y + shape[0] / 2 + amp * value_noise(rng, shape, 14)
        albedo = cv2.remap(
            art,
            mx.astype(np.float32),
            my.astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT,
        )
    x, y = _grid(shape)
    dome = np.sqrt(np.clip(1.15 - (x / ax) ** 2 - (y / ay) ** 2, 0, 2)) * np.float32(size * 0.22)
    facets = _creases(rng, shape, rng.uniform(16, 30), 5, rng.uniform(2, 6))
    fine = _creases(rng, shape, rng.uniform(7, 12), 5, rng.uniform(1, 3))
    height = dome * 0.8 + facets * np.float32(rng.uniform(0.5, 0.9)) + fine * 0.5
    if rng.random() < 0.4:
        _stain(rng, albedo, 0.3)
    colour = _glossy(albedo, height, light, 0.0)
    return _Canvas(
        coverage, colour, np.ones(shape, np.float32), (1, 1, 1), float(size * SPRITE_RESOLUTION / 3)
    )


# --- bottles --------------------------------------------------------------------------------------


def _add_cap(rng: Rng, colour: Array, lathe: _Lathe, start: float, light: _Light) -> Array:
    """Paint a ribbed cap on the end of the axis; returns its coverage."""
    cap = (lathe.u >= start).astype(np.float32)
    base = _vivid(rng) if rng.random() < 0.75 else _neutral(rng, 0.1, 0.95)
    ribs = 1 + 0.12 * np.sin(np.arcsin(lathe.v * 0.99) * 26)
    shade = _diffuse(_normals(lathe.height * 0.8), light) * ribs
    shade += 0.25 * _specular(_normals(lathe.height), light, 30)
    paint = shade[..., None] * np.array(base, np.float32)
    colour += (paint - colour) * cap[..., None]
    return cap


def _pet_bottle(rng: Rng, light: _Light) -> _Canvas:
    length, r = _px(rng.uniform(0.16, 0.3)), _px(rng.uniform(0.028, 0.045))
    neck = r * rng.uniform(0.3, 0.42)
    shoulder = rng.uniform(0.6, 0.76)
    capped = rng.random() < 0.75
    waist = rng.uniform(0.85, 1.0)
    profile = [
        (0.0, r * 0.82),
        (0.035, r),
        (shoulder * 0.45, r),
        (shoulder * 0.55, r * waist),
        (shoulder * 0.75, r),
        (shoulder, r),
        (0.8 + shoulder * 0.08, r * 0.62),
        (0.9, neck),
        (0.925, neck * 1.25),
        (0.94, neck * 1.02),
        (1.0, neck * 1.02),
    ]
    dent = rng.uniform(0, 0.25) if rng.random() < 0.45 else rng.uniform(0.4, 1.0)
    lathe = _lathe(rng, length, profile, dent, rng.uniform(0.6, 1.0))
    shape = lathe.coverage.shape
    ribs = np.sin(lathe.u * np.float32(length / rng.uniform(1.6, 2.6)))
    ribbed = np.float32(rng.uniform(0, 0.8)) * ((lathe.u > 0.06) & (lathe.u < shoulder))
    height = lathe.height + ribs * ribbed
    n = _normals(height)
    style = rng.random()
    if style < 0.55:
        tint = _hsv(rng.uniform(0.48, 0.62), rng.uniform(0.0, 0.16), rng.uniform(0.85, 1))
        body, opacity = 0.22, rng.uniform(0.16, 0.36)
    elif style < 0.8:
        tint = _hsv(
            rng.choice([0.36, 0.42, 0.58, 0.08]), rng.uniform(0.35, 0.8), rng.uniform(0.5, 0.9)
        )
        body, opacity = 0.3, rng.uniform(0.3, 0.55)
    else:
        tint = _vivid(rng) if rng.random() < 0.6 else _neutral(rng, 0.75, 0.95)
        body, opacity = 0.85, 1.0
    spec = 0.85 * _specular(n, light, 60) + 0.25 * _specular(n, light, 12)
    rim = np.abs(lathe.v) ** 5
    colour = _fill(shape, tint) * (body * _diffuse(n, light) + 0.18 * rim)[..., None]
    alpha = np.clip(opacity + 0.42 * rim + 0.15 * (1 - n[2]), 0, 1).astype(np.float32)
    colour = colour + 0.9 * spec[..., None]
    alpha = np.clip(alpha + 0.5 * spec, 0, 1)
    if rng.random() < 0.65:  # label
        a = rng.uniform(0.12, 0.3)
        b = a + rng.uniform(0.16, 0.32)
        art = _artwork(rng, (int(np.pi * r) + 4, int(length * (b - a)) + 4))
        band = _soft(np.minimum(lathe.u - a, b - lathe.u).astype(np.float32) * np.float32(length))
        u = lathe.u
        lathe.u = np.clip((u - a) / (b - a), 0, 1).astype(np.float32)
        wrapped = _wrap_print(rng, lathe, art)
        lathe.u = u
        printed = wrapped * _diffuse(n, light)[..., None] + 0.25 * spec[..., None]
        colour += (printed - colour) * band[..., None]
        alpha = np.maximum(alpha, band)
    ring = ((lathe.u > 0.905) & (lathe.u < 0.94)).astype(np.float32)
    alpha = np.maximum(alpha, 0.55 * ring)
    if capped:
        alpha = np.maximum(alpha, _add_cap(rng, colour, lathe, 0.945, light))
    if rng.random() < 0.4:
        _stain(rng, colour, rng.uniform(0.1, 0.4))
    return _Canvas(lathe.coverage, colour, alpha, tint, float(r * SPRITE_RESOLUTION * 1.4))


def _jug(rng: Rng, light: _Light) -> _Canvas:
    """A blow-moulded HDPE jug or tub: milky or coloured, often trodden on, with cap and label."""
    length = _px(rng.uniform(0.16, 0.32))
    aspect = rng.uniform(0.5, 0.85)
    ax, ay = length / 2, length / 2 * aspect
    shape = (int(2 * ay * 1.3) + 20, int(2 * ax * 1.3) + 20)
    x, y = _grid(shape)
    p = rng.uniform(2.4, 6)
    neck_at = rng.uniform(0.68, 0.84)
    neck_r = _px(rng.uniform(0.014, 0.022))
    s = np.clip((x / ax - neck_at * rng.uniform(0.2, 0.75)) / 0.8, 0, 1)
    taper = (1 - rng.uniform(0.3, 0.85) * s**1.5) * (1 + 0.1 * rng.normal() * (x / ax))
    lean = np.float32(rng.normal(0, 0.12) * ay) * s
    yy = y - lean
    rho = (np.abs(x / (ax * neck_at)) ** p + np.abs(yy / (ay * np.maximum(taper, 0.15))) ** p) ** (
        1 / p
    )
    crushed = rng.uniform(0.0, 0.3) if rng.random() < 0.25 else rng.uniform(0.4, 1.0)
    wob = fractal_noise(rng, shape, length / 4, 3) * np.float32(0.07 * crushed)
    poly = _creases(rng, shape, length / 3, 2, 4)
    wob = wob + (poly / max(float(poly.max()), 1e-3) - 0.5) * np.float32(0.22 * crushed)
    body_sd = (1 - rho + wob) * np.float32(ay)
    neck_sd = np.minimum(neck_r - np.abs(y - lean), np.float32(ax) - x)
    neck_sd = np.minimum(neck_sd, x - np.float32(ax * neck_at * 0.55))
    coverage = _soft(np.maximum(body_sd, neck_sd).astype(np.float32))
    inside = np.clip(1 - rho, 0, 1)
    dome = np.sqrt(np.clip(inside, 0, 1)) * np.float32(ay * rng.uniform(0.35, 0.7))
    facets = _creases(rng, shape, rng.uniform(26, 60), 4, rng.uniform(5, 14))
    height = dome * np.float32(1 - 0.5 * crushed) + facets * np.float32(0.55 * crushed)
    height = cv2.GaussianBlur(height.astype(np.float32), (0, 0), rng.uniform(0.8, 2.2))
    if rng.random() < 0.5:  # pressed-in panel or grip
        cx, cy = rng.normal(0, 0.25) * ax, rng.normal(0, 0.2) * ay
        q = ((x - cx) / (ax * rng.uniform(0.2, 0.4))) ** 2 + ((y - cy) / (ay * 0.4)) ** 2
        height -= np.float32(ay * 0.14) * _soft((1 - q).astype(np.float32) * 6)
        height = cv2.GaussianBlur(height, (0, 0), 1.2)
    n = _normals(height)
    kind = rng.random()
    if kind < 0.7:
        albedo = _fill(shape, _neutral(rng, 0.7, 1.0, 0.05))
        opacity = rng.uniform(0.65, 1.0)
        albedo *= 1 + np.float32(0.05) * fractal_noise(rng, shape, 40, 3)[..., None]
    else:
        albedo = _fill(shape, _vivid(rng) if kind < 0.94 else _neutral(rng, 0.05, 0.3))
        opacity = 1.0
    if rng.random() < 0.55:  # label: a skewed printed patch
        lw, lh = int(length * rng.uniform(0.2, 0.45)), int(2 * ay * rng.uniform(0.3, 0.7))
        art = _artwork(rng, (lh, lw)) if rng.random() < 0.75 else _office_art(rng, (lh, lw))
        c = np.array(
            [shape[1] / 2 + rng.normal(-0.1, 0.15) * ax, shape[0] / 2 + rng.normal(0, 0.15) * ay]
        )
        ang = rng.normal(0, 0.25)
        rot = np.array([[np.cos(ang), -np.sin(ang)], [np.sin(ang), np.cos(ang)]])
        corners = np.array([[-lw, -lh], [lw, -lh], [lw, lh], [-lw, lh]]) / 2
        dst = (corners + rng.normal(0, 0.06, (4, 2)) * lw) @ rot.T + c
        src = np.array([[0, 0], [lw, 0], [lw, lh], [0, lh]], np.float32)
        m = cv2.getPerspectiveTransform(src, dst.astype(np.float32))
        label = cv2.warpPerspective(art, m, shape[::-1])
        patch = cv2.warpPerspective(np.ones((lh, lw), np.float32), m, shape[::-1])
        if rng.random() < 0.3:
            patch = patch * _soft(fractal_noise(rng, shape, 20, 3) * 4 + 3)
        albedo += (label - albedo) * patch[..., None]
    if rng.random() < 0.7:
        _stain(rng, albedo, rng.uniform(0.1, 0.5))
    shade = _diffuse(n, light)
    colour = albedo * (0.25 + 0.75 * shade)[..., None]
    colour += (rng.uniform(0.05, 0.35) * _specular(n, light, rng.uniform(15, 50)))[..., None]
    ends = (x > ax * (neck_at + 0.3 * (1 - neck_at))) & (np.abs(y - lean) < neck_r * 1.15)
    if rng.random() < 0.75:
        cap_cov = _soft(
            np.minimum(neck_r * 1.12 - np.abs(y - lean), np.float32(ax) - x).astype(np.float32)
        ) * (x > ax * (neck_at + 0.35 * (1 - neck_at)))
        coverage = np.maximum(coverage, cap_cov)
        base = np.array(_vivid(rng) if rng.random() < 0.8 else _neutral(rng, 0.1, 0.95), np.float32)
        ribs = 1 + 0.15 * np.sin((y - lean) * 1.4)
        paint = (
            base
            * (
                ribs
                * (0.75 + 0.35 * np.sqrt(np.clip(1 - ((y - lean) / (neck_r * 1.2)) ** 2, 0, 1)))
            )[..., None]
        )
        colour += (paint - colour) * (cap_cov * ends)[..., None]
    rim = cv2.GaussianBlur(coverage, (0, 0), 3.0)
    edge = np.clip((1 - rim) * 1.6, 0, 1)[..., None]
    colour *= 1 - np.float32(rng.uniform(0.05, 0.3)) * edge
    alpha = np.full(shape, opacity, np.float32)
    return _Canvas(
        coverage,
        colour.astype(np.float32),
        alpha,
        (1, 1, 0.97),
        float(_px(0.03) * SPRITE_RESOLUTION * 2),
    )


def _bottle(rng: Rng, light: _Light) -> tuple[str, _Canvas]:
    if rng.random() < 0.5:
        return "pet", _pet_bottle(rng, light)
    return "jug", _jug(rng, light)


# --- aluminium ------------------------------------------------------------------------------------


def _can(rng: Rng, light: _Light) -> _Canvas:
    tall = rng.random() < 0.7
    length = _px(rng.uniform(0.112, 0.125) if tall else rng.uniform(0.075, 0.1))
    r = _px(rng.uniform(0.026, 0.034))
    profile = [
        (0.0, r * 0.72),
        (0.05, r * 0.94),
        (0.08, r),
        (0.88, r),
        (0.94, r * 0.86),
        (0.955, r * 0.9),
        (1.0, r * 0.88),
    ]
    dent = rng.uniform(0, 0.2) if rng.random() < 0.35 else rng.uniform(0.4, 1.2)
    lathe = _lathe(rng, length, profile, dent, rng.uniform(0.75, 1.0))
    n = _normals(lathe.height)
    metal = _metal(rng, n, light, rng.uniform(0.7, 1.2))
    silver = metal[..., None] * np.array((0.93, 0.95, 0.98), np.float32)
    art = _artwork(rng, (int(np.pi * r) + 4, int(length)))
    wrapped = _wrap_print(rng, lathe, art)
    # Inks on cans are translucent: the metal's bands show through the print.
    printed = (
        wrapped * (0.4 + 0.75 * metal)[..., None] * (0.6 + 0.4 * _diffuse(n, light))[..., None]
    )
    printed += (0.55 * _specular(n, light, 50))[..., None]
    bare = ((lathe.u < 0.07) | (lathe.u > 0.9)).astype(np.float32)
    if rng.random() < 0.12:
        bare[:] = 1  # the print worn or never there
    colour = printed + (silver - printed) * bare[..., None]
    rings = (np.abs(lathe.u - 0.955) < 0.012) | (np.abs(lathe.u - 0.07) < 0.01)
    colour *= np.where(rings, np.float32(0.7), np.float32(1))[..., None]
    if rng.random() < 0.3:
        _stain(rng, colour, 0.3)
    ones = np.ones(lathe.coverage.shape, np.float32)
    return _Canvas(lathe.coverage, colour, ones, (1, 1, 1), float(r * SPRITE_RESOLUTION * 1.6))


def _can_end(rng: Rng, light: _Light) -> _Canvas:
    """A can that stands, or was pressed flat along its axis: lid with rim, tab and opening."""
    r = _px(rng.uniform(0.029, 0.036))
    size = int(2 * r * 1.5) + 16
    shape = (size, size)
    x, y = _grid(shape)
    rho = np.sqrt(x * x + y * y)
    ring = np.exp(-(((rho - r * 0.84) / (0.05 * r)) ** 2)) - 0.7 * np.exp(
        -(((rho - r * 0.72) / (0.05 * r)) ** 2)
    )
    height = (ring * np.float32(2.2)).astype(np.float32)
    squash = rng.uniform(0, 1)
    wall = r
    if squash > 0.4:  # the crumpled skirt of a flattened can looks out below the lid
        wall = r * rng.uniform(1.08, 1.35)
        skirt = _creases(rng, shape, 12, 4, 4)
        height = height + skirt * (rho > r * 0.92) * np.float32(1.2)
        coverage = _polar_blob(rng, shape, wall, wall * rng.uniform(0.8, 1), 0.05)
    else:
        coverage = _soft((r - rho).astype(np.float32))
    height += np.float32(0.25) * value_noise(rng, shape, 14)
    n = _normals(cv2.GaussianBlur(height, (0, 0), 0.7))
    brushed = 1 + 0.04 * value_noise(rng, shape, 1.5)
    grey = _metal(rng, n, light, 0.6) * brushed
    colour = grey[..., None] * np.array((0.93, 0.95, 0.98), np.float32)
    if squash > 0.4:
        skirt_mask = (rho > r * 0.92).astype(np.float32)[..., None]
        paint = np.array(_vivid(rng), np.float32) * (0.4 + 0.7 * grey)[..., None]
        colour += (paint - colour) * skirt_mask
    a = rng.uniform(0, 2 * np.pi)
    c = np.array([np.cos(a), np.sin(a)])
    mid = np.array([size / 2, size / 2])
    opening, tab = mid + c * r * 0.38, mid - c * r * 0.12
    deg = float(np.degrees(a))

    def ellipse(
        at: Array, half: tuple[float, float], ink: tuple[float, ...], line: int = -1
    ) -> None:
        axes = (int(r * half[0]), int(r * half[1]))
        cv2.ellipse(colour, at.astype(int).tolist(), axes, deg, 0, 360, ink, line, cv2.LINE_AA)

    if rng.random() < 0.75:
        ellipse(opening, (0.26, 0.34), (0.06, 0.06, 0.07))
    ellipse(tab, (0.4, 0.2), (0.82, 0.83, 0.85))
    ellipse(tab, (0.4, 0.2), (0.35, 0.35, 0.37), 1)
    ellipse(tab - c * r * 0.16, (0.13, 0.1), (0.3, 0.3, 0.32))
    ones = np.ones(shape, np.float32)
    return _Canvas(coverage, colour, ones, (1, 1, 1), rng.uniform(0.015, 0.1))


def _foil(rng: Rng, light: _Light) -> _Canvas:
    size = _px(rng.uniform(0.06, 0.2))
    ax, ay = size / 2, size / 2 * rng.uniform(0.5, 1)
    shape = (int(2 * ay * 1.5) + 16, int(2 * ax * 1.5) + 16)
    n_pts = int(rng.integers(8, 20))
    t = np.sort(rng.uniform(0, 2 * np.pi, n_pts))
    r = rng.uniform(0.65, 1.2, n_pts)
    points = np.stack([ax * r * np.cos(t) + shape[1] / 2, ay * r * np.sin(t) + shape[0] / 2], 1)
    coverage = _polygon(shape, points)
    fine = _creases(rng, shape, rng.uniform(6, 14), 6, rng.uniform(2, 5))
    coarse = _creases(rng, shape, rng.uniform(20, 40), 4, 6)
    height = (fine * 0.6 + coarse * 0.5) * np.float32(rng.uniform(0.8, 1.4))
    n = _normals(height)
    metal = _metal(rng, n, light, 1.3)
    colour = metal[..., None] * np.array((0.92, 0.94, 0.97), np.float32)
    if rng.random() < 0.3:  # printed wrapper
        x, y = _grid(shape)
        art = _artwork(rng, shape)
        mx = (x + shape[1] / 2 + 6 * value_noise(rng, shape, 18)).astype(np.float32)
        my = (y + shape[0] / 2 + 6 * value_noise(rng, shape, 18)).astype(np.float32)
        art = cv2.remap(art, mx, my, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        show = _soft(fractal_noise(rng, shape, 40, 2) * 5 + rng.uniform(-2, 4))[..., None]
        colour += (art * (0.35 + 0.8 * metal)[..., None] - colour) * show
    ones = np.ones(shape, np.float32)
    return _Canvas(
        coverage, colour, ones, (1, 1, 1), float(size * SPRITE_RESOLUTION * rng.uniform(0.05, 0.3))
    )


def _tray(rng: Rng, light: _Light) -> _Canvas:
    w, h = _px(rng.uniform(0.12, 0.2)), _px(rng.uniform(0.09, 0.14))
    shape = (int(h) + 24, int(w) + 24)
    x, y = _grid(shape)
    corner = np.float32(min(w, h) * 0.18)
    qx, qy = np.abs(x) - (w / 2 - corner), np.abs(y) - (h / 2 - corner)
    sd = -(
        np.hypot(np.clip(qx, 0, None), np.clip(qy, 0, None))
        + np.minimum(np.maximum(qx, qy), 0)
        - corner
    )
    dent = rng.uniform(0, 1)
    sd = sd + np.float32(3.5 * dent) * value_noise(rng, shape, 24)
    coverage = _soft(sd.astype(np.float32))
    rim, wall = 5.0, rng.uniform(10, 20)
    depth = np.clip((sd - rim) / wall, 0, 1)
    height = -depth * np.float32(wall * 0.9)
    height += np.float32(0.5) * np.sin((x + y) * 0.9) * ((sd > rim) & (depth < 1))
    height += _creases(rng, shape, 26, 4, 6) * np.float32(0.1 + 0.5 * dent)
    n = _normals(cv2.GaussianBlur(height.astype(np.float32), (0, 0), 0.8))
    colour = _metal(rng, n, light, 0.9)[..., None] * np.array((0.93, 0.94, 0.96), np.float32)
    if rng.random() < 0.5:
        _stain(rng, colour, 0.6)
    ones = np.ones(shape, np.float32)
    return _Canvas(coverage, colour.astype(np.float32), ones, (1, 1, 1), rng.uniform(0.01, 0.04))


def _aluminum(rng: Rng, light: _Light) -> tuple[str, _Canvas]:
    style = rng.choice(["can", "can_end", "foil", "tray"], p=[0.5, 0.14, 0.24, 0.12])
    painter = {"can": _can, "can_end": _can_end, "foil": _foil, "tray": _tray}[style]
    return str(style), painter(rng, light)


# --- nylon and other film -------------------------------------------------------------------------


def _film(rng: Rng, light: _Light) -> tuple[str, _Canvas]:
    bag = rng.random() < 0.3
    size = _px(rng.uniform(0.12, 0.3))
    ax, ay = size / 2, size / 2 * rng.uniform(0.5, 0.95)
    shape = (int(2 * ay * 1.4) + 16, int(2 * ax * 1.4) + 16)
    x, y = _grid(shape)
    if bag:  # carrier bag: body with two handle loops at one end
        body = np.minimum(ay * 0.9 - np.abs(y), ax * 0.55 - np.abs(x + ax * 0.3))
        arms = np.minimum(
            ay * 0.22 - np.abs(np.abs(y) - ay * 0.6), np.minimum(x + ax * 0.2, ax * 0.95 - x)
        )
        sd = np.maximum(body, arms) + 5 * fractal_noise(rng, shape, 36, 3)
        coverage = _soft(sd.astype(np.float32))
    else:
        outline = _polar_blob(rng, shape, ax, ay, rng.uniform(0.05, 0.14), 4)
        rag = fractal_noise(rng, shape, size * 0.3, 4) * np.float32(size * 0.05)
        folds = _creases(rng, shape, size * 0.5, 2, 3)
        rag += (folds - folds.mean()) * np.float32(0.35)
        near = cv2.distanceTransform((outline > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
        coverage = _soft(near - np.float32(size * 0.05) + rag) * (outline > 0)
    # Wrinkles of film are long, thin and bright: ridges of warped, stretched noise.
    a = rng.uniform(0, np.pi)
    wrinkle = np.zeros(shape, np.float32)
    for _ in range(5):
        b = a + rng.normal(0, 0.7)
        along = x * np.float32(np.cos(b)) + y * np.float32(np.sin(b))
        across = -x * np.float32(np.sin(b)) + y * np.float32(np.cos(b))
        period = np.float32(rng.uniform(14, 48))
        bend = 11 * value_noise(rng, shape, 44) + 3 * value_noise(rng, shape, 16)
        phase = (across + bend + along * np.float32(rng.normal(0, 0.15))) / period
        ridge = 1 - np.abs(2 * (phase - np.floor(phase)) - 1)
        fade = np.clip(0.5 + value_noise(rng, shape, 30), 0, 1.3)
        wrinkle += (ridge**3 * fade * period * np.float32(0.2)).astype(np.float32)
    n = _normals(wrinkle * np.float32(rng.uniform(0.35, 0.9)))
    style = rng.random()
    if style < 0.55:
        tint, opacity = _neutral(rng, 0.85, 1.0, 0.03), rng.uniform(0.1, 0.32)
    elif style < 0.8:
        tint, opacity = (
            _hsv(rng.uniform(0, 1), rng.uniform(0.25, 0.8), rng.uniform(0.6, 1)),
            rng.uniform(0.25, 0.6),
        )
    elif style < 0.95:
        tint, opacity = _neutral(rng, 0.8, 0.97, 0.03), rng.uniform(0.4, 0.75)
    else:
        tint, opacity = _neutral(rng, 0.03, 0.12), rng.uniform(0.75, 0.95)
    layers = np.clip(fractal_noise(rng, shape, 40, 2), -0.5, 1.5)  # two or three lie here
    alpha = opacity * (1 + 0.55 * layers) + 0.35 * (1 - n[2])
    rim = 1 - cv2.GaussianBlur(coverage, (0, 0), 2.0)
    alpha = np.clip(alpha + 0.5 * rim, 0.05, 1).astype(np.float32)
    spec = 0.9 * _specular(n, light, 90) + 0.18 * _specular(n, light, 16)
    colour = _fill(shape, tint) * (0.45 + 0.45 * _diffuse(n, light))[..., None]
    colour += 0.3 * (1 - n[2])[..., None]
    if rng.random() < 0.35:  # print
        art = _artwork(rng, (int(ay * 0.8) + 4, int(ax * 0.8) + 4))
        mx = (x + art.shape[1] / 2 + 6 * value_noise(rng, shape, 30)).astype(np.float32)
        my = (y + art.shape[0] / 2 + 6 * value_noise(rng, shape, 30)).astype(np.float32)
        ink = cv2.remap(art, mx, my, cv2.INTER_LINEAR, borderValue=(-1, -1, -1))
        there = (ink[..., 0] >= 0).astype(np.float32) * np.float32(rng.uniform(0.4, 0.85))
        colour += (ink * (0.35 + 0.6 * _diffuse(n, light))[..., None] - colour) * there[..., None]
        alpha = np.clip(alpha + 0.4 * there, 0, 1)
    weak = np.float32(rng.uniform(0.55, 1.1))
    colour += weak * spec[..., None]
    alpha = np.clip(alpha + 0.8 * spec, 0, 1)
    height = rng.uniform(0.002, 0.04)
    return ("bag" if bag else "film"), _Canvas(coverage, colour, alpha, tint, height)


_PAINTERS: dict[str, Callable[[Rng, _Light], tuple[str, _Canvas]]] = {
    "paper": _paper,
    "bottle": _bottle,
    "aluminum": _aluminum,
    "nylon": _film,
}


def sprite_classes() -> tuple[str, ...]:
    """Names of the classes that can be rendered."""
    return tuple(_PAINTERS)


def render_sprite(class_name: str, rng: Rng, light_angle: float | None = None) -> Sprite:
    """Render one item.

    Args:
        class_name: one of `sprite_classes()`.
        rng: all randomness comes from here, so equal generators give equal sprites.
        light_angle: direction towards the light [rad] in image axes; random if None.

    Raises:
        KeyError: the class is not one that can be rendered; names those that can.
    """
    if class_name not in _PAINTERS:
        known = ", ".join(_PAINTERS)
        raise KeyError(f"the synthetic line cannot render class {class_name!r}; it knows: {known}")
    angle = float(rng.uniform(0, 2 * np.pi)) if light_angle is None else light_angle
    light = _Light(angle, float(rng.uniform(0.45, 1.25)), float(rng.uniform(0.25, 0.65)))
    style, canvas = _PAINTERS[class_name](rng, light)
    coverage: Array = canvas.coverage * (canvas.coverage > 0.02)
    keep = (coverage > 0.5).astype(np.uint8)
    count, pieces, stats, _ = cv2.connectedComponentsWithStats(keep, connectivity=4)
    if count > 2:  # one item is one piece: crumbs torn off are dropped
        main = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
        near = cv2.dilate((pieces == main).astype(np.uint8), np.ones((3, 3), np.uint8))
        coverage = coverage * near
    ys, xs = np.nonzero(coverage.max(1))[0], np.nonzero(coverage.max(0))[0]
    pad = 6  # room for the shadow's blur
    box = (
        slice(max(0, int(ys[0]) - pad), int(ys[-1]) + 1 + pad),
        slice(max(0, int(xs[0]) - pad), int(xs[-1]) + 1 + pad),
    )
    coverage, opacity = coverage[box], np.clip(canvas.opacity[box], 0, 1)
    emitted = np.clip(canvas.colour[box], 0, 1)
    alpha = opacity * coverage
    reflect = np.empty((*coverage.shape, 4), np.uint8)
    reflect[..., :3] = emitted * alpha[..., None] * 255
    reflect[..., 3] = coverage * 255
    passed = (1 - opacity)[..., None] * np.array(canvas.tint, np.float32)
    through = 1 - coverage[..., None] * (1 - passed)
    transmit = np.clip(through * 255, 0, 255).astype(np.uint8)
    blocked = (coverage * (0.35 + 0.65 * opacity) * 255).astype(np.uint8)
    blur = 2.0 + canvas.height / SPRITE_RESOLUTION * 0.08
    shadow = np.asarray(cv2.GaussianBlur(blocked, (0, 0), blur), np.uint8)
    return Sprite(f"{class_name}/{style}", reflect, transmit, shadow, angle, canvas.height)
