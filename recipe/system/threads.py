"""Work on many items at once, in threads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def in_threads(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """Yield function(item) for each item, in order.

    After an error no further item is begun, and those that are under way are waited for.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
