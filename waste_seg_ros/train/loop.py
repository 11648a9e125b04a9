"""The training loop: ``waste-seg train``.

A run is a folder::

    config.yaml            the settings it was started with
    log.jsonl              one line per report: step, losses, learning rate, images/s, validation
    curves.png             the same, drawn
    tensorboard/           the same for TensorBoard, if asked for
    checkpoint-<step>/     weights, their moving average, optimizer, generator (safetensors) and
                           state.json; written whole or not at all, the newest two are kept
    validation.json        when finished: the figures of `waste-seg eval` on the held-out data, and
                           charts beside it: which class was taken for which, calibration
    worst/                 the worst frames, truth beside prediction

Everything that is drawn at random for a batch depends on the seed and the batch's number alone, so
a resumed run sees the data the unbroken one would have seen.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from waste_seg_ros.cli import as_names, as_size
from waste_seg_ros.data.sample import CLASSES, IGNORE, Sample
from waste_seg_ros.data.sources import SPECS, Mixture, Samples, open_data, tell_problems
from waste_seg_ros.files import write_png
from waste_seg_ros.models import (
    TRUNKS,
    SegmentationModel,
    build_model,
    decide,
    fit,
    load_weights,
)
from waste_seg_ros.perception.scaling import scale_ids, scale_image
from waste_seg_ros.runtime import HEADS
from waste_seg_ros.runtime.bundle import MEAN, STD, write_atomically
from waste_seg_ros.train.augment import augment
from waste_seg_ros.train.evaluate import evaluate, model_predictor, write_report
from waste_seg_ros.train.losses import (
    LOSSES,
    DistillSettings,
    LossSettings,
    distill_loss,
    total_loss,
)
from waste_seg_ros.train.memory import is_out_of_memory, limited_memory, release
from waste_seg_ros.train.start import (
    FROZEN,
    Teacher,
    freeze,
    open_teacher,
    start_from,
    watch_deep,
)
from waste_seg_ros.train.targets import make_targets

KEPT_CHECKPOINTS = 2
_PREFIX = "checkpoint-"


class TrainingError(RuntimeError):
    """Training cannot start or cannot go on; the message says what to do."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; every one is a flag of ``waste-seg train`` and a key of its YAML file.

    Sizes are "WIDTHxHEIGHT" in pixels, multiples of the stride. Exactly one of ``steps`` and
    ``minutes`` is above 0: the schedule runs over so many steps, or over so much wall time.
    """

    architecture: str = "enet"
    heads: tuple[str, ...] = HEADS
    classes: tuple[str, ...] = CLASSES
    width: float = 1.0
    data: tuple[str, ...] = ("synthetic:1",)
    validation: str = "synthetic:900001:150"
    categories: str = ""
    strict: bool = False
    sizes: tuple[str, ...] = ("320x240", "320x176", "256x256")
    batch: int = 12
    steps: int = 0
    minutes: float = 0.0
    optimizer: str = "adamw"
    schedule: str = "cosine"
    lr: float = 4e-3
    weight_decay: float = 1e-4
    warmup: float = 0.03
    clip: float = 5.0
    ema: float = 0.998
    gamma: float = 2.0
    loss: str = LOSSES[0]
    guides: float = 0.4
    dropout: float = 0.0
    class_balance: float = 0.5
    bf16: bool = True
    compile: bool = False
    threads: int = 1
    workers: int = 1
    seed: int = 0
    checkpoint_seconds: float = 60.0
    validate_steps: int = 500
    log_steps: int = 20
    tensorboard: bool = False
    worst: int = 8
    device: str = "auto"
    init: str = ""
    encoder: str = ""
    freeze: str = FROZEN[0]
    teacher: str = ""
    distill: float = 1.0


# --------------------------------------------------------------------------------------------------
# Data


def parse_size(text: str, stride: int = 8) -> tuple[int, int]:
    """(width, height) of "320x240". Raises TrainingError unless both are multiples of stride."""
    try:
        width, height = as_size(text)
    except argparse.ArgumentTypeError as error:
        raise TrainingError(f"size {error}") from None
    if width % stride or height % stride:
        raise TrainingError(f"size {text!r}: both sides must be multiples of {stride}")
    return width, height


def rounded_up(sizes: Sequence[str], stride: int) -> tuple[str, ...]:
    """``sizes`` with both sides raised to multiples of ``stride``."""
    pairs = (parse_size(size, 1) for size in sizes)
    return tuple(f"{-(-w // stride) * stride}x{-(-h // stride) * stride}" for w, h in pairs)


def _open_data(config: TrainConfig) -> Mixture:
    """What the settings say to train on."""
    return Mixture.open(
        config.data,
        config.classes,
        seed=config.seed,
        categories=config.categories or None,
        strict=config.strict,
    )


def _held_out(config: TrainConfig, size: tuple[int, int], quiet: bool) -> Samples:
    """Samples to validate on; the first 100 of data without end."""
    data = open_data(
        config.validation,
        config.classes,
        categories=config.categories or None,
        strict=config.strict,
        size=size,
    )
    some = itertools.islice(data, len(data) or 100)
    samples = Samples((fit_sample(sample, size) for sample in some), data.things)
    _tell(config.validation, data.problems, quiet)
    if not samples:
        raise TrainingError(f"validation {config.validation}: no image in it can be read")
    return samples


def _tell(what: str, problems: Sequence[str], quiet: bool) -> None:
    lines = [] if quiet else tell_problems(problems)
    for line in lines:
        print(f"{what}: {line}" if line is lines[0] else line, file=sys.stderr)


def fit_sample(sample: Sample, size: tuple[int, int]) -> Sample:
    """``sample`` scaled to ``size`` (width, height), for validation; aspect is not kept."""
    if sample.labels.shape == (size[1], size[0]):
        return sample
    return Sample(
        scale_image(sample.image, size),
        scale_ids(sample.labels, size),
        scale_ids(sample.instances, size),
        sample.name,
    )


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """A batch of samples of one size: `make_targets` of each, and ``image`` (N, H, W, 3) uint8."""
    targets = [make_targets(s.labels, s.instances) for s in samples]
    batch = {key: torch.from_numpy(np.stack([t[key] for t in targets])) for key in targets[0]}
    batch["image"] = torch.from_numpy(np.stack([s.image for s in samples]))
    return batch


class _Batches(Dataset[dict[str, Tensor]]):
    """Batch number -> batch of augmented samples; depends on the seed and the number alone."""

    def __init__(self, config: TrainConfig) -> None:
        self.seed = config.seed
        self.batch = config.batch
        self.sizes = [parse_size(s, _stride(config)) for s in config.sizes]
        self.data = _open_data(config)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        draw = np.random.default_rng([self.seed, number])
        # The first size makes half of the batches.
        first = len(self.sizes) == 1 or draw.random() < 0.5
        size = self.sizes[0 if first else int(draw.integers(1, len(self.sizes)))]
        samples = []
        for index in range(number * self.batch, (number + 1) * self.batch):
            rng = np.random.default_rng([self.seed, number, index])
            samples.append(augment(self.data.sample(index, size), rng, size))
        return collate(samples)


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole group; the trainer decides what comes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stride(config: TrainConfig) -> int:
    return TRUNKS[config.architecture].stride


def make_batches(config: TrainConfig, first: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches from number ``first``."""

    def numbers() -> Iterator[int]:
        number = first
        while True:
            yield number
            number += 1

    loader = DataLoader(
        _Batches(config),
        batch_size=None,
        sampler=numbers(),
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        worker_init_fn=_start_worker,
        # Its own, as it draws a seed for the workers: the trainer's draws are to be the same
        # whenever the loader was made.
        generator=torch.Generator(),
        pin_memory=choose_device(config.device).type == "cuda",
    )
    return iter(loader)


def _next(loader: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The next batch. Raises TrainingError for what went wrong in a worker, in a line."""
    try:
        return next(loader)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        text = str(error).strip()
        if is_out_of_memory(error) or text.startswith("DataLoader worker"):
            raise TrainingError(
                "a data worker died, most likely out of memory; take fewer --workers, smaller "
                "--sizes or smaller images"
            ) from error
        if text.startswith("Caught "):  # and the worker's traceback
            text = text.splitlines()[-1].partition(": ")[2]
        raise TrainingError(text) from error


def class_weights(shares: NDArray[np.float64], exponent: float) -> NDArray[np.float32]:
    """Loss factor per label, share^-exponent, scaled so that the mean over pixels is 1.

    ``exponent`` 0 weighs all alike, 1 gives every class the same total.
    """
    weights = np.maximum(shares, 1e-3) ** -exponent
    return (weights / (weights * shares).sum()).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# Parts of a step


def choose_device(name: str) -> torch.device:
    """The device of "cpu", "cuda" or "auto", which takes the GPU where torch has one.

    Training on a GPU is not tested. Raises TrainingError if torch has none.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise TrainingError("device cuda: this torch finds no GPU; take --device cpu")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def schedule_factor(kind: str, fraction: float, warmup: float) -> float:
    """Learning rate's factor after ``fraction`` (0..1) of the run.

    Linear over the first ``warmup``, then "cosine" (to 0.01), "poly" (power 0.9) or "constant".
    """
    if fraction < warmup:
        return max(0.01, fraction / warmup)
    rest = min(1.0, (fraction - warmup) / max(1e-9, 1.0 - warmup))
    if kind == "cosine":
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * rest))
    if kind == "poly":
        return max(0.01, (1.0 - rest) ** 0.9)
    return 1.0


def normalise(image: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 RGB to (N, 3, H, W) float32 as the networks take it (channels last)."""
    mean, std = (torch.tensor(v, device=image.device) * 255 for v in (MEAN, STD))
    return ((image.float() - mean) / std).permute(0, 3, 1, 2)


def scale_dropout(model: nn.Module, factor: float) -> None:
    """Multiplies the dropout rates of ``model``'s blocks by ``factor``, in place."""
    for module in model.modules():
        rate = getattr(module, "dropout", None)
        if isinstance(rate, float):
            setattr(module, "dropout", rate * factor)  # noqa: B010 (nn.Module types it as a module)


class Average:
    """Exponential moving average of a model's weights and statistics.

    Early on the decay is (1 + step) / (10 + step), so that the fresh weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards the model's state."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = [], []
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                ours.append(self.state[key])
                theirs.append(value)
            else:
                self.state[key].copy_(value)
        torch._foreach_lerp_(ours, theirs, 1.0 - decay)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum; no decay on what is not a convolution's kernel."""
    kernels = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": kernels, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)


def validate(
    model: SegmentationModel, samples: Sequence[Sample], batch: int = 10
) -> dict[str, float]:
    """Figures of ``model`` (in eval mode) on ``samples`` of one size.

    By head: ``miou`` over the classes and background and ``iou/<class>``; ``binary_iou`` of the
    foreground; ``offset_px``, the mean distance of the offsets from the truth on the items.
    """
    count = len(model.classes) + 1
    confusion = np.zeros((count, count), np.int64)
    overlap = union = 0
    distance, weight = 0.0, 0.0
    device = next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(samples), batch):
            data = collate(samples[start : start + batch])
            outputs = model(normalise(data["image"].to(device)))
            outputs = {key: value.cpu() for key, value in outputs.items()}
            labels = data["labels"].numpy()
            if "semantic" in outputs:
                found = decide(outputs)[0].numpy()
                known = labels < count
                pairs = labels[known].astype(np.int64) * count + found[known]
                confusion += np.bincount(pairs, minlength=count**2).reshape(count, count)
            seen, item = labels != IGNORE, (labels != 0) & (labels != IGNORE)
            positive = (outputs["binary"][:, 0] > 0).numpy() & seen
            overlap += int((positive & item).sum())
            union += int((positive | item).sum())
            if "offsets" in outputs:
                on_item = data["offset_weight"][:, 0] > 0
                error = (outputs["offsets"] - data["offsets"]).square().sum(1).sqrt()
                distance += float(error[on_item].sum())
                weight += float(on_item.sum())
    figures: dict[str, float] = {}
    if model.semantic is not None:
        both = np.diag(confusion)
        either = confusion.sum(0) + confusion.sum(1) - both
        iou = both / np.maximum(either, 1)
        figures["miou"] = float(iou[either > 0].mean()) if (either > 0).any() else 0.0
        for name, value in zip(("background", *model.classes), iou, strict=True):
            figures[f"iou/{name}"] = float(value)
    figures["binary_iou"] = overlap / max(1, union)
    if model.instance is not None:
        figures["offset_px"] = distance / max(1.0, weight)
    return figures


# --------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    average: Average,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> Path:
    """Writes ``run/checkpoint-<step>`` whole or not at all and drops all but the newest."""
    moments: dict[str, Tensor] = {}
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            moments[f"{number}/{key}"] = torch.as_tensor(value).contiguous()
    moments["generator"] = torch.get_rng_state()
    if torch.cuda.is_available():
        moments["cuda_generator"] = torch.cuda.get_rng_state()

    def write(folder: Path) -> None:
        for name, tensors in (
            ("model", model.state_dict()),
            ("average", average.state),
            ("optimizer", moments),
        ):
            plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            save_file(plain, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))

    path = run / f"{_PREFIX}{step:08d}"
    if not path.exists():
        write_atomically(path, write)
    for old in find_checkpoints(run)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def find_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(p for p in run.glob(f"{_PREFIX}*") if p.name[len(_PREFIX) :].isdigit())


def load_checkpoint(
    path: Path,
    model: nn.Module,
    average: Average,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Restores a checkpoint in place, the random generator too; returns its state.json."""
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
        saved_average = load_file(path / "average.safetensors")
        for key, value in average.state.items():
            value.copy_(saved_average[key])
        moments = load_file(path / "optimizer.safetensors")
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise TrainingError(f"{path}: not a checkpoint of this model: {error}") from error
    torch.set_rng_state(moments.pop("generator"))
    if (cuda := moments.pop("cuda_generator", None)) is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    saved = optimizer.state_dict()
    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    restored: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        number, _, name = key.partition("/")
        like = parameters[int(number)]
        if value.shape == like.shape:
            # In the parameter's memory layout: the fused optimizer goes through both in order.
            value = torch.empty_like(like).copy_(value)
        restored.setdefault(int(number), {})[name] = value
    saved["state"] = restored
    optimizer.load_state_dict(saved)
    return state


def read_run(
    run: Path, model: SegmentationModel | None = None
) -> tuple[TrainConfig, SegmentationModel, dict[str, Any]]:
    """A run's settings, its model with the averaged weights (eval mode), and its state.

    ``model``: takes the weights, in place, if the run trained one that was given to it.
    """
    config = read_config(run / "config.yaml", TrainConfig())
    checkpoints = find_checkpoints(run)
    if not checkpoints:
        raise TrainingError(f"{run}: no {_PREFIX}* in it; is it the folder of a training run?")
    try:
        weights = load_file(checkpoints[-1] / "average.safetensors")
        if model is None:
            guides = any(key.startswith("guides.") for key in weights)
            model = build_model(
                config.architecture, config.heads, config.classes, config.width, guides
            )
        load_weights(model, weights)
        state: dict[str, Any] = json.loads((checkpoints[-1] / "state.json").read_text())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise TrainingError(f"{checkpoints[-1]}: cannot be read: {error}") from error
    return config, model.eval(), state


def read_config(path: Path, base: TrainConfig) -> TrainConfig:
    """``base`` with the keys of a YAML file. Raises TrainingError naming file and key."""
    try:
        read = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise TrainingError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise TrainingError(f"{path}: expected a mapping of settings")
    values: dict[str, Any] = {}
    kinds = {f.name: type(getattr(base, f.name)) for f in fields(base)}
    for key, value in read.items():
        if key not in kinds:
            raise TrainingError(f"{path}: unknown setting {key!r}; known: {', '.join(kinds)}")
        kind = kinds[key]
        if kind is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
            values[key] = tuple(value)
        elif kind is float and type(value) in (int, float):
            values[key] = float(value)
        elif kind is not tuple and type(value) is kind:
            values[key] = value
        else:
            what = "list of strings" if kind is tuple else kind.__name__
            raise TrainingError(f"{path}: {key} must be a {what}, not {value!r}")
    return replace(base, **values)


# --------------------------------------------------------------------------------------------------
# Log and curves


class RunLog:
    """The run's log.jsonl and, if asked for, its curves in TensorBoard's format.

    ``step``: of a resumed run; what TensorBoard has from there on is dropped from its curves.
    """

    def __init__(self, run: Path, tensorboard: bool, step: int) -> None:
        _cut_log(run / "log.jsonl", step)
        self._lines = (run / "log.jsonl").open("a", buffering=1)
        self._board = _board(run / "tensorboard", step) if tensorboard else None

    def write(self, step: int, **entry: Any) -> None:
        """Adds a line; numbers, and mappings to numbers, become curves by their names."""
        self._lines.write(json.dumps({"step": step, **entry}) + "\n")
        if self._board is None:
            return
        for key, value in entry.items():
            curves = value if isinstance(value, Mapping) else {"": value}
            for name, number in curves.items():
                self._board.add_scalar(f"{key}/{name}" if name else key, number, step)
        self._board.flush()

    def close(self) -> None:
        """Closes the files."""
        self._lines.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            f"--tensorboard: {error}; pip install tensorboard, or go without (the curves are "
            "in curves.png and log.jsonl as well)"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def draw_curves(log: Path, output: Path) -> None:
    """Draws the losses (logarithmic) and the validation figures of a log.jsonl over steps."""
    entries = []
    for line in log.read_text().splitlines():
        # The last line of a run that was killed may be cut off.
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    losses: dict[str, list[tuple[float, float]]] = {}
    figures: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        for key, value in entry.get("losses", {}).items():
            losses.setdefault(key, []).append((entry["step"], math.log10(max(value, 1e-5))))
        for key, value in entry.get("validation", {}).items():
            if 0 <= value <= 1 and not key.endswith("_px"):
                figures.setdefault(key, []).append((entry["step"], value))
    panels = [_panel("loss (log10)", losses), _panel("validation IoU", figures, (0.0, 1.0))]
    write_png(output, np.vstack(panels)[..., ::-1])


def _panel(
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    limits: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    width, height, left, right, top, bottom = 1000, 380, 60, 180, 30, 30
    canvas = np.full((height, width, 3), 255, np.uint8)

    def write(text: str, x: int, y: int, colour: tuple[int, int, int] = (60, 60, 60)) -> None:
        cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)

    write(title, left, 20)
    points = [point for curve in curves.values() for point in curve]
    last = max((step for step, _ in points), default=1.0) or 1.0
    low, high = limits or (
        min((v for _, v in points), default=0.0),
        max((v for _, v in points), default=1.0),
    )
    high = max(high, low + 1e-3)
    inner_w, inner_h = width - left - right, height - top - bottom
    for part in range(5):
        y = top + inner_h - inner_h * part // 4
        cv2.line(canvas, (left, y), (left + inner_w, y), (225, 225, 225), 1)
        write(f"{low + (high - low) * part / 4:.2f}", 12, y + 4)
        x = left + inner_w * part // 4
        write(f"{last * part / 4:.0f}", x - 10, height - 10)
    for number, (name, curve) in enumerate(curves.items()):
        hue = np.array([[[number * 179 // max(1, len(curves)), 200, 190]]], np.uint8)
        b, g, r = (int(c) for c in cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0])
        line = np.array(
            [
                (left + inner_w * s / last, top + inner_h * (1 - (v - low) / (high - low)))
                for s, v in curve
            ]
        )
        cv2.polylines(canvas, [line.astype(np.int32)], False, (b, g, r), 1, cv2.LINE_AA)
        value = 10 ** curve[-1][1] if limits is None else curve[-1][1]
        write(f"{name} {value:.3f}", left + inner_w + 8, top + 14 + 18 * number, (b, g, r))
    return canvas


# --------------------------------------------------------------------------------------------------
# A step


class NotFinite(ArithmeticError):
    """A loss or the gradient is no number.

    Attributes:
        losses: by name.
    """

    def __init__(self, losses: Mapping[str, float]) -> None:
        super().__init__(f"not finite: {losses}")
        self.losses = losses


def learns_in_bf16(model: nn.Module) -> bool:
    """Whether oneDNN gives numbers for all of a network's gradients in bfloat16.

    Those of dilated convolutions are none at channel counts such as 24, 40 and 56, which other
    widths than 1, and pruning, leave (seen with torch 2.13): 8 and multiples of 16 are sound.
    """
    return all(
        count == 8 or count % 16 == 0
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and max(module.dilation) > 1
        for count in (module.in_channels, module.out_channels)
    )


class Learner:
    """A network and what it takes for it to learn from a batch.

    Attributes:
        optimizer: of the network's weights.
        class_weights: factor on the loss by label, (C+1,), or None.
    """

    def __init__(
        self, config: TrainConfig, model: SegmentationModel, teacher: Teacher | None = None
    ) -> None:
        self.model = model
        self.optimizer = make_optimizer(model, config)
        self.class_weights: Tensor | None = None
        if teacher is None and config.teacher:
            teacher = open_teacher(config.teacher, config.classes)
        self._teacher = teacher
        self._deep = watch_deep(model) if teacher else {}
        self._forward: Any = torch.compile(model, dynamic=True) if config.compile else model
        self._device = next(model.parameters()).device
        self._config = config
        self._bf16 = config.bf16 and (self._device.type != "cpu" or learns_in_bf16(model))
        self._losses = LossSettings(kind=config.loss, gamma=config.gamma, guides=config.guides)

    def learn(self, batch: Mapping[str, Tensor], rate: float) -> dict[str, float]:
        """Takes a step of learning rate ``rate``; returns the losses.

        Raises NotFinite, with the weights as they were.
        """
        config, device = self._config, self._device
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        image = normalise(batch["image"])
        wanted: Mapping[str, Tensor] = {}
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            outputs = self._forward(image)
            if self._teacher:
                with torch.no_grad():
                    wanted = self._teacher(image)
        loss, parts = total_loss(outputs, batch, self._losses, self.class_weights)
        if self._teacher:
            more, learned = distill_loss({**outputs, **self._deep}, wanted, DistillSettings())
            loss, parts = loss + config.distill * more, {**parts, **learned}
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        losses = {"total": float(loss.detach()), **parts}
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip, foreach=True)
        if not (math.isfinite(losses["total"]) and math.isfinite(float(norm))):
            raise NotFinite(losses)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return losses


def try_batch(run: Path, count: int, size: tuple[int, int]) -> None:
    """Learns from a made-up batch of ``count`` images of ``size``, with the settings of ``run``.

    Raises what torch raises if memory does not suffice, or crashes: it is for a process of its own.
    """
    config = read_config(run / "config.yaml", TrainConfig())
    torch.set_num_threads(config.threads or 1)
    device = choose_device(config.device)
    model = build_model(config.architecture, config.heads, config.classes, config.width, True)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    width, height = size
    rng = np.random.default_rng(0)
    sample = Sample(
        rng.integers(0, 256, (height, width, 3), np.uint8),
        rng.integers(0, len(config.classes) + 1, (height, width), np.uint8),
        np.zeros((height, width), np.uint16),
    )
    with limited_memory():
        batch = collate([sample] * count)
        learner = Learner(replace(config, compile=False), model.train())
        for _ in range(2):
            learner.learn(batch, 1e-9)


# --------------------------------------------------------------------------------------------------
# The run


def check_config(config: TrainConfig) -> None:
    """Raises TrainingError naming the first setting that cannot be."""
    if config.architecture not in TRUNKS:
        raise TrainingError(f"architecture {config.architecture!r}; known: {', '.join(TRUNKS)}")
    for name, choices in (
        ("optimizer", ("adamw", "sgd")),
        ("schedule", ("cosine", "poly", "constant")),
        ("loss", LOSSES),
        ("freeze", FROZEN),
        ("device", ("auto", "cpu", "cuda")),
    ):
        if getattr(config, name) not in choices:
            raise TrainingError(f"{name} {getattr(config, name)!r}; known: {', '.join(choices)}")
    if (config.steps > 0) == (config.minutes > 0) or not math.isfinite(config.minutes):
        raise TrainingError("give either steps or minutes: how long to train")
    for name, least in (
        ("batch", 2),
        ("log_steps", 1),
        ("validate_steps", 1),
        ("workers", 0),
        ("threads", 0),
        ("seed", 0),
        ("worst", 0),
    ):
        if getattr(config, name) < least:
            raise TrainingError(f"{name} must be at least {least}, not {getattr(config, name)}")
    if not 0 <= config.dropout <= 5:
        raise TrainingError(f"dropout must be 0 to 5, not {config.dropout}")
    for name in ("lr", "clip", "checkpoint_seconds"):
        if not (getattr(config, name) > 0 and math.isfinite(getattr(config, name))):
            raise TrainingError(f"{name} must be above 0, not {getattr(config, name)}")
    for name in ("guides", "distill", "gamma", "weight_decay", "class_balance"):
        if not (getattr(config, name) >= 0 and math.isfinite(getattr(config, name))):
            raise TrainingError(f"{name} must be at least 0, not {getattr(config, name)}")
    for name in ("warmup", "ema"):
        if not 0 <= getattr(config, name) < 1:
            raise TrainingError(f"{name} must be in [0, 1), not {getattr(config, name)}")
    if not config.sizes or not config.data:
        raise TrainingError("sizes and data must name at least one each")
    for size in config.sizes:
        parse_size(size, _stride(config))


class _Stop:
    """Turns the first SIGINT or SIGTERM into a flag that the loop looks at between steps."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> _Stop:
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: object) -> None:
        if self.signal:  # asked twice: at once
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *error: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class TrainResult:
    """What a call of `train` came to. ``finished`` is false if it was stopped by a signal."""

    step: int
    finished: bool
    figures: dict[str, float]


def train(
    config: TrainConfig,
    run: Path,
    resume: bool = False,
    until_step: int = 0,
    quiet: bool = False,
    batches: Callable[[TrainConfig, int], Iterator[dict[str, Tensor]]] = make_batches,
    teacher: Teacher | None = None,
    model: SegmentationModel | None = None,
) -> TrainResult:
    """Trains into the folder ``run``.

    Args:
        config: the settings; on ``resume`` those of the run are to be given (`read_config`).
        run: the run's folder; must not hold a run already unless ``resume``.
        resume: go on from the newest checkpoint.
        until_step: leave off (with a checkpoint) at this step though the schedule goes on.
        quiet: no progress bar.
        batches: endless iterator of batches from a number on.
        teacher: what to distil from, see `Teacher`; None opens the bundle that ``config`` names,
            if any.
        model: the network to train, in place, from its weights (``init`` and ``encoder`` are not
            read), of the settings' heads and classes; None makes one of the settings. On
            ``resume`` one of the same channels is to be given again, and to `read_run` as well.

    Raises:
        TrainingError: bad settings, an unusable folder, or a loss that is no number: the message
            names the batch, and the newest checkpoint is one from before.
    """
    check_config(config)
    checkpoints = find_checkpoints(run)
    if checkpoints and not resume:
        raise TrainingError(f"{run}: holds a run already; --resume it or choose another folder")
    if resume and not checkpoints:
        raise TrainingError(f"{run}: no checkpoint to resume from")
    device = choose_device(config.device)
    run.mkdir(parents=True, exist_ok=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    cv2.setNumThreads(0)
    model = _make_model(config, fresh=not resume, quiet=quiet) if model is None else model
    if resume:
        with contextlib.suppress(OSError, SafetensorError):  # `load_checkpoint` tells of it
            fit(model, load_file(checkpoints[-1] / "average.safetensors"))
    scale_dropout(model, config.dropout)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    judge = copy.deepcopy(model).eval()
    learner = Learner(config, model, teacher)
    average = Average(model, config.ema)
    step, elapsed = 0, 0.0
    if resume:
        state = load_checkpoint(checkpoints[-1], model, average, learner.optimizer)
        step, elapsed = int(state["step"]), float(state["elapsed"])
        weights = np.asarray(state["class_weights"], np.float32)
    else:
        weights = _measure_classes(config, quiet)
    log = RunLog(run, config.tensorboard, step)
    if not resume:
        (run / "config.yaml").write_text(
            yaml.safe_dump(
                {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()},
                sort_keys=False,
            )
        )
    held_out = _held_out(config, parse_size(config.sizes[0], _stride(config)), quiet)

    learner.class_weights = torch.from_numpy(weights).to(device)
    history: deque[dict[str, float]] = deque(maxlen=config.log_steps)
    figures: dict[str, float] = {}
    started = time.monotonic() - elapsed
    saved_at = window_at = time.monotonic()
    window_images = 0
    waited = 0.0
    loader = batches(config, step)
    model.train()
    freeze(model, config.freeze)
    bar = tqdm(
        total=config.steps or round(config.minutes * 60),
        initial=min(step, config.steps) if config.steps else round(elapsed),
        unit="step" if config.steps else "s",
        disable=quiet,
        dynamic_ncols=True,
        mininterval=1.0,
        # Into a file, a line now and then is enough.
        miniters=1,
        bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}",
    )

    def save() -> None:
        # Statistics can overflow where no loss shows it, as training does not use their average.
        bad = next((k for k, v in average.state.items() if not bool(v.isfinite().all())), "")
        if bad:
            raise TrainingError(
                f"after batch {step - 1}, {bad} of the network is no number. {_last_good(run)} "
                "Lower the learning rate (--lr)."
            )
        save_checkpoint(
            run,
            step,
            model,
            average,
            learner.optimizer,
            {
                "elapsed": time.monotonic() - started,
                "class_weights": [float(w) for w in weights],
                "figures": figures,
                "images": step * config.batch,
            },
        )

    def judge_now() -> dict[str, float]:
        judge.load_state_dict(average.state)
        return validate(judge, held_out)

    finished = False
    with (
        _Stop() as stop,
        contextlib.closing(bar),
        contextlib.closing(log),
        limited_memory() if device.type == "cpu" else contextlib.nullcontext(),
    ):
        while True:
            now = time.monotonic()
            elapsed = now - started
            fraction = step / config.steps if config.steps else elapsed / (config.minutes * 60)
            finished = fraction >= 1.0
            if finished or stop.signal or (until_step and step >= until_step):
                break
            rate = config.lr * schedule_factor(config.schedule, fraction, config.warmup)
            batch = _next(loader)
            waited += time.monotonic() - now
            try:
                losses = learner.learn(batch, rate)
            except NotFinite as error:
                raise TrainingError(_nan_report(run, config, step, error.losses)) from None
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                losses = None  # no more in here: the error's traceback holds on to the tensors
            if losses is None:
                raise TrainingError(_memory_report(run, batch["image"].shape, quiet))
            history.append(losses)
            step += 1
            average.update(model, step)
            window_images += len(batch["image"])
            if step % config.log_steps == 0 or (config.steps and step == config.steps):
                now = time.monotonic()
                entry = _summary(history)
                speed = window_images / (now - window_at)
                share = waited / (now - window_at)
                window_at, window_images, waited = now, 0, 0.0
                log.write(
                    step,
                    elapsed=round(now - started, 1),
                    lr=rate,
                    losses=entry,
                    images_per_second=round(speed, 2),
                    waiting_for_data=round(share, 3),
                )
                bar.set_postfix_str(_status(step, speed, entry, figures), refresh=False)
            bar.n = step if config.steps else min(bar.total, round(time.monotonic() - started))
            if step % 5 == 0:
                bar.refresh()
            if step % config.validate_steps == 0:
                pause = time.monotonic()
                figures = judge_now()
                log.write(step, elapsed=round(pause - started, 1), validation=figures)
                draw_curves(run / "log.jsonl", run / "curves.png")
                window_at += time.monotonic() - pause
            if time.monotonic() - saved_at > config.checkpoint_seconds:
                save()
                saved_at = time.monotonic()
        if finished and (step % config.validate_steps or not figures):
            figures = judge_now()
            log.write(step, elapsed=round(elapsed, 1), validation=figures)
        save()
    draw_curves(run / "log.jsonl", run / "curves.png")
    if finished:
        report(judge, held_out, run, config.worst)
    return TrainResult(step, finished, figures)


def report(model: SegmentationModel, samples: Sequence[Sample], run: Path, worst: int) -> None:
    """Measures a trained network as a robot would use it and draws what it does badly.

    Writes ``validation.json`` and charts beside it into ``run``, and the ``worst`` frames into its
    folder ``worst``.
    """
    head = model.heads[-1]  # in the order of HEADS: the one that can do most
    gallery = run / "worst"
    shutil.rmtree(gallery, ignore_errors=True)
    result = evaluate(
        model_predictor(model, head),
        samples,
        head=head,
        classes=model.classes,
        worst=worst,
        gallery=gallery if worst else None,
    )
    write_report(result, run / "validation.json")


def _make_model(config: TrainConfig, fresh: bool, quiet: bool) -> SegmentationModel:
    """The network of the settings; ``fresh``: with the weights that a new run starts from."""
    model = build_model(config.architecture, config.heads, config.classes, config.width, True)
    notes = []
    if fresh and config.init:
        notes.append(start_from(model, config.init))
    if fresh and config.encoder:
        from waste_seg_ros.models.pretrained import load_encoder

        encoder = getattr(model.trunk, "encoder", None)
        if encoder is None:
            raise TrainingError(f"--encoder: {config.architecture} has no VGG-16 or ResNet-50")
        notes.append(load_encoder(encoder, Path(config.encoder)))
    if not quiet:
        for note in notes:
            print(note, file=sys.stderr)
    return model


def _measure_classes(config: TrainConfig, quiet: bool) -> NDArray[np.float32]:
    """Loss factors of the labels from the shares in 64 samples."""
    count = len(config.classes) + 1
    pixels = np.zeros(count, np.float64)
    size = parse_size(config.sizes[0], _stride(config))
    data = _open_data(config)
    _tell(",".join(config.data), data.problems, quiet)
    for index in range(64):
        pixels += np.bincount(data.sample(index, size).labels.ravel(), minlength=256)[:count]
    if "semantic" in config.heads and not pixels[1:].any():
        raise TrainingError(
            f"data {','.join(config.data)}: nothing in 64 samples is of the classes "
            f"{', '.join(config.classes)}; name the data's with --classes, or map COCO's "
            "categories with --categories"
        )
    return class_weights(pixels / max(1.0, pixels.sum()), config.class_balance)


def _summary(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([entry[key] for entry in history])), 5) for key in history[0]}


def _status(
    step: int, speed: float, losses: Mapping[str, float], figures: Mapping[str, float]
) -> str:
    text = f"step {step} {speed:.1f} img/s " + " ".join(f"{k} {v:.3f}" for k, v in losses.items())
    return text + "".join(
        f" | {k} {figures[k]:.3f}" for k in ("miou", "binary_iou", "offset_px") if k in figures
    )


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines after ``step``: they are of steps that the resumed run does again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    path.write_text("".join(kept))


def _nan_report(run: Path, config: TrainConfig, number: int, losses: Mapping[str, float]) -> str:
    bad = [k for k, value in losses.items() if k != "total" and not math.isfinite(value)]
    first = number * config.batch
    data = _open_data(config)
    names = [data.sample(first + k).name for k in range(config.batch)]
    return (
        f"the loss is no number ({losses['total']}, from: {', '.join(bad) or 'the gradient'}) at "
        f"batch {number}, samples {first} to {first + config.batch - 1} of "
        f"{', '.join(config.data)} ({', '.join(names)}). {_last_good(run)} Lower the learning rate "
        "(--lr) or look at these samples."
    )


def _memory_report(run: Path, shape: Sequence[int], quiet: bool) -> str:
    """What to say when a batch (N, H, W, 3) was too large to learn from: which would not be.

    The halves of it are tried in processes of their own, as torch may crash without memory.
    """
    release()
    whole, height, width = shape[:3]
    tried = "import sys; from pathlib import Path; from waste_seg_ros.train.loop import try_batch; "
    tried += "try_batch(Path(sys.argv[1]), int(sys.argv[2]), (int(sys.argv[3]), int(sys.argv[4])))"
    count = whole // 2
    if not quiet:
        print("out of memory; looking for a batch that fits ...", file=sys.stderr)
    while count >= 2:
        words = [sys.executable, "-c", tried, str(run), str(count), str(width), str(height)]
        if subprocess.run(words, capture_output=True).returncode == 0:
            advice = f"{count} does: --batch {count}"
            break
        count //= 2
    else:
        advice = "nor do 2 images: choose smaller --sizes or a smaller --width"
    return f"batch {whole} at {width}x{height} does not fit in memory; {advice}. {_last_good(run)}"


def _last_good(run: Path) -> str:
    kept = find_checkpoints(run)
    return f"The last good checkpoint is {kept[-1]}." if kept else "No checkpoint was made yet."


# --------------------------------------------------------------------------------------------------
# Command line


_HELP = {
    "architecture": f"one of {', '.join(TRUNKS)}",
    "heads": "heads to train on one trunk, of " + ",".join(HEADS),
    "classes": "class names, in the order of their label ids",
    "width": "factor on the trunk's channels",
    "data": f"{SPECS}; several, each with @WEIGHT if they are not to count alike",
    "validation": "held-out data, likewise one",
    "categories": "class of each COCO category: a YAML file, or zerowaste, taco or resortit",
    "strict": "stop at broken data instead of passing it over",
    "sizes": "sizes of the batches; half of them have the first. The default is rounded up to "
    "what the architecture takes",
    "batch": "images a step",
    "steps": "train for so many steps",
    "minutes": "train for so long; the schedule follows the clock",
    "optimizer": "adamw or sgd",
    "schedule": "cosine, poly or constant",
    "lr": "highest learning rate",
    "weight_decay": "on the convolutions' kernels",
    "warmup": "share of the run over which the learning rate rises",
    "clip": "largest norm of the gradient",
    "ema": "decay of the moving average of the weights",
    "gamma": "exponent of the focal losses",
    "loss": "one of " + ", ".join(LOSSES),
    "guides": "factor on the losses of the guides that ICNet and BiSeNet train with",
    "dropout": "factor on the paper's dropout rates; endless synthetic data needs none",
    "class_balance": "0: pixels count alike, 1: classes do",
    "bf16": "bfloat16 where it is safe",
    "compile": "torch.compile (needs a C++ compiler; minutes to start, then faster)",
    "threads": "threads of the trainer (0: torch's choice)",
    "workers": "processes that make the data",
    "seed": "of weights, order and augmentation",
    "checkpoint_seconds": "between checkpoints",
    "validate_steps": "between validations",
    "log_steps": "between lines of the log",
    "tensorboard": "write for TensorBoard too, into the run's folder",
    "worst": "so many of the worst held-out frames are drawn at the end",
    "device": "auto, cpu or cuda",
    "init": "bundle to start from; its classes are matched by name",
    "encoder": "file of ImageNet weights for a VGG-16 or ResNet-50 encoder",
    "freeze": "what of the network is kept as it is: " + ", ".join(FROZEN),
    "teacher": "bundle to distil from",
    "distill": "factor on what is learned from the teacher",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``waste-seg train``."""
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from its newest checkpoint")
    parser.add_argument("--config", type=Path, help="YAML file of settings; flags go before it")
    parser.add_argument("--name", help="bundles are named NAME-HEAD (default: the architecture)")
    parser.add_argument(
        "--output", type=Path, help="folder for the bundles, one per head (default: RUN/bundles)"
    )
    defaults = TrainConfig()
    for field in fields(defaults):
        flag = "--" + field.name.replace("_", "-")
        value = getattr(defaults, field.name)
        shown = ",".join(value) if isinstance(value, tuple) else value
        text = f"{_HELP[field.name]} (default: {shown})" if shown != "" else _HELP[field.name]
        # No default here: only the flags that are given go before the file's.
        if isinstance(value, bool):
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            kind: Callable[[str], Any] = as_names if isinstance(value, tuple) else type(value)
            parser.add_argument(flag, type=kind, default=None, help=text.replace("%", "%%"))


def run(args: argparse.Namespace) -> int:
    """Runs ``waste-seg train``; 0 when finished, 130 when stopped, 1 on an error."""
    from waste_seg_ros.runtime.bundle import BundleError
    from waste_seg_ros.runtime.export import bundle_from_run

    try:
        config = TrainConfig()
        if args.resume:
            config = read_config(args.run / "config.yaml", config)
        if args.config:
            config = read_config(args.config, config)
        given = {f.name: getattr(args, f.name) for f in fields(config)}
        config = replace(config, **{k: v for k, v in given.items() if v is not None})
        if config.sizes == TrainConfig.sizes and config.architecture in TRUNKS:
            config = replace(config, sizes=rounded_up(config.sizes, _stride(config)))
        output, name = args.output or args.run / "bundles", args.name or config.architecture
        bundles = {head: output / f"{name}-{head}" for head in config.heads}
        for path in bundles.values():  # before it takes its time
            if args.output and path.exists():
                raise TrainingError(f"{path}: exists already; choose another --output or --name")
        result = train(config, args.run, args.resume)
        for key, value in result.figures.items():
            print(f"{key:20s} {value:.4f}")
        if not result.finished:
            print(f"stopped at step {result.step}; go on with: --run {args.run} --resume")
            return 130
        for head, path in bundles.items():
            bundle = bundle_from_run(args.run, head, path.name, path)
            print(f"wrote {bundle.path}")
    except (TrainingError, BundleError, ValueError) as error:
        print(f"waste-seg train: {error}", file=sys.stderr)
        return 1
    return 0
