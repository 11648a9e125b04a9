"""The launch file under ros2 launch; needs ROS 2 from apt (the wheels have no launch)."""

from __future__ import annotations

from pathlib import Path

import pytest

from waste_seg_ros.graph import ARGUMENTS, share_folder

launch_pytest = pytest.importorskip(
    "launch_pytest", reason="launch_pytest is not installed: apt install ros-jazzy-launch-pytest"
)

from launch import LaunchContext, LaunchDescription  # noqa: E402
from launch.actions import IncludeLaunchDescription  # noqa: E402
from launch.launch_description_sources import PythonLaunchDescriptionSource  # noqa: E402

LAUNCH_FILE = share_folder() / "launch" / "sorter.launch.py"


def include(**arguments: str) -> IncludeLaunchDescription:
    source = PythonLaunchDescriptionSource(str(LAUNCH_FILE))
    return IncludeLaunchDescription(source, launch_arguments=arguments.items())


def test_the_launch_arguments_are_those_of_the_graph() -> None:
    source = PythonLaunchDescriptionSource(str(LAUNCH_FILE))
    declared = source.get_launch_description(LaunchContext()).get_launch_arguments()
    assert [argument.name for argument in declared] == [a.name for a in ARGUMENTS]
    assert all(argument.description for argument in declared)


@launch_pytest.fixture
def line(tmp_path: Path) -> LaunchDescription:
    """A line in a namespace, its camera told by file and argument, a segmenter with no model."""
    file = tmp_path / "line.yaml"
    file.write_text("/**/camera:\n  ros__parameters: {width: 160, height: 120, rate: 5.0}\n")
    graph = include(
        namespace="line1",
        source="synthetic",
        rate="10",
        model="0",
        image_topic="/cam/image",
        params_file=str(file),
    )
    return LaunchDescription([graph, launch_pytest.actions.ReadyToTest()])


@pytest.mark.launch(fixture=line)
def test_nodes_get_names_parameters_and_topics(ros) -> None:
    from rcl_interfaces.srv import GetParameters
    from rclpy.parameter import parameter_value_to_python
    from sensor_msgs.msg import CameraInfo, Image

    images = ros.collect(Image, "/cam/image")
    infos = ros.collect(CameraInfo, "/cam/camera_info")
    assert ros.spin_until(lambda: images and infos, timeout=60)
    assert (images[0].width, images[0].height) == (160, 120), "the file's value"

    def value(node: str, name: str) -> object:
        request = GetParameters.Request(names=[name])
        response = ros.call(GetParameters, f"/line1/{node}/get_parameters", request, timeout=60)
        return parameter_value_to_python(response.values[0])

    assert value("camera", "rate") == 10.0, "the argument is over the file"
    assert value("segmenter", "model") == "0", "a string stays one"
    publishers = ros.node.get_publishers_info_by_topic("/line1/items")
    assert [publisher.node_name for publisher in publishers] in ([], ["segmenter"])
