"""The checkpoints of a run: which are kept, which is the newest whole one, which are set aside."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recipe.errors import RunError
from recipe.system import checkpoint_file
from recipe.system.arrays import Arrays
from recipe.system.checkpoint_file import Checkpoint

_NAME = re.compile(r"step-([0-9]{8,})\.npz")
_PARTIAL = re.compile(r"\.step-[0-9]{8,}\.npz\.partial")


def save(
    folder: Path, step: int, arrays: Arrays, meta: dict[str, Any], keep: int, keep_every: int = 0
) -> Path:
    """Write FOLDER/step-SSSSSSSS.npz, the state after so many steps, and remove old checkpoints.

    The newest `keep` stay, and those of every `keep_every` steps (0: none of these). The file
    appears under its name only when it is complete and on the disk. Raise RunError when that fails.
    The older checkpoints are then untouched.
    """
    # Write the new one, without what a kill has left of another.
    path = folder / name_of(step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for partial in unfinished(folder):
            _remove(partial)
        checkpoint_file.write(path, arrays, meta)
    except OSError as error:
        raise RunError(
            f"cannot write the checkpoint {path}: {error.strerror}; free space or rights, then "
            "--resume"
        )

    # Remove old ones.
    for old in checkpoints(folder)[:-keep]:
        is_kept_for_good = keep_every and step_of(old) % keep_every == 0
        if old != path and not is_kept_for_good:
            _remove(old)
    return path


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, None when there are none.

    Call `warn` for each newer, damaged one. Raise RunError when there are some and all are damaged.
    """
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            return checkpoint_file.load(path)
        except RunError as error:
            warn(f"{error}; falling back to the checkpoint before it")
    if paths:
        raise RunError(
            f"no checkpoint in {folder} is whole; restore one from a copy, or train in a new "
            "directory"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, by the names that `save` gives."""
    paths = [path for path in _files(folder, _NAME) if path.name == name_of(step_of(path))]
    return sorted(paths, key=step_of)


def unfinished(folder: Path) -> list[Path]:
    """Return what a kill in the middle of a save has left."""
    return _files(folder, _PARTIAL)


def set_aside(paths: Iterable[Path]) -> None:
    """Rename checkpoints to aside-step-SSSSSSSS.npz: no longer the run's, left to the user.

    Raise RunError when one can't be renamed.
    """
    for path in paths:
        names = [f"aside-{path.name}", *(f"aside-{n}-{path.name}" for n in range(2, 1000))]
        unused = next(name for name in names if not os.path.lexists(path.with_name(name)))
        try:
            path.rename(path.with_name(unused))
        except OSError as error:
            raise RunError(
                f"{path} can't be renamed: {error.strerror}; get the rights to, then --resume"
            )


def name_of(step: int) -> str:
    """Return the file name of the checkpoint after so many steps."""
    return f"step-{step:08d}.npz"


def step_of(path: Path) -> int:
    """Return the number of steps before a checkpoint."""
    return int(path.stem.removeprefix("step-"))


def _files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return the files of a folder with such names; none where there is no folder.

    Raise RunError when the folder can't be read.
    """
    try:
        with os.scandir(folder) as entries:
            files = [
                entry for entry in entries if pattern.fullmatch(entry.name) and entry.is_file()
            ]
        return [Path(entry.path) for entry in files]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"{folder} can't be read: {error.strerror}")


def _remove(path: Path) -> None:
    """Remove a file where that is possible. The run does without the room."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        checkpoint_file.warn_once(
            f"{path} can't be removed: {error.strerror}; the run goes on beside it"
        )
