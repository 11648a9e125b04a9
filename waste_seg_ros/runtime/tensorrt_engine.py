"""TensorRT on NVIDIA GPUs: engines built by Torch-TensorRT, kept on disk, run without waste.

NOT YET RUN: this was written against the interfaces of torch_tensorrt 2.13 and TensorRT 11 on a
machine without a GPU. What needs none is tested: the cache, the network that is compiled, the
graph for 8 bits. The tests marked ``gpu`` try the rest where there is one.

The network of a bundle of floats computes in half floats: as TensorRT takes the types from the
network, it is a half network that Torch-TensorRT compiles. Steps before and after it
(`export.Deploy`) are torch's, on the GPU and in single floats. A bundle in 8 bits has no weights
for torch, so TensorRT reads its ONNX graph, made symmetric as TensorRT demands, with all its steps.

An image is copied once into pinned memory; from there to the pinned outputs a CUDA graph does all,
on a stream of its own, with one launch.

Engines are for one GPU and one version of TensorRT. They lie in $WASTE_SEG_CACHE, or in
waste_seg_ros/engines below $XDG_CACHE_HOME or ~/.cache, named by a hash of all they depend on,
which is also written into the file. One that is not what is looked for, or is damaged, is built
anew, which takes minutes; in the segmenter, the model before it serves meanwhile. Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from waste_seg_ros.files import write_file
from waste_seg_ros.models import SegmentationModel
from waste_seg_ros.runtime.backends import BackendError, Prediction, as_batch, as_prediction
from waste_seg_ros.runtime.bundle import GRAPH, Bundle, load_model
from waste_seg_ros.runtime.export import Deploy, deploy, output_names
from waste_seg_ros.runtime.quantize import symmetric_graph

_MAGIC = b"waste_seg_ros engine 1\n"
_HEADER_LIMIT = 1 << 16

_log = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------
# Cache


@dataclass(frozen=True)
class EngineKey:
    """What an engine depends on.

    Attributes:
        bundle: SHA-256 of the bundle's manifest.
        gpu: name of the GPU.
        capability: its compute capability, such as "9.0".
        tensorrt: version of TensorRT.
        torch_tensorrt: version of Torch-TensorRT, "" where it has no part.
        width: of the input [px].
        height: of the input [px].
        precision: "f16" or "int8".
    """

    bundle: str
    gpu: str
    capability: str
    tensorrt: str
    torch_tensorrt: str
    width: int
    height: int
    precision: str

    @property
    def text(self) -> str:
        """The same for equal keys only."""
        return json.dumps(asdict(self), sort_keys=True)

    def path(self, folder: Path) -> Path:
        """Where its engine is kept."""
        return folder / f"{hashlib.sha256(self.text.encode()).hexdigest()[:32]}.engine"


def cache_folder() -> Path:
    """Where engines are kept."""
    if given := os.environ.get("WASTE_SEG_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "waste_seg_ros" / "engines"


def read_engine(path: Path, key: EngineKey) -> bytes | None:
    """The engine in a file of the cache; None if there is none, another one or a damaged one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s: %s; the engine is built anew", path, error.strerror)
        return None
    head, _, rest = content.removeprefix(_MAGIC).partition(b"\n")
    digest, _, plan = rest.partition(b"\n")
    if not content.startswith(_MAGIC) or len(head) > _HEADER_LIMIT:
        reason = "is no engine of this version"
    elif head != key.text.encode():
        reason = "is for another GPU, version, bundle or size"
    elif hashlib.sha256(plan).hexdigest().encode() != digest:
        reason = "is damaged"
    else:
        return plan
    _log.warning("%s %s; it is built anew", path, reason)
    return None


def write_engine(path: Path, key: EngineKey, plan: bytes) -> None:
    """Keeps an engine, whole or not at all; a cache that cannot be written to is only warned of."""
    digest = hashlib.sha256(plan).hexdigest().encode()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, b"".join((_MAGIC, key.text.encode(), b"\n", digest, b"\n", plan)))
    except OSError as error:
        _log.warning("%s: %s; the engine is not kept", path, error)


def cached_engine(
    folder: Path, key: EngineKey, build: Callable[[], bytes], works: Callable[[bytes], bool]
) -> bytes:
    """An engine from the cache, or built and put there.

    Args:
        folder: of the cache.
        key: what it depends on.
        build: makes it.
        works: whether TensorRT takes one that was kept.
    """
    path = key.path(folder)
    plan = read_engine(path, key)
    if plan is not None:
        if works(plan):
            return plan
        _log.warning("%s: TensorRT does not take it; it is built anew", path)
    _log.warning(
        "building a TensorRT engine of %dx%d in %s, which takes minutes; it is kept in %s",
        *(key.width, key.height, key.precision, folder),
    )
    plan = build()
    write_engine(path, key, plan)
    return plan


# --------------------------------------------------------------------------------------------------
# Building


class Logits(nn.Module):
    """The network alone as what TensorRT computes, with its outputs in a fixed order.

    forward: (1, 3, H, W) normalised, of the network's type, to a tuple of its outputs by ``names``.
    """

    def __init__(self, model: SegmentationModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        outputs = self.model(x)
        return tuple(outputs[name] for name in self.names)


def logit_names(model: SegmentationModel) -> tuple[str, ...]:
    """Names of a network's outputs, in the order of its engine's."""
    with torch.inference_mode():
        return tuple(model(torch.zeros(1, 3, 2 * model.stride, 2 * model.stride)))


def half_program(
    model: SegmentationModel, size: tuple[int, int], device: str
) -> torch.export.ExportedProgram:
    """The network in half floats for inputs of ``size`` (width, height), ready to compile."""
    module = Logits(model, logit_names(model)).eval().to(device, torch.float16)
    example = torch.zeros(1, 3, size[1], size[0], device=device, dtype=torch.float16)
    with torch.no_grad():
        return torch.export.export(module, (example,))


def _build_half(model: SegmentationModel, size: tuple[int, int]) -> bytes:
    try:
        import torch_tensorrt
    except (ImportError, OSError) as error:
        raise missing(error) from error
    program = half_program(model, size, "cuda")
    example = torch.zeros(1, 3, size[1], size[0], device="cuda", dtype=torch.float16)
    try:
        return bytes(
            torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
                program, arg_inputs=[example]
            )
        )
    except Exception as error:  # Torch-TensorRT raises many kinds
        raise BackendError(f"backend tensorrt: Torch-TensorRT cannot build: {error}") from error


def _build_int8(bundle: Bundle, size: tuple[int, int]) -> bytes:
    import tensorrt

    graph = symmetric_graph(bundle.path / GRAPH, size)
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    # Up to version 10 types are taken from the graph only if asked for; since then, always.
    flag = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise BackendError(f"backend tensorrt: {bundle.path / GRAPH}: {errors}")
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise BackendError(f"backend tensorrt: {bundle.path / GRAPH}: TensorRT cannot build it")
    return bytes(plan)


def missing(error: Exception) -> BackendError:
    """What to tell where a package of TensorRT cannot be imported."""
    return BackendError(
        f"backend tensorrt: torch_tensorrt is not installed ({error}); pip install "
        "torch_tensorrt==" + ".".join(torch.__version__.split(".")[:2]) + ".*, or choose another "
        "backend"
    )


def engine_key(bundle: Bundle, size: tuple[int, int]) -> EngineKey:
    """What a bundle's engine on this machine's GPU depends on. Raises BackendError."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise missing(error) from error
    int8 = bundle.manifest.precision == "int8"
    if not torch.cuda.is_available():
        raise BackendError(
            "backend tensorrt: this torch cannot use the GPU: install torch for CUDA, or choose "
            "another backend"
        )
    version = ""
    if not int8:
        try:
            import torch_tensorrt
        except (ImportError, OSError) as error:
            raise missing(error) from error
        version = str(torch_tensorrt.__version__)
    major, minor = torch.cuda.get_device_capability()
    return EngineKey(
        bundle.digest,
        torch.cuda.get_device_name(),
        f"{major}.{minor}",
        str(tensorrt.__version__),
        version,
        *size,
        "int8" if int8 else "f16",
    )


def build_engine(bundle: Bundle, size: tuple[int, int]) -> bytes:
    """A bundle's engine for inputs of ``size`` (width, height) on this machine's GPU.

    Takes minutes. Raises BackendError where TensorRT or a GPU is missing, or it cannot be built.
    """
    engine_key(bundle, size)
    if bundle.manifest.precision == "int8":
        return _build_int8(bundle, size)
    return _build_half(load_model(bundle), size)


# --------------------------------------------------------------------------------------------------
# Running


class Engine:
    """An engine in the GPU's memory, with a tensor there for each input and output.

    Attributes:
        outputs: tensors by name, which every call writes to.
    """

    def __init__(self, plan: bytes) -> None:
        import tensorrt

        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError("backend tensorrt: the engine is not for this GPU or TensorRT")
        self._engine = engine
        self._context = engine.create_execution_context()
        self.outputs: dict[str, Tensor] = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            kind = torch.from_numpy(
                np.empty(0, tensorrt.nptype(engine.get_tensor_dtype(name)))
            ).dtype
            shape = tuple(engine.get_tensor_shape(name))
            tensor = torch.empty(shape, dtype=kind, device="cuda")
            self._context.set_tensor_address(name, tensor.data_ptr())
            if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT:
                self._input = tensor
            else:
                self.outputs[name] = tensor

    def __call__(self, x: Tensor) -> None:
        """Runs it on the current stream; the input is taken as the engine's type."""
        self._input.copy_(x)
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise BackendError("backend tensorrt: the engine failed")


class EngineLogits(nn.Module):
    """Stands where the network does in `Deploy`: an engine of `Logits`.

    forward: (1, 3, H, W) float32 to the network's outputs in float32 by name.
    """

    def __init__(self, engine: Any, names: Sequence[str]) -> None:
        super().__init__()
        self._engine = engine
        # Torch-TensorRT numbers the outputs: output0, output1, ...
        self._names = {f"output{i}": name for i, name in enumerate(names)}
        if set(engine.outputs) != set(self._names):
            raise BackendError(f"backend tensorrt: the engine gives {sorted(engine.outputs)}")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """See the class."""
        self._engine(x)
        return {name: self._engine.outputs[key].float() for key, name in self._names.items()}


class EngineGraph(nn.Module):
    """Stands where `Deploy` does: an engine of a bundle's whole graph, see `symmetric_graph`."""

    def __init__(self, engine: Any, head: str) -> None:
        super().__init__()
        self._engine = engine
        self._names = output_names(head)
        if set(engine.outputs) != set(self._names):
            raise BackendError(f"backend tensorrt: the engine gives {sorted(engine.outputs)}")

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """As `Deploy`."""
        self._engine(image)
        labels, *others = (self._engine.outputs[name] for name in self._names)
        return (labels.to(torch.uint8), *others)


def _takes(plan: bytes) -> bool:
    try:
        Engine(plan)
    except BackendError:
        return False
    return True


class TensorRt:
    """The backend."""

    name = "tensorrt"
    notes: tuple[str, ...] = ()
    checked = ""

    def __init__(self, bundle: Bundle, size: tuple[int, int], precision: str) -> None:
        if precision != "f32":
            raise BackendError(
                f"backend tensorrt: {precision} is for openvino; the bundle says whether the "
                "engine computes in half floats or in 8 bits"
            )
        key = engine_key(bundle, size)
        plan = cached_engine(cache_folder(), key, lambda: build_engine(bundle, size), _takes)
        engine = Engine(plan)
        self._module: nn.Module
        if key.precision == "int8":
            self._module = EngineGraph(engine, bundle.manifest.head)
        else:
            self._module = _with_engine(load_model(bundle), bundle, engine).cuda()
        self.input_size = size
        self._stream = torch.cuda.Stream()
        self._image = torch.empty((1, size[1], size[0], 3), dtype=torch.uint8, pin_memory=True)
        self._on_gpu = torch.empty_like(self._image, device="cuda", pin_memory=False)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            outputs = self._module(self._on_gpu)
            self._outputs = [torch.empty(o.shape, dtype=o.dtype, pin_memory=True) for o in outputs]
            for _ in range(3):  # what is set up at the first runs must not be recorded
                self._step()
        self._stream.synchronize()
        self._graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        try:
            with (
                torch.inference_mode(),
                torch.cuda.graph(
                    self._graph, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                self._step()
        except RuntimeError as error:
            _log.warning("backend tensorrt: no CUDA graph (%s); launching step by step", error)
            self._graph = None

    def _step(self) -> None:
        """From the pinned image to the pinned outputs, on the current stream."""
        self._on_gpu.copy_(self._image, non_blocking=True)
        for host, output in zip(self._outputs, self._module(self._on_gpu), strict=True):
            host.copy_(output, non_blocking=True)

    def predict(self, image: NDArray[np.uint8]) -> Prediction:
        """As `Backend` says."""
        np.copyto(self._image.numpy(), as_batch(image, self.input_size))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        self._stream.synchronize()
        # The next image is written over these.
        return as_prediction([output.numpy().copy() for output in self._outputs])


def _with_engine(model: SegmentationModel, bundle: Bundle, engine: Any) -> Deploy:
    """The deployed form of a bundle's network, whose network is an engine."""
    module = deploy(model, bundle.manifest)
    module.model = EngineLogits(engine, logit_names(model))  # type: ignore[assignment]
    return module
