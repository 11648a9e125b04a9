"""Files written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, making its folder if need be; what was there stays on failure.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk itself. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_png(path: Path, image: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
    """Write (H, W, 3) uint8 RGB, or (H, W) uint8 or uint16, as a PNG. Raises OSError."""
    done, data = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)
    if not done:
        raise OSError(f"{path}: cannot be encoded")
    write_file(path, data.tobytes())


def write_json(path: Path, value: Any) -> None:
    """Write plain values, NumPy's among them, as JSON; what is no number becomes null.

    Raises OSError.
    """
    write_file(path, (json.dumps(_plain(value), indent=2, allow_nan=False) + "\n").encode())


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
