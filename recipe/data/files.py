"""Files of a shared file system: read with patience while it is out of reach, and never after they have changed."""

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

DELAYS = (
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    4.0,
    7.0,
    7.0,
    8.0,
)  # seconds between attempts, half a minute in all
PASSING = (
    frozenset(  # what a network file system says while a server is away, restarts or fails over
        (
            *(
                errno.EIO,
                errno.ESTALE,
                errno.ENOENT,
                errno.ETIMEDOUT,
                errno.EAGAIN,
                errno.EREMOTEIO,
                errno.ESHUTDOWN,
            ),
            *(errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED),
            *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
        )
    )
)
CHANGED = "the file has changed during the run; put back what was there and resume the run"

_warned: set[str] = set()
_lock = threading.Lock()


def patiently(path: str, action: Callable[[], T]) -> T:
    """The result of action(), tried again for half a minute while `path` is out of reach; then its last OSError."""
    for delay in DELAYS:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            _warn(path, error)
            time.sleep(delay)
    return action()


def open_file(path: str) -> int:
    """Opens a file for reading, with patience."""
    return patiently(path, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def read_at(path: str, fd: int, start: int, count: int) -> tuple[bytes, tuple[int, int]]:
    """(up to `count` bytes from `start`, state()) of the open file, which is opened anew, as the same `fd`, when that
    fails."""
    try:
        return os.pread(fd, count, start), state(fd)
    except OSError as error:
        if error.errno not in PASSING:
            raise
        _warn(path, error)
    return patiently(path, lambda: _read_anew(path, fd, start, count))


def state(fd: int) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of an open file: when one differs, the file is another."""
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns


def _read_anew(path: str, fd: int, start: int, count: int) -> tuple[bytes, tuple[int, int]]:
    """A handle can stay stale when its file is back."""
    new = os.open(path, os.O_RDONLY)
    try:
        os.dup2(new, fd, inheritable=False)
    finally:
        os.close(new)
    return os.pread(fd, count, start), state(fd)


def _warn(path: str, error: OSError) -> None:
    with _lock:
        if path in _warned:
            return
        _warned.add(path)
    seconds = f"{sum(DELAYS):.0f} s"
    print(
        f"warning: {path} can't be read ({error.strerror}): trying for {seconds}",
        file=sys.stderr,
        flush=True,
    )
