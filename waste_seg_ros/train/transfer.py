"""What a bundle is worth as a start for other classes: ``waste-seg transfer``.

The same network is trained on the same few images twice: from a bundle's weights and from fresh
ones, with equal settings and steps, and both are measured on images held out. So the difference is
what the bundle gives to a plant that sorts other goods and labels 10, 50 or 200 images.

By default the images are the synthetic line's, labelled anew by six `GOODS` that cut across what
the bundles know: none has a name that a bundle knows, and film is of no class here, so that every
class has to be learned. The belt and the items look like those that the bundle was trained on,
though the scenes are others; with images of another look, such as photographs (``--data``), the
gain is another.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from waste_seg_ros.cli import as_names, as_size
from waste_seg_ros.data.sample import OTHER, Sample
from waste_seg_ros.data.sources import open_data
from waste_seg_ros.data.synthetic import synthetic_scene
from waste_seg_ros.files import write_json, write_png
from waste_seg_ros.train.plots import Series, write_chart

if TYPE_CHECKING:
    from waste_seg_ros.runtime.bundle import Manifest
    from waste_seg_ros.train.loop import TrainConfig

GOODS: dict[str, tuple[str, ...]] = {
    "cardboard": ("paper/cardboard", "paper/carton"),
    "sheet": ("paper/office", "paper/newspaper", "paper/magazine", "paper/strip"),
    "pet": ("bottle/pet",),
    "jug": ("bottle/jug",),
    "tin": ("aluminum/can", "aluminum/can_end", "aluminum/tray"),
    "ball": ("aluminum/foil", "paper/crumpled"),
}
"""Classes of the default task, and the kinds of the synthetic line's items that each has.

"ball" joins kinds of two of the line's own classes. Other kinds, film and bags, are items of no
class.
"""

SEEDS = {"train": 910007, "held-out": 920007}
"""Of the synthetic line: no bundle was trained, tuned or measured on them."""

STARTS = ("bundle", "scratch")

_FIGURES = ("frames", "miou", "miou_foreground", "binary_iou", "pq", "item_recall")


@dataclass(frozen=True)
class TransferConfig:
    """Settings of the experiment; all but ``classes`` are flags of ``waste-seg transfer``.

    Attributes:
        bundle: to start from, by name or path.
        images: how many labelled images each arm gets.
        repeats: times that each arm is run, with other images and another seed.
        held_out: images to measure on.
        steps: of each arm.
        batch: images a step.
        lr: the largest learning rate when starting from the bundle.
        scratch_lr: the same for fresh weights, which bear more.
        size: (width, height) [px] of the images in training.
        seed: of images and training.
        data: specification of other data to draw the labelled images from; "" is the default task.
        held_out_data: likewise for the images to measure on.
        classes: what those data are labelled with.
    """

    bundle: str = "enet-instance"
    images: tuple[int, ...] = (10, 50, 200)
    repeats: int = 1
    held_out: int = 100
    steps: int = 400
    batch: int = 8
    lr: float = 2e-3
    scratch_lr: float = 4e-3
    size: tuple[int, int] = (160, 128)
    seed: int = 0
    data: str = ""
    held_out_data: str = ""
    classes: tuple[str, ...] = tuple(GOODS)


class TransferError(ValueError):
    """The experiment cannot be made so; the message names the flag."""


# --- images ---------------------------------------------------------------------------------------


def relabelled(seed: int, index: int, size: tuple[int, int]) -> Sample:
    """A scene of the synthetic line, labelled by `GOODS`; items of other kinds become 254."""
    sample, kinds = synthetic_scene(seed, index, size)
    table = np.full(max(kinds, default=0) + 1, OTHER, np.uint8)
    for number, kind in kinds.items():
        for label, members in enumerate(GOODS.values(), 1):
            if kind in members:
                table[number] = label
    labels = np.where(sample.instances > 0, table[sample.instances], sample.labels)
    return replace(sample, labels=labels.astype(np.uint8))


def _draw(config: TransferConfig, part: str, count: int, seed: int) -> Iterator[Sample]:
    """So many images of the part "train" or "held-out"; which ones depends on the seed."""
    spec = config.data if part == "train" else config.held_out_data
    if not spec:
        for index in range(count):
            # Scenes near each other share sprites; runs with other seeds lie far apart.
            yield relabelled(SEEDS[part], 100_000 * seed + index, config.size)
        return
    dataset = open_data(spec, config.classes, finite=True)
    if part == "train" and len(dataset) < count:
        raise TransferError(f"--data {spec}: {len(dataset)} images, but --images asks for {count}")
    for index in np.random.default_rng([seed, 17]).permutation(len(dataset))[:count]:
        yield dataset[int(index)]


def _write_images(folder: Path, samples: Iterator[Sample]) -> None:
    """Write samples as a `FolderDataset`, which is what a plant's labelled images look like."""
    for number, sample in enumerate(samples):
        for kind, picture in (
            ("instances", sample.instances),
            ("masks", sample.labels),
            ("images", sample.image),
        ):
            write_png(folder / kind / f"{number:04d}.png", picture)


# --- the experiment -------------------------------------------------------------------------------


def run_transfer(config: TransferConfig, folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Run all arms.

    Args:
        config: settings.
        folder: for images and runs; must not hold an experiment already.
        quiet: no lines about the progress on stderr.

    Returns:
        plain values: the settings, and ``arms``: for each of ``images``, ``start`` ("bundle" or
        "scratch") and ``repeat`` the main figures of `train.evaluate.evaluate` and ``seconds``.

    Raises:
        TransferError: settings that cannot be.
        BundleError: the bundle cannot be used.
        ValueError: other data cannot be read, or training fails.
        OSError: the folder cannot be written to.
    """
    from waste_seg_ros.runtime.bundle import open_bundle

    bundle = open_bundle(config.bundle)
    manifest = bundle.manifest
    _check(config, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise TransferError(f"--run {folder}: is not empty; choose another folder")
    _write_images(folder / "held-out", _draw(config, "held-out", config.held_out, 0))
    arms = []
    for repeat in range(config.repeats):
        for count in config.images:
            images = folder / f"{count}-images-{repeat}"
            _write_images(images, _draw(config, "train", count, config.seed + repeat))
            for start in STARTS:
                begin = time.perf_counter()
                settings = _settings(config, manifest, images, folder / "held-out", start, repeat)
                figures = _run_arm(settings, folder / f"{count}-{start}-{repeat}")
                arms.append(
                    {
                        "images": count,
                        "start": start,
                        "repeat": repeat,
                        "seconds": round(time.perf_counter() - begin, 1),
                        **figures,
                    }
                )
                if not quiet:
                    print(
                        f"{count} images from {start}: mIoU {figures['miou']:.3f} "
                        f"({arms[-1]['seconds']:.0f} s)",
                        file=sys.stderr,
                    )
    return {
        "config": asdict(config),
        "bundle": bundle.reference,
        "known_classes": list(manifest.classes),
        "goods": {k: list(v) for k, v in GOODS.items()} if not config.data else {},
        "arms": arms,
    }


def _check(config: TransferConfig, manifest: Manifest) -> None:
    if manifest.head == "binary":
        raise TransferError(f"--bundle {manifest.name}: has no classes (head binary); take another")
    known = [name for name in config.classes if name in manifest.classes]
    if known:
        raise TransferError(
            f"classes {', '.join(known)} are known to {manifest.name}: the task must have others"
        )
    if bool(config.data) != bool(config.held_out_data):
        raise TransferError("--data and --held-out-data go together")
    if not config.images or min(*config.images, config.repeats, config.held_out, config.steps) < 1:
        raise TransferError("--images, --repeats, --held-out and --steps must be at least 1")
    for side in config.size:
        if side < manifest.stride or side % manifest.stride:
            raise TransferError(
                f"--size {config.size[0]}x{config.size[1]}: {manifest.name} takes multiples of "
                f"{manifest.stride}"
            )


def _settings(
    config: TransferConfig,
    manifest: Manifest,
    images: Path,
    held_out: Path,
    start: str,
    repeat: int,
) -> TrainConfig:
    from waste_seg_ros.train.loop import TrainConfig

    return TrainConfig(
        architecture=manifest.architecture,
        heads=(manifest.head,),
        classes=config.classes,
        width=manifest.width,
        data=(f"folder:{images}",),
        validation=f"folder:{held_out}",
        sizes=(f"{config.size[0]}x{config.size[1]}",),
        batch=config.batch,
        steps=config.steps,
        lr=config.lr if start == "bundle" else config.scratch_lr,
        seed=config.seed + repeat,
        # Only the end counts.
        validate_steps=config.steps,
        worst=0,
        checkpoint_seconds=3600.0,
        init=config.bundle if start == "bundle" else "",
    )


def _run_arm(settings: TrainConfig, run: Path) -> dict[str, float]:
    """Train, and read what the run measured on its held-out images when it was done."""
    from waste_seg_ros.train.loop import train

    if not train(settings, run, quiet=True).finished:
        raise KeyboardInterrupt
    result = json.loads((run / "validation.json").read_text())
    figures = {name: result[name] for name in _FIGURES}
    figures |= {f"iou_{name}": value for name, value in result["iou"].items()}
    # What is no number is null there.
    return {name: round(value, 4) for name, value in figures.items() if value is not None}


def summarise(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per number of images the mean mIoU over the repeats from both starts, and the gain.

    ``spread`` is the largest distance of a gain from the mean one, NaN for a single repeat.
    """
    rows = []
    for count in report["config"]["images"]:
        values = {
            start: np.array(
                [a["miou"] for a in report["arms"] if (a["images"], a["start"]) == (count, start)]
            )
            for start in STARTS
        }
        gains = values["bundle"] - values["scratch"]
        rows.append(
            {
                "images": count,
                "bundle": float(values["bundle"].mean()),
                "scratch": float(values["scratch"].mean()),
                "gain": float(gains.mean()),
                "spread": float(np.abs(gains - gains.mean()).max()) if len(gains) > 1 else math.nan,
            }
        )
    return rows


def markdown(report: Mapping[str, Any]) -> str:
    """The table of `summarise`."""
    name = report["bundle"].partition("@")[0]
    lines = [
        f"| labelled images | mIoU from scratch | mIoU from {name} | gain |",
        "|---|---|---|---|",
    ]
    for row in summarise(report):
        spread = "" if math.isnan(row["spread"]) else f" ± {row['spread']:.3f}"
        lines.append(
            f"| {row['images']} | {row['scratch']:.3f} | {row['bundle']:.3f} "
            f"| {row['gain']:+.3f}{spread} |"
        )
    return "\n".join(lines)


def draw_transfer(report: Mapping[str, Any], path: Path) -> None:
    """Draw mIoU over the number of images to a PNG. Raises OSError."""
    rows = summarise(report)
    name = report["bundle"].partition("@")[0]
    labels = {"bundle": f"from {name}", "scratch": "from scratch"}
    write_chart(
        path,
        [
            Series(labels[start], [(row["images"], row[start]) for row in rows], line=True)
            for start in STARTS
        ],
        f"Other classes: {', '.join(report['config']['classes'])}",
        "labelled images",
        "mIoU on held-out images",
        x_values=sorted(report["config"]["images"]),
        logarithmic=True,
    )


# --- command line ---------------------------------------------------------------------------------


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of numbers, such as 10,50") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``waste-seg transfer``."""
    defaults = TransferConfig()
    add = parser.add_argument
    add("--bundle", default=defaults.bundle, help="to start from (default: %(default)s)")
    add("--images", type=_counts, default=defaults.images, metavar="N,N", help="(10,50,200)")
    add("--repeats", type=int, default=defaults.repeats, help="with other images each time")
    add("--held-out", type=int, default=defaults.held_out, help="images to measure on")
    add("--steps", type=int, default=defaults.steps, help="of each arm (default: %(default)s)")
    add("--batch", type=int, default=defaults.batch, help="images a step (default: %(default)s)")
    add("--lr", type=float, default=defaults.lr, help="from the bundle (%(default)s)")
    add("--scratch-lr", type=float, default=defaults.scratch_lr, help="(default: %(default)s)")
    add("--size", type=as_size, default=defaults.size, metavar="WxH", help="(160x128)")
    add("--seed", type=int, default=defaults.seed, help="of images and training")
    add("--data", default="", help="other images, such as coco:ANNOTATIONS.json:IMAGES")
    add("--held-out-data", default="", help="of the same classes, to measure on")
    add("--classes", type=as_names, help="of those images, separated by commas")
    add("--run", type=Path, help="keep images and runs in this folder")
    add("--output", type=Path, default=Path("transfer.json"), help="(default: %(default)s)")
    add("--plot", type=Path, help="PNG of mIoU over images")


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg transfer``; 1 if bundle, data or settings cannot be used."""
    from waste_seg_ros.train.loop import TrainingError

    config = TransferConfig(
        bundle=args.bundle,
        images=args.images,
        repeats=args.repeats,
        held_out=args.held_out,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        scratch_lr=args.scratch_lr,
        size=args.size,
        seed=args.seed,
        data=args.data,
        held_out_data=args.held_out_data,
        classes=args.classes or TransferConfig.classes,
    )
    try:
        if bool(args.data) != bool(args.classes):
            raise TransferError("--data and --classes go together")
        with tempfile.TemporaryDirectory(prefix="transfer.") as temporary:
            report = run_transfer(config, args.run or Path(temporary))
        write_json(args.output, report | {"summary": summarise(report)})
        if args.plot:
            draw_transfer(report, args.plot)
    except (ValueError, OSError, TrainingError) as error:
        print(f"waste-seg transfer: {error}", file=sys.stderr)
        return 1
    print(markdown(report))
    return 0
