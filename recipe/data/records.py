"""Records of TFRecord files: where they begin, scanned once and kept beside them, for access by number; checksums."""

import contextlib
import functools
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from recipe.data import files
from recipe.data.work import whole_file
from recipe.errors import RunError
from recipe.system import watchdog

LENGTH = struct.Struct("<Q")  # the first 8 bytes of a record
CHECK = struct.Struct("<I")  # a checksum
HEAD, TAIL = (
    12,
    4,
)  # bytes of a record before and after its content: length and its checksum; the content's checksum


def read_index(paths: Sequence[str], cache: Path) -> dict[str, np.ndarray]:
    """For each file, int64[records + 1]: the positions where its records begin, and its end, in bytes.

    A scan takes 2 µs a record when the file system is warm, but each record's head is a random read when it is not,
    which on a shared file system can mean minutes for ImageNet. So the result is kept in `cache`, an .npz file of
    8 bytes a record, as long as the files' names and sizes stay the same. Raises RunError on a truncated or unreadable
    file."""
    stored = _load(cache)
    try:
        if stored.keys() == set(paths) and all(
            stored[path][-1] == Path(path).stat().st_size for path in paths
        ):
            return stored
    except OSError as error:
        raise RunError(unreadable(error.filename, error)) from None
    index = {path: scan(path) for path in paths}
    _save(index, cache)
    return index


def scan(path: str) -> np.ndarray:
    """int64[records + 1]: where each record of a TFRecord file begins, and the file's end, in bytes.

    Raises RunError on a truncated or unreadable file."""
    watchdog.beat()
    try:
        return files.patiently(path, functools.partial(_scan, path))
    except OSError as error:
        raise RunError(unreadable(path, error)) from None


def unreadable(path: str, error: OSError) -> str:
    """What to do about a file that is there and can't be read."""
    return f"{path} can't be read: {error.strerror}: mend the link or its permissions"


def _scan(path: str) -> np.ndarray:
    fd = os.open(path, os.O_RDONLY)
    try:
        end, positions = os.fstat(fd).st_size, [0]
        while positions[-1] + HEAD <= end:
            (length,) = LENGTH.unpack(os.pread(fd, LENGTH.size, positions[-1]))
            positions.append(positions[-1] + HEAD + length + TAIL)
    finally:
        os.close(fd)
    if positions[-1] != end:
        raise RunError(f"{path} is truncated or damaged: copy or prepare it again")
    return np.array(positions, dtype=np.int64)


def content(block: bytes) -> bytes:
    """What is in a whole record. Raises ValueError when it is none or its checksums are others."""
    if len(block) < HEAD + TAIL or length(block) != len(block) - HEAD - TAIL:
        raise ValueError("no record has this place and length")
    data = block[HEAD:-TAIL]
    if checksum(data) != block[-TAIL:]:
        raise ValueError("its checksum is not that of its bytes")
    return data


def length(head: bytes) -> int:
    """The bytes of a record's content, from its head. Raises ValueError when its checksum is another."""
    if checksum(head[: LENGTH.size]) != head[LENGTH.size : HEAD]:
        raise ValueError("the checksum of its length is not that of its bytes")
    return LENGTH.unpack_from(head)[0]


def record(data: bytes) -> bytes:
    """The record with this content; content()'s inverse."""
    head = LENGTH.pack(len(data))
    return b"".join((head, checksum(head), data, checksum(data)))


def checksum(data: bytes) -> bytes:
    """CRC32C, rotated and shifted as TFRecords have it."""
    crc = google_crc32c.value(data)
    return CHECK.pack(((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _load(cache: Path) -> dict[str, np.ndarray]:
    """A kept index; nothing when there is none or it can't be read."""
    try:
        with np.load(cache) as stored:
            parts = np.split(stored["positions"], np.cumsum(stored["counts"])[:-1])
            return {
                str(cache.parent / name): part
                for name, part in zip(stored["names"], parts, strict=True)
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def _save(index: dict[str, np.ndarray], cache: Path) -> None:
    """All or nothing; nothing, too, where this user may not write: then every start scans."""
    arrays = {
        "names": np.array([Path(path).name for path in index]),
        "counts": np.array([len(positions) for positions in index.values()]),
        "positions": np.concatenate(list(index.values())),
    }
    with contextlib.suppress(OSError), whole_file(cache) as file:
        np.savez(file, **arrays)
