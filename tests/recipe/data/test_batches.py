"""Batches made by threads: their order and number, errors, and that nothing stays behind."""

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from recipe.data.batches import AHEAD, Batches, Unfilled

COUNT, PARTS = 40, 3


def numbered(
    threads: int, job: Callable[[int, int], None] = lambda position, part: None, first: int = 0
) -> Batches:
    """COUNT batches; each says its position, part by part."""

    def make(position: int) -> Unfilled[tuple[np.ndarray]]:
        values = np.full(PARTS, -1)

        def fill(part: int) -> None:
            job(position, part)
            values[part] = position

        jobs = [lambda part=part: fill(part) for part in range(PARTS)]
        return Unfilled((values,), jobs)

    return Batches(range(first, first + COUNT), make, threads)


def threads_of_images() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("images")]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_order_is_that_of_the_positions(threads: int) -> None:
    slow = np.random.default_rng(threads).random((COUNT, PARTS)) / 500
    batches = numbered(threads, lambda position, part: time.sleep(slow[position, part]))
    assert [batch.tolist() for (batch,) in batches] == [
        [position] * PARTS for position in range(COUNT)
    ]
    assert threads_of_images() == []


def test_a_part_of_them() -> None:
    batches = numbered(2, first=5)
    assert len(batches) == COUNT
    assert [batch[0] for (batch,) in batches.take(3)] == [5, 6, 7]
    assert len(batches.take(COUNT + 1)) == COUNT
    assert [batch[0] for (batch,) in batches] == list(range(5, 5 + COUNT)), (
        "each iterator begins anew"
    )


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_what_is_made_ahead_is_bounded(threads: int) -> None:
    begun, batches = set(), numbered(threads)
    make = batches.make
    batches.make = lambda position: (
        begun.add(position) or make(position)
    )  # in this thread: nothing to wait for
    ahead = max(AHEAD, -(-2 * threads // PARTS))
    for used, _ in enumerate(batches):
        assert begun == set(range(min(used + 1 + ahead, COUNT)))


def test_an_error_comes_in_its_batch_s_place() -> None:
    def fail(position: int, part: int) -> None:
        if position >= 4:
            raise ValueError(f"{position}.{part}")
        time.sleep(0.01)  # the error is there long before

    seen = []
    with pytest.raises(ValueError, match=r"4\.0"):
        for (batch,) in numbered(3, fail):
            seen.append(batch[0])
    assert seen == [0, 1, 2, 3]
    assert threads_of_images() == []


@pytest.mark.parametrize("end", ["close", "drop"])
def test_nothing_stays_of_an_iterator_that_is_left(end: str) -> None:
    batches = iter(numbered(3, lambda position, part: time.sleep(0.01)))
    next(batches)
    assert threads_of_images()
    if end == "close":
        batches.close()
    else:
        del batches
        gc.collect()
    assert threads_of_images() == []


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise RuntimeError"])
def test_a_process_ends_with_batches_in_the_making(end: str) -> None:
    program = (
        "import time; from recipe.data.batches import Batches, Unfilled; "
        "jobs = [lambda: time.sleep(0.05)] * 4; "
        "batches = iter(Batches(range(10**6), lambda position: Unfilled((), jobs), 2)); "
        f"next(batches)\n{end}"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=20, capture_output=True)
    assert done.returncode == {"": 0, "raise SystemExit(3)": 3, "raise RuntimeError": 1}[end]
