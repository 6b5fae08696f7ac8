"""What a training step asked of the other ranks, so that a rank without data can take part with nothing.

Between `start` and `stop` each collective of a step leaves a note here. On TensorFlow it does so while the step is
traced, in the order in which it depends on the others.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Update:
    """One call of a DistributedOptimizer's `apply`."""

    optimizer: Any
    variables: list
    kinds: list[str]  # of each gradient: "dense", "sparse" or "none"


@dataclass(frozen=True)
class Total:
    """One sum of `backend.total`: as SyncBatchNormalization asks for, forward and backward."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    process_set: Any


@dataclass(frozen=True)
class Foreign:
    """A collective of the user's own, in which no rank can take part with nothing."""

    operation: str


Call = Update | Total | Foreign

_calls: list[Call] | None = None


def start() -> None:
    """Begins a new list of calls."""
    global _calls
    _calls = []


def stop() -> list[Call] | None:
    """Ends the list and returns it; None where none was begun, as when a traced step runs again."""
    global _calls
    calls, _calls = _calls, None
    return calls


def note(call: Call) -> None:
    """Adds a call, if a step is being recorded."""
    if _calls is not None:
        _calls.append(call)
