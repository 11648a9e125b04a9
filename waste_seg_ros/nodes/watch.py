"""A look at the belt from the terminal: items passing, speed, latency and what is wrong.

On a terminal the view stays in place; elsewhere (a pipe, a log) it is a line a second, and one for
each change of the diagnostics.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.time import Time
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from waste_seg_ros.msg import WasteItem, WasteItemArray
from waste_seg_ros.nodes import run_node
from waste_seg_ros.nodes.diagnostics import OK, WARN, Rate, Window

ROWS = 12
"""Items shown at a time."""
STYLES = {"paper": "yellow", "bottle": "blue", "aluminum": "magenta", "nylon": "green"}


@dataclass(frozen=True)
class Health:
    """The newest diagnostic of one name."""

    level: bytes
    message: str
    values: dict[str, str]

    @property
    def word(self) -> str:
        """OK, WARN or ERROR."""
        return "OK" if self.level == OK else "WARN" if self.level == WARN else "ERROR"


class Board:
    """What the view shows; messages may come from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._array: WasteItemArray | None = None
        self._health: dict[str, Health] = {}
        self._held: tuple[str, dict[str, Health]] | None = None
        self.frames = Rate()
        self.latency = Window(512)

    def add_items(self, array: WasteItemArray, now: Time) -> float:
        """Show an image's items; returns their latency [s], from the image's stamp until now."""
        latency = (now - Time.from_msg(array.header.stamp)).nanoseconds * 1e-9
        self.frames.tick()
        self.latency.add(latency)
        with self._lock:
            self._array = array
        return latency

    def add_diagnostics(self, array: DiagnosticArray) -> list[str]:
        """Take note of diagnostics; returns a line for each whose level or message is new."""
        news = []
        with self._lock:
            for status in array.status:
                health = Health(
                    status.level, status.message, {v.key: v.value for v in status.values}
                )
                before = self._health.get(status.name)
                self._health[status.name] = health
                if before is None or before.word != health.word:
                    news.append(f"{health.word:5s} {status.name}: {health.message}")
        return news

    def health(self) -> dict[str, Health]:
        """The newest diagnostics by name."""
        with self._lock:
            return dict(self._health)

    def hold(self) -> None:
        """Show speed and diagnostics as they are now from now on, as at the end of a run."""
        if self._held is None:
            self._held = (self.figures(), self.health())

    def dropped(self) -> int:
        """Images that segmenters left out because a newer one was there."""
        values = (health.values.get("dropped", "0") for health in self.health().values())
        return sum(int(value) for value in values if value.isdecimal())

    def figures(self) -> str:
        """Speed and latency in one line."""
        if self._held is not None:
            return self._held[0]
        p50, p99 = (1e3 * self.latency.percentile(percent) for percent in (50, 99))
        if not self.frames.count:
            return "waiting for items"
        return (
            f"{self.frames.hertz():5.1f} images/s   latency p50 {p50:.0f} ms, p99 {p99:.0f} ms   "
            f"{self.frames.count} images, {self.dropped()} dropped"
        )

    def line(self) -> str:
        """Speed, latency and items in one line."""
        with self._lock:
            array = self._array
        items = [] if array is None else array.items
        named = ", ".join(f"{item.class_id} {_place(item)}" for item in items[:ROWS])
        if array is None:
            return self.figures()
        return f"{self.figures()}   {len(items)} items{': ' if named else ''}{named}"

    def view(self) -> Group:
        """The view for a terminal."""
        with self._lock:
            array = self._array
        table = Table(expand=False, pad_edge=False)
        for name, justify in (
            ("id", "right"),
            ("class", "left"),
            ("x mm", "right"),
            ("y mm", "right"),
            ("size mm", "right"),
            ("score", "right"),
            ("pick", "left"),
        ):
            table.add_column(name, justify=justify, min_width=6)  # type: ignore[arg-type]
        items = [] if array is None else array.items
        for item in items[:ROWS]:
            position = item.pose.pose.position
            table.add_row(
                str(item.track_id),
                Text(item.class_id, style=STYLES.get(item.class_id, "")),
                f"{1e3 * position.x:+.0f}",
                f"{1e3 * position.y:+.0f}",
                f"{1e3 * item.length:.0f} x {1e3 * item.width:.0f}",
                f"{item.score:.2f}",
                Text("yes", style="green") if item.pickable else Text(item.reason, style="dim"),
            )
        for _ in range(ROWS - len(items)):  # the view keeps its height
            table.add_row("", "", "", "", "", "", "")
        more = f"and {len(items) - ROWS} more" if len(items) > ROWS else ""
        title = Text(f"{array.model if array else 'waiting for items'}   ", style="bold")
        title.append(self.figures(), style="not bold")
        lines: list[Any] = [title, table, Text(more)]
        shown = self.health() if self._held is None else self._held[1]
        for name, health in sorted(shown.items()):
            style = {"OK": "green", "WARN": "yellow", "ERROR": "bold red"}[health.word]
            line = Text(f"{health.word:5s} ", style=style)
            lines.append(line.append(f"{name}: {health.message}", style="default"))
        return Group(*lines)


def _place(item: WasteItem) -> str:
    position = item.pose.pose.position
    return f"({1e3 * position.x:+.0f}, {1e3 * position.y:+.0f}) {item.score:.2f}"


class Screen:
    """Shows a board, in place on a terminal and line by line elsewhere."""

    def __init__(self, board: Board, console: Console | None = None) -> None:
        self._board = board
        self._console = console or Console()
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(board.view(), console=self._console, auto_refresh=False)
            self._live.start()
        self._calls = 0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def refresh(self) -> None:
        """Show the board as it is; to be called four times a second."""
        self._calls += 1
        if self._live is not None:
            self._live.update(self._board.view(), refresh=True)
        elif self._calls % 4 == 0:
            self.say(self._board.line())

    def close(self) -> None:
        """Leave the terminal as it is to be."""
        if self._live is not None:
            self._live.update(self._board.view(), refresh=True)
            self._live.stop()
            self._live = None


class Watch(Node):
    """The watch node."""

    def __init__(self) -> None:
        super().__init__("watch")
        self.exit_code: int | None = None
        self._board = Board()
        self._screen = Screen(self._board)
        options = QoSOverridingOptions.with_default_policies()
        items = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        self.create_subscription(
            WasteItemArray, "items", self._on_items, items, qos_overriding_options=options
        )
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self.create_timer(0.25, self._screen.refresh)

    def _on_items(self, array: WasteItemArray) -> None:
        self._board.add_items(array, self.get_clock().now())

    def _on_diagnostics(self, array: DiagnosticArray) -> None:
        for line in self._board.add_diagnostics(array):
            if not sys.stdout.isatty():
                self._screen.say(line)

    def close(self) -> bool:
        """Leave the terminal in order."""
        self._screen.close()
        return True


def main(args: Sequence[str] | None = None) -> int:
    """Run the watch node."""
    return run_node(Watch, args)


if __name__ == "__main__":
    raise SystemExit(main())
