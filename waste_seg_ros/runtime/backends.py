"""Backends: a bundle's network on some runtime, behind one call.

All give the same `Prediction`, as all run the graph of `runtime.export.Deploy`. "auto" takes the
first that loads of `auto_order`. ``waste-seg bench`` on two x86-64 cores at 320x240 puts OpenVINO
well before the other two, which are close to each other; ONNX Runtime goes before eager torch
because it holds far less memory and minds busy cores less. Measure on your machine, and name a
backend where the order is another.

"compile" is eager torch through torch.compile, which needs a C++ compiler. "tensorrt" is for NVIDIA
GPUs, see `runtime.tensorrt_engine`; "auto" tries it first where there is such a GPU.

A backend that is loaded with ``verify`` has to say of a test frame what another runtime says:
eager torch where torch is at work in this process anyway, else the other one of OpenVINO and ONNX
Runtime, and where these two differ, eager torch decides, if installed. One that differs is refused.
So a robot does not hold torch in its memory to be sure of its network.

Each runtime is imported only when asked for.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.runtime import AUTO_ORDER, KINDS
from waste_seg_ros.runtime.bundle import GRAPH, Bundle, Manifest
from waste_seg_ros.runtime.verify import compare, test_frame

if TYPE_CHECKING:
    from torch import Tensor

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
    """A loaded network.

    Attributes:
        name: one of `KINDS`.
        input_size: (width, height) [px].
        notes: what the user should know: backends that were passed over, and why.
        checked: how it compares with another runtime; "" if nobody asked.
    """

    name: str
    input_size: tuple[int, int]
    notes: tuple[str, ...]
    checked: str

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


@functools.cache
def gpu_found() -> bool:
    """Whether the driver of this machine knows an NVIDIA GPU; imports nothing of CUDA or torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int()
        return (
            not driver.cuInit(0)
            and not driver.cuDeviceGetCount(ctypes.byref(count))
            and (count.value > 0)
        )
    except (OSError, AttributeError):
        return False


def auto_order() -> tuple[str, ...]:
    """Backends in the order in which "auto" tries them on this machine."""
    if gpu_found() and importlib.util.find_spec("torch_tensorrt") is not None:
        return ("tensorrt", *AUTO_ORDER)
    return AUTO_ORDER


def load_backend(
    bundle: Bundle,
    kind: str = "auto",
    input_size: tuple[int, int] | None = None,
    threads: int = 0,
    precision: str = "f32",
    *,
    verify: bool = False,
    background: bool = False,
) -> Backend:
    """Loads a bundle's network.

    Args:
        bundle: an opened bundle.
        kind: one of `KINDS`; "auto" falls back along `auto_order`, and logs and notes the reason
            for each that it passes over.
        input_size: (width, height) [px], multiples of the manifest's stride; None takes the
            manifest's.
        threads: to run on; 0 leaves it to the runtime.
        precision: "f32", or "bf16" where the runtime has it (OpenVINO on CPUs with AVX512-BF16 or
            AMX), which is faster on such CPUs and gives slightly other scores.
        verify: refuse a backend that says something else of a test frame than another runtime, see
            `verify.Difference`.
        background: "compile" answers in eager torch until a thread has compiled the network; else
            that is done before this returns, which takes a minute or more.

    Raises:
        BackendError: unknown kind or precision, a runtime that is not installed or cannot read
            the graph, a size that the network cannot take, a backend that ``verify`` refuses.
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

    def load(choice: str) -> Backend:
        backend = _LOADERS[choice](bundle, size, threads, precision)
        if isinstance(backend, _Compiled):
            backend.compile(background)  # which compares it with eager torch
        elif verify:
            backend.checked = _verified(backend, bundle, threads, precision)
        return backend

    if kind != "auto":
        return load(kind)
    reasons: list[str] = []
    for choice in auto_order():
        try:
            backend = load(choice)
        except BackendError as error:
            reasons.append(str(error))
            continue
        backend.notes = tuple(f"{reason}; running on {choice} instead" for reason in reasons)
        for note in backend.notes:
            _log.warning("%s", note)
        return backend
    raise BackendError("no backend can be had: " + "; ".join(reasons))


def _references(name: str, bundle: Bundle) -> Iterator[str]:
    """The backends to compare one with, the ones that cost least first."""
    torch_has_it = bundle.manifest.precision != "int8"
    if torch_has_it and "torch" in sys.modules:
        yield "torch"
        return
    yield from (light for light in ("onnxruntime", "openvino") if light != name)
    if torch_has_it:
        yield "torch"


def _verified(backend: Backend, bundle: Bundle, threads: int, precision: str) -> str:
    """How a backend compares with another one on a test frame, which must be well enough.

    Raises BackendError if it cannot run the frame or differs from all that it is compared with.
    """
    if backend.name == "torch":
        return "is what others are compared with"
    size = backend.input_size
    frame = test_frame(size)
    try:
        found = backend.predict(frame)
    except Exception as error:  # runtimes raise errors of their own
        raise BackendError(
            f"backend {backend.name}: cannot run '{bundle.manifest.name}' on a test frame: "
            f"{_first_line(error)}"
        ) from error
    coarse = bundle.manifest.precision == "int8" or precision != "f32"
    problem = ""
    for choice in _references(backend.name, bundle):
        try:
            expected = _LOADERS[choice](bundle, size, threads, "f32").predict(frame)
        except Exception as error:  # one that is not there, or fails, is no reference
            _log.debug("not compared with %s: %s", choice, error)
            continue
        difference = compare(found, expected)
        if difference.fits(coarse):
            return f"against {choice}: {difference}"
        problem = f"{choice} on a {size[0]}x{size[1]} test frame: {difference}"
    if problem:
        raise BackendError(f"backend {backend.name}: {bundle.manifest.name} differs from {problem}")
    return "not compared: there is no other backend that runs it"


def as_batch(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The image as a contiguous batch of one."""
    if image.shape != (size[1], size[0], 3) or image.dtype != np.uint8:
        raise BackendError(
            f"image of shape {image.shape} and type {image.dtype}; expected "
            f"({size[1]}, {size[0]}, 3) uint8 RGB"
        )
    return np.ascontiguousarray(image)[None]


def as_prediction(outputs: list[NDArray[Any]]) -> Prediction:
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
    notes: tuple[str, ...] = ()
    checked = ""

    def __init__(self, bundle: Bundle, size: tuple[int, int], threads: int, precision: str) -> None:
        try:
            import openvino
        except ImportError as error:
            raise _missing(self.name, error) from error
        # One frame at a time: the shortest time for it, not the most frames in flight. The
        # precision is named because OpenVINO takes bf16 by itself on CPUs that have it. Its threads
        # are not pinned to cores, as it would by itself: the camera, DDS and others are on these
        # cores, too, and a pinned thread waits for its own one while another is free.
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
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
        results = self._request.infer([as_batch(image, self.input_size)], share_inputs=True)
        return as_prediction([results[output] for output in self._outputs])


class _OnnxRuntime:
    name = "onnxruntime"
    notes: tuple[str, ...] = ()
    checked = ""

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
        return as_prediction(self._session.run(None, {"image": as_batch(image, self.input_size)}))


class _Torch:
    name = "torch"
    notes: tuple[str, ...] = ()
    checked = ""

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
        self._eager: Deploy = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._run: Callable[[Tensor], tuple[Tensor, ...]] = self._eager
        self.input_size = size

    def predict(self, image: NDArray[np.uint8]) -> Prediction:
        return self._predict(self._run, image)

    def _predict(
        self, run: Callable[[Tensor], tuple[Tensor, ...]], image: NDArray[np.uint8]
    ) -> Prediction:
        with self._torch.inference_mode():
            outputs = run(self._torch.from_numpy(as_batch(image, self.input_size)))
        return as_prediction([output.contiguous().numpy() for output in outputs])


class _Compiled(_Torch):
    """Eager torch until `compile` has made it faster."""

    name = "compile"
    compiler = "inductor"
    """Of torch.compile."""

    def __init__(self, bundle: Bundle, size: tuple[int, int], threads: int, precision: str) -> None:
        wanted = os.environ.get("CXX") or "g++"
        if shutil.which(wanted) is None and shutil.which("clang++") is None:
            raise BackendError(
                f"backend compile: no C++ compiler ({wanted} or clang++), which torch.compile "
                "needs: apt-get install g++, or choose another backend"
            )
        super().__init__(bundle, size, threads, precision)
        self._thread: threading.Thread | None = None

    def compile(self, background: bool) -> None:
        """Compiles the network and compares it with eager torch, which stays if it differs.

        Raises BackendError if it cannot be compiled or differs; in the background that is noted.
        """
        if not background:
            self._compile()
            return

        def work() -> None:
            try:
                self._compile()
            except BackendError as error:
                self.notes = (*self.notes, f"{error}; running on eager torch instead")
                _log.warning("%s", self.notes[-1])

        self.checked = "not compared: eager torch answers until the network is compiled"
        self._thread = threading.Thread(target=work, name="compile", daemon=True)
        self._thread.start()

    def _compile(self) -> None:
        frame = test_frame(self.input_size)
        expected = self._predict(self._eager, frame)
        try:
            run = self._torch.compile(self._eager, backend=self.compiler, dynamic=False)
            found = self._predict(run, frame)
        except Exception as error:  # of dynamo, inductor or the C++ compiler
            raise BackendError(f"backend compile: {_first_line(error)}") from error
        difference = compare(found, expected)
        if not difference.fits(coarse=False):
            raise BackendError(f"backend compile: differs from eager torch: {difference}")
        self._run = run
        self.checked = f"against torch: {difference}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _tensorrt(bundle: Bundle, size: tuple[int, int], threads: int, precision: str) -> Backend:
    if not gpu_found():
        raise BackendError(
            "backend tensorrt: no NVIDIA GPU is found (nvidia-smi lists them); choose another "
            "backend"
        )
    from waste_seg_ros.runtime.tensorrt_engine import TensorRt

    return TensorRt(bundle, size, precision)


_LOADERS: dict[str, Callable[[Bundle, tuple[int, int], int, str], Backend]] = {
    "openvino": _OpenVino,
    "onnxruntime": _OnnxRuntime,
    "torch": _Torch,
    "compile": _Compiled,
    "tensorrt": _tensorrt,
}
