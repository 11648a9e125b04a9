"""The arms of ``waste-seg demo --arms N``: where they stand, and what they have picked.

The arms are simulated (`nodes.arm`): each says in its diagnostics what it held after each pick, by
the truth of the synthetic line. What passed without an order is found out here, from the truth and
the orders.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from waste_seg_ros.data.sample import CLASSES
from waste_seg_ros.files import write_file

if TYPE_CHECKING:
    from waste_seg_ros.nodes.arm import TrueItem

MOST = 6
FRAMES = 750
"""Pictures of a demo with arms: an item takes seconds to come to them."""
FIRST_X, STEP = 0.65, 0.25
"""Where the arms stand [m]: the synthetic line is seen to x = 0.48."""
HORIZON = 2.0
RESULTS = ("right", "wrong", "missed")


def write_arms(path: Path, count: int) -> None:
    """Write the file of so many arms, which share out the classes; the last takes all.

    Raises:
        ValueError: too many or too few.
        OSError: the file cannot be written.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"--arms takes 1 to {MOST}")
    arms = [
        {
            "name": f"arm_{k + 1}",
            "x": round(FIRST_X + k * STEP, 3),
            "lane": [-0.4, 0.4],
            "classes": list(CLASSES[k::count]) if k < count - 1 else [],
            "cycle": 0.6,
            "gripper": "suction" if k % 2 else "jaws",
            "opening": [0.02 if k % 2 else 0.0, 0.3],
        }
        for k in range(count)
    ]
    text = yaml.safe_dump({"arms": arms}, sort_keys=False, default_flow_style=None)
    write_file(path, ("# The arms of the demo; see config/arms.yaml.\n" + text).encode())


@dataclass
class PickRecord:
    """Orders and truth as they came; filled by the executor's thread."""

    arms: int
    orders: list[Any] = field(default_factory=list)
    """Pick messages."""
    truth: dict[int, TrueItem] = field(default_factory=dict)
    """Items as they were last seen whole."""
    first_x: dict[int, float] = field(default_factory=dict)
    """Where they were first seen."""
    last_s: float = -math.inf
    """Stamp of the last picture [s]."""

    def add_truth(self, array: Any) -> None:
        """Take note of a picture's ``truth/items``."""
        from waste_seg_ros.msg import WasteItem
        from waste_seg_ros.nodes.arm import true_item
        from waste_seg_ros.perception.belt import default_plane

        plane = default_plane(1.0)
        for entry in array.items:
            item = true_item(entry, plane)
            self.first_x.setdefault(item.number, item.x)
            if not entry.flags & WasteItem.FLAG_TRUNCATED or item.number not in self.truth:
                self.truth[item.number] = item
            self.last_s = max(self.last_s, item.seen_s)

    def summary(self, health: Mapping[str, Any]) -> dict[str, Any]:
        """What the arms have done.

        Args:
            health: newest diagnostics by name, as ``Board.health`` gives them.
        """
        arms: dict[str, dict[str, Any]] = {}
        total: Counter[tuple[str, str]] = Counter()
        for name, entry in sorted(health.items()):
            if not name.endswith(": picks"):
                continue
            own: Counter[tuple[str, str]] = Counter()
            for key, value in entry.values.items():
                result, _, kind = key.partition(" ")
                if result in RESULTS and value.isdecimal():
                    own[result, kind] += int(value)
            total += own
            arms[entry.values.get("arm", name)] = _totals(own)
        came, ordered = self._passed()
        return {
            "by_arm": arms,
            "by_class": {
                kind: _totals(Counter({k: n for k, n in total.items() if k[1] == kind}))
                for kind in sorted({kind for _, kind in total})
            },
            **_totals(total),
            "orders": len(self.orders),
            "items_ordered_twice": sum(n > 1 for n in Counter(self._items_ordered()).values()),
            "items_that_came": came,
            "of_them_ordered": ordered,
        }

    def _items_ordered(self) -> list[int]:
        """Number of the true item that each order was for, if there is one."""
        from waste_seg_ros.nodes.arm import HELD
        from waste_seg_ros.nodes.tracks import to_seconds

        numbers = []
        for pick in self.orders:
            at, place = to_seconds(pick.pick_time), pick.item.grasp.position
            gaps = [(i.distance(place.x, place.y, at), n) for n, i in self.truth.items()]
            gap, number = min(gaps, default=(math.inf, 0))
            if gap <= HELD:
                numbers.append(number)
        return numbers

    def _passed(self) -> tuple[int, int]:
        """Items that entered the view and left the last arm behind, and how many were ordered."""
        last_x = FIRST_X + (self.arms - 1) * STEP
        came = {
            number
            for number, item in self.truth.items()
            if self.first_x[number] < 0
            and item.x + item.velocity[0] * (self.last_s - item.seen_s) > last_x
        }
        return len(came), len(came & set(self._items_ordered()))


def _totals(counts: Counter[tuple[str, str]]) -> dict[str, Any]:
    totals: dict[str, Any] = {
        result: sum(n for (what, _), n in counts.items() if what == result) for result in RESULTS
    }
    held = totals["right"] + totals["wrong"]
    totals["purity"] = totals["right"] / held if held else None
    return totals


def report(arms: Mapping[str, Any]) -> list[str]:
    """Lines for the demo's report."""
    lines = [f"picks       {_told(arms)}"]
    if arms["items_that_came"]:
        lines[0] += (
            f"; ordered {arms['of_them_ordered']} of {arms['items_that_came']} items that passed"
        )
    for entries in (arms["by_arm"], arms["by_class"]):
        lines += [f"{'':12s}{name}: {_told(entry)}" for name, entry in entries.items()]
    return lines


def _told(entry: Mapping[str, Any]) -> str:
    text = ", ".join(f"{entry[result]} {result}" for result in RESULTS)
    if entry["purity"] is not None:
        text += f", purity {entry['purity']:.2f}"
    return text
