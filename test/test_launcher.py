"""The launcher, on small real processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from waste_seg_ros import launcher
from waste_seg_ros.graph import NodeSpec

DRIVER = """
import signal, sys
from waste_seg_ros import launcher
from waste_seg_ros.graph import NodeSpec
launcher.STOP_SIGNALS = tuple((number, 0.5) for number, _ in launcher.STOP_SIGNALS)
specs = [NodeSpec(name.rstrip("?"), name.rstrip("?"), package="toys", required=name[-1] != "?")
         for name in sys.argv[1:]]
sys.exit(launcher.supervise(specs))
"""


def wait_for(condition: Callable[[], object], timeout: float = 15.0) -> bool:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """A function that installs a shell script as executable of the package `toys`.

    The script can write its process id to the returned path, which it finds in $PIDS.
    """
    folder = tmp_path / "lib" / "toys"
    folder.mkdir(parents=True)
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PIDS", str(tmp_path))

    def install(name: str, script: str) -> Path:
        program = folder / name
        program.write_text(f"#!/bin/bash\n{script}\n")
        program.chmod(0o755)
        return tmp_path / name

    return install


@pytest.fixture
def drive() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that runs the launcher on toys in a process of its own ("name?": not required)."""
    started = []

    def run(*names: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def pid_in(path: Path) -> int:
    assert wait_for(lambda: path.exists() and path.read_text().strip()), f"no process id in {path}"
    return int(path.read_text())


ANNOUNCE = 'echo $$ > "$PIDS/${0##*/}"'
LOOP = "while true; do sleep 0.05; done"
SLEEP = f"{ANNOUNCE}; exec sleep 60"
POLITE = f"trap 'echo bye; exit 0' INT; {ANNOUNCE}; {LOOP}"
STUBBORN = f"trap '' INT TERM; {ANNOUNCE}; {LOOP}"


def test_lines_carry_the_name_of_their_node(toy) -> None:
    toy("short", "echo one; echo two >&2; sleep 60")
    toy("rather_long", "printf 'no newline'")
    output = io.StringIO()
    specs = [NodeSpec("short", "short", "toys"), NodeSpec("rather_long", "rather_long", "toys")]
    with launcher.start(specs, output=output) as nodes:
        assert wait_for(lambda: nodes.failed() and "two" in output.getvalue())
    lines = output.getvalue().splitlines()
    assert "[short]       one" in lines
    assert "[short]       two" in lines
    assert "[rather_long] no newline" in lines


def test_start_reports_the_required_node_that_ended(toy) -> None:
    toy("good", SLEEP)
    toy("bad", "exit 7")
    output = io.StringIO()
    with launcher.start(
        [NodeSpec("good", "good", "toys"), NodeSpec("bad", "bad", "toys")], output=output
    ) as nodes:
        pid = nodes.pids["good"]
        assert wait_for(nodes.failed)
        assert nodes.failed() == "bad ended with exit code 7"
        assert is_running(pid)
    assert not is_running(pid)
    assert nodes.exit_codes == {"bad": 7, "good": 128 + signal.SIGINT}


@pytest.mark.parametrize(
    ("ending", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -SEGV $$", 128 + signal.SIGSEGV)]
)
def test_a_required_node_ends_all_with_its_exit_code(toy, drive, ending: str, code: int) -> None:
    other = toy("other", SLEEP)
    toy("ends", f'while [ ! -s "$PIDS/other" ]; do sleep 0.02; done; {ending}')
    process = drive("other", "ends")
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code
    assert f"[launcher] ends ended with exit code {code}" in output
    assert not is_running(pid_in(other))


def test_a_node_that_is_not_required_may_end(toy, drive) -> None:
    main = toy("main", SLEEP)
    toy("extra", "exit 3")
    process = drive("main", "extra?")
    assert any("extra ended" in line for line in iter(process.stdout.readline, ""))
    time.sleep(0.3)
    assert process.poll() is None
    assert is_running(pid_in(main))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_nodes_and_counts_as_success(toy, drive, number: int) -> None:
    paths = [toy("polite", POLITE), toy("other", SLEEP)]
    process = drive("polite", "other")
    pids = [pid_in(path) for path in paths]
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "[polite] bye" in output
    assert not any(map(is_running, pids))


def test_a_node_that_ignores_signals_is_killed(toy, drive) -> None:
    stubborn = toy("stubborn", STUBBORN)
    process = drive("stubborn")
    pid = pid_in(stubborn)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert not is_running(pid)
    assert output.index("SIGTERM") < output.index("SIGKILL")


def test_nodes_end_on_ctrl_c_when_started_in_the_background(toy) -> None:
    # A shell without job control starts `command &` with SIGINT ignored.
    polite = toy("polite", POLITE)
    specs = [NodeSpec("polite", "polite", "toys")]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        nodes = launcher.start(specs, output=io.StringIO())
    finally:
        signal.signal(signal.SIGINT, before)
    with nodes:
        pid_in(polite)
    assert nodes.exit_codes == {"polite": 0}


def test_what_a_node_left_behind_is_killed(toy, drive) -> None:
    child = toy("child", STUBBORN)
    toy("parent", '"${0%/*}/child" & while [ ! -s "$PIDS/child" ]; do sleep 0.02; done; exit 5')
    process = drive("parent")
    process.communicate(timeout=20)
    assert process.returncode == 5
    pid = pid_in(child)
    assert wait_for(lambda: not is_running(pid), 5)


def test_no_orphans_when_the_launcher_is_killed(toy, drive) -> None:
    paths = [toy(name, STUBBORN) for name in ("one", "two")]
    process = drive("one", "two")
    pids = [pid_in(path) for path in paths]
    process.kill()
    process.wait()
    try:
        assert wait_for(lambda: not any(map(is_running, pids)), 5)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_program_that_is_not_installed_is_named_with_the_mend() -> None:
    with pytest.raises(launcher.LaunchError, match="apt install ros-jazzy-joint-publisher"):
        launcher.start([NodeSpec("a", "jsp", "joint_publisher")], output=io.StringIO())


def test_names_must_differ(toy) -> None:
    toy("a", "exit 0")
    with pytest.raises(launcher.LaunchError, match="same name"):
        launcher.start([NodeSpec("a", "a", "toys")] * 2, output=io.StringIO())


def test_parameters_and_names_reach_a_real_node(toy, tmp_path: Path) -> None:
    program = toy("node", "").parent / "lib" / "toys" / "node"
    program.write_text(
        "#!/usr/bin/env python3\n"
        "import json, rclpy\n"
        "rclpy.init()\n"
        "node = rclpy.create_node('x', automatically_declare_parameters_from_overrides=True)\n"
        "values = {n: p.value for n, p in node.get_parameters_by_prefix('').items()}\n"
        "values = {n: list(v) if n == 'texts' else v for n, v in values.items()}\n"
        "values['topic'] = node.resolve_topic_name('image_raw')\n"
        "values['self'] = node.get_fully_qualified_name()\n"
        "print(json.dumps(values), flush=True)\n"
    )
    file = tmp_path / "params.yaml"
    file.write_text("/**/camera:\n  ros__parameters:\n    rate: 5.0\n    number: 9\n")
    parameters = {
        "number": 4,
        "real": 2.0,
        "flag": True,
        "digits": "0",
        "word": "on",
        "path": 'a "quoted" ö: path',
        "texts": ["yes", "1"],
    }
    spec = NodeSpec(
        "camera",
        "node",
        "toys",
        namespace="line1",
        parameter_files=(str(file),),
        parameters=parameters,
        remappings={"image_raw": "/cam/image"},
    )
    output = io.StringIO()
    with launcher.start([spec], output=output) as nodes:
        assert wait_for(nodes.failed, 30)
    assert nodes.exit_codes == {"camera": 0}, output.getvalue()
    line = next(line for line in output.getvalue().splitlines() if line.startswith("[camera] {"))
    values = json.loads(line.removeprefix("[camera] "))
    expected = {**parameters, "rate": 5.0, "topic": "/cam/image", "self": "/line1/camera"}
    assert {name: values.get(name) for name in expected} == expected
