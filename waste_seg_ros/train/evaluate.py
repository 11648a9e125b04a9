"""Measuring a network on labelled images: ``waste-seg eval``.

Everything is measured at the images' own resolution: the network sees an image scaled to its
input, and its labels and instances are scaled back by nearest neighbour.
"""

from __future__ import annotations

import argparse
import heapq
import io
import math
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from waste_seg_ros.data.sample import CLASSES, IGNORE, Sample, rename_labels
from waste_seg_ros.data.sources import SPECS, open_data, read_names, tell_problems
from waste_seg_ros.files import write_json, write_png
from waste_seg_ros.perception.draw import contact_sheet, draw_overlay
from waste_seg_ros.perception.items import (
    Item,
    ItemParams,
    describe_items,
    extract_items,
    label_image,
)
from waste_seg_ros.perception.scaling import scale_ids, scale_image
from waste_seg_ros.runtime import HEADS
from waste_seg_ros.runtime.backends import as_head
from waste_seg_ros.train.metrics import (
    AveragePrecision,
    BinaryIoU,
    BoundaryF,
    Calibration,
    ConfusionMatrix,
    ItemCounts,
    PanopticQuality,
    ranked,
)
from waste_seg_ros.train.plots import draw_confusion, draw_reliability

if TYPE_CHECKING:
    from waste_seg_ros.models import SegmentationModel
    from waste_seg_ros.runtime.backends import Backend, Prediction
    from waste_seg_ros.runtime.bundle import Bundle

#: From an (H, W, 3) uint8 RGB image of any size to a prediction at the network's resolution.
Predict = Callable[[NDArray[np.uint8]], "Prediction"]

#: Backends for so many image sizes are kept at a time.
_BACKENDS_KEPT = 4

_QUALITY = ("pq", "sq", "rq")
_PRECISION = ("ap", "ap50", "ap75")


# --- predictors -----------------------------------------------------------------------------------


def bundle_predictor(bundle: Bundle, backend: str = "auto", threads: int = 0) -> Predict:
    """Run a bundle on images of any size, through the runtime that the robot uses."""
    from waste_seg_ros.runtime.backends import input_size_for, load_backend

    loaded: OrderedDict[tuple[int, int], Backend] = OrderedDict()

    def predict(image: NDArray[np.uint8]) -> Prediction:
        size = input_size_for((image.shape[1], image.shape[0]), bundle.manifest)
        if size not in loaded:
            if len(loaded) >= _BACKENDS_KEPT:
                loaded.popitem(last=False)
            loaded[size] = load_backend(bundle, backend, input_size=size, threads=threads)
        loaded.move_to_end(size)
        return loaded[size].predict(scale_image(image, size))

    return predict


def model_predictor(
    model: SegmentationModel,
    head: str,
    input_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Predict:
    """Run a network in training on images of any size.

    Args:
        model: the network; it is left in eval mode.
        head: which of its heads.
        input_size: (width, height) that images are scaled to; None takes the nearest size to the
            image's own that the network's stride allows.
        mean: of R, G, B; None takes the usual ones.
        std: likewise.
    """
    import torch

    from waste_seg_ros.runtime.backends import Prediction
    from waste_seg_ros.runtime.bundle import MEAN, STD
    from waste_seg_ros.runtime.export import Deploy

    module = Deploy(model, head, mean or MEAN, std or STD).eval()
    stride = int(model.stride)

    def predict(image: NDArray[np.uint8]) -> Prediction:
        size = input_size or (
            max(1, round(image.shape[1] / stride)) * stride,
            max(1, round(image.shape[0] / stride)) * stride,
        )
        scaled = np.ascontiguousarray(scale_image(image, size))
        device = next(model.parameters()).device
        with torch.inference_mode():
            outputs = module.to(device)(torch.from_numpy(scaled[None]).to(device))
            arrays = [output[0].cpu().numpy() for output in outputs]
        centers, offsets = arrays[2:] if len(arrays) > 2 else (None, None)
        return Prediction(labels=arrays[0], scores=arrays[1], centers=centers, offsets=offsets)

    return predict


# --- measuring ------------------------------------------------------------------------------------


class Scores:
    """The measures of a run, frame by frame.

    ``named``: the classes count; else only foreground, and items whatever their class, and the
    confusion is between background and items.
    """

    def __init__(self, classes: int, named: bool) -> None:
        self.named = named
        self.confusion, self.binary = ConfusionMatrix(classes if named else 1), BinaryIoU()
        self.quality, self.found = PanopticQuality(classes), ItemCounts()

    def update(
        self,
        sample: Sample,
        labels: NDArray[np.uint8],
        instances: NDArray[np.uint16],
        kinds: Mapping[int, int],
        crowd: NDArray[np.bool_] | None = None,
    ) -> tuple[float, tuple[int, int, int]]:
        """Add a frame.

        Args:
            sample: the truth, its labels those of the network's classes.
            labels: (H, W) predicted labels, of the sample's size.
            instances: (H, W) predicted item ids.
            kinds: class of each predicted item, 0 for unknown.
            crowd: (H, W) where items are not told from each other; there, as where no truth is
                known, a predicted item is not a false one.

        Returns:
            the frame's foreground IoU, and its found, missed and false items.
        """
        void = sample.labels == IGNORE
        true_kinds = instance_classes(sample)
        frame_iou = self.binary.update(sample.labels, labels)
        if self.named:
            self.confusion.update(sample.labels, labels)
        else:
            truth = np.where(void, np.uint8(IGNORE), np.minimum(sample.labels, 1))
            self.confusion.update(truth, np.minimum(labels, 1))
        void = void if crowd is None else void | crowd
        self.quality.update(sample.instances, true_kinds, instances, kinds, void)
        return frame_iou, self.found.update(
            sample.instances,
            instances,
            void,
            true_kinds if self.named else None,
            kinds if self.named else None,
        )


class FineScores:
    """The measures beyond ``Scores``: of masks, of boundaries, and of the scores themselves.

    Attributes:
        precision, boundaries, calibration: see the classes.
        pixels: what the network says of each pixel, before items are made of it; None if not
            ``named``.
    """

    def __init__(self, classes: int, named: bool) -> None:
        self.named = named
        self.precision, self.boundaries = AveragePrecision(classes), BoundaryF(classes)
        self.calibration = Calibration()
        self.pixels = ConfusionMatrix(classes) if named else None

    def update(
        self,
        sample: Sample,
        prediction: Prediction,
        labels: NDArray[np.uint8],
        instances: NDArray[np.uint16],
        items: Sequence[Item],
        crowd: NDArray[np.bool_] | None = None,
    ) -> None:
        """Add a frame.

        Args:
            sample: the truth, its labels those of the network's classes.
            prediction: what the network said, at any resolution.
            labels: (H, W) labels of the items, of the sample's size.
            instances: (H, W) their ids.
            items: the items.
            crowd: see ``Scores``.
        """
        void = sample.labels == IGNORE
        self.precision.update(
            sample.instances,
            instance_classes(sample),
            instances,
            {item.id: item.class_index for item in items},
            {item.id: item.score for item in items},
            void if crowd is None else void | crowd,
        )
        self.boundaries.update(sample.labels, labels, self.named)
        size = (sample.labels.shape[1], sample.labels.shape[0])
        said, sure = scale_ids(prediction.labels, size), scale_ids(prediction.scores, size)
        self.calibration.update(sample.labels, said, sure, self.named)
        if self.pixels is not None:
            self.pixels.update(sample.labels, said)


def evaluate(
    predict: Predict,
    dataset: Iterable[Sample],
    *,
    head: str = "instance",
    classes: Sequence[str] = CLASSES,
    params: ItemParams | None = None,
    worst: int = 0,
    gallery: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a network on a dataset.

    Args:
        predict: the network, see ``bundle_predictor`` and ``model_predictor``.
        dataset: samples; if it has ``classes`` these may differ from the network's, and if it
            has ``things`` only those of its labels have items, and pixels are measured as the
            network labels them, not as its items do.
        head: what the network is used as; the binary head has class-agnostic figures only.
        classes: names of the network's labels 1..C.
        params: how items are made of predictions.
        worst: so many of the worst frames are drawn into the gallery.
        gallery: folder for them.
        progress: show a bar on stderr.

    Returns:
        plain values, NaN where nothing was seen: ``frames``; ``binary_iou``; ``miou`` and
        ``miou_foreground`` (with and without the background) over classes in the truth, and
        ``miou_pixels`` of the network's labels before items are made of them; ``iou`` by class;
        ``pq``, ``sq``, ``rq``, ``ap``, ``ap50``, ``ap75``, ``boundary_f`` (means over classes)
        and ``per_class``; ``agnostic`` with the same but the last, ``boundary_f_foreground``;
        ``item_recall`` and ``item_precision`` at IoU 0.5; ``item_naming`` (share of found items
        whose class is right); ``items`` with ``found``, ``missed``, ``false``; ``confusion``
        with ``names`` and ``counts`` of pixels (rows the truth); ``ece`` and ``ece_items``
        (calibration error of the scores of all pixels, of those taken for items) and
        ``reliability`` by bins; ``seconds`` per frame for network and items. The binary head has
        no figures by class.

    Raises:
        ValueError: if the head is none of ``HEADS`` or there are no frames.
    """
    if head not in HEADS:
        raise ValueError(f"head {head!r} is none of {', '.join(HEADS)}")
    params = replace(params or ItemParams(), class_agnostic=head == "binary")
    scores = Scores(len(classes), named=head != "binary")
    fine = FineScores(len(classes), named=head != "binary")
    source = tuple(getattr(dataset, "classes", classes))
    named_things = {source[label - 1] for label in getattr(dataset, "things", ())}
    # By label, which of them have items.
    things = np.zeros(256, bool)
    things[[label for label, name in enumerate(classes, 1) if name in named_things]] = True
    gallery_frames: list[tuple[float, int, Sample, NDArray[np.uint16], tuple[Item, ...]]] = []
    spent = {"network": 0.0, "items": 0.0}
    frames = 0
    total = len(dataset) if isinstance(dataset, Sized) else None
    for sample in tqdm(dataset, total=total, disable=not progress, unit="frame", leave=False):
        sample = replace(sample, labels=rename_labels(sample.labels, source, classes))
        height, width = sample.labels.shape
        begin = time.perf_counter()
        prediction = as_head(predict(sample.image), head)
        between = time.perf_counter()
        seen = prediction
        if things.any() and scores.named:
            # Items are made as if those of the other classes, such as a road, were the belt.
            own = things[prediction.labels]
            seen = replace(prediction, labels=np.where(own, prediction.labels, 0).astype(np.uint8))
        instances, items = extract_items(seen, (width, height), params)
        spent["network"] += between - begin
        spent["items"] += time.perf_counter() - between
        labels, crowd = label_image(instances, items), None
        if seen is not prediction:
            labels = prediction.labels
            crowd = things[sample.labels] & (sample.instances == 0)
        labels, found = (scale_ids(ids, (width, height)) for ids in (labels, instances))

        kinds = {item.id: item.class_index for item in items}
        frame_iou, (hit, missed, false) = scores.update(sample, labels, found, kinds, crowd)
        fine.update(sample, prediction, labels, found, items, crowd)
        frames += 1
        if worst > 0 and gallery is not None:
            # Worst first by items, then by foreground.
            whole = hit + 0.5 * missed + 0.5 * false
            badness = -(hit / whole if whole else 1.0) - 0.01 * np.nan_to_num(frame_iou, nan=1.0)
            entry = (float(badness), -frames, sample, instances, items)
            if len(gallery_frames) < worst:
                heapq.heappush(gallery_frames, entry)
            else:
                heapq.heappushpop(gallery_frames, entry)
    if frames == 0:
        raise ValueError("there are no frames to measure on")
    if gallery is not None:
        ordered = sorted(gallery_frames, key=lambda entry: entry[:2], reverse=True)
        _write_gallery(gallery, [entry[2:] for entry in ordered], classes)

    return _figures(scores, fine, frames, head, classes) | {
        "seconds": {name: value / frames for name, value in spent.items()}
    }


def _figures(
    scores: Scores, fine: FineScores, frames: int, head: str, classes: Sequence[str]
) -> dict[str, Any]:
    """See ``evaluate``."""
    confusion, quality, found = scores.confusion, scores.quality, scores.found
    precision, boundaries, calibration = fine.precision, fine.boundaries, fine.calibration
    names = ("background", *classes) if scores.named else ("background", "item")
    agnostic = dict(zip(_QUALITY, quality.agnostic(), strict=True))
    result: dict[str, Any] = {
        "frames": frames,
        "head": head,
        "classes": list(classes),
        "binary_iou": scores.binary.value(),
        "boundary_f_foreground": boundaries.foreground(),
        "item_recall": found.recall(),
        "item_precision": found.precision(),
        "items": {"found": found.found, "missed": found.missed, "false": found.false},
        "agnostic": agnostic | dict(zip(_PRECISION, precision.agnostic(), strict=True)),
        "confusion": {"names": list(names), "counts": confusion.counts.tolist()},
        "ece": calibration.error(),
        "ece_items": calibration.error(items=True),
        "score_bias_items": calibration.bias(items=True),
        "reliability": {
            which: dict(
                zip(
                    ("score", "right", "share"),
                    (values.tolist() for values in calibration.reliability(which == "items")),
                    strict=True,
                )
            )
            for which in ("all", "items")
        },
    }
    if fine.pixels is None:
        return result
    per_class = {
        name: {
            "pq": float(quality.pq()[index]),
            "sq": float(quality.sq()[index]),
            "rq": float(quality.rq()[index]),
            "found": int(quality.true_positives[index]),
            "missed": int(quality.false_negatives[index]),
            "false": int(quality.false_positives[index]),
            "boundary_f": float(boundaries.per_class()[index]),
            **dict(zip(_PRECISION, row, strict=True)),
        }
        for index, (name, row) in enumerate(
            zip(classes, precision.per_class().tolist(), strict=True)
        )
    }
    result |= {
        "miou": confusion.mean_iou(),
        "miou_foreground": confusion.mean_iou(background=False),
        "miou_pixels": fine.pixels.mean_iou(),
        "iou": dict(zip(names, confusion.iou().tolist(), strict=True)),
        "item_naming": found.naming(),
        "boundary_f": boundaries.mean(),
        "per_class": per_class,
    }
    result |= dict(zip(_QUALITY, quality.mean(), strict=True))
    for name in _PRECISION:
        known = [row[name] for row in per_class.values() if not math.isnan(row[name])]
        result[name] = sum(known) / len(known) if known else math.nan
    return result


def evaluate_model(
    model: SegmentationModel,
    dataset: Iterable[Sample],
    head: str = "instance",
    *,
    classes: Sequence[str] = CLASSES,
    input_size: tuple[int, int] | None = None,
    params: ItemParams | None = None,
) -> dict[str, Any]:
    """Measure a network in training, see ``model_predictor`` and ``evaluate``."""
    was_training = model.training
    try:
        return evaluate(
            model_predictor(model, head, input_size),
            dataset,
            head=head,
            classes=classes,
            params=params,
        )
    finally:
        model.train(was_training)


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """The main figures as a flat mapping, such as a manifest holds, but for those without value."""
    names = (
        "frames",
        "miou",
        "miou_foreground",
        "binary_iou",
        "pq",
        "sq",
        "rq",
        "item_recall",
        "item_precision",
        "item_naming",
        "ap",
        "ap50",
        "ap75",
        "boundary_f",
        "boundary_f_foreground",
        "miou_pixels",
        "ece",
        "ece_items",
    )
    figures = {name: float(result[name]) for name in names if name in result}
    figures |= {f"{name}_agnostic": float(v) for name, v in result["agnostic"].items()}
    figures |= {f"iou_{name}": float(v) for name, v in result.get("iou", {}).items()}
    return {name: round(v, 4) for name, v in figures.items() if math.isfinite(v)}


def instance_classes(sample: Sample) -> dict[int, int]:
    """The label that most pixels of each true item have."""
    present, ids = ranked(sample.instances)
    table = np.bincount((ids * 256 + sample.labels).ravel(), minlength=(len(present) + 1) * 256)
    table = table.reshape(len(present) + 1, 256)[1:]
    # An item under pixels without truth is void whatever its class is.
    table[:, IGNORE] = 0
    return dict(zip(present.tolist(), table.argmax(axis=1).tolist(), strict=True))


def _write_gallery(
    folder: Path,
    frames: Sequence[tuple[Sample, NDArray[np.uint16], tuple[Item, ...]]],
    classes: Sequence[str],
) -> None:
    """Draw truth (left) and prediction (right) of each frame to a PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (sample, instances, items) in enumerate(frames, 1):
        height, width = sample.labels.shape
        truth = describe_items(sample.instances, sample.labels, None, (width, height))
        left = draw_overlay(sample.image, sample.instances, truth, classes)
        right = draw_overlay(sample.image, instances, items, classes)
        name = re.sub(r"[^\w.-]+", "_", sample.name) or "frame"
        path = folder / f"{number:02d}_{Path(name).stem}.png"
        write_png(path, contact_sheet([left, right], 2))


# --- command line ---------------------------------------------------------------------------------


def format_report(result: Mapping[str, Any]) -> str:
    """The figures as a table for a terminal, of about a hundred columns."""

    def figure(value: float) -> str:
        return "-" if math.isnan(value) else f"{value:.3f}"

    items, agnostic = result["items"], result["agnostic"]
    counts = [items[name] for name in ("found", "missed", "false")]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("class", no_wrap=True)
    columns = ("IoU", "bnd F", "PQ", "SQ", "RQ", "AP", "AP50", "AP75", "found", "missed", "false")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    measures = (*_QUALITY, *_PRECISION)
    for name, iou in result.get("iou", {}).items():
        entry = result["per_class"].get(name)
        row = [figure(iou)]
        if entry:
            row += [figure(entry[key]) for key in ("boundary_f", *measures)]
            row += [str(entry[key]) for key in ("found", "missed", "false")]
        table.add_row(name, *row)
    if "iou" in result:
        table.add_section()
        row = [figure(result[key]) for key in ("miou", "boundary_f", *measures)]
        table.add_row("mean", *row)
    row = [figure(result["binary_iou"]), figure(result["boundary_f_foreground"])]
    row += [figure(agnostic[key]) for key in measures]
    table.add_row("whatever class", *row, *(str(count) for count in counts))

    lines = [("foreground IoU", figure(result["binary_iou"]))]
    if "iou" in result:
        lines = [
            ("mIoU with background", figure(result["miou"])),
            ("mIoU without background", figure(result["miou_foreground"])),
            ("mIoU before items are made", figure(result["miou_pixels"])),
            *lines,
        ]
    lines += [
        ("item recall at IoU 0.5", f"{figure(result['item_recall'])}  ({counts[1]} missed)"),
        ("item precision", f"{figure(result['item_precision'])}  ({counts[2]} false)"),
    ]
    if "item_naming" in result:
        lines.append(("found items named right", figure(result["item_naming"])))
    bias = result["score_bias_items"]
    side = "" if math.isnan(bias) else f", too {'low' if bias < 0 else 'high'} by {abs(bias):.3f}"
    seconds = result["seconds"]
    lines += [
        (
            "calibration error of scores",
            f"{figure(result['ece'])}  (on items {figure(result['ece_items'])}{side})",
        ),
        (
            "per frame",
            f"network {seconds['network'] * 1e3:.1f} ms, items {seconds['items'] * 1e3:.1f} ms",
        ),
    ]
    console = Console(file=io.StringIO(), width=400, color_system=None)
    console.print(f"{result['frames']} frames, {counts[0] + counts[1]} items", highlight=False)
    console.print(table)
    grid = Table.grid(padding=(0, 2))
    for line in lines:
        grid.add_row(*line)
    console.print(grid)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def write_report(result: Mapping[str, Any], output: Path) -> list[Path]:
    """Write the figures, and beside them charts of the confusion and of the scores.

    Args:
        result: what ``evaluate`` gives.
        output: a ``.json`` file, or a folder for one named ``figures.json``.

    Returns:
        the files written: ``figures.json``, ``figures_confusion.png``,
        ``figures_reliability.png``.

    Raises:
        OSError: if they cannot be written.
    """
    path = output if output.suffix == ".json" else output / "figures.json"
    charts = [path.with_name(f"{path.stem}_{name}.png") for name in ("confusion", "reliability")]
    write_json(path, result)
    confusion, bins = result["confusion"], result["reliability"]["items"]
    write_png(charts[0], draw_confusion(confusion["counts"], confusion["names"]))
    write_png(
        charts[1],
        draw_reliability(
            bins["score"],
            bins["right"],
            bins["share"],
            result["ece_items"],
            "pixels taken for items",
        ),
    )
    return [path, *charts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``waste-seg eval``."""
    parser.add_argument("--model", required=True, metavar="BUNDLE", help="name or folder")
    parser.add_argument("--backend", default="auto", help="auto, openvino, onnxruntime or torch")
    parser.add_argument("--head", default="", choices=("", *HEADS), help="default: the bundle's")
    parser.add_argument("--threads", type=int, default=0, help="of the backend; 0: all cores")
    parser.add_argument(
        "--data",
        required=True,
        help=SPECS,
    )
    parser.add_argument(
        "--categories",
        metavar="YAML",
        help="class of each COCO category by name: a file, or zerowaste, taco or resortit",
    )
    parser.add_argument(
        "--only",
        metavar="FILE[:KEY]",
        help="take only these images (COCO): lines of a file, or a list in a JSON object",
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at broken data instead of passing over it"
    )
    defaults = ItemParams()
    parser.add_argument("--pixel-threshold", type=float, default=defaults.pixel_threshold)
    parser.add_argument("--center-threshold", type=float, default=defaults.center_threshold)
    parser.add_argument("--min-area", type=int, default=defaults.min_area_px, metavar="PX")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="write figures.json (or the .json file that this names) and charts of confusion and "
        "calibration beside it here",
    )
    parser.add_argument("--worst", type=int, metavar="K", help="how many frames to draw (12)")
    parser.add_argument("--gallery", type=Path, metavar="DIR", help="draw the worst frames here")


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg eval``; 0, or 1 if model or data cannot be used."""
    from waste_seg_ros.runtime.bundle import open_bundle

    try:
        if args.worst and not args.gallery:
            raise ValueError("--worst needs --gallery DIR to draw into")
        params = ItemParams(
            pixel_threshold=args.pixel_threshold,
            center_threshold=args.center_threshold,
            min_area_px=args.min_area,
        )
        bundle = open_bundle(args.model)
        manifest = bundle.manifest
        head = args.head or manifest.head
        if HEADS.index(head) > HEADS.index(manifest.head):
            raise ValueError(
                f"--head {head}: {manifest.name} has the head {manifest.head} and cannot serve"
            )
        dataset = open_data(
            args.data,
            manifest.classes,
            categories=args.categories,
            only=read_names(args.only) if args.only else None,
            strict=args.strict,
            finite=True,
        )
        result = evaluate(
            bundle_predictor(bundle, args.backend, args.threads),
            dataset,
            head=head,
            classes=manifest.classes,
            params=params,
            worst=12 if args.worst is None else args.worst,
            gallery=args.gallery,
            progress=sys.stderr.isatty(),
        )
        result |= {
            "model": manifest.name,
            "backend": args.backend,
            "data": args.data,
            "passed_over": list(dataset.problems),
        }
        if args.json:
            write_json(args.json, result)
        written = write_report(result, args.output) if args.output else []
    except (ValueError, OSError) as error:
        print(f"waste-seg eval: {error}", file=sys.stderr)
        return 1
    print(f"{manifest.name} ({head}) on {args.data}")
    print(format_report(result))
    for line in getattr(dataset, "unmapped", []):
        print(f"category {line!r} is of no known class; its items count class-agnostic only")
    for line in tell_problems(dataset.problems):
        print(line, file=sys.stderr)
    if written:
        print(f"written: {', '.join(str(path) for path in written)}")
    if args.gallery:
        print(f"worst frames (left the truth, right the model): {args.gallery}")
    return 0
