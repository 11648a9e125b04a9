"""What the dashboard knows of a line, in plain values: no ROS and no web. Any thread may use it."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from waste_seg_ros.perception.draw import class_color

OK, WARN, ERROR = "ok", "warn", "error"
LEVELS = (OK, WARN, ERROR)
SILENT_AFTER = 2.0
"""Seconds without items after which that is said."""
FORGOTTEN_AFTER = 600.0
"""Seconds after which a node that has gone is no more spoken of."""
DEAD_AFTER = 1.0
"""Seconds without a word after which an arm counts as dead; twice a second it is to speak."""
SPAN = 10.0
"""Seconds over which rate and latency are taken."""
HISTORY = 600
"""Points of the plot, one a second."""
ROWS = 60
"""Items in the table."""
LOST = ("dropped", "lost on the way", "unreadable", "missed")
"""Values in diagnostics that count images which gave no items."""


@dataclass(frozen=True)
class Seen:
    """An item, in units that people read.

    Attributes:
        id: within the image, or along the belt where a tracker runs.
        kind: class name.
        place: (x, y) [mm].
        yaw: of the long axis [degrees].
        size: length, width, height [mm]; height 0 where it is not known.
        reason: why no arm should try it; empty where one should.
        flags: of WasteItem.
        outline: [px], x and y in turn.
        grasp: ends of the line along which the jaws close [px], x and y in turn; may be empty.
        box: x, y, width, height [px].
        pick_s: seconds until it is at the pick line, None where that is not known.
    """

    id: int
    kind: str
    score: float
    place: tuple[float, float]
    yaw: float
    size: tuple[float, float, float]
    reason: str = ""
    flags: int = 0
    outline: tuple[float, ...] = ()
    grasp: tuple[float, ...] = ()
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    pick_s: float | None = None

    def row(self) -> dict[str, Any]:
        """For the table."""
        return {
            "id": self.id,
            "kind": self.kind,
            "score": _round(self.score, 2),
            "place": [_round(v) for v in self.place],
            "yaw": _round(self.yaw),
            "size": [_round(v) for v in self.size],
            "reason": self.reason,
            "flags": self.flags,
            "pick": _round(self.pick_s, 1),
        }

    def drawing(self) -> dict[str, Any]:
        """For the picture."""
        return {
            "id": self.id,
            "kind": self.kind,
            "score": _round(self.score, 2),
            "outline": [_round(v, 1) or 0 for v in self.outline],
            "grasp": [_round(v, 1) or 0 for v in self.grasp],
            "pick": not self.reason,
        }


@dataclass
class Health:
    """The newest diagnostic of one name, and when it came."""

    level: str
    message: str
    values: dict[str, str]
    heard: float


@dataclass
class ArmRecord:
    """What is known of an arm.

    Attributes:
        heard: when it last spoke of itself; None while it has not.
        picked, missed: as it says.
        ordered: orders by class.
        scores: sum of the scores of what was ordered.
    """

    heard: float | None = None
    ready: bool = False
    picked: int = 0
    missed: int = 0
    ordered: Counter[str] = field(default_factory=Counter)
    scores: float = 0.0


class LineState:
    """All that is shown but the picture."""

    def __init__(self, domain: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._domain = domain
        self._started = clock()
        self._items: Sequence[Seen] = ()
        self._items_at: float | None = None
        self._tracks: Sequence[Seen] = ()
        self._tracks_at: float | None = None
        self._latencies: deque[tuple[float, float]] = deque(maxlen=4096)  # when, s
        self._arrivals: deque[float] = deque(maxlen=4096)
        self._stages: dict[str, float] = {}
        self._counts: deque[tuple[float, Counter[str]]] = deque()  # of the last minute
        self._minute: Counter[str] = Counter()  # their sum
        self._totals: dict[str, int] = {}
        self._told: deque[int] = deque(maxlen=4096)  # tracks that are in the totals
        self._told_set: set[int] = set()
        self._health: dict[str, Health] = {}
        self._losses: deque[tuple[float, int]] = deque(maxlen=HISTORY)
        self._arms: dict[str, ArmRecord] = {}
        self._orders: deque[tuple[str, int, float]] = deque(maxlen=512)
        self._model = ""
        self._previous: list[str] = []
        self._history: deque[list[float | None]] = deque(maxlen=HISTORY)
        self._points = 0
        self.images = 0
        """Images of which items came."""
        self.keeps_models = False
        """Whether a node keeps models to go back to; otherwise only ours are remembered."""

    # --- from the line ------------------------------------------------------------------------

    def add_items(
        self,
        items: Sequence[Seen],
        latency: float,
        model: str = "",
        stages: Mapping[str, float] | None = None,
    ) -> None:
        """Take an image's items; latency [s] is from its stamp until now, NaN if not known."""
        now = self._clock()
        with self._lock:
            self.images += 1
            self._items, self._items_at = items, now
            self._arrivals.append(now)
            if math.isfinite(latency):
                self._latencies.append((now, latency))
            # A mean that forgets: steady to read, and nothing to keep.
            for name, value in (stages or {}).items():
                if math.isfinite(value):
                    old = self._stages.get(name, value)
                    self._stages[name] = old + 0.05 * (value - old)
            self._counts.append((now, Counter(item.kind for item in items)))
            self._minute.update(self._counts[-1][1])
            self._forget_counts(now)
            if model and model != self._model:
                self._model = model

    def add_tracks(self, tracks: Sequence[Seen]) -> None:
        """Take the items as they are followed along the belt."""
        with self._lock:
            self._tracks, self._tracks_at = tracks, self._clock()
            for track in tracks:
                if track.id in self._told_set:
                    continue
                if len(self._told) == self._told.maxlen:
                    self._told_set.discard(self._told[0])
                self._told.append(track.id)
                self._told_set.add(track.id)
                self._totals[track.kind] = self._totals.get(track.kind, 0) + 1

    def add_order(self, arm: str, track: int, kind: str, score: float, pick_time: float) -> None:
        """Take an order for an arm; one that was taken before (late joiners) counts once."""
        with self._lock:
            if (arm, track, pick_time) in self._orders:
                return
            self._orders.append((arm, track, pick_time))
            record = self._arms.setdefault(arm, ArmRecord())
            record.ordered[kind] += 1
            record.scores += score

    def add_arm(self, arm: str, ready: bool, picked: int, missed: int) -> None:
        """Take what an arm says of itself."""
        with self._lock:
            record = self._arms.setdefault(arm, ArmRecord())
            record.heard = self._clock()
            record.ready, record.picked, record.missed = ready, picked, missed

    def add_health(self, name: str, level: str, message: str, values: Mapping[str, str]) -> None:
        """Take a diagnostic; its level is one of `LEVELS`."""
        with self._lock:
            self._health[name] = Health(level, message, dict(values), self._clock())

    def remember_model(self, before: str, after: str) -> None:
        """Note that a model took another's place by our doing, so that there is a way back."""
        with self._lock:
            if before and before != after:
                self._previous = [*self._previous[-15:], before]

    def forget_previous(self) -> None:
        """Note that the way back was gone once."""
        with self._lock:
            self._previous = self._previous[:-1]

    # --- for the screens ----------------------------------------------------------------------

    @property
    def model(self) -> str:
        """Name of the model that found the newest items, or that the segmenter speaks of."""
        with self._lock:
            return self._model or self._model_values().get("bundle", "").rpartition("/")[2]

    @property
    def bundle(self) -> str:
        """Folder of the model at work as the segmenter says; empty where it says nothing."""
        with self._lock:
            return self._model_values().get("bundle", "")

    @property
    def previous(self) -> str:
        """The model before the last switch that was made here; empty where there was none."""
        with self._lock:
            return self._previous[-1] if self._previous else ""

    def tick(self) -> None:
        """Add a point to the plot; to be called once a second."""
        now = self._clock()
        with self._lock:
            losses = self._lost()
            self._losses.append((now, sum(losses.values())))
            rate, p50, p99 = self._speed(now)
            items = len(self._items) if self._age(self._items_at, now, math.inf) < SPAN else None
            self._points += 1
            self._history.append([self._points, _round(rate, 1), p50, p99, items])

    def history(self, after: int = 0) -> list[list[float | None]]:
        """Points later than that number: number, images/s, latency p50 and p99 [ms], items."""
        with self._lock:
            missing = self._points - after
            return list(self._history)[-missing:] if missing > 0 else []

    def snapshot(self) -> dict[str, Any]:
        """All there is to show now; plain values, for JSON."""
        now = self._clock()
        with self._lock:
            rate, p50, p99 = self._speed(now)
            tracked = self._age(self._tracks_at, now, math.inf) < SILENT_AFTER
            fresh = self._age(self._items_at, now, math.inf) < SILENT_AFTER
            items = self._items if fresh else ()
            # Those that come next first; those that nobody waits for by their scores.
            rows = sorted(self._tracks if tracked else items, key=_urgency)[:ROWS]
            losses = self._lost()
            return {
                "summary": self._summary(now),
                "rate": _round(rate, 1),
                "p50": p50,
                "p99": p99,
                "images": self.images,
                "inView": len(items) if fresh else None,
                "tracked": len(self._tracks) if tracked else None,
                "itemsAge": _round(self._age(self._items_at, now), 1),
                "dropped": {
                    "total": sum(losses.values()),
                    "minute": self._lost_in_minute(now),
                    "parts": losses,
                },
                "stages": {name: _round(1e3 * value, 1) for name, value in self._stages.items()},
                "classes": self._classes(now, items),
                "items": [item.row() for item in rows],
                "diagnostics": self._diagnostics(now),
                "model": self._model_view(),
                "arms": [self._arm(name, now) for name in sorted(self._arms)],
            }

    def colors(self) -> dict[str, str]:
        """Colour of each class as in the overlay, #rrggbb."""
        with self._lock:
            return {name: self._color(name) for name in self._kinds()}

    def _age(self, at: float | None, now: float, never: Any = None) -> Any:
        return never if at is None else now - at

    def _speed(self, now: float) -> tuple[float, float | None, float | None]:
        """Images/s, and median and 99th percentile of the latency [ms], of the last seconds."""
        recent = [at for at in self._arrivals if now - at <= SPAN]
        # Over the time that was: the rate of a camera that stopped goes down at once.
        span = min(SPAN, max(now - self._started, 1e-3))
        if len(self._arrivals) == len(recent) and recent:
            span = min(span, max(now - recent[0], 1e-3))
        rate = (len(recent) - 1) / span if len(recent) > 1 else 0.0
        latencies = [value for at, value in self._latencies if now - at <= SPAN]
        if not latencies:
            return rate, None, None
        p50, p99 = np.percentile(latencies, (50, 99)).tolist()
        return rate, _round(1e3 * p50), _round(1e3 * p99)

    def _lost(self) -> dict[str, int]:
        losses = dict.fromkeys(LOST, 0)
        for health in self._health.values():
            for name in LOST:
                text = health.values.get(name, "")
                losses[name] += int(text) if text.isdecimal() else 0
        return losses

    def _lost_in_minute(self, now: float) -> int:
        total = sum(self._lost().values())
        recent = [count for at, count in self._losses if now - at <= 60.0]
        # A segmenter that was started anew counts from 0.
        return max(0, total - recent[0]) if recent else 0

    def _kinds(self) -> list[str]:
        """The model's classes in its order, then others that were seen."""
        named = self._model_values().get("classes", "")
        kinds = [name for name in named.split(", ") if name]
        seen = {item.kind for item in self._items} | set(self._totals)
        seen |= self._minute.keys()
        return kinds + sorted(seen - set(kinds))

    def _color(self, kind: str) -> str:
        named = self._model_values().get("classes", "").split(", ")
        index = named.index(kind) + 1 if kind and kind in named else 0
        return "#{:02x}{:02x}{:02x}".format(*class_color(index))

    def _classes(self, now: float, shown: Sequence[Seen]) -> list[dict[str, Any]]:
        self._forget_counts(now)
        all_of_them = self._minute.total()
        here = Counter(item.kind for item in shown)
        return [
            {
                "name": kind,
                "color": self._color(kind),
                "now": here[kind],
                "share": _round(self._minute[kind] / all_of_them, 3) if all_of_them else 0,
                "total": self._totals.get(kind),
            }
            for kind in self._kinds()
        ]

    def _forget_counts(self, now: float) -> None:
        while self._counts and now - self._counts[0][0] > 60.0:
            self._minute.subtract(self._counts.popleft()[1])

    def _model_values(self) -> dict[str, str]:
        for name, health in self._health.items():
            if name.endswith(": model") and "bundle" in health.values:
                return health.values
        return {}

    def _model_view(self) -> dict[str, Any]:
        values = self._model_values()
        name = self._model or values.get("bundle", "").rpartition("/")[2]
        return {
            "name": name,
            "previous": self._previous[-1].rpartition("/")[2] if self._previous else "",
            "kept": self.keeps_models,
            **{key: values.get(key, "") for key in ("head", "backend", "input", "state")},
        }

    def _diagnostics(self, now: float) -> list[dict[str, Any]]:
        for name in [n for n, h in self._health.items() if now - h.heard > FORGOTTEN_AFTER]:
            del self._health[name]
        shown = []
        for name, health in self._health.items():
            age = now - health.heard
            level, message = health.level, health.message
            if age > 5.0:  # the nodes speak once a second
                level = ERROR
                message = (
                    f"has said nothing for {age:.0f} s: its node has ended or hangs; look at what "
                    f"it printed and start it anew (before: {message})"
                )
            shown.append(
                {"name": name, "level": level, "message": message, "values": health.values}
            )
        return sorted(shown, key=lambda d: (-LEVELS.index(d["level"]), d["name"]))

    def _arm(self, name: str, now: float) -> dict[str, Any]:
        record = self._arms[name]
        ordered = sum(record.ordered.values())
        view: dict[str, Any] = {
            "name": name,
            "state": "unknown"
            if record.heard is None
            else "dead"
            if now - record.heard > DEAD_AFTER
            else "ready"
            if record.ready
            else "not ready",
            "picked": record.picked,
            "missed": record.missed,
            "ordered": ordered,
            "kinds": dict(record.ordered),
            "expected": _round(record.scores / ordered, 3) if ordered else None,
            "right": None,
            "wrong": None,
            "purity": None,
        }
        # A simulated arm knows the truth and says in its diagnostics "right paper: 3" and so on.
        for health in self._health.values():
            if health.values.get("arm") != name:
                continue
            for key in ("right", "wrong"):
                counts = [v for k, v in health.values.items() if k.partition(" ")[0] == key]
                view[key] = sum(int(count) for count in counts if count.isdecimal())
            held = view["right"] + view["wrong"]
            view["purity"] = _round(view["right"] / held, 3) if held else None
        return view

    def _summary(self, now: float) -> dict[str, str]:
        """The state of the line in one sentence, and how to mend it."""
        heard = [h.heard for h in self._health.values()]
        heard += [at for at in (self._items_at, self._tracks_at) if at is not None]
        if not heard or now - max(heard) > 5.0:
            waited = now - (max(heard) if heard else self._started)
            if waited < 3.0:
                return {"level": "silent", "text": "Listening", "mend": ""}
            where = f" on ROS domain {self._domain}" if self._domain else ""
            return {
                "level": "silent",
                "text": f"The graph is silent: no node heard for {_duration(waited)}",
                "mend": f"Start it{where}: waste-seg up. If it runs, compare ROS_DOMAIN_ID and "
                "ROS_AUTOMATIC_DISCOVERY_RANGE of both, and the namespace.",
            }
        found = self._diagnostics(now)
        worst = found[0] if found else None
        if worst and worst["level"] == ERROR:
            return {"level": ERROR, "text": worst["name"], "mend": worst["message"]}
        age = self._age(self._items_at, now, now - self._started)
        if age > SILENT_AFTER:
            return {
                "level": ERROR,
                "text": f"No items for {_duration(age)}",
                "mend": "Is the segmenter active, and is the namespace the same?",
            }
        if worst and worst["level"] == WARN:
            return {"level": WARN, "text": worst["name"], "mend": worst["message"]}
        return {"level": OK, "text": "Running", "mend": ""}


def _urgency(item: Seen) -> tuple[bool, float, float]:
    late = item.pick_s is not None and item.pick_s < 0
    return late, abs(item.pick_s or 0.0), -item.score


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _round(value: float | None, digits: int = 0) -> float | None:
    """Short in JSON, which has no NaN; whole numbers are written as such."""
    if value is None or not math.isfinite(value):
        return None
    rounded = round(value, digits)
    return int(rounded) if digits == 0 else rounded
