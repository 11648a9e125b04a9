"""Looking data over before they are used: ``waste-seg data check``.

Every image is read. What the report says of each data set: classes by pixels, items and images,
image sizes, item sizes, images without items, broken entries by name and reason, categories that
no class was found for, and pictures that are in it twice. Between data sets, which count as splits
of one whole, it looks for leaks: pictures that are in both.

Two pictures are identical if their pixels are, whatever the files. They are near if at most
``NEAR`` of the 255 bits of their perceptual hashes differ: the signs, against their median, of the
lowest 16 x 16 coefficients but the first of the cosine transform of a 64 x 64 grey picture (after
Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, with more bits:
frames of one belt differ in little). Measured on photographs of a belt and of bottles outdoors, a
copy that is scaled to half or saved as a poor JPEG differs in up to 14 bits, one scaled to a
quarter in up to 36, one cut by 2 % at each side in 26 to 62; other frames of the same belt in 66
or more. An item that shows again at another place of the belt is not found so: split films by time.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from waste_seg_ros.cli import as_names
from waste_seg_ros.data.sample import CLASSES, IGNORE, OTHER, DataError, Sample
from waste_seg_ros.data.sources import SPECS, Dataset, open_data, tell_problems
from waste_seg_ros.files import write_json

NEAR = 40
"""Bits of the perceptual hash by which two pictures may differ and yet be taken for one."""

ENDLESS = 100
"""So many samples are looked at of data without end."""

_SHOWN = 10  # lines of a list in the text; the JSON file has all
_SMALL, _MEDIUM = 32**2, 96**2  # px, as in COCO's metrics
_ONES = np.array([value.bit_count() for value in range(256)])


@dataclass
class Split:
    """What was seen of one data set.

    Attributes:
        name: by which the report calls it.
        spec: its specification.
        classes: names of the classes.
        sizes: images by (width, height).
        pixels: by label, (256,).
        images: that show a label, (256,).
        items: by label, (256,).
        areas: of the items [px].
        empty: names of the images without items.
        problems: broken entries.
        unmapped: categories that no class was found for.
        names: of the images.
        digests: of the images' pixels.
        hashes: perceptual ones, (images, 32) uint8 when finished.
    """

    name: str
    spec: str
    classes: tuple[str, ...]
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    images: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    items: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    areas: list[int] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unmapped: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    hashes: list[NDArray[np.uint8]] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Count a sample in."""
        height, width = sample.labels.shape
        self.sizes[width, height] += 1
        pixels = np.bincount(sample.labels.ravel(), minlength=256)
        self.pixels += pixels
        self.images += pixels > 0
        for label, area in _items(sample):
            self.items[label] += 1
            self.areas.append(area)
        if not (pixels[1:IGNORE] > 0).any():
            self.empty.append(sample.name)
        self.names.append(sample.name)
        digest = hashlib.sha256(f"{width}x{height}".encode())
        digest.update(np.ascontiguousarray(sample.image).tobytes())
        self.digests.append(digest.hexdigest())
        self.hashes.append(perceptual_hash(sample.image))

    def labels(self) -> list[tuple[str, int]]:
        """Names of all labels that count, with the labels."""
        named = [(name, label) for label, name in enumerate(self.classes, 1)]
        return [("background", 0), *named, ("other", OTHER), ("ignore", IGNORE)]


@dataclass(frozen=True)
class Match:
    """A picture that is in two places; ``bits`` of the hashes differ, 0 and identical or not."""

    one: str
    other: str
    identical: bool
    bits: int


def _items(sample: Sample) -> list[tuple[int, int]]:
    """(label that most of its pixels have, area [px]) of each item."""
    there = sample.instances > 0
    pairs = sample.instances[there].astype(np.int64) * 256 + sample.labels[there]
    keys, counts = np.unique(pairs, return_counts=True)
    best: dict[int, tuple[int, int]] = {}
    areas: Counter[int] = Counter()
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        item, label = divmod(key, 256)
        areas[item] += count
        best[item] = max(best.get(item, (0, 0)), (count, label))
    return [(label, areas[item]) for item, (_, label) in best.items()]


def perceptual_hash(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(32,) uint8, 255 bits and one that is 0, of (H, W, 3) RGB; see the head of this module."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    waves = cv2.dct(small)[:16, :16].ravel()[1:]
    return np.packbits(waves > np.median(waves))


def matches(one: Split, other: Split) -> list[Match]:
    """Pictures of ``other`` that are in ``one``, each with the one it is closest to.

    With the same split twice: pictures that come earlier in it.
    """
    if not one.names or not other.names:
        return []
    ours = np.stack(one.hashes)
    found = []
    first: dict[str, int] = {}
    for index, digest in enumerate(one.digests):
        first.setdefault(digest, index)
    for index, (name, digest, bits) in enumerate(
        zip(other.names, other.digests, other.hashes, strict=True)
    ):
        limit = index if one is other else len(ours)
        if first.get(digest, limit) < limit:
            found.append(Match(one.names[first[digest]], name, True, 0))
        elif limit:
            distance = _ONES[ours[:limit] ^ bits].sum(1)
            nearest = int(distance.argmin())
            if distance[nearest] <= NEAR:
                found.append(Match(one.names[nearest], name, False, int(distance[nearest])))
    return found


def look_at(name: str, spec: str, data: Dataset, count: int = 0) -> Split:
    """Read a data set through, or its first ``count`` samples.

    Raises:
        DataError: if it is strict and something is broken.
    """
    split = Split(name, spec, tuple(data.classes))
    total = min(len(data) or count or ENDLESS, count or sys.maxsize)
    samples = itertools.islice(data, total)
    shown = sys.stderr.isatty()
    for sample in tqdm(samples, name, total, leave=False, disable=not shown, unit="image"):
        split.add(sample)
    split.problems = list(data.problems)
    split.unmapped = list(getattr(data, "unmapped", []))
    return split


def report(splits: Sequence[Split]) -> dict[str, Any]:
    """The findings as plain values.

    Returns:
        ``sets``: by name, ``spec``, ``images``, ``sizes`` ("WxH": images), ``classes`` (by name:
        ``pixels``, ``share`` of all pixels but ignored ones, ``items``, ``images``), ``items``
        (``count``, ``area`` as quantiles in px, ``small``/``medium``/``large`` as in COCO's
        metrics), ``empty``, ``broken``, ``unmapped`` and ``twice``; ``leaks``: pairs of sets with
        the pictures that are in both; ``near_bits``, the threshold; ``sound``: nothing is broken
        and nothing leaks.
    """
    sets = {split.name: _findings(split) for split in splits}
    leaks = [
        {"one": one.name, "other": other.name, "pictures": _plain(found)}
        for one, other in itertools.combinations(splits, 2)
        if (found := matches(one, other))
    ]
    return {
        "sets": sets,
        "leaks": leaks,
        "near_bits": NEAR,
        "sound": not leaks and not any(entry["broken"] for entry in sets.values()),
    }


def _findings(split: Split) -> dict[str, Any]:
    known = max(1, int(split.pixels.sum() - split.pixels[IGNORE]))
    areas = np.array(split.areas)
    quantiles = (0, 10, 50, 90, 100)
    return {
        "spec": split.spec,
        "images": len(split.names),
        "sizes": {f"{w}x{h}": count for (w, h), count in split.sizes.most_common()},
        "classes": {
            name: {
                "pixels": int(split.pixels[label]),
                "share": None if label == IGNORE else float(split.pixels[label] / known),
                "items": int(split.items[label]),
                "images": int(split.images[label]),
            }
            for name, label in split.labels()
        },
        "items": {
            "count": len(areas),
            "area": {f"{q}%": float(np.percentile(areas, q)) for q in quantiles}
            if len(areas)
            else {},
            "small": int((areas < _SMALL).sum()),
            "medium": int(((areas >= _SMALL) & (areas < _MEDIUM)).sum()),
            "large": int((areas >= _MEDIUM).sum()),
        },
        "empty": split.empty,
        "broken": split.problems,
        "unmapped": split.unmapped,
        "twice": _plain(matches(split, split)),
    }


def _plain(found: Sequence[Match]) -> list[dict[str, Any]]:
    return [
        {"one": m.one, "other": m.other, "identical": m.identical, "bits": m.bits} for m in found
    ]


def format_report(findings: dict[str, Any]) -> str:
    """The findings as text for a terminal."""
    lines: list[str] = []
    for name, entry in findings["sets"].items():
        lines += [f"{name}: {entry['spec']}" if name != entry["spec"] else name]
        sizes = [f"{count} of {size}" for size, count in entry["sizes"].items()]
        lines.append(f"  {entry['images']} images: {_some(sizes, ', ')}")
        width = max(10, *(len(label) for label in entry["classes"]))
        lines.append(f"  {'class':{width}}   share       pixels    items   images")
        for label, seen in entry["classes"].items():
            share = "      -" if seen["share"] is None else f"{100 * seen['share']:6.2f}%"
            lines.append(
                f"  {label:{width}} {share} {seen['pixels']:12d} {seen['items']:8d} "
                f"{seen['images']:8d}"
            )
        items = entry["items"]
        if items["count"]:
            area = ", ".join(f"{key} {value:.0f}" for key, value in items["area"].items())
            lines += [
                f"  {items['count']} items; area in px by quantile: {area}",
                f"  {items['small']} of them under 32x32 px, {items['medium']} under 96x96, "
                f"{items['large']} larger",
            ]
        if entry["empty"]:
            lines.append(f"  {len(entry['empty'])} images without items: {_some(entry['empty'])}")
        if entry["unmapped"]:
            lines.append(f"  of no class (items of unknown kind): {_some(entry['unmapped'])}")
        if entry["twice"]:
            lines.append(f"  {len(entry['twice'])} pictures are in it twice:")
            lines += _pairs(entry["twice"])
        lines += [f"  {line}" for line in tell_problems(entry["broken"], _SHOWN)]
        lines.append("")
    for leak in findings["leaks"]:
        same = sum(picture["identical"] for picture in leak["pictures"])
        lines.append(
            f"LEAK: {len(leak['pictures'])} pictures of {leak['other']} are in {leak['one']} too, "
            f"{same} of them identical, the others near (up to {findings['near_bits']} of 255 bits)"
        )
        lines += _pairs(leak["pictures"])
    if findings["sound"]:
        lines.append(
            "Nothing is broken" + (", nothing leaks." if len(findings["sets"]) > 1 else ".")
        )
    return "\n".join(lines)


def _some(entries: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return between.join(entries[:_SHOWN]) + more


def _pairs(pictures: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"    {p['other']} = {p['one']}"
        if p["identical"]
        else f"    {p['other']} ~ {p['one']} ({p['bits']} bits)"
        for p in pictures[:_SHOWN]
    ]
    more = [f"    ... and {len(pictures) - _SHOWN} more"] if len(pictures) > _SHOWN else []
    return lines + more


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``waste-seg data`` and its one action."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="look data over before they are used",
        description="Read data through and report classes, sizes, broken entries, and pictures "
        "that are in more than one of them.",
        epilog="Exit code: 0; 1 if an entry is broken, a picture is in two of the data sets, or "
        "the data cannot be opened.",
    )
    check.add_argument("data", nargs="*", metavar="SPEC", help=SPECS)
    check.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=SPEC",
        help="a data set with a name for the report, such as train=folder:mine; may be repeated",
    )
    check.add_argument("--classes", metavar="A,B,...", help="names of the classes (the data's own)")
    check.add_argument(
        "--categories",
        metavar="YAML",
        help="class of each COCO category by name: a file, or zerowaste, taco or resortit",
    )
    check.add_argument(
        "--count",
        type=int,
        default=0,
        metavar="N",
        help=f"look at the first N samples of each (default: all; {ENDLESS} of data without end)",
    )
    check.add_argument("--strict", action="store_true", help="stop at the first broken entry")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the findings here, in full")


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg data check``; 0, or 1 if something is broken, leaks or cannot be opened."""
    try:
        wanted = _named(args.data, args.split)
        splits = []
        for name, spec in wanted:
            data = open_data(
                spec, _classes(args.classes, spec), categories=args.categories, strict=args.strict
            )
            splits.append(look_at(name, spec, data, max(0, args.count)))
        findings = report(splits)
        if args.json:
            write_json(args.json, findings)
    except (ValueError, OSError) as error:
        print(f"waste-seg data check: {error}", file=sys.stderr)
        return 1
    print(format_report(findings))
    return 0 if findings["sound"] else 1


def _named(specs: Sequence[str], named: Sequence[str]) -> list[tuple[str, str]]:
    wanted = [(spec, spec) for spec in specs]
    for entry in named:
        name, _, spec = entry.partition("=")
        if not name or not spec or ":" in name:
            raise DataError(f"--split {entry!r} is not NAME=SPEC, such as train=folder:mine")
        wanted.append((name, spec))
    if not wanted:
        raise DataError(f"give data to look at: {SPECS}")
    names = [name for name, _ in wanted]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{name!r} is given twice; name each with --split NAME=SPEC")
    return wanted


def _classes(given: str | None, spec: str) -> tuple[str, ...]:
    if given:
        return as_names(given)
    if spec.startswith("cityscapes:"):
        from waste_seg_ros.data.cityscapes import CITYSCAPES

        return CITYSCAPES
    return CLASSES
