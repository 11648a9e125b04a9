"""Running out of memory in a way that can be told: which batch would have fitted."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

SHARE = 0.9
"""Of the memory that is free at the start, what a run may come to use."""

# torch has several ways to say it on a CPU; the last three are of its convolutions.
_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "could not create a primitive",
    "could not execute a primitive",
    "could not create a memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(m in str(error) for m in _MESSAGES)
    )


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Makes allocations fail that the machine cannot serve.

    Linux grants them all and then kills a process, so that nothing could be said about it. The
    limit is on the private memory of this process and, each for itself, of those it starts.
    """
    old, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _used() + int(SHARE * _free())
    if old != resource.RLIM_INFINITY:
        limit = min(limit, old)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (old, hard))


def release() -> None:
    """Gives memory that is free but held on to back to the machine, where the C library can."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _table(path: Path) -> dict[str, int]:
    """Whole numbers by name, of a file of lines "name: number kB" or "name number"."""
    pairs = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _used() -> int:
    return 1024 * _table(Path("/proc/self/status"))["VmData"]


def _free() -> int:
    """Bytes that can be had of the machine and of the control group, whichever has less."""
    machine = _table(Path("/proc/meminfo"))
    free = 1024 * (machine["MemAvailable"] + machine["SwapFree"])
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no version 2, no limit ("max")
        most = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        free = min(free, most - used + _table(group / "memory.stat")["inactive_file"])
    return max(0, free)
