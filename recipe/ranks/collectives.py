"""Collectives: sums, broadcasts and agreements over all ranks.

Every function here is collective: all ranks must call it, in the same order.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from recipe.errors import RunError, UsageError
from recipe.ranks.binding import horovod, rank, size
from recipe.ranks.digest import Array, Digest, digest, numbers
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
    """Return the sum over all ranks of an array of numbers, in float64 or int64.

    All ranks pass the same shape and name.
    """
    array = np.asarray(values)
    is_whole = array.dtype.kind in "iub"
    return _allreduce(array.astype(np.int64 if is_whole else np.float64), horovod().Sum, name)


def mean(vectors: Iterable[np.ndarray], length: int, name: str) -> np.ndarray:
    """Return the mean of all ranks' vectors of this length.

    Each rank may have another number of vectors, or none.
    """
    own_sum = np.zeros(length + 1)  # the last element counts the vectors
    for vector in vectors:
        own_sum += [*vector, 1]
    sums = total(own_sum, name)
    return sums[:-1] / sums[-1]


def extremes(values: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest over all ranks of each element of an int64 array."""
    least = _allreduce(values, horovod().Min, f"{name}.min")
    return least, _allreduce(values, horovod().Max, f"{name}.max")


def broadcast(value: T, name: str) -> T:
    """Return rank 0's value (any picklable object) on every rank."""
    value = horovod().broadcast_object(value, root_rank=0, name=name)
    watchdog.beat()
    return value


def gather(value: T, name: str) -> list[T]:
    """Return the values of all ranks, in the order of the ranks."""
    values = horovod().allgather_object(value, name=name)
    watchdog.beat()
    return values


def agreed(action: Callable[[], T], name: str) -> T:
    """Call `action` on every rank and return its result there.

    When it fails on some ranks, raise the first failing rank's error on all of them. So a missing
    file on one host ends the run everywhere with that host's message.
    """
    result: T | None = None
    own_error: UsageError | RunError | None = None
    try:
        result = action()
    except (UsageError, RunError) as error:
        own_error = error
    for failed_rank, failure in enumerate(gather(own_error, name)):
        if failure is not None:
            message = f"rank {failed_rank}: {failure}" if size() > 1 else str(failure)
            raise type(failure)(message, everywhere=True)
    return cast(T, result)


def on_root(action: Callable[[], T], name: str) -> T:
    """Call `action` on rank 0 alone and return its result on all; its error becomes everyone's."""
    result = agreed(lambda: action() if rank() == 0 else None, f"{name}.agreed")
    return cast(T, broadcast(result, name))


class _Compared(NamedTuple):
    name: str
    shape: tuple[int, ...]
    digest: Digest


def check_equal(named: Iterable[tuple[str, Array]], step: int) -> None:
    """Compare the bits of named arrays over all ranks.

    All ranks pass the same names in the same order. Raise RunError on every rank, which names the
    first array that differs.
    """
    compared = [_Compared(name, tuple(array.shape), digest(array)) for name, array in named]
    least, largest = extremes(numbers([one.digest for one in compared]), "replica_check")
    for one, is_equal in zip(compared, least == largest, strict=True):
        if not is_equal:
            raise RunError(
                f"the ranks' replicas differ: {one.name} {one.shape} is the first variable "
                f"that is not equal on all ranks, after step {step}; training can't go on",
                everywhere=True,
            )


def _allreduce(array: np.ndarray, op: int, name: str) -> np.ndarray:
    """Reduce an array of one dimension or more by one of Horovod's operations."""
    binding = horovod()
    array = np.atleast_1d(array)
    if binding.__name__ == "horovod.torch":
        import torch

        return binding.allreduce(torch.from_numpy(array), op=op, name=name).numpy()
    import tensorflow as tf

    with tf.device("/cpu:0"):
        return binding.allreduce(tf.constant(array), op=op, name=name).numpy()
