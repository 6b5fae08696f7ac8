"""Long work on a data set: in threads, with its progress, and files that are whole or not there."""

import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from tqdm import tqdm

A, B = TypeVar("A"), TypeVar("B")

EVERY = 30  # seconds between a log's lines


class Tally:
    """Images done, of `total`: a bar on a terminal, a line now and then in a log. add() may be called by any thread."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._began = self._said = time.monotonic()
        self._lock = threading.Lock()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=what, unit=" images", leave=False, smoothing=0) if terminal else None

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int = 1) -> None:
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(count)
            elif time.monotonic() - self._said >= EVERY:
                self._said = time.monotonic()
                self._say()

    def _say(self) -> None:
        rate = self._done / (self._said - self._began)
        left = tqdm.format_interval(max(0, self._total - self._done) / rate)
        share = f"{self._done:,} of {self._total:,} images"
        print(f"{self._what}: {share}, {rate:,.0f} images/s, {left} left", file=sys.stderr, flush=True)


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
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
