"""A bundle's network as other programs take it: ``waste-seg export --format``.

The folder written holds the network and ``export.json``, which says what it is: bundle, classes,
inputs and outputs. ONNX and OpenVINO IR are the whole of `export.Deploy`, from an image in bytes to
labels, with free height and width. A TensorRT engine is for one size, one GPU and one version of
TensorRT; of a bundle of floats it is the network alone, see `tensorrt_engine`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from waste_seg_ros.files import write_json
from waste_seg_ros.runtime.backends import BackendError, as_prediction, gpu_found, load_backend
from waste_seg_ros.runtime.bundle import GRAPH, Bundle, BundleError, load_model, write_atomically
from waste_seg_ros.runtime.export import output_names
from waste_seg_ros.runtime.verify import compare, test_frame


def write_format(
    bundle: Bundle, kind: str, output: Path, size: tuple[int, int] | None = None
) -> None:
    """Writes a bundle's network in another format to the new folder ``output``.

    Args:
        bundle: an opened bundle.
        kind: key of `WRITERS`.
        output: the folder to make; must not exist.
        size: (width, height) [px] of a TensorRT engine; None takes the manifest's.

    Raises:
        BundleError: the folder exists or cannot be written, or what was written gives something
            else than the bundle.
        BackendError: a runtime or GPU that it takes is not there.
    """
    manifest = bundle.manifest
    if size is not None:
        if kind != "tensorrt":
            raise BundleError(f"--size: {kind} is for all sizes; only tensorrt has one")
        if min(size) <= 0 or size[0] % manifest.stride or size[1] % manifest.stride:
            raise BundleError(f"--size: {manifest.name} takes multiples of {manifest.stride}")

    def write(folder: Path) -> None:
        about = {
            "format": kind,
            "bundle": bundle.reference,
            "head": manifest.head,
            "classes": list(manifest.classes),
            **WRITERS[kind](bundle, folder, size or manifest.input_size),
        }
        write_json(folder / "export.json", about)

    try:
        write_atomically(output, write)
    except FileExistsError:
        raise BundleError(f"{output}: exists already; choose another folder") from None
    except OSError as error:
        raise BundleError(f"{output}: cannot be written: {error}") from error


def _whole(bundle: Bundle) -> dict[str, Any]:
    return {
        "inputs": {"image": "(1, height, width, 3) uint8 RGB"},
        "stride": bundle.manifest.stride,
        "outputs": list(output_names(bundle.manifest.head)),
    }


def _onnx(bundle: Bundle, folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    # The bundle's own, which was checked when it was made, and whose hash was checked just now.
    shutil.copyfile(bundle.path / GRAPH, folder / "model.onnx")
    return _whole(bundle)


def _openvino(bundle: Bundle, folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            f"--format openvino: openvino is not installed ({error}); pip install openvino"
        ) from error
    model = openvino.Core().read_model(str(bundle.path / GRAPH))
    path = folder / "model.xml"
    openvino.save_model(model, str(path), compress_to_fp16=False)

    # What was written has to say what the bundle says.
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    frame = test_frame(size)
    results = compiled([frame[None]])
    found = as_prediction([results[output] for output in compiled.outputs])
    difference = compare(found, load_backend(bundle, "openvino", size).predict(frame))
    if not difference.fits(coarse=bundle.manifest.precision == "int8"):
        raise BundleError(f"{path}: differs from {bundle.path}: {difference}")
    return _whole(bundle)


def _tensorrt(bundle: Bundle, folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    if not gpu_found():
        raise BackendError(
            "--format tensorrt: no NVIDIA GPU is found, and an engine is built on the GPU that it "
            "is for; export onnx, or run this on that machine"
        )
    from waste_seg_ros.runtime.tensorrt_engine import build_engine, engine_key, logit_names

    key = engine_key(bundle, size)
    (folder / "model.engine").write_bytes(build_engine(bundle, size))
    about: dict[str, Any] = {
        "size": list(size),
        "gpu": f"{key.gpu} ({key.capability})",
        "tensorrt": key.tensorrt,
        "precision": key.precision,
    }
    if key.precision == "int8":
        about["inputs"] = {"image": "(1, height, width, 3) float32 RGB in 0..255"}
        about["outputs"] = list(output_names(bundle.manifest.head))
    else:
        with torch.inference_mode():
            names = logit_names(load_model(bundle))
        manifest = bundle.manifest
        about["inputs"] = {"the only one": "(1, 3, height, width) float16 RGB, normalised"}
        about["mean"], about["std"] = list(manifest.mean), list(manifest.std)
        about["outputs"] = {f"output{i}": f"{name}, logits" for i, name in enumerate(names)}
    return about


WRITERS: dict[str, Callable[[Bundle, Path, tuple[int, int]], dict[str, Any]]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
}
"""Formats by name; each writes into a folder and says what it wrote."""
