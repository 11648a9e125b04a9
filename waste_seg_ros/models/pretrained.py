"""ImageNet weights of torchvision for the encoders `vgg.VGG16` and `resnet.ResNet50`."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from waste_seg_ros.models.resnet import ResNet50
from waste_seg_ros.models.vgg import VGG16

_CLASSIFIER = ("classifier.", "fc.")
_COUNTER = ".num_batches_tracked"


def load_encoder(model: nn.Module, path: Path) -> str:
    """Copies torchvision's weights of ``vgg16_bn`` or ``resnet50`` into a model's encoder, by name.

    ``model``: holds one `VGG16` or `ResNet50`, or is it. ``path``: a state dict, in a safetensors
    file or, with suffix .pth or .pt, as torch.save wrote it; of the latter only tensors are read,
    no code is run. The classifier's weights are passed over. The model is left as it was if
    anything is amiss. Returns a line that says what was loaded.

    Raises ValueError, naming the file and the weight, for a model without such an encoder, a file
    that cannot be read or is not a state dict, and for weights that are missing, unknown, of
    another shape or not finite.
    """
    encoder = next((m for m in model.modules() if isinstance(m, (VGG16, ResNet50))), None)
    if encoder is None:
        raise ValueError(f"{path}: the network has no VGG-16 or ResNet-50 to load it into")
    weights = {k: v for k, v in _read(path).items() if not k.startswith(_CLASSIFIER)}
    own = encoder.state_dict()
    hint = f"{path} does not fit {type(encoder).__name__}"
    # State dicts from before torch 0.4.1 have no such counters, and inference needs none.
    missing = sorted(k for k in own.keys() - weights.keys() if not k.endswith(_COUNTER))
    if missing:
        raise ValueError(f"{hint}: it lacks {_some(missing)}")
    unknown = sorted(weights.keys() - own.keys())
    if unknown:
        raise ValueError(f"{hint}: it holds {_some(unknown)} besides")
    for name in (k for k in own if k in weights):  # in the order of the layers
        value = weights[name]
        if value.shape != own[name].shape:
            raise ValueError(
                f"{hint}: {name} is {tuple(value.shape)}, not {tuple(own[name].shape)}; "
                "torchvision's weights need width 1"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
    encoder.load_state_dict(own | weights)
    return f"the encoder, {type(encoder).__name__}, starts from {path}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix in (".pth", ".pt"):
            read = torch.load(path, map_location="cpu", weights_only=True)
        else:
            read = load_file(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:  # its own message advises to run the code
        raise ValueError(
            f"{path}: damaged, or more than tensors is pickled in it, which is not loaded as that "
            "can run code; save the state dict alone, best as safetensors"
        ) from error
    except (SafetensorError, RuntimeError, ValueError, LookupError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as a state dict: {error}") from error
    if not (isinstance(read, dict) and read and all(isinstance(v, Tensor) for v in read.values())):
        raise ValueError(f"{path}: not a state dict, a mapping of names to tensors")
    return read
