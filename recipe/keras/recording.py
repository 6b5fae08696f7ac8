"""The record of a training step's collectives, so that a rank without data can take part.

Between `start` and `stop` each collective of a step adds a call to the record. On TensorFlow it
does so while the step is traced, in the order in which the collectives depend on each other.
"""

from dataclasses import dataclass
from typing import Any

import keras


@dataclass(frozen=True)
class Update:
    """One call of a DistributedOptimizer's `apply`."""

    optimizer: keras.optimizers.Optimizer
    variables: list
    kinds: list[str]  # of each gradient: "dense", "sparse" or "none"


@dataclass(frozen=True)
class Total:
    """One sum of `backend.total`, as SyncBatchNormalization asks for, forward and backward."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    process_set: Any  # Horovod's, of either binding


@dataclass(frozen=True)
class Foreign:
    """A collective of the user's own, in which no rank can take part without data."""

    operation: str


Call = Update | Total | Foreign

_calls: list[Call] | None = None  # None: nothing is being recorded


def start() -> None:
    """Begin a new record."""
    global _calls
    _calls = []


def stop() -> list[Call] | None:
    """End the record and return it. None when none was begun, as when a traced step runs again."""
    global _calls
    calls, _calls = _calls, None
    return calls


def note(call: Call) -> None:
    """Add a call, if a step is being recorded."""
    if _calls is not None:
        _calls.append(call)
