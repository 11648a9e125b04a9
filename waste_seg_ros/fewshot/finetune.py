"""Fine-tuning of the heads and the last blocks from a handful of frames, with rehearsal.

Every batch mixes three sources: the shots themselves, scenes to rehearse (stored exemplars, the
synthetic line) onto which items cut out of the shots are pasted (G. Ghiasi et al., "Simple
Copy-Paste", CVPR 2021), and scenes to rehearse as they are, so that what was known is not forgotten
(A. Robins, "Catastrophic Forgetting, Rehearsal and Pseudorehearsal", 1995). What the operator did
not label in a shot is unknown; where the network is sure of the belt it becomes background.

The encoder and the statistics of all norms stay as they are: a few frames are no basis for them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from waste_seg_ros.data.sample import IGNORE, Sample
from waste_seg_ros.data.sources import Dataset, Mixture
from waste_seg_ros.fewshot.prototypes import FewShotError
from waste_seg_ros.models import SegmentationModel, decide
from waste_seg_ros.train.augment import augment
from waste_seg_ros.train.loop import (
    Average,
    Learner,
    NotFinite,
    TrainConfig,
    class_weights,
    collate,
    fit_sample,
    normalise,
    scale_dropout,
    schedule_factor,
    validate,
)
from waste_seg_ros.train.start import freeze
from waste_seg_ros.train.targets import MIN_PIXELS

SURE = 0.9
"""Probability of the belt from which a pixel that nobody labelled becomes background."""

_MEASURED = 24  # samples that the shares of the classes are taken from


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings.

    Attributes:
        steps: planned.
        seconds: wall time after which it stops, its schedule ended; 0 for none.
        patience: measurements on the held-out samples without a gain after which it stops; 0 for
            never.
        batch: images a step.
        lr: largest learning rate.
        size: (width, height) of the images, multiples of the network's stride.
        shots, pasted, rehearsal: how often each source is drawn from, against the others.
        measure: steps between measurements on the held-out samples.
        freeze: what is kept as it is: "encoder" (heads and last blocks learn) or "trunk" (the
            heads alone).
        bf16: bfloat16 where it is safe.
        threads: of torch; 0 leaves them.
        seed: of all that is drawn.
    """

    steps: int = 120
    seconds: float = 0.0
    patience: int = 0
    batch: int = 8
    lr: float = 1e-3
    size: tuple[int, int] = (320, 240)
    shots: int = 2
    pasted: int = 3
    rehearsal: int = 3
    measure: int = 20
    freeze: str = "encoder"
    bf16: bool = True
    threads: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Where a fine-tuning is.

    Attributes:
        step: steps done.
        steps: steps planned, fewer if the time will not suffice.
        loss: of the last step.
        held_out_iou: mean IoU on the held-out samples over the classes to learn, 0..1; NaN before
            the first measurement or without samples.
        eta: time left [s].
    """

    step: int
    steps: int
    loss: float
    held_out_iou: float
    eta: float


@dataclass(frozen=True, eq=False)
class FineTuned:
    """What came of a fine-tuning.

    Attributes:
        model: the averaged weights, in eval mode; not to be used if it was cancelled.
        stopped: why it ended: "steps", "time", "patience" or "cancelled".
        steps: done.
        seconds: it took.
        loss: of the last steps, mean of up to ten.
        held_out: held-out figures by step, as of `train.loop.validate`.
    """

    model: SegmentationModel
    stopped: str
    steps: int
    seconds: float
    loss: float
    held_out: dict[int, dict[str, float]]


class SampleData:
    """Samples at hand as a source of a `Mixture`; ``classes`` name their labels."""

    things: frozenset[int] = frozenset()

    def __init__(self, samples: Sequence[Sample], classes: Sequence[str]) -> None:
        self.samples = list(samples)
        self.classes = tuple(classes)
        self.problems: list[str] = []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def sample(self, index: int, size: tuple[int, int] | None = None) -> Sample:
        """Sample ``index``, at its own size."""
        return self.samples[index]


@dataclass(frozen=True, eq=False)
class _Cutting:
    """An item cut out: image (h, w, 3) and mask (h, w) of uint8, and its label."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    label: int


class PastedData(SampleData):
    """Scenes of another source with items pasted onto them; endless, as each draw differs."""

    def __init__(
        self,
        shots: Sequence[Sample],
        scenes: Dataset,
        classes: Sequence[str],
        size: tuple[int, int],
        seed: int = 0,
    ) -> None:
        """Cut the items out of ``shots``, as large as they are when those are at ``size``.

        ``scenes`` must have labels of ``classes``.
        """
        super().__init__([], classes)
        self._scenes, self._seed, self._size = scenes, seed, size
        self.cuttings = [c for shot in shots for c in _cut(fit_sample(shot, size))]

    def __len__(self) -> int:
        return 0

    def sample(self, index: int, size: tuple[int, int] | None = None) -> Sample:
        """Scene with one to three items more; equal indices give equal samples."""
        rng = np.random.default_rng([self._seed, 5, index])
        count = len(self._scenes)
        place = int(rng.integers(count)) if count else index
        scene = fit_sample(self._scenes.sample(place, self._size), self._size)
        image, labels = scene.image.copy(), scene.labels.copy()
        instances = scene.instances.copy()
        for _ in range(int(rng.integers(1, 4))):
            cutting = self.cuttings[int(rng.integers(len(self.cuttings)))]
            _paste(image, labels, instances, cutting, rng)
        for number, area in enumerate(np.bincount(instances.ravel())):
            if number and 0 < area < MIN_PIXELS:  # all but covered
                labels[instances == number] = IGNORE
                instances[instances == number] = 0
        return Sample(image, labels, instances, f"{scene.name} pasted {index}")


def _cut(sample: Sample) -> Iterator[_Cutting]:
    for number in np.unique(sample.instances):
        mask = (sample.instances == number).astype(np.uint8)
        label = int(sample.labels[mask > 0][0])
        if number and 0 < label < 254 and int(mask.sum()) >= MIN_PIXELS:
            x, y, w, h = cv2.boundingRect(mask)
            yield _Cutting(sample.image[y : y + h, x : x + w], mask[y : y + h, x : x + w], label)


def _paste(
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    instances: NDArray[np.uint16],
    cutting: _Cutting,
    rng: np.random.Generator,
) -> None:
    """Turn, scale, mirror and brighten a cutting and blend it in at a random place, in place."""
    height, width = labels.shape
    h, w = cutting.mask.shape
    scale = float(np.exp(rng.uniform(np.log(0.75), np.log(1.3))))
    angle = float(rng.uniform(0, 2 * np.pi))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    linear = np.array([[c * mirror, -s], [s * mirror, c]])
    middle = np.array([rng.uniform(0, width), rng.uniform(0, height)])
    matrix = np.column_stack((linear, middle - linear @ ((np.array([w, h]) - 1) / 2)))
    flags = cv2.INTER_LINEAR
    size = (width, height)
    # The edge's mixed pixels are left behind, and a soft edge is made anew.
    alpha = cv2.warpAffine(cutting.mask * np.uint8(255), matrix, size, flags=flags)
    patch = cv2.warpAffine(
        cutting.image, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
    inside = alpha > 127
    if np.count_nonzero(inside) < MIN_PIXELS:
        return
    soft = (cv2.GaussianBlur(alpha, (3, 3), 0).astype(np.float32) / 255)[..., None]
    gain = float(np.exp(rng.normal(0, 0.1)))
    mixed = image * (1 - soft) + np.clip(patch * gain, 0, 255) * soft
    image[:] = np.clip(mixed + 0.5, 0, 255).astype(np.uint8)
    labels[inside] = cutting.label
    instances[inside] = int(instances.max()) + 1


def fill_background(
    model: SegmentationModel, samples: Sequence[Sample], size: tuple[int, int]
) -> list[Sample]:
    """``samples`` at ``size``, unknown pixels made background where ``model`` is `SURE` of it."""
    filled = []
    for sample in samples:
        fitted = fit_sample(sample, size)
        unknown = fitted.labels == IGNORE
        if unknown.any():
            with torch.no_grad():
                outputs = model(normalise(torch.from_numpy(fitted.image[None])))
            labels, scores = (part[0].numpy() for part in decide(outputs))
            belt = unknown & (labels == 0) & (scores >= SURE)
            fitted = replace(fitted, labels=np.where(belt, np.uint8(0), fitted.labels))
        filled.append(fitted)
    return filled


def fine_tune(
    model: SegmentationModel,
    shots: Sequence[Sample],
    rehearsal: Sequence[Dataset],
    held_out: Sequence[Sample] = (),
    config: FineTuneConfig | None = None,
    *,
    learned: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> FineTuned:
    """Learn from a few samples.

    Args:
        model: to start from, such as of `prototypes.learn_class`; stays as it is.
        shots: samples in the labels of its classes.
        rehearsal: what to rehearse, in the labels of its classes; none, and it may forget.
        held_out: samples to measure on while it learns, in those labels; not learned from.
        config: settings.
        learned: classes whose held-out IoU is told; () takes those that the shots show.
        progress: called after every step.
        cancelled: looked at before every step.

    Raises:
        FewShotError: there is nothing to learn from, a setting cannot be, or the loss is no
            number.
    """
    config = config or FineTuneConfig()
    _check(config, model, shots)
    begin = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    shots = fill_background(copy.deepcopy(model).eval(), shots, config.size)
    held_out = [fit_sample(sample, config.size) for sample in held_out]
    names = tuple(learned) or _shown(shots, model.classes)
    pupil = copy.deepcopy(model).train()
    scale_dropout(pupil, 0.0)
    freeze(pupil, config.freeze)
    for module in pupil.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    judge = copy.deepcopy(pupil).eval()
    learner = Learner(_train_config(config, model), pupil)
    average = Average(pupil, 0.98)
    data = _mixture(config, model.classes, shots, rehearsal)
    learner.class_weights = torch.from_numpy(_weights(data, config, len(model.classes)))
    losses: list[float] = []
    figures: dict[int, dict[str, float]] = {}
    iou, best, stale = math.nan, -math.inf, 0
    step, stopped = 0, ""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(_batch, data, config, 0)
        while not stopped:
            elapsed = time.monotonic() - begin
            fraction = step / config.steps
            if config.seconds:
                fraction = max(fraction, elapsed / config.seconds)
            if cancelled():
                stopped = "cancelled"
            elif step >= config.steps:
                stopped = "steps"
            elif fraction >= 1:
                stopped = "time"
            elif config.patience and stale >= config.patience:
                stopped = "patience"
            if stopped:
                break
            batch = coming.result()
            coming = pool.submit(_batch, data, config, step + 1)
            try:
                parts = learner.learn(batch, config.lr * schedule_factor("cosine", fraction, 0.1))
            except NotFinite as error:
                raise FewShotError(
                    f"the loss is no number at step {step} ({error.losses}); lower lr, or look at "
                    "the samples"
                ) from None
            step += 1
            losses.append(parts["total"])
            average.update(pupil, step)
            if held_out and (step % config.measure == 0 or step == config.steps):
                judge.load_state_dict(average.state)
                figures[step] = validate(judge, held_out)
                iou = _mean_iou(figures[step], names)
                stale = 0 if iou > best + 0.002 else stale + 1
                best = max(best, iou)
            if progress:
                progress(_progress(config, step, losses[-1], iou, time.monotonic() - begin))
        coming.cancel()
    result = copy.deepcopy(model).eval()
    result.load_state_dict(average.state)
    seconds = time.monotonic() - begin
    recent = float(np.mean(losses[-10:])) if losses else math.nan
    return FineTuned(result, stopped, step, seconds, recent, figures)


def _check(config: FineTuneConfig, model: SegmentationModel, shots: Sequence[Sample]) -> None:
    if not shots:
        raise FewShotError("there are no samples to learn from; label some first")
    if config.freeze not in ("encoder", "trunk", "none"):
        raise FewShotError(f"freeze {config.freeze!r}: must be encoder, trunk or none")
    if config.steps < 1 or config.batch < 2 or config.measure < 1:
        raise FewShotError("steps and measure must be at least 1, and batch at least 2")
    for name, value in (("seconds", config.seconds), ("lr", config.lr)):
        if not (math.isfinite(value) and value >= 0):
            raise FewShotError(f"{name} must be a number of at least 0, not {value}")
    if min(config.shots, config.pasted, config.rehearsal) < 0 or config.shots < 1:
        raise FewShotError("shots must be at least 1, pasted and rehearsal at least 0")
    if any(side < model.stride or side % model.stride for side in config.size):
        raise FewShotError(
            f"size {config.size[0]}x{config.size[1]}: {model.name} takes multiples of "
            f"{model.stride}"
        )
    top = max(int(s.labels[s.labels < 254].max(initial=0)) for s in shots)
    if top > len(model.classes):
        raise FewShotError(f"a sample has the label {top}; the network knows {len(model.classes)}")


def _train_config(config: FineTuneConfig, model: SegmentationModel) -> TrainConfig:
    return TrainConfig(
        architecture=model.name,
        heads=model.heads,
        classes=model.classes,
        width=model.width,
        batch=config.batch,
        steps=config.steps,
        lr=config.lr,
        bf16=config.bf16,
        seed=config.seed,
        device="cpu",
    )


def _shown(samples: Sequence[Sample], classes: Sequence[str]) -> tuple[str, ...]:
    """Classes of which there are pixels."""
    present = np.unique(np.concatenate([np.unique(sample.labels) for sample in samples]))
    return tuple(name for label, name in enumerate(classes, 1) if label in present)


def _mixture(
    config: FineTuneConfig,
    classes: Sequence[str],
    shots: Sequence[Sample],
    rehearsal: Sequence[Dataset],
) -> Mixture:
    sources: list[Any] = [SampleData(shots, classes)]
    weights = [config.shots * max(1, len(rehearsal))]
    for scenes in rehearsal:
        pasted = PastedData(shots, scenes, classes, config.size, config.seed)
        if pasted.cuttings and config.pasted:
            sources.append(pasted)
            weights.append(config.pasted)
        if config.rehearsal:
            sources.append(scenes)
            weights.append(config.rehearsal)
    return Mixture(sources, weights, config.seed)


def _batch(data: Mixture, config: FineTuneConfig, number: int) -> dict[str, Tensor]:
    """Batch ``number``; depends on the seed and the number alone."""
    samples = []
    for index in range(number * config.batch, (number + 1) * config.batch):
        rng = np.random.default_rng([config.seed, number, index])
        samples.append(augment(data.sample(index, config.size), rng, config.size))
    return collate(samples)


def _weights(data: Mixture, config: FineTuneConfig, classes: int) -> NDArray[np.float32]:
    """Loss factors of the labels, half way between equal pixels and equal classes."""
    pixels = np.zeros(classes + 1)
    for index in range(_MEASURED):
        labels = data.sample(index, config.size).labels
        pixels += np.bincount(labels.ravel(), minlength=256)[: classes + 1] / labels.size
    return class_weights(pixels / max(1e-9, pixels.sum()), 0.5)


def _mean_iou(figures: dict[str, float], names: Sequence[str]) -> float:
    known = [figures[f"iou/{name}"] for name in names if f"iou/{name}" in figures]
    return float(np.mean(known)) if known else figures["binary_iou"]


def _progress(
    config: FineTuneConfig, step: int, loss: float, iou: float, elapsed: float
) -> Progress:
    each = elapsed / step
    steps = config.steps
    if config.seconds:
        steps = min(steps, max(step, step + int((config.seconds - elapsed) / each)))
    return Progress(step, steps, loss, iou, (steps - step) * each)
