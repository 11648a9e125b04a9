"""What ./sorter says on a machine where something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
NEEDED = (
    "awk bash cat cut df dirname env find flock g++ git grep make cmake mkdir mv rm sed sha256sum "
    "sort tail tee touch tr uname"
)
NO_INDEX = {
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_RETRIES": "0",
}


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs ./sorter setup in a fresh checkout with some programs changed.

    fakes: program name to its script, or to None where it is not installed. No index is in reach.
    """
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for file in (CHECKOUT / "sorter", *CHECKOUT.glob("requirements*")):
        shutil.copy(file, checkout)
    programs = tmp_path / "bin"
    programs.mkdir()

    def run(
        fakes: dict[str, str | None] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        fakes = fakes or {}
        python = shutil.which("python3")
        wanted = {name: shutil.which(name) for name in NEEDED.split()} | {"python3": python}
        for name, path in wanted.items():
            assert path, f"{name} is needed to run this test"
            if name not in fakes:
                (programs / name).symlink_to(path)
        for name, script in fakes.items():
            if script is not None:
                (programs / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
                (programs / name).chmod(0o755)
        return subprocess.run(
            [checkout / "sorter", "setup"],
            env={"PATH": str(programs), "HOME": str(tmp_path), **NO_INDEX},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.mark.parametrize("program", ["g++", "cmake", "make", "git"])
def test_a_missing_program_is_named_with_the_mend(machine, program: str) -> None:
    result = machine({program: None})
    assert result.returncode == 1
    assert f"missing: {program}\n" in result.stderr
    assert f"apt-get install {program}\n" in result.stderr


def test_all_that_is_missing_is_named_at_once(machine) -> None:
    result = machine({"g++": None, "cmake": None})
    assert "apt-get install g++ cmake\n" in result.stderr


def test_an_old_cmake_is_named(machine) -> None:
    result = machine({"cmake": "echo cmake version 3.16.3"})
    assert result.returncode == 1
    assert "cmake is 3.16.3; 3.20 or newer" in result.stderr


@pytest.mark.parametrize("python", [None, "echo 3.10"])
def test_without_a_fitting_python_it_points_to_apt(machine, python: str | None) -> None:
    result = machine({"python3": python})
    assert result.returncode == 1
    assert "Python 3.11 or 3.12 is missing" in result.stderr
    assert ("3.10" if python else "absent") in result.stderr
    assert "apt" in result.stderr and "README.md" in result.stderr


def test_on_another_processor_it_points_to_apt(machine) -> None:
    result = machine({"uname": "case $1 in -m) echo aarch64 ;; *) echo Linux ;; esac"})
    assert result.returncode == 1
    assert "aarch64" in result.stderr
    assert "apt" in result.stderr and "README.md" in result.stderr


@pytest.mark.parametrize(("absent", "package"), [("ensurepip", "venv"), ("pathlib.Path", "dev")])
def test_a_python_in_parts_is_named(machine, absent: str, package: str) -> None:
    """Debian packages venv and the headers apart."""
    python = shutil.which("python3")
    fake = (
        f'case "$*" in *_base_executable*) echo "$0" ;; *{absent}*) exit 1 ;; '
        f'*) exec "{python}" "$@" ;; esac'
    )
    result = machine({"python3": fake})
    assert result.returncode == 1
    assert f"-{package}\n" in result.stderr
    assert "apt-get install python3.1" in result.stderr


def test_a_full_disk_is_named(machine) -> None:
    result = machine({"df": "echo header; echo /dev/x 1000 900 100 90% /"})
    assert result.returncode == 1
    assert "100 MB free" in result.stderr


def test_an_unreachable_index_is_named_and_leaves_nothing_half_done(
    machine, tmp_path: Path
) -> None:
    result = machine()
    assert result.returncode == 1
    assert "pip could not install requirements.lock" in result.stderr
    assert "check the network" in result.stderr
    assert not (tmp_path / "checkout/.sorter/base.done").exists()
    assert not (tmp_path / "checkout/.sorter/installing").exists()
