"""A dashboard for a browser: ``waste-seg dashboard``.

``state`` keeps what is shown, ``server`` serves it, ``static`` is the page; ``nodes.dashboard`` is
the node that listens to the line for them.
"""

from __future__ import annotations

import argparse
import os
import sys

TOKEN = "WASTE_SEG_DASHBOARD_TOKEN"
"""Variable that gives the token to the node: parameters and command lines are for all to read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``waste-seg dashboard``."""
    parser.add_argument("--host", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="0: any that is free (default: 8088)")
    parser.add_argument(
        "--token",
        help="of 16 characters or more, needed to look on; by default a new one, and none on a "
        f"loopback address. Others on this machine cannot read it from ${TOKEN}",
    )
    parser.add_argument("--namespace", default="", help="of the line's nodes")
    parser.add_argument("--image-topic", default="", help="in place of 'image_raw'")
    parser.add_argument("--params-file", default="", help="YAML file of node parameters")


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg dashboard`` beside a graph that runs, until Ctrl-C."""
    from waste_seg_ros.graph import dashboard_node
    from waste_seg_ros.launcher import ros_arguments

    if args.token is not None:
        os.environ[TOKEN] = args.token
    try:
        spec = dashboard_node(
            namespace=args.namespace,
            image_topic=args.image_topic,
            params_file=args.params_file,
            host=args.host,
            port=args.port,
        )
    except (ValueError, FileNotFoundError) as error:
        print(f"waste-seg dashboard: {error}", file=sys.stderr)
        return 2
    from waste_seg_ros.nodes.dashboard import main

    return main(ros_arguments(spec))
