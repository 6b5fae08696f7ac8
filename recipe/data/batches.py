"""Batches made ahead of their use by threads, handed over in order; bounded in memory, gone with their iterator."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

Batch = tuple[np.ndarray, ...]
Jobs = list[Callable[[], object]]

ALIGNMENT = 64  # bytes; frameworks take over memory that begins at a multiple of it as it is
AHEAD = 2  # batches, at least, that are made or ready while one is used


class Batches:
    """An iterable of batches, one for each of `positions`, the same whatever the number of threads.

    make(position) gives a batch of arrays that are still empty and the jobs that fill them, each a part: so that the
    first batch, too, is the work of all threads. It is called in the thread that iterates, the jobs in the others.

    Made ahead are AHEAD batches, or as many more as give each thread two jobs: these and the one in use are the memory
    that is needed. An error of a job is raised in its batch's place. Each iterator has threads of its own, which end
    when it is exhausted, closed or dropped."""

    def __init__(
        self, positions: range, make: Callable[[int], tuple[Batch, Jobs]], threads: int
    ) -> None:
        self.positions, self.make, self.threads = positions, make, threads

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, count: int) -> "Batches":
        """The first `count` of them."""
        return Batches(self.positions[:count], self.make, self.threads)

    def __iter__(self) -> Iterator[Batch]:
        pool, begun = ThreadPoolExecutor(self.threads, "images"), deque()
        try:
            for position in self.positions:
                batch, jobs = self.make(position)
                begun.append((batch, [pool.submit(job) for job in jobs]))
                if (
                    len(begun) > AHEAD
                    and sum(len(jobs) for _, jobs in begun) - len(begun[0][1]) >= 2 * self.threads
                ):
                    yield _finished(*begun.popleft())
            while begun:
                yield _finished(*begun.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(batch: Batch, jobs: list[Future]) -> Batch:
    for job in jobs:
        job.result()
    return batch


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 of this shape, its memory at a multiple of ALIGNMENT."""
    count = math.prod(shape)
    memory = np.empty(count + ALIGNMENT, dtype=np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + count].reshape(shape)
