"""What networks there are and what they cost: ``waste-seg models``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from waste_seg_ros.cli import as_size
from waste_seg_ros.runtime import HEADS
from waste_seg_ros.runtime.bundle import (
    Bundle,
    BundleError,
    list_bundles,
    load_model,
    open_bundle,
)


def bundle_cost(bundle: Bundle) -> tuple[int, int]:
    """Parameters of a bundle's network, and multiply-accumulates at its input size.

    Of a bundle of integers, which has no weights to count, its manifest or its parent tells.

    Raises:
        BundleError: its weights are not its architecture's, or its parent is not found.
        ModuleNotFoundError: there is no PyTorch.
    """
    from waste_seg_ros.models import parameter_count
    from waste_seg_ros.models.count import count_macs

    manifest = bundle.manifest
    training = manifest.training
    if manifest.precision == "int8":
        parameters, macs = training.get("parameters"), training.get("macs")
        if isinstance(parameters, int) and isinstance(macs, int):
            return parameters, macs
        name = manifest.parent.partition("@")[0]
        beside = bundle.path.parent / name
        return bundle_cost(open_bundle(beside if name and beside.is_dir() else name))
    model = load_model(bundle).to("meta")
    return parameter_count(model), count_macs(model, manifest.input_size)


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equal length in columns, all but the first and last ones to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    for row in rows:
        cells = [
            cell if k == last else cell.ljust(wide) if k == 0 else cell.rjust(wide)
            for k, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells))


def _bundles() -> int:
    rows = [
        (
            *("bundle", "architecture", "width", "head", "size"),
            *("params M", "MACs G", "MB", "stored", "classes"),
        )
    ]
    broken = False
    for path in list_bundles():
        try:
            bundle = open_bundle(path)
        except BundleError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            broken = True
            continue
        manifest = bundle.manifest
        try:
            parameters, macs = bundle_cost(bundle)
            cost = f"{parameters / 1e6:.3f}", f"{macs / 1e9:.3f}"
        except BundleError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            broken, cost = True, ("-", "-")
        except ModuleNotFoundError:  # a robot has no PyTorch
            cost = "-", "-"
        width, height = manifest.input_size
        rows.append(
            (
                *(manifest.name, manifest.architecture, f"{manifest.width:g}", manifest.head),
                *(f"{width}x{height}", *cost, f"{bundle.size / 1e6:.2f}"),
                manifest.precision,
                ", ".join(manifest.classes),
            )
        )
    print_rows(rows)
    return int(broken)


def _architectures(head: str, size: tuple[int, int], width: float) -> int:
    from waste_seg_ros.models import TRUNKS, parameter_count
    from waste_seg_ros.models.count import count_macs, outline

    rows = [("architecture", "params M", f"MACs G at {size[0]}x{size[1]}", "stride")]
    for name, trunk in TRUNKS.items():
        if size[0] % trunk.stride or size[1] % trunk.stride:
            raise BundleError(
                f"--size {size[0]}x{size[1]}: {name} takes multiples of {trunk.stride}"
            )
        model = outline(name, head, width=width)
        parameters, macs = parameter_count(model), count_macs(model, size)
        rows.append((name, f"{parameters / 1e6:.3f}", f"{macs / 1e9:.2f}", str(trunk.stride)))
    print_rows(rows)
    return 0


def _above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``waste-seg models``."""
    parser.add_argument(
        "--architectures",
        action="store_true",
        help="list what can be trained instead of the bundles",
    )
    parser.add_argument("--head", choices=HEADS, default="semantic", help="with --architectures")
    parser.add_argument("--size", type=as_size, default=(512, 256), help="likewise (512x256)")
    parser.add_argument("--width", type=_above_0, default=1.0, help="likewise")


def run(args: argparse.Namespace) -> int:
    """Print a line for each bundle on the search path, broken ones with what is wrong."""
    if not args.architectures:
        return _bundles()
    try:
        return _architectures(args.head, args.size, args.width)
    except BundleError as error:
        print(f"waste-seg models: {error}", file=sys.stderr)
        return 1
