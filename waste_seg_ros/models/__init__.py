"""Segmentation networks: a trunk of some architecture under one or several heads."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from waste_seg_ros.data.sample import CLASSES
from waste_seg_ros.models.bisenet import BiSeNetTrunk
from waste_seg_ros.models.enet import ENetTrunk
from waste_seg_ros.models.heads import Features, InstanceBranch, PixelClassifier, Trunk
from waste_seg_ros.models.icnet import ICNetTrunk
from waste_seg_ros.models.segnet import SegNetResNet50Trunk, SegNetVGG16Trunk
from waste_seg_ros.models.unet import UNetResNet50Trunk, UNetVGG16Trunk
from waste_seg_ros.runtime import HEADS

TRUNKS: dict[str, type[Trunk]] = {
    "enet": ENetTrunk,
    "icnet": ICNetTrunk,
    "bisenet": BiSeNetTrunk,
    "unet-vgg16": UNetVGG16Trunk,
    "unet-resnet50": UNetResNet50Trunk,
    "segnet-vgg16": SegNetVGG16Trunk,
    "segnet-resnet50": SegNetResNet50Trunk,
}
"""Trunk of each architecture by its name."""


class SegmentationModel(nn.Module):
    """A trunk with heads.

    forward: (N, 3, H, W) float32 normalised RGB, H and W multiples of ``stride``, to a dict with,
    by head:

    - binary: ``binary`` (N, 1, H, W) logit of "an item of whatever class";
    - semantic: ``binary``, and ``semantic`` (N, C+1, H, W) logits, channel 0 the background;
    - instance: the two above, ``centers`` (N, 1, H/4, W/4) heat-map logits and ``offsets``
      (N, 2, H/4, W/4), (dx, dy) in input pixels from the cell's centre to its item's centre of
      mass. The centre of cell (i, j) is the input point x = 4j + 1.5, y = 4i + 1.5, with pixel
      centres at whole numbers.

    Built with ``guides``, and in training mode, also ``guide0``, ``guide1``, ...: (N, C+1, h, w)
    semantic logits from the trunk's guides, at their resolution.
    """

    def __init__(
        self,
        name: str,
        trunk: Trunk,
        heads: tuple[str, ...],
        classes: tuple[str, ...],
        guides: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.heads = heads
        self.classes = classes
        self.stride = trunk.stride
        self.width = trunk.width
        self.trunk = trunk
        channels = trunk.channels
        # Every head has the binary classifier: it tells items from belt better than the background
        # channel of the semantic one (see `decide`).
        self.binary = PixelClassifier(channels["fine"], 1, trunk.fine_stride)
        self.semantic = (
            PixelClassifier(channels["fine"], len(classes) + 1, trunk.fine_stride)
            if "semantic" in heads or "instance" in heads
            else None
        )
        self.instance = (
            InstanceBranch(channels["deep"], channels["mid"]) if "instance" in heads else None
        )
        self.guides = (
            nn.ModuleList(nn.Conv2d(c, len(classes) + 1, 1) for c in trunk.guide_channels)
            if guides and self.semantic is not None
            else nn.ModuleList()
        )

    def output_layers(self) -> tuple[nn.Module, ...]:
        """The layers that give the outputs."""
        found: list[nn.Module] = [self.binary.full]
        if self.semantic is not None:
            found.append(self.semantic.full)
        if self.instance is not None:
            found += [self.instance.centers, self.instance.offsets]
        return tuple(found)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """See the class."""
        features: Features = self.trunk(x)
        outputs: dict[str, Tensor] = {"binary": self.binary(features)}
        if self.semantic is not None:
            outputs["semantic"] = self.semantic(features)
        if self.instance is not None:
            outputs["centers"], outputs["offsets"] = self.instance(features)
        if self.training:
            for number, guide in enumerate(self.guides):
                outputs[f"guide{number}"] = guide(features.guides[number])
        return outputs


def decide(outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a network says of each pixel: labels (N, H, W) uint8 and their probability (N, H, W).

    The binary logit decides between belt and item, the semantic logits between the classes of an
    item. On photographs of a belt that was not in training this is far better than the largest of
    all semantic logits, whose background has to be learned against every class. Without semantic
    logits an item's label is 1. Of equal logits the first class wins.
    """
    logit = outputs["binary"][:, 0]
    item = logit > 0
    sure = torch.sigmoid(logit.abs())
    if "semantic" not in outputs:
        return item.to(torch.uint8), sure
    # Class by class in elementwise steps, which OpenVINO fuses to one loop over the pixels; its
    # argmax and sum over the channels take about twice as long.
    first, *others = outputs["semantic"].unbind(1)[1:]
    best, labels = first, torch.ones_like(first)
    for label, other in enumerate(others, 2):
        labels = torch.where(other > best, torch.full_like(other, label), labels)
        best = torch.maximum(best, other)
    total = torch.exp(first - best)
    for other in others:
        total = total + torch.exp(other - best)
    labels = torch.where(item, labels, torch.zeros_like(labels))
    return labels.to(torch.uint8), torch.where(item, sure / total, sure)


def build_model(
    name: str,
    head: str | Sequence[str] = "semantic",
    classes: Sequence[str] = CLASSES,
    width: float = 1.0,
    guides: bool = False,
) -> SegmentationModel:
    """A network with fresh weights.

    ``name``: a key of `TRUNKS`. ``head``: one of `HEADS` or several of them on one trunk.
    ``classes``: names of label ids 1, 2, ... ``width`` multiplies the trunk's channels.
    ``guides``: with the classifiers that only training needs.

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
    return SegmentationModel(name, TRUNKS[name](width), ordered, tuple(classes), guides)


def parameter_count(model: nn.Module) -> int:
    """Number of trained numbers in ``model``."""
    return sum(p.numel() for p in model.parameters())


def load_weights(model: SegmentationModel, weights: Mapping[str, Tensor]) -> None:
    """Copies ``weights`` into ``model``; every name must match, and every shape after `fit`.

    Raises ValueError.
    """
    fit(model, weights)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def fit(model: SegmentationModel, weights: Mapping[str, Tensor]) -> bool:
    """Takes channels from the layers of ``model`` until they have those of ``weights``.

    A pruned network is so built: by its architecture first, then by its weights. Layers get fresh
    tensors where they change; what ``weights`` does not name or what differs otherwise is left, and
    so are the outputs. Returns whether anything changed.

    Raises ValueError if the layers do not go together any more.
    """
    changed = False
    outputs = model.output_layers()
    for name, module in model.named_modules():
        shapes = {
            key: weights[f"{name}.{key}"].shape
            for key in (*module._parameters, *module._buffers)
            if f"{name}.{key}" in weights and getattr(module, key) is not None
        }
        if module in outputs and "weight" in shapes:
            (*shape,), own = shapes["weight"], module.weight.shape
            axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
            shape[axis] = own[axis]
            shapes = {"weight": torch.Size(shape)}
        changed |= _narrow(module, shapes)
    if changed:
        _fit_guides(model)
        _check_channels(model)
    return changed


def _narrow(module: nn.Module, shapes: Mapping[str, torch.Size]) -> bool:
    """Gives the tensors of a layer other shapes; returns whether any is other."""
    narrower = {}
    for key, shape in shapes.items():
        own = getattr(module, key)
        kernel_same = own.shape[2:] == shape[2:] and own.dim() == len(shape)
        if kernel_same and own.shape != shape and all(map(int.__le__, shape[:2], own.shape[:2])):
            narrower[key] = shape
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d | nn.PReLU):
        return False
    for key, shape in narrower.items():
        own = getattr(module, key)
        fresh = own.detach().new_zeros(shape)
        setattr(module, key, nn.Parameter(fresh) if isinstance(own, nn.Parameter) else fresh)
    weight = module.weight.shape
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:  # depthwise
            module.groups = weight[0]
        module.out_channels, module.in_channels = weight[0], weight[1] * module.groups
    elif isinstance(module, nn.ConvTranspose2d):
        module.in_channels, module.out_channels = weight[0], weight[1]
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = weight[0]
    else:
        module.num_parameters = weight[0]
    return bool(narrower)


def _fit_guides(model: SegmentationModel) -> None:
    """Classifiers that only training needs, for the channels that the trunk has now."""
    if not model.guides:
        return
    trunk = copy.deepcopy(model.trunk).to("meta").train()
    side = 2 * model.stride
    guides = trunk(torch.zeros(2, 3, side, side, device="meta")).guides
    for number, (guide, layer) in enumerate(zip(guides, model.guides, strict=True)):
        assert isinstance(layer, nn.Conv2d)
        if layer.in_channels != guide.shape[1]:
            model.guides[number] = nn.Conv2d(guide.shape[1], layer.out_channels, 1)


def _check_channels(model: SegmentationModel) -> None:
    """Raises ValueError unless ``model`` runs."""
    side = 2 * model.stride
    try:
        with torch.no_grad():
            twin = copy.deepcopy(model).to("meta").eval()
            twin(torch.zeros(1, 3, side, side, device="meta"))
    except RuntimeError as error:
        raise ValueError(f"its layers do not go together: {error}") from None
