"""Making a bundle smaller and faster: ``waste-seg compress``.

The steps, in their order: channels are taken out and the network is trained on (``--prune``),
learning from a larger one too (``--distill``, also by itself); kernels are stored as half floats
(``--f16``), or the graph computes in 8-bit integers (``--int8``). Each step writes a bundle whose
manifest names the one before as its parent and says in `training` what was lost by it on which
data.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from waste_seg_ros.cli import as_names
from waste_seg_ros.data.sources import open_data
from waste_seg_ros.models import SegmentationModel
from waste_seg_ros.models.count import count_macs
from waste_seg_ros.models.enet import differentiable_masks
from waste_seg_ros.perception.scaling import scale_image
from waste_seg_ros.runtime.backends import BackendError, input_size_for, load_backend
from waste_seg_ros.runtime.bundle import (
    GRAPH,
    WEIGHTS,
    Bundle,
    BundleError,
    Manifest,
    convert_bundle,
    halve_bundle,
    load_model,
    open_bundle,
    restate_bundle,
    save_bundle,
)
from waste_seg_ros.runtime.export import source_commit
from waste_seg_ros.runtime.listing import bundle_cost
from waste_seg_ros.runtime.quantize import quantize_graph
from waste_seg_ros.train.evaluate import bundle_predictor, evaluate
from waste_seg_ros.train.loop import (
    TrainConfig,
    TrainingError,
    check_config,
    make_batches,
    normalise,
    read_config,
    read_run,
    train,
)
from waste_seg_ros.train.losses import LossSettings, total_loss
from waste_seg_ros.train.table import data_key

CALIBRATION = "synthetic:5:200"
VALIDATION = "synthetic:800001:60:320x240"

LIMIT = 0.01
"""mIoU that a compressed bundle may lose before the command speaks of it."""

TUNING = TrainConfig(sizes=(), lr=1e-3, validation=VALIDATION)
"""Settings of training on, where none are given; no sizes stand for the bundle's own."""

_MOST = 0.8  # share of a layer's channels that can go
_CHANNELS = 8  # channels that go at a time
_STEPS = 40  # from none to the most
_BATCHES = 8  # to take gradients from
_CHECKED = 4  # frames to compare runtimes on
_APART = 0.015  # how far the shares of their pixels may lie apart


# --------------------------------------------------------------------------------------------------
# What is lost


def measure(bundle: Bundle, spec: str) -> dict[str, float]:
    """Figures of a bundle on data, through the runtime that the robot uses.

    ``miou`` and ``pq``; of a binary head ``binary_iou`` and ``pq`` whatever the class.

    Raises ValueError or OSError if the data cannot be used.
    """
    manifest = bundle.manifest
    result = evaluate(
        bundle_predictor(bundle),
        open_data(spec, manifest.classes, finite=True),
        head=manifest.head,
        classes=manifest.classes,
        progress=sys.stderr.isatty(),
    )
    if manifest.head == "binary":
        found = {"binary_iou": result["binary_iou"], "pq": result["agnostic"]["pq"]}
    else:
        found = {"miou": result["miou"], "pq": result["pq"]}
    return {name: round(float(value), 4) for name, value in found.items()}


def loss_of(parent: Mapping[str, float], own: Mapping[str, float]) -> dict[str, float]:
    """Both figures and the difference, such as ``miou_parent``, ``miou`` and ``miou_lost``."""
    losses: dict[str, float] = {}
    for name, value in own.items():
        losses[f"{name}_parent"] = parent[name]
        losses[name] = value
        losses[f"{name}_lost"] = round(parent[name] - value, 4)
    return losses


@dataclass(frozen=True)
class Step:
    """One step of a compression.

    ``kind``: what it is, in words. ``suffix``: added to the bundle's name. ``facts``: of it for
    the manifest's `training`. ``make``: from the bundle before to one at the path.
    """

    kind: str
    suffix: str
    facts: Mapping[str, Any]
    make: Callable[[Bundle, Path], Bundle]


# --------------------------------------------------------------------------------------------------
# Pruning and training on


def prune(
    model: SegmentationModel,
    share: float,
    size: tuple[int, int],
    batches: Iterable[Mapping[str, Tensor]],
) -> float:
    """Takes channels out of a network, in place, until its multiply-accumulates fall by a share.

    G. Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, finds the channels that
    can only go together. They go in the order of what the loss would change by, to the first
    order (P. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019), over
    the whole network, and by eights, in which CPUs compute. A layer keeps at least a fifth of its
    channels. The outputs and `heads.Trunk.fixed_layers` stay as they are.

    Args:
        model: the network; it is left in eval mode.
        share: of the multiply-accumulates, above 0 and below 1.
        size: (width, height) [px] of the image that they are counted for.
        batches: of `train.targets`, with the images, to take the gradients from.

    Returns:
        the share that went, at least ``share``.

    Raises:
        BundleError: Torch-Pruning is not installed, or so much cannot go.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise BundleError(
            f"--prune: Torch-Pruning is not installed ({error}); pip install torch-pruning"
        ) from error
    model.eval()
    before = count_macs(model, size)
    model.zero_grad(set_to_none=True)
    for batch in batches:
        loss, _ = total_loss(model(normalise(batch["image"])), batch, LossSettings())
        loss.backward()
    side = 2 * model.stride
    with differentiable_masks(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that a mere number of channels is
        pruner = torch_pruning.pruner.BasePruner(
            model,
            torch.zeros(1, 3, side, side),
            torch_pruning.importance.GroupTaylorImportance(),
            global_pruning=True,
            pruning_ratio=_MOST,
            max_pruning_ratio=_MOST,
            iterative_steps=_STEPS,
            ignored_layers=[*model.trunk.fixed_layers(), *model.output_layers()],
            round_to=_CHANNELS,
            in_channel_groups={},
            out_channel_groups={},
        )
    gone = 0.0
    for _ in range(_STEPS):
        pruner.step()
        gone = 1 - count_macs(model, size) / before
        if gone >= share:
            model.zero_grad(set_to_none=True)
            return gone
    raise BundleError(
        f"--prune {share:g}: of {model.name} no more than {gone:.2f} of the multiply-accumulates "
        "can go"
    )


@dataclass(frozen=True)
class FineTuning:
    """How a network is trained on, and what is taken out of it before.

    ``share``: see `prune`; 0 takes nothing out. ``teacher``: bundle to learn from, or "".
    ``settings``: of the run, but for what follows from the bundle. ``run``: folder for it; None
    drops it in the end.
    """

    share: float
    teacher: str
    settings: TrainConfig
    run: Path | None = None

    def make(self, parent: Bundle, path: Path) -> Bundle:
        """Writes the bundle of the trained network. Raises BundleError or TrainingError."""
        manifest = parent.manifest
        model = load_model(parent)
        config = self.config(parent)
        facts: dict[str, Any] = {"data": list(map(data_key, config.data)), "seed": config.seed}
        if self.share:
            batches = islice(make_batches(config, 0), _BATCHES)
            gone = prune(model, self.share, manifest.input_size, batches)
            facts["macs_removed"] = round(gone, 4)
        if self.teacher:
            facts["teacher"] = open_bundle(self.teacher).reference
        with tempfile.TemporaryDirectory(prefix=".run-", dir=path.parent) as scratch:
            run = self.run or Path(scratch)
            result = train(config, run, model=model)
            if not result.finished:
                raise TrainingError("stopped before the end; nothing was written")
            _, model, state = read_run(run, model)
        facts |= {"steps": state["step"], "images": state["images"]}
        facts["minutes"] = round(state["elapsed"] / 60, 1)
        return save_bundle(
            path,
            model,
            head=manifest.head,
            input_size=manifest.input_size,
            training=facts,
            parent=parent.reference,
        )

    def config(self, parent: Bundle) -> TrainConfig:
        """The settings of the run."""
        manifest = parent.manifest
        width, height = manifest.input_size
        return replace(
            self.settings,
            architecture=manifest.architecture,
            width=manifest.width,
            heads=(manifest.head,),
            classes=manifest.classes,
            sizes=self.settings.sizes or (f"{width}x{height}",),
            teacher=self.teacher,
        )

    def step(self) -> Step:
        """As a step of a compression."""
        kinds, suffixes = [], []
        if self.share:
            kinds.append(f"prune {self.share:g}")
            suffixes.append("pruned")
        if self.teacher:
            kinds.append(f"distil {open_bundle(self.teacher).manifest.name}")
            suffixes.append("distilled")
        return Step(", ".join(kinds), "-".join(suffixes), {}, self.make)


# --------------------------------------------------------------------------------------------------
# Half floats and integers


def calibration_frames(manifest: Manifest, spec: str) -> Iterator[NDArray[np.uint8]]:
    """The images of the data at the sizes at which the network would see them.

    Raises DataError or OSError if the data cannot be used.
    """
    for sample in open_data(spec, manifest.classes, size=manifest.input_size, finite=True):
        height, width = sample.image.shape[:2]
        yield scale_image(sample.image, input_size_for((width, height), manifest))


def quantize_bundle(
    parent: Bundle,
    path: str | Path,
    calibration: str = CALIBRATION,
    keep: Sequence[str] = (),
    **changes: Any,
) -> Bundle:
    """Writes an int8 bundle of a bundle's graph; see `quantize.quantize_graph`.

    Args:
        parent: of single or half floats.
        path: the folder to make.
        calibration: specification of data, of which only the images are used.
        keep: parts of names of nodes that stay in float.
        changes: of the manifest's values.

    Raises:
        BundleError: the parent is int8, there are no images, NNCF is not installed, or a runtime
            does something else with the graph than another.
        DataError: the data cannot be used.
    """
    if parent.manifest.precision == "int8":
        raise BundleError(
            f"--int8: {parent.manifest.name} is int8 already; quantize its parent, "
            f"{parent.manifest.parent.partition('@')[0]}"
        )

    def convert(folder: Path) -> None:
        frames = list(calibration_frames(parent.manifest, calibration))
        quantize_graph(folder / GRAPH, folder / GRAPH, frames, keep)
        (folder / WEIGHTS).unlink()
        check_runtimes(parent, replace(parent, path=folder), frames[:_CHECKED])

    values = {"name": Path(path).name, "metrics": {}, "parent": parent.reference, **changes}
    return convert_bundle(parent, path, convert, precision="int8", **values)


def check_runtimes(parent: Bundle, bundle: Bundle, frames: Sequence[NDArray[np.uint8]]) -> None:
    """Whether the runtimes lose alike by a quantization.

    They round differently, but one that gives the parent's labels at far fewer pixels than another
    has not understood the graph. Raises BundleError then.
    """
    shares: dict[str, float] = {}
    for kind in ("openvino", "onnxruntime"):
        same = []
        for frame in frames:
            size = (frame.shape[1], frame.shape[0])
            try:
                found, expected = (load_backend(b, kind, size) for b in (bundle, parent))
            except BackendError:  # not installed
                break
            same.append((found.predict(frame).labels == expected.predict(frame).labels).mean())
        else:
            shares[kind] = float(np.mean(same))
    if shares and max(shares.values()) - min(shares.values()) > _APART:
        raise BundleError(
            "--int8: the labels of the parent come from "
            + " and ".join(f"{kind} at {share:.1%}" for kind, share in shares.items())
            + " of the pixels, so one takes the graph otherwise; keep parts in float (--keep-float)"
        )


# --------------------------------------------------------------------------------------------------
# Steps


def take_steps(
    bundle: Bundle, steps: Sequence[Step], output: Path, name: str, validation: str
) -> list[Bundle]:
    """Takes the steps one after the other and measures what each loses.

    Args:
        bundle: the one to begin with.
        steps: at least one.
        output: folder for their bundles, ``name`` with the suffixes so far.
        name: see ``output``.
        validation: specification of the data to measure on.

    Raises:
        BundleError: a bundle of the name is there already, or a step fails.
        ValueError, OSError: the data cannot be used.
    """
    suffixes = [step.suffix for step in steps]
    paths = [output / "-".join((name, *suffixes[: k + 1])) for k in range(len(steps))]
    for path in paths:
        if path.exists():
            raise BundleError(f"{path}: exists already; choose another --output or --name")
    output.mkdir(parents=True, exist_ok=True)
    figures = measure(bundle, validation)
    made: list[Bundle] = []
    with tempfile.TemporaryDirectory(prefix=".compress-", dir=output) as scratch:
        for step, path in zip(steps, paths, strict=True):
            draft = step.make(bundle, Path(scratch) / path.name)
            found = measure(draft, validation)
            losses = loss_of(figures, found)
            training = dict(draft.manifest.training)
            earlier = bundle.manifest.training.get("compressed")
            training |= {"commit": source_commit(), **step.facts}
            training["compressed"] = f"{earlier}, {step.kind}" if earlier else step.kind
            training |= {"validation": data_key(validation), **losses}
            # Of the bundle before, as int8 has no weights to count.
            counted = bundle if draft.manifest.precision == "int8" else draft
            training["parameters"], training["macs"] = bundle_cost(counted)
            made.append(
                restate_bundle(
                    draft,
                    path,
                    name=path.name,
                    metrics={},
                    parent=bundle.reference,
                    training=training,
                )
            )
            report(bundle, made[-1], losses)
            bundle, figures = made[-1], found
    return made


def report(parent: Bundle, bundle: Bundle, losses: Mapping[str, float]) -> None:
    """Prints what a step came to."""
    print(f"wrote {bundle.path}: {bundle.size / 1e6:.2f} MB instead of {parent.size / 1e6:.2f} MB")
    for name in losses:
        if name.endswith("_parent"):
            own = name.removesuffix("_parent")
            print(f"  {own:10s} {losses[own]:.4f} instead of {losses[name]:.4f}")
    main = "miou_lost" if "miou_lost" in losses else "binary_iou_lost"
    if losses[main] > LIMIT:
        print(f"  more than {LIMIT:g} of {main.removesuffix('_lost')} was lost", file=sys.stderr)


def plan(args: argparse.Namespace, bundle: Bundle) -> list[Step]:
    """The steps of a command line. Raises BundleError or TrainingError if they make no sense."""
    if args.f16 and args.int8:
        raise BundleError("--f16 and --int8: an int8 bundle stores its kernels in 8 bits; give one")
    steps = []
    if args.prune is not None and not 0 < args.prune < 1:
        raise BundleError(f"--prune {args.prune:g}: must be above 0 and below 1")
    if args.prune or args.distill:
        if bundle.manifest.precision == "int8":
            raise BundleError(
                f"{bundle.path}: is int8, which is not trained on; begin with its parent, "
                f"{bundle.manifest.parent.partition('@')[0]}"
            )
        settings = read_config(args.config, TUNING) if args.config else TUNING
        given = {"data": args.data, "minutes": args.minutes, "lr": args.lr}
        settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
        if not (settings.minutes or settings.steps):
            raise BundleError("--prune and --distill train on; say how long: --minutes 8")
        settings = replace(settings, validation=args.validation)
        tuning = FineTuning(args.prune or 0.0, args.distill, settings, args.run)
        check_config(tuning.config(bundle))
        steps.append(tuning.step())
    if args.f16:
        steps.append(Step("f16", "f16", {}, halve_bundle))
    if args.int8:
        facts = {
            "calibration": data_key(args.calibration),
            "kept_float": list(args.keep_float),
        }

        def quantize(bundle: Bundle, path: Path) -> Bundle:
            return quantize_bundle(bundle, path, args.calibration, args.keep_float)

        steps.append(Step("int8", "int8", facts, quantize))
    if not steps:
        raise BundleError("nothing to do; give --prune, --distill, --int8 or --f16")
    return steps


# --------------------------------------------------------------------------------------------------
# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``waste-seg compress``."""
    parser.add_argument("model", metavar="MODEL", help="bundle to compress, by name or folder")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder that the new bundles are put into"
    )
    parser.add_argument(
        "--name", default="", help="bundles are named NAME-STEP... (default: MODEL's name)"
    )
    parser.add_argument(
        "--prune",
        type=float,
        metavar="SHARE",
        help="take channels out until this share of the multiply-accumulates is gone, and train on",
    )
    parser.add_argument(
        "--distill", default="", metavar="TEACHER", help="bundle to learn from in training on"
    )
    parser.add_argument("--minutes", type=float, help="train on for so long")
    parser.add_argument(
        "--data",
        type=as_names,
        help=f"data to train on, several in turn (default: {','.join(TUNING.data)})",
    )
    parser.add_argument("--lr", type=float, help=f"highest learning rate (default: {TUNING.lr:g})")
    parser.add_argument(
        "--config", type=Path, help="YAML file of further settings, as of waste-seg train"
    )
    parser.add_argument("--run", type=Path, help="folder to keep the run in (default: not kept)")
    parser.add_argument("--f16", action="store_true", help="store kernels as half floats")
    parser.add_argument("--int8", action="store_true", help="compute in 8-bit integers")
    parser.add_argument(
        "--calibration",
        default=CALIBRATION,
        help="data whose images int8 is calibrated on (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-float",
        type=as_names,
        default=(),
        metavar="PARTS",
        help="parts of names of steps of the graph that int8 leaves in float, such as "
        "trunk/down1/,trunk/up5/",
    )
    parser.add_argument(
        "--validation",
        default=VALIDATION,
        help="data that the loss is measured on (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``waste-seg compress``; 1 on an error."""
    try:
        bundle = open_bundle(args.model)
        steps = plan(args, bundle)
        for spec in (args.validation, args.calibration):  # before anything takes its time
            open_data(spec, bundle.manifest.classes, finite=True)
        take_steps(bundle, steps, args.output, args.name or bundle.manifest.name, args.validation)
    except (ValueError, OSError, TrainingError) as error:
        print(f"waste-seg compress: {error}", file=sys.stderr)
        return 1
    return 0
