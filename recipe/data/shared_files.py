"""Files of a shared file system: read with patience while out of reach, never after a change."""

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from recipe.system import output

T = TypeVar("T")

# Seconds between two attempts, half a minute in all.
DELAYS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 7.0, 7.0, 8.0)
# What a network file system says while a server is away, restarts or fails over.
PASSING_ERRORS = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOENT,
        errno.ENOTCONN,
        errno.EREMOTEIO,
        errno.ESHUTDOWN,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
CHANGED = "the file has changed during the run; put back what was there and resume the run"

_warned_paths: set[str] = set()
_lock = threading.Lock()


class FileState(NamedTuple):
    """What tells a file from the file that it was: when one of them differs, it is another."""

    size: int  # bytes
    changed: int  # time of the last change, ns


class Block(NamedTuple):
    """Bytes of a file, and its state after they were read."""

    content: bytes
    state: FileState


def patiently(path: str, action: Callable[[], T]) -> T:
    """Return the result of `action`, and try for half a minute while `path` is out of reach.

    Raise the OSError of the last attempt.
    """
    for delay in DELAYS:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING_ERRORS:
                raise
            _warn(path, error)
            time.sleep(delay)
    return action()


def open_file(path: str) -> int:
    """Open a file for reading, with patience, and return its descriptor."""
    return patiently(path, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def read_at(path: str, descriptor: int, start: int, count: int) -> Block:
    """Read up to `count` bytes from `start` of an open file.

    When that fails, open the file again as the same descriptor, with patience.
    """
    try:
        return Block(os.pread(descriptor, count, start), state(descriptor))
    except OSError as error:
        if error.errno not in PASSING_ERRORS:
            raise
        _warn(path, error)
    return patiently(path, lambda: _read_again(path, descriptor, start, count))


def read_whole(path: str) -> Block:
    """Read all of a file, with patience."""
    return patiently(path, lambda: _read_whole(path))


def state(descriptor: int) -> FileState:
    """Return the state of an open file."""
    status = os.fstat(descriptor)
    return FileState(status.st_size, status.st_mtime_ns)


def _read_again(path: str, descriptor: int, start: int, count: int) -> Block:
    """Open the file anew and read: a descriptor can stay stale when its file is back."""
    new = os.open(path, os.O_RDONLY)
    try:
        os.dup2(new, descriptor, inheritable=False)
    finally:
        os.close(new)
    return Block(os.pread(descriptor, count, start), state(descriptor))


def _read_whole(path: str) -> Block:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        before = state(descriptor)
        return Block(os.pread(descriptor, before.size, 0), before)
    finally:
        os.close(descriptor)


def _warn(path: str, error: OSError) -> None:
    """Warn once of each path."""
    with _lock:
        if path in _warned_paths:
            return
        _warned_paths.add(path)
    seconds = f"{sum(DELAYS):.0f} s"
    output.warn(f"{path} can't be read ({error.strerror}): trying for {seconds}")
