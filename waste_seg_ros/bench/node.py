"""``waste-seg bench node``: the segmenter's work on one image without DDS, stage by stage.

It is the very function that the node runs (`nodes.segmenter.segment`) on a message as it would
arrive, and then the answer turned to bytes as DDS gets it. The raw runtime on the same graph takes
turns with it; what the node takes beyond is its overhead.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from waste_seg_ros.bench.figures import Seconds, as_json, overhead, timing
from waste_seg_ros.bench.model import RAW, Runner, raw_runner, take_turns
from waste_seg_ros.bench.peer import PeerNetwork, peer_items
from waste_seg_ros.data.synthetic import synthetic_crowd
from waste_seg_ros.graph import share_folder
from waste_seg_ros.perception.items import extract_items
from waste_seg_ros.perception.scaling import scale_image
from waste_seg_ros.runtime.bundle import GRAPH, Bundle

STAGES = ("conversion", "inference", "extraction", "filling", "serialisation")
"""Message to the network's input; the network; its output to items; items to messages; to bytes.
"""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        image: (width, height) of the camera's pictures.
        items: in each of them.
        input_size: (width, height) of the network's input, None for what the node would take.
    """

    image: tuple[int, int]
    items: int
    input_size: tuple[int, int] | None = None


def crowd_pictures(image: tuple[int, int], items: int, count: int) -> list[np.ndarray]:
    """So many pictures of so many items each."""
    return [np.ascontiguousarray(synthetic_crowd(k, items, image).image) for k in range(count)]


def shipped_settings() -> Any:
    """The segmenter's parameters (`nodes.loading.Settings`) as ``config/segmenter.yaml`` says."""
    from waste_seg_ros.nodes.loading import Settings

    text = (share_folder() / "config" / "segmenter.yaml").read_text()
    values = yaml.safe_load(text)["/**/segmenter"]["ros__parameters"]
    names = [entry.name for entry in fields(Settings)]
    return Settings(**{**{name: values[name] for name in names}, "classes": ()})


class Worker:
    """Does the segmenter's work on messages and keeps the time of each stage."""

    def __init__(
        self,
        work: Any,
        camera_info: Any,
        extract: Callable[..., Any],
        clock: Callable[[], float],
    ) -> None:
        self._work, self._info, self._extract, self._clock = work, camera_info, extract, clock
        self.stages: dict[str, list[float]] = {name: [] for name in STAGES}
        self.found: list[int] = []

    def run(self, message: Any) -> bytes:
        """Work on a sensor_msgs/Image; returns what goes to DDS."""
        from rclpy.serialization import serialize_message

        from waste_seg_ros.msg import StageLatency, WasteItemArray
        from waste_seg_ros.nodes.images import to_rgb
        from waste_seg_ros.nodes.segmenter import segment

        clock = self._clock
        start = clock()
        rgb = to_rgb(message)
        done = segment(rgb, message.header, self._work, self._info, self._extract, clock)
        array = WasteItemArray(
            header=message.header,
            model=self._work.model.name,
            items=done.entries,
            latency=StageLatency(),
        )
        filled = clock()
        content: bytes = serialize_message(array)
        ends = (done.converted, done.inferred, done.extracted, filled, clock())
        for name, begin, end in zip(STAGES, (start, *ends), ends, strict=False):
            self.stages[name].append(end - begin)
        self.found.append(len(done.items))
        return content


def measure(
    bundle: Bundle,
    backend: str,
    case: Case,
    *,
    threads: int,
    rounds: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    peer: Path | None = None,
) -> dict[str, Any]:
    """Measure one case; returns an entry of the report.

    Args:
        bundle: the model.
        backend: one of `runtime.KINDS`.
        case: the pictures.
        threads: of the network, 0 for the runtime's choice.
        rounds: see `model.take_turns`.
        repeats: likewise.
        clock: [s].
        peer: measure the graph in this file in the bundle's place.

    Raises:
        ModelError: the model cannot be loaded so.
    """
    import cv2
    from sensor_msgs.msg import CameraInfo
    from std_msgs.msg import Header

    from waste_seg_ros.nodes.images import to_image
    from waste_seg_ros.nodes.loading import Model, Request, load
    from waste_seg_ros.nodes.segmenter import Work

    cv2.setNumThreads(1)  # as the node does
    width, height = case.input_size or (0, 0)
    request = Request(str(bundle.path), "", backend, threads, width, height, "")
    extract: Callable[..., Any] = extract_items
    if peer is None:
        model = load(request, case.image)
        name = "segmenter"
    else:
        network = PeerNetwork(peer, backend if backend in RAW else RAW[0], threads)
        # It stands where a backend does; what is told of the bundle is not looked at.
        model = Model(request, bundle, network, "instance")  # type: ignore[arg-type]
        extract = functools.partial(peer_items, size=network.input_size, best=case.items)
        name = peer.stem
    settings = shipped_settings()
    work = Work(model, settings, settings.item_params(model))
    pictures = crowd_pictures(case.image, case.items, 4)
    messages = [to_image(picture, "rgb8", Header(frame_id="camera")) for picture in pictures]
    worker = Worker(work, CameraInfo(), extract, clock)
    runners: list[tuple[Runner, Sequence[Any]]] = [(worker.run, messages)]
    size = model.backend.input_size
    if peer is not None:
        limit: Runner | None = network.run
    elif model.backend.name in RAW:
        limit = raw_runner(bundle.path / GRAPH, model.backend.name, size, threads)
    else:
        limit = None
    if limit is not None:
        inputs = [np.ascontiguousarray(scale_image(picture, size)) for picture in pictures]
        runners.append((limit, inputs))
    warm_up = 3
    times = take_turns(runners, rounds, repeats, clock, warm_up)
    kept = {stage: _timed(values, warm_up, repeats) for stage, values in worker.stages.items()}
    entry: dict[str, Any] = {
        "node": name,
        "backend": model.backend.name,
        "image": list(case.image),
        "items": case.items,
        "found": round(float(np.mean(worker.found)), 1),
        "input": list(size),
        "total_ms": as_json(timing(times[0])),
        "stages_ms": {stage: as_json(timing(parts)) for stage, parts in kept.items()},
    }
    if limit is not None:
        share, error = overhead(times[0], times[1])
        entry["raw_ms"] = as_json(timing(times[1]))
        entry["overhead_percent"] = {"value": round(share, 2), "error": round(error, 2)}
    return entry


def _timed(values: Sequence[float], warm_up: int, repeats: int) -> list[Seconds]:
    """Of all a worker's runs those that `take_turns` timed, by rounds."""
    rounds = np.asarray(values[warm_up:]).reshape(-1, repeats + 1)
    return list(rounds[:, 1:])
