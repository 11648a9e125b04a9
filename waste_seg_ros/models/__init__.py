"""Segmentation networks: a trunk of some architecture under one or several heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from waste_seg_ros.models.enet import ENetTrunk
from waste_seg_ros.models.heads import Features, InstanceBranch, PixelClassifier, Trunk

if TYPE_CHECKING:
    import torch

HEADS = ("binary", "semantic", "instance")
"""What a network is used as; also the ``head`` of a bundle's manifest."""

TRUNKS: dict[str, type[Trunk]] = {"enet": ENetTrunk}
"""Trunk of each architecture by its name."""


class SegmentationModel(nn.Module):
    """A trunk with heads.

    forward: (N, 3, H, W) float32 normalised RGB, H and W multiples of ``stride``, to a dict with,
    by head:

    - binary: ``binary`` (N, 1, H, W) logit of "an item of whatever class";
    - semantic: ``semantic`` (N, C+1, H, W) logits, channel 0 the background;
    - instance: ``semantic`` as above, ``centers`` (N, 1, H/4, W/4) heat-map logits and ``offsets``
      (N, 2, H/4, W/4), (dx, dy) in input pixels from the cell's centre to its item's centre of
      mass. The centre of cell (i, j) is the input point x = 4j + 1.5, y = 4i + 1.5, with pixel
      centres at whole numbers.
    """

    def __init__(
        self, name: str, trunk: Trunk, heads: tuple[str, ...], classes: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.name = name
        self.heads = heads
        self.classes = classes
        self.stride = trunk.stride
        self.width = trunk.width
        self.trunk = trunk
        channels = trunk.channels
        self.binary = PixelClassifier(channels["fine"], 1) if "binary" in heads else None
        self.semantic = (
            PixelClassifier(channels["fine"], len(classes) + 1)
            if "semantic" in heads or "instance" in heads
            else None
        )
        self.instance = (
            InstanceBranch(channels["deep"], channels["mid"]) if "instance" in heads else None
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """See the class."""
        features: Features = self.trunk(x)
        outputs: dict[str, Tensor] = {}
        if self.binary is not None:
            outputs["binary"] = self.binary(features)
        if self.semantic is not None:
            outputs["semantic"] = self.semantic(features)
        if self.instance is not None:
            outputs["centers"], outputs["offsets"] = self.instance(features)
        return outputs


def build_model(
    name: str,
    head: str | Sequence[str] = "semantic",
    classes: Sequence[str] = ("paper", "bottle", "aluminum", "nylon"),
    width: float = 1.0,
) -> SegmentationModel:
    """A network with fresh weights.

    ``name``: a key of `TRUNKS`. ``head``: one of `HEADS` or several of them on one trunk.
    ``classes``: names of label ids 1, 2, ... ``width`` multiplies the trunk's channels.

    Raises ValueError for an unknown name or head, no classes or repeated ones, or a width that is
    not a positive number.
    """
    if name not in TRUNKS:
        raise ValueError(f"unknown architecture {name!r}; known: {', '.join(sorted(TRUNKS))}")
    heads = (head,) if isinstance(head, str) else tuple(head)
    unknown = [h for h in heads if h not in HEADS]
    if unknown or not heads:
        what = repr(unknown[0]) if unknown else "(none given)"
        raise ValueError(f"unknown head {what}; known: {', '.join(HEADS)}")
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f"classes must be distinct names, at least one: {list(classes)}")
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be a positive number, not {width}")
    ordered = tuple(h for h in HEADS if h in heads)
    return SegmentationModel(name, TRUNKS[name](width), ordered, tuple(classes))


def parameter_count(model: nn.Module) -> int:
    """Number of trained numbers in ``model``."""
    return sum(p.numel() for p in model.parameters())


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies ``weights`` into ``model``; every name and shape must match. Raises ValueError."""
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
