"""Scenes of the synthetic line as files: ``waste-seg render``.

Rendering a scene takes longer than reading one. A set on disk pays when several networks are
trained on it, and it is what to look at for what the folder reader expects.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

import cv2
from tqdm import tqdm

from waste_seg_ros.cli import as_size
from waste_seg_ros.data.synthetic import synthetic_sample
from waste_seg_ros.files import write_png

_FOLDERS = ("images", "masks", "instances")


def render_scene(root: Path, seed: int, size: tuple[int, int], index: int) -> None:
    """Write scene ``index`` of ``seed`` at ``size`` (width, height) into a `FolderDataset`.

    A scene whose files are all there already is passed over.
    """
    paths = [root / folder / f"{seed}-{index:06d}.png" for folder in _FOLDERS]
    if all(path.is_file() for path in paths):
        return
    sample = synthetic_sample(seed, index, size)
    # The image last: a mask without an image is not seen, an image without its mask is an error.
    image, mask, instances = paths
    write_png(instances, sample.instances)
    write_png(mask, sample.labels)
    write_png(image, sample.image)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``waste-seg render``."""
    parser.add_argument("--seed", type=int, required=True, help="of the line")
    parser.add_argument("--count", type=int, required=True, help="scenes 0 to COUNT - 1")
    parser.add_argument("--size", type=as_size, default=(320, 240), help="WIDTHxHEIGHT (320x240)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="(default: one to a core)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder, read as folder:OUTPUT")


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg render``; one that was stopped goes on where it left off."""
    if args.count < 1 or args.seed < 0 or args.processes < 1:
        print(
            "waste-seg render: --count and --processes must be at least 1, --seed at least 0",
            file=sys.stderr,
        )
        return 1
    try:
        for folder in _FOLDERS:
            (args.output / folder).mkdir(parents=True, exist_ok=True)
        write = partial(render_scene, args.output, args.seed, args.size)
        cv2.setNumThreads(1)
        with multiprocessing.Pool(args.processes) as pool:
            scenes = pool.imap_unordered(write, range(args.count), chunksize=8)
            for _ in tqdm(scenes, total=args.count, unit="scene"):
                pass
    except OSError as error:
        print(f"waste-seg render: {args.output}: {error}", file=sys.stderr)
        return 1
    print(f"{args.count} scenes; read them as folder:{args.output}")
    return 0
