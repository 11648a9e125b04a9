"""Data by a line of text, for training, evaluation and all else.

    synthetic:SEED                        the synthetic line, without end
    synthetic:SEED:COUNT[:WIDTHxHEIGHT]   its first scenes
    coco:ANNOTATIONS.json:IMAGES[:NAMES[:KEY]]      COCO's instance format; NAMES chooses images
    coco-upright:...                      likewise, annotated on pictures turned by their EXIF data
    folder:DIR                            DIR/images and DIR/masks
    cityscapes:ROOT:SPLIT                 the layout of Cityscapes
    store:DIR                             samples labelled on the line, see `fewshot.store`

``@WEIGHT`` at the end of one says how often it is drawn from among several: ``synthetic:1@3``
with ``folder:mine`` gives three scenes for every photograph. Without it the weight is 1.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from waste_seg_ros.data.sample import CLASSES, DataError, Sample, rename_labels
from waste_seg_ros.data.synthetic import synthetic_sample

SPECS = (
    "synthetic:SEED[:COUNT[:WIDTHxHEIGHT]], coco:ANNOTATIONS.json:IMAGES[:NAMES[:KEY]] "
    "(or coco-upright:...), folder:DIR, cityscapes:ROOT:SPLIT or store:DIR"
)
"""What a specification may be, for messages."""

SYNTHETIC_SIZE = (320, 240)
"""(width, height) of synthetic scenes for which no size is given."""

_LONGEST_TURN = 10_000  # samples after which the order of the sources repeats

_log = logging.getLogger(__name__)


class Dataset(Protocol):
    """What `open_data` gives. A length of 0 means that there is no end.

    Attributes:
        classes: names of the classes; label id is index + 1.
        problems: one line for each thing that had to be passed over.
        things: label ids of the classes that have items; none of them if all classes have.
    """

    classes: tuple[str, ...]
    problems: list[str]
    things: frozenset[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]: ...

    def sample(self, index: int, size: tuple[int, int] | None = None) -> Sample:
        """Sample ``index``, at ``size`` (width, height) if the data have no size of their own.

        Raises DataError or OSError if it cannot be read.
        """


class SyntheticData:
    """Scenes of the synthetic line's seed; see `Dataset`."""

    things: frozenset[int] = frozenset()

    def __init__(
        self,
        seed: int,
        count: int = 0,
        size: tuple[int, int] | None = None,
        classes: Sequence[str] = CLASSES,
        default_size: tuple[int, int] = SYNTHETIC_SIZE,
    ) -> None:
        """Take the settings.

        Args:
            seed: the set.
            count: how many scenes; 0 for no end.
            size: (width, height) of all scenes, whatever is asked for.
            classes: names of the classes; what of the line is none of them becomes 254.
            default_size: of scenes for which no size is asked.
        """
        self.seed, self.count, self.size = seed, count, size
        self.classes = tuple(classes)
        self.problems: list[str] = []
        self._default = size or default_size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.sample, range(self.count) if self.count else itertools.count())

    def sample(self, index: int, size: tuple[int, int] | None = None) -> Sample:
        """Scene ``index``, at ``size`` unless the set has its own."""
        if self.count and not 0 <= index < self.count:
            raise IndexError(index)
        scene = synthetic_sample(self.seed, index, self.size or size or self._default)
        return replace(scene, labels=rename_labels(scene.labels, CLASSES, self.classes))


class Samples(list[Sample]):
    """Samples at hand, and which classes have items in the data that they are of."""

    def __init__(
        self, samples: Iterable[Sample] = (), things: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(samples)
        self.things = things


def open_data(
    spec: str,
    classes: Sequence[str] = CLASSES,
    *,
    categories: Mapping[str, str] | Path | str | None = None,
    only: Collection[str] | None = None,
    strict: bool = False,
    size: tuple[int, int] | None = None,
    finite: bool = False,
) -> Dataset:
    """Open the data that a specification names; see the head of this module.

    Args:
        spec: the specification; a weight at its end is of no account here.
        classes: names of the classes; labels follow their order, and what of the data is none
            of them is of unknown kind (254).
        categories: class of each COCO category by name, beyond those known, or a file of them
            (see `read_categories`).
        only: file names of the images to take (COCO), instead of those the specification chooses.
        strict: raise at the first thing that is broken instead of passing it over.
        size: (width, height) of synthetic scenes that are given none.
        finite: refuse data without end.

    Raises:
        DataError: if the specification is not understood or the data cannot be used.
    """
    spec, _ = split_weight(spec)
    try:
        return _open(spec, classes, categories, only, strict, size, finite)
    except OSError as error:
        raise DataError(f"data {spec!r}: {error.filename}: {error.strerror}") from error


def _open(
    spec: str,
    classes: Sequence[str],
    categories: Mapping[str, str] | Path | str | None,
    only: Collection[str] | None,
    strict: bool,
    size: tuple[int, int] | None,
    finite: bool,
) -> Dataset:
    kind, _, rest = spec.partition(":")
    parts = rest.split(":")
    if kind == "synthetic" and len(parts) <= 3 and all(p.isdecimal() for p in parts[:2]):
        own = re.fullmatch(r"(\d+)x(\d+)", parts[2]) if len(parts) == 3 else None
        count = int(parts[1]) if len(parts) > 1 else 0
        if len(parts) < 3 or own:
            wide = (int(own[1]), int(own[2])) if own else None
            if wide and not 32 <= min(wide) <= max(wide) <= 4096:
                raise DataError(f"data {spec!r}: each side must be 32 to 4096 px")
            if finite and not count:
                raise DataError(f"data {spec!r} has no end; say how many: {kind}:{parts[0]}:100")
            return SyntheticData(int(parts[0]), count, wide, classes, size or SYNTHETIC_SIZE)
    if kind in ("coco", "coco-upright") and 2 <= len(parts) <= 4 and all(parts):
        from waste_seg_ros.data.coco import CocoDataset

        if only is None and len(parts) > 2:
            only = read_names(":".join(parts[2:]))
        if isinstance(categories, str | Path):
            categories = read_categories(categories)
        return CocoDataset(
            Path(parts[0]),
            Path(parts[1]),
            categories,
            classes,
            only=only,
            strict=strict,
            upright=kind == "coco-upright",
        )
    if kind == "folder" and rest:
        from waste_seg_ros.data.folder import FolderDataset

        return FolderDataset(Path(rest), classes, strict=strict)
    if kind == "cityscapes" and len(parts) == 2 and all(parts):
        from waste_seg_ros.data.cityscapes import CityscapesDataset

        return CityscapesDataset(Path(parts[0]), parts[1], classes, strict=strict)
    if kind == "store" and rest:
        from waste_seg_ros.fewshot.store import StoreDataset

        return StoreDataset(Path(rest), classes, strict=strict)
    raise DataError(f"data {spec!r} is not understood; it must be {SPECS}")


def split_weight(spec: str) -> tuple[str, Fraction]:
    """A specification and its weight: ``("folder:a", 2)`` of ``folder:a@2``. Raises DataError."""
    found = re.fullmatch(r"(.*)@(\d+(?:\.\d+)?)", spec)
    if found is None:
        return spec, Fraction(1)
    weight = Fraction(found[2])
    if not weight:
        raise DataError(f"data {spec!r}: a weight must be above 0")
    return found[1], weight


class Mixture:
    """Several data sets as one endless stream; which sample comes when follows from the seed alone.

    The sources take turns in a fixed order, each as often as its weight says: 3 and 1 give 0 0 1 0
    over and over. A source with an end is gone through in a new order every time, and wholly.

    Attributes:
        sources: the data sets.
        problems: what was passed over in any of them.
    """

    def __init__(
        self,
        sources: Sequence[Dataset],
        weights: Sequence[Fraction | float] = (),
        seed: int = 0,
        strict: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        """Take the sources.

        Args:
            sources: at least one.
            weights: of the sources, above 0; all alike if none are given.
            seed: of the order within a source.
            strict: raise where an image cannot be read, instead of taking the next.
            names: of the sources, for messages.

        Raises:
            DataError: if the weights need more than 10000 samples to come out even.
        """
        self.sources = tuple(sources)
        self._seed, self._strict = seed, strict
        self._names = tuple(names) or tuple(f"source {n}" for n in range(1, len(sources) + 1))
        self._turn = _turn(weights or [1] * len(sources))
        # For each place of the turn how often its source came before in it.
        self._rank: list[int] = []
        self._share = [0] * len(self.sources)
        for source in self._turn:
            self._rank.append(self._share[source])
            self._share[source] += 1
        self._told: set[str] = set()

    @classmethod
    def open(
        cls,
        specs: Sequence[str],
        classes: Sequence[str] = CLASSES,
        *,
        seed: int = 0,
        categories: Mapping[str, str] | Path | str | None = None,
        strict: bool = False,
    ) -> Mixture:
        """Open specifications with their weights, as `open_data` does. Raises likewise."""
        weights = [split_weight(spec)[1] for spec in specs]
        sources = [open_data(s, classes, categories=categories, strict=strict) for s in specs]
        return cls(sources, weights, seed, strict, specs)

    @property
    def problems(self) -> list[str]:
        """What was passed over in any of the sources."""
        return [problem for source in self.sources for problem in source.problems]

    def locate(self, number: int) -> tuple[int, int]:
        """Source of sample ``number`` of the stream, and how often that source came before."""
        turns, place = divmod(number, len(self._turn))
        source = self._turn[place]
        return source, turns * self._share[source] + self._rank[place]

    def sample(self, number: int, size: tuple[int, int] | None = None) -> Sample:
        """Sample ``number`` of the stream; equal numbers give equal samples.

        An image that cannot be read is named in the log once, and the next of its source is
        taken, so that a broken file does not end a run.

        Raises:
            DataError: if an image cannot be read and the mixture is strict, or none of a source.
        """
        source, place = self.locate(number)
        data = self.sources[source]
        count = len(data)
        if not count:
            return data.sample(place, size)
        turn, first = divmod(place, count)
        order = _order(self._seed, turn, count)
        for step in range(count):
            try:
                return data.sample(int(order[(first + step) % count]), size)
            except (DataError, OSError) as error:
                if self._strict:
                    raise
                if str(error) not in self._told:
                    self._told.add(str(error))
                    _log.warning("%s (passed over)", error)
        raise DataError(f"data {self._names[source]!r}: none of its {count} images can be read")


@lru_cache(maxsize=64)
def _order(seed: int, turn: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, turn]).permutation(count)


def _turn(weights: Sequence[Fraction | float]) -> list[int]:
    """Numbers of the sources in the order in which they take turns."""
    shares = [Fraction(str(weight)) for weight in weights]
    whole = math.lcm(*(share.denominator for share in shares))
    counts = [int(share * whole) for share in shares]
    common = math.gcd(*counts)
    counts = [count // common for count in counts]
    if sum(counts) > _LONGEST_TURN:
        raise DataError(
            f"the weights {', '.join(str(float(w)) for w in weights)} come out even only after "
            f"{sum(counts)} samples; take rounder ones, such as 3 and 1"
        )
    places = [
        (Fraction(2 * k + 1, 2 * count), source)
        for source, count in enumerate(counts)
        for k in range(count)
    ]
    return [source for _, source in sorted(places)]


def read_names(choice: str) -> frozenset[str]:
    """File names from ``FILE.json:KEY`` (a list in a JSON object) or from lines of a text file.

    Raises:
        DataError: if there is no such list.
        OSError: if the file cannot be read.
    """
    path, _, key = choice.partition(":")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not a text file: {error}") from error
    if not key:
        return frozenset(line.strip() for line in text.splitlines() if line.strip())
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    names = content.get(key) if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        known = ", ".join(content) if isinstance(content, dict) else "none"
        raise DataError(f"{path}: has no list of names {key!r}; it has {known}")
    return frozenset(names)


def read_categories(path: Path | str) -> dict[str, str]:
    """Read a YAML mapping of category names to classes.

    Args:
        path: the file, or the name of one of those that come along (config/categories), such
            as ``taco``.

    Raises:
        DataError: if it is not such a mapping, or there is no such file.
    """
    file = Path(path)
    if not file.suffix and not file.exists():
        places = [place / f"{path}.yaml" for place in _category_folders()]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            known = sorted({f.stem for place in _category_folders() for f in place.glob("*.yaml")})
            raise DataError(f"categories {path}: no such file; those by name: {', '.join(known)}")
        file = found
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"categories {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(
        isinstance(value, str) for value in content.values()
    ):
        raise DataError(f"{file}: must map names of categories to names of classes")
    return {str(name): value for name, value in content.items()}


def _category_folders() -> list[Path]:
    prefixes = os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
    shared = [Path(prefix) / "share" / "waste_seg_ros" for prefix in prefixes if prefix]
    # resolve(): an installation by symbolic links leads to the checkout too.
    places = [*shared, Path(__file__).resolve().parents[2]]
    return [place / "config" / "categories" for place in places]


def tell_problems(problems: Sequence[str], shown: int = 10) -> list[str]:
    """Lines that name the first of the broken entries and count them; none if there are none."""
    if not problems:
        return []
    more = [f"  ... and {len(problems) - shown} more"] if len(problems) > shown else []
    noun = "entry was" if len(problems) == 1 else "entries were"
    return [
        f"{len(problems)} broken {noun} passed over:",
        *(f"  {line}" for line in problems[:shown]),
        *more,
    ]
