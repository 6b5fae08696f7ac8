"""Files of named arrays with a description: one .npz each, written atomically, with a checksum over all its bytes.

They are read without unpickling. Checkpoints are such files.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipe.errors import RunError
from recipe.system.arrays import Arrays
from recipe.system.output import warn

_META = "checkpoint.json"  # name of the description among the arrays
_DIGEST = 64  # hexadecimal digits of a SHA-256: the zip file's comment, its last bytes
# What a file system says that has no order to bring a file to the disk.
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)

_warned: set[str] = set()


class Checkpoint(NamedTuple):
    """What is in a checkpoint."""

    arrays: Arrays
    meta: dict[str, Any]  # the description


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


def load(path: Path) -> Checkpoint:
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
        meta = json.loads(arrays.pop(_META).tobytes())
        return Checkpoint(arrays, meta)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is not a checkpoint ({error})")


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


def _sync(folder: Path) -> None:
    """Makes the rename itself durable, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        warn_once(
            f"{folder} can't be brought to the disk: {error.strerror}; the run goes on without"
        )
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        warn_once(
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
        warn_once(
            f"{path} can't be brought to the disk at once: {error.strerror}; the run goes on without"
        )


def warn_once(text: str) -> None:
    """One warning of a kind: the file's name, of which there will be more, is no part of the kind."""
    kind = text.partition(" can't ")[2]
    if kind not in _warned:
        _warned.add(kind)
        warn(text)
