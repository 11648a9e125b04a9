"""Annotated photographs as pairs of an image and a mask of label ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.data.photographs import SUFFIXES, Photographs, check_image, read_ids, read_image
from waste_seg_ros.data.sample import CLASSES, IGNORE, OTHER, DataError, Sample


class FolderDataset(Photographs):
    """A folder with ``images/NAME.jpg`` (or another format) and ``masks/NAME.png``.

    A mask is a single-channel image of label ids: 0 background, 1..C class, 254 item of unknown
    kind, 255 no truth. If there is ``instances/NAME.png`` (8 or 16 bits) it tells the items
    apart; otherwise each connected region of one class is an item. Images without a mask are
    not taken. Images are read as they are stored, without their EXIF orientation.

    Attributes:
        classes: names of the classes; label id is index + 1.
        problems: one line for each thing that had to be passed over.
    """

    def __init__(
        self, root: Path | str, classes: Sequence[str] = CLASSES, *, strict: bool = False
    ) -> None:
        """List the folder.

        Args:
            root: the folder.
            classes: names of the classes.
            strict: raise at the first thing that is broken.

        Raises:
            DataError: if there are no pairs, or (strict) anything is broken.
        """
        super().__init__(classes, strict)
        self._root = Path(root)
        for name in ("images", "masks"):
            if not (self._root / name).is_dir():
                raise DataError(
                    f"{self._root}: has no folder {name}; images/NAME.jpg and masks/NAME.png "
                    "are expected"
                )
        self._pairs: list[tuple[Path, Path]] = []
        for path in sorted((self._root / "images").rglob("*")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            mask = self._beside("masks", path)
            if not mask.is_file():
                self._broken(f"{path}: has no mask {mask}")
                continue
            try:
                check_image(path)
                check_image(mask)
            except DataError as error:
                self._broken(str(error))
                continue
            self._pairs.append((path, mask))
        if not self._pairs:
            first = f"; the first problem: {self.problems[0]}" if self.problems else ""
            raise DataError(f"{self._root}: no image in images has its mask in masks{first}")

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        """Read a pair.

        Raises:
            DataError: if a file cannot be read, sizes differ, or a label is not of the classes.
        """
        path, mask_path = self._pairs[index]
        image = read_image(path)
        ids = read_ids(mask_path, image.shape[:2])
        wrong = ids[(ids > len(self.classes)) & (ids != OTHER) & (ids != IGNORE)]
        if len(wrong):
            raise DataError(
                f"{mask_path}: holds the label {wrong[0]}; labels are 0..{len(self.classes)}, "
                f"{OTHER} and {IGNORE}"
            )
        labels = ids.astype(np.uint8)
        instances_path = self._beside("instances", path)
        if instances_path.is_file():
            instances = read_ids(instances_path, image.shape[:2]).astype(np.uint16)
            instances[(labels == 0) | (labels == IGNORE)] = 0
        else:
            instances = regions(labels)
        name = path.relative_to(self._root / "images").as_posix()
        return Sample(image, labels, instances, name)

    def _beside(self, folder: str, path: Path) -> Path:
        relative = path.relative_to(self._root / "images")
        return (self._root / folder / relative).with_suffix(".png")


def regions(labels: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """(H, W) ids of the connected regions of one label each; 0 and 255 are no items."""
    result = np.zeros(labels.shape, np.uint16)
    total = 0
    for label in np.unique(labels):
        if label in (0, IGNORE):
            continue
        count, parts = cv2.connectedComponents((labels == label).view(np.uint8), connectivity=8)
        result[parts > 0] = parts[parts > 0] + total
        total += count - 1
    return result
