"""A new class within seconds: its prototype in the trunk's features becomes a classifier's channel.

The features under the items' masks are averaged, item by item (masked average pooling, X. Zhang
et al., "SG-One", 2018), and the semantic classifier gets a channel more that points from the mean
of the other classes' items to this prototype, in the metric of the features' common covariance
(imprinting, H. Qi, M. Brown, D. Lowe, "Low-Shot Learning with Imprinted Weights", CVPR 2018). A few
steps then refine this one channel. Nothing else of the network changes: without the new channel it
says what it said before.

What the binary classifier takes for belt cannot be mended so, and 16 features may not tell the new
class from an old one: `Learned` says how much is seen and told apart; fine-tuning does the rest.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from waste_seg_ros.data.sample import IGNORE, OTHER, Sample
from waste_seg_ros.models import SegmentationModel, decide
from waste_seg_ros.train.loop import fit_sample, normalise

PIXELS = 800
"""Pixels of an image that count, of each label at most."""

_RIDGE = 0.05  # of the mean variance, added to the covariance
_DECAY = 1e-3  # pull of the refined channel towards the prototype


class FewShotError(ValueError):
    """Nothing can be learned so; the message says why and what would do."""


@dataclass(frozen=True, eq=False)
class Prototype:
    """Mean features of a class's items.

    Attributes:
        name: the class.
        fine: (F,) of what pixels are classified from.
        deep: (D,) of what has seen the context.
        items: that it is a mean of.
        alike: cosine of ``deep`` with those of the other classes, by name: near 1 is hard to tell.
    """

    name: str
    fine: Tensor
    deep: Tensor
    items: int
    alike: dict[str, float]


@dataclass(frozen=True, eq=False)
class Learned:
    """A network with a class more.

    Attributes:
        model: it, in eval mode.
        prototype: of the new class.
        loss: of telling the new class from all else, before and after the refinement.
        seen: share of the new items' pixels that the network takes for an item, 0..1.
        told: share of those that it names rightly, 0..1.
        seconds: it took.
    """

    model: SegmentationModel
    prototype: Prototype
    loss: tuple[float, float]
    seen: float
    told: float
    seconds: float


def extend(model: SegmentationModel, name: str) -> SegmentationModel:
    """A copy of a network with one class more, whose channel is 0; all other weights are copied.

    Raises FewShotError if it has no classes or knows this one.
    """
    if model.semantic is None:
        raise FewShotError(f"{model.name} of head {model.heads[-1]}: has no classes to add one to")
    if name in model.classes:
        raise FewShotError(f"class {name!r}: is known already; fine-tune the network instead")
    wider = copy.deepcopy(model)
    wider.classes = (*model.classes, name)
    wider.guides = nn.ModuleList()  # they know the old classes only
    assert wider.semantic is not None
    old = wider.semantic.full
    assert isinstance(old, nn.Conv2d | nn.ConvTranspose2d)
    axis = _axis(old)
    grown = {}
    for key, value in old.state_dict().items():
        along = axis if value.dim() > 1 else 0
        grown[key] = torch.cat([value, torch.zeros_like(value.narrow(along, 0, 1))], along)
    new = (
        nn.ConvTranspose2d(old.in_channels, old.out_channels + 1, 2, stride=2)
        if isinstance(old, nn.ConvTranspose2d)
        else nn.Conv2d(old.in_channels, old.out_channels + 1, 1)
    )
    new.load_state_dict(grown)
    wider.semantic.full = new.to(old.weight.device)
    return wider.eval()


def _axis(layer: nn.Module) -> int:
    """Of a kernel: its output channels."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


def _fold(layer: nn.Module) -> int:
    """Pixels per feature in each direction: a transposed kernel has weights for each."""
    return 2 if isinstance(layer, nn.ConvTranspose2d) else 1


@dataclass(eq=False)
class _Pixels:
    """Places that the new channel is learned from, one row each.

    features (P, F); phase (P,): which of the classifier's kernels makes this pixel; rivals (P,):
    log of the sum of the other channels' exponentials; new (P,) bool.
    """

    features: Tensor
    phase: Tensor
    rivals: Tensor
    new: Tensor


def learn_class(
    model: SegmentationModel,
    name: str,
    shots: Sequence[Sample],
    rehearsal: Sequence[Sample],
    *,
    size: tuple[int, int] = (320, 240),
    steps: int = 30,
    seed: int = 0,
) -> Learned:
    """Add a class to a network by its prototype.

    Args:
        model: the network; stays as it is.
        name: of the new class.
        shots: samples in the labels of the network's classes and, after them, the new one.
        rehearsal: samples of the old classes, in the network's labels, to be told apart from.
        size: (width, height) at which the network runs, multiples of its stride.
        steps: of the refinement; 0 leaves the prototype as it is.
        seed: of the pixels that are drawn.

    Raises:
        FewShotError: if no shot shows the class, nothing else is there to tell it from, or the
            network cannot be extended.
    """
    begin = time.perf_counter()
    wider = extend(model, name)
    label = len(wider.classes)
    rng = np.random.default_rng(seed)
    drawn: list[_Pixels] = []
    pooled: dict[int, list[tuple[Tensor, Tensor]]] = {}
    seen = total = 0
    for sample in (*shots, *rehearsal):
        fitted = fit_sample(sample, size)
        features, binary = _features(wider, fitted.image)
        drawn.append(_draw(wider, fitted.labels, features[0], label, rng))
        for number in np.unique(fitted.instances):
            mask = fitted.instances == number
            kind = int(fitted.labels[mask][0])
            if number and 0 < kind <= label:
                pair = (_pool(features[0], mask), _pool(features[1], mask))
                pooled.setdefault(kind, []).append(pair)
        new = fitted.labels == label
        seen, total = seen + int((binary & new).sum()), total + int(new.sum())
    if label not in pooled:
        raise FewShotError(f"class {name!r}: no sample to learn from shows an item of it")
    pixels = _Pixels(
        *(torch.cat([getattr(p, f) for p in drawn]) for f in ("features", "phase", "rivals", "new"))
    )
    if bool(pixels.new.all()):
        raise FewShotError(
            f"class {name!r}: no items of other classes are there to tell it from; give samples to "
            "rehearse"
        )
    means = {
        kind: [torch.stack(part).mean(0) for part in zip(*pairs, strict=True)]
        for kind, pairs in pooled.items()
    }
    fine, deep = means[label]
    alike = {
        wider.classes[kind - 1]: float(functional.cosine_similarity(deep, mean[1], 0))
        for kind, mean in sorted(means.items())
        if kind != label
    }
    assert wider.semantic is not None
    layer = wider.semantic.full
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None
    weight, bias, losses = _fit_channel(pixels, fine, _fold(layer) ** 2, steps)
    with torch.no_grad():
        kernel = layer.weight.select(_axis(layer), label)
        kernel.copy_(weight.reshape(kernel.shape))
        layer.bias[label] = bias
    told = _told(pixels, weight, bias)
    return Learned(
        wider,
        Prototype(name, fine, deep, len(pooled[label]), alike),
        losses,
        seen / max(1, total),
        told,
        time.perf_counter() - begin,
    )


@torch.no_grad()
def _features(
    model: SegmentationModel, image: NDArray[np.uint8]
) -> tuple[tuple[Tensor, Tensor], NDArray[np.bool_]]:
    """Features ``fine`` (F, h, w) and ``deep`` of an image, and where the network sees an item."""
    features = model.trunk(normalise(torch.from_numpy(np.ascontiguousarray(image))[None]))
    found = decide({"binary": model.binary(features)})[0][0].numpy() > 0
    return (features.fine[0], features.deep[0]), found


def _pool(features: Tensor, mask: NDArray[np.bool_]) -> Tensor:
    """Mean of (C, h, w) under a mask (H, W), by the share of each cell that it covers."""
    share = functional.interpolate(
        torch.from_numpy(mask.astype(np.float32))[None, None], features.shape[-2:], mode="area"
    )[0, 0]
    return (features * share).sum((1, 2)) / share.sum().clamp_min(1e-6)


def _draw(
    model: SegmentationModel,
    labels: NDArray[np.uint8],
    fine: Tensor,
    label: int,
    rng: np.random.Generator,
) -> _Pixels:
    """Pixels of each label, at most so many, with what the other channels say there."""
    assert model.semantic is not None
    layer = model.semantic.full
    fold = _fold(layer)
    with torch.no_grad():
        logits = layer(fine[None])[0]
    rows, columns = logits.shape[-2:]
    step = labels.shape[0] // rows, labels.shape[1] // columns
    small = labels[step[0] // 2 :: step[0], step[1] // 2 :: step[1]]
    chosen: list[NDArray[np.intp]] = [np.zeros(0, np.intp)]
    for kind in np.unique(small):
        if kind not in (IGNORE, OTHER):
            places = np.flatnonzero(small == kind)
            chosen.append(rng.permutation(places)[:PIXELS])
    flat = torch.from_numpy(np.concatenate(chosen))
    i, j = flat // columns, flat % columns
    others = logits[:label, i, j].t()
    return _Pixels(
        fine[:, i // fold, j // fold].t(),
        (i % fold) * fold + j % fold,
        others.logsumexp(1),
        torch.from_numpy(small.ravel())[flat] == label,
    )


def _fit_channel(
    pixels: _Pixels, prototype: Tensor, kernels: int, steps: int
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Weights (F, kernels) and bias of the new channel, and its loss before and after."""
    x, new = pixels.features, pixels.new
    # New and other pixels count alike in all, however many there are.
    share = new.float().mean()
    balance = torch.where(new, 0.5 / share, 0.5 / (1 - share))
    other = x[~new].mean(0)
    centred = x - torch.where(new[:, None], prototype, other)
    covariance = (centred * balance[:, None]).t() @ centred / len(x)
    ridge = _RIDGE * covariance.diagonal().mean() + 1e-6
    direction = torch.linalg.solve(
        covariance + ridge * torch.eye(len(prototype)), prototype - other
    )
    # Half way between the two means it is as sure as the other channels are on the whole.
    rivals = (pixels.rivals * balance).mean()
    start = direction[:, None].repeat(1, kernels)
    weight = start.clone().requires_grad_()
    bias = (rivals - direction @ (prototype + other) / 2).clone().requires_grad_()

    def loss() -> Tensor:
        margin = _logits(pixels, weight, bias) - pixels.rivals
        fit = functional.binary_cross_entropy_with_logits(margin, new.float(), balance)
        return fit + _DECAY * (weight - start).square().sum() / start.square().sum().clamp_min(1e-6)

    before = float(loss().detach())
    if steps:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
    return weight.detach(), bias.detach(), (before, float(loss().detach()))


def _logits(pixels: _Pixels, weight: Tensor, bias: Tensor) -> Tensor:
    return (pixels.features @ weight).gather(1, pixels.phase[:, None])[:, 0] + bias


def _told(pixels: _Pixels, weight: Tensor, bias: Tensor) -> float:
    right = _logits(pixels, weight, bias) > pixels.rivals
    return float(right[pixels.new].float().mean())
