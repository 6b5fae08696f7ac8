"""Checkpoints: one .npz file each, all arrays and a JSON description; written atomically, read without unpickling."""

import contextlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from recipe.errors import RunError

_META = "checkpoint.json"  # name of the description among the arrays


def save(folder: Path, epoch: int, arrays: dict[str, np.ndarray], meta: dict[str, Any], keep: int) -> Path:
    """Writes FOLDER/epoch-EEEE.npz and then removes all but the newest `keep`.

    The file appears under its name only when it is complete and on the disk. Raises RunError when that fails; the
    older checkpoints are then untouched."""
    path = folder / f"epoch-{epoch:04d}.npz"
    partial = folder / f".{path.name}.partial"
    description = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays, **{_META: description})
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunError(f"cannot write the checkpoint {path}: {error.strerror}; free space or rights, then --resume")
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the description of a checkpoint. Raises RunError for a file that is not a whole checkpoint
    (each array carries a CRC-32, which reading verifies)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop(_META).tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is not a whole checkpoint ({error}); delete it to resume from the one before")
    return arrays, meta


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("epoch-*.npz"))


def latest(folder: Path) -> Path:
    """The newest checkpoint. Raises RunError when there is none."""
    found = checkpoints(folder)
    if not found:
        raise RunError(f"{folder} holds no checkpoint yet")
    return found[-1]


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
