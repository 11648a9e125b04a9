"""The command waste-seg."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from waste_seg_ros import cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "waste_seg_ros.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", [name for name, _, _ in cli.COMMANDS])
def test_every_command_explains_itself(name: str) -> None:
    result = run(name, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: waste-seg {name}")


def test_help_lists_all_commands_and_imports_none() -> None:
    script = (
        "import sys; from waste_seg_ros import cli\n"
        "try: cli.main(['--help'])\n"
        "finally: print('loaded', {'torch', 'rclpy', 'cv2'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "loaded set()" in result.stdout
    for name, _, summary in cli.COMMANDS:
        assert name in result.stdout
        assert summary.split()[0] in result.stdout


def test_a_command_that_does_not_exist_is_refused() -> None:
    result = run("sort")
    assert result.returncode == 2
    assert "sort" in result.stderr and "demo" in result.stderr


@pytest.mark.parametrize(
    ("module", "mend"),
    [
        ("torch", "pip install torch"),
        ("cv2", "pip install opencv-python-headless"),
        ("rclpy", "source ROS 2"),
        ("sensor_msgs", "source ROS 2"),
        ("waste_seg_ros.msg", "colcon build"),
    ],
)
def test_what_is_not_installed_is_named_with_the_mend_in_one_line(module: str, mend: str) -> None:
    script = (
        "import sys\n"
        f"class Without:\n"
        f"    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise ModuleNotFoundError(name, name=name)\n"
        f"sys.meta_path.insert(0, Without())\n"
        f"import types; room = types.ModuleType('room')\n"
        f"room.add_arguments = lambda parser: None\n"
        f"room.run = lambda args: __import__({module!r})\n"
        f"sys.modules['room'] = room\n"
        "from waste_seg_ros import cli\n"
        "cli.COMMANDS = (('go', 'room', 'go'),)\n"
        "sys.exit(cli.main(['go']))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert module.partition(".")[0] in line
    assert mend in line


def test_sizes_and_names_are_read() -> None:
    assert cli.as_size("320x240") == cli.as_size("320X240") == (320, 240)
    for text in ("320", "320x", "x", "0x240", "-3x4", "3.5x4", "1x2x3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not WIDTHxHEIGHT"):
            cli.as_size(text)
    assert cli.as_names(" paper, traffic light,,") == ("paper", "traffic light")
