"""What the nodes say about themselves on ``/diagnostics``."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.qos import qos_policy_name_from_kind

OK: bytes = DiagnosticStatus.OK
WARN: bytes = DiagnosticStatus.WARN
ERROR: bytes = DiagnosticStatus.ERROR

Finding = tuple[bytes, str]
"""A level and a sentence that says what is the matter and how to mend it."""


class Window:
    """The last so many numbers of a series, for percentiles; any thread may use it."""

    def __init__(self, size: int = 256) -> None:
        self._values: deque[float] = deque(maxlen=size)
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        """Append a number; NaN (not known) is left out."""
        if value == value:
            with self._lock:
                self._values.append(value)

    def percentile(self, percent: float) -> float:
        """Return the percentile, NaN where there are no numbers."""
        with self._lock:
            values = list(self._values)
        return float(np.percentile(values, percent)) if values else float("nan")


class Rate:
    """How often something happens; any thread may use it."""

    def __init__(self, span: float = 3.0) -> None:
        self._span = span
        self._times: deque[float] = deque(maxlen=1024)
        self._lock = threading.Lock()
        self.count = 0
        """Since the start."""

    def tick(self, times: int = 1) -> None:
        """Say that it has happened so many times."""
        with self._lock:
            self._times.extend([time.monotonic()] * times)
            self.count += times

    def hertz(self) -> float:
        """Return how often a second it happened within the last few seconds."""
        now = time.monotonic()
        with self._lock:
            times = [t for t in self._times if now - t <= self._span]
        if len(times) < 2 or times[-1] == times[0]:
            return 0.0
        return (len(times) - 1) / (times[-1] - times[0])

    def age(self) -> float:
        """Return seconds since the last time, infinity where there was none."""
        with self._lock:
            return time.monotonic() - self._times[-1] if self._times else float("inf")


def status(
    name: str, hardware_id: str, findings: Iterable[Finding], values: Mapping[str, object]
) -> DiagnosticStatus:
    """Make a status of the worst level found, whose message gives the worst findings first."""
    found = sorted(findings, key=lambda finding: finding[0], reverse=True)
    return DiagnosticStatus(
        name=name,
        hardware_id=hardware_id,
        level=found[0][0] if found else OK,
        message="; ".join(text for _, text in found) if found else "OK",
        values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
    )


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Reporter:
    """Publishes statuses once a second, and at once when one has changed."""

    def __init__(
        self,
        node: Any,
        collect: Callable[[], list[DiagnosticStatus]],
        callback_group: Any = None,
    ) -> None:
        self._node = node
        self._collect = collect
        self._last: list[tuple[bytes, str]] = []
        self._lock = threading.Lock()
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._timer = node.create_timer(1.0, self.report, callback_group)

    def report(self) -> None:
        """Publish the statuses as they are."""
        with self._lock:
            statuses = self._collect()
            self._last = [(status.level, status.message) for status in statuses]
            self._publish(statuses)

    def report_change(self) -> None:
        """Publish the statuses if a level or a message is not what was published last."""
        with self._lock:
            statuses = self._collect()
            now = [(status.level, status.message) for status in statuses]
            if now != self._last:
                self._last = now
                self._publish(statuses)

    def _publish(self, statuses: list[DiagnosticStatus]) -> None:
        message = DiagnosticArray(status=statuses)
        message.header.stamp = self._node.get_clock().now().to_msg()
        publish(self._node, self._publisher, message)


def publish(node: Any, publisher: Any, message: Any) -> None:
    """Publish from a thread that a signal may overtake: after it there is nobody to hear."""
    try:
        publisher.publish(message)
    except Exception:
        if node.context.ok():
            raise


def policy_name(event: Any) -> str:
    """Name of the policy in an incompatible QoS event, such as RELIABILITY."""
    return str(qos_policy_name_from_kind(event.last_policy_kind))
