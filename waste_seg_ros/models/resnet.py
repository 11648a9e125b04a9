"""ResNet-50, the encoder of several trunks.

After K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
table 1; the stride of a bottleneck is in its 3x3 convolution, as in torchvision, whose parameter
names these are at every width, so that its ImageNet weights load by name at width 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from waste_seg_ros.models.heads import scaled

EXPANSION = 4


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(
            inner, inner, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
            if stride > 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 without its classifier.

    forward: (N, 3, H, W) to five maps: after the first convolution (1/2 of the input) and after
    each of the four stages (1/4 and, unless dilated, 1/8, 1/16, 1/32). ``channels`` are theirs.

    Args:
        width: factor on the channels (to multiples of 8).
        dilations: of the four stages; a stage with a dilation above 1 keeps its input's
            resolution.
    """

    def __init__(self, width: float = 1.0, dilations: Sequence[int] = (1, 1, 1, 1)) -> None:
        super().__init__()
        stem = scaled(64, width)
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        channels = [stem]
        for number, (inner, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            dilation = dilations[number]
            outputs = scaled(inner * EXPANSION, width)
            stage = []
            for block in range(blocks):
                stride = 2 if number and not block and dilation == 1 else 1
                inputs = outputs if block else channels[-1]
                stage.append(_Bottleneck(inputs, scaled(inner, width), outputs, stride, dilation))
            self.add_module(f"layer{number + 1}", nn.Sequential(*stage))
            channels.append(outputs)
        self.channels = tuple(channels)

    def stem(self, x: Tensor) -> Tensor:
        """The first convolution: (N, 3, H, W) to (N, c, H/2, W/2)."""
        return functional.relu(self.bn1(self.conv1(x)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        first = self.stem(x)
        second = self.get_submodule("layer1")(functional.max_pool2d(first, 3, 2, 1))
        third = self.get_submodule("layer2")(second)
        fourth = self.get_submodule("layer3")(third)
        return first, second, third, fourth, self.get_submodule("layer4")(fourth)
