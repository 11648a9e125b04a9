"""``waste-seg bench graph``: camera and segmenter as processes of their own that talk over DDS.

The camera hands out pictures that lie ready in memory, so that it takes little of the cores that
the segmenter works on; it is the package's own node all the same. Each case starts both anew, warms
them up, and then counts over a window: the camera's pictures and the segmenter's images by their
own counters, read while the belt stands still; latency where items arrive, in this process, from
the stamp of the picture; processor time and memory from the kernel (Linux only).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from waste_seg_ros.bench.figures import BenchError, standard_error, thinned
from waste_seg_ros.bench.node import crowd_pictures

if TYPE_CHECKING:
    from waste_seg_ros.graph import NodeSpec
    from waste_seg_ros.launcher import Supervisor

PATIENCE = 60.0
"""Seconds within which the nodes must be ready."""
SETTLE = 8.0
"""Seconds within which the counters must stand still after the belt has stopped."""
SLICES = 8
"""Parts of a window; how much they differ tells the noise of its figures."""
PICTURES = 4


@dataclass(frozen=True)
class Case:
    """One run of the graph.

    Attributes:
        image: (width, height) of the camera's pictures.
        rate: that it is asked for [Hz].
        items: in each picture.
        input_size: (width, height) of the network's input, None for what the node takes.
        seconds: of the window.
        peer: ONNX file of the peer that runs in the segmenter's place, or None.
        overload: the rate is meant to be far beyond what can be served.
    """

    image: tuple[int, int]
    rate: float
    items: int
    input_size: tuple[int, int] | None = None
    seconds: float = 8.0
    peer: Path | None = None
    overload: bool = False


@dataclass(frozen=True)
class Usage:
    """What a process has used.

    Attributes:
        seconds: of processor time.
        resident: memory in RAM [MB].
        peak: the most that it was [MB].
    """

    seconds: float
    resident: float
    peak: float


def usage(pid: int) -> Usage:
    """Read it from /proc. Raises OSError if the process has gone."""
    folder = Path(f"/proc/{pid}")
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    memory = {}
    for line in (folder / "status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "VmHWM"):
            memory[key] = int(value.split()[0]) * 1024 / 1e6
    return Usage(seconds, memory.get("VmRSS", 0.0), memory.get("VmHWM", 0.0))


@dataclass
class Heard:
    """What came in a window.

    Attributes:
        arrivals: when items were here, on the monotonic clock [s].
        latencies: from their image's stamp until then [s].
        published: from the stamp until the segmenter had them ready [s].
        inference: time of the network [s].
        items: number of them.
    """

    arrivals: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    published: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    items: list[int] = field(default_factory=list)


class Listener:
    """The node that hears items and diagnostics and holds or lets go the belt."""

    def __init__(self) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from rcl_interfaces.srv import SetParameters
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import QoSProfile

        from waste_seg_ros.msg import WasteItemArray

        self.node = rclpy.create_node("bench")
        self.heard = Heard()
        self.health: dict[str, tuple[float, bytes, str, dict[str, str]]] = {}
        self._client = self.node.create_client(SetParameters, "camera/set_parameters")
        self.node.create_subscription(WasteItemArray, "items", self._on_items, QoSProfile(depth=50))
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 50)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, name="executor")
        self._thread.start()

    def _spin(self) -> None:
        from rclpy.executors import ExternalShutdownException

        with contextlib.suppress(ExternalShutdownException):
            self._executor.spin()

    def close(self) -> None:
        """Stop to listen."""
        self._executor.shutdown()
        self._thread.join()
        self.node.destroy_node()

    def _on_items(self, array: Any) -> None:
        now, clock = self.node.get_clock().now().nanoseconds, time.monotonic()
        stamp = array.header.stamp
        heard = self.heard
        heard.arrivals.append(clock)
        heard.latencies.append((now - stamp.sec * 1_000_000_000 - stamp.nanosec) * 1e-9)
        heard.published.append(array.latency.total)
        heard.inference.append(array.latency.inference)
        heard.items.append(len(array.items))

    def _on_diagnostics(self, array: Any) -> None:
        stamp = array.header.stamp
        taken = stamp.sec + 1e-9 * stamp.nanosec
        for status in array.status:
            values = {entry.key: entry.value for entry in status.values}
            self.health[status.name] = (taken, status.level, status.message, values)

    def values(self, name: str) -> dict[str, str]:
        """The newest values of a diagnostic; none if there was none."""
        return self.health[name][3] if name in self.health else {}

    def ready(self) -> bool:
        """Whether all know each other, so that nothing is lost for that."""
        camera, output = self.values("camera: source"), self.values("segmenter: output")
        return (
            int(camera.get("subscribers of image_raw", 0)) >= 1
            and int(camera.get("subscribers of camera_info", 0)) >= 1
            and int(output.get("subscribers of items", 0)) >= 1
            and self.node.count_publishers("items") >= 1
            and self._client.service_is_ready()
        )

    def refused(self) -> str:
        """Why the model cannot be loaded, or ""."""
        from diagnostic_msgs.msg import DiagnosticStatus

        _, level, message, _ = self.health.get("segmenter: model", (0.0, b"", "", {}))
        return message if level == DiagnosticStatus.ERROR else ""

    def hold(self, paused: bool) -> None:
        """Hold the belt, or let it go.

        Raises:
            BenchError: the camera does not answer.
        """
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        value = Parameter("paused", value=paused).to_parameter_msg()
        future = self._client.call_async(SetParameters.Request(parameters=[value]))
        end = time.monotonic() + 10.0
        while not future.done():
            if time.monotonic() > end:
                raise BenchError("the camera does not answer")
            time.sleep(0.005)

    def counters(self, since: float) -> dict[str, int] | None:
        """Pictures published, and what became of them; None until told after ``since`` (Unix s)."""
        names = ("camera: source", "segmenter: camera")
        if any(name not in self.health or self.health[name][0] <= since for name in names):
            return None
        camera, segmenter = (self.values(name) for name in names)
        return {
            "published": int(camera["published"]),
            "received": int(segmenter["received"]),
            "served": int(segmenter["processed"]),
            "dropped": int(segmenter["dropped"]),
        }


@contextlib.contextmanager
def session() -> Iterator[Listener]:
    """DDS on this machine alone, in a domain of our own, and a listener on it.

    Raises:
        BenchError: there is no free domain.
    """
    from waste_seg_ros.demo import DemoError, isolate

    try:
        isolate()
    except DemoError as error:
        raise BenchError(str(error)) from error
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    from waste_seg_ros.nodes import use_image_profile

    use_image_profile()
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        listener = Listener()
        try:
            yield listener
        finally:
            listener.close()
    finally:
        rclpy.try_shutdown()


def specs_for(case: Case, frames: Path, model: str, backend: str, threads: int) -> list[NodeSpec]:
    """The graph of a case."""
    from waste_seg_ros.graph import sorter_graph

    width, height = case.input_size or (0, 0)
    camera, segmenter = sorter_graph(
        source=str(frames),
        rate=case.rate,
        model=model,
        backend=backend,
        camera_parameters={"paused": True, "wait_for_subscriber": True},
        segmenter_parameters={"threads": threads, "input_width": width, "input_height": height},
    )
    if case.peer is not None:
        parameters = {**segmenter.parameters, "peer": str(case.peer), "peer_items": case.items}
        segmenter = dataclasses.replace(segmenter, executable="peer", parameters=parameters)
    return [camera, segmenter]


def measure(
    listener: Listener,
    case: Case,
    *,
    model: str,
    backend: str = "auto",
    threads: int = 0,
    warm_up: float = 2.0,
) -> dict[str, Any]:
    """Run one case; returns an entry of the report.

    Raises:
        BenchError: the nodes do not start or serve nothing; with what they printed last.
    """
    from waste_seg_ros.launcher import LaunchError, start

    with tempfile.TemporaryDirectory(prefix="waste-seg-bench-") as folder:
        frames, log = Path(folder) / "frames.npy", Path(folder) / "nodes.log"
        np.save(frames, np.stack(crowd_pictures(case.image, case.items, PICTURES)))
        specs = specs_for(case, frames, model, backend, threads)
        listener.health.clear()
        try:
            with log.open("w") as output, start(specs, output=output) as nodes:
                _until(listener.ready, PATIENCE, nodes, listener)
                return _measure(listener, nodes, case, warm_up)
        except LaunchError as error:
            raise BenchError(str(error)) from error
        except BenchError as error:
            lines = log.read_text(errors="replace").splitlines()[-12:]
            raise BenchError("\n".join((f"{_title(case)}: {error}", *lines))) from error


def _title(case: Case) -> str:
    return f"{case.image[0]}x{case.image[1]} at {case.rate:g} Hz, {case.items} items"


def _until(
    condition: Callable[[], Any], patience: float, nodes: Supervisor, listener: Listener
) -> None:
    end = time.monotonic() + patience
    while not condition():
        if failed := nodes.failed():
            raise BenchError(failed)
        if refused := listener.refused():
            raise BenchError(refused)
        if time.monotonic() > end:
            states = "; ".join(f"{k}: {v[2]}" for k, v in sorted(listener.health.items()))
            raise BenchError(f"not ready within {patience:.0f} s ({states or 'nothing was heard'})")
        time.sleep(0.02)


def _settled(listener: Listener, nodes: Supervisor) -> dict[str, int]:
    """The counters, once the belt stands still and all that is on its way has been served."""
    since = time.time() + 0.3
    found: dict[str, int] | None = None

    def still() -> bool:
        nonlocal found
        found = listener.counters(since)
        return found is not None and found["received"] <= found["served"] + found["dropped"]

    # An image that cannot be read is neither served nor dropped: then patience ends.
    with contextlib.suppress(BenchError):
        _until(still, SETTLE, nodes, listener)
    if failed := nodes.failed():
        raise BenchError(failed)
    if found is None:
        raise BenchError("the nodes tell no counters")
    return found


def _measure(listener: Listener, nodes: Supervisor, case: Case, warm_up: float) -> dict[str, Any]:
    listener.hold(False)
    time.sleep(warm_up)
    listener.hold(True)
    before = _settled(listener, nodes)
    if not before["served"]:
        raise BenchError("no image was served while warming up")
    pids = {**nodes.pids, "bench": os.getpid()}
    heard = listener.heard = Heard()
    used = {name: usage(pid) for name, pid in pids.items()}
    listener.hold(False)
    began = time.monotonic()
    resident = []
    while (left := began + case.seconds - time.monotonic()) > 0:
        time.sleep(min(0.1, left))
        if failed := nodes.failed():
            raise BenchError(failed)
        resident.append(usage(pids["segmenter"]).resident)
    listener.hold(True)
    lasted = time.monotonic() - began
    load = {
        name: 100 * (usage(pid).seconds - used[name].seconds) / lasted for name, pid in pids.items()
    }
    after = _settled(listener, nodes)
    peak = usage(pids["segmenter"]).peak
    counts = {name: after[name] - before[name] for name in after}
    model = listener.values("segmenter: model")
    return {
        "node": "segmenter" if case.peer is None else case.peer.stem,
        "backend": model.get("backend", ""),
        "input": [int(side) for side in model["input"].split("x")] if "input" in model else None,
        "image": list(case.image),
        "rate": case.rate,
        "items": case.items,
        "overload": case.overload,
        **sum_up(heard, counts, lasted),
        "cpu_percent": {name: round(value, 1) for name, value in load.items()},
        "memory_mb": {"peak": round(peak, 1), "growth": round(growth(resident), 2)},
    }


def growth(resident: Sequence[float]) -> float:
    """By how much memory [MB] grew from the second fifth of a window to the last."""
    if len(resident) < 5:
        return 0.0
    parts = thinned(resident, 5)
    return float(np.median(parts[-1]) - np.median(parts[1]))


def sum_up(heard: Heard, counts: dict[str, int], lasted: float) -> dict[str, Any]:
    """Figures of a window.

    Args:
        heard: what came in it.
        counts: by how much the counters grew; "published", "received", "served", "dropped".
        lasted: the window [s].

    Raises:
        BenchError: nothing came.
    """
    if len(heard.arrivals) < 2:
        raise BenchError("no items came in the window")
    latencies = 1e3 * np.asarray(heard.latencies)
    parts = thinned(latencies.tolist(), SLICES)
    spent = heard.arrivals[-1] - heard.arrivals[0]
    speeds = [
        (len(part) - 1) / (part[-1] - part[0])
        for part in thinned(heard.arrivals, SLICES)
        if len(part) > 1 and part[-1] > part[0]
    ]
    published = max(counts["published"], 1)
    p50, p90, p99 = (float(value) for value in np.percentile(latencies, (50, 90, 99)))
    # The oldest that an item was when the segmenter let it go, in times of the network.
    inference = float(np.median(heard.inference))
    age = float(np.percentile(heard.published, 99))
    return {
        "found": round(float(np.mean(heard.items)), 1),
        "frames_per_second": {
            "value": round((len(heard.arrivals) - 1) / spent, 3) if spent > 0 else 0.0,
            "error": round(standard_error(speeds), 4),
        },
        "camera_per_second": round(counts["published"] / lasted, 2),
        "latency_ms": {
            "p50": round(p50, 3),
            "p90": round(p90, 3),
            "p99": round(p99, 3),
            "error": round(standard_error([float(np.median(part)) for part in parts]), 4),
            "error_p99": round(
                standard_error([float(np.percentile(part, 99)) for part in parts]), 4
            ),
            "count": len(latencies),
        },
        "inference_ms": round(1e3 * inference, 3),
        "age_p99_in_inferences": round(age / inference, 2) if inference > 0 else None,
        "published": counts["published"],
        "served": counts["served"],
        "dropped": counts["dropped"],
        "lost": max(0, counts["published"] - counts["received"]),
        "not_served_share": round(max(0.0, 1 - counts["served"] / published), 4),
    }
