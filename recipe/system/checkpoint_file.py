"""Files of named arrays with a description: one .npz each, written atomically, with a checksum.

The checksum is over all the bytes before it. No file is unpickled. Checkpoints are such files.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recipe.errors import RunError
from recipe.system.arrays import Arrays
from recipe.system.output import warn

_META = "checkpoint.json"  # name of the description among the arrays
_DIGEST = 64  # hexadecimal digits of a SHA-256: the zip file's comment, its last bytes
_BLOCK = 1 << 20  # bytes that are hashed at once
# The errors of a file system that has no fsync.
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)

_warned: set[str] = set()


def write(path: Path, arrays: Arrays, meta: dict[str, Any]) -> None:
    """Write a file that appears under its name only when it is complete and on the disk.

    Raise OSError when that fails. A file of that name is then unchanged.
    """
    partial = partial_of(path)
    description = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    try:
        _write(partial, arrays | {_META: description})
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def partial_of(path: Path) -> Path:
    """Return the name of a file while it is being written."""
    return path.with_name(f".{path.name}.partial")


def load(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Return a file's arrays and its description.

    Raise RunError when the file can't be read, or when a single bit of it has changed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} can't be read: {error.strerror}")

    # Verify the bytes before anything parses them.
    checksum = hashlib.sha256(content[:-_DIGEST]).hexdigest().encode()
    if checksum != content[-_DIGEST:]:
        raise RunError(
            f"{path} is damaged: its {len(content)} bytes don't have the checksum they end with"
        )

    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(arrays.pop(_META).tobytes())
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is not a checkpoint ({error})")


def _write(path: Path, arrays: Arrays) -> None:
    """Write an .npz file that ends with the digest of the bytes before it."""
    with path.open("w+b") as file:
        # Reserve the digest's place: the zip file's comment is its last bytes.
        np.savez(file, **arrays)  # type: ignore[arg-type]  # an array's name is no option
        with zipfile.ZipFile(file, "a") as archive:
            archive.comment = b"0" * _DIGEST
        # Fill it with the digest of everything before.
        file.seek(0)
        file.write(_digest_but_end(file).encode())
        file.flush()
        _sync_file(file.fileno(), path)


def _digest_but_end(file: BinaryIO) -> str:
    """Return the digest of a file's bytes before its last _DIGEST, where the position then is."""
    digest = hashlib.sha256()
    remaining = os.fstat(file.fileno()).st_size - _DIGEST
    while remaining:
        block = file.read(min(remaining, _BLOCK))
        digest.update(block)
        remaining -= len(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the file system can; warn where it can't."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        _warn_unsynced(folder, error)
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        _warn_unsynced(folder, error)
    finally:
        os.close(descriptor)


def _warn_unsynced(folder: Path, error: OSError) -> None:
    warn_once(f"{folder} can't be brought to the disk: {error.strerror}; the run goes on without")


def _sync_file(descriptor: int, path: Path) -> None:
    """Raise OSError when the disk is full or broken, but only warn when there is no fsync."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        warn_once(
            f"{path} can't be brought to the disk at once: {error.strerror}; "
            "the run goes on without"
        )


def warn_once(text: str) -> None:
    """Warn, unless the same warning has been given for another file.

    What follows " can't " says which warning it is: the file's name before it is left out.
    """
    kind = text.partition(" can't ")[2]
    if kind not in _warned:
        _warned.add(kind)
        warn(text)
