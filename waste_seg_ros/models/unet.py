"""U-Net with VGG-16 or ResNet-50 as the contracting path.

After O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", MICCAI 2015, figure 1. The expanding path is the paper's: four times a 2x2 transposed
convolution that doubles the resolution, the encoder's map of that resolution beside it, and two
3x3 convolutions, to 512, 256, 128 and 64 channels. It differs in that

- the contracting path is a network with ImageNet weights to start from, so its deepest map has 512
  (VGG-16) or 2048 (ResNet-50) channels instead of 1024;
- convolutions are padded, so maps need no cropping and the output has the input's size;
- each 3x3 convolution is batch normalised, which the paper predates; there is no dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from waste_seg_ros.models.heads import Features, Trunk, scaled
from waste_seg_ros.models.resnet import ResNet50
from waste_seg_ros.models.vgg import VGG16, conv_stack

DECODER = (512, 256, 128, 64)
"""Channels of the expanding path, from the deepest step to the finest."""


class _Up(nn.Module):
    """(N, inputs, h, w) and the encoder's (N, skip, 2h, 2w) to (N, outputs, 2h, 2w)."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.convs = conv_stack(outputs + skip, outputs, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """See the class."""
        return self.convs(torch.cat((skip, self.up(x)), 1))


class _Decoder(nn.Module):
    """The expanding path: the encoder's five maps, finest first, to its own four, deepest first.

    ``encoder``: channels of the encoder's maps; ``channels``: of its own.
    """

    def __init__(self, encoder: Sequence[int], width: float) -> None:
        super().__init__()
        self.channels = tuple(scaled(channels, width) for channels in DECODER)
        inputs = (encoder[-1], *self.channels)
        skips = encoder[-2::-1]
        self.steps = nn.ModuleList(
            _Up(*step) for step in zip(inputs[:-1], skips, self.channels, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """See the class."""
        x = maps[-1]
        outputs = []
        for step, skip in zip(self.steps, maps[-2::-1], strict=True):
            x = step(x, skip)
            outputs.append(x)
        return outputs


class UNetVGG16Trunk(Trunk):
    """U-Net on VGG-16, without its classifier.

    The encoder's deepest map is at 1/16, before the last pooling, so that there are four steps up
    as in the paper; ``stride`` is that of VGG-16, 32. forward: (N, 3, H, W) normalised RGB to
    `Features`, all of the decoder. ``width`` scales the channels (to multiples of 8).
    """

    stride = 32
    fine_stride = 1

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(width)
        self.encoder = VGG16(width)
        self.decoder = _Decoder(self.encoder.channels, width)
        eighth, quarter, _, full = self.decoder.channels
        self.channels = {"deep": eighth, "mid": quarter, "fine": full}

    def forward(self, x: Tensor) -> Features:
        """See the class."""
        maps = [functional.relu(stage.before) for stage in self.encoder(x)]
        eighth, quarter, _, full = self.decoder(maps)
        return Features(deep=eighth, mid=quarter, fine=full)


class UNetResNet50Trunk(Trunk):
    """U-Net on ResNet-50, without its classifier.

    The skips are ResNet-50's maps at 1/16, 1/8, 1/4 and 1/2. It has none at full resolution, so the
    decoder ends at 1/2 and the classifier's transposed convolution is the last step up. forward:
    (N, 3, H, W) normalised RGB to `Features`, all of the decoder. ``width`` scales the channels
    (to multiples of 8).
    """

    stride = 32
    fine_stride = 2

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(width)
        self.encoder = ResNet50(width)
        self.decoder = _Decoder(self.encoder.channels, width)
        _, eighth, quarter, half = self.decoder.channels
        self.channels = {"deep": eighth, "mid": quarter, "fine": half}

    def forward(self, x: Tensor) -> Features:
        """See the class."""
        _, eighth, quarter, half = self.decoder(self.encoder(x))
        return Features(deep=eighth, mid=quarter, fine=half)
