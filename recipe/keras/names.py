"""Names of collectives: they must differ within a process and agree over the ranks of a process set.

A name is given when its owner first takes part in a collective, not when it is made: all ranks use the same
optimizers and layers in the same order, while one of them may make more (rank 0 loads a model to evaluate it).
"""

from collections import Counter

_given: Counter[int] = Counter()  # names, by process set


def give(prefix: str, process_set: int = 0) -> str:
    """The next name, "prefix.number", for collectives of the process set with this id (0: all ranks)."""
    _given[process_set] += 1
    return f"{prefix}.{_given[process_set] - 1}"


def given() -> dict[int, int]:
    """How many names were given, by process set."""
    return dict(_given)


def go_on_from(numbers: dict[int, int]) -> None:
    """Goes on as a rank that has given these: this one is new to an elastic job."""
    _given.update({key: number - _given[key] for key, number in numbers.items()})
