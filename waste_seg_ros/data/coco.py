"""Annotated photographs in the instance format of COCO (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from waste_seg_ros.data.photographs import Photographs, check_image, read_image
from waste_seg_ros.data.sample import CLASSES, IGNORE, OTHER, DataError, Sample

#: What a category may be mapped to, beside a class: an item of unknown kind, pixels without
#: truth, and no item at all.
SPECIAL = {"other": OTHER, "ignore": IGNORE, "background": 0}

#: Names that other data sets give to these classes, in lower case.
SYNONYMS: dict[str, str] = {
    "non-contamination": "bottle",
    "contamination": "other",
    "plastic bottle": "bottle",
    "clear plastic bottle": "bottle",
    "other plastic bottle": "bottle",
    "can": "aluminum",
    "drink can": "aluminum",
    "aluminium": "aluminum",
    "aluminium foil": "aluminum",
    "cardboard": "paper",
    "normal paper": "paper",
    "plastic film": "nylon",
    "film": "nylon",
    "plastic bag": "nylon",
}


@dataclass(frozen=True)
class _Image:
    path: Path
    name: str
    size: tuple[int, int] | None  # width, height as the annotations say
    annotations: tuple[tuple[Any, Any, int], ...]  # id, segmentation, label


class CocoDataset(Photographs):
    """Images and masks named by a COCO instance file.

    Polygons (several for one item too) and run lengths, compressed or not, are read; crowds
    become ignored pixels. Where masks overlap the smaller item is in front. Images are read as
    they are stored: an orientation in their EXIF data is not applied, as COCO's own tools do not.
    Some sets, TACO among them, were annotated on turned pictures: those need ``upright``.

    What is broken is named in ``problems`` and passed over, or, if ``strict``, raises: missing,
    huge and cut images and broken masks when the set is opened, what only decoding shows later.

    Attributes:
        classes: names of the classes; label id is index + 1.
        problems: one line for each thing that had to be passed over.
        unmapped: categories that no class was found for; their items are of unknown kind (254).
    """

    def __init__(
        self,
        annotations: Path | str,
        images: Path | str,
        categories: Mapping[str, str] | None = None,
        classes: Sequence[str] = CLASSES,
        *,
        only: Collection[str] | None = None,
        strict: bool = False,
        upright: bool = False,
    ) -> None:
        """Read the annotations; the images are read when they are asked for.

        Args:
            annotations: the JSON file.
            images: the folder that its file names start from.
            categories: class of each category by name, or "other", "ignore" or "background";
                beyond it the names of the classes themselves and ``SYNONYMS`` are known. One of
                the default classes that is not in ``classes`` counts as "other".
            classes: names of the classes.
            only: file names of the images to take; None takes all.
            strict: raise at the first thing that is broken.
            upright: turn the images as their EXIF data say.

        Raises:
            DataError: if the file is not COCO's, a category is mapped to no class, or
                (strict) anything in it is broken.
            OSError: if the file cannot be read.
        """
        super().__init__(classes, strict, where=f"{annotations}: ")
        self._upright = upright
        self.unmapped: list[str] = []
        self._path = Path(annotations)
        self._folder = Path(images)
        content = _read_json(self._path)
        labels = self._labels(content["categories"], categories or {})
        self._images = self._gather(content, labels, only)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """Read an image and draw its masks.

        Raises:
            DataError: if the image cannot be read or has another size than its annotations
                say, or (strict) a mask is broken.
        """
        entry = self._images[index]
        image = read_image(entry.path, upright=self._upright)
        height, width = image.shape[:2]
        self._check_size(entry.path, (width, height), entry.size)
        masks = []
        for identity, segmentation, label in entry.annotations:
            try:
                mask = decode_mask(segmentation, width, height)
            except ValueError as error:
                self._broken(f"annotation {identity} of {entry.name}: {error}")
                continue
            masks.append((int(np.count_nonzero(mask)), label, mask))
        labels = np.zeros((height, width), np.uint8)
        instances = np.zeros((height, width), np.uint16)
        # Pixels without truth lie behind all items; then the larger an item, the further back.
        masks.sort(key=lambda entry: (entry[1] != IGNORE, -entry[0]))
        for number, (_, label, mask) in enumerate(masks, 1):
            labels[mask] = label
            instances[mask] = 0 if label == IGNORE else number
        seen = np.unique(instances)
        table = np.zeros(len(masks) + 1, np.uint16)
        table[seen[seen > 0]] = np.arange(1, np.count_nonzero(seen) + 1)
        return Sample(image, labels, table[instances], entry.name)

    @property
    def names(self) -> tuple[str, ...]:
        """File names of the images as the annotations give them."""
        return tuple(entry.name for entry in self._images)

    def _check_size(
        self, path: Path, size: tuple[int, int], said: tuple[int, int] | None, turned: bool = False
    ) -> None:
        """``turned``: width and height may yet change places."""
        if said is None or size == said or (turned and size[::-1] == said):
            return
        hint = ""
        if size[::-1] == said and not self._upright:
            hint = (
                "; it was annotated turned as its EXIF orientation says, which is not applied: "
                "open the set as coco-upright:..., or turn the image itself"
            )
        raise DataError(
            f"{path}: is {size[0]}x{size[1]}, but {self._path.name} says {said[0]}x{said[1]}{hint}"
        )

    def _labels(self, entries: list[Any], given: Mapping[str, str]) -> dict[Any, int]:
        known = dict.fromkeys(CLASSES, OTHER) | SPECIAL
        known |= {name.lower(): index for index, name in enumerate(self.classes, 1)}
        wanted = {name.strip().lower(): target for name, target in given.items()}
        for name, target in given.items():
            if target.lower() not in known:
                raise DataError(
                    f"category {name!r} is mapped to {target!r}; it must be one of "
                    f"{', '.join([*self.classes, *SPECIAL])}"
                )
        labels = {}
        for entry in entries:
            if not isinstance(entry, dict) or "id" not in entry or "name" not in entry:
                self._broken(f"category {entry!r} has no id or no name")
                continue
            name = str(entry["name"]).strip().lower()
            target = wanted.get(name, name if name in known else SYNONYMS.get(name, "")).lower()
            lacking = target in CLASSES and known[target] == OTHER
            if target not in known or (lacking and name not in wanted):
                self.unmapped.append(str(entry["name"]))
                target = "other"
            labels[entry["id"]] = known[target]
        return labels

    def _gather(
        self, content: dict[str, Any], labels: Mapping[Any, int], only: Collection[str] | None
    ) -> list[_Image]:
        entries: dict[Any, dict[str, Any]] = {}
        masks: dict[Any, list[tuple[Any, Any, int]]] = {}
        for entry in content["images"]:
            # Some tools, ReSORT-IT's among them, write an image's id as image_id.
            key = _key(entry, "id", _key(entry, "image_id"))
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if key is None or not isinstance(name, str) or not name:
                self._broken(f"image {_shown(entry)} has no id or no file_name")
            elif key in entries:
                self._broken(f"image id {key} is given twice")
            elif only is None or name in only:
                entries[key] = entry
                masks[key] = []
            else:
                masks.setdefault(key, [])
        for number, entry in enumerate(content["annotations"]):
            if not isinstance(entry, dict):
                self._broken(f"annotation {_shown(entry)} is no object")
                continue
            identity = entry.get("id", f"at place {number}")
            image, category = _key(entry, "image_id"), _key(entry, "category_id")
            if image not in masks:
                self._broken(f"annotation {identity} is of image {image}: no such")
            elif category not in labels:
                self._broken(f"annotation {identity} is of category {category}: no such")
            elif not entry.get("segmentation"):
                self._broken(f"annotation {identity} has no segmentation")
            else:
                label = IGNORE if entry.get("iscrowd") else labels[category]
                if label:
                    masks[image].append((identity, entry["segmentation"], label))
        images = []
        for key, entry in entries.items():
            try:
                images.append(self._image(entry, masks[key]))
            except DataError as error:
                self._broken(str(error))
        if not images:
            missing = sorted(only)[:3] if only is not None else []
            hint = f" (asked for {len(only or ())}, such as {', '.join(missing)})" if only else ""
            first = f"; the first problem: {self.problems[0]}" if self.problems else ""
            raise DataError(
                f"{self._path}: none of its images can be taken from {self._folder}{hint}{first}"
            )
        return images

    def _image(self, entry: Mapping[str, Any], masks: list[tuple[Any, Any, int]]) -> _Image:
        """An image and those of its masks that are sound. Raises DataError."""
        name = str(entry["file_name"])
        path = self._folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"image {name}: not inside of {self._folder}")
        said = None
        if entry.get("width") is not None and entry.get("height") is not None:
            try:
                said = int(entry["width"]), int(entry["height"])
            except (TypeError, ValueError):
                raise DataError(f"image {name}: its width and height are no numbers") from None
        size = check_image(path)
        if size is not None:
            self._check_size(path, size, said, turned=self._upright)
        kept = []
        for identity, segmentation, label in masks:
            width, height = said or size or (0, 0)
            try:
                if width and not (said is None and self._upright):
                    decode_mask(segmentation, width, height, draw=False)
            except DataError as error:
                self._broken(f"annotation {identity} of {name}: {error}")
                continue
            kept.append((identity, segmentation, label))
        return _Image(path, name, said, tuple(kept))


def _key(entry: Any, name: str, otherwise: int | str | None = None) -> int | str | None:
    """An id, which JSON could give as anything."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) else otherwise


def _shown(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) < 100 else text[:97] + "..."


def decode_mask(segmentation: Any, width: int, height: int, draw: bool = True) -> NDArray[np.bool_]:
    """Draw a COCO segmentation: polygons, or run lengths in either form.

    Args:
        segmentation: as in the annotations.
        width: of the image [px].
        height: of the image [px].
        draw: else it is only looked at, which is much faster, and nothing is in the mask.

    Returns:
        (height, width) bool.

    Raises:
        DataError: if it is broken or belongs to an image of another size.
    """
    if isinstance(segmentation, list):
        points = _polygons(segmentation, width, height)
        if not draw:
            return np.zeros((0, 0), bool)
        merged = coco_mask.merge(coco_mask.frPyObjects(points, height, width))
        return coco_mask.decode(merged).astype(bool)
    if isinstance(segmentation, dict):
        lengths = _run_lengths(segmentation, width, height)
        if not draw:
            return np.zeros((0, 0), bool)
        values = np.arange(len(lengths)) % 2 == 1
        return np.ascontiguousarray(np.repeat(values, lengths).reshape(width, height).T)
    raise DataError(f"segmentation is a {type(segmentation).__name__}, not polygons or run lengths")


def _polygons(polygons: list[Any], width: int, height: int) -> list[list[float]]:
    if polygons and all(isinstance(value, (int, float)) for value in polygons):
        polygons = [polygons]  # a single one that is not wrapped, as some tools write
    limit = 10 * max(width, height)
    drawn = []
    for polygon in polygons:
        try:
            points = np.asarray(polygon, float)
        except (TypeError, ValueError):
            points = np.zeros(0)
        if points.ndim != 1 or len(points) < 6 or len(points) % 2:
            raise DataError("a polygon needs three or more points, given as x1, y1, x2, y2, ...")
        if not np.isfinite(points).all() or np.abs(points).max() > limit:
            raise DataError("a polygon lies far outside the image")
        drawn.append(points.tolist())
    if not drawn:
        raise DataError("there are no polygons")
    return drawn


def _run_lengths(runs: dict[str, Any], width: int, height: int) -> NDArray[np.int64]:
    # Read here and not by pycocotools, which trusts the lengths and writes out of bounds.
    size, counts = runs.get("size"), runs.get("counts")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise DataError(f"run lengths are of size {size}, the image is [{height}, {width}]")
    if isinstance(counts, (str, bytes)):
        counts = _uncompress(counts.encode() if isinstance(counts, str) else counts)
    try:
        lengths = np.asarray(counts, np.int64)
    except (TypeError, ValueError, OverflowError):
        lengths = np.full(1, -1)
    if lengths.ndim != 1 or (lengths < 0).any() or int(lengths.sum()) != width * height:
        raise DataError(f"run lengths do not add up to the {width * height} pixels of the image")
    return lengths


def _uncompress(text: bytes) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character, from 48; differences from the third on."""
    lengths: list[int] = []
    value = shift = 0
    for byte in text:
        digit = byte - 48
        if not 0 <= digit < 64 or shift > 40:
            raise DataError("run lengths hold characters that are none of COCO's")
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            if digit & 16:
                value -= 1 << shift
            if len(lengths) > 2:
                value += lengths[-2]
            lengths.append(value)
            value = shift = 0
    if shift:
        raise DataError("run lengths end in the middle of a number")
    return lengths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: is not a COCO instance file: it has no list {key!r}")
    return content
