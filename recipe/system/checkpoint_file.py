"""Checkpoint files: one .npz each, written atomically, with a checksum over all its bytes.

They are read without unpickling.
"""

import errno
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from recipe.errors import RunError
from recipe.system.arrays import Arrays
from recipe.system.files import whole_file
from recipe.system.output import warn

_META = "checkpoint.json"  # name of the description among the arrays
_DIGEST = 64  # hexadecimal digits of a SHA-256: the zip file's comment, its last bytes
_BLOCK = 2**20  # bytes that are hashed at a time
# The errors of a file system that has no fsync.
_NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)

_warned: set[str] = set()


class Checkpoint(NamedTuple):
    """What is in a checkpoint."""

    arrays: Arrays
    meta: dict[str, Any]  # the description


def write(path: Path, arrays: Arrays, meta: dict[str, Any]) -> None:
    """Write a checkpoint that appears under its name only when it is complete and on the disk.

    Raise OSError when that fails. A file of that name is then unchanged.
    """
    description = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    with whole_file(path, partial_of(path)) as file:
        np.savez(file, **(arrays | {_META: description}))  # type: ignore[arg-type]
        _append_digest(file)
        file.flush()
        _sync_file(file.fileno(), path)
    _sync_folder(path.parent)


def partial_of(path: Path) -> Path:
    """Return the name of a checkpoint while it is being written."""
    return path.with_name(f".{path.name}.partial")


def load(path: Path) -> Checkpoint:
    """Return what is in a checkpoint.

    Raise RunError when the file can't be read, or when a single bit of it has changed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} can't be read: {error.strerror}")

    # Verify the bytes before anything parses them.
    digest = hashlib.sha256(content[:-_DIGEST]).hexdigest()
    if digest.encode() != content[-_DIGEST:]:
        raise RunError(
            f"{path} is damaged: its {len(content)} bytes don't have the checksum they end with"
        )

    # The arrays, of which one is the rest as JSON.
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop(_META).tobytes())
        return Checkpoint(arrays, meta)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is not a checkpoint ({error})")


def warn_once(text: str) -> None:
    """Warn, unless the same warning has been given for another file.

    What follows " can't " says which warning it is: the file's name before it is left out.
    """
    kind = text.partition(" can't ")[2]
    if kind not in _warned:
        _warned.add(kind)
        warn(text)


def _append_digest(file: BinaryIO) -> None:
    """Let an .npz file end with the digest of the bytes before, as the zip file's comment."""
    # Reserve the digest's place, then fill it.
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"0" * _DIGEST
    size = file.seek(0, os.SEEK_END) - _DIGEST
    file.seek(0)
    digest = hashlib.sha256()
    while file.tell() < size:
        digest.update(file.read(min(size - file.tell(), _BLOCK)))
    file.write(digest.hexdigest().encode())


def _sync_file(descriptor: int, path: Path) -> None:
    """Bring a file to the disk. Warn when the file system has no fsync.

    Raise OSError when the disk is full or broken.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
        warn_once(
            f"{path} can't be brought to the disk at once: {error.strerror}; "
            "the run goes on without"
        )


def _sync_folder(folder: Path) -> None:
    """Make the new name durable. Warn when the file system can't."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        warn_once(
            f"{folder} can't be brought to the disk: {error.strerror}; the run goes on without"
        )
