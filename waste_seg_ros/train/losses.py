"""Losses, and their sum over the heads of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from waste_seg_ros.data.sample import IGNORE, OTHER
from waste_seg_ros.models.heads import OFFSET_SCALE
from waste_seg_ros.train.targets import CELL


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    gamma: float = 2.0,
    weights: Tensor | None = None,
    ignore: int = IGNORE,
) -> Tensor:
    """Focal loss of a softmax: mean of -w (1 - p)^gamma log p over the pixels not ignored.

    T.-Y. Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5, with the
    softmax's probability of the true class as p.

    Args:
        logits: (N, C, ...) float.
        labels: (N, ...) int64, 0..C-1 or ``ignore``.
        gamma: focusing exponent; 0 is cross entropy.
        weights: (C,) factor per class; the mean is over pixels, not over weights.
        ignore: label that does not count.

    Returns:
        Scalar; 0 if every pixel is ignored.
    """
    valid = labels != ignore
    nll = functional.cross_entropy(logits, labels, ignore_index=ignore, reduction="none")
    loss = nll if gamma == 0 else (1.0 - torch.exp(-nll)).clamp_min(0.0) ** gamma * nll
    if weights is not None:
        loss = loss * weights[labels * valid]
    # Ignored pixels have nll = 0 already.
    return loss.sum() / valid.sum().clamp_min(1)


def binary_focal_loss(
    logits: Tensor, targets: Tensor, valid: Tensor | None = None, gamma: float = 2.0
) -> Tensor:
    """Focal loss of a sigmoid (Lin et al. 2017, equation 4), mean over the valid pixels.

    ``logits`` float, ``targets`` in {0, 1} and ``valid`` bool have the same shape.
    """
    nll = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = nll if gamma == 0 else (1.0 - torch.exp(-nll)).clamp_min(0.0) ** gamma * nll
    if valid is None:
        return loss.mean()
    return (loss * valid).sum() / valid.sum().clamp_min(1)


def lovasz_gradient(truth_sorted: Tensor) -> Tensor:
    """Gradient of the Lovasz extension of the Jaccard loss (Berman et al. 2018, algorithm 1).

    ``truth_sorted``: (..., P) float in {0, 1}, in the order of falling errors. Same shape back.
    """
    total = truth_sorted.sum(-1, keepdim=True)
    intersection = total - truth_sorted.cumsum(-1)
    union = total + (1.0 - truth_sorted).cumsum(-1)
    jaccard = 1.0 - intersection / union
    return torch.cat((jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]), -1)


def lovasz_softmax(logits: Tensor, labels: Tensor, ignore: int = IGNORE) -> Tensor:
    """Lovasz-softmax loss, averaged over the classes present in the batch.

    M. Berman, A. Rannen Triki, M. Blaschko, "The Lovasz-Softmax Loss", CVPR 2018, equation 9; the
    whole batch counts as one image.

    Args:
        logits: (N, C, ...) float.
        labels: (N, ...) integers, 0..C-1 or ``ignore``.
        ignore: label that does not count.

    Returns:
        Scalar in 0..1; 0 if every pixel is ignored.
    """
    classes = logits.shape[1]
    flat = labels.reshape(-1)
    valid = flat != ignore
    scores = logits.movedim(1, -1).reshape(-1, classes)[valid]
    flat = flat[valid]
    if flat.numel() == 0:
        return logits.sum() * 0.0
    truth = torch.stack([flat == c for c in range(classes)]).to(scores.dtype)
    present = truth.any(-1)
    truth = truth[present]
    errors = (truth - scores.softmax(-1).t()[present]).abs()
    errors, order = errors.sort(-1, descending=True)
    return (errors * lovasz_gradient(truth.gather(-1, order))).sum(-1).mean()


def lovasz_hinge(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Lovasz hinge loss of a binary segmentation (Berman et al. 2018, section 2.2).

    ``logits`` float, ``targets`` in {0, 1} and ``valid`` bool have the same shape; the whole batch
    counts as one image. Scalar; 0 if no pixel is valid.
    """
    scores, truth = logits.reshape(-1), targets.reshape(-1).to(logits.dtype)
    if valid is not None:
        keep = valid.reshape(-1)
        scores, truth = scores[keep], truth[keep]
    if scores.numel() == 0:
        return logits.sum() * 0.0
    errors, order = (1.0 - scores * (2.0 * truth - 1.0)).sort(descending=True)
    return torch.dot(functional.relu(errors), lovasz_gradient(truth[order]))


def center_loss(logits: Tensor, heat: Tensor, weight: Tensor) -> Tensor:
    """Penalty-reduced focal loss of a centre heat map, divided by the number of centres.

    X. Zhou, D. Wang, P. Kraehenbuehl, "Objects as Points", 2019, equation 1, alpha 2, beta 4.

    Args:
        logits: (N, 1, h, w) float.
        heat: (N, 1, h, w) float in 0..1, exactly 1 at the centres.
        weight: (N, 1, h, w) float, 0 where the map is unknown.
    """
    positive = heat == 1.0
    probability = logits.sigmoid()
    found = functional.logsigmoid(logits) * (1.0 - probability) ** 2
    spurious = functional.logsigmoid(-logits) * probability**2 * (1.0 - heat) ** 4
    loss = -(torch.where(positive, found, spurious) * weight).sum()
    return loss / (positive * weight).sum().clamp_min(1.0)


def offset_loss(offsets: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean distance in x plus in y, in units of `heads.OFFSET_SCALE` pixels.

    ``offsets`` and ``target`` (N, 2, h, w) in pixels, ``weight`` (N, 1, h, w), 0 off the items.
    """
    distance = (offsets - target).abs().sum(1, keepdim=True)
    return (distance * weight).sum() / weight.sum().clamp_min(1e-6) / OFFSET_SCALE


LOSSES = ("focal-lovasz", "cross-entropy")
"""What pixels are classified by: focal plus Lovasz losses, or plain cross entropy to compare."""


@dataclass(frozen=True)
class LossSettings:
    """Factors of the parts, and how many pixels they look at.

    The instance and binary parts are easy; at the same gradient they would hold back the semantic
    part on a common trunk, hence their small factors. (Adam makes up for them in the heads' own
    weights.)

    ``kind``: one of `LOSSES`; of cross entropy the factor is 1, and no others count for pixels.
    ``guides``: of each guide's loss against the semantic head's without Lovasz; 0.4 is ICNet's of
    its branch at 1/8 (H. Zhao et al., ECCV 2018, section 4.1; 0.16 at 1/16).
    ``stride``: the pixel losses see every stride-th row and column, from a random first one.
    ``lovasz_stride``: likewise for the Lovasz losses, whose sorting is the costly part.
    """

    kind: str = "focal-lovasz"
    gamma: float = 2.0
    focal: float = 2.0
    lovasz: float = 1.0
    binary: float = 0.2
    centers: float = 0.1
    offsets: float = 0.3
    guides: float = 0.4
    stride: int = 1
    lovasz_stride: int = 4


def _thin(stride: int) -> tuple[slice, slice]:
    """Slices over the last two axes: every stride-th element from a random first one."""
    row, column = torch.randint(stride, (2,)).tolist() if stride > 1 else (0, 0)
    return slice(row, None, stride), slice(column, None, stride)


def total_loss(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    settings: LossSettings,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Sum of the losses of every head and guide in ``outputs``, the parts unweighted for the log.

    ``outputs`` as of `models.SegmentationModel`; ``targets`` a batch of `targets.make_targets`.
    """
    parts: dict[str, Tensor] = {}
    labels = targets["labels"]
    rows, columns = _thin(settings.stride)
    lovasz_rows, lovasz_columns = _thin(settings.lovasz_stride)
    plain = settings.kind == "cross-entropy"
    name, gamma, factor = (
        ("cross_entropy", 0.0, 1.0) if plain else ("focal", settings.gamma, settings.focal)
    )
    total = outputs[next(iter(outputs))].new_zeros((), dtype=torch.float32)
    if "semantic" in outputs:
        logits = outputs["semantic"]
        known = torch.where(labels == OTHER, IGNORE, labels)
        parts[name] = focal_loss(
            logits[..., rows, columns].float(),
            known[..., rows, columns].long(),
            gamma,
            class_weights,
        )
        total = total + factor * parts[name]
        if not plain:
            parts["lovasz"] = lovasz_softmax(
                logits[..., lovasz_rows, lovasz_columns].float(),
                known[..., lovasz_rows, lovasz_columns],
            )
            total = total + settings.lovasz * parts["lovasz"]
        for guide in sorted(key for key in outputs if key.startswith("guide")):
            logits = outputs[guide]
            parts[guide] = focal_loss(
                logits.float(), shrink_labels(known, logits.shape[-2:]), gamma, class_weights
            )
            total = total + settings.guides * factor * parts[guide]
    if "binary" in outputs:
        logits = outputs["binary"][:, 0]
        thin = logits[..., rows, columns].float()
        seen = labels[..., rows, columns]
        part = f"binary_{name}"
        parts[part] = binary_focal_loss(
            thin, ((seen != 0) & (seen != IGNORE)).float(), seen != IGNORE, gamma
        )
        total = total + settings.binary * factor * parts[part]
        if not plain:
            seen = labels[..., lovasz_rows, lovasz_columns]
            parts["binary_lovasz"] = lovasz_hinge(
                logits[..., lovasz_rows, lovasz_columns].float(),
                ((seen != 0) & (seen != IGNORE)).float(),
                seen != IGNORE,
            )
            total = total + settings.binary * settings.lovasz * parts["binary_lovasz"]
    if "centers" in outputs:
        parts["centers"] = center_loss(
            outputs["centers"].float(), targets["heat"], targets["heat_weight"]
        )
        parts["offsets"] = offset_loss(
            outputs["offsets"].float(), targets["offsets"], targets["offset_weight"]
        )
        total = total + settings.centers * parts["centers"] + settings.offsets * parts["offsets"]
    return total, {name: float(value.detach()) for name, value in parts.items()}


def shrink_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """(N, H, W) uint8 labels by nearest neighbour at ``size`` (h, w), as int64."""
    scaled = functional.interpolate(labels[:, None], size=tuple(size), mode="nearest-exact")
    return scaled[:, 0].long()


# --------------------------------------------------------------------------------------------------
# Distillation


@dataclass(frozen=True)
class DistillSettings:
    """Factors of what a student learns from its teacher, beside the truth.

    ``temperature`` softens the logits of both. ``stride``: as in `LossSettings`.
    """

    temperature: float = 2.0
    semantic: float = 1.0
    binary: float = 0.2
    features: float = 1.0
    centers: float = 0.1
    offsets: float = 0.3
    stride: int = 2


def distill_loss(
    outputs: Mapping[str, Tensor], teacher: Mapping[str, Tensor], settings: DistillSettings
) -> tuple[Tensor, dict[str, float]]:
    """What the student's outputs are from the teacher's, over the keys that both have.

    After G. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (logits), and
    Y. Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019 (pixel
    by pixel, section 3.1, and the similarity of pairs of places in the features). The latter needs
    no projection between the channels of the two, so nothing is trained outside of the student.

    Args:
        outputs: the student's, as of `models.SegmentationModel`, and its ``deep`` features
            (N, channels, H/8, W/8).
        teacher: likewise, without gradient; ``semantic`` is -inf in the channels of classes that
            the teacher does not know: their probability is left out on both sides.
        settings: factors.

    Returns:
        The weighted sum, and its parts unweighted for the log, by names that begin with "distill".
    """
    parts: dict[str, Tensor] = {}
    rows, columns = _thin(settings.stride)
    heat = settings.temperature
    if "semantic" in outputs and "semantic" in teacher:
        wanted = teacher["semantic"][..., rows, columns].float()
        known = wanted[0, :, 0, 0] > -torch.inf
        ours = outputs["semantic"][..., rows, columns].float()
        parts["semantic"] = heat**2 * _divergence(ours[:, known] / heat, wanted[:, known] / heat)
    if "binary" in outputs and "binary" in teacher:
        # As two classes of which the background's logit is 0.
        pair = [
            torch.cat((torch.zeros_like(logit), logit), 1)
            for logit in (
                side["binary"][..., rows, columns].float() / heat for side in (outputs, teacher)
            )
        ]
        parts["binary"] = heat**2 * _divergence(*pair)
    if "deep" in outputs and "deep" in teacher:
        height, width = outputs["deep"].shape[-2:]
        grid = max(1, height // 2), max(1, width // 2)
        ours, wanted = (_similarity(side["deep"].float(), grid) for side in (outputs, teacher))
        parts["features"] = functional.mse_loss(ours, wanted)
    if "centers" in outputs and "centers" in teacher:
        wanted = teacher["centers"].float().sigmoid()
        error = (outputs["centers"].float().sigmoid() - wanted).square().sum()
        parts["centers"] = error / wanted.sum().clamp_min(1.0)
        # The offsets of cells in whose middle the teacher sees an item.
        item = (teacher["binary"][..., CELL // 2 :: CELL, CELL // 2 :: CELL] > 0).float()
        parts["offsets"] = offset_loss(outputs["offsets"].float(), teacher["offsets"].float(), item)
    total = next(iter(outputs.values())).new_zeros((), dtype=torch.float32)
    for name, value in parts.items():
        total = total + getattr(settings, name) * value
    return total, {f"distill_{name}": float(value.detach()) for name, value in parts.items()}


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the softmax over channels of ``wanted``, mean of pixels."""
    log_p, log_q = wanted.log_softmax(1), logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def _similarity(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosines (N, P, P) between the P places of ``features`` averaged over a ``grid`` (h, w)."""
    pooled = functional.adaptive_avg_pool2d(features, grid).flatten(2)
    unit = functional.normalize(pooled, dim=1)
    return unit.transpose(1, 2) @ unit
