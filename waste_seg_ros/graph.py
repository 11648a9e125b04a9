"""The sorter's node graph, described once.

``launch/sorter.launch.py`` translates it for ``ros2 launch``, and :mod:`waste_seg_ros.launcher`
starts it as plain processes where launch is not installed. Nothing here imports ROS.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from waste_seg_ros.runtime import HEADS, KINDS

PACKAGE = "waste_seg_ros"

ParameterValue = bool | int | float | str | list[str]


@dataclass(frozen=True)
class NodeSpec:
    """One node: what to run, under which name, with which parameters and remappings."""

    name: str
    executable: str
    package: str = PACKAGE
    namespace: str = ""
    """Without slashes at its ends; empty for the root."""
    parameter_files: tuple[str, ...] = ()
    """YAML parameter files; a later one overrides an earlier one."""
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    """Override the files."""
    remappings: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    """Command line before the ROS arguments."""
    required: bool = True
    """When it ends, the whole graph ends."""


@dataclass(frozen=True)
class Argument:
    """A launch argument, and the command line option of the same name."""

    name: str
    default: bool | float | str
    help: str
    choices: tuple[str, ...] = ()

    def parse(self, text: str) -> bool | float | str:
        """Read the value from launch or a command line.

        Raises:
            ValueError: naming the argument and what it takes.
        """
        if isinstance(self.default, bool):
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
            raise ValueError(f"argument {self.name} takes true or false, not '{text}'")
        if isinstance(self.default, float):
            try:
                return float(text)
            except ValueError:
                raise ValueError(f"argument {self.name} takes a number, not '{text}'") from None
        if isinstance(self.default, int):
            if text.isdecimal():
                return int(text)
            raise ValueError(f"argument {self.name} takes a whole number, not '{text}'")
        if text and self.choices and text not in self.choices:
            raise ValueError(
                f"argument {self.name} takes one of {', '.join(self.choices)}, not '{text}'"
            )
        return text


# The parameters of the function below that a user sets, in the order of the help text. Empty (or
# 0) leaves a value to the parameter files.
ARGUMENTS = (
    Argument("source", "", "camera: 'synthetic', a folder of images, a video file or /dev/videoN"),
    Argument("rate", 0.0, "camera: images per second"),
    Argument("model", "", "segmenter: name of a model bundle, or its folder"),
    Argument("head", "", "segmenter: what the model tells apart", HEADS),
    Argument("backend", "", "segmenter: what runs the network", KINDS),
    Argument("namespace", "", "namespace of all nodes and their topics, e.g. 'line1'"),
    Argument("image_topic", "", "image topic to use in place of 'image_raw'"),
    Argument(
        "camera_info_topic",
        "",
        "topic of the camera's intrinsics; by default 'camera_info' beside the image topic",
    ),
    Argument("image_transport", "", "segmenter: how images arrive", ("raw", "compressed")),
    Argument("camera", True, "start the camera node; false where a camera driver publishes"),
    Argument("tracking", False, "start the tracker: tracks in metres, and picks for the arms"),
    Argument("arms", 0, "simulated arms to start, with the tracker: the first of arms_file"),
    Argument("arms_file", "", "tracker: YAML file of the arms; by default config/arms.yaml"),
    Argument("rviz", False, "start rviz2 with the sorter's view"),
    Argument("dashboard", False, "serve the dashboard for a browser, on this machine only"),
    Argument("params_file", "", "YAML file of node parameters, over those in config/"),
)


def sorter_graph(
    *,
    source: str = "",
    rate: float = 0.0,
    model: str = "",
    head: str = "",
    backend: str = "",
    namespace: str = "",
    image_topic: str = "",
    camera_info_topic: str = "",
    image_transport: str = "",
    camera: bool = True,
    tracking: bool = False,
    arms: int = 0,
    arms_file: str = "",
    rviz: bool = False,
    dashboard: bool = False,
    params_file: str = "",
    camera_parameters: Mapping[str, ParameterValue] | None = None,
    segmenter_parameters: Mapping[str, ParameterValue] | None = None,
    tracker_parameters: Mapping[str, ParameterValue] | None = None,
) -> list[NodeSpec]:
    """Describe the nodes of one sorting line: camera, segmenter; on wish what else there is.

    The arguments are those of :data:`ARGUMENTS`; ``camera_parameters``,
    ``segmenter_parameters`` and ``tracker_parameters`` are further node parameters.

    Raises:
        ValueError: two arguments contradict each other.
        FileNotFoundError: ``params_file`` does not exist.
    """
    if not camera:
        for name, value in (("source", source), ("rate", rate), ("parameters", camera_parameters)):
            if value:
                raise ValueError(f"{name} is for the camera node, which camera:=false leaves out")
    params_file = _existing(params_file)
    namespace = namespace.strip("/")
    remappings = _remappings(image_topic, camera_info_topic)

    def node(name: str, parameters: Mapping[str, ParameterValue | None]) -> NodeSpec:
        shipped = share_folder() / "config" / f"{name}.yaml"
        return NodeSpec(
            name=name,
            executable=name,
            namespace=namespace,
            parameter_files=(str(shipped), *([params_file] if params_file else [])),
            parameters={key: value for key, value in parameters.items() if value is not None},
            remappings=remappings,
        )

    graph = []
    if camera:
        graph.append(
            node(
                "camera",
                {"source": source or None, "rate": rate or None, **(camera_parameters or {})},
            )
        )
    graph.append(
        node(
            "segmenter",
            {
                "model": model or None,
                "head": head or None,
                "backend": backend or None,
                "image_transport": image_transport or None,
                **(segmenter_parameters or {}),
            },
        )
    )
    if tracking or arms:
        arms_file = os.path.abspath(os.path.expanduser(arms_file)) if arms_file else ""
        graph.append(node("tracker", {"arms": arms_file or None, **(tracker_parameters or {})}))
        graph += _simulated_arms(arms, arms_file, namespace, params_file)
    if dashboard:
        folder = (segmenter_parameters or {}).get("bundles_dir")
        graph.append(
            dashboard_node(
                namespace=namespace,
                image_topic=image_topic,
                camera_info_topic=camera_info_topic,
                image_transport=image_transport,
                bundles_dir=str(folder or ""),
                params_file=params_file,
            )
        )
    if rviz:
        # The view names its topics from the root.
        topics = ("overlay", "markers", "track_markers") if namespace else ()
        graph.append(
            NodeSpec(
                name="rviz",
                executable="rviz2",
                package="rviz2",
                namespace=namespace,
                remappings={f"/{topic}": f"/{namespace}/{topic}" for topic in topics},
                arguments=("-d", str(share_folder() / "rviz" / "sorter.rviz")),
                required=False,
            )
        )
    return graph


def dashboard_node(
    *,
    namespace: str = "",
    image_topic: str = "",
    camera_info_topic: str = "",
    image_transport: str = "",
    bundles_dir: str = "",
    params_file: str = "",
    host: str | None = None,
    port: int | None = None,
) -> NodeSpec:
    """Describe the dashboard of a line; what is not given is left to the parameter files.

    Raises:
        FileNotFoundError: ``params_file`` does not exist.
    """
    params_file = _existing(params_file)
    given = {
        "host": host,
        "port": port,
        "image_transport": image_transport or None,
        "bundles_dir": bundles_dir or None,
    }
    shipped = share_folder() / "config" / "dashboard.yaml"
    return NodeSpec(
        name="dashboard",
        executable="dashboard",
        namespace=namespace.strip("/"),
        parameter_files=(str(shipped), *([params_file] if params_file else [])),
        parameters={key: value for key, value in given.items() if value is not None},
        remappings=_remappings(image_topic, camera_info_topic),
        required=False,  # the line runs on without onlookers
    )


def _simulated_arms(count: int, arms_file: str, namespace: str, params_file: str) -> list[NodeSpec]:
    """Describe the first so many arms of a file.

    Raises:
        ValueError: the file cannot be read, or has fewer.
    """
    if not count:
        return []
    from waste_seg_ros.perception.picks import read_arms

    file = Path(arms_file) if arms_file else share_folder() / "config" / "arms.yaml"
    known = read_arms(file)
    if not 0 < count <= len(known):
        raise ValueError(f"arms: {count} are asked for, but {file} has {len(known)}; add them")
    return [
        NodeSpec(
            name=re.sub(r"\W", "_", f"sim_{arm.name}"),
            executable="arm",
            namespace=namespace,
            parameter_files=(params_file,) if params_file else (),
            parameters={"arm": arm.name},
            required=False,  # others take over
        )
        for arm in known[:count]
    ]


def _existing(params_file: str) -> str:
    """The absolute path of a file that is given, else nothing."""
    if params_file:
        params_file = os.path.abspath(os.path.expanduser(params_file))
        if not os.path.isfile(params_file):
            raise FileNotFoundError(f"params_file: there is no file {params_file}")
    return params_file


def _remappings(image_topic: str, camera_info_topic: str) -> dict[str, str]:
    remappings = {}
    if image_topic:
        remappings["image_raw"] = image_topic
        remappings["image_raw/compressed"] = f"{image_topic}/compressed"
        # Camera drivers publish the two side by side (REP 104 and image_transport).
        beside = image_topic[: image_topic.rfind("/") + 1] + "camera_info"
        camera_info_topic = camera_info_topic or beside
    if camera_info_topic:
        remappings["camera_info"] = camera_info_topic
    return remappings


def share_folder() -> Path:
    """Return the folder that holds ``config``, ``launch``, ``rviz`` and ``bundles``.

    It is the installed package's share folder or, without one, the source checkout.

    Raises:
        FileNotFoundError: neither exists.
    """
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        share = Path(prefix) / "share" / PACKAGE
        if prefix and (share / "config").is_dir():
            return share
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "config").is_dir():
        return checkout
    raise FileNotFoundError(
        f"no share folder of {PACKAGE} on AMENT_PREFIX_PATH; source the workspace's setup file"
    )
