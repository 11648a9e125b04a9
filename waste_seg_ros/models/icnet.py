"""ICNet.

After H. Zhao, X. Qi, X. Shen, J. Shi, J. Jia, "ICNet for Real-Time Semantic Segmentation on
High-Resolution Images", ECCV 2018, arXiv 1704.08545: a cascade of three resolutions of the image,
fused from coarse to fine by cascade feature fusion, each fusion guided by labels in training.

As in the paper the low branch goes on from the medium one's features (section 3.3: their first
layers and computation are shared), and the pyramid pooling of PSPNet sums its levels. Where we
differ: the encoder is torchvision's ResNet-50 (stem of one 7x7 convolution), not PSPNet's with a
stem of three 3x3 ones, and it is made small by ``width`` instead of by pruning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from waste_seg_ros.models.heads import Features, Trunk, scaled, upsample
from waste_seg_ros.models.resnet import ResNet50

BINS = (1, 2, 3, 6)
"""Cells to a side of the pyramid's levels."""


def pool_and_spread(size: int | Tensor, bins: int, like: Tensor) -> Tensor:
    """Matrix (size, size) that averages a line over ``bins`` cells and spreads them again.

    The cells are those of adaptive average pooling, the spreading is bilinear. As a matrix it
    exports with a free ``size``, which adaptive pooling does not.
    """
    places = torch.arange(size, device=like.device, dtype=torch.float32)  # type: ignore[arg-type]
    cells = torch.arange(bins, device=like.device, dtype=torch.float32)[:, None]
    # Of a float and a traced integer, so that the exporter keeps the size free.
    first = torch.floor(cells * size / bins)
    last = torch.ceil((cells + 1) * size / bins)
    inside = ((places >= first) & (places < last)).to(torch.float32)
    pool = inside / inside.sum(1, keepdim=True)
    source = ((places + 0.5) * bins / size - 0.5).clamp(0, bins - 1)
    spread = functional.relu(1 - (source[:, None] - cells[:, 0]).abs())
    return (spread @ pool).to(like.dtype)


class PyramidPooling(nn.Module):
    """Sum of a map and its averages over 1, 2, 3 and 6 cells to a side; keeps the shape."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        height, width = x.shape[2:]
        total = x
        for bins in BINS:
            rows = pool_and_spread(height, bins, x)
            columns = pool_and_spread(width, bins, x)
            total = total + rows @ x @ columns.t()
        return total


class CascadeFeatureFusion(nn.Module):
    """Joins a coarse map (N, low, h, w) and a fine one (N, high, 2h, 2w) (figure 3).

    forward: to the fused map (N, out, 2h, 2w) and the upsampled coarse one, which training guides.
    """

    def __init__(self, low: int, high: int, out: int) -> None:
        super().__init__()
        self.low = nn.Sequential(
            nn.Conv2d(low, out, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(out)
        )
        self.high = nn.Sequential(nn.Conv2d(high, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        low = upsample(low)
        return functional.relu(self.low(low) + self.high(high)), low


def _reduce(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class ICNetTrunk(Trunk):
    """ICNet without its classifiers.

    forward: (N, 3, H, W) normalised RGB, H and W multiples of 32, to `Features`; the guides are
    the coarse inputs of the two fusions.
    """

    stride = 32
    fine_stride = 4

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(width)
        c32, c64, c128 = scaled(32, width), scaled(64, width), scaled(128, width)
        # The first three convolutions see the whole image; at small widths they stay wide enough.
        self.high1, self.high2 = _reduce(3, c32), _reduce(c32, c32)
        self.high3 = _reduce(c32, c64)
        self.encoder = ResNet50(width, dilations=(1, 1, 2, 4))
        _, _, medium, _, low = self.encoder.channels
        self.pyramid = PyramidPooling()
        self.fuse_low = CascadeFeatureFusion(low, medium, c128)
        self.fuse_high = CascadeFeatureFusion(c128, c64, c128)
        self.channels = {"deep": c128, "mid": c32, "fine": c128}
        self.guide_channels = (low, c128)

    def forward(self, x: Tensor) -> Features:
        """See the class."""
        mid = self.high2(self.high1(x))
        high = self.high3(mid)
        encoder = self.encoder
        half = encoder.stem(functional.avg_pool2d(x, 2))
        half = encoder.get_submodule("layer1")(functional.max_pool2d(half, 3, 2, 1))
        # The paper's conv3_1, at 1/16 of the image: the medium branch, and the low one goes on
        # from it at half the resolution.
        first, *others = encoder.get_submodule("layer2").children()
        medium = first(half)
        low = functional.avg_pool2d(medium, 2)
        for block in others:
            low = block(low)
        low = encoder.get_submodule("layer4")(encoder.get_submodule("layer3")(low))
        fused, coarse = self.fuse_low(self.pyramid(low), medium)
        deep, fine = self.fuse_high(fused, high)
        guides = (coarse, fine) if self.training else ()
        return Features(deep=deep, mid=mid, fine=upsample(deep), guides=guides)
