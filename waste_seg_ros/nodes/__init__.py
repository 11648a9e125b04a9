"""ROS 2 nodes: thin, each a module with ``main(args=None)``; the work is done in the core."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from waste_seg_ros.graph import share_folder

SHARED_MEMORY_NEEDED = 256 << 20
"""Free bytes of /dev/shm at which a node takes 32 MB of it for sending."""


class NodeError(RuntimeError):
    """A node cannot start or go on; the text names the cause and the mend."""


def use_image_profile() -> None:
    """Make Fast DDS fit for images, unless the user has chosen a profile.

    Sets ``FASTRTPS_DEFAULT_PROFILES_FILE`` to ``config/fastdds.xml``, which says why. To be called
    before the first node is made. Does nothing where shared memory is scarce, as it is in a
    container with Docker's default of 64 MB, where taking more than there is ends in SIGBUS.
    """
    chosen = (
        "FASTRTPS_DEFAULT_PROFILES_FILE FASTDDS_DEFAULT_PROFILES_FILE FASTDDS_BUILTIN_TRANSPORTS"
    )
    if any(os.environ.get(name) for name in chosen.split()):
        return
    if Path("DEFAULT_FASTRTPS_PROFILES.xml").exists():  # Fast DDS looks there, too
        return
    try:
        memory = os.statvfs("/dev/shm")
        profile = share_folder() / "config" / "fastdds.xml"
    except OSError:
        return
    if memory.f_bavail * memory.f_frsize >= SHARED_MEMORY_NEEDED and profile.is_file():
        os.environ["FASTRTPS_DEFAULT_PROFILES_FILE"] = str(profile)


def run_node(make: Callable[[], Any], args: Sequence[str] | None = None) -> int:
    """Run a node until SIGINT or SIGTERM, or until it ends by itself.

    Args:
        make: makes the node. It has ``exit_code``, None while it wants to run, and
            ``close() -> bool``, which ends its own threads and says whether they have ended.
        args: command line, by default that of the process.

    Returns:
        The exit code: 0 also after a signal, 1 where the node cannot run, 2 where a parameter or
        the command line is wrong.
    """
    import rclpy
    import rclpy.exceptions
    from rclpy.executors import SingleThreadedExecutor

    # rclpy's own handlers end the context on both signals and then call the one that was there
    # before. Python's raises KeyboardInterrupt wherever the program happens to be.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    use_image_profile()
    try:
        rclpy.init(args=None if args is None else [sys.argv[0], *args])
    except Exception as error:  # RCLError is not public; it says which argument is wrong
        print(f"error: {error}", file=sys.stderr)
        return 2
    node: Any = None
    # rclpy's multi-threaded one turns in a busy loop, with the interpreter's lock, while a callback
    # runs; a camera at 25 Hz then lost two images in three on two cores.
    executor = SingleThreadedExecutor()
    code, stopped = 0, True
    try:
        node = make()
        executor.add_node(node)
        while rclpy.ok() and node.exit_code is None:
            executor.spin_once()
        code = node.exit_code or 0
        if rclpy.ok():  # the callback that asked for the end has yet to answer its caller
            executor.shutdown(timeout_sec=2.0)
    except NodeError as error:
        rclpy.logging.get_logger("waste_seg_ros").fatal(str(error))
        code = 1
    except (
        rclpy.exceptions.InvalidParameterTypeException,
        rclpy.exceptions.InvalidParameterValueException,
        rclpy.exceptions.ParameterUninitializedException,
    ) as error:
        rclpy.logging.get_logger("waste_seg_ros").fatal(f"parameter: {error}")
        code = 2
    except Exception:
        # A signal ends the context at any moment, and rclpy then raises one thing or another.
        if rclpy.ok():
            raise
    finally:
        if node is not None:
            stopped = node.close()
            executor.shutdown(timeout_sec=0)
            node.destroy_node()
        rclpy.try_shutdown()
    if not stopped:  # a thread is deep in the network or in loading one; nothing is lost with it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def declare(
    node: Any,
    name: str,
    default: Any,
    description: str,
    *,
    low: float | None = None,
    high: float | None = None,
    read_only: bool = False,
) -> Any:
    """Declare a parameter with type, description and range, and return its value.

    Raises:
        rclpy.exceptions.InvalidParameterTypeException: a value of another type was given.
        rclpy.exceptions.InvalidParameterValueException: a value out of the range was given.
    """
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
    from rclpy.parameter import Parameter

    kind = Parameter.Type.from_parameter_value(default)
    descriptor = ParameterDescriptor(
        type=kind.value, description=description, read_only=read_only, dynamic_typing=False
    )
    if low is not None and high is not None:
        if kind == Parameter.Type.INTEGER:
            bounds = IntegerRange(from_value=int(low), to_value=int(high), step=1)
            descriptor.integer_range = [bounds]
        else:
            bounds = FloatingPointRange(from_value=float(low), to_value=float(high))
            descriptor.floating_point_range = [bounds]
    return node.declare_parameter(name, default, descriptor).value


def declare_gripper(node: Any) -> None:
    """Declare what is known of jaws and cup wherever grasps are made.

    Raises:
        rclpy.exceptions.InvalidParameterTypeException: a value of another type was given.
        rclpy.exceptions.InvalidParameterValueException: a value out of the range was given.
    """
    from waste_seg_ros.perception.grasp import Gripper

    for name, default, text in (
        ("jaw_width", 0.02, "Width of a jaw, across the direction in which it closes [m]."),
        ("jaw_thickness", 0.01, "Thickness of a jaw, along that direction [m]."),
        (
            "grasp_clearance",
            0.004,
            "Left free around a jaw that comes down, and around the suction cup [m].",
        ),
        ("cup_diameter", 0.03, "Diameter of the suction cup [m]."),
    ):
        declare(node, name, default, text, low=0.0, high=10.0)
    declare(
        node,
        "friction_angle",
        Gripper().friction_angle,
        "By how much a side may be off square to the jaws [rad]: atan of the friction.",
        low=0.01,
        high=1.5,
    )
