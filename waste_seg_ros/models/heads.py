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

    ``deep``: encoder output at 1/8 of the input; ``mid``: encoder at 1/4; ``fine``: decoder output
    at 1/2. A trunk names the channels of each in its dict ``channels``.
    """

    deep: Tensor
    mid: Tensor
    fine: Tensor


class Trunk(nn.Module):
    """What every architecture gives: a module from (N, 3, H, W) to `Features`.

    ``stride``: H and W are multiples of it. ``channels``: of each of the features, by name.
    ``width``: factor on the architecture's own channels.
    """

    stride: int
    channels: dict[str, int]

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.width = width


class PixelClassifier(nn.Module):
    """ENet's last layer: 2x2 stride 2 transposed convolution to the input's resolution.

    forward: `Features` to (N, outputs, H, W) logits.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.full = nn.ConvTranspose2d(channels, outputs, 2, stride=2)

    def forward(self, features: Features) -> Tensor:
        """See the class."""
        return self.full(features.fine)


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
        x = functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = self.fuse(torch.cat((x, self.skip(features.mid)), 1))
        return self.centers(x), self.offsets(x) * OFFSET_SCALE
