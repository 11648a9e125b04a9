"""Fixtures for tests over real DDS.

Importing this file picks a ROS domain for the test run and keeps DDS on this machine; that must
happen before rclpy is imported, so nothing here imports it at the top.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rclpy.context import Context
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.node import Node

# With Fast DDS's default ports, domains above 101 run into Linux' ephemeral ports; 0 is everyone's.
DOMAINS = range(1, 102)
_domain_lock: IO[str] | None = None  # held open as long as this process lives


def _claim_domain() -> int:
    """Take a domain that no other test run on this machine holds."""
    global _domain_lock
    folder = Path(tempfile.gettempdir()) / f"waste_seg_ros_test_domains.{os.getuid()}"
    folder.mkdir(exist_ok=True)
    start = os.getpid() % len(DOMAINS)
    for domain in (*DOMAINS[start:], *DOMAINS[:start]):
        lock = (folder / str(domain)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        _domain_lock = lock
        return domain
    raise RuntimeError(f"all {len(DOMAINS)} ROS domains are taken by test runs; see {folder}")


if "rclpy" in sys.modules:
    raise RuntimeError("rclpy was imported before test/conftest.py could choose a ROS domain")
os.environ["ROS_DOMAIN_ID"] = str(_claim_domain())
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
for _variable in ("ROS_LOCALHOST_ONLY", "ROS_STATIC_PEERS", "ROS_NAMESPACE", "PYTEST_ADDOPTS"):
    os.environ.pop(_variable, None)


def pytest_report_header() -> str:
    return f"ROS domain {os.environ['ROS_DOMAIN_ID']}, loopback only"


@dataclass
class Ros:
    """A node of the test in a context of its own, and the executor that serves it."""

    context: Context
    node: Node
    executor: SingleThreadedExecutor
    _clients: dict[str, Any] = field(default_factory=dict, repr=False)

    def spin_until(self, condition: Callable[[], object], timeout: float = 20.0) -> bool:
        """Serve callbacks until the condition holds; False if it does not within `timeout` s."""
        end = time.monotonic() + timeout
        while not condition():
            left = end - time.monotonic()
            if left <= 0:
                return False
            self.executor.spin_once(timeout_sec=min(left, 0.1))
        return True

    def collect(self, message_type: Any, topic: str, qos: Any = 10) -> list[Any]:
        """Subscribe; the returned list grows while the executor spins."""
        received: list[Any] = []
        self.node.create_subscription(message_type, topic, received.append, qos)
        return received

    def call(self, service_type: Any, name: str, request: Any, timeout: float = 20.0) -> Any:
        """Call a service and return its response; fails the test if none comes."""
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = self.node.create_client(service_type, name)
            assert self.spin_until(client.service_is_ready, timeout), f"no service {name}"
            # Ready means that we know the server. DDS loses the answer if the server does not know
            # us yet, and nothing tells when it does.
            self.spin_until(lambda: False, 0.3)
        future = client.call_async(request)
        assert self.spin_until(future.done, timeout), f"no answer from {name}"
        return future.result()


@pytest.fixture
def ros() -> Iterator[Ros]:
    """An isolated rclpy context with one node; all of it is gone after the test."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("test", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        yield Ros(context, node, executor)
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown(context=context)


@dataclass
class NodeProcess:
    """A node of this package running as a process of its own."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path = field(repr=False)

    def output(self) -> str:
        """All it has printed so far."""
        return self.log.read_text(errors="replace")

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self, timeout: float = 10.0) -> int:
        """Interrupt it as Ctrl-C would, kill it if that does not end it; return its exit code."""
        if self.alive():
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        with contextlib.suppress(ProcessLookupError):  # also what it started itself
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[..., NodeProcess]]:
    """A function that starts `camera`, `segmenter` or `watch` as a process; ended after the test.

    start_node("segmenter", {"model": "..."}, {"image_raw": "cam/image_raw"}, namespace="line1")
    """
    started: list[NodeProcess] = []

    def start(
        executable: str,
        params: Mapping[str, Any] | None = None,
        remaps: Mapping[str, str] | None = None,
        *,
        namespace: str = "",
        name: str = "",
    ) -> NodeProcess:
        command = [sys.executable, "-m", f"waste_seg_ros.nodes.{executable}", "--ros-args"]
        for key, value in (params or {}).items():
            # JSON is YAML, and YAML is what rcl reads.
            text = json.dumps(str(value) if isinstance(value, Path) else value)
            command += ["-p", f"{key}:={text}"]
        for source, target in (remaps or {}).items():
            command += ["-r", f"{source}:={target}"]
        if namespace:
            command += ["-r", f"__ns:=/{namespace.strip('/')}"]
        if name:
            command += ["-r", f"__node:={name}"]
        log = tmp_path / f"{executable}-{len(started)}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=tmp_path,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        node = NodeProcess(name or executable, process, log)
        started.append(node)
        return node

    yield start
    for node in started:
        node.stop()
        # pytest shows this only when the test failed.
        print(f"--- {node.name}, exit code {node.process.returncode}\n{node.output()}")


# --- a network whose answers are known ------------------------------------------------------------


def _write_colour_network(path: Path, shift: int = 1, slow: int = 0, fragile: bool = False) -> None:
    """Write an ONNX graph that labels bright pixels by their strongest channel.

    Red is label `shift`, green and blue the next ones, with a score of 0.9. `slow` adds that many
    large convolutions. A fragile one fails on images with a value of 255.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants: dict[str, Any] = {
        "threshold": np.float32(100),
        "shift": np.int64(shift),
        "zero": np.int64(0),
        "none": np.float32(0),
        "sure": np.float32(0.9),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["x"], ["best"], axes=[3], keepdims=0),
        helper.make_node("ArgMax", ["x"], ["channel"], axis=3, keepdims=0),
        helper.make_node("Greater", ["best", "threshold"], ["bright"]),
        helper.make_node("Add", ["channel", "shift"], ["label"]),
        helper.make_node("Where", ["bright", "label", "zero"], ["chosen"]),
        helper.make_node("Mul", ["best", "none"], ["flat"]),
        helper.make_node("Add", ["flat", "sure"], ["certainty"]),
    ]
    labels, scores = "chosen", "certainty"
    if slow:
        rng = np.random.default_rng(0)
        constants["huge"] = np.float32(1e30)
        nodes.append(helper.make_node("Transpose", ["x"], ["y0"], perm=[0, 3, 1, 2]))
        for k in range(slow):
            shape = (64, 64 if k else 3, 7, 7)
            constants[f"w{k}"] = rng.normal(0, 1e-3, shape).astype(np.float32)
            nodes.append(
                helper.make_node("Conv", [f"y{k}", f"w{k}"], [f"y{k + 1}"], pads=[3, 3, 3, 3])
            )
        nodes += [
            helper.make_node("ReduceMax", [f"y{slow}"], ["most"], axes=[1], keepdims=0),
            helper.make_node("Greater", ["most", "huge"], ["never"]),
            helper.make_node("Cast", ["never"], ["nothing"], to=TensorProto.INT64),
            helper.make_node("Add", ["chosen", "nothing"], ["worked"]),
        ]
        labels = "worked"
    if fragile:
        constants["table"] = np.zeros(255, np.float32)
        nodes += [
            helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
            helper.make_node("Cast", ["top"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "place"], ["looked"]),  # 255 is out of the table
            helper.make_node("Add", ["certainty", "looked"], ["checked"]),
        ]
        scores = "checked"
    nodes += [
        helper.make_node("Cast", [labels], ["labels"], to=TensorProto.UINT8),
        helper.make_node("Identity", [scores], ["scores"]),
    ]
    shape = [1, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [*shape, 3])],
        [
            helper.make_tensor_value_info("labels", TensorProto.UINT8, shape),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, shape),
        ],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


@pytest.fixture(scope="session")
def colour_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of semantic bundles of 160x120 input that tell colours.

    `colours`: red is paper, green bottle, blue aluminum. `shifted`: red is bottle, and so on.
    `slow`: takes long. `fragile`: fails on images with a value of 255. `damaged`: another file than
    its manifest says.
    """
    import numpy as np
    from safetensors.numpy import save_file

    from waste_seg_ros.data.sample import CLASSES
    from waste_seg_ros.runtime import bundle

    folder = tmp_path_factory.mktemp("bundles")
    networks: dict[str, dict[str, Any]] = {
        "colours": {},
        "shifted": {"shift": 2},
        "slow": {"slow": 2},
        "fragile": {"fragile": True},
        "damaged": {},
    }
    for name, network in networks.items():
        path = folder / name
        path.mkdir()
        _write_colour_network(path / bundle.GRAPH, **network)
        save_file({"unused": np.zeros(1, np.float32)}, path / bundle.WEIGHTS)
        files = {file: bundle.file_digest(path / file) for file in (bundle.GRAPH, bundle.WEIGHTS)}
        manifest = bundle.Manifest(
            name=name,
            architecture="enet",
            width=1.0,
            head="semantic",
            classes=CLASSES,
            input_size=(160, 120),
            stride=8,
            mean=bundle.MEAN,
            std=bundle.STD,
            files=files,
        )
        bundle.write_manifest(path / bundle.MANIFEST, manifest)
    with (folder / "damaged" / bundle.GRAPH).open("ab") as stream:
        stream.write(b"x")
    return folder
