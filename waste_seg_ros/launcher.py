"""Runs a node graph as plain processes, for machines without ``ros2 launch``.

Each node is a process in a session of its own, so that Ctrl-C reaches the launcher alone and the
launcher ends the nodes in order. What a node prints comes out line by line behind its name. When
a required node ends, all end. Linux only: the kernel is asked to kill the nodes should the
launcher itself be killed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

from waste_seg_ros.graph import ARGUMENTS, PACKAGE, NodeSpec, sorter_graph

# How long a node may take to end after each signal [s].
STOP_SIGNALS = ((signal.SIGINT, 6.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0))

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl
_prctl.argtypes = (ctypes.c_int, ctypes.c_ulong)


class LaunchError(RuntimeError):
    """A node cannot be started."""


def command_line(spec: NodeSpec) -> list[str]:
    """Return the command that runs a node.

    Raises:
        LaunchError: its package is not installed.
    """
    if spec.package == PACKAGE:
        command = [sys.executable, "-m", f"{PACKAGE}.nodes.{spec.executable}"]
    else:
        for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
            program = Path(prefix) / "lib" / spec.package / spec.executable
            if prefix and os.access(program, os.X_OK):
                command = [str(program)]
                break
        else:
            package = "ros-jazzy-" + spec.package.replace("_", "-")
            raise LaunchError(
                f"{spec.executable} is not installed; it comes with ROS: apt install {package}"
            )
    return [*command, *spec.arguments, *ros_arguments(spec)]


def ros_arguments(spec: NodeSpec) -> list[str]:
    """Return the part of a node's command line that ROS reads."""
    arguments = ["--ros-args", "-r", f"__node:={spec.name}"]
    if spec.namespace:
        arguments += ["-r", f"__ns:=/{spec.namespace}"]
    for file in spec.parameter_files:
        arguments += ["--params-file", file]
    for name, value in spec.parameters.items():
        # rcl reads values as YAML, of which JSON is a part that keeps "1" and 1 apart.
        arguments += ["-p", f"{name}:={json.dumps(value, ensure_ascii=False)}"]
    for source, target in spec.remappings.items():
        arguments += ["-r", f"{source}:={target}"]
    return arguments


class Supervisor:
    """Running nodes; made by :func:`start`.

    The thread that starts it must outlive it: Linux ties the nodes' lives to that thread.
    """

    def __init__(
        self, specs: Sequence[NodeSpec], output: TextIO, environment: Mapping[str, str]
    ) -> None:
        names = [spec.name for spec in specs]
        if len(set(names)) < len(names):
            raise LaunchError(f"two nodes have the same name: {', '.join(names)}")
        self.exit_codes: dict[str, int] = {}
        """Of the nodes that have ended; 128 + n where signal n ended one."""
        self._specs = {spec.name: spec for spec in specs}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._output = output
        self._write_lock = threading.Lock()
        self._readers: list[threading.Thread] = []
        self._stopping = False
        self._signals_sent = 0
        self._deadline = 0.0
        commands = {spec.name: command_line(spec) for spec in specs}
        width = max((len(name) for name in names), default=0)
        try:
            for name, command in commands.items():
                self._spawn(name, command, f"[{name}]".ljust(width + 3), environment)
        except OSError as error:
            self.stop()
            raise LaunchError(f"cannot start {name}: {error}") from error

    def _spawn(
        self, name: str, command: list[str], prefix: str, environment: Mapping[str, str]
    ) -> None:
        parent = os.getpid()

        def tie_to_parent() -> None:  # runs in the child, before the node's program
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored below a shell's `&`
            if os.getppid() != parent:  # the launcher died before the line above
                os._exit(1)

        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=tie_to_parent,
        )
        self._processes[name] = process
        reader = threading.Thread(target=self._relay, args=(process, prefix), daemon=True)
        reader.start()
        self._readers.append(reader)

    def _relay(self, process: subprocess.Popen[bytes], prefix: str) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._say(prefix + line.decode(errors="replace").rstrip("\n"))
        process.stdout.close()

    def _say(self, line: str) -> None:
        # A closed terminal or a full disk must not stop the nodes, nor leave them blocked.
        with self._write_lock, contextlib.suppress(OSError, ValueError):
            self._output.write(line + "\n")
            self._output.flush()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the nodes, by name."""
        return {name: process.pid for name, process in self._processes.items()}

    def failed(self) -> str | None:
        """Return None while all required nodes run, else a sentence on the first that ended."""
        self._reap()
        for name, code in self.exit_codes.items():
            if self._specs[name].required:
                return f"{name} ended with exit code {code}"
        return None

    def _reap(self) -> None:
        for name, process in self._processes.items():
            if name in self.exit_codes:
                continue
            # Look without reaping: as long as the dead process is not reaped, its group's number
            # cannot be given to another, so that killing what is left of the group is safe.
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if os.waitid(os.P_PID, process.pid, options) is None:
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            self.exit_codes[name] = code if code >= 0 else 128 - code
            if not self._stopping:
                self._say(f"[launcher] {name} ended with exit code {self.exit_codes[name]}")

    def _escalate(self) -> None:
        number, grace = STOP_SIGNALS[min(self._signals_sent, len(STOP_SIGNALS) - 1)]
        self._signals_sent += 1
        self._deadline = time.monotonic() + grace
        for name, process in self._processes.items():
            if name not in self.exit_codes:
                if self._signals_sent > 1:
                    self._say(f"[launcher] {name} is still running: {number.name}")
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """End all nodes, and return when they have ended.

        Args:
            hurry: asked again and again; where true, the next harsher signal is sent at once.
        """
        self._reap()
        self._stopping = True
        while len(self.exit_codes) < len(self._processes):
            if self._signals_sent == 0 or time.monotonic() > self._deadline or hurry():
                self._escalate()
            time.sleep(0.02)
            self._reap()
        for reader in self._readers:
            reader.join(timeout=2.0)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(
    specs: Sequence[NodeSpec],
    *,
    output: TextIO | None = None,
    environment: Mapping[str, str] | None = None,
) -> Supervisor:
    """Start all nodes; leave the returned object's ``with`` block to end them.

    Args:
        specs: the nodes, with different names.
        output: takes what the nodes print; standard output by default.
        environment: further variables for the nodes.

    Raises:
        LaunchError: a node cannot be started; none is left running.
    """
    output = sys.stdout if output is None else output
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if output.isatty():
        variables.setdefault("RCUTILS_COLORIZED_OUTPUT", "1")
    return Supervisor(specs, output, {**variables, **(environment or {})})


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[float], bool]]:
    """Turn SIGINT, SIGTERM and SIGHUP into answers of the yielded function.

    The function waits up to the given seconds and says whether a signal has come since it last
    said so.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)

    def note(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(writer, b"x")

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in signals}

    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)

        def requested(timeout: float) -> bool:
            return bool(selector.select(timeout)) and bool(os.read(reader, 1))

        try:
            yield requested
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(reader)
            os.close(writer)


def supervise(specs: Sequence[NodeSpec], *, output: TextIO | None = None) -> int:
    """Run all nodes until Ctrl-C, SIGTERM or SIGHUP, or until a required one ends.

    A second Ctrl-C does not wait for nodes that are slow to end. Main thread only.

    Returns:
        0 where the user ended it or all required nodes that ended did so properly; else the exit
        code of the required node that ended first, 128 + n where signal n ended it.
    """
    with _stop_requests() as requested:
        try:
            nodes = start(specs, output=output)
        except LaunchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        with nodes:
            while not (stopped := requested(0.1)) and nodes.failed() is None:
                pass
            required = {spec.name for spec in specs if spec.required}
            codes = [code for name, code in nodes.exit_codes.items() if name in required]
            nodes.stop(hurry=lambda: requested(0.0))
        return 0 if stopped else next((code for code in codes if code), 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``waste-seg up``: the arguments of the launch file."""
    for argument in ARGUMENTS:
        option = "--" + argument.name.replace("_", "-")
        if isinstance(argument.default, bool):
            parser.add_argument(
                option,
                action=argparse.BooleanOptionalAction,
                default=argument.default,
                help=argument.help,
            )
        else:
            parser.add_argument(
                option,
                type=type(argument.default),
                default=argument.default,
                choices=argument.choices or None,
                help=argument.help,
            )


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg up``."""
    values = {argument.name: getattr(args, argument.name) for argument in ARGUMENTS}
    try:
        specs = sorter_graph(**values)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return supervise(specs)
