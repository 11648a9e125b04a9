"""What is asked of a trunk: pixel classifiers and the instance branch.

A trunk of any architecture gives `Features`; the heads here know nothing else of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

OFFSET_SCALE = 32.0
"""Input pixels per unit of the learned offsets, so that the last layer's outputs are near 1."""


class Features(NamedTuple):
    """What a trunk hands to the heads, each (N, channels, h, w).

    ``deep``: features at 1/8 of the input that have seen its context; ``mid``: features at 1/4;
    ``fine``: what the pixels are classified from, at 1/``fine_stride``. A trunk names the channels
    of each in its dict ``channels``. ``guides``: features that training supervises beside the
    last ones, of ``guide_channels`` and any resolution; empty in eval mode.
    """

    deep: Tensor
    mid: Tensor
    fine: Tensor
    guides: tuple[Tensor, ...] = ()


class Trunk(nn.Module):
    """What every architecture gives: a module from (N, 3, H, W) to `Features`.

    ``stride``: H and W are multiples of it. ``fine_stride``: of the features ``fine``, one of 1,
    2, 4, 8. ``channels``: of each of the features, by name. ``guide_channels``: of the guides.
    ``width``: factor on the architecture's own channels.
    """

    stride: int
    fine_stride: int = 2
    channels: dict[str, int]
    guide_channels: tuple[int, ...] = ()

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.width = width

    def fixed_layers(self) -> tuple[nn.Module, ...]:
        """Layers whose outputs pruning leaves as many as they are."""
        return ()


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width`` as a multiple of 8, at least 8."""
    return max(8, 8 * round(channels * width / 8))


class PixelClassifier(nn.Module):
    """The last layer of a pixel classifier, to the input's resolution.

    At ``stride`` 2 ENet's 2x2 transposed convolution; else a 1x1 convolution and, above stride 1,
    bilinear upsampling, as ICNet and BiSeNet have it.

    forward: `Features` to (N, outputs, H, W) logits.
    """

    def __init__(self, channels: int, outputs: int, stride: int = 2) -> None:
        super().__init__()
        self.full: nn.Module = (
            nn.ConvTranspose2d(channels, outputs, 2, stride=2)
            if stride == 2
            else nn.Conv2d(channels, outputs, 1)
        )
        self.factor = float(stride) if stride > 2 else 1.0

    def forward(self, features: Features) -> Tensor:
        """See the class."""
        logits: Tensor = self.full(features.fine)
        if self.factor == 1.0:
            return logits
        return upsample(logits, self.factor)


def upsample(x: Tensor, factor: float = 2.0) -> Tensor:
    """Bilinear upsampling of (N, C, h, w) by ``factor``."""
    return functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def _conv(inputs: int, outputs: int, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels, channels, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return functional.relu(x + self.norm(self.conv(x)))


class InstanceBranch(nn.Module):
    """Centre heat map and offsets to the centre, in the manner of Panoptic-DeepLab, but light.

    B. Cheng et al., "Panoptic-DeepLab", CVPR 2020: a branch of its own from the encoder, apart from
    the semantic decoder. Here: dilated residual convolutions at 1/8 (they reach across an item),
    upsampled, joined with the encoder's 1/4 features (they see the edge between touching items),
    and one small output convolution per map.

    forward: `Features` to ``centers`` (N, 1, H/4, W/4) logits and ``offsets`` (N, 2, H/4, W/4),
    (dx, dy) in input pixels from the cell's centre to the centre of mass of its item.
    """

    def __init__(self, deep: int, mid: int, width: int = 48) -> None:
        super().__init__()
        self.reduce = _conv(deep, width, 1)
        self.context = nn.Sequential(*(_Residual(width, dilation) for dilation in (1, 2, 4, 1)))
        self.skip = _conv(mid, width // 2, 1)
        self.fuse = nn.Sequential(_conv(width + width // 2, width), _conv(width, width))
        self.centers = nn.Conv2d(width, 1, 1)
        self.offsets = nn.Conv2d(width, 2, 1)
        # CenterNet's prior: almost every cell is no centre; without it the first steps are spent
        # on learning that.
        nn.init.constant_(self.centers.bias, -4.0)  # type: ignore[arg-type]
        nn.init.zeros_(self.offsets.bias)  # type: ignore[arg-type]

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        """See the class."""
        x = self.context(self.reduce(features.deep))
        x = self.fuse(torch.cat((upsample(x), self.skip(features.mid)), 1))
        return self.centers(x), self.offsets(x) * OFFSET_SCALE
