"""ENet's encoder and decoder.

After A. Paszke, A. Chaurasia, S. Kim, E. Culurciello, "ENet: A Deep Neural Network Architecture
for Real-Time Semantic Segmentation", arXiv 1606.02147 (2016), table 1 and figure 2.

Max unpooling here works by an equality mask instead of pooling indices. The pooling windows are
2x2 with stride 2 and do not overlap, so the index of a window's maximum says no more than "the
place where the input equals its window's maximum", and unpooling is a nearest upsampling times
that mask. It exports to ONNX as plain elementwise operators (MaxUnpool is missing in most
runtimes) and needs no scatter. It differs from index unpooling only where a window holds its
maximum more than once (a flat, saturated part of the image): the value then goes to every such
place instead of to the first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from waste_seg_ros.models.heads import Features, Trunk, scaled

_differentiable = False


@contextmanager
def differentiable_masks() -> Iterator[None]:
    """In its scope `unpool_mask` gives differences instead of truths.

    What follows the gradients through a network, to find out which channels belong together, then
    sees where a mask comes from. What the network gives is of no use meanwhile.
    """
    global _differentiable
    _differentiable = True
    try:
        yield
    finally:
        _differentiable = False


def unpool_mask(x: Tensor, pooled: Tensor) -> Tensor:
    """Where ``x`` (N, C, 2h, 2w) holds the maximum of its 2x2 window; bool, shape of ``x``.

    ``pooled`` (N, C, h, w) is the 2x2 stride 2 maximum of ``x``.
    """
    maxima = functional.interpolate(pooled, scale_factor=2.0, mode="nearest")
    return x - maxima if _differentiable else x == maxima


def unpool(x: Tensor, mask: Tensor) -> Tensor:
    """Each value of ``x`` (N, C, h, w) where ``mask`` (N, C, 2h, 2w) is true, zeros elsewhere."""
    return functional.interpolate(x, scale_factor=2.0, mode="nearest") * mask.to(x.dtype)


class _PReLUFunction(torch.autograd.Function):
    """PReLU with a backward pass of vectorised kernels; torch's own branches at each element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        if x.dtype == torch.bfloat16 and x.shape[1] < 32:  # torch's kernel is not vectorised here
            positive = functional.relu(x)
            return torch.addcmul(positive, x - positive, slope.view(1, -1, 1, 1).to(x.dtype))
        return functional.prelu(x, slope.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        positive = torch.ops.aten.threshold_backward(grad, x, 0)
        negative = grad - positive
        grad_slope = (negative * x).sum((0, 2, 3)).to(slope.dtype)
        grad_x = torch.addcmul(positive, negative, slope.view(1, -1, 1, 1).to(grad.dtype))
        return grad_x, grad_slope


class PReLU(nn.PReLU):
    """`torch.nn.PReLU` with one slope a channel for (N, C, H, W), faster to train on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.training and torch.is_grad_enabled():
            return _PReLUFunction.apply(x, self.weight)
        return functional.prelu(x, self.weight)


def _activation(channels: int, relu: bool) -> nn.Module:
    return nn.ReLU() if relu else PReLU(channels)


def _add_dropped(x: Tensor, branch: Tensor, rate: float, training: bool) -> Tensor:
    """``x`` + spatial dropout of ``branch``, in one pass over memory."""
    if not training or rate == 0:
        return x + branch
    keep = 1.0 - rate
    noise = branch.new_empty(branch.shape[0], branch.shape[1], 1, 1).bernoulli_(keep).div_(keep)
    return torch.addcmul(x, branch, noise)


class InitialBlock(nn.Module):
    """Convolution beside a max pooling of the image: (N, 3, H, W) to (N, out, H/2, W/2)."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, out_channels - 3, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = PReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = torch.cat((self.conv(x), functional.max_pool2d(x, 2)), 1)
        return self.act(self.norm(x))


class Bottleneck(nn.Module):
    """Regular, dilated or asymmetric bottleneck; keeps the shape (figure 2b).

    The 1x1 projection reduces the channels by 4. ``asymmetric`` n replaces the 3x3 convolution by
    an n x 1 and a 1 x n one.
    """

    def __init__(
        self,
        channels: int,
        dropout: float,
        dilation: int = 1,
        asymmetric: int = 0,
        relu: bool = False,
    ) -> None:
        super().__init__()
        inner = channels // 4
        self.dropout = dropout
        layers: list[nn.Module] = [
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            _activation(inner, relu),
        ]
        if asymmetric:
            half = asymmetric // 2
            layers += [
                nn.Conv2d(inner, inner, (asymmetric, 1), padding=(half, 0), bias=False),
                nn.Conv2d(inner, inner, (1, asymmetric), padding=(0, half), bias=False),
            ]
        else:
            layers.append(
                nn.Conv2d(inner, inner, 3, padding=dilation, dilation=dilation, bias=False)
            )
        layers += [
            nn.BatchNorm2d(inner),
            _activation(inner, relu),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
        self.branch = nn.Sequential(*layers)
        self.act = _activation(channels, relu)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.act(_add_dropped(x, self.branch(x), self.dropout, self.training))


class Downsample(nn.Module):
    """(N, in, H, W) to (N, out, H/2, W/2), and the mask for unpooling.

    The main branch is a max pooling padded with zero channels.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        inner = out_channels // 4
        self.dropout = dropout
        self.extra = out_channels - in_channels
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, inner, 2, stride=2, bias=False),
            nn.BatchNorm2d(inner),
            PReLU(inner),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            PReLU(inner),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.act = PReLU(out_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        pooled = functional.max_pool2d(x, 2)
        mask = unpool_mask(x, pooled)
        padded = functional.pad(pooled, (0, 0, 0, 0, 0, self.extra))
        x = _add_dropped(padded, self.branch(x), self.dropout, self.training)
        return self.act(x), mask


class Upsample(nn.Module):
    """Doubles the resolution: (N, in, H, W) and a mask (N, out, 2H, 2W) to (N, out, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        inner = in_channels // 4
        self.dropout = dropout
        self.main = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.ConvTranspose2d(inner, inner, 2, stride=2, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        main = unpool(self.main(x), mask)
        return functional.relu(_add_dropped(main, self.branch(x), self.dropout, self.training))


class ENetTrunk(Trunk):
    """ENet without its classifier.

    forward: (N, 3, H, W) normalised RGB, H and W multiples of 8, to `Features`. ``width`` scales
    the channels (to multiples of 8).
    """

    stride = 8

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(width)
        c16, c64, c128 = scaled(16, width), scaled(64, width), scaled(128, width)
        self.channels = {"deep": c128, "mid": c64, "fine": c16}
        self.initial = InitialBlock(c16)
        self.down1 = Downsample(c16, c64, 0.01)
        self.stage1 = nn.Sequential(*(Bottleneck(c64, 0.01) for _ in range(4)))
        self.down2 = Downsample(c64, c128, 0.1)
        self.stage2 = self._context(c128)
        self.stage3 = self._context(c128)
        self.up4 = Upsample(c128, c64, 0.1)
        self.stage4 = nn.Sequential(*(Bottleneck(c64, 0.1, relu=True) for _ in range(2)))
        self.up5 = Upsample(c64, c16, 0.1)
        self.stage5 = Bottleneck(c16, 0.1, relu=True)

    def fixed_layers(self) -> tuple[nn.Module, ...]:
        """The maps between the blocks: a main branch is padded to so many channels more."""
        ends = [block.branch[-2] for block in (self.down1, self.down2)]
        return (self.initial.conv, *ends, self.up4.main[0], self.up5.main[0])

    @staticmethod
    def _context(channels: int) -> nn.Sequential:
        """Bottlenecks 2.1 to 2.8; section 3 repeats them."""
        return nn.Sequential(
            Bottleneck(channels, 0.1),
            Bottleneck(channels, 0.1, dilation=2),
            Bottleneck(channels, 0.1, asymmetric=5),
            Bottleneck(channels, 0.1, dilation=4),
            Bottleneck(channels, 0.1),
            Bottleneck(channels, 0.1, dilation=8),
            Bottleneck(channels, 0.1, asymmetric=5),
            Bottleneck(channels, 0.1, dilation=16),
        )

    def forward(self, x: Tensor) -> Features:
        """See the class."""
        x = self.initial(x)
        x, mask1 = self.down1(x)
        mid = self.stage1(x)
        x, mask2 = self.down2(mid)
        deep = self.stage3(self.stage2(x))
        x = self.stage4(self.up4(deep, mask2))
        return Features(deep=deep, mid=mid, fine=self.stage5(self.up5(x, mask1)))
