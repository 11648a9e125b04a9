"""BiSeNet with Xception39.

After C. Yu, J. Wang, C. Peng, C. Gao, G. Yu, N. Sang, "BiSeNet: Bilateral Segmentation Network for
Real-time Semantic Segmentation", ECCV 2018, arXiv 1808.00897: a shallow spatial path keeps detail
at 1/8, a deep and narrow context path (Xception39) sees far, attention refines the latter and a
fusion module joins the two.

The paper's table 6 lists 5.8 M for this network and 49.0 M for the one with ResNet-18, but its
text fits such numbers only as megabytes of 4-byte weights: ResNet-18 has 11.7 million parameters
and the parts around it no more than two. So does its authors' later code. This one has 1.45 million
parameters, 5.8 MB.

Where we differ: the two auxiliary classifiers are single 1x1 convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from waste_seg_ros.models.heads import Features, Trunk, scaled, upsample


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Depthwise 3x3 and pointwise convolution."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
    )


class XceptionBlock(nn.Module):
    """Three separable convolutions, the last four times as wide, beside a shortcut."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _separable(inputs, inner, stride),
            nn.ReLU(),
            _separable(inner, inner),
            nn.ReLU(),
            _separable(inner, outputs),
        )
        self.shortcut = (
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
            if stride > 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return functional.relu(self.branch(x) + self.shortcut(x))


class Xception39(nn.Module):
    """The context path's encoder: (N, 3, H, W) to its maps at 1/16 and 1/32 (figure 2)."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        stem = scaled(8, width)
        self.stem = _conv(3, stem, 3, 2)
        channels = [stem]
        for number, (inner, blocks) in enumerate(((16, 4), (32, 8), (64, 4))):
            outputs = scaled(4 * inner, width)
            stage = [
                XceptionBlock(
                    outputs if block else channels[-1],
                    scaled(inner, width),
                    outputs,
                    1 if block else 2,
                )
                for block in range(blocks)
            ]
            self.add_module(f"stage{number + 1}", nn.Sequential(*stage))
            channels.append(outputs)
        self.channels = (channels[2], channels[3])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        x = functional.max_pool2d(self.stem(x), 3, 2, 1)
        sixteenth = self.get_submodule("stage2")(self.get_submodule("stage1")(x))
        return sixteenth, self.get_submodule("stage3")(sixteenth)


def _mean(x: Tensor) -> Tensor:
    """Mean over the places: (N, C, h, w) to (N, C, 1, 1)."""
    return x.mean((2, 3), keepdim=True)


class AttentionRefinement(nn.Module):
    """3x3 convolution whose channels are weighed by the map's mean (figure 2b)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _conv(inputs, outputs, 3)
        # A bias instead of batch statistics: those of one value to an image are of no use.
        self.attention = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.conv(x)
        return x * self.attention(_mean(x)).sigmoid()


class FeatureFusion(nn.Module):
    """Joins the two paths and reweighs the channels of the sum (figure 2c)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.join = _conv(inputs, outputs, 1)
        squeezed = max(8, outputs // 4)
        self.squeeze = nn.Conv2d(outputs, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, outputs, 1)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        """See the class."""
        x = self.join(torch.cat((spatial, context), 1))
        return x + x * self.excite(functional.relu(self.squeeze(_mean(x)))).sigmoid()


class BiSeNetTrunk(Trunk):
    """BiSeNet without its classifiers.

    forward: (N, 3, H, W) normalised RGB, H and W multiples of 32, to `Features`; the guides are
    the two refined maps of the context path.
    """

    stride = 32
    fine_stride = 8

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(width)
        c64, c128, c256 = scaled(64, width), scaled(128, width), scaled(256, width)
        self.spatial1, self.spatial2 = _conv(3, c64, 7, 2), _conv(c64, c64, 3, 2)
        self.spatial3 = nn.Sequential(_conv(c64, c64, 3, 2), _conv(c64, c128, 1))
        self.context = Xception39(width)
        sixteenth, last = self.context.channels
        # No batch statistics here either.
        self.whole = nn.Conv2d(last, c128, 1)
        self.refine32 = AttentionRefinement(last, c128)
        self.refine16 = AttentionRefinement(sixteenth, c128)
        self.smooth32, self.smooth16 = _conv(c128, c128, 3), _conv(c128, c128, 3)
        self.fusion = FeatureFusion(2 * c128, c256)
        self.last = _conv(c256, c64, 3)
        self.channels = {"deep": c256, "mid": c64, "fine": c64}
        self.guide_channels = (c128, c128)

    def forward(self, x: Tensor) -> Features:
        """See the class."""
        mid = self.spatial2(self.spatial1(x))
        spatial = self.spatial3(mid)
        sixteenth, last = self.context(x)
        coarse = self.refine32(last) + functional.relu(self.whole(_mean(last)))
        coarse = self.smooth32(upsample(coarse))
        context = self.smooth16(upsample(self.refine16(sixteenth) + coarse))
        deep = self.fusion(spatial, context)
        guides = (coarse, context) if self.training else ()
        return Features(deep=deep, mid=mid, fine=self.last(deep), guides=guides)
