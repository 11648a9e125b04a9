"""Export of a network to the graph that is deployed: ``waste-seg export``."""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from waste_seg_ros.cli import as_size
from waste_seg_ros.models import SegmentationModel, decide
from waste_seg_ros.runtime import HEADS
from waste_seg_ros.runtime.bundle import (
    Bundle,
    BundleError,
    Manifest,
    halve_bundle,
    open_bundle,
    restate_bundle,
    save_bundle,
)
from waste_seg_ros.runtime.quantize import halve_graph
from waste_seg_ros.runtime.verify import AGREEMENT, test_frame

OPSET = 17

FORMATS = ("onnx", "openvino", "tensorrt")
"""What ``--format`` writes; keys of `formats.WRITERS`."""

_FREE_AXES = {
    "labels": {1: "height", 2: "width"},
    "scores": {1: "height", 2: "width"},
    "centers": {1: "rows", 2: "columns"},
    "offsets": {2: "rows", 3: "columns"},
}


class Deploy(nn.Module):
    """What runs on the robot: from camera bytes to labels, without a step outside of the graph.

    forward: (N, H, W, 3) uint8 RGB, H and W multiples of the stride, to a tuple of

    - ``labels`` (N, H, W) uint8: the likeliest label (binary head: 1 for an item, else 0);
    - ``scores`` (N, H, W) float32: its probability;

    and with the instance head also

    - ``centers`` (N, H/4, W/4) float32 in 0..1: heat map, 0 but for the maxima of 3x3 cells;
    - ``offsets`` (N, 2, H/4, W/4) float32: pixels from the cell's centre to its item's.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: SegmentationModel, head: str, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        scale = 1.0 / (255.0 * torch.tensor(std))
        self.register_buffer("scale", scale.view(1, 3, 1, 1))
        self.register_buffer("shift", (-torch.tensor(mean) * 255.0 * scale).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        x = image.permute(0, 3, 1, 2).float() * self.scale + self.shift
        outputs = self.model(x)
        labels, scores = decide(outputs)
        if self.head != "instance":
            return labels, scores
        heat = outputs["centers"].sigmoid()
        peak = functional.max_pool2d(heat, 3, stride=1, padding=1) == heat
        return labels, scores, (heat * peak.to(heat.dtype))[:, 0], outputs["offsets"]


def output_names(head: str) -> tuple[str, ...]:
    """Names of the graph's outputs, in the order of `Deploy`."""
    return ("labels", "scores") + (("centers", "offsets") if head == "instance" else ())


def deploy(model: SegmentationModel, manifest: Manifest) -> Deploy:
    """The deployed form of a bundle's network, in eval mode."""
    return Deploy(model, manifest.head, manifest.mean, manifest.std).eval()


def export_onnx(model: SegmentationModel, manifest: Manifest, path: Path) -> None:
    """Writes the deployed graph to ``path``, with free height and width, and checks it.

    Raises BundleError if ONNX Runtime or OpenVINO, where installed, gives other labels for a test
    frame than torch does.
    """
    import onnx

    module = deploy(model, manifest)
    names = output_names(manifest.head)
    width, height = manifest.input_size
    frame = test_frame(manifest.input_size)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # The exporter that traces is told to be legacy at every call; the other needs onnxscript.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.from_numpy(frame[None]),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(names),
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: axes for name, axes in _FREE_AXES.items() if name in names},
            },
        )
    graph = onnx.load(str(path))
    graph.graph.doc_string = (
        f"{manifest.architecture} {manifest.head}: {', '.join(manifest.classes)}"
    )
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))
    if manifest.precision == "f16":
        halve_graph(path)
    check_graph(module, path, (manifest.input_size, (width + manifest.stride, height)))


def check_graph(module: Deploy, path: Path, sizes: Sequence[tuple[int, int]]) -> None:
    """Compares an exported graph with its module at some sizes.

    Raises BundleError if a runtime, of those that are installed, gives something else.
    """
    runtimes = _runtimes(path)
    names = output_names(module.head)
    for width, height in sizes:
        frame = test_frame((width, height))[None]
        with torch.inference_mode():
            expected = [o.numpy() for o in module(torch.from_numpy(frame))]
        for runtime, infer in runtimes.items():
            for name, one, other in zip(names, infer(frame), expected, strict=True):
                if one.shape != other.shape:
                    share = 0.0
                elif name == "labels":
                    share = float((one == other).mean())
                else:
                    # A pixel of another label has another score; a near tie turns a maximum.
                    share = float((np.abs(one - other) <= 1e-2 * (1 + np.abs(other))).mean())
                if share < AGREEMENT:
                    raise BundleError(
                        f"{path}: the {name} that {runtime} gives are the model's at only "
                        f"{share:.2%} of a {width}x{height} test frame"
                    )


def _runtimes(path: Path) -> dict[str, Callable[[NDArray[np.uint8]], list[NDArray[Any]]]]:
    """The graph on every runtime that is installed, at any size."""
    found: dict[str, Callable[[NDArray[np.uint8]], list[NDArray[Any]]]] = {}
    with contextlib.suppress(ImportError):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        found["onnxruntime"] = lambda image: session.run(None, {"image": image})
    with contextlib.suppress(ImportError):
        import openvino

        compiled = openvino.Core().compile_model(
            str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        )

        def infer(image: NDArray[np.uint8]) -> list[NDArray[Any]]:
            results = compiled([image])
            return [np.copy(results[output]) for output in compiled.outputs]

        found["openvino"] = infer
    return found


def bundle_from_run(
    run: Path,
    head: str,
    name: str,
    output: Path,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    precision: str = "f32",
) -> Bundle:
    """Writes a bundle of one head of a training run's averaged weights.

    Raises BundleError or `train.loop.TrainingError`.
    """
    from waste_seg_ros.train.loop import parse_size, read_run

    config, model, state = read_run(run)
    parent = open_bundle(config.init).reference if config.init else ""
    return save_bundle(
        output,
        model,
        name=name,
        head=head,
        input_size=parse_size(config.sizes[0], model.stride),
        metrics=metrics,
        training={
            "commit": source_commit(),
            "seed": config.seed,
            "data": list(config.data),
            "heads": list(config.heads),
            "steps": state["step"],
            "images": state["images"],
            "minutes": round(state["elapsed"] / 60, 1),
            "torch": str(torch.__version__),
        },
        parent=parent,
        precision=precision,
    )


def source_commit() -> str:
    """Commit of the checkout this runs from, with "+" if it has changes; "" outside of one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(folder), *arguments), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(folder.parent))
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


# --------------------------------------------------------------------------------------------------
# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``waste-seg export``."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="folder of a training run")
    source.add_argument(
        "--bundle", help="bundle to write again, with --metrics, --precision or --format"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="with --bundle: write only its network, for other programs, with an export.json that "
        "tells inputs and outputs; a TensorRT engine is built on the GPU that it is for",
    )
    parser.add_argument(
        "--size", type=as_size, metavar="WxH", help="of a TensorRT engine (default: the bundle's)"
    )
    parser.add_argument("--head", choices=HEADS, help="what the bundle is used as")
    parser.add_argument(
        "--precision",
        choices=("f32", "f16"),
        help="f16: kernels stored as half floats, half the size (waste-seg compress makes int8)",
    )
    parser.add_argument("--name", default="", help="the bundle's name (default: OUTPUT's)")
    parser.add_argument("--output", type=Path, required=True, help="the bundle's folder")
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        help="with --bundle: make the scores of the new bundle probabilities on these labelled "
        "images, not trained on (as for waste-seg eval --data)",
    )
    parser.add_argument(
        "--metrics", type=Path, help="YAML or JSON: figure to number by the name of the data"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``waste-seg export``."""
    from waste_seg_ros.train.loop import TrainingError

    try:
        metrics = None
        if args.metrics:
            try:
                metrics = yaml.safe_load(args.metrics.read_text())
            except (OSError, yaml.YAMLError) as error:
                raise BundleError(f"{args.metrics}: {error}") from error
        if args.calibrate:
            return _calibrate(args)
        if args.format or args.size:
            return _write_format(args)
        if args.bundle:
            old = open_bundle(args.bundle)
            changes: dict[str, Any] = {} if metrics is None else {"metrics": metrics}
            changes["name"] = args.name or args.output.name
            if args.precision in (None, old.manifest.precision):
                bundle = restate_bundle(old, args.output, **changes)
            elif args.precision == "f16":
                bundle = halve_bundle(old, args.output, **changes)
            else:
                raise BundleError(f"--precision f32: {args.bundle} is {old.manifest.precision}")
        else:
            if not args.head:
                raise BundleError("--checkpoint needs --head")
            name = args.name or args.output.name
            precision = args.precision or "f32"
            bundle = bundle_from_run(
                args.checkpoint, args.head, name, args.output, metrics, precision
            )
    except (BundleError, TrainingError) as error:
        print(f"waste-seg export: {error}", file=sys.stderr)
        return 1
    print(f"wrote {bundle.path} ({bundle.manifest.name}, {bundle.manifest.head})")
    return 0


def _write_format(args: argparse.Namespace) -> int:
    from waste_seg_ros.runtime.backends import BackendError
    from waste_seg_ros.runtime.formats import write_format

    try:
        if not args.bundle or not args.format:
            raise BundleError("--format needs --bundle, and --size needs --format tensorrt")
        given = {"head": args.head, "precision": args.precision, "name": args.name}
        unused = [
            f"--{flag}" for flag, value in {**given, "metrics": args.metrics}.items() if value
        ]
        if unused:
            raise BundleError(f"--format writes no bundle, so {', '.join(unused)} mean nothing")
        write_format(open_bundle(args.bundle), args.format, args.output, args.size)
    except (BundleError, BackendError) as error:
        print(f"waste-seg export: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.output} ({args.format} of {args.bundle})")
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from waste_seg_ros.data.sources import open_data
    from waste_seg_ros.train.temperature import calibrate_bundle

    try:
        if not args.bundle or args.metrics:
            raise BundleError("--calibrate needs --bundle, and --metrics are measured after it")
        old = open_bundle(args.bundle)
        data = open_data(args.calibrate, old.manifest.classes, finite=True)
        bundle, (binary, semantic) = calibrate_bundle(old, data, args.output, args.name)
    except (ValueError, OSError) as error:
        print(f"waste-seg export: {error}", file=sys.stderr)
        return 1
    print(
        f"wrote {bundle.path}: logits divided by {binary:.3f} (item or belt) and {semantic:.3f} "
        "(class); its figures are to be measured anew"
    )
    return 0
