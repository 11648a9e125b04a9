"""Scores made probabilities, by temperature scaling (Guo et al., ICML 2017).

A network trained with a focal loss is less sure than it could be. Its logits are divided by a
temperature found on labelled images it was not trained on; one for the binary logit and one for
the semantic ones, since a score is the product of both probabilities (see `models.decide`). Both
are folded into the last layer, which is linear, as is the upsampling behind it. The graph and
every pixel's label stay as they are; items may be cut otherwise where grouping looks at scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from waste_seg_ros.data.sample import BACKGROUND, IGNORE, OTHER, Sample
from waste_seg_ros.models import SegmentationModel
from waste_seg_ros.perception.scaling import scale_ids, scale_image
from waste_seg_ros.runtime.backends import input_size_for
from waste_seg_ros.runtime.bundle import Bundle, load_model, save_bundle

#: So many pixels are taken of a frame, drawn by chance.
PIXELS = 4096
#: Temperatures lie between 1 / LIMIT and LIMIT.
LIMIT = 20.0


class Temperatures(NamedTuple):
    """What logits are divided by; 1 where the data say nothing."""

    binary: float = 1.0
    semantic: float = 1.0


def fit_temperatures(bundle: Bundle, samples: Iterable[Sample]) -> Temperatures:
    """Find the temperatures at which the truth is likeliest.

    Args:
        bundle: the network, with weights for torch.
        samples: labelled images, their labels those of the bundle's classes.

    Raises:
        ValueError: if no pixel's truth is known.
        BundleError: if the bundle has no weights.
    """
    model, manifest = load_model(bundle), bundle.manifest
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (manifest.mean, manifest.std))
    random = np.random.default_rng(0)
    sides: list[NDArray[np.float32]] = []  # binary logit, negated where there is no item
    margins: list[NDArray[np.float32]] = []  # (n, C) class logits less the right one's
    for sample in samples:
        size = input_size_for((sample.image.shape[1], sample.image.shape[0]), manifest)
        image = np.ascontiguousarray(scale_image(sample.image, size))
        truth = scale_ids(sample.labels, size).ravel()
        known = np.flatnonzero(truth != IGNORE)
        chosen = random.choice(known, min(PIXELS, len(known)), replace=False)
        with torch.inference_mode():
            x = (torch.from_numpy(image[None]).permute(0, 3, 1, 2).float() - mean) / std
            outputs = model(x)
        logit = outputs["binary"][0, 0].numpy().ravel()[chosen]
        sides.append(np.where(truth[chosen] != BACKGROUND, logit, -logit))
        if "semantic" in outputs:
            own = chosen[(truth[chosen] != BACKGROUND) & (truth[chosen] < OTHER)]
            logits = outputs["semantic"][0, 1:].numpy().reshape(-1, truth.size)[:, own].T
            right = np.take_along_axis(logits, truth[own, None].astype(np.intp) - 1, axis=1)
            margins.append(logits - right)
    if not sum(len(side) for side in sides):
        raise ValueError("there are no pixels to calibrate on")
    side = np.concatenate(sides)
    binary = _best(lambda t: float(np.logaddexp(0, -side / t).mean()))
    semantic = 1.0
    if margins and len(rows := np.concatenate(margins)):
        semantic = _best(lambda t: float(np.logaddexp.reduce(rows / t, axis=1).mean()))
    return Temperatures(binary, semantic)


def fold(model: SegmentationModel, temperatures: Temperatures) -> None:
    """Divide a network's logits by the temperatures, in its last layers' weights."""
    for classifier, temperature in zip((model.binary, model.semantic), temperatures, strict=True):
        if classifier is not None:
            with torch.no_grad():
                for weight in classifier.full.parameters():
                    weight.div_(temperature)


def calibrate_bundle(
    bundle: Bundle, samples: Iterable[Sample], output: Path, name: str = ""
) -> tuple[Bundle, Temperatures]:
    """Write a bundle whose scores are calibrated on labelled images.

    Its figures are not carried over, for items may be others; measure them anew.

    Raises:
        ValueError: if no pixel's truth is known.
        BundleError: if the bundle has no weights, or the folder exists.
    """
    temperatures = fit_temperatures(bundle, samples)
    model, manifest = load_model(bundle), bundle.manifest
    fold(model, temperatures)
    found = {key: round(value, 4) for key, value in temperatures._asdict().items()}
    written = save_bundle(
        output,
        model,
        name=name or output.name,
        head=manifest.head,
        input_size=manifest.input_size,
        training={**manifest.training, "temperatures": found},
        parent=bundle.reference,
        precision=manifest.precision,
    )
    return written, temperatures


def _best(loss: Callable[[float], float]) -> float:
    """Where a loss, which has one valley, is least: golden section over log temperature."""
    low, high = -math.log(LIMIT), math.log(LIMIT)
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = loss(math.exp(left)), loss(math.exp(right))
    while high - low > 1e-3:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(math.exp(left))
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(math.exp(right))
    return math.exp((low + high) / 2)
