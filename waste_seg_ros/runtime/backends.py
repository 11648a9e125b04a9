"""Backends: a bundle's network on some runtime, behind one call.

All give the same `Prediction`, as all run the graph of `runtime.export.Deploy`. "auto" takes the
first that loads of `AUTO_ORDER`. ``waste-seg bench`` on two x86-64 cores at 320x240 puts OpenVINO
well before the other two, which are close to each other; ONNX Runtime goes before eager torch
because it holds far less memory and minds busy cores less. Measure on your machine, and name a
backend where the order is another.

Each runtime is imported only when asked for.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.runtime import AUTO_ORDER, KINDS
from waste_seg_ros.runtime.bundle import GRAPH, Bundle, Manifest

if TYPE_CHECKING:
    from waste_seg_ros.runtime.export import Deploy

PRECISIONS = ("f32", "bf16")

_log = logging.getLogger(__name__)


class BackendError(ValueError):
    """A backend cannot be had or cannot take an input; the message says what would do."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says of one image, at the network's resolution H x W.

    Attributes:
        labels: (H, W) uint8: 0 background, 1..C class (binary head: 1 for an item).
        scores: (H, W) float32 in 0..1: probability of that label.
        centers: (H/4, W/4) float32 in 0..1: heat map of the items' centres, 0 but for the maxima
            of 3x3 cells; None without an instance head.
        offsets: (2, H/4, W/4) float32: (dx, dy) in network pixels from the cell's centre to its
            item's centre of mass; None without an instance head.
    """

    labels: NDArray[np.uint8]
    scores: NDArray[np.float32]
    centers: NDArray[np.float32] | None = None
    offsets: NDArray[np.float32] | None = None


def as_head(prediction: Prediction, head: str) -> Prediction:
    """What a lesser head would tell: without centres (semantic), and without classes (binary)."""
    if head == "instance":
        return prediction
    labels = prediction.labels
    if head == "binary":
        labels = np.minimum(labels, 1)
    return replace(prediction, labels=labels, centers=None, offsets=None)


class Backend(Protocol):
    """A loaded network."""

    name: str
    input_size: tuple[int, int]

    def predict(self, image: NDArray[np.uint8]) -> Prediction:
        """Runs the network on an image (H, W, 3) uint8 RGB of ``input_size`` (width, height).

        The arrays given back are the caller's. Raises BackendError for another shape or type.
        """
        ...


def input_size_for(image_size: tuple[int, int], manifest: Manifest) -> tuple[int, int]:
    """The size at which to run a network on images of ``image_size`` (both (width, height)).

    Keeps the aspect as well as multiples of the stride allow, and about as many pixels as the
    network was trained at, so that a camera of another aspect costs the same.
    """
    width, height = image_size
    if width <= 0 or height <= 0:
        raise BackendError(f"image size {width}x{height}: both sides must be above 0")
    pixels = manifest.input_size[0] * manifest.input_size[1]
    scale = math.sqrt(pixels / (width * height))
    stride = manifest.stride
    # Not below two cells of the coarsest features.
    sides = [max(2, round(side * scale / stride)) * stride for side in (width, height)]
    return sides[0], sides[1]


def load_backend(
    bundle: Bundle,
    kind: str = "auto",
    input_size: tuple[int, int] | None = None,
    threads: int = 0,
    precision: str = "f32",
) -> Backend:
    """Loads a bundle's network.

    Args:
        bundle: an opened bundle.
        kind: one of `KINDS`; "auto" falls back along `AUTO_ORDER` and logs a warning with the
            reason for each that it passes over.
        input_size: (width, height) [px], multiples of the manifest's stride; None takes the
            manifest's.
        threads: to run on; 0 leaves it to the runtime.
        precision: "f32", or "bf16" where the runtime has it (OpenVINO on CPUs with AVX512-BF16 or
            AMX), which is faster on such CPUs and gives slightly other scores.

    Raises:
        BackendError: unknown kind or precision, a runtime that is not installed or cannot read
            the graph, a size that the network cannot take.
    """
    if kind not in KINDS:
        raise BackendError(f"unknown backend {kind!r}; known: {', '.join(KINDS)}")
    if precision not in PRECISIONS:
        raise BackendError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if threads < 0:
        raise BackendError(f"threads must be 0 (the runtime's choice) or more, not {threads}")
    size = input_size or bundle.manifest.input_size
    stride = bundle.manifest.stride
    if min(size) < stride or size[0] % stride or size[1] % stride:
        raise BackendError(
            f"input size {size[0]}x{size[1]}: {bundle.manifest.name} takes multiples of {stride}"
        )
    if kind != "auto":
        return _LOADERS[kind](bundle, size, threads, precision)
    reasons = []
    for choice in AUTO_ORDER:
        try:
            backend = _LOADERS[choice](bundle, size, threads, precision)
        except BackendError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            _log.warning("%s; running on %s instead", reason, choice)
        return backend
    raise BackendError("no backend can be had: " + "; ".join(reasons))


def _checked(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The image as a contiguous batch of one."""
    if image.shape != (size[1], size[0], 3) or image.dtype != np.uint8:
        raise BackendError(
            f"image of shape {image.shape} and type {image.dtype}; expected "
            f"({size[1]}, {size[0]}, 3) uint8 RGB"
        )
    return np.ascontiguousarray(image)[None]


def _prediction(outputs: list[NDArray[Any]]) -> Prediction:
    """From the graph's outputs in their order, batches of one."""
    labels, scores, *instance = (output[0] for output in outputs)
    if not instance:
        return Prediction(labels, scores)
    return Prediction(labels, scores, instance[0], instance[1])


def _missing(kind: str, error: ImportError) -> BackendError:
    package = "openvino" if kind == "openvino" else kind
    return BackendError(
        f"backend {kind}: {package} is not installed ({error}); pip install {package}, or choose "
        "another backend"
    )


class _OpenVino:
    name = "openvino"

    def __init__(self, bundle: Bundle, size: tuple[int, int], threads: int, precision: str) -> None:
        try:
            import openvino
        except ImportError as error:
            raise _missing(self.name, error) from error
        # One frame at a time: the shortest time for it, not the most frames in flight. The
        # precision is named because OpenVINO takes bf16 by itself on CPUs that have it.
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        path = bundle.path / GRAPH
        try:
            core = openvino.Core()
            model = core.read_model(str(path))
            model.reshape([1, size[1], size[0], 3])
            compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise BackendError(f"backend openvino: {path}: {_first_line(error)}") from error
        self.input_size = size
        self._request = compiled.create_infer_request()
        self._outputs = list(compiled.outputs)

    def predict(self, image: NDArray[np.uint8]) -> Prediction:
        results = self._request.infer([_checked(image, self.input_size)], share_inputs=True)
        return _prediction([results[output] for output in self._outputs])


class _OnnxRuntime:
    name = "onnxruntime"

    def __init__(self, bundle: Bundle, size: tuple[int, int], threads: int, precision: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise _missing(self.name, error) from error
        if precision != "f32":
            raise BackendError(f"backend onnxruntime: no {precision} on CPUs; only f32")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin while they wait take the cores from the camera and from each other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Errors come back as exceptions; what is printed beside them would go to the robot's log.
        options.log_severity_level = 3
        path = bundle.path / GRAPH
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own classes derive from Exception only
            raise BackendError(f"backend onnxruntime: {path}: {_first_line(error)}") from error
        self.input_size = size

    def predict(self, image: NDArray[np.uint8]) -> Prediction:
        return _prediction(self._session.run(None, {"image": _checked(image, self.input_size)}))


class _Torch:
    name = "torch"

    def __init__(self, bundle: Bundle, size: tuple[int, int], threads: int, precision: str) -> None:
        try:
            import torch
        except ImportError as error:
            raise _missing(self.name, error) from error
        from waste_seg_ros.runtime.bundle import load_model
        from waste_seg_ros.runtime.export import deploy

        if precision != "f32":
            raise BackendError(f"backend torch: {precision} is for openvino; only f32")
        if bundle.manifest.precision == "int8":
            raise BackendError(
                f"backend torch: {bundle.manifest.name} is int8, which only its graph is; choose "
                "openvino or onnxruntime"
            )
        if threads:
            torch.set_num_threads(threads)  # of the whole process: torch has no other
        self._torch = torch
        module = deploy(load_model(bundle), bundle.manifest)
        self._module: Deploy = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.input_size = size

    def predict(self, image: NDArray[np.uint8]) -> Prediction:
        with self._torch.inference_mode():
            outputs = self._module(self._torch.from_numpy(_checked(image, self.input_size)))
        return _prediction([output.contiguous().numpy() for output in outputs])


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


_LOADERS: dict[str, type[_OpenVino] | type[_OnnxRuntime] | type[_Torch]] = {
    "openvino": _OpenVino,
    "onnxruntime": _OnnxRuntime,
    "torch": _Torch,
}
