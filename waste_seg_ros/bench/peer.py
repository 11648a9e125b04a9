"""The peer of the benchmark: an ultralytics YOLO segmenter of the smallest size.

For its speed only. Without a file of the user's its weights are random: it is built from the
YAML file that comes with the optional package ``ultralytics``, in a process of its own that is
told to stay offline, and exported like our bundles, with the scaling of pixels in the graph. With
`yolo export model=... format=onnx` a user makes a file of trained weights, and needs no
``ultralytics`` here. Nothing is downloaded, and nothing is unpickled.

Random weights find nothing above a threshold. So that decoding costs about what it would, the best
`CROWDED` times N boxes then count as found, N the number of items in the picture; when overlaps are
thinned out as usual, up to N are kept.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.bench.figures import BenchError
from waste_seg_ros.perception.items import Item, ItemParams, describe_items
from waste_seg_ros.runtime.backends import BackendError

STRIDE = 32
CONFIDENCE, OVERLAP = 0.25, 0.7
"""Least score of a box and greatest IoU of two of one class: the defaults of ultralytics."""
CROWDED = 8
"""Boxes that a trained network finds for an item, about, before they are thinned out."""
MEND = (
    "pip install ultralytics (AGPL-3.0), or give --peer a file of "
    "`yolo export model=... format=onnx`"
)

# Run in a process of its own: what ultralytics does at import stays out of this one.
_BUILD = """
import sys
import torch
from ultralytics.nn.tasks import SegmentationModel

class Deploy(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
    def forward(self, image):
        return self.network(image.permute(0, 3, 1, 2).float() / 255)

name, classes, width, height, path = sys.argv[1:]
torch.manual_seed(0)
network = SegmentationModel(name + ".yaml", nc=int(classes), verbose=False).eval()
network = network.fuse(verbose=False)
network.model[-1].export, network.model[-1].format = True, "onnx"
image = torch.zeros(1, int(height), int(width), 3, dtype=torch.uint8)
with torch.no_grad():
    module = Deploy(network)
    module(image)
    torch.onnx.export(
        module, (image,), path, opset_version=17, dynamo=False,
        input_names=["image"], output_names=["boxes", "masks"],
    )
"""


def peer_size(size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) not below ``size`` that the peer can take."""
    return -(-size[0] // STRIDE) * STRIDE, -(-size[1] // STRIDE) * STRIDE


def build_peer(name: str, classes: int, size: tuple[int, int], path: Path) -> None:
    """Write the graph of an ultralytics model of random weights.

    Args:
        name: of its YAML file in ultralytics, such as "yolo11n-seg".
        classes: that it tells apart.
        size: (width, height) of its input, multiples of 32.
        path: of the ONNX file.

    Raises:
        BenchError: ultralytics is not installed, or has no such model.
    """
    if importlib.util.find_spec("ultralytics") is None:
        raise BenchError(f"peer {name}: ultralytics is not installed; {MEND}")
    with tempfile.TemporaryDirectory() as settings:
        offline = {
            "YOLO_OFFLINE": "true",
            "YOLO_AUTOINSTALL": "false",
            "YOLO_CONFIG_DIR": settings,
            "MPLCONFIGDIR": settings,
        }
        command = [sys.executable, "-c", _BUILD, name, str(classes), *map(str, size), str(path)]
        built = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **offline}, cwd=settings
        )
    if built.returncode or not path.is_file():
        lines = built.stderr.strip().splitlines() or ["it wrote no file"]
        raise BenchError(f"peer {name}: ultralytics cannot build it: {lines[-1]}")


@dataclass(frozen=True, eq=False)
class Raw:
    """What the peer's network gives: boxes (4 + C + 32, A) and masks (32, h, w), float32."""

    boxes: NDArray[np.float32]
    masks: NDArray[np.float32]


class PeerNetwork:
    """The peer's graph on a runtime; takes the place of a `runtime.backends.Backend`."""

    def __init__(self, path: Path, runtime: str, threads: int = 0) -> None:
        """Load it.

        Raises:
            BenchError: the file is not such a graph, or the runtime is not installed.
        """
        self.name = runtime
        self.notes: tuple[str, ...] = ()  # as a Backend has them; nothing checks random weights
        self.checked = ""
        try:
            self._run, shape, self._takes_floats = _load(path, runtime, threads)
        except ModuleNotFoundError as error:
            raise BenchError(f"peer: {runtime} is not installed: pip install {runtime}") from error
        except Exception as error:  # the runtimes' own classes
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise BenchError(f"peer: {path}: {text[-1]}") from error
        height, width = shape[2:] if self._takes_floats else shape[1:3]
        self.input_size = (int(width), int(height))

    def run(self, image: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """The graph's outputs for (H, W, 3) uint8 RGB."""
        batch: NDArray[Any] = image[None]
        if self._takes_floats:
            batch = cv2.dnn.blobFromImage(image, 1 / 255)
        return self._run(batch)

    def predict(self, image: NDArray[np.uint8]) -> Raw:
        """As a backend does.

        Raises:
            BackendError: the image has another size than the graph takes.
        """
        if image.shape[1::-1] != self.input_size:
            raise BackendError(f"image of shape {image.shape}; the peer takes {self.input_size}")
        boxes, masks = self.run(image)[:2]
        return Raw(boxes[0], masks[0])


def _load(path: Path, runtime: str, threads: int) -> tuple[Any, list[int], bool]:
    """A function of the batch, the input's shape, and whether it is of floats."""
    if runtime == "openvino":
        import openvino

        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        compiled = openvino.Core().compile_model(str(path), "CPU", options)
        request = compiled.create_infer_request()
        outputs = list(compiled.outputs)
        given = compiled.input(0)

        def infer(batch: NDArray[Any]) -> list[NDArray[np.float32]]:
            results = request.infer([batch], share_inputs=True, share_outputs=True)
            return [results[output] for output in outputs]

        return infer, list(given.shape), given.element_type != openvino.Type.u8
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    return (
        lambda batch: session.run(None, {entry.name: batch}),
        list(entry.shape),
        entry.type != "tensor(uint8)",
    )


def decode(
    raw: Raw, size: tuple[int, int], best: int = 0
) -> tuple[NDArray[np.uint16], NDArray[np.uint8], NDArray[np.float32]]:
    """Boxes and prototypes to masks.

    Args:
        raw: what the network gives.
        size: (width, height) of its input.
        best: keep so many boxes whatever their scores; 0: those above `CONFIDENCE`.

    Returns:
        instances (h, w) uint16, labels (h, w) uint8 and scores (h, w) float32 at the resolution of
        the prototypes; where items overlap the one of the higher score is on top.
    """
    count, height, width = raw.masks.shape
    instances = np.zeros((height, width), np.uint16)
    labels = np.zeros((height, width), np.uint8)
    scores = np.zeros((height, width), np.float32)
    chances = raw.boxes[4:-count]
    likely = chances.max(axis=0)
    chosen = np.flatnonzero(likely >= CONFIDENCE)
    if best:
        chosen = np.argsort(likely)[::-1][: CROWDED * best]
    if not len(chosen):
        return instances, labels, scores
    kinds = chances[:, chosen].argmax(axis=0)
    middle, sides = raw.boxes[:2, chosen].T, raw.boxes[2:4, chosen].T
    corners = middle - sides / 2
    # Boxes of different classes do not thin each other out: they are put far apart.
    apart = np.concatenate([corners + (kinds * 1e4)[:, None], sides], axis=1)
    kept = np.asarray(cv2.dnn.NMSBoxes(apart.tolist(), likely[chosen].tolist(), 0.0, OVERLAP))
    kept = kept.ravel()[: best or None]
    scale = np.array([width / size[0], height / size[1]])
    for number, index in enumerate(kept[::-1], 1):
        x0, y0 = np.floor(corners[index] * scale).astype(int).clip(0)
        x1, y1 = np.ceil((corners[index] + sides[index]) * scale).astype(int)
        part = raw.masks[:, y0:y1, x0:x1]
        mask = np.tensordot(raw.boxes[-count:, chosen[index]], part, 1) > 0
        instances[y0:y1, x0:x1][mask] = number
        labels[y0:y1, x0:x1][mask] = kinds[index] + 1
        scores[y0:y1, x0:x1][mask] = likely[chosen[index]]
    return instances, labels, scores


def peer_items(
    raw: Raw,
    image_size: tuple[int, int],
    params: ItemParams,
    size: tuple[int, int],
    best: int = 0,
) -> tuple[NDArray[np.uint16], tuple[Item, ...]]:
    """In place of `perception.items.extract_items`: the masks are measured as ours are."""
    instances, labels, scores = decode(raw, size, best)
    return instances, describe_items(instances, labels, scores, image_size, params)
