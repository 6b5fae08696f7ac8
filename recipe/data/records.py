"""TFRecord files: where their records begin, found once and kept beside them, and the checksums."""

import contextlib
import functools
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from recipe.data import shared_files
from recipe.errors import RunError
from recipe.system import watchdog
from recipe.system.files import whole_file

LENGTH = struct.Struct("<Q")  # the first 8 bytes of a record
CHECKSUM = struct.Struct("<I")
HEAD = 12  # bytes of a record before its content: the content's length and the length's checksum
TAIL = 4  # bytes of a record after its content: the content's checksum

Positions = dict[str, np.ndarray]  # int64[records + 1] of each file


def read_index(paths: Sequence[str], cache: Path) -> Positions:
    """Return for each file int64[records + 1]: where its records begin, and its end, in bytes.

    A scan takes 2 µs a record when the file system is warm. When it is not, each record's head is a
    random read, which on a shared file system can mean minutes for ImageNet. So the positions are
    kept in `cache`, an .npz file of 8 bytes a record, as long as the files' names and sizes stay
    the same. Raise RunError on a truncated or unreadable file.
    """
    stored = _load(cache)
    try:
        if stored.keys() == set(paths) and _have_same_sizes(stored):
            return stored
    except OSError as error:
        raise RunError(unreadable(error.filename, error)) from None
    index = {path: scan(path) for path in paths}
    _save(index, cache)
    return index


def scan(path: str) -> np.ndarray:
    """Return int64[records + 1]: where each record of a TFRecord file begins, and the file's end.

    Raise RunError on a truncated or unreadable file.
    """
    watchdog.beat()
    try:
        return shared_files.patiently(path, functools.partial(_scan, path))
    except OSError as error:
        raise RunError(unreadable(path, error)) from None


def unreadable(path: str, error: OSError) -> str:
    """Say what to do about a file that is there and can't be read."""
    return f"{path} can't be read: {error.strerror}: mend the link or its permissions"


def content(block: bytes) -> bytes:
    """Return the payload of a whole record.

    Raise ValueError when the record is malformed or a checksum does not match.
    """
    if len(block) < HEAD + TAIL or length(block) != len(block) - HEAD - TAIL:
        raise ValueError("no record has this place and length")
    data = block[HEAD:-TAIL]
    if checksum(data) != block[-TAIL:]:
        raise ValueError("its checksum is not that of its bytes")
    return data


def length(head: bytes) -> int:
    """Return the bytes of a record's payload, from its head.

    Raise ValueError when the checksum of the length does not match.
    """
    if checksum(head[: LENGTH.size]) != head[LENGTH.size : HEAD]:
        raise ValueError("the checksum of its length is not that of its bytes")
    return LENGTH.unpack_from(head)[0]


def record(data: bytes) -> bytes:
    """Return the record with this payload, the inverse of `content`."""
    head = LENGTH.pack(len(data))
    return b"".join((head, checksum(head), data, checksum(data)))


def checksum(data: bytes) -> bytes:
    """Return the CRC32C, rotated and shifted as in TFRecords."""
    crc = google_crc32c.value(data)
    rotated = crc >> 15 | crc << 17
    return CHECKSUM.pack((rotated + 0xA282EAD8) & 0xFFFFFFFF)


def _scan(path: str) -> np.ndarray:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end = os.fstat(descriptor).st_size
        positions = [0]
        while positions[-1] + HEAD <= end:
            (length,) = LENGTH.unpack(os.pread(descriptor, LENGTH.size, positions[-1]))
            positions.append(positions[-1] + HEAD + length + TAIL)
    finally:
        os.close(descriptor)
    if positions[-1] != end:
        raise RunError(f"{path} is truncated or damaged: copy or prepare it again")
    return np.array(positions, dtype=np.int64)


def _have_same_sizes(index: Positions) -> bool:
    return all(positions[-1] == Path(path).stat().st_size for path, positions in index.items())


def _load(cache: Path) -> Positions:
    """Return the kept index, or nothing when there is none or it can't be read."""
    try:
        with np.load(cache) as stored:
            ends = np.cumsum(stored["counts"])[:-1]
            paths = [str(cache.parent / name) for name in stored["names"]]
            return dict(zip(paths, np.split(stored["positions"], ends), strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def _save(index: Positions, cache: Path) -> None:
    """Keep an index where this user may write. Elsewhere every start scans the files again."""
    names = np.array([Path(path).name for path in index])
    counts = np.array([len(positions) for positions in index.values()])
    positions = np.concatenate(list(index.values()))
    with contextlib.suppress(OSError), whole_file(cache) as file:
        np.savez(file, names=names, counts=counts, positions=positions)
