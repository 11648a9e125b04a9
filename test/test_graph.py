"""The graph's description, and that launch file and command line offer the same of it."""

from __future__ import annotations

import argparse
import ast
import inspect
from pathlib import Path

import pytest
import yaml

from waste_seg_ros import launcher
from waste_seg_ros.graph import ARGUMENTS, NodeSpec, share_folder, sorter_graph


def by_name(specs: list[NodeSpec]) -> dict[str, NodeSpec]:
    return {spec.name: spec for spec in specs}


def test_camera_and_segmenter_by_default() -> None:
    nodes = by_name(sorter_graph())
    assert set(nodes) == {"camera", "segmenter"}
    for name, node in nodes.items():
        assert node.executable == name
        assert node.required
        assert node.namespace == ""
        assert node.parameters == {}, "what is not given is left to the parameter files"
        assert node.remappings == {}
        assert [Path(file).name for file in node.parameter_files] == [f"{name}.yaml"]
        assert all(Path(file).is_file() for file in node.parameter_files)


def test_arguments_become_parameters_of_the_node_they_belong_to() -> None:
    nodes = by_name(
        sorter_graph(
            source="frames",
            rate=5.0,
            model="enet-semantic",
            head="binary",
            backend="torch",
            image_transport="compressed",
            camera_parameters={"frames": 3},
            segmenter_parameters={"threads": 1},
        )
    )
    assert nodes["camera"].parameters == {"source": "frames", "rate": 5.0, "frames": 3}
    assert nodes["segmenter"].parameters == {
        "model": "enet-semantic",
        "head": "binary",
        "backend": "torch",
        "image_transport": "compressed",
        "threads": 1,
    }


@pytest.mark.parametrize(
    ("image_topic", "camera_info"),
    [
        ("/cam/image_rect", "/cam/camera_info"),
        ("cam/image_raw", "cam/camera_info"),
        ("image", "camera_info"),
        ("/image", "/camera_info"),
    ],
)
def test_camera_info_is_looked_for_beside_the_image(image_topic: str, camera_info: str) -> None:
    (segmenter,) = sorter_graph(camera=False, image_topic=image_topic)
    assert segmenter.remappings == {
        "image_raw": image_topic,
        "image_raw/compressed": f"{image_topic}/compressed",
        "camera_info": camera_info,
    }


def test_a_given_camera_info_topic_is_kept() -> None:
    for node in sorter_graph(image_topic="/a/image", camera_info_topic="/b/info"):
        assert node.remappings["camera_info"] == "/b/info"
    for node in sorter_graph(camera_info_topic="/b/info"):
        assert node.remappings == {"camera_info": "/b/info"}


def test_the_users_parameter_file_comes_after_the_shipped_one(tmp_path: Path) -> None:
    file = tmp_path / "line.yaml"
    file.write_text("/**/segmenter:\n  ros__parameters: {belt_distance: 1.3}\n")
    for node in sorter_graph(params_file=str(file)):
        assert node.parameter_files[-1] == str(file)
        assert len(node.parameter_files) == 2
    with pytest.raises(FileNotFoundError, match=r"params_file.*nothing\.yaml"):
        sorter_graph(params_file=str(tmp_path / "nothing.yaml"))


def test_camera_arguments_without_the_camera_are_refused() -> None:
    for arguments in ({"source": "x"}, {"rate": 3.0}, {"camera_parameters": {"seed": 1}}):
        with pytest.raises(ValueError, match="camera:=false"):
            sorter_graph(camera=False, **arguments)


def test_arms_come_with_the_tracker_and_from_its_file(tmp_path: Path) -> None:
    assert set(by_name(sorter_graph(tracking=True))) == {"camera", "segmenter", "tracker"}
    file = tmp_path / "arms.yaml"
    file.write_text(
        "arms:\n"
        "  - {name: first, x: 1.0, lane: [-1, 1]}\n"
        "  - {name: number 2, x: 2.0, lane: [-1, 1]}\n"
        "  - {name: third, x: 3.0, lane: [-1, 1]}\n"
    )
    nodes = by_name(
        sorter_graph(
            arms=2,
            arms_file=str(file),
            namespace="line1",
            camera_info_topic="/info",
            tracker_parameters={"speed": 0.5},
        )
    )
    tracker = nodes["tracker"]
    assert tracker.parameters == {"arms": str(file), "speed": 0.5}
    assert tracker.required and tracker.remappings["camera_info"] == "/info"
    arms = [node for node in nodes.values() if node.executable == "arm"]
    assert [arm.parameters for arm in arms] == [{"arm": "first"}, {"arm": "number 2"}]
    assert [arm.name for arm in arms] == ["sim_first", "sim_number_2"], "names that ROS takes"
    assert all(arm.namespace == "line1" and not arm.required for arm in arms)
    with pytest.raises(ValueError, match=r"4 are asked for, but .*arms\.yaml has 3"):
        sorter_graph(arms=4, arms_file=str(file))
    with pytest.raises(ValueError, match=r"nothing\.yaml"):
        sorter_graph(arms=1, arms_file=str(tmp_path / "nothing.yaml"))


def test_rviz_follows_the_namespace_and_may_be_closed() -> None:
    rviz = by_name(sorter_graph(rviz=True, namespace="/line1/"))["rviz"]
    assert not rviz.required
    assert rviz.namespace == "line1"
    view = yaml.safe_load(Path(rviz.arguments[-1]).read_text())
    displays = view["Visualization Manager"]["Displays"]
    topics = {d["Topic"]["Value"] for d in displays if "Topic" in d}
    assert topics == set(rviz.remappings)
    assert all(target == f"/line1{topic}" for topic, target in rviz.remappings.items())


def test_arguments_are_the_functions_parameters() -> None:
    parameters = inspect.signature(sorter_graph).parameters
    defaults = {a.name: a.default for a in ARGUMENTS}
    assert defaults == {
        name: p.default for name, p in parameters.items() if not name.endswith("_parameters")
    }


def test_arguments_are_parsed_by_type_and_choice() -> None:
    argument = {a.name: a for a in ARGUMENTS}
    assert argument["camera"].parse("False") is False
    assert argument["rate"].parse("12") == 12.0
    assert argument["head"].parse("binary") == "binary"
    assert argument["arms"].parse("2") == 2
    for name, text in (
        ("camera", "maybe"),
        ("rate", "fast"),
        ("head", "polygon"),
        ("arms", "2.5"),
    ):
        with pytest.raises(ValueError, match=f"argument {name} takes .*'{text}'"):
            argument[name].parse(text)


def test_the_command_line_has_an_option_for_every_argument() -> None:
    parser = argparse.ArgumentParser()
    launcher.add_arguments(parser)
    assert vars(parser.parse_args([])) == {a.name: a.default for a in ARGUMENTS}
    args = parser.parse_args(["--no-camera", "--image-topic", "/cam/image", "--rviz"])
    assert (args.camera, args.image_topic, args.rviz) == (False, "/cam/image", True)


def test_a_contradiction_on_the_command_line_is_an_error(capsys) -> None:
    parser = argparse.ArgumentParser()
    launcher.add_arguments(parser)
    assert launcher.run(parser.parse_args(["--no-camera", "--source", "frames"])) == 2
    assert "camera:=false" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["camera", "segmenter", "tracker"])
def test_the_shipped_parameter_files_show_the_defaults(ros, start_node, name: str) -> None:
    """Each value is that of a node that was started without the file."""
    from rcl_interfaces.srv import GetParameters
    from rclpy.parameter import parameter_value_to_python

    (node,) = (spec for spec in sorter_graph(tracking=True) if spec.name == name)
    text = yaml.safe_load(Path(node.parameter_files[0]).read_text())
    shipped = text[f"/**/{name}"]["ros__parameters"]

    start_node(name, {} if name == "camera" else {"autostart": False})
    request = GetParameters.Request(names=list(shipped))
    response = ros.call(GetParameters, f"/{name}/get_parameters", request)
    declared = map(parameter_value_to_python, response.values)
    values = dict(zip(shipped, declared, strict=True))
    values.pop("autostart", None)
    assert values == {key: value for key, value in shipped.items() if key in values}
    assert shipped.get("autostart", True) is True


def test_the_launch_file_takes_arguments_and_nodes_from_the_graph() -> None:
    """Without launch: its source declares what ARGUMENTS lists and calls sorter_graph."""
    source = (share_folder() / "launch" / "sorter.launch.py").read_text()
    tree = ast.parse(source)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "waste_seg_ros.graph"
        for alias in node.names
    }
    assert {"ARGUMENTS", "sorter_graph"} <= imported
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert calls.count("sorter_graph") == 1
    assert calls.count("DeclareLaunchArgument") == 1, "declared in one loop over ARGUMENTS"
    # All of a node's description is translated, so that nothing of it is lost under launch.
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(NodeSpec.__dataclass_fields__) <= used
    assert {"name", "default", "help", "parse"} <= used
