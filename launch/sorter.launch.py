"""ros2 launch waste_seg_ros sorter.launch.py: camera (or yours), segmenter and, on wish, more.

A translation of waste_seg_ros.graph, where the arguments and nodes are described.
"""

from typing import Any

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from waste_seg_ros.graph import ARGUMENTS, NodeSpec, sorter_graph


def _text(value: bool | float | str) -> str:
    """Write a default as launch arguments are written; empty where the parameter files decide."""
    return str(value).lower() if isinstance(value, bool) else str(value or "")


def _action(spec: NodeSpec) -> Node:
    # launch reads a plain string as YAML, so that "0" would arrive as a number.
    parameters = {
        name: ParameterValue(value, value_type=str) if isinstance(value, str) else value
        for name, value in spec.parameters.items()
    }
    ended = Shutdown(reason=f"{spec.name} ended") if spec.required else None
    return Node(
        package=spec.package,
        executable=spec.executable,
        name=spec.name,
        namespace=spec.namespace,
        parameters=[*spec.parameter_files, *([parameters] if parameters else [])],
        remappings=list(spec.remappings.items()),
        arguments=list(spec.arguments),
        output="screen",
        emulate_tty=True,
        on_exit=ended,
    )


def _nodes(context: LaunchContext) -> list[Node]:
    given = context.launch_configurations
    values: dict[str, Any] = {a.name: a.parse(given[a.name]) for a in ARGUMENTS if given[a.name]}
    return [_action(spec) for spec in sorter_graph(**values)]


def generate_launch_description() -> LaunchDescription:
    """Describe the launch."""
    declared = [
        DeclareLaunchArgument(
            a.name,
            default_value=_text(a.default),
            # Not as choices, which would have to include the default.
            description=a.help + (f": {', '.join(a.choices)}" if a.choices else ""),
        )
        for a in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_nodes)])
