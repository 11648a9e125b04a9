"""VGG-16 with batch normalisation, the encoder of U-Net and SegNet trunks.

After K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015, configuration D, without its classifier and with the batch normalisation
of S. Ioffe, C. Szegedy (2015) after each convolution. Layers and parameter names are those of
torchvision's ``vgg16_bn``, so that its ImageNet weights load by name at width 1.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from waste_seg_ros.models.heads import scaled

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and number of convolutions of each stage; a 2x2 pooling ends it."""


class Stage(NamedTuple):
    """What a stage of VGG-16 gives, both before the ReLU of its last convolution.

    ``before``: (N, C, h, w) its map; ``pooled``: (N, C, h/2, w/2) the 2x2 maxima of it. ReLU
    and maximum commute, so this is VGG-16's pooling; but here a window's maximum has one place
    also where ReLU makes the whole window zero, which SegNet's unpooling needs.
    """

    before: Tensor
    pooled: Tensor


class VGG16(nn.Module):
    """VGG-16 without its classifier.

    forward: (N, 3, H, W), H and W multiples of 32, to five `Stage`, their maps at 1/1, 1/2, 1/4,
    1/8 and 1/16 of the input. ``channels`` are theirs. ``width`` scales the channels (to multiples
    of 8).
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.channels = tuple(scaled(channels, width) for channels, _ in STAGES)
        layers: list[nn.Module] = []
        inputs = 3
        for (_, convolutions), outputs in zip(STAGES, self.channels, strict=True):
            for _ in range(convolutions):
                layers += [
                    nn.Conv2d(inputs, outputs, 3, padding=1),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                ]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Stage, ...]:
        """See the class."""
        stages = []
        for layer, following in pairwise([*self.features, nn.Identity()]):
            if isinstance(layer, nn.MaxPool2d):
                stages.append(Stage(x, layer(x)))
                x = functional.relu(stages[-1].pooled)
            elif not isinstance(following, nn.MaxPool2d):  # that ReLU comes after the pooling
                x = layer(x)
        return tuple(stages)


def conv_stack(*channels: int) -> nn.Sequential:
    """3x3 convolutions with batch normalisation and ReLU, from each of ``channels`` to the next."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
