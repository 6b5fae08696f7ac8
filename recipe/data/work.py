"""Long work on a data set: in threads, with its progress, and files that are whole or not there."""

import contextlib
import errno
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from tqdm import tqdm

from recipe.system import output, ticking, watchdog

A, B = TypeVar("A"), TypeVar("B")

TOKEN = 8  # random hexadecimal digits in the name of a file that isn't whole yet


class Tally:
    """Images done, of `total`: a bar on a terminal, a line now and then in a log. add() may be called by any thread."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._began = self._said = time.monotonic()
        self._lock = threading.Lock()
        self._bar = None
        if ticking.is_terminal():
            size = {"ncols": ticking.columns(), "nrows": 24}  # a terminal may say that it has none
            self._bar = tqdm(
                total=total, desc=what, unit=" images", leave=False, smoothing=0, **size
            )
        self._ticks = contextlib.ExitStack()

    def __enter__(self) -> "Tally":
        self._ticks.enter_context(ticking.every(ticking.TERMINAL, self._tick))
        return self

    def __exit__(self, *_: object) -> None:
        self._ticks.close()
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int = 1) -> None:
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(count)

    def _tick(self) -> None:
        """Also where no image is done for a while."""
        with self._lock:
            if self._bar is not None:
                self._bar.refresh()
            elif time.monotonic() - self._said >= ticking.LOG:
                self._said = time.monotonic()
                self._say()

    def _say(self) -> None:
        rate = self._done / (self._said - self._began)
        left = (
            f"{tqdm.format_interval(max(0, self._total - self._done) / rate)} left"
            if rate
            else "not one yet"
        )
        output.say(
            f"{self._what}: {self._done:,} of {self._total:,} images, {rate:,.0f} images/s, {left}"
        )


@contextlib.contextmanager
def telling(what: str | Callable[[], str]) -> Iterator[None]:
    """Signs of life of long work, by one rank only."""
    with contextlib.nullcontext() if watchdog.launched_rank() != "0" else ticking.ticking(what):
        yield


def in_threads(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """function(item) for each, in order. After an error nothing more is begun, and what is begun is waited for."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when all of it is on the disk."""
    name = path.with_name(f".{path.name}-{secrets.token_hex(TOKEN // 2)}")
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # less the umask
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            _to_disk(file.fileno())
        name.replace(path)
    finally:
        name.unlink(missing_ok=True)


def leftovers(folder: Path, name: str) -> list[Path]:
    """What killed processes have left of whole_file(FOLDER/…) for files whose names match the regular expression."""
    pattern = re.compile(rf"\.{name}-[0-9a-f]{{{TOKEN}}}")
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]


def _to_disk(fd: int) -> None:
    """Raises OSError when the disk is full or broken, and not when the file system has no such order."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
