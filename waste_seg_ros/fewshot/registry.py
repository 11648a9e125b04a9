"""Which network is the current one, where it came from, and the way back.

    DIR/bundles/NAME/        candidates and what became of them; bundles never change
    DIR/verdicts/NAME.json   what the gate said of each
    DIR/current.json         the pointer: references ("name@digest") from the first network to the
                             current one, and what happened to them

``current.json`` is replaced as a whole, so there is a current network at every moment, and one step
leads to another or back.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from waste_seg_ros.fewshot.gate import Verdict
from waste_seg_ros.fewshot.prototypes import FewShotError
from waste_seg_ros.fewshot.store import StoreError, held
from waste_seg_ros.files import sync, write_json
from waste_seg_ros.models import SegmentationModel
from waste_seg_ros.runtime.bundle import Bundle, BundleError, open_bundle, save_bundle

FORMAT = 1
"""Of current.json."""

_POINTER = "current.json"
_LOCK = ".lock"
_WAIT = 30.0  # s; a bundle is exported while the lock is held
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RegistryError(FewShotError):
    """A network cannot be saved, promoted or rolled back; the message says why."""


@dataclass(frozen=True)
class Event:
    """A change of the current network: "promoted" or "rolled back", to which, when and why."""

    event: str
    bundle: str
    when: str
    reason: str


@dataclass(frozen=True)
class Pointer:
    """What current.json says: the networks from the first to the current one, and the events."""

    stack: tuple[str, ...]
    events: tuple[Event, ...] = ()


class Registry:
    """A folder of networks, one of them current.

    Attributes:
        root: the folder; made when something is saved.
        base: bundle, by name or path, that is current as long as none was promoted.
    """

    def __init__(self, root: Path | str, base: str | Path = "enet-instance") -> None:
        self.root, self.base = Path(root), base

    @property
    def bundles(self) -> Path:
        """The folder of the candidates, for a search path."""
        return self.root / "bundles"

    # --- looking ----------------------------------------------------------------------------------

    def pointer(self) -> Pointer:
        """What is current, with its history. Raises RegistryError or BundleError."""
        path = self.root / _POINTER
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["format"] != FORMAT:
                raise RegistryError(f"{path}: is of format {read['format']!r}, not {FORMAT}")
            stack = tuple(str(reference) for reference in read["stack"])
            events = tuple(
                Event(*(str(e[key]) for key in ("event", "bundle", "when", "reason")))
                for e in read["events"]
            )
        except FileNotFoundError:
            return Pointer((self._open(self.base).reference,))
        except OSError as error:
            raise RegistryError(f"{path}: {error.strerror}") from error
        except FewShotError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(
                f"{path}: is damaged ({error}); take it away to begin with {self.base} again"
            ) from error
        if not stack:
            raise RegistryError(f"{path}: names no network")
        return Pointer(stack, events)

    def current(self) -> Bundle:
        """The current network, verified. Raises RegistryError or BundleError."""
        return self.open(self.pointer().stack[-1])

    def open(self, reference: str) -> Bundle:
        """A network by its reference "name@digest", or by its name alone.

        Raises:
            RegistryError: if what is there by this name is another.
            BundleError: if there is none, or it is damaged.
        """
        name, _, digest = reference.partition("@")
        if name in self.candidates():
            bundle = open_bundle(self.bundles / name)
        else:
            bundle = self._open(self.base)
            if bundle.manifest.name != name:
                bundle = self._open(name)
        if digest and bundle.digest != digest:
            raise RegistryError(
                f"{bundle.path}: is another network than {name}@{digest[:12]}...; restore that one"
            )
        return bundle

    def candidates(self) -> list[str]:
        """Names of the networks that were saved here, oldest first."""
        if not self.bundles.is_dir():
            return []
        return sorted(p.name for p in self.bundles.iterdir() if not p.name.startswith("."))

    def verdict(self, name: str) -> dict[str, Any] | None:
        """What the gate said of a candidate, as of `gate.Verdict.values`; None if nothing."""
        if not _NAME.fullmatch(name):
            raise RegistryError(f"candidate {name!r}: is no name of a bundle")
        path = self.root / "verdicts" / f"{name}.json"
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RegistryError(f"{path}: cannot be read: {error}") from error
        if not isinstance(read, dict):
            raise RegistryError(f"{path}: is no verdict")
        return read

    def lineage(self, reference: str = "") -> list[str]:
        """References from a network (the current one) back to the first that is known of."""
        at = reference or self.pointer().stack[-1]
        found = [at]
        while True:
            try:
                parent = self.open(at).manifest.parent
            except (RegistryError, BundleError):
                return found  # it is not on this machine
            if not parent or parent in found:
                return found
            found.append(parent)
            at = parent

    def _open(self, name_or_path: str | Path) -> Bundle:
        return open_bundle(name_or_path, [self.bundles])

    # --- changing ---------------------------------------------------------------------------------

    def save(
        self,
        model: SegmentationModel,
        parent: Bundle,
        training: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Bundle:
        """Write a candidate, under a name that none had before.

        Args:
            model: the network.
            parent: that it was made from.
            training: how it came about; plain values.
            metrics: see `runtime.bundle.Manifest`.

        Raises:
            RegistryError: if the folder cannot be written to, or the disk is full.
            BundleError: if the network cannot be a bundle.
        """
        stem = re.sub(r"-fs\d+$", "", parent.manifest.name)
        with self._changing():
            self.bundles.mkdir(exist_ok=True)
            for path in self.bundles.glob(".*"):  # of a process that was killed
                shutil.rmtree(path, ignore_errors=True)
            verdicts = self.root / "verdicts"
            names = [*self.candidates(), *(p.stem for p in verdicts.glob("*.json"))]
            pointer = self.pointer()
            names += [event.bundle.partition("@")[0] for event in pointer.events]
            numbers = [int(m[1]) for name in names if (m := re.search(r"-fs(\d+)$", name))]
            name = f"{stem}-fs{max(numbers, default=0) + 1:04d}"
            return save_bundle(
                self.bundles / name,
                model,
                name=name,
                head=parent.manifest.head,
                input_size=parent.manifest.input_size,
                metrics=metrics,
                training=training,
                parent=parent.reference,
            )

    def record(self, verdict: Verdict) -> None:
        """Keep what the gate said of a candidate. Raises RegistryError."""
        name = verdict.candidate.partition("@")[0]
        with self._changing():
            write_json(self.root / "verdicts" / f"{name}.json", verdict.values())

    def promote(self, name: str) -> Bundle:
        """Make a candidate the current network.

        Returns:
            it.

        Raises:
            RegistryError: the gate did not let it pass, or judged another network or against
                another one than the current.
            BundleError: there is none of the name, or it is damaged.
        """
        with self._changing():
            pointer = self.pointer()
            if name not in self.candidates():
                known = ", ".join(self.candidates()) or "none"
                raise RegistryError(f"{name}: there is no such candidate; there are: {known}")
            bundle = self.open(name)
            if bundle.reference == pointer.stack[-1]:
                raise RegistryError(f"{name}: is the current network already")
            verdict = self.verdict(bundle.manifest.name)
            if verdict is None or verdict.get("candidate") != bundle.reference:
                raise RegistryError(f"{name}: was not judged yet, so it cannot be promoted")
            if verdict.get("passed") is not True:
                raise RegistryError(f"{name}: was refused: {verdict.get('reason')}")
            if verdict.get("current") != pointer.stack[-1]:
                raise RegistryError(
                    f"{name}: was judged against {str(verdict.get('current')).partition('@')[0]}, "
                    f"but {pointer.stack[-1].partition('@')[0]} is current; judge it again"
                )
            event = _event("promoted", bundle.reference, str(verdict.get("reason")))
            self._point(Pointer((*pointer.stack, bundle.reference), (*pointer.events, event)))
            return bundle

    def roll_back(self, reason: str = "") -> Bundle:
        """Return to the network that was current before the last promotion.

        Returns:
            it.

        Raises:
            RegistryError: none was promoted, or the earlier one is not what it was.
            BundleError: the earlier one is gone or damaged; the current one stays then.
        """
        with self._changing():
            pointer = self.pointer()
            if len(pointer.stack) < 2:
                raise RegistryError(
                    f"{pointer.stack[-1].partition('@')[0]}: nothing was promoted before it, so "
                    "there is nothing to return to"
                )
            bundle = self.open(pointer.stack[-2])
            event = _event("rolled back", bundle.reference, reason)
            self._point(Pointer(pointer.stack[:-1], (*pointer.events, event)))
            return bundle

    def discard(self, name: str) -> None:
        """Delete a candidate. Raises RegistryError if there is none, or it is in use."""
        with self._changing():
            used = [reference.partition("@")[0] for reference in self.pointer().stack]
            if name in used:
                raise RegistryError(f"{name}: is current or may be returned to; roll back first")
            if name not in self.candidates():
                raise RegistryError(f"{name}: there is no such candidate in {self.bundles}")
            trash = self.bundles / f".{name}.{secrets.token_hex(4)}"
            (self.bundles / name).rename(trash)
            sync(self.bundles)
            shutil.rmtree(trash, ignore_errors=True)

    def _point(self, pointer: Pointer) -> None:
        values = {
            "format": FORMAT,
            "stack": list(pointer.stack),
            "events": [vars(event) for event in pointer.events],
        }
        write_json(self.root / _POINTER, values)
        sync(self.root)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with held(self.root / _LOCK, _WAIT):
                yield
        except StoreError as error:
            raise RegistryError(str(error)) from error
        except OSError as error:
            raise RegistryError(
                f"{self.root}: cannot be written: {error.strerror or error}; look after the disk "
                "and try again"
            ) from error


def _event(event: str, bundle: str, reason: str) -> Event:
    return Event(event, bundle, datetime.now(UTC).isoformat(timespec="seconds"), reason)
