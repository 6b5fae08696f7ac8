"""Names of collectives: they differ within a process and agree over the ranks of a process set.

A name is given when its owner first takes part in a collective, not when the owner is made. All
ranks use the same optimizers and layers in the same order. One of them may make more of them, as
rank 0 does when it loads a model to evaluate it.
"""

from collections import Counter

_counts: Counter[int] = Counter()  # names given, by process set


def give(prefix: str, process_set: int = 0) -> str:
    """Return the next name, "prefix.number".

    `process_set` is the id of the ranks that use it (0: all).
    """
    number = _counts[process_set]
    _counts[process_set] += 1
    return f"{prefix}.{number}"


def counts() -> dict[int, int]:
    """Return how many names were given, by process set."""
    return dict(_counts)


def continue_from(counts: dict[int, int]) -> None:
    """Go on as a rank that has given so many names: this one is new to an elastic job."""
    for process_set, count in counts.items():
        _counts[process_set] = count
