"""Bundles: a trained network on disk.

A bundle is a folder::

    manifest.yaml          what it is, see `Manifest`; the SHA-256 of the other files
    weights.safetensors    the weights, for torch; not in an int8 bundle
    model.onnx             the deployed graph, see `runtime.export`

Bundles are immutable: nothing here changes one, and writing over one is refused. Nothing is ever
unpickled. torch is imported only by what handles weights.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from waste_seg_ros.files import sync
from waste_seg_ros.runtime import HEADS, STORED

if TYPE_CHECKING:
    from torch import Tensor

    from waste_seg_ros.models import SegmentationModel

FORMAT = 2
"""Of the manifest; 1 has no `precision`."""
MANIFEST = "manifest.yaml"
WEIGHTS = "weights.safetensors"
GRAPH = "model.onnx"

#: Means and deviations of the red, green and blue of ImageNet, in 0..1: the usual normalisation.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_MANIFEST_LIMIT = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class BundleError(ValueError):
    """A bundle cannot be found, read, trusted or written; the message names file and key."""


@dataclass(frozen=True)
class Manifest:
    """What a bundle is.

    Attributes:
        name: of letters, digits, dot, dash and underscore.
        architecture: key of `models.TRUNKS`.
        width: factor on the trunk's channels.
        head: what it is used as, one of `HEADS`.
        classes: names of label ids 1, 2, ...
        input_size: (width, height) [px] it was trained at; others of its stride run as well.
        stride: height and width of an input are multiples of it.
        mean: of R, G, B in 0..1, subtracted first.
        std: of R, G, B in 0..1, divided by then.
        metrics: figures by the name of the data they were measured on.
        training: how it came about: commit, seed, steps, data and so on; plain values.
        files: SHA-256 (hex) by file name.
        parent: "name@digest" of the bundle it was trained from, or "".
        precision: how the network is stored, one of `STORED`. "f16": kernels as half floats, which
            are made single ones when they are loaded. "int8": the graph computes in 8 bits but for
            what `quantize` leaves in float; there are no weights for torch, as the float weights
            would be another network: training goes on from the parent.
        format: version of this layout.
    """

    name: str
    architecture: str
    width: float
    head: str
    classes: tuple[str, ...]
    input_size: tuple[int, int]
    stride: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    files: Mapping[str, str]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    parent: str = ""
    precision: str = "f32"
    format: int = FORMAT


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: where it is and what it is."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the manifest, which covers the other files through their digests."""
        return file_digest(self.path / MANIFEST)

    @property
    def reference(self) -> str:
        """Name and digest joined by "@": what `parent` is in a bundle made from this one."""
        return f"{self.manifest.name}@{self.digest}"

    @property
    def size(self) -> int:
        """Bytes of the whole folder: manifest and all files that it names."""
        return sum((self.path / name).stat().st_size for name in (MANIFEST, *self.manifest.files))


# --------------------------------------------------------------------------------------------------
# Finding and reading


def search_path(search: Sequence[Path] = ()) -> list[Path]:
    """The folders in which bundles are looked for by name, first come first served.

    ``search``, then those of $WASTE_SEG_BUNDLES (separated as in $PATH), then
    share/waste_seg_ros/bundles below each prefix of $AMENT_PREFIX_PATH, then the checkout's.
    """
    folders = [Path(folder) for folder in search]
    folders += [Path(p) for p in os.environ.get("WASTE_SEG_BUNDLES", "").split(os.pathsep) if p]
    folders += [
        Path(prefix) / "share" / "waste_seg_ros" / "bundles"
        for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
        if prefix
    ]
    # resolve(): an installation by symbolic links leads to the checkout too.
    folders.append(Path(__file__).resolve().parents[2] / "bundles")
    return folders


def find_bundle(name_or_path: str | Path, search: Sequence[Path] = ()) -> Path:
    """The folder of a bundle given by its path, or by its name on the `search_path`.

    Raises BundleError saying where it was looked for and which names there are.
    """
    text = str(name_or_path)
    if not text:
        raise BundleError("no bundle named")
    given = Path(text).expanduser()
    if (given / MANIFEST).is_file():
        return given
    if given.is_dir():
        raise BundleError(f"{given}: no {MANIFEST} in it, so it is not a bundle")
    if given.is_absolute() or len(given.parts) != 1 or given.parts[0] == "..":
        raise BundleError(f"{given}: no such folder")
    folders = search_path(search)
    for folder in folders:
        if (folder / text / MANIFEST).is_file():
            return folder / text
    known = sorted({p.name for p in list_bundles(search)})
    raise BundleError(
        f"no bundle {text!r}; there are: {', '.join(known) or 'none'}. Looked in "
        + ", ".join(str(folder) for folder in folders)
    )


def list_bundles(search: Sequence[Path] = ()) -> list[Path]:
    """Folders of the bundles on the `search_path`, without those another of the name hides."""
    found: dict[str, Path] = {}
    for folder in search_path(search):
        for path in sorted(folder.glob(f"*/{MANIFEST}")):
            if not path.parent.name.startswith("."):
                found.setdefault(path.parent.name, path.parent)
    return list(found.values())


def open_bundle(name_or_path: str | Path, search: Sequence[Path] = ()) -> Bundle:
    """Finds a bundle and verifies its manifest and the SHA-256 of every file it names.

    Raises BundleError naming the file and the key.
    """
    return _verified(find_bundle(name_or_path, search))


def _verified(path: Path) -> Bundle:
    manifest = read_manifest(path / MANIFEST)
    root = path.resolve()
    for name, digest in manifest.files.items():
        file = path / name
        # A file may be a link (an installation by links makes them), but then so is the folder or
        # the manifest beside it; what must not be is a manifest that names files elsewhere.
        if file.resolve().parent not in (root, (path / MANIFEST).resolve().parent):
            raise BundleError(f"{path / MANIFEST}: files: {name!r} lies outside of the bundle")
        if not file.is_file():
            raise BundleError(f"{file}: missing, though {MANIFEST} names it")
        if name == WEIGHTS:
            _check_safetensors(file)
        found = file_digest(file)
        if found != digest:
            raise BundleError(
                f"{file}: SHA-256 is {found[:12]}..., {MANIFEST} says {digest[:12]}...; the file "
                "was changed or is damaged: copy the bundle anew"
            )
    return Bundle(path, manifest)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_safetensors(path: Path) -> None:
    """Refuses what is no safetensors file, pickles by name, before anything parses it.

    The format begins with the size of a JSON header, 8 bytes, and that header.
    """
    with path.open("rb") as stream:
        head = stream.read(9)
    size = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and size <= path.stat().st_size - 8:
        return
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        raise BundleError(
            f"{path}: this is a pickled checkpoint (torch.save), not safetensors; it is not "
            "loaded, as unpickling runs code. Save it with safetensors.torch.save_file"
        )
    raise BundleError(f"{path}: not a safetensors file")


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest. Raises BundleError naming the file and the key."""
    try:
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise BundleError(f"{path}: larger than a manifest can be ({_MANIFEST_LIMIT} bytes)")
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not YAML: {error}") from error
    if not isinstance(read, dict):
        raise BundleError(f"{path}: expected a mapping of keys")
    if "format" not in read:
        raise BundleError(f"{path}: key 'format' is missing")
    if type(read["format"]) is not int or not 1 <= read["format"] <= FORMAT:
        raise BundleError(
            f"{path}: format is {read['format']!r}; this version reads formats 1 to {FORMAT}"
        )
    known = {f.name for f in fields(Manifest)}
    if read["format"] == 1:
        known.remove("precision")
    for key in read:
        if key not in known:
            raise BundleError(f"{path}: unknown key {key!r}; known: {', '.join(sorted(known))}")
    for key in sorted(known):
        if key not in read:
            raise BundleError(f"{path}: key {key!r} is missing")
    try:
        return _parse(read)
    except _KeyProblem as problem:
        raise BundleError(f"{path}: {problem}") from None


class _KeyProblem(Exception):
    pass


def _parse(read: Mapping[str, Any]) -> Manifest:
    def fail(key: str, expected: str) -> _KeyProblem:
        return _KeyProblem(f"{key}: expected {expected}, not {read[key]!r}")

    def number(value: object) -> bool:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]

    def numbers(key: str, count: int, positive: bool) -> tuple[float, ...]:
        value = read[key]
        if not (isinstance(value, list) and len(value) == count and all(map(number, value))):
            raise fail(key, f"a list of {count} numbers")
        if positive and min(value) <= 0:
            raise fail(key, "numbers above 0")
        return tuple(float(v) for v in value)

    for key in ("name", "architecture"):
        if not (isinstance(read[key], str) and _NAME.fullmatch(read[key])):
            raise fail(key, "a name of letters, digits, dot, dash and underscore")
    if read["head"] not in HEADS:
        raise fail("head", "one of " + ", ".join(HEADS))
    if not number(read["width"]) or read["width"] <= 0:
        raise fail("width", "a number above 0")
    classes = read["classes"]
    if not (
        isinstance(classes, list)
        and 1 <= len(classes) <= 200
        and all(isinstance(c, str) and c for c in classes)
        and len(set(classes)) == len(classes)
    ):
        raise fail("classes", "a list of 1 to 200 distinct names")
    stride = read["stride"]
    if type(stride) is not int or stride < 4 or stride % 4:
        raise fail("stride", "a multiple of 4, at least 4")
    size = read["input_size"]
    if not (
        isinstance(size, list)
        and len(size) == 2
        and all(type(v) is int and 0 < v <= 8192 and v % stride == 0 for v in size)
    ):
        raise fail("input_size", f"[width, height], multiples of the stride {stride}")
    files = read["files"]
    if not isinstance(files, dict):
        raise fail("files", "a mapping of file name to SHA-256")
    for name, digest in files.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _KeyProblem(f"files: {name!r} must be a plain file name inside the bundle")
        if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            raise _KeyProblem(f"files: {name}: expected a SHA-256 of 64 hex digits")
    precision = read.get("precision", "f32")
    if precision not in STORED:
        raise fail("precision", "one of " + ", ".join(STORED))
    for name in (GRAPH,) if precision == "int8" else (WEIGHTS, GRAPH):
        if name not in files:
            raise _KeyProblem(f"files: {name} is missing")
    metrics = read["metrics"]
    if not (
        isinstance(metrics, dict)
        and all(
            isinstance(k, str)
            and isinstance(v, dict)
            and all(isinstance(n, str) and number(x) for n, x in v.items())
            for k, v in metrics.items()
        )
    ):
        raise fail("metrics", "a mapping of data name to a mapping of figure to number")
    if not (
        isinstance(read["training"], dict) and all(isinstance(k, str) for k in read["training"])
    ):
        raise fail("training", "a mapping")
    if not isinstance(read["parent"], str):
        raise fail("parent", 'a string, "" for none')
    mean, std = numbers("mean", 3, False), numbers("std", 3, True)
    return Manifest(
        name=read["name"],
        architecture=read["architecture"],
        width=float(read["width"]),
        head=read["head"],
        classes=tuple(classes),
        input_size=(size[0], size[1]),
        stride=stride,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        files=dict(files),
        metrics=metrics,
        training=read["training"],
        parent=read["parent"],
        precision=precision,
        format=read["format"],
    )


def read_weights(bundle: Bundle) -> dict[str, Tensor]:
    """The weights of a bundle, as single floats.

    Raises BundleError if one is not finite or the bundle has none (int8).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = bundle.path / WEIGHTS
    if WEIGHTS not in bundle.manifest.files:
        parent = bundle.manifest.parent.partition("@")[0] or "the bundle it was made from"
        raise BundleError(
            f"{bundle.path}: is {bundle.manifest.precision} and has no weights for torch, only its "
            f"graph; take {parent}"
        )
    _check_safetensors(path)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: {error}") from error
    _check_finite(weights, str(path))
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


def halve(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kernels as half floats, where they fit into these.

    Vectors (norms, biases) stay as they are: they are small, and a variance may be tiny.
    """
    halved = {}
    for key, value in weights.items():
        half = value.half() if value.is_floating_point() and value.dim() > 1 else value
        halved[key] = half if bool(half.isfinite().all()) else value
    return halved


def load_model(bundle: Bundle) -> SegmentationModel:
    """The bundle's network in torch, in eval mode. Raises BundleError if the weights do not fit."""
    from waste_seg_ros.models import build_model, load_weights

    manifest = bundle.manifest
    try:
        model = build_model(manifest.architecture, manifest.head, manifest.classes, manifest.width)
    except ValueError as error:
        raise BundleError(f"{bundle.path / MANIFEST}: {error}") from error
    try:
        load_weights(model, read_weights(bundle))
    except BundleError:
        raise
    except ValueError as error:
        raise BundleError(
            f"{bundle.path / WEIGHTS}: not the weights of {manifest.architecture} with head "
            f"{manifest.head}: {error}"
        ) from error
    return model.eval()


def _check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    for key, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise BundleError(f"{where}: {key} holds numbers that are not finite")


# --------------------------------------------------------------------------------------------------
# Writing


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Makes the folder ``path`` whole or not at all.

    ``write`` fills a temporary folder beside it, whose files are synced to the disk before it is
    renamed. Raises FileExistsError if ``path`` exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        write(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)
            sync(file)
        temporary.chmod(0o755)
        sync(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def save_bundle(
    path: str | Path,
    model: SegmentationModel,
    *,
    name: str = "",
    head: str = "",
    input_size: tuple[int, int] = (320, 240),
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    training: Mapping[str, Any] | None = None,
    parent: str = "",
    precision: str = "f32",
) -> Bundle:
    """Writes a bundle of a network: weights, exported graph, manifest.

    Args:
        path: the folder to make; must not exist.
        model: a network of `models.build_model`; it may have more heads than the bundle's.
        name: the bundle's; "" takes the folder's.
        head: what the bundle is used as; "" takes the model's only one. Weights of other heads
            are left out.
        input_size: (width, height) [px] it was trained at.
        metrics: see `Manifest`.
        training: see `Manifest`.
        parent: see `Manifest`.
        precision: "f32" or "f16", see `Manifest`; `quantize.quantize_bundle` makes int8.

    Returns:
        The bundle, opened and verified.

    Raises:
        BundleError: the folder exists, a value cannot be in a manifest, a weight is not finite,
            or the exported graph does not give what the model gives.
    """
    from safetensors.torch import save_file

    from waste_seg_ros.models import build_model, load_weights
    from waste_seg_ros.runtime.export import export_onnx

    path = Path(path)
    if precision not in ("f32", "f16"):
        raise BundleError(f"{path}: precision {precision!r} cannot be written of a network")
    if not head:
        if len(model.heads) != 1:
            raise BundleError(f"{path}: the model has heads {model.heads}; say which")
        head = model.heads[0]
    try:
        single = build_model(model.name, head, model.classes, model.width)
    except ValueError as error:
        raise BundleError(f"{path}: {error}") from error
    own = single.state_dict()
    weights = {
        k: v.detach().contiguous().clone() for k, v in model.state_dict().items() if k in own
    }
    _check_finite(weights, str(path))
    try:
        load_weights(single, weights)
    except ValueError as error:
        raise BundleError(f"{path}: the model has no {head} head: {error}") from error
    single.eval()
    manifest = Manifest(
        name=name or path.name,
        architecture=model.name,
        width=model.width,
        head=head,
        classes=tuple(model.classes),
        input_size=input_size,
        stride=single.stride,
        mean=MEAN,
        std=STD,
        files={},
        metrics=metrics or {},
        training=training or {},
        parent=parent,
        precision=precision,
    )

    def write(folder: Path) -> None:
        save_file(halve(weights) if precision == "f16" else weights, folder / WEIGHTS)
        export_onnx(single, manifest, folder / GRAPH)
        _seal(folder, manifest)

    _write_new(path, write)
    return _verified(path)


def restate_bundle(bundle: Bundle, path: str | Path, **changes: Any) -> Bundle:
    """A copy of ``bundle`` with other manifest values, such as metrics measured since."""
    return convert_bundle(bundle, path, lambda folder: None, **changes)


def convert_bundle(
    bundle: Bundle, path: str | Path, convert: Callable[[Path], None], **changes: Any
) -> Bundle:
    """Writes a copy of ``bundle`` whose files ``convert`` has changed in their new folder.

    ``changes`` are of the manifest's values. Raises BundleError as `save_bundle` does.
    """
    path = Path(path)

    def write(folder: Path) -> None:
        for name in bundle.manifest.files:
            shutil.copyfile(bundle.path / name, folder / name)
        convert(folder)
        _seal(folder, replace(bundle.manifest, **changes))

    _write_new(path, write)
    return _verified(path)


def halve_bundle(bundle: Bundle, path: str | Path, **changes: Any) -> Bundle:
    """A copy of a f32 bundle with half floats; ``changes`` are of the manifest's values.

    Raises BundleError as `save_bundle` does, and if the bundle is not f32.
    """
    from safetensors.torch import save_file

    from waste_seg_ros.runtime.quantize import halve_graph

    if bundle.manifest.precision != "f32":
        raise BundleError(
            f"{bundle.path}: is {bundle.manifest.precision}; only f32 is stored as half floats"
        )

    def convert(folder: Path) -> None:
        save_file(halve(read_weights(bundle)), folder / WEIGHTS)
        halve_graph(folder / GRAPH)

    values = {"name": Path(path).name, "metrics": {}, "parent": bundle.reference, **changes}
    return convert_bundle(bundle, path, convert, precision="f16", **values)


def _seal(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest with the digests of the files that are in ``folder``, and verifies."""
    digests = {file.name: file_digest(file) for file in sorted(folder.iterdir())}
    write_manifest(folder / MANIFEST, replace(manifest, files=digests, format=FORMAT))
    _verified(folder)


def _write_new(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write_atomically(path, write)
    except FileExistsError:
        raise BundleError(
            f"{path}: exists already, and bundles are not written over; choose another folder"
        ) from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be written: {error}") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest and reads it back, so that none is written which could not be opened."""
    values = {k: _plain(v) for k, v in asdict(manifest).items()}
    try:
        text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)
    except yaml.YAMLError as error:
        raise BundleError(f"{path}: not plain values: {error}") from error
    path.write_text(text, encoding="utf-8")
    read_manifest(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
