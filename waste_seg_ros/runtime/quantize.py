"""Smaller numbers in a deployed graph: half floats for storage, 8-bit integers to compute with."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waste_seg_ros.runtime.bundle import BundleError

#: Names of the network's own steps begin so; what is before and after them is not.
_NETWORK = "/model/"

#: The layers that give the network's outputs.
_OUTPUTS = tuple(
    f"{_NETWORK}{name}/" for name in ("binary", "semantic", "instance/centers", "instance/offsets")
)


def halve_graph(path: Path) -> None:
    """Stores the kernels of an ONNX file as half floats.

    A cast makes them single ones again, once, when a runtime loads the graph, so it computes what
    it did before, but for the rounding (11 bits). Vectors and what half floats cannot hold stay.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(path))
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.size < 64 or not np.isfinite(half).all():
            continue
        name = tensor.name
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _widen(model: Any) -> None:
    """Undoes what `halve_graph` did to a model, but for the rounding."""
    from onnx import TensorProto, numpy_helper

    halves = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16}
    kept = []
    for node in model.graph.node:
        tensor = halves.get(node.input[0]) if node.op_type == "Cast" else None
        if tensor is None:
            kept.append(node)
        else:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)


def symmetric_graph(path: Path, size: tuple[int, int]) -> bytes:
    """An ONNX file in 8 bits as TensorRT takes it, for inputs of ``size`` (width, height).

    TensorRT knows no zero points, so each range of activations is made symmetric, which at worst
    halves its resolution. It computes nothing in unsigned bytes either: the image comes in as
    float32 in 0..255, and the labels go out as int32. Raises BundleError for weights with a zero
    point, as nothing here makes them.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    done: dict[tuple[str, str], tuple[str, str]] = {}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        value, scale_name, zero_name = node.input
        zero = numpy_helper.to_array(constants[zero_name])
        if zero.dtype == np.int8 and not zero.any():
            continue
        if value in constants:
            raise BundleError(f"{path}: {value}: weights with a zero point are not for TensorRT")
        pair = (scale_name, zero_name)
        if pair not in done:
            scale = numpy_helper.to_array(constants[scale_name]).astype(np.float64)
            limits = np.iinfo(zero.dtype)
            reach = np.maximum(zero - float(limits.min), float(limits.max) - zero)
            done[pair] = (f"{scale_name}.symmetric", f"{zero_name}.symmetric")
            wider = np.asarray(scale * reach / 127, np.float32)
            graph.initializer.append(numpy_helper.from_array(wider, done[pair][0]))
            graph.initializer.append(
                numpy_helper.from_array(np.zeros(zero.shape, np.int8), done[pair][1])
            )
        node.input[1], node.input[2] = done[pair]
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]
    shape = (1, size[1], size[0], 3)
    image = helper.make_tensor_value_info(graph.input[0].name, TensorProto.FLOAT, shape)
    graph.input[0].CopyFrom(image)
    maker = next(node for node in graph.node if "labels" in node.output)
    maker.output[0] = "labels.whole"
    if maker.op_type == "Cast":
        del maker.attribute[:]
        maker.attribute.append(helper.make_attribute("to", TensorProto.INT32))
    graph.node.append(helper.make_node("Cast", ["labels.whole"], ["labels"], to=TensorProto.INT32))
    for output in graph.output:
        if output.name == "labels":
            output.type.tensor_type.elem_type = TensorProto.INT32
    return bytes(model.SerializeToString())


def float_nodes(model: Any, keep: Sequence[str] = ()) -> list[str]:
    """Names of a graph's nodes that are to compute in float.

    - What is no part of the network: normalisation, decision, softmax, maxima of the centres.
    - The layers that give its outputs. The offsets reach over a hundred pixels, so that a step of
      8 bits would be about a pixel.
    - The convolutions that see the image.
    - Places of maxima (`models.enet.unpool_mask`): an equality of rounded numbers holds at more
      places than one, or nowhere if both sides are rounded apart.
    - Convolutions that read a concatenation of which a part may be negative (U-Net's): OpenVINO
      2026.4 rounds such parts to whole numbers, whatever the step.
    - Nodes whose name has one of ``keep`` in it.
    """
    nodes = [node for node in model.graph.node if node.op_type != "Constant"]
    makers = {output: node for node in nodes for output in node.output}
    users: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)

    found = {
        node.name
        for node in nodes
        if not node.name.startswith(_NETWORK)
        or node.name.startswith(_OUTPUTS)
        or any(part in node.name for part in keep)
    }
    # The image goes on through whatever has no weights to the first convolutions.
    seen = [node for node in nodes if not node.name.startswith(_NETWORK)]
    seen = [user for node in seen for user in _following(node, users) if _is_input(user, makers)]
    while seen:
        node = seen.pop()
        found.add(node.name)
        if node.op_type in ("AveragePool", "MaxPool", "Resize"):
            seen += _following(node, users)

    for node in nodes:
        if node.op_type == "Equal" and node.name.startswith(_NETWORK):
            found.add(node.name)
            for name in node.input:
                if name in makers and makers[name].op_type == "Resize":
                    resize = makers[name]
                    found |= {resize.name, makers[resize.input[0]].name}
            for cast in _following(node, users):
                found |= {cast.name, *(user.name for user in _following(cast, users))}
        if node.op_type == "Concat" and not all(_is_positive(n, makers) for n in node.input):
            found |= {user.name for user in _following(node, users)}
    # The layers' last steps lie beside them: scaling of the offsets, upsampling of logits.
    outputs = {output for node in nodes if node.name.startswith(_OUTPUTS) for output in node.output}
    found |= {user.name for output in outputs for user in users.get(output, [])}
    return sorted(found)


def _following(node: Any, users: dict[str, list[Any]]) -> list[Any]:
    return [user for output in node.output for user in users.get(output, [])]


def _is_positive(name: str, makers: dict[str, Any]) -> bool:
    """Whether a map is nowhere below 0 by the node that makes it."""
    node = makers.get(name)
    while node is not None and node.op_type in ("AveragePool", "MaxPool", "Resize"):
        node = makers.get(node.input[0])
    return node is not None and node.op_type in ("Relu", "Sigmoid")


def _is_input(node: Any, makers: dict[str, Any]) -> bool:
    """Whether a node of the network comes right after the normalisation."""
    return bool(node.name.startswith(_NETWORK)) and any(
        name in makers and makers[name].name == "/Add" for name in node.input
    )


def quantize_graph(
    source: Path,
    target: Path,
    frames: Iterable[NDArray[np.uint8]],
    keep: Sequence[str] = (),
) -> None:
    """Writes a graph that computes in 8 bits, in ONNX's form of quantize and dequantize steps.

    By NNCF's post-training quantization: symmetric weights by output channel, asymmetric
    activations by map with the ranges seen on ``frames``, biases corrected for the rounding. Both
    OpenVINO and ONNX Runtime run it. Kernels that stay in float are stored as half floats.

    Args:
        source: an exported graph, of single or half floats.
        target: the file to write; may be ``source``.
        frames: (H, W, 3) uint8 RGB to calibrate on, sides multiples of the network's stride.
        keep: see `float_nodes`.

    Raises:
        BundleError: NNCF is not installed, there are no frames, or the graph is int8 already.
    """
    import onnx

    os.environ.setdefault("NNCF_CI", "1")  # or it reports its use over the network
    try:
        import nncf
    except ImportError as error:
        raise BundleError(f"--int8: NNCF is not installed ({error}); pip install nncf") from error
    batches = [frame[None] for frame in frames]
    if not batches:
        raise BundleError("--calibration: there are no images in it to calibrate on")
    model = onnx.load(str(source))
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise BundleError(f"{source}: is int8 already; quantize the bundle it was made from")
    _widen(model)
    ignored = nncf.IgnoredScope(names=float_nodes(model, keep))
    with _silence():
        quantized = nncf.quantize(
            model,
            nncf.Dataset(batches, lambda batch: {"image": batch}),
            subset_size=len(batches),
            ignored_scope=ignored,
            preset=nncf.QuantizationPreset.MIXED,
        )
    onnx.save(quantized, str(target))
    halve_graph(target)  # the kernels that stay in float


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """NNCF draws progress bars and tells of every node that it leaves as it is."""
    import nncf

    # It sets the level of handlers that are not its own as well.
    levels = [(handler, handler.level) for handler in logging.getLogger().handlers]
    nncf.set_log_level(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for handler, level in levels:
            handler.setLevel(level)
