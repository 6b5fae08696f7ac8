"""Collectives: sums, broadcasts and agreements over all ranks.

Every function here is collective: all ranks must call it, in the same order.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from recipe.errors import RunError, UsageError
from recipe.ranks.binding import horovod, rank, size
from recipe.system import watchdog

__all__ = [
    "agreed",
    "broadcast",
    "check_equal",
    "extremes",
    "gather",
    "mean",
    "on_root",
    "rank",
    "size",
    "total",
]

T = TypeVar("T")


def total(values: Any, name: str) -> np.ndarray:
    """The sum over all ranks of an array of numbers, in float64 or int64. All ranks pass the same shape and name."""
    array = np.asarray(values)
    array = array.astype(np.int64 if array.dtype.kind in "iub" else np.float64)
    return _allreduce(array, horovod().Sum, name)


def mean(vectors: Iterable[np.ndarray], length: int, name: str) -> np.ndarray:
    """The mean of all ranks' vectors of this length, of which each rank may have another number, or none."""
    mine = np.zeros(length + 1)
    for vector in vectors:
        mine += [*vector, 1]
    sums = total(mine, name)
    return sums[:-1] / sums[-1]


def extremes(values: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest over all ranks of each element of an int64 array."""
    least = _allreduce(values, horovod().Min, f"{name}.min")
    return least, _allreduce(values, horovod().Max, f"{name}.max")


def broadcast(value: T, name: str) -> T:
    """Rank 0's value (any picklable object) on every rank."""
    value = horovod().broadcast_object(value, root_rank=0, name=name)
    watchdog.beat()
    return value


def gather(value: T, name: str) -> list[T]:
    """The values of all ranks, in the order of the ranks."""
    values = horovod().allgather_object(value, name=name)
    watchdog.beat()
    return values


def agreed(action: Callable[[], T], name: str) -> T:
    """Runs `action` on every rank; when it fails on some, raises the first failing rank's error on all of them.

    So a missing file on one host ends the run everywhere with that host's message."""
    result, failure = None, None
    try:
        result = action()
    except (UsageError, RunError) as error:
        failure = error
    failures = [(r, f) for r, f in enumerate(gather(failure, name)) if f is not None]
    if failures:
        failed, error = failures[0]
        raise type(error)(f"rank {failed}: {error}" if size() > 1 else str(error), everywhere=True)
    return result


def on_root(action: Callable[[], T], name: str) -> T:
    """Runs `action` on rank 0 alone and gives its result to all; its error becomes everyone's."""
    return broadcast(agreed(lambda: action() if rank() == 0 else None, f"{name}.agreed"), name)


def check_equal(named: Iterable[tuple[str, np.ndarray]], step: int) -> None:
    """Compares the bytes of named arrays over all ranks, which have the same names in the same order. Collective.

    Raises RunError on every rank, naming the first array that differs."""
    found = [(name, array.shape, zlib.crc32(np.ascontiguousarray(array))) for name, array in named]
    digests = np.array([digest for *_, digest in found], dtype=np.int64)
    least, largest = extremes(digests, "replica_check")
    for (name, shape, _), same in zip(found, least == largest, strict=True):
        if not same:
            raise RunError(
                f"the ranks' replicas differ: {name} {shape} is the first variable that is not equal on all ranks, "
                f"after step {step}; training can't go on",
                everywhere=True,
            )


def _allreduce(array: np.ndarray, op: int, name: str) -> np.ndarray:
    binding = horovod()
    if binding.__name__ == "horovod.torch":
        import torch

        return binding.allreduce(torch.from_numpy(np.atleast_1d(array)), op=op, name=name).numpy()
    import tensorflow as tf

    with tf.device("/cpu:0"):
        return binding.allreduce(tf.constant(np.atleast_1d(array)), op=op, name=name).numpy()
