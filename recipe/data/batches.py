"""Batches made ahead of their use by threads, in order and in bounded memory."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np

B = TypeVar("B")

ALIGNMENT = 64  # bytes; frameworks share memory that begins at a multiple of it, without a copy
AHEAD = 2  # batches, at least, that are made or ready while one is used


class Unfilled(NamedTuple, Generic[B]):
    """A batch whose arrays are still empty, and the jobs that fill them, each a part."""

    batch: B
    jobs: list[Callable[[], object]]


class _Begun(NamedTuple, Generic[B]):
    """A batch that is being filled."""

    batch: B
    futures: list[Future]


class Batches(Generic[B]):
    """An iterable of batches, one for each of `positions`, the same for any number of threads.

    `make(position)` is called in the thread that iterates, its jobs in the others. Several jobs for
    a batch let all threads work on the first one, too.

    Prefetch AHEAD batches, or more if needed to give every thread two jobs. Peak memory is those
    plus the batch in use. An error of a job is raised in its batch's place. Each iterator has
    threads of its own, which end when it is exhausted, closed or dropped.
    """

    def __init__(self, positions: range, make: Callable[[int], Unfilled[B]], threads: int) -> None:
        self.positions = positions
        self.make = make
        self.threads = threads

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, count: int) -> "Batches[B]":
        """Return the first `count` batches."""
        return Batches(self.positions[:count], self.make, self.threads)

    def __iter__(self) -> Iterator[B]:
        pool = ThreadPoolExecutor(self.threads, "images")
        begun: deque[_Begun[B]] = deque()
        try:
            for position in self.positions:
                batch, jobs = self.make(position)
                begun.append(_Begun(batch, [pool.submit(job) for job in jobs]))
                if self._enough_without_first(begun):
                    yield _wait_for(begun.popleft())
            while begun:
                yield _wait_for(begun.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _enough_without_first(self, begun: deque[_Begun[B]]) -> bool:
        """Say whether the first batch can be used: the others keep the threads busy meanwhile."""
        jobs_ahead = sum(len(batch.futures) for batch in begun) - len(begun[0].futures)
        return len(begun) > AHEAD and jobs_ahead >= 2 * self.threads


def ordinary_memory(count: int) -> np.ndarray:
    """Return empty uint8[count]."""
    return np.empty(count, dtype=np.uint8)


_memory: Callable[[int], np.ndarray] = ordinary_memory


def use_memory(memory: Callable[[int], np.ndarray]) -> None:
    """Take the memory of images from `memory(bytes)` from now on."""
    global _memory
    _memory = memory


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Return an empty uint8 array of this shape whose memory begins at a multiple of ALIGNMENT."""
    count = math.prod(shape)
    memory = _memory(count + ALIGNMENT)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + count].reshape(shape)


def _wait_for(begun: _Begun[B]) -> B:
    for future in begun.futures:
        future.result()
    return begun.batch
