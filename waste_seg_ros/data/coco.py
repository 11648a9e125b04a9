"""Annotated photographs in the instance format of COCO (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from waste_seg_ros.data.folder import Photographs
from waste_seg_ros.data.sample import CLASSES, IGNORE, OTHER, Sample

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

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Image:
    path: Path
    name: str
    size: tuple[int, int] | None  # width, height
    annotations: tuple[tuple[Any, Any, int], ...]  # id, segmentation, label


class CocoDataset(Photographs):
    """Images and masks named by a COCO instance file.

    Polygons (several for one item too) and run lengths, compressed or not, are read; crowds
    become ignored pixels. Where masks overlap the smaller item is in front. Images are read as
    they are stored: an orientation in their EXIF data is not applied, as COCO's tools do not.

    What is broken is named in ``problems`` and passed over, or, if ``strict``, raises.

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
    ) -> None:
        """Read the annotations; the images are read when they are asked for.

        Args:
            annotations: the JSON file.
            images: the folder that its file names start from.
            categories: class of each category by name, or "other", "ignore" or "background";
                beyond it the names of the classes themselves and ``SYNONYMS`` are known.
            classes: names of the classes.
            only: file names of the images to take; None takes all.
            strict: raise at the first thing that is broken.

        Raises:
            ValueError: if the file is not COCO's, a category is mapped to no class, or
                (strict) anything in it is broken.
            OSError: if the file cannot be read.
        """
        super().__init__(classes, strict, where=f"{annotations}: ")
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
            ValueError: if the image cannot be read or has another size than its annotations
                say, or (strict) a mask is broken.
        """
        entry = self._images[index]
        image = read_image(entry.path)
        height, width = image.shape[:2]
        if entry.size is not None and entry.size != (width, height):
            hint = (
                "; it is stored turned: turn the image itself, its EXIF orientation is not applied"
                if entry.size == (height, width)
                else ""
            )
            raise ValueError(
                f"{entry.path}: is {width}x{height}, but {self._path.name} says "
                f"{entry.size[0]}x{entry.size[1]}{hint}"
            )
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

    def _labels(self, entries: list[Any], given: Mapping[str, str]) -> dict[Any, int]:
        known = {name.lower(): index for index, name in enumerate(self.classes, 1)} | SPECIAL
        wanted = {name.strip().lower(): target for name, target in given.items()}
        for name, target in given.items():
            if target.lower() not in known:
                raise ValueError(
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
            if target not in known:
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
            if not isinstance(entry, dict) or "id" not in entry or "file_name" not in entry:
                self._broken(f"image {entry!r} has no id or no file_name")
            elif entry["id"] in entries:
                self._broken(f"image id {entry['id']} is given twice")
            elif only is None or entry["file_name"] in only:
                entries[entry["id"]] = entry
                masks[entry["id"]] = []
            else:
                masks.setdefault(entry["id"], [])
        for entry in content["annotations"]:
            if not isinstance(entry, dict):
                self._broken(f"annotation {entry!r} is no object")
                continue
            identity = entry.get("id")
            if entry.get("image_id") not in masks:
                self._broken(f"annotation {identity} is of image {entry.get('image_id')}: no such")
            elif entry.get("category_id") not in labels:
                self._broken(
                    f"annotation {identity} is of category {entry.get('category_id')}: no such"
                )
            elif not entry.get("segmentation"):
                self._broken(f"annotation {identity} has no segmentation")
            else:
                label = IGNORE if entry.get("iscrowd") else labels[entry["category_id"]]
                if label:
                    masks[entry["image_id"]].append((identity, entry["segmentation"], label))
        images = []
        for key, entry in entries.items():
            name = str(entry["file_name"])
            path = self._folder / name
            inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
            if not inside or not path.is_file():
                self._broken(
                    f"image {name}: {'no such file' if inside else 'not inside'} "
                    f"{'in' if inside else 'of'} {self._folder}"
                )
                continue
            size = None
            if "width" in entry and "height" in entry:
                size = (int(entry["width"]), int(entry["height"]))
            images.append(_Image(path, name, size, tuple(masks[key])))
        if not images:
            missing = sorted(only)[:3] if only is not None else []
            hint = f" (asked for {len(only or ())}, such as {', '.join(missing)})" if only else ""
            raise ValueError(f"{self._path}: none of its images is in {self._folder}{hint}")
        return images


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """Read a photograph as (H, W, 3) uint8 RGB, as it is stored (EXIF orientation not applied).

    Raises:
        ValueError: if it is missing or no image.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        reason = "is not an image that can be read" if Path(path).is_file() else "no such file"
        raise ValueError(f"{path}: {reason}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def read_categories(path: Path | str) -> dict[str, str]:
    """Read a YAML mapping of category names to classes.

    Raises:
        ValueError: if it is not such a mapping.
        OSError: if the file cannot be read.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not YAML: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(value, str) for value in content.values()
    ):
        raise ValueError(f"{path}: must map names of categories to names of classes")
    return {str(name): value for name, value in content.items()}


def decode_mask(segmentation: Any, width: int, height: int) -> NDArray[np.bool_]:
    """Draw a COCO segmentation: polygons, or run lengths in either form.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: if it is broken or belongs to an image of another size.
    """
    if isinstance(segmentation, list):
        return _polygons(segmentation, width, height)
    if isinstance(segmentation, dict):
        return _run_lengths(segmentation, width, height)
    raise ValueError(
        f"segmentation is a {type(segmentation).__name__}, not polygons or run lengths"
    )


def _polygons(polygons: list[Any], width: int, height: int) -> NDArray[np.bool_]:
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
            raise ValueError("a polygon needs three or more points, given as x1, y1, x2, y2, ...")
        if not np.isfinite(points).all() or np.abs(points).max() > limit:
            raise ValueError("a polygon lies far outside the image")
        drawn.append(points.tolist())
    if not drawn:
        raise ValueError("there are no polygons")
    merged = coco_mask.merge(coco_mask.frPyObjects(drawn, height, width))
    return coco_mask.decode(merged).astype(bool)


def _run_lengths(runs: dict[str, Any], width: int, height: int) -> NDArray[np.bool_]:
    # Read here and not by pycocotools, which trusts the lengths and writes out of bounds.
    size, counts = runs.get("size"), runs.get("counts")
    if list(size or ()) != [height, width]:
        raise ValueError(f"run lengths are of size {size}, the image is [{height}, {width}]")
    if isinstance(counts, (str, bytes)):
        counts = _uncompress(counts.encode() if isinstance(counts, str) else counts)
    try:
        lengths = np.asarray(counts, np.int64)
    except (TypeError, ValueError, OverflowError):
        lengths = np.full(1, -1)
    if lengths.ndim != 1 or (lengths < 0).any() or int(lengths.sum()) != width * height:
        raise ValueError(f"run lengths do not add up to the {width * height} pixels of the image")
    values = np.arange(len(lengths)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, lengths).reshape(width, height).T)


def _uncompress(text: bytes) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character, from 48; differences from the third on."""
    lengths: list[int] = []
    value = shift = 0
    for byte in text:
        digit = byte - 48
        if not 0 <= digit < 64 or shift > 40:
            raise ValueError("run lengths hold characters that are none of COCO's")
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
        raise ValueError("run lengths end in the middle of a number")
    return lengths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: is not a COCO instance file: it has no list {key!r}")
    return content
