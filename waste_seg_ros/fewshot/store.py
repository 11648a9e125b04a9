"""Labelled samples, kept so that nothing is lost: one folder each.

    DIR/.lock                     held while something is changed
    DIR/000007-5f3a91c2/
        image.png                 the picture
        instances.png             16 bits: 0 no item, else the item's number
        sample.json               names of the items, where it came from, SHA-256 of the pictures

A folder appears whole or not at all, and ``sample.json`` says which files count, so that a process
killed at any moment leaves every sample as it was before or as it is after. What it leaves lying
about is cleared away by the next change.

A picture may be in several samples: an operator names one item now and another later. As data
(``store:DIR``) these are one image. Where two labels overlap the one given last counts; of an item
covered by more than half the rest becomes unknown. `Store.add` and `Store.edit` say so when that
changes a class. What nobody labelled is unknown (255) too, unless a sample says that all is
labelled, which makes it background.

Which came last is counted, not read from the clock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from waste_seg_ros.data.photographs import Photographs, read_ids, read_image
from waste_seg_ros.data.sample import CLASSES, IGNORE, OTHER, DataError, Sample
from waste_seg_ros.fewshot.labels import Label, LabelError, check_class_name, check_mask
from waste_seg_ros.files import sync, write_file, write_json
from waste_seg_ros.runtime.bundle import file_digest, write_atomically

FORMAT = 1
"""Of sample.json."""

COVERED = 0.5
"""An older item of which a newer one covers more is taken for the same item."""

_TOUCH = 0.05  # share of the smaller of two labels from which an overlap is told
_JSON = "sample.json"
_IMAGE = "image.png"
_LOCK = ".lock"
_WAIT = 10.0  # s for another process to be done
_ID = re.compile(r"(\d{6,})-([0-9a-f]{8})")
_FILE = re.compile(r"(image|instances(-\d+)?)\.png")
_MAX_ITEMS = 65535
_LONGEST = 200  # characters of a text that says where an image came from


class StoreError(DataError):
    """The store cannot do what it is asked; the message says why and what would help."""


@dataclass(frozen=True)
class Source:
    """Where a picture came from, as far as it is known.

    Attributes:
        stamp_ns: of the image, nanoseconds of its own clock.
        frame: frame id of the camera.
        origin: topic, file or device.
        track: of the item, if a tracker followed it: pictures of one track show one item, so they
            are kept on one side of a split.
    """

    stamp_ns: int = 0
    frame: str = ""
    origin: str = ""
    track: str = ""


@dataclass(frozen=True)
class StoredItem:
    """An item of a sample: its number in the instance picture, its class, how it was labelled."""

    number: int
    class_name: str
    how: str
    pixels: int


@dataclass(frozen=True)
class Entry:
    """What is known of a sample without its pictures.

    Attributes:
        id: name of its folder.
        order: counts the changes of the store; the higher of two is the later.
        size: (width, height) [px].
        items: in the order in which they were given.
        complete: all that is no item is background.
        source: where the picture came from.
        added: wall clock when it was added, for people only.
        image_digest: SHA-256 of the picture's pixels.
        files: SHA-256 by file name.
    """

    id: str
    order: int
    size: tuple[int, int]
    items: tuple[StoredItem, ...]
    complete: bool
    source: Source
    added: str
    image_digest: str
    files: Mapping[str, str]

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of its items, each once."""
        return tuple(dict.fromkeys(item.class_name for item in self.items))

    @property
    def instances_file(self) -> str:
        """Name of its instance picture."""
        return next(name for name in self.files if name != _IMAGE)


@dataclass(frozen=True)
class Kept:
    """A sample as it is stored now, and what is to be told of it, a line each."""

    entry: Entry
    notes: tuple[str, ...] = ()


@dataclass
class ClassCount:
    """What a store has of a class."""

    items: int = 0
    images: set[str] = field(default_factory=set)


class Store:
    """A folder of samples; made when the first one is added.

    Attributes:
        root: the folder.
        known: names of classes that new ones are to be spelled like.
    """

    def __init__(self, root: Path | str, known: Sequence[str] = CLASSES) -> None:
        self.root = Path(root)
        self.known = tuple(known)
        self._swept = False

    # --- looking ----------------------------------------------------------------------------------

    def scan(self) -> tuple[list[Entry], list[str]]:
        """All samples, oldest first, and a line for each folder that is none or damaged.

        Pictures are not looked at: `read` does.
        """
        entries, problems = [], []
        try:
            folders = sorted(p for p in self.root.iterdir() if not p.name.startswith("."))
        except FileNotFoundError:
            return [], []
        except OSError as error:
            raise StoreError(f"store {self.root}: {error.strerror}") from error
        for folder in folders:
            try:
                entries.append(_read_entry(folder))
            except StoreError as error:
                problems.append(str(error))
        return sorted(entries, key=lambda entry: (entry.order, entry.id)), problems

    def entries(self) -> list[Entry]:
        """All sound samples, oldest first."""
        return self.scan()[0]

    def entry(self, identity: str) -> Entry:
        """A sample by its id. Raises StoreError if there is none or it is damaged."""
        if not _ID.fullmatch(identity):
            raise StoreError(f"sample {identity!r}: is no id of a sample")
        if not (self.root / identity).is_dir():
            raise StoreError(f"sample {identity}: is not in {self.root}; was it deleted?")
        return _read_entry(self.root / identity)

    def read(self, identity: str) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        """Picture (H, W, 3) uint8 RGB and item numbers (H, W) uint16 of a sample.

        Raises:
            StoreError: if there is none, or a file is not what was stored.
        """
        entry = self.entry(identity)
        return self._image(entry), self._instances(entry)

    def classes(self) -> dict[str, ClassCount]:
        """What there is of each class."""
        found: dict[str, ClassCount] = {}
        for entry in self.entries():
            for item in entry.items:
                count = found.setdefault(item.class_name, ClassCount())
                count.items += 1
                count.images.add(entry.image_digest)
        return found

    def spelled(self, name: str) -> str:
        """A class's name as this store keeps it; see `labels.check_class_name`."""
        return check_class_name(name, (*self.known, *self.classes()))

    def _image(self, entry: Entry) -> NDArray[np.uint8]:
        return read_image(self._verified(entry, _IMAGE))

    def _instances(self, entry: Entry) -> NDArray[np.uint16]:
        path = self._verified(entry, entry.instances_file)
        return read_ids(path, entry.size[::-1]).astype(np.uint16)

    def _verified(self, entry: Entry, name: str) -> Path:
        path = self.root / entry.id / name
        try:
            found = file_digest(path)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        if found != entry.files[name]:
            raise StoreError(
                f"{path}: SHA-256 is {found[:12]}..., {_JSON} says {entry.files[name][:12]}...; "
                "the file was changed or is damaged: delete the sample and label it again"
            )
        return path

    # --- changing ---------------------------------------------------------------------------------

    def add(
        self,
        image: NDArray[np.uint8],
        labels: Sequence[Label],
        source: Source | None = None,
        complete: bool = False,
    ) -> Kept:
        """Store a picture with labelled items.

        When this returns the sample is on the disk. Of labels that overlap here the last counts.
        The same picture with the same labels is not stored twice.

        Args:
            image: (H, W, 3) uint8 RGB.
            labels: the items; none only if ``complete``, which is a picture of the belt alone.
            source: where it came from.
            complete: all that is no item is background; else it is unknown.

        Raises:
            LabelError: a label cannot be used.
            StoreError: the picture cannot be used, or the disk is full or not to be written to;
                nothing is stored then.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise StoreError(
                f"image: expected (H, W, 3) uint8 RGB, not {image.shape} {image.dtype}"
            )
        size = (image.shape[1], image.shape[0])
        instances, items = self._draw(labels, size, complete)
        digest = pixel_digest(image)
        with self._changing():
            entries = self.entries()
            ours = [entry for entry in entries if entry.image_digest == digest]
            for entry in ours:
                if self._same(entry, instances, items, complete):
                    return Kept(entry, (f"it is there already, as {entry.id}",))
            order = _next(entries)
            taken = [int(p.name.partition("-")[0]) for p in self._folders()]
            identity = f"{max(taken, default=0) + 1:06d}-{secrets.token_hex(4)}"
            entry = Entry(
                identity,
                order,
                size,
                items,
                complete,
                _short(source or Source()),
                datetime.now(UTC).isoformat(timespec="seconds"),
                digest,
                {},
            )

            def write(folder: Path) -> None:
                (folder / _IMAGE).write_bytes(_png(image[..., ::-1]))
                (folder / "instances.png").write_bytes(_png(instances))
                files = {name: file_digest(folder / name) for name in (_IMAGE, "instances.png")}
                write_json(folder / _JSON, _values(replace(entry, files=files)))

            try:
                write_atomically(self.root / identity, write)
            except OSError as error:
                if (self.root / identity).exists():
                    raise _unconfirmed(identity, error) from error
                raise
            notes = self._contradictions(entry, instances, ours)
            return Kept(_read_entry(self.root / identity), notes)

    def edit(
        self,
        identity: str,
        *,
        labels: Sequence[Label] | None = None,
        classes: Mapping[int, str] | None = None,
        complete: bool | None = None,
    ) -> Kept:
        """Change a sample: other labels, other classes by item number, or whether it is complete.

        What is not given stays. The sample counts as given last from then on.

        Raises:
            LabelError: a label cannot be used.
            StoreError: there is no such sample or item, or the disk is full; it stays as it was.
        """
        with self._changing():
            old = self.entry(identity)
            entries = self.entries()
            everything = old.complete if complete is None else complete
            entry = replace(old, order=_next(entries), complete=everything)
            if labels is not None:
                instances, items = self._draw(labels, old.size, everything)
                # A name that it never had: the old file must count until the new one does.
                name = f"instances-{entry.order}.png"
                data = _png(instances)
                digest = hashlib.sha256(data).hexdigest()
                files = {_IMAGE: old.files[_IMAGE], name: digest}
                entry = replace(entry, items=items, files=files)
                write_file(self.root / identity / name, data)
            else:
                instances = self._instances(old)
                if not old.items and not everything:
                    raise StoreError(
                        f"sample {identity}: has no items, so it must be complete; delete it "
                        "instead"
                    )
            if classes:
                entry = replace(entry, items=self._renamed(entry, classes))
            write_json(self.root / identity / _JSON, _values(entry))
            _confirm(self.root / identity, identity)
            self._clear(self.root / identity, entry)
            others = [e for e in entries if e.id != identity and e.image_digest == old.image_digest]
            return Kept(entry, self._contradictions(entry, instances, others))

    def delete(self, identity: str) -> None:
        """Take a sample away; a damaged one too. Raises StoreError if there is none."""
        if not _ID.fullmatch(identity):
            raise StoreError(f"sample {identity!r}: is no id of a sample")
        with self._changing():
            folder = self.root / identity
            trash = self.root / f".deleted-{identity}-{secrets.token_hex(4)}"
            try:
                folder.rename(trash)
            except FileNotFoundError:
                raise StoreError(f"sample {identity}: is not in {self.root}") from None
            _confirm(self.root, identity)
            shutil.rmtree(trash, ignore_errors=True)

    def _renamed(self, entry: Entry, classes: Mapping[int, str]) -> tuple[StoredItem, ...]:
        missing = sorted(set(classes) - {item.number for item in entry.items})
        if missing:
            raise StoreError(f"sample {entry.id}: has no item {missing[0]}")
        return tuple(
            replace(item, class_name=self.spelled(classes[item.number]))
            if item.number in classes
            else item
            for item in entry.items
        )

    def _draw(
        self, labels: Sequence[Label], size: tuple[int, int], complete: bool
    ) -> tuple[NDArray[np.uint16], tuple[StoredItem, ...]]:
        """Labels in one picture of numbers, and what is known of them. Raises LabelError."""
        if not labels and not complete:
            raise LabelError("nothing is labelled; give a mask, an outline, a box or a click")
        if len(labels) > _MAX_ITEMS:
            raise LabelError(f"{len(labels)} items in one picture; at most {_MAX_ITEMS} are kept")
        instances = np.zeros(size[::-1], np.uint16)
        names = []
        for number, label in enumerate(labels, 1):
            names.append(self.spelled(label.class_name))
            instances[check_mask(label.mask, size)] = number
        areas = np.bincount(instances.ravel(), minlength=len(labels) + 1)
        items = []
        for number, (name, label) in enumerate(zip(names, labels, strict=True), 1):
            if not areas[number]:
                raise LabelError(f"item {number} ({name}): other items cover all of it")
            items.append(StoredItem(number, name, label.how[:_LONGEST], int(areas[number])))
        return instances, tuple(items)

    def _same(
        self,
        entry: Entry,
        instances: NDArray[np.uint16],
        items: tuple[StoredItem, ...],
        complete: bool,
    ) -> bool:
        named = [(item.number, item.class_name) for item in entry.items]
        if (named, entry.complete) != ([(i.number, i.class_name) for i in items], complete):
            return False
        try:
            return bool(np.array_equal(self._instances(entry), instances))
        except DataError:  # damaged: it is stored anew
            return False

    def _contradictions(
        self, entry: Entry, instances: NDArray[np.uint16], others: Sequence[Entry]
    ) -> tuple[str, ...]:
        """A line for each label of the same picture that is of another class where it overlaps."""
        names = {item.number: item.class_name for item in entry.items}
        notes = []
        for other in others:
            try:
                theirs = self._instances(other)
            except DataError as error:
                notes.append(str(error))
                continue
            for number, shared in _overlaps(instances, theirs).items():
                new, old = number
                before = next(item for item in other.items if item.number == old)
                smaller = min(before.pixels, int(np.count_nonzero(instances == new)))
                if names[new] != before.class_name and shared >= _TOUCH * smaller:
                    notes.append(
                        f"{names[new]!r} overlaps {before.class_name!r} of sample {other.id} in "
                        f"{shared} of its {before.pixels} pixels: where they overlap, "
                        f"{names[new]!r} counts, as it was given last"
                    )
        return tuple(notes)

    def _folders(self) -> list[Path]:
        return [p for p in self.root.iterdir() if _ID.fullmatch(p.name)]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone with the store; what goes wrong with files becomes a StoreError."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with held(self.root / _LOCK, _WAIT):
                if not self._swept:
                    self._sweep()
                    self._swept = True
                yield
        except OSError as error:
            self._swept = False  # something may lie about
            raise StoreError(f"store {self.root}: {_reason(error)}") from error

    def _sweep(self) -> None:
        """Clear away what a killed process left: nobody else writes while the lock is held."""
        for path in self.root.iterdir():
            if path.name.startswith(".") and path.name != _LOCK:
                shutil.rmtree(path, ignore_errors=True)
        for folder in self._folders():
            with contextlib.suppress(StoreError):
                self._clear(folder, _read_entry(folder))

    @staticmethod
    def _clear(folder: Path, entry: Entry) -> None:
        """Drop files that do not count."""
        for path in folder.iterdir():
            if path.name != _JSON and path.name not in entry.files:
                with contextlib.suppress(OSError):
                    path.unlink()

    # --- handing on -------------------------------------------------------------------------------

    def export_coco(self, folder: Path | str, only: Collection[str] | None = None) -> int:
        """Write pictures and ``annotations.json`` in COCO's format into a new folder.

        Masks are run lengths. What is unknown in a picture is a crowd of the category "ignore",
        so that ``coco:FOLDER/annotations.json:FOLDER`` reads what ``store:DIR`` does.

        Returns:
            how many pictures it holds.

        Raises:
            StoreError: if there are no samples, one is damaged, or the folder exists or cannot be
                written.
        """
        data = StoreDataset(self.root, tuple(self.classes()) or CLASSES, only=only, strict=True)
        names = [*data.classes, "ignore", "other"]
        content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)],
        }

        def write(target: Path) -> None:
            for number, sample in enumerate(data, 1):
                height, width = sample.labels.shape
                name = f"{number:06d}.png"
                (target / name).write_bytes(_png(sample.image[..., ::-1]))
                content["images"].append(
                    {"id": number, "file_name": name, "width": width, "height": height}
                )
                masks = [(sample.instances == k, 0) for k in np.unique(sample.instances) if k]
                unknown = sample.labels == IGNORE
                for mask, crowd in [*masks, *([(unknown, 1)] if unknown.any() else [])]:
                    label = int(sample.labels[mask][0])
                    category = names.index("ignore") + 1 if crowd else label
                    content["annotations"].append(
                        _annotation(len(content["annotations"]) + 1, number, category, mask, crowd)
                    )
            write_json(target / "annotations.json", content)

        path = Path(folder)
        try:
            write_atomically(path, write)
        except FileExistsError:
            raise StoreError(f"{path}: exists already; choose another folder") from None
        except OSError as error:
            raise StoreError(f"{path}: {_reason(error)}") from error
        return len(content["images"])


class StoreDataset(Photographs):
    """The samples of a store as data: one for each picture; see the head of this module."""

    def __init__(
        self,
        root: Path | str,
        classes: Sequence[str] = CLASSES,
        *,
        only: Collection[str] | None = None,
        strict: bool = False,
    ) -> None:
        """List the samples.

        Args:
            root: the store's folder.
            classes: names of the classes; items of others become 254.
            only: ids of the samples to take; None takes all.
            strict: raise at the first thing that is broken.

        Raises:
            DataError: if there are none, or (strict) one is damaged.
        """
        super().__init__(classes, strict, where=f"{root}: ")
        self._store = Store(root)
        if not Path(root).is_dir():
            raise StoreError(f"store {root}: no such folder")
        entries, problems = self._store.scan()
        for problem in problems:
            self._broken(problem)
        groups: dict[str, list[Entry]] = {}
        for entry in entries:
            if only is None or entry.id in only:
                groups.setdefault(entry.image_digest, []).append(entry)
        self._groups = list(groups.values())
        if not self._groups:
            first = f"; the first problem: {problems[0]}" if problems else ""
            raise StoreError(f"store {root}: has no samples{' of those' if only else ''}{first}")

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Sample:
        """Read the samples of a picture as one. Raises DataError if one is damaged."""
        group = self._groups[index]
        image = self._store._image(group[0])
        names: dict[int, str] = {}
        drawn = np.zeros(image.shape[:2], np.int32)
        unknown = np.zeros(image.shape[:2], bool)
        for entry in group:
            theirs = self._store._instances(entry)
            fresh = theirs > 0
            areas = np.bincount(drawn.ravel())
            for old, covered in enumerate(np.bincount(drawn[fresh], minlength=len(areas))):
                if old and covered > COVERED * areas[old]:
                    rest = drawn == old
                    drawn[rest], unknown[rest] = 0, True
            base = max(names, default=0)
            drawn[fresh] = theirs[fresh].astype(np.int32) + base
            unknown[fresh] = False
            names |= {item.number + base: item.class_name for item in entry.items}
        rest = IGNORE if not any(entry.complete for entry in group) else 0
        labels = np.full(drawn.shape, rest, np.uint8)
        labels[unknown] = IGNORE
        instances = np.zeros(drawn.shape, np.uint16)
        for number, key in enumerate(np.unique(drawn[drawn > 0]), 1):
            name = names[int(key)]
            known = name in self.classes
            labels[drawn == key] = self.classes.index(name) + 1 if known else OTHER
            instances[drawn == key] = number
        return Sample(image, labels, instances, "+".join(entry.id for entry in group))

    @property
    def groups(self) -> list[list[Entry]]:
        """Samples of each picture, in the order of the data."""
        return [list(group) for group in self._groups]


def split(
    entries: Sequence[Entry], share: float = 0.25
) -> tuple[list[str], list[str], tuple[str, ...]]:
    """Ids to learn from and ids to hold out, and what is to be told of it.

    Samples of one picture or one track stay together. Which side they come to follows from the
    picture alone, so it stays when others are added, but that every class with two groups or more
    has one on both sides.
    """
    groups = _grouped(entries)
    place = [int(min(e.image_digest for e in g)[:8], 16) / 2**32 for g in groups]
    held = [value < share for value in place]
    notes = []
    for name in sorted({c for entry in entries for c in entry.classes}):
        mine = [n for n, g in enumerate(groups) if any(name in e.classes for e in g)]
        if len(mine) < 2:
            notes.append(
                f"all samples of {name!r} show one picture or track, so none can be held out: "
                "label it in another picture"
            )
            held[mine[0]] = False
            continue
        mine.sort(key=lambda n: place[n])
        if not any(held[n] for n in mine):
            held[mine[0]] = True
        elif all(held[n] for n in mine):
            held[mine[-1]] = False
    learned = [e.id for g, out in zip(groups, held, strict=True) if not out for e in g]
    return learned, [e.id for g, out in zip(groups, held, strict=True) if out for e in g], (*notes,)


def _grouped(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Samples that share a picture or a track, directly or through others."""
    groups: list[tuple[set[str], list[Entry]]] = []
    for entry in entries:
        keys = {entry.image_digest} | ({f"track {entry.source.track}"} - {"track "})
        members = [entry]
        apart = []
        for other, found in groups:
            if other & keys:
                keys |= other
                members = found + members
            else:
                apart.append((other, found))
        groups = [*apart, (keys, members)]
    return [members for _, members in groups]


def pixel_digest(image: NDArray[np.uint8]) -> str:
    """SHA-256 (hex) of a picture's size and pixels, whatever file it is in."""
    digest = hashlib.sha256(f"{image.shape[1]}x{image.shape[0]}".encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def held(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file, which the system lets go of when the process ends, however it does.

    Raises:
        StoreError: if another holds it for longer than ``wait`` s; it says which process.
        OSError: if it cannot be made.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
                    raise StoreError(
                        f"{path}: another process ({owner or 'unknown'}) holds it; wait until it "
                        "is done, or end it"
                    ) from None
                time.sleep(0.02)
        with contextlib.suppress(OSError):  # who it is only helps; a full disk must not hinder
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


# --- files ----------------------------------------------------------------------------------------


def _next(entries: Sequence[Entry]) -> int:
    return max((entry.order for entry in entries), default=0) + 1


def _short(source: Source) -> Source:
    """With texts of a bounded length, and without what JSON has no place for."""
    texts = {
        key: str(value).encode("utf-8", "replace").decode()[:_LONGEST]
        for key, value in asdict(source).items()
        if key != "stamp_ns"
    }
    return Source(int(source.stamp_ns), **texts)


def _png(image: NDArray[Any]) -> bytes:
    done, data = cv2.imencode(".png", image)
    if not done:
        raise OSError(errno.EINVAL, "the picture cannot be encoded")
    return data.tobytes()


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; nothing was changed. Free some space and try again"
    return f"{error.strerror or error}; nothing was changed"


def _unconfirmed(identity: str, error: OSError) -> StoreError:
    return StoreError(
        f"sample {identity}: is changed, but the disk did not confirm it ({error.strerror}), so it "
        "may not outlive a power cut; look after the disk and try again"
    )


def _confirm(folder: Path, identity: str) -> None:
    """Have a change that is made put on the disk. Raises StoreError."""
    try:
        sync(folder)
    except OSError as error:
        raise _unconfirmed(identity, error) from error


def _annotation(
    number: int, image: int, category: int, mask: NDArray[np.bool_], crowd: int
) -> dict[str, Any]:
    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": {"size": list(runs["size"]), "counts": runs["counts"].decode()},
        "area": int(np.count_nonzero(mask)),
        "bbox": [x, y, w, h],
        "iscrowd": crowd,
    }


def _overlaps(one: NDArray[np.uint16], other: NDArray[np.uint16]) -> dict[tuple[int, int], int]:
    """Pixels that each pair of items of two pictures share."""
    both = (one > 0) & (other > 0)
    pairs, counts = np.unique(
        np.stack([one[both], other[both]], 1).reshape(-1, 2), axis=0, return_counts=True
    )
    return {(int(a), int(b)): int(n) for (a, b), n in zip(pairs, counts, strict=True)}


def _values(entry: Entry) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(entry)}


def _read_entry(folder: Path) -> Entry:
    """Read and check sample.json. Raises StoreError naming the file and the key."""
    path = folder / _JSON
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise StoreError(f"{path}: is not JSON: {error}") from error
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        raise StoreError(f"{path}: is not a sample of format {FORMAT}")
    try:
        items = tuple(
            StoredItem(int(i["number"]), str(i["class_name"]), str(i["how"]), int(i["pixels"]))
            for i in read["items"]
        )
        source = read["source"]
        entry = Entry(
            id=folder.name,
            order=int(read["order"]),
            size=(int(read["size"][0]), int(read["size"][1])),
            items=items,
            complete=bool(read["complete"]),
            source=Source(
                int(source["stamp_ns"]), *(str(source[k]) for k in ("frame", "origin", "track"))
            ),
            added=str(read["added"]),
            image_digest=str(read["image_digest"]),
            files={str(name): str(digest) for name, digest in read["files"].items()},
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise StoreError(f"{path}: is damaged: {what}") from None
    pictures = [name for name in entry.files if _FILE.fullmatch(name)]
    if len(pictures) != len(entry.files) or len(pictures) != 2 or _IMAGE not in pictures:
        raise StoreError(f"{path}: files: must be {_IMAGE} and one of instances")
    return entry
