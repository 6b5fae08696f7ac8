"""One installation at a time: a lock on a file.

The kernel releases it when its holders are gone, however they ended.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[int]:
    """Hold the lock of this file, and yield its file descriptor.

    If another process has it, print `waiting` and wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
