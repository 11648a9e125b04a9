"""How well items are followed and announced: ``waste-seg track``.

Runs the synthetic line, whose truth is known, through the belt's geometry, the tracker and the
scheduler, without ROS. What is detected is the truth's masks or what a bundle finds. The line is
rendered once; then the same pictures are followed under several conditions: stamps that are
exact or jitter, the speed estimated or told by an encoder that is a little wrong.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from waste_seg_ros.cli import as_size
from waste_seg_ros.data.sample import CLASSES
from waste_seg_ros.data.synthetic import SyntheticLine
from waste_seg_ros.files import write_json
from waste_seg_ros.perception.belt import (
    BeltError,
    Camera,
    default_plane,
    describe_on_belt,
    to_belt,
)
from waste_seg_ros.perception.items import Item, ItemParams, describe_items, extract_items
from waste_seg_ros.perception.picks import Arm, ArmsError, Scheduler, SchedulerParams, read_arms
from waste_seg_ros.perception.scaling import scale_image
from waste_seg_ros.perception.tracking import (
    TOUCHING,
    TRUNCATED,
    UNCERTAIN,
    Detection,
    Tracker,
    TrackerParams,
)

GOALS = {
    "switches_per_200_items": 1.0,
    "position_error_mm": 5.0,
    "pick_time_error_ms": 15.0,
}
"""The figures must be below; of the errors it is the 95th percentile."""

NEAR = 0.03
"""A track further from an item than this is not its track [m]."""

_DISTANCE = 1.0
_PIXEL_SIGMA = 0.5


@dataclass(frozen=True, eq=False)
class Seen:
    """An item of the truth in a picture: centre in the belt frame [m], and how much is seen."""

    position: NDArray[np.float64]
    visible: float
    truncated: bool


@dataclass(frozen=True, eq=False)
class Picture:
    """What a picture taken at ``time_s`` shows."""

    time_s: float
    detections: tuple[Detection, ...]
    truth: dict[int, Seen]


@dataclass(frozen=True, eq=False)
class Recording:
    """Pictures of a belt, and where its items lie.

    Attributes:
        pictures: in the order of time.
        places: (2,) where each item of the truth was at time 0 [m].
        classes: its class index.
        speed: of the belt [m/s].
        view: x_min, x_max, y_min, y_max that the camera sees [m].
        names: of the detections' classes.
    """

    pictures: tuple[Picture, ...]
    places: dict[int, NDArray[np.float64]]
    classes: dict[int, int]
    speed: float
    view: tuple[float, float, float, float]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Condition:
    """Under which pictures are followed.

    Attributes:
        jitter_s: standard deviation of the stamps.
        encoder_error: what an encoder's speed is wrong by, as a share; None without an encoder.
        lost: share of the detections that are lost.
        seed: of chance.
    """

    jitter_s: float = 0.0
    encoder_error: float | None = None
    lost: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        speed = "estimated" if self.encoder_error is None else f"encoder {self.encoder_error:+.1%}"
        lost = f", {self.lost:.0%} lost" if self.lost else ""
        return f"jitter {1e3 * self.jitter_s:.0f} ms, speed {speed}{lost}"


# --- pictures -------------------------------------------------------------------------------------


def to_detection(item: Item, camera: Camera, source: int, pixel_sigma: float) -> Detection:
    """An item in pixels as one in the belt frame of the default plane.

    Raises:
        BeltError: its outline is no area.
    """
    flags = item.touching * TOUCHING | item.truncated * TRUNCATED | item.uncertain * UNCERTAIN
    on_belt = describe_on_belt(
        item.outline, camera, default_plane(_DISTANCE), pixel_sigma=pixel_sigma
    )
    return Detection(
        position=on_belt.position,
        covariance=on_belt.covariance[:2, :2],
        yaw=on_belt.yaw,
        length=on_belt.length,
        width=on_belt.width,
        class_index=item.class_index,
        score=item.score,
        flags=flags,
        source=source,
    )


def record(
    line: SyntheticLine,
    rate: float,
    count: int,
    find: Callable[[NDArray[np.uint8]], tuple[Item, ...]] | None = None,
    names: Sequence[str] = CLASSES,
    *,
    beyond: float = 0.0,
    pixel_sigma: float = _PIXEL_SIGMA,
    progress: bool = False,
) -> Recording:
    """Render a line until so many items have been seen whole and are gone.

    Args:
        line: the belt, of a speed above 0.
        rate: pictures per second.
        count: items.
        find: from an image (H, W, 3) to its items; None takes the truth for what is found.
        names: of the classes of what is found.
        beyond: go on until they are so far behind the view [m].
        pixel_sigma: standard deviation of an outline's place [px].
        progress: show a bar.

    Raises:
        ValueError: the belt does not move forwards.
    """
    if not line.speed > 0:
        raise ValueError(f"the line's speed is {line.speed} m/s; it must be above 0")
    width, height = line.size
    focal = _DISTANCE / line.meters_per_pixel
    matrix = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    camera = Camera(matrix, np.zeros(0), "none", line.size)
    plane = default_plane(_DISTANCE)
    corners = to_belt(camera, plane, np.array([[0, 0], [width - 1, height - 1]], float))
    (x0, y0), (x1, y1) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()

    pictures: list[Picture] = []
    found_at: dict[int, list[NDArray[np.float64]]] = defaultdict(list)
    classes: dict[int, int] = {}
    # An empty belt would be gone on with for ever.
    most = math.ceil(rate * (4.0 * (count + 20) / max(line.density, 0.5) + 3.0) / line.speed)
    done: set[int] = set()
    end = math.inf
    with tqdm(total=count, disable=not progress, unit="item", leave=False) as bar:
        for number in range(most):
            # The name of a frame gives its time to the microsecond.
            at = round(number / rate, 6)
            frame = line.frame(at)
            sample = frame.sample
            items = describe_items(sample.instances, sample.labels, None, line.size)
            numbers = {item.instance: item for item in frame.items}
            truth: dict[int, Seen] = {}
            exact: list[Detection] = []
            for item in items:
                known = numbers[item.id]
                try:
                    detection = to_detection(item, camera, known.id, pixel_sigma)
                except BeltError:  # a line of pixels
                    continue
                exact.append(detection)
                truth[known.id] = Seen(detection.position, known.visible, known.truncated)
                classes[known.id] = known.class_index
                if known.visible > 0.95 and not known.truncated:
                    found_at[known.id].append(detection.position - [line.speed * at, 0.0])
            if find is not None:
                exact = []
                for index, item in enumerate(find(sample.image)):
                    try:
                        exact.append(to_detection(item, camera, index, 2 * pixel_sigma))
                    except BeltError:
                        continue
            pictures.append(Picture(at, tuple(exact), truth))
            gone = {number for number in found_at if number not in truth} - done
            done |= gone
            bar.update(len(gone))
            if len(done) >= count:
                end = min(end, at + beyond / line.speed)
            if at >= end:
                break
    places = {
        number: np.median(np.array(seen), axis=0)
        for number, seen in found_at.items()
        if len(seen) >= 4
    }
    return Recording(tuple(pictures), places, classes, line.speed, (x0, x1, y0, y1), tuple(names))


def bundle_finder(
    name: str, size: tuple[int, int]
) -> tuple[Callable[[NDArray[np.uint8]], tuple[Item, ...]], tuple[str, ...]]:
    """What a bundle finds in images of a size, and the names of its classes.

    Raises:
        BundleError, BackendError: it cannot be opened or run.
    """
    from waste_seg_ros.runtime.backends import as_head, input_size_for, load_backend
    from waste_seg_ros.runtime.bundle import open_bundle

    bundle = open_bundle(name)
    manifest = bundle.manifest
    backend = load_backend(bundle, "auto", input_size_for(size, manifest))
    params = ItemParams(class_agnostic=manifest.head == "binary")

    def find(image: NDArray[np.uint8]) -> tuple[Item, ...]:
        tensor = np.ascontiguousarray(scale_image(image, backend.input_size))
        prediction = as_head(backend.predict(tensor), manifest.head)
        return extract_items(prediction, size, params)[1]

    return find, manifest.classes


# --- figures --------------------------------------------------------------------------------------


def follow(
    recording: Recording,
    condition: Condition,
    arms: Sequence[Arm],
    params: TrackerParams | None = None,
    orders: SchedulerParams | None = None,
) -> dict[str, Any]:
    """Follow a recording and compare with the truth.

    Tracks and items are matched as for CLEAR MOT (Bernardin and Stiefelhagen, 2008): a pair
    stays as long as it is near. Places and times count for items that were seen whole.

    Returns:
        ``items`` that count; ``switches`` of numbers and ``switches_per_200_items``;
        ``position_error_mm`` and ``pick_time_error_ms``, each with ``median``, ``p95``, ``max``;
        ``announced``, ``missed``, ``double`` and ``false`` announcements; ``wrong_class``;
        ``tracks``; ``speed_error`` as a share at the end; ``lead_s`` least time ahead.
    """
    rng = np.random.default_rng([condition.seed, 7])
    tracker = Tracker(params or TrackerParams())
    scheduler = Scheduler(
        arms,
        orders or SchedulerParams(lead_s=0.2, horizon_s=1.0, min_score=0.0),
        recording.names,
    )
    alive = [arm.name for arm in arms]
    places = {arm.name: arm.x_m for arm in arms}
    speed = recording.speed
    encoder = None if condition.encoder_error is None else speed * (1 + condition.encoder_error)
    owner: dict[int, int] = {}  # item -> track that it had last
    votes: dict[int, Counter[int]] = defaultdict(Counter)  # track -> items
    switches = 0
    gaps: list[float] = []
    given: list[tuple[int, str, float, float, int]] = []
    for picture in recording.pictures:
        late = float(rng.normal(0.0, condition.jitter_s)) if condition.jitter_s else 0.0
        stamp = picture.time_s + late
        detections = [
            d for d in picture.detections if not condition.lost or rng.random() >= condition.lost
        ]
        tracks = tracker.update(stamp, detections, encoder, 0.01 * speed, view=recording.view)
        for order in scheduler.update(stamp, tracks, alive):
            given.append(
                (
                    order.track_id,
                    order.arm,
                    order.pick_time_s,
                    order.announced_s,
                    order.track.class_index,
                )
            )
        # Where things were at the moment that the stamp says.
        here = {
            number: recording.places[number] + np.array([speed * stamp, 0.0])
            if number in recording.places
            else seen.position + np.array([speed * late, 0.0])
            for number, seen in picture.truth.items()
            if not seen.truncated
        }
        at = {track.id: track.position for track in tracks if track.source >= 0 and track.whole}
        pairs = {
            number: owner[number]
            for number, place in here.items()
            if owner.get(number) in at and np.hypot(*(at[owner[number]] - place)) < NEAR
        }
        left = [number for number in here if number not in pairs]
        free = [track for track in at if track not in pairs.values()]
        if left and free:
            gap = np.array([[float(np.hypot(*(at[t] - here[n]))) for t in free] for n in left])
            for i, j in zip(*linear_sum_assignment(np.minimum(gap, NEAR)), strict=True):
                if gap[i, j] < NEAR:
                    number, track = left[i], free[j]
                    switches += number in owner and owner[number] != track
                    owner[number] = track
                    pairs[number] = track
        for number, track in pairs.items():
            votes[track][number] += 1
            if picture.truth[number].visible > 0.95:
                gaps.append(1e3 * float(np.hypot(*(at[track] - here[number]))))

    end = recording.pictures[-1].time_s
    first = min(places.values())
    # Those that came to the first arm while pictures were taken, but for the first of all.
    counted = {
        number
        for number, place in recording.places.items()
        if (first - place[0]) / speed <= end and place[0] < sum(recording.view[:2]) / 2
    }
    times: list[float] = []
    leads: list[float] = []
    per_item: Counter[int] = Counter()
    false = wrong = 0
    for track, arm, pick_time, announced, class_index in given:
        if not votes[track]:
            false += 1
            continue
        number = votes[track].most_common(1)[0][0]
        per_item[number] += 1
        if number not in recording.places:  # never seen whole
            continue
        true = (places[arm] - float(recording.places[number][0])) / speed
        times.append(1e3 * abs(pick_time - true))
        leads.append(true - announced)
        wrong += class_index not in (0, recording.classes[number])
    return {
        "condition": str(condition),
        "items": len(counted),
        "tracks": len(votes),
        "switches": switches,
        "switches_per_200_items": 200.0 * switches / max(1, len(recording.classes)),
        "position_error_mm": _spread(gaps),
        "pick_time_error_ms": _spread(times),
        "announced": len(given),
        "missed": len(counted - set(per_item)),
        "double": sum(count > 1 for count in per_item.values()),
        "false": false,
        "wrong_class": wrong,
        "lead_s": min(leads, default=math.nan),
        "speed_error": tracker.belt.speed / speed - 1,
        "stamp_sigma_ms": 1e3 * tracker.belt.stamp_sigma_s,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"median": math.nan, "p95": math.nan, "max": math.nan}
    median, p95 = np.percentile(values, (50, 95)).tolist()
    return {"median": median, "p95": p95, "max": max(values)}


def shortfalls(figures: dict[str, Any]) -> list[str]:
    """Which of ``GOALS`` the figures miss, and whether items were missed or announced twice."""
    short = []
    for name, goal in GOALS.items():
        value = figures[name]["p95"] if isinstance(figures[name], dict) else figures[name]
        if not value < goal:
            short.append(f"{name} {value:.1f}, not below {goal:g}")
    short += [f"{figures[name]} {name}" for name in ("missed", "double") if figures[name]]
    return short


# --- speed ----------------------------------------------------------------------------------------


def dense_belt(count: int, rate: float, seed: int = 0) -> Iterator[tuple[float, list[Detection]]]:
    """Stamps and detections without end of a belt on which ``count`` items are always seen."""
    rng = np.random.default_rng(seed)
    length, speed, sigma = 4.0, 1.0, 0.001
    # A grid with items a little off it, so that none overlap.
    rows = max(1, round(math.sqrt(count / 4)))
    columns = math.ceil(count / rows)
    x, y = np.meshgrid((np.arange(columns) + 0.5) * length / columns, np.arange(rows) / rows)
    place = np.stack([x.ravel(), y.ravel()], axis=1)[:count]
    place += rng.uniform(-0.2, 0.2, place.shape) * [length / columns, 1 / rows]
    size = rng.uniform(0.3, 0.6, (count, 2)) * min(length / columns, 1 / rows)
    size = np.sort(size, axis=1)[:, ::-1]
    yaw = rng.uniform(-1.5, 1.5, count)
    kind = rng.integers(1, 5, count)
    covariance = np.eye(2) * sigma**2
    for number in itertools.count():
        stamp = number / rate
        now = place + np.array([speed * stamp, 0.0])
        now[:, 0] %= length
        seen = now + rng.normal(0.0, sigma, now.shape)
        yield (
            stamp,
            [
                Detection(
                    position=seen[i],
                    covariance=covariance,
                    yaw=float(yaw[i]),
                    length=float(size[i, 0]),
                    width=float(size[i, 1]),
                    class_index=int(kind[i]),
                    score=0.9,
                    source=i,
                )
                for i in range(count)
            ],
        )


def bench(count: int, rate: float, updates: int) -> dict[str, Any]:
    """Milliseconds that an update of tracker and scheduler takes with ``count`` items seen."""
    tracker = Tracker(TrackerParams(forget_x=5.0))
    arms = [Arm("first", 4.5, cycle_s=0.5), Arm("second", 4.8, cycle_s=0.5)]
    scheduler = Scheduler(arms, class_names=CLASSES)
    spent: dict[str, list[float]] = {"tracker": [], "scheduler": []}
    for number, (stamp, detections) in enumerate(dense_belt(count, rate)):
        begin = time.perf_counter()
        tracks = tracker.update(stamp, detections, view=(0.0, 4.0, -0.5, 1.5))
        between = time.perf_counter()
        scheduler.update(stamp, tracks, ("first", "second"))
        after = time.perf_counter()
        if number >= 30:
            spent["tracker"].append(1e3 * (between - begin))
            spent["scheduler"].append(1e3 * (after - between))
        if number >= 30 + updates:
            break
    figures: dict[str, Any] = {"items": count, "tracks": len(tracks)}
    for name, values in spent.items():
        p50, p99 = np.percentile(values, (50, 99)).tolist()
        figures[name] = {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3)}
    return figures


# --- command line ---------------------------------------------------------------------------------


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("must lie in 0..1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``waste-seg track``."""
    parser.add_argument("--model", default="", help="bundle that finds the items; else the truth")
    parser.add_argument("--items", type=int, default=200, help="to follow (default: %(default)s)")
    parser.add_argument("--speed", type=_positive, default=1.0, help="of the belt [m/s]")
    parser.add_argument("--rate", type=_positive, default=30.0, help="pictures per second")
    parser.add_argument("--size", type=as_size, default=(480, 360), help="WIDTHxHEIGHT (480x360)")
    parser.add_argument("--view", type=_positive, default=0.96, help="width of belt seen [m]")
    parser.add_argument("--density", type=_positive, default=9.0, help="items per metre")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic line")
    parser.add_argument("--jitter", type=float, default=10.0, help="of the stamps [ms]")
    parser.add_argument(
        "--encoder-error", type=float, default=0.01, help="share that the encoder is wrong by"
    )
    parser.add_argument("--lost", type=_share, default=0.1, help="share of detections to lose")
    parser.add_argument("--arms", type=Path, help="YAML file; default: one arm that takes all")
    parser.add_argument("--pick-line", type=float, default=0.9, help="x of that arm [m]")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a goal is missed")
    parser.add_argument(
        "--bench", action="store_true", help="measure only how long an update takes"
    )
    parser.add_argument("--updates", type=int, default=300, help="of the measurement")


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg track``; 1 if it cannot run, or a goal is missed and ``--check`` given."""
    if args.items < 1 or args.updates < 1 or args.jitter < 0:
        print("waste-seg track: --items and --updates take at least 1, --jitter 0", file=sys.stderr)
        return 2
    if args.bench:
        figures = bench(args.items, args.rate, args.updates)
        print(f"{args.items} items in view, {figures['tracks']} tracks, milliseconds an update")
        for name in ("tracker", "scheduler"):
            print(
                f"{name:10s} p50 {figures[name]['p50_ms']:.2f}  p99 {figures[name]['p99_ms']:.2f}"
            )
        return _store(args.output, {"bench": figures, **_machine()})
    from waste_seg_ros.runtime.backends import BackendError
    from waste_seg_ros.runtime.bundle import BundleError

    try:
        arms = read_arms(args.arms) if args.arms else (Arm("all", args.pick_line, cycle_s=0.0),)
        if not arms:
            raise ArmsError(f"{args.arms}: has no arms")
        line = SyntheticLine(args.seed, args.size, args.speed, args.view, args.density)
        find, names = bundle_finder(args.model, args.size) if args.model else (None, CLASSES)
    except (ArmsError, BackendError, BundleError, ValueError) as error:
        print(f"waste-seg track: {error}", file=sys.stderr)
        return 1
    beyond = max(0.0, max(arm.x_m for arm in arms) - 0.4 * args.view)
    recording = record(
        line, args.rate, args.items, find, names, beyond=beyond, progress=sys.stderr.isatty()
    )
    print(
        f"{len(recording.pictures)} pictures, {len(recording.places)} items, "
        f"{args.speed:g} m/s, {1e3 * line.meters_per_pixel:.1f} mm/px, "
        f"found by {args.model or 'the truth'}"
    )
    jitter = 1e-3 * args.jitter
    conditions = [
        Condition(),
        Condition(jitter),
        Condition(jitter, args.encoder_error),
        Condition(jitter, None, args.lost),
    ]
    print(
        f"{'':46s}{'switch':>7s}{'position mm':>16s}{'pick time ms':>16s}"
        f"{'missed':>8s}{'double':>8s}{'false':>7s}"
    )
    results = []
    missed_goal = False
    for condition in conditions:
        figures = follow(recording, condition, arms)
        short = shortfalls(figures)
        missed_goal |= bool(short)
        results.append({**figures, "shortfalls": short})
        place, pick = figures["position_error_mm"], figures["pick_time_error_ms"]
        print(
            f"{condition!s:46s}{figures['switches']:7d}"
            f"{place['median']:8.2f}{place['p95']:8.2f}{pick['median']:8.2f}{pick['p95']:8.2f}"
            f"{figures['missed']:8d}{figures['double']:8d}{figures['false']:7d}"
        )
        for text in short:
            print(f"  goal missed: {text}")
    print("(median and 95th percentile of errors; of switches, the number)")
    report = {
        "model": args.model or "truth",
        "seed": args.seed,
        "size": list(args.size),
        "speed": args.speed,
        "rate": args.rate,
        "pictures": len(recording.pictures),
        "conditions": results,
        **_machine(),
    }
    return _store(args.output, report) or int(missed_goal and args.check)


def _machine() -> dict[str, Any]:
    return {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}


def _store(path: Path | None, report: dict[str, Any]) -> int:
    if path is None:
        return 0
    try:
        write_json(path, report)
    except OSError as error:
        print(f"waste-seg track: {path}: {error.strerror}", file=sys.stderr)
        return 1
    return 0
