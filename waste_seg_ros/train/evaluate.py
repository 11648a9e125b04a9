"""Measuring a network on labelled images: ``waste-seg eval``.

Everything is measured at the images' own resolution: the network sees an image scaled to its
input, and its labels and instances are scaled back by nearest neighbour.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from waste_seg_ros.data.sample import CLASSES, IGNORE, OTHER, Sample
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
from waste_seg_ros.train.metrics import BinaryIoU, ConfusionMatrix, ItemCounts, PanopticQuality

if TYPE_CHECKING:
    from waste_seg_ros.models import SegmentationModel
    from waste_seg_ros.runtime.backends import Backend, Prediction
    from waste_seg_ros.runtime.bundle import Bundle

#: From an (H, W, 3) uint8 RGB image of any size to a prediction at the network's resolution.
Predict = Callable[[NDArray[np.uint8]], "Prediction"]

#: Backends for so many image sizes are kept at a time.
_BACKENDS_KEPT = 4


# --- data -----------------------------------------------------------------------------------------


class SyntheticSet:
    """Scenes 0..count - 1 of the synthetic line's seed."""

    def __init__(self, seed: int, count: int, size: tuple[int, int] = (320, 240)) -> None:
        self.seed, self.count, self.size = seed, count, size
        self.classes = CLASSES
        self.problems: list[str] = []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        from waste_seg_ros.data.synthetic import synthetic_sample

        for index in range(self.count):
            sample = synthetic_sample(self.seed, index, self.size)
            yield replace(sample, name=f"synthetic-{self.seed}-{index}")


def open_dataset(
    spec: str,
    classes: Sequence[str] = CLASSES,
    *,
    categories: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    strict: bool = False,
) -> Any:
    """Open the data that a specification names.

    Args:
        spec: ``synthetic:SEED:COUNT``, ``synthetic:SEED:COUNT:WIDTHxHEIGHT``,
            ``coco:ANNOTATIONS.json:IMAGES`` or ``folder:DIR``.
        classes: names of the classes (the synthetic line has its own).
        categories: class of each COCO category by name, beyond those known.
        only: file names of the images to take (COCO).
        strict: raise at the first thing that is broken instead of passing it over.

    Returns:
        something with a length, ``classes`` and ``problems`` that gives samples.

    Raises:
        ValueError: if the specification is not understood or the data are broken.
        OSError: if a file cannot be read.
    """
    kind, _, rest = spec.partition(":")
    parts = rest.split(":")
    if kind == "synthetic" and len(parts) in (2, 3) and all(p.isdigit() for p in parts[:2]):
        size = re.fullmatch(r"(\d+)x(\d+)", parts[2]) if len(parts) == 3 else None
        if len(parts) == 2 or size:
            wide = (int(size[1]), int(size[2])) if size else (320, 240)
            return SyntheticSet(int(parts[0]), int(parts[1]), wide)
    if kind == "coco" and len(parts) == 2 and all(parts):
        from waste_seg_ros.data.coco import CocoDataset

        return CocoDataset(
            Path(parts[0]), Path(parts[1]), categories, classes, only=only, strict=strict
        )
    if kind == "folder" and rest:
        from waste_seg_ros.data.folder import FolderDataset

        return FolderDataset(Path(rest), classes, strict=strict)
    raise ValueError(
        f"data {spec!r} is not understood; it must be synthetic:SEED:COUNT[:WIDTHxHEIGHT], "
        "coco:ANNOTATIONS.json:IMAGES or folder:DIR"
    )


def read_names(choice: str) -> frozenset[str]:
    """File names from ``FILE.json:KEY`` (a list in a JSON object) or from lines of a text file.

    Raises:
        ValueError: if there is no such list.
        OSError: if the file cannot be read.
    """
    path, _, key = choice.partition(":")
    text = Path(path).read_text(encoding="utf-8")
    if not key:
        return frozenset(line.strip() for line in text.splitlines() if line.strip())
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    names = content.get(key) if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        known = ", ".join(content) if isinstance(content, dict) else "none"
        raise ValueError(f"{path}: has no list of names {key!r}; it has {known}")
    return frozenset(names)


def rename_labels(
    labels: NDArray[np.uint8], source: Sequence[str], target: Sequence[str]
) -> NDArray[np.uint8]:
    """Label ids of one list of classes as those of another; classes it lacks become 254."""
    if tuple(source) == tuple(target):
        return labels
    table = np.arange(256, dtype=np.uint8)
    for index, name in enumerate(source, 1):
        table[index] = target.index(name) + 1 if name in target else OTHER
    return table[labels]


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

    ``named``: the classes count; else only foreground, and items whatever their class.
    """

    def __init__(self, classes: int, named: bool) -> None:
        self.named = named
        self.confusion, self.binary = ConfusionMatrix(classes), BinaryIoU()
        self.quality, self.found = PanopticQuality(classes), ItemCounts()

    def update(
        self,
        sample: Sample,
        labels: NDArray[np.uint8],
        instances: NDArray[np.uint16],
        kinds: Mapping[int, int],
    ) -> tuple[float, tuple[int, int, int]]:
        """Add a frame.

        Args:
            sample: the truth, its labels those of the network's classes.
            labels: (H, W) predicted labels, of the sample's size.
            instances: (H, W) predicted item ids.
            kinds: class of each predicted item, 0 for unknown.

        Returns:
            the frame's foreground IoU, and its found, missed and false items.
        """
        void = sample.labels == IGNORE
        true_kinds = instance_classes(sample)
        frame_iou = self.binary.update(sample.labels, labels)
        if self.named:
            self.confusion.update(sample.labels, labels)
        self.quality.update(sample.instances, true_kinds, instances, kinds, void)
        return frame_iou, self.found.update(
            sample.instances,
            instances,
            void,
            true_kinds if self.named else None,
            kinds if self.named else None,
        )


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
        dataset: samples; if it has ``classes`` these may differ from the network's.
        head: what the network is used as; the binary head has class-agnostic figures only.
        classes: names of the network's labels 1..C.
        params: how items are made of predictions.
        worst: so many of the worst frames are drawn into the gallery.
        gallery: folder for them.
        progress: show a bar on stderr.

    Returns:
        plain values, NaN where nothing was seen: ``frames``; ``binary_iou``; ``miou`` and
        ``miou_foreground`` (with and without the background) over classes in the truth;
        ``iou`` by class; ``pq``, ``sq``, ``rq`` (means over classes) and ``per_class``;
        ``agnostic`` with ``pq``, ``sq``, ``rq``; ``item_recall`` and ``item_precision`` at IoU
        0.5; ``item_naming`` (share of found items whose class is right); ``items`` with
        ``found``, ``missed``, ``false``; ``seconds`` per frame for network and items.

    Raises:
        ValueError: if the head is none of ``HEADS`` or there are no frames.
    """
    if head not in HEADS:
        raise ValueError(f"head {head!r} is none of {', '.join(HEADS)}")
    params = replace(params or ItemParams(), class_agnostic=head == "binary")
    scores = Scores(len(classes), named=head != "binary")
    source = tuple(getattr(dataset, "classes", classes))
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
        instances, items = extract_items(prediction, (width, height), params)
        spent["network"] += between - begin
        spent["items"] += time.perf_counter() - between
        labels = scale_ids(label_image(instances, items), (width, height))
        instances = scale_ids(instances, (width, height))

        kinds = {item.id: item.class_index for item in items}
        frame_iou, (hit, missed, false) = scores.update(sample, labels, instances, kinds)
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

    confusion, quality, found = scores.confusion, scores.quality, scores.found
    result: dict[str, Any] = {
        "frames": frames,
        "head": head,
        "classes": list(classes),
        "binary_iou": scores.binary.value(),
        "item_recall": found.recall(),
        "item_precision": found.precision(),
        "items": {"found": found.found, "missed": found.missed, "false": found.false},
        "agnostic": dict(zip(("pq", "sq", "rq"), quality.agnostic(), strict=True)),
        "seconds": {name: value / frames for name, value in spent.items()},
    }
    if scores.named:
        pq, sq, rq = quality.mean()
        result |= {
            "miou": confusion.mean_iou(),
            "miou_foreground": confusion.mean_iou(background=False),
            "iou": dict(zip(("background", *classes), confusion.iou().tolist(), strict=True)),
            "item_naming": found.naming(),
            "pq": pq,
            "sq": sq,
            "rq": rq,
            "per_class": {
                name: {
                    "pq": float(quality.pq()[index]),
                    "sq": float(quality.sq()[index]),
                    "rq": float(quality.rq()[index]),
                    "found": int(quality.true_positives[index]),
                    "missed": int(quality.false_negatives[index]),
                    "false": int(quality.false_positives[index]),
                }
                for index, name in enumerate(classes)
            },
        }
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
    )
    figures = {name: float(result[name]) for name in names if name in result}
    figures |= {f"{name}_agnostic": float(v) for name, v in result["agnostic"].items()}
    figures |= {f"iou_{name}": float(v) for name, v in result.get("iou", {}).items()}
    return {name: round(v, 4) for name, v in figures.items() if math.isfinite(v)}


def instance_classes(sample: Sample) -> dict[int, int]:
    """The label that most pixels of each true item have."""
    ids = sample.instances.astype(np.intp)
    count = int(ids.max(initial=0)) + 1
    inside = ids > 0
    table = np.bincount(ids[inside] * 256 + sample.labels[inside], minlength=count * 256).reshape(
        count, 256
    )
    # An item under pixels without truth is void whatever its class is.
    table[:, IGNORE] = 0
    present = np.flatnonzero(np.bincount(ids[inside], minlength=count))
    return {int(index): int(table[index].argmax()) for index in present}


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
    """The figures as a table for a terminal."""

    def figure(value: float) -> str:
        return "    -" if math.isnan(value) else f"{value:5.3f}"

    items = result["items"]
    lines = [f"{result['frames']} frames, {items['found'] + items['missed']} items", ""]
    if "iou" in result:
        width = max(10, *(len(name) for name in result["iou"]))
        lines.append(f"{'class':{width}}    IoU     PQ     SQ     RQ   found  missed   false")
        for name, iou in result["iou"].items():
            row = f"{name:{width}}  {figure(iou)}"
            entry = result["per_class"].get(name)
            if entry:
                row += "".join(f"  {figure(entry[key])}" for key in ("pq", "sq", "rq"))
                row += "".join(f"  {entry[key]:6d}" for key in ("found", "missed", "false"))
            lines.append(row)
        mean = "".join(f"  {figure(result[key])}" for key in ("pq", "sq", "rq"))
        lines += [
            f"{'mean':{width}}  {figure(result['miou'])}{mean}",
            "",
            f"mIoU with background     {figure(result['miou'])}",
            f"mIoU without background  {figure(result['miou_foreground'])}",
        ]
    agnostic = result["agnostic"]
    lines += [
        f"foreground IoU           {figure(result['binary_iou'])}",
        f"items whatever class     PQ {figure(agnostic['pq'])}  SQ {figure(agnostic['sq'])}  "
        f"RQ {figure(agnostic['rq'])}",
        f"item recall at IoU 0.5   {figure(result['item_recall'])}  "
        f"({items['found']} found, {items['missed']} missed)",
        f"item precision           {figure(result['item_precision'])}  ({items['false']} false)",
    ]
    if "item_naming" in result:
        lines.append(f"found items named right  {figure(result['item_naming'])}")
    seconds = result["seconds"]
    lines.append(
        f"per frame                network {seconds['network'] * 1e3:.1f} ms, "
        f"items {seconds['items'] * 1e3:.1f} ms"
    )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``waste-seg eval``."""
    parser.add_argument("--model", required=True, metavar="BUNDLE", help="name or folder")
    parser.add_argument("--backend", default="auto", help="auto, openvino, onnxruntime or torch")
    parser.add_argument("--head", default="", choices=("", *HEADS), help="default: the bundle's")
    parser.add_argument("--threads", type=int, default=0, help="of the backend; 0: all cores")
    parser.add_argument(
        "--data",
        required=True,
        help="synthetic:SEED:COUNT[:WIDTHxHEIGHT], coco:ANNOTATIONS.json:IMAGES or folder:DIR",
    )
    parser.add_argument(
        "--categories", type=Path, metavar="YAML", help="class of each COCO category by name"
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
        categories = None
        if args.categories:
            from waste_seg_ros.data.coco import read_categories

            categories = read_categories(args.categories)
        dataset = open_dataset(
            args.data,
            manifest.classes,
            categories=categories,
            only=read_names(args.only) if args.only else None,
            strict=args.strict,
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
    except (ValueError, OSError) as error:
        print(f"waste-seg eval: {error}", file=sys.stderr)
        return 1
    print(f"{manifest.name} ({head}) on {args.data}")
    print(format_report(result))
    for line in getattr(dataset, "unmapped", []):
        print(f"category {line!r} is of no known class; its items count class-agnostic only")
    if dataset.problems:
        print(f"{len(dataset.problems)} broken entries were passed over:", file=sys.stderr)
        for line in dataset.problems[:10]:
            print(f"  {line}", file=sys.stderr)
    if args.gallery:
        print(f"worst frames (left the truth, right the model): {args.gallery}")
    return 0
