"""What a run starts from: weights of a bundle or an encoder, what of them is frozen, a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from waste_seg_ros.models import SegmentationModel, fit
from waste_seg_ros.runtime.bundle import MEAN, STD, load_model, open_bundle, read_weights

Teacher = Callable[[Tensor], Mapping[str, Tensor]]
"""From normalised images (N, 3, H, W) to outputs as `losses.distill_loss` takes them."""

FROZEN = ("none", "encoder", "trunk")
"""What of a network can be kept as it is."""


# --------------------------------------------------------------------------------------------------
# Weights


def start_from(model: SegmentationModel, init: str) -> str:
    """Takes over what fits from the bundle ``init``; returns a line that says what starts fresh.

    Trunk and heads are matched by name and shape, the channels of the semantic classifier by the
    names of their classes, so that a network for other classes keeps those that both know.

    Raises ValueError if nothing of the trunk fits.
    """
    bundle = open_bundle(init)
    weights = read_weights(bundle)
    if (bundle.manifest.architecture, bundle.manifest.width) == (model.name, model.width):
        fit(model, weights)  # it may be pruned
    own = model.state_dict()
    prefix = "semantic."
    fits = {
        key: value
        for key, value in weights.items()
        if key in own and own[key].shape == value.shape and not key.startswith(prefix)
    }
    if not any(key.startswith("trunk.") for key in fits):
        manifest = bundle.manifest
        raise ValueError(
            f"{init}: no weight of its trunk fits: it is {manifest.architecture} of width "
            f"{manifest.width:g}, the network to train is {model.name} of width {model.width:g}"
        )
    fresh = {key.split(".")[0] for key in own if key not in fits and not key.startswith(prefix)}
    new_classes: list[str] = []
    if model.semantic is not None:
        matched = _match_classes(model, weights, bundle.manifest.classes)
        fits |= matched
        if matched:
            new_classes = [c for c in model.classes if c not in bundle.manifest.classes]
        else:
            fresh.add("semantic")
    model.load_state_dict(fits, strict=False)
    parts = sorted(fresh)
    if new_classes:
        kept = ["background", *(c for c in model.classes if c not in new_classes)]
        parts.append(f"classes {', '.join(new_classes)} (kept: {', '.join(kept)})")
    return f"{init}: " + (f"starting fresh: {', '.join(parts)}" if parts else "everything fits")


def _match_classes(
    model: SegmentationModel, weights: Mapping[str, Tensor], classes: Sequence[str]
) -> dict[str, Tensor]:
    """The semantic classifier's weights, with those of ``classes`` that the model has too.

    The channels are the background and the classes. Empty if the weights do not fit otherwise.
    """
    assert model.semantic is not None
    transposed = isinstance(model.semantic.full, nn.ConvTranspose2d)
    pairs = [(0, 0)] + [
        (index, classes.index(name) + 1)
        for index, name in enumerate(model.classes, 1)
        if name in classes
    ]
    to, source = (torch.tensor(indices) for indices in zip(*pairs, strict=True))
    matched: dict[str, Tensor] = {}
    for name, own in model.semantic.state_dict().items():
        other = weights.get(f"semantic.{name}")
        axis = 1 if transposed and own.dim() == 4 else 0
        expected = list(own.shape)
        expected[axis] = len(classes) + 1
        if other is None or list(other.shape) != expected:
            return {}
        matched[f"semantic.{name}"] = own.clone().index_copy_(
            axis, to, other.index_select(axis, source)
        )
    return matched


def freeze(model: SegmentationModel, what: str) -> None:
    """Keeps a part of ``model``, in train mode, as it is: no gradients, no statistics.

    ``what``: one of `FROZEN`; the encoder is the trunk's module of that name or, in a trunk
    without one, all that the features at 1/8 come from.
    """
    if what == "none":
        return
    kept = list(model.trunk.parameters())
    if what == "encoder":
        encoder = getattr(model.trunk, "encoder", None)
        kept = list(encoder.parameters()) if encoder is not None else _behind_deep(model)
    for parameter in kept:
        parameter.requires_grad_(False)
    for module in model.trunk.modules():
        own = list(module.parameters(recurse=False))
        if own and isinstance(module, nn.BatchNorm2d) and not own[0].requires_grad:
            module.eval()


def _behind_deep(model: SegmentationModel) -> list[nn.Parameter]:
    """The parameters that get a gradient from the features at 1/8."""
    model.trunk.eval()  # or the batch's statistics would go into the averages
    like = next(model.parameters())
    model.trunk(like.new_zeros(1, 3, 4 * model.stride, 4 * model.stride)).deep.sum().backward()
    found = [p for p in model.trunk.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    model.trunk.train()
    return found


# --------------------------------------------------------------------------------------------------
# Distillation


def open_teacher(name: str, classes: Sequence[str]) -> Teacher:
    """The network of a bundle, as a teacher of one for ``classes``.

    Images whose sides are no multiples of the teacher's stride are padded for it. Of classes that
    it does not know it says -inf.

    Raises ValueError if the teacher knows classes beyond ``classes``.
    """
    bundle = open_bundle(name)
    manifest = bundle.manifest
    model = load_model(bundle).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    strangers = [c for c in manifest.classes if c not in classes]
    if model.semantic is not None and strangers:
        raise ValueError(
            f"teacher {name}: knows {', '.join(strangers)}, which are not among the classes to "
            f"learn ({', '.join(classes)}); choose another teacher or --classes"
        )
    if (manifest.mean, manifest.std) != (MEAN, STD):
        raise ValueError(f"teacher {name}: its images are normalised otherwise than the student's")
    places = [manifest.classes.index(c) + 1 if c in manifest.classes else -1 for c in classes]
    known = torch.tensor([0, *(p for p in range(1, len(classes) + 1) if places[p - 1] > 0)])
    source = torch.tensor([0, *(p for p in places if p > 0)])
    deep = watch_deep(model)

    def teach(image: Tensor) -> dict[str, Tensor]:
        height, width = image.shape[-2:]
        below, right = -height % manifest.stride, -width % manifest.stride
        if below or right:
            image = functional.pad(image, (0, right, 0, below), mode="replicate")
        found = {**model.to(image.device)(image), **deep}
        scale = {"binary": 1, "semantic": 1, "centers": 4, "offsets": 4, "deep": 8}
        found = {
            key: value[..., : height // scale[key], : width // scale[key]]
            for key, value in found.items()
        }
        if "semantic" in found:
            logits = found["semantic"]
            full = logits.new_full((len(logits), len(classes) + 1, height, width), -torch.inf)
            found["semantic"] = full.index_copy_(
                1, known.to(logits.device), logits[:, source.to(logits.device)]
            )
        return found

    return teach


def watch_deep(model: SegmentationModel) -> dict[str, Tensor]:
    """A dict in which ``deep`` is always the trunk's features of ``model``'s newest run."""
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, inputs: Any, features: Any) -> None:
        seen["deep"] = features.deep

    model.trunk.register_forward_hook(note)
    return seen
