"""What a network costs: its multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from waste_seg_ros.data.sample import CLASSES
from waste_seg_ros.models import SegmentationModel, build_model

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def count_macs(model: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-accumulates of ``model`` for one image of ``size`` (width, height) [px].

    Counted are the convolutions, transposed convolutions and linear layers, each time they run;
    biases, norms, activations and resampling are not, as is usual. A network on the "meta" device
    is counted without being computed. The model is left as it was.
    """
    total = 0

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        # A weight is (out, in/groups, *kernel), transposed (in, out/groups, *kernel): all but its
        # first axis is met once for each number of the output, or of the input.
        per_number = weight.numel() // weight.shape[0]
        numbers = inputs[0].numel() if isinstance(module, _TRANSPOSED) else output.numel()
        total += per_number * numbers

    counted = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, counted)]
    training = model.training
    first = next(model.parameters())
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size[1], size[0], device=first.device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return total


def outline(
    name: str,
    head: str | Sequence[str] = "semantic",
    classes: Sequence[str] = CLASSES,
    width: float = 1.0,
) -> SegmentationModel:
    """A network of `models.build_model` without memory for its weights, to count on."""
    with torch.device("meta"):
        return build_model(name, head, classes, width).eval()
