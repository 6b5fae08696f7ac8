"""Checkpoints: one .npz file each, with a checksum over all its bytes; written atomically, read without unpickling."""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recipe.errors import RunError
from recipe.system.output import warn

_META = "checkpoint.json"  # name of the description among the arrays
_DIGEST = 64  # hexadecimal digits of a SHA-256: the zip file's comment, its last bytes
_NAME = re.compile(r"step-([0-9]{8,})\.npz")
_PARTIAL = re.compile(r"\.step-[0-9]{8,}\.npz\.partial")
# What a file system says that has no order to bring a file to the disk.
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)

_warned: set[str] = set()


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
        write(path, arrays, meta)
    except OSError as error:
        raise RunError(
            f"cannot write the checkpoint {path}: {error.strerror}; free space or rights, then --resume"
        )
    for old in checkpoints(folder)[:-keep]:
        if old != path and (not keep_every or step_of(old) % keep_every):
            _remove(old)
    return path


def write(path: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Writes one checkpoint, which appears under its name only when it is complete and on the disk.

    Raises OSError when that fails; a file of that name is then untouched."""
    partial = partial_of(path)
    try:
        _write(partial, arrays | {_META: np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)})
        partial.replace(path)
        _sync(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def partial_of(path: Path) -> Path:
    """What a checkpoint is called while it is being written."""
    return path.with_name(f".{path.name}.partial")


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the description of a checkpoint. Raises RunError for a file of which a single bit has changed."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} can't be read: {error.strerror}")
    if hashlib.sha256(content[:-_DIGEST]).hexdigest().encode() != content[-_DIGEST:]:
        raise RunError(
            f"{path} is damaged: its {len(content)} bytes don't have the checksum they end with"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(arrays.pop(_META).tobytes())
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is not a checkpoint ({error})")


def newest(
    folder: Path, warn: Callable[[str], None]
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The newest checkpoint that is whole, None when there are none; `warn` is told of each newer, damaged one.

    Raises RunError when there are some and all are damaged."""
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            return load(path)
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


def set_aside(paths: list[Path]) -> None:
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


def digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and values, in hexadecimal."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz file that ends with the digest of what comes before."""
    with path.open("w+b") as file:
        np.savez(file, **arrays)
        with zipfile.ZipFile(file, "a") as archive:
            archive.comment = b"0" * _DIGEST
        file.seek(0)
        content = hashlib.sha256()
        left = os.fstat(file.fileno()).st_size - _DIGEST
        while left:
            block = file.read(min(left, 1 << 20))
            content.update(block)
            left -= len(block)
        file.write(content.hexdigest().encode())
        file.flush()
        _to_disk(file.fileno(), path)


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
        _warn_once(f"{path} can't be removed: {error.strerror}; the run goes on beside it")


def _sync(folder: Path) -> None:
    """Makes the rename itself durable, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        _warn_once(
            f"{folder} can't be brought to the disk: {error.strerror}; the run goes on without"
        )
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        _warn_once(
            f"{folder} can't be brought to the disk: {error.strerror}; the run goes on without"
        )
    finally:
        os.close(descriptor)


def _to_disk(descriptor: int, path: Path) -> None:
    """Raises OSError when the disk is full or broken, and not when the file system has no such order."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        _warn_once(
            f"{path} can't be brought to the disk at once: {error.strerror}; the run goes on without"
        )


def _warn_once(text: str) -> None:
    """One warning of a kind: the file's name, of which there will be more, is no part of the kind."""
    kind = text.partition(" can't ")[2]
    if kind not in _warned:
        _warned.add(kind)
        warn(text)
