"""The command ``waste-seg``.

Each subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> exit code``; only
the module of the one asked for is imported, so that a robot needs no training libraries.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# Name, module, help.
COMMANDS = (
    ("demo", "waste_seg_ros.demo", "run camera and segmenter for a while and sum up"),
    ("up", "waste_seg_ros.launcher", "run camera and segmenter until Ctrl-C"),
    ("doctor", "waste_seg_ros.doctor", "look whether all is in place, and tell the mends"),
    ("record", "waste_seg_ros.record", "record the topics to MCAP files"),
    ("replay", "waste_seg_ros.replay", "play a recording, or measure on it"),
    ("dashboard", "waste_seg_ros.dashboard", "show a running line to browsers"),
    ("train", "waste_seg_ros.train.loop", "train a model and write its bundle"),
    ("eval", "waste_seg_ros.train.evaluate", "measure a bundle on labelled images"),
    ("compress", "waste_seg_ros.train.compress", "make a bundle smaller and faster"),
    ("export", "waste_seg_ros.runtime.export", "write a bundle, or its network in other formats"),
    ("models", "waste_seg_ros.runtime.listing", "list models: bundles found, or architectures"),
    ("table", "waste_seg_ros.train.table", "measure all bundles and write the README's table"),
    ("transfer", "waste_seg_ros.train.transfer", "measure what a bundle gives to other classes"),
    ("calibrate", "waste_seg_ros.calibrate", "find camera and belt from a board laid on the belt"),
    ("data", "waste_seg_ros.data.check", "look data over: classes, broken entries, leaks"),
    ("bench", "waste_seg_ros.bench", "measure how fast this machine runs a bundle"),
    ("track", "waste_seg_ros.track", "measure tracks and picks on the synthetic line"),
    ("render", "waste_seg_ros.data.render", "write scenes of the synthetic line as files"),
    ("contact-sheet", "waste_seg_ros.data.synthetic", "draw samples of the synthetic line"),
)

# How to get what pip installs under another name than it is imported by.
PACKAGES = {"cv2": "opencv-python-headless", "yaml": "PyYAML", "cv_bridge": "cv-bridge"}
FROM_ROS = {"rclpy", "launch", "launch_ros", "message_filters", "ament_index_python"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code; 2 for a command line that is not understood."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="waste-seg",
        description="Waste segmentation for sorting belts, on ROS 2.",
        epilog="waste-seg COMMAND --help tells the options of a command.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = argv[0] if argv else ""
    for name, module_name, summary in COMMANDS:
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == wanted:
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                print(f"waste-seg {name}: {missing(error)}", file=sys.stderr)
                return 1
            module.add_arguments(subparser)
            subparser.set_defaults(entry=module.run)  # "run" is a flag of train
    args = parser.parse_args(argv)
    try:
        return int(args.entry(args))
    except ModuleNotFoundError as error:  # imported only when needed
        print(f"waste-seg {wanted}: {missing(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `waste-seg ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def as_size(text: str) -> tuple[int, int]:
    """(width, height) of "320x240", both above 0. Raises argparse.ArgumentTypeError."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 320x240")
    return int(width), int(height)


def as_names(text: str) -> tuple[str, ...]:
    """The parts of "a, b,c"."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def missing(error: ModuleNotFoundError) -> str:
    """Say in one line how to get the module that an import did not find."""
    module = (error.name or "").partition(".")[0]
    if module in FROM_ROS or module.endswith(("_msgs", "_interfaces")):
        return (
            f"{module} is not installed: source ROS 2 (. /opt/ros/jazzy/setup.sh) or use ./sorter"
        )
    if module == "waste_seg_ros":
        part = (error.name or "").rpartition(".")[2]
        if part in ("msg", "srv", "action"):
            return (
                f"{error.name} is not built: colcon build, then source install/setup.sh "
                "(or use ./sorter)"
            )
        return f"{error.name} is not part of this version"
    return f"{module} is not installed: pip install {PACKAGES.get(module, module)}"


if __name__ == "__main__":
    sys.exit(main())
