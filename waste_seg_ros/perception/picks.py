"""Picks: which arm takes which item, and when.

An item is announced once, early enough, to one arm. Two things can undo an announcement, and both
only after it has expired, so that no two arms ever hold a valid order for one item:

* the arm died (its silence is noticed only after ``silence_s``): an arm further downstream may
  get the item;
* the belt stood still or was slow, and at the expiry the item has not come to the arm yet: it may
  be announced again.

An arm that lives and whose order came due has had its chance: the item is not announced again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from waste_seg_ros.perception.tracking import Track, crossing

GRIPPERS = ("jaws", "suction")

_FORGET_S = 60.0
"""An item that has not been among the tracks for so long is forgotten."""


class ArmsError(ValueError):
    """The file of arms cannot be used; the text names file and key, and the mend."""


@dataclass(frozen=True)
class Arm:
    """An arm along the belt; metres, seconds, belt frame.

    Attributes:
        name: unique.
        x_m: where it picks.
        lane: (y_min, y_max) that it reaches.
        classes: names of the classes that it takes; empty for all.
        cycle_s: least time from one pick to the next.
        gripper: one of ``GRIPPERS``.
        opening: narrowest and widest item that it holds [m].
    """

    name: str
    x_m: float
    lane: tuple[float, float] = (-math.inf, math.inf)
    classes: tuple[str, ...] = ()
    cycle_s: float = 1.0
    gripper: str = "jaws"
    opening: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty; an arm needs one")
        if not math.isfinite(self.x_m):
            raise ValueError(f"x is {self.x_m}; it must be a finite number [m]")
        if not self.lane[0] < self.lane[1]:
            raise ValueError(f"lane is {list(self.lane)}; it must be [y_min, y_max], rising [m]")
        if not (math.isfinite(self.cycle_s) and self.cycle_s >= 0):
            raise ValueError(f"cycle is {self.cycle_s}; it must be at least 0 [s]")
        if self.gripper not in GRIPPERS:
            raise ValueError(f"gripper is {self.gripper!r}; it must be one of {GRIPPERS}")
        if not 0 <= self.opening[0] < self.opening[1]:
            raise ValueError(
                f"opening is {list(self.opening)}; it must be [narrowest, widest], rising from 0"
            )


@dataclass(frozen=True)
class SchedulerParams:
    """How picks are announced.

    Attributes:
        lead_s: an arm is told at least so long before the pick.
        horizon_s: and at most so long: later is known better.
        good_sigma_s: with a pick time known less well than this an item waits to be known better
            until ``lead_s`` and ``margin_s`` are left.
        margin_s: at least the time between two updates.
        expiry_s: an order is void so long after its pick time.
        silence_s: an arm that is found dead has been so for so long.
        max_sigma_s: with a pick time known less well than this an item is not announced.
        max_hidden_s: neither is one that ought to be seen and was not for so long.
        min_score: least score of a track.
        lane_margin_m: an item's centre must lie so far within the lane.
    """

    lead_s: float = 0.4
    horizon_s: float = 2.0
    good_sigma_s: float = 0.01
    margin_s: float = 0.1
    expiry_s: float = 0.2
    silence_s: float = 1.0
    max_sigma_s: float = 0.05
    max_hidden_s: float = 0.3
    min_score: float = 0.5
    lane_margin_m: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "lead_s",
            "margin_s",
            "expiry_s",
            "silence_s",
            "max_hidden_s",
            "lane_margin_m",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not self.lead_s < self.horizon_s < math.inf:
            raise ValueError(
                f"horizon_s is {self.horizon_s}; it must be more than lead_s, {self.lead_s}"
            )
        for name in ("good_sigma_s", "max_sigma_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score is {self.min_score}; it must lie in 0..1")


@dataclass(frozen=True, eq=False)
class PickOrder:
    """What an arm is told.

    Attributes:
        track: the item as it was when it was announced.
        arm: name of the arm.
        announced_s, pick_time_s, expiry_s: stamps [s].
        pick_time_sigma_s: standard deviation of the pick time [s].
    """

    track: Track
    arm: str
    announced_s: float
    pick_time_s: float
    pick_time_sigma_s: float
    expiry_s: float

    @property
    def track_id(self) -> int:
        """Number of the item."""
        return self.track.id


@dataclass(eq=False)
class _Given:
    """The last order for an item."""

    order: PickOrder
    arm: Arm
    died: bool = False  # the arm, while the order was valid
    settled: bool = False  # it has expired, and what became of it has been looked at
    closed: bool = False  # nobody will get this item again
    due_s: float = 0.0  # when the item comes to the arm, as known now
    seen_s: float = 0.0  # when it was last among the tracks


@dataclass(frozen=True)
class _Option:
    """An arm that can take an item."""

    arm: Arm
    time_s: float
    sigma_s: float
    due: bool  # it can be told now


class Scheduler:
    """Gives items to arms; see the module's text for what it promises.

    Args:
        arms: in any order.
        params: see ``SchedulerParams``.
        class_names: the name of class i is at i - 1; class 0 is "item".

    Raises:
        ValueError: two arms have one name, or an arm takes a class that there is not.

    Attributes:
        given: orders so far.
        late: items that passed the last arm that could have taken them without an order, because
            all were busy, dead, or the pick time was not known well enough in time.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        params: SchedulerParams | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        names = [arm.name for arm in arms]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two arms are called {name!r}; each needs a name of its own")
        known = {"item", *class_names}
        for arm in arms:
            for name in arm.classes:
                if class_names and name not in known:
                    raise ValueError(
                        f"arm {arm.name!r} takes class {name!r}, which the model lacks; it has "
                        f"{', '.join(class_names)}"
                    )
        self.arms = tuple(sorted(arms, key=lambda arm: (arm.x_m, arm.name)))
        self.params = params or SchedulerParams()
        self.given = 0
        self.late = 0
        self._names = tuple(class_names)
        self._orders: dict[int, _Given] = {}
        self._times: dict[str, list[float]] = {arm.name: [] for arm in self.arms}
        self._waiting: set[int] = set()  # items that an arm could take
        self._now = -math.inf

    def update(
        self,
        now_s: float,
        tracks: Sequence[Track],
        alive: Collection[str],
        *,
        blocked: Collection[int] = (),
        unfit: Mapping[str, Collection[int]] | None = None,
        widths: Mapping[int, float] | None = None,
    ) -> tuple[PickOrder, ...]:
        """Announce what has become due.

        Args:
            now_s: on the clock of the stamps.
            tracks: all items of the belt.
            alive: names of the arms that are ready.
            blocked: numbers of items that cannot be picked now.
            unfit: by an arm's name, numbers of items that its gripper cannot hold.
            widths: opening that jaws need for the item [m], by number; else its width counts.

        Returns:
            new orders, sorted by pick time.

        Raises:
            ValueError: the time is not finite.
        """
        if not math.isfinite(now_s):
            raise ValueError(f"now is {now_s} s; it must be finite")
        if now_s < self._now - 1.0:  # time began anew, and with it the tracks
            self._orders.clear()
            self._waiting.clear()
            self._times = {arm.name: [] for arm in self.arms}
        self._now = now_s
        alive = set(alive)
        by_id = {track.id: track for track in tracks}
        self._review(now_s, by_id, alive)
        options = self._options(now_s, by_id, alive, set(blocked), unfit or {}, widths or {})
        orders = self._choose(now_s, by_id, options)
        self.given += len(orders)
        self._count_late(by_id)
        return tuple(orders)

    def order_of(self, track_id: int) -> PickOrder | None:
        """The order for an item that stands, None if there is none."""
        given = self._orders.get(track_id)
        return given.order if given and self._now <= given.order.expiry_s else None

    def _review(self, now_s: float, tracks: Mapping[int, Track], alive: set[str]) -> None:
        """Look again at the orders given: who died, and whether the item has come."""
        for number, given in list(self._orders.items()):
            track = tracks.get(number)
            if track is not None:
                given.seen_s = max(given.seen_s, now_s)
                given.due_s = crossing(track, given.arm.x_m)[0]
            elif now_s > max(given.seen_s, given.order.expiry_s) + _FORGET_S:
                del self._orders[number]
                continue
            dead = given.arm.name not in alive
            if now_s <= given.order.expiry_s:
                given.died |= dead
                continue
            if dead and now_s <= given.order.expiry_s + self.params.silence_s:
                given.died = True
            if not given.settled:
                given.settled = True
                given.closed = not given.due_s > now_s
            if given.died:
                given.closed = False

    def _options(
        self,
        now_s: float,
        tracks: Mapping[int, Track],
        alive: set[str],
        blocked: set[int],
        unfit: Mapping[str, Collection[int]],
        widths: Mapping[int, float],
    ) -> dict[int, list[_Option]]:
        """By item: the living arms that can take it, now or later, along the belt."""
        options: dict[int, list[_Option]] = {}
        params = self.params
        for number, track in tracks.items():
            given = self._orders.get(number)
            if given is not None and (given.closed or now_s <= given.order.expiry_s):
                continue
            if number in blocked or not track.whole or track.score < params.min_score:
                continue
            if track.hidden_s > params.max_hidden_s:
                continue
            name = self._class_name(track.class_index)
            y = float(track.position[1])
            for arm in self.arms:
                if arm.classes and name not in arm.classes:
                    continue
                if number in unfit.get(arm.name, ()):
                    continue
                width = widths.get(number, track.width) if arm.gripper == "jaws" else track.width
                if not arm.opening[0] <= width <= arm.opening[1]:
                    continue
                margin = params.lane_margin_m
                if not arm.lane[0] + margin <= y <= arm.lane[1] - margin:
                    continue
                time_s, sigma_s = crossing(track, arm.x_m)
                if time_s < now_s:
                    continue
                self._waiting.add(number)
                if arm.name not in alive or sigma_s > params.max_sigma_s:
                    continue
                left = time_s - now_s
                if left < params.lead_s:
                    continue
                late = left <= params.lead_s + params.margin_s
                due = left <= params.horizon_s and (sigma_s <= params.good_sigma_s or late)
                options.setdefault(number, []).append(_Option(arm, time_s, sigma_s, due))
        return options

    def _choose(
        self,
        now_s: float,
        tracks: Mapping[int, Track],
        options: Mapping[int, list[_Option]],
    ) -> list[PickOrder]:
        """Give items in the order of their times, so that as many as may be find an arm.

        For one arm taking the earliest first is best. Of several arms an item goes to the first
        along the belt, unless it would there take the place of one that has no other arm.
        """
        busy: dict[str, list[float]] = {}
        for arm in self.arms:
            times = [t for t in self._times[arm.name] if t > now_s - arm.cycle_s]
            self._times[arm.name] = times
            busy[arm.name] = list(times)
        for given in self._orders.values():
            if now_s <= given.order.expiry_s:
                busy[given.arm.name].append(given.due_s)
        only: dict[str, list[float]] = {arm.name: [] for arm in self.arms}
        for choices in options.values():
            if len(choices) == 1:
                only[choices[0].arm.name].append(choices[0].time_s)

        def fits(option: _Option, times: Sequence[float]) -> bool:
            return all(abs(option.time_s - t) >= option.arm.cycle_s for t in times)

        orders = []
        for number in sorted(options, key=lambda n: (options[n][0].time_s, n)):
            choices = options[number]
            free = [option for option in choices if fits(option, busy[option.arm.name])]
            if len(choices) > 1:
                free.sort(key=lambda option: not fits(option, only[option.arm.name]))
            if not free or not free[0].due:
                continue
            arm, time_s = free[0].arm, free[0].time_s
            order = PickOrder(
                tracks[number],
                arm.name,
                now_s,
                time_s,
                free[0].sigma_s,
                time_s + self.params.expiry_s,
            )
            self._orders[number] = _Given(order, arm, due_s=time_s, seen_s=now_s)
            self._waiting.discard(number)
            busy[arm.name].append(time_s)
            self._times[arm.name].append(time_s)
            orders.append(order)
        return sorted(orders, key=lambda order: (order.pick_time_s, order.track_id))

    def _count_late(self, tracks: Mapping[int, Track]) -> None:
        last = max((arm.x_m for arm in self.arms), default=-math.inf)
        for number in list(self._waiting):
            track = tracks.get(number)
            if number in self._orders:
                self._waiting.discard(number)
            elif track is None or float(track.position[0]) > last:
                self.late += 1
                self._waiting.discard(number)

    def _class_name(self, class_index: int) -> str:
        if class_index == 0:
            return "item"
        if class_index <= len(self._names):
            return self._names[class_index - 1]
        return f"class {class_index}"


# --- config/arms.yaml -----------------------------------------------------------------------------


def read_arms(path: Path) -> tuple[Arm, ...]:
    """Read the arms along the belt from a YAML file; ``config/arms.yaml`` shows how it looks.

    Raises:
        ArmsError: the file cannot be read or used; names the key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArmsError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArmsError(f"{path}: is no YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("arms"), list):
        raise ArmsError(f"{path}: needs a list 'arms:', as in config/arms.yaml")
    if extra := sorted(str(key) for key in content if key != "arms"):
        raise ArmsError(f"{path}: key '{extra[0]}' is not known; there is only 'arms'")
    arms: list[Arm] = []
    for index, entry in enumerate(content["arms"]):
        where = f"{path}: arms[{index}]"
        arm = _read_arm(where, entry)
        if arm.name in {other.name for other in arms}:
            raise ArmsError(f"{where}: there is another arm called {arm.name!r}; rename one")
        arms.append(arm)
    return tuple(arms)


_KEYS = ("name", "x", "lane", "classes", "cycle", "gripper", "opening")


def _read_arm(where: str, entry: Any) -> Arm:
    if not isinstance(entry, dict):
        raise ArmsError(f"{where}: must have the keys {', '.join(_KEYS)}")
    for key in entry:
        if key not in _KEYS:
            raise ArmsError(f"{where}: key '{key}' is not known; there are {', '.join(_KEYS)}")
    for key in ("name", "x", "lane"):
        if key not in entry:
            raise ArmsError(f"{where}: key '{key}' is missing")
    classes = entry.get("classes") or []
    if not isinstance(entry["name"], str):
        raise ArmsError(f"{where}: name is {entry['name']!r}; it must be a text, so quote it")
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ArmsError(f"{where}: classes is {classes!r}; it must be a list of names, [] for all")
    try:
        return Arm(
            name=entry["name"],
            x_m=_number(where, "x", entry["x"]),
            lane=_pair(where, "lane", entry["lane"]),
            classes=tuple(classes),
            cycle_s=_number(where, "cycle", entry.get("cycle", 1.0)),
            gripper=entry.get("gripper", "jaws"),
            opening=_pair(where, "opening", entry.get("opening", [0.0, 1.0])),
        )
    except ArmsError:
        raise
    except ValueError as error:
        raise ArmsError(f"{where}: {error}") from error


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArmsError(f"{where}: {key} is {value!r}; it must be a finite number")
    return float(value)


def _pair(where: str, key: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ArmsError(f"{where}: {key} is {value!r}; it must be a list of two numbers")
    return _number(where, key, value[0]), _number(where, key, value[1])
