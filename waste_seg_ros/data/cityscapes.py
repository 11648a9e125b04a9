"""Street scenes in the layout of Cityscapes (Cordts et al., arXiv 1604.01685).

    ROOT/leftImg8bit/SPLIT/CITY/CITY_000000_000019_leftImg8bit.png
    ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_labelIds.png
    ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_instanceIds.png

The benchmark's 19 classes are taken, in the order of their trainIds, as labels 1..19 (trainId + 1);
all other labelIds, "void" and the rare kinds that the benchmark leaves out, have no truth (255).
There is no belt: label 0, background, never occurs. A network with these classes still has its
output for it, which the semantic loss teaches to stay low and which no mean over classes counts.
The binary head, items against the belt, says nothing here: train and measure the others.

Items are those of the eight classes that are things (person ... bicycle); a pixel of the others
belongs to no item (0), like one of a group that was outlined as a whole (a thing's labelId without
a number of its own in instanceIds), which keeps its class. Without instanceIds each connected
region of a thing's class is an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from waste_seg_ros.data.folder import regions
from waste_seg_ros.data.photographs import Photographs, check_image, read_ids, read_image
from waste_seg_ros.data.sample import IGNORE, DataError, Sample, rename_labels

#: labelId of each class, in the order of the trainIds.
LABEL_IDS: dict[str, int] = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}

CITYSCAPES: tuple[str, ...] = tuple(LABEL_IDS)
"""The 19 classes; a class's label id is its trainId + 1."""

THINGS: tuple[str, ...] = CITYSCAPES[11:]
"""The classes that have items."""

_HIGHEST = 33  # labelId; a licence plate is -1, stored as 255
_IMAGE, _LABELS, _INSTANCES = (
    "_leftImg8bit.png",
    "_gtFine_labelIds.png",
    "_gtFine_instanceIds.png",
)


class CityscapesDataset(Photographs):
    """One split (train, val, ...) of a folder in the layout of Cityscapes.

    Attributes:
        classes: names of the classes; label id is index + 1.
        problems: one line for each thing that had to be passed over.
        things: label ids of the classes that have items.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        classes: Sequence[str] = CITYSCAPES,
        *,
        strict: bool = False,
    ) -> None:
        """List the split.

        Args:
            root: the folder that holds leftImg8bit and gtFine.
            split: train, val, or the name of another folder in both.
            classes: names of the classes wanted; others of the 19 are of unknown kind (254).
            strict: raise at the first thing that is broken.

        Raises:
            DataError: if the layout is another, there are no pairs, or (strict) one is broken.
        """
        super().__init__(classes, strict)
        images, truth = (Path(root) / name / split for name in ("leftImg8bit", "gtFine"))
        for folder in (images, truth):
            if not folder.is_dir():
                have = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
                raise DataError(
                    f"{folder}: no such folder; Cityscapes' layout is leftImg8bit/SPLIT/CITY and "
                    f"gtFine/SPLIT/CITY{', splits here: ' + ', '.join(have) if have else ''}"
                )
        self.things = frozenset(
            index for index, name in enumerate(self.classes, 1) if name in THINGS
        )
        self._label = np.full(256, IGNORE, np.uint8)
        self._label[list(LABEL_IDS.values())] = np.arange(1, len(CITYSCAPES) + 1)
        self._thing = np.zeros(256, bool)
        self._thing[[LABEL_IDS[name] for name in THINGS]] = True
        self._images: list[tuple[Path, Path, Path]] = []
        for path in sorted(images.glob(f"*/*{_IMAGE}")):
            stem = truth / path.parent.name / path.name.removesuffix(_IMAGE)
            files = (path, *(stem.with_name(stem.name + end) for end in (_LABELS, _INSTANCES)))
            try:
                for file in files[:2]:
                    check_image(file)
                if files[2].exists():
                    check_image(files[2])
            except DataError as error:
                self._broken(str(error))
                continue
            self._images.append((files[0], files[1], files[2]))
        if not self._images:
            first = f"; the first problem: {self.problems[0]}" if self.problems else ""
            raise DataError(f"{images}: no CITY/*{_IMAGE} has its {_LABELS[1:]}{first}")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """Read an image and its masks.

        Raises:
            DataError: if a file cannot be read, sizes differ, or an id is none of Cityscapes'.
        """
        path, labels_path, instances_path = self._images[index]
        image = read_image(path)
        ids = read_ids(labels_path, image.shape[:2])
        wrong = ids[(ids > _HIGHEST) & (ids != 255)]
        if len(wrong):
            raise DataError(
                f"{labels_path}: holds the labelId {wrong[0]}; Cityscapes' are 0..{_HIGHEST}"
            )
        labels = self._label[ids]
        if instances_path.exists():
            items = read_ids(instances_path, image.shape[:2])
            # labelId * 1000 + number, and the labelId alone for what is not counted.
            own = (items >= 1000) & self._thing[np.clip(items // 1000, 0, 255)]
            own &= items // 1000 == ids
            _, numbers = np.unique(np.where(own, items, 0), return_inverse=True)
            instances = numbers.reshape(ids.shape).astype(np.uint16)
            if own.all():
                instances += 1  # np.unique gave no 0
        else:
            instances = regions(np.where(self._thing[ids], labels, 0).astype(np.uint8))
        name = f"{path.parent.name}/{path.name.removesuffix(_IMAGE)}"
        return Sample(image, rename_labels(labels, CITYSCAPES, self.classes), instances, name)
