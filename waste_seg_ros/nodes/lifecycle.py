"""A lifecycle node that starts itself."""

from __future__ import annotations

from typing import Any

from rclpy.lifecycle import LifecycleNode

from waste_seg_ros.nodes import declare
from waste_seg_ros.nodes.diagnostics import Reporter


class AutostartNode(LifecycleNode):
    """A lifecycle node that configures and activates itself (parameter ``autostart``).

    A subclass sets ``_reporter``, calls `_declare_autostart` with its other parameters, and
    `_plan_autostart` at the end of its constructor and whenever a parameter has changed.
    """

    _reporter: Reporter

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.exit_code: int | None = None
        self._autostart_timer: Any = None

    def _declare_autostart(self) -> None:
        declare(
            self,
            "autostart",
            True,
            "Configure and activate without being told by a lifecycle manager.",
            read_only=True,
        )

    def _plan_autostart(self) -> None:
        """Start soon, unless told not to; what kept the node from it may be mended now."""
        if (
            self.get_parameter("autostart").value
            and self._state() == "unconfigured"
            and self._autostart_timer is None
        ):
            self._autostart_timer = self.create_timer(0.0, self._autostart)

    def _state(self) -> str:
        return str(self._state_machine.current_state[1])

    def _autostart(self) -> bool:
        """Configure and activate; says whether the node is active."""
        if self._autostart_timer is not None:
            self.destroy_timer(self._autostart_timer)
            self._autostart_timer = None
        if self._state() == "unconfigured":
            self.trigger_configure()
        if self._state() == "inactive":
            self.trigger_activate()
        self._reporter.report_change()
        return self._state() == "active"
