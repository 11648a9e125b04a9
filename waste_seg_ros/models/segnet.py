"""SegNet with VGG-16 or ResNet-50 as the encoder.

After V. Badrinarayanan, A. Kendall, R. Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder
Architecture for Image Segmentation", TPAMI 2017, figure 2. The decoder gets no maps of the encoder
but the places of the maxima that its poolings took, and puts each value back at such a place.
`enet` tells why that is an equality mask here.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from waste_seg_ros.models.enet import unpool, unpool_mask
from waste_seg_ros.models.heads import Features, Trunk
from waste_seg_ros.models.resnet import ResNet50
from waste_seg_ros.models.vgg import STAGES, VGG16, conv_stack


class SegNetVGG16Trunk(Trunk):
    """SegNet, without its classifier.

    The decoder mirrors VGG-16's 13 convolutions; each is followed by batch normalisation and ReLU,
    as in the encoder. It differs from the paper in that the places of the maxima are taken before
    ReLU (see `vgg.Stage`): where ReLU makes all of a window zero, the paper's code takes its first
    place, we take its largest. The classifier is a 1x1 convolution, as for every trunk here.

    forward: (N, 3, H, W) normalised RGB, H and W multiples of 32, to `Features`: ``deep`` and
    ``fine`` of the decoder, ``mid`` of the encoder, whose map holds more of the edges than what
    unpooling leaves of it. ``width`` scales the channels (to multiples of 8).
    """

    stride = 32
    fine_stride = 1

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(width)
        self.encoder = VGG16(width)
        channels = self.encoder.channels
        outputs = (channels[0], *channels[:-1])
        self.decoder = nn.ModuleList(
            conv_stack(*(channels[stage],) * STAGES[stage][1], outputs[stage])
            for stage in reversed(range(len(STAGES)))
        )
        self.channels = {"deep": channels[2], "mid": channels[2], "fine": channels[0]}

    def forward(self, x: Tensor) -> Features:
        """See the class."""
        stages = self.encoder(x)
        x = functional.relu(stages[-1].pooled)
        outputs = []
        for convs, stage in zip(self.decoder, reversed(stages), strict=True):
            x = convs(unpool(x, unpool_mask(*stage)))
            outputs.append(x)
        return Features(deep=outputs[1], mid=functional.relu(stages[2].before), fine=outputs[-1])


class SegNetResNet50Trunk(Trunk):
    """SegNet's decoder on ResNet-50, without its classifier.

    The paper has no such network. Public ones, such as ``resnet50_segnet`` of
    divamgupta/image-segmentation-keras, take ResNet-50's map at 1/16 through one convolution at
    each resolution up to 1/2 (512, 256, 128, 64 channels) and upsample between them without any
    places of maxima, as ResNet-50 halves its maps by strided convolutions. Without those places it
    would be no SegNet, so here the decoder gets what SegNet's would: for each of the encoder's maps
    that is halved next (1/2, 1/4, 1/8, 1/16), the places of the maxima of its 2x2 windows. The
    encoder itself is left as it is, so its ImageNet weights keep their meaning. The maps come after
    ReLU; where one has no positive value in a window there is no place to tell, and unpooling fills
    the window.

    The decoder begins at 1/32 with a 1x1 convolution to the channels of the first places. At 1/16
    to 1/2, two convolutions follow each unpooling, the first of which goes to the channels of the
    next places. It ends at 1/2, where ResNet-50's maps and the public decoders end; the
    classifier's transposed convolution is the last step up.

    forward: (N, 3, H, W) normalised RGB, H and W multiples of 32, to `Features`: ``deep`` and
    ``fine`` of the decoder, ``mid`` of the encoder. ``width`` scales the channels (to multiples
    of 8).
    """

    stride = 32
    fine_stride = 2

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(width)
        self.encoder = ResNet50(width)
        *places, deepest = self.encoder.channels
        self.reduce = nn.Sequential(
            nn.Conv2d(deepest, places[-1], 1, bias=False),
            nn.BatchNorm2d(places[-1]),
            nn.ReLU(inplace=True),
        )
        outputs = (places[0], *places[:-1])
        self.decoder = nn.ModuleList(
            conv_stack(places[step], outputs[step], outputs[step])
            for step in reversed(range(len(places)))
        )
        self.channels = {"deep": outputs[2], "mid": places[1], "fine": outputs[0]}

    def forward(self, x: Tensor) -> Features:
        """See the class."""
        *maps, x = self.encoder(x)
        x = self.reduce(x)
        outputs = []
        for convs, before in zip(self.decoder, reversed(maps), strict=True):
            x = convs(unpool(x, unpool_mask(before, functional.max_pool2d(before, 2))))
            outputs.append(x)
        return Features(deep=outputs[1], mid=maps[1], fine=outputs[-1])
