"""Checkpoints: one .npz file each, with a checksum over all its bytes; written atomically, read without unpickling."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from recipe.errors import RunError
from recipe.system import checkpoint_file
from recipe.system.checkpoint_file import Checkpoint

_NAME = re.compile(r"step-([0-9]{8,})\.npz")
_PARTIAL = re.compile(r"\.step-[0-9]{8,}\.npz\.partial")


def save(
    folder: Path,
    step: int,
    arrays: dict[str, np.ndarray],
    meta: dict[str, Any],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Writes FOLDER/step-SSSSSSSS.npz, the state after so many steps, and then removes all but the newest `keep` and
    those of every `keep_every` steps (0: none of these).

    The file appears under its name only when it is complete and on the disk. Raises RunError when that fails; the
    older checkpoints are then untouched."""
    path = folder / name_of(step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        checkpoint_file.write(path, arrays, meta)
    except OSError as error:
        raise RunError(
            f"cannot write the checkpoint {path}: {error.strerror}; free space or rights, then --resume"
        )
    for old in checkpoints(folder)[:-keep]:
        if old != path and (not keep_every or step_of(old) % keep_every):
            _remove(old)
    return path


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, None when there are none; `warn` is told of each newer, damaged one.

    Raises RunError when there are some and all are damaged."""
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            return checkpoint_file.load(path)
        except RunError as error:
            warn(f"{error}; falling back to the checkpoint before it")
    if paths:
        raise RunError(
            f"no checkpoint in {folder} is whole; restore one from a copy, or train in a new directory"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first: files of the very names that `save` writes, and no others."""
    return sorted(
        (path for path in _listed(folder, _NAME) if path.name == name_of(step_of(path))),
        key=step_of,
    )


def unfinished(folder: Path) -> list[Path]:
    """What a kill in the middle of a save has left."""
    return _listed(folder, _PARTIAL)


def set_aside(paths: Iterable[Path]) -> None:
    """Takes checkpoints out of the way of the run, but leaves them to the user, as aside-step-SSSSSSSS.npz.

    Raises RunError when one can't be renamed."""
    for path in paths:
        names = (f"aside-{path.name}", *(f"aside-{n}-{path.name}" for n in range(2, 1000)))
        try:
            path.rename(
                next(aside for name in names if not os.path.lexists(aside := path.with_name(name)))
            )
        except OSError as error:
            raise RunError(
                f"{path} can't be renamed: {error.strerror}; get the rights to, then --resume"
            )


def name_of(step: int) -> str:
    """The file name of the checkpoint after so many steps."""
    return f"step-{step:08d}.npz"


def step_of(path: Path) -> int:
    """The number of steps before a checkpoint."""
    return int(path.stem.removeprefix("step-"))


def _listed(folder: Path, pattern: re.Pattern) -> list[Path]:
    """The files of a folder with such names; none where there is no folder. Raises RunError when it can't be read."""
    try:
        with os.scandir(folder) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if pattern.fullmatch(entry.name) and entry.is_file()
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"{folder} can't be read: {error.strerror}")


def _clean(folder: Path) -> None:
    for partial in unfinished(folder):
        _remove(partial)


def _remove(path: Path) -> None:
    """The run does without the room, where it can."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        checkpoint_file.warn_once(
            f"{path} can't be removed: {error.strerror}; the run goes on beside it"
        )
