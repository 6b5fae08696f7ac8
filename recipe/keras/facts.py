"""The facts that the ranks compare when a `fit` begins, and the refusal of what differs."""

from dataclasses import dataclass
from typing import NoReturn

import keras

from recipe.errors import RunError


@dataclass(frozen=True)
class RankFacts:
    """What all ranks must know of one of them before the first step."""

    steps: int | None  # of an epoch, by this rank's data; None: unknown
    steps_per_execution: int
    epochs: int
    collective_callbacks: list[str]  # class names of the callbacks in which the ranks meet
    refusal: str  # why this rank's `fit` can't go on; empty: it can


def refusal_of_callbacks(callbacks: list[keras.callbacks.Callback]) -> str:
    """Return why a rank's callbacks can't train on several ranks. Empty: they can."""
    if any(isinstance(c, keras.callbacks.BackupAndRestore) for c in callbacks):
        return (
            "keras.callbacks.BackupAndRestore takes up each rank where that rank was; give all "
            "ranks recipe.keras.callbacks.BackupAndRestore, which has the same arguments"
        )
    return ""


def check_facts(facts: list[RankFacts]) -> None:
    """Raise ValueError, on all ranks, for facts that must not differ, or for a rank's refusal."""
    for rank, of_rank in enumerate(facts):
        _check_rank(rank, of_rank, facts[0])
    _check_steps_per_execution(facts)


def check_first_epochs(epochs: list[int | None]) -> None:
    """Raise RunError, on all ranks, when they don't begin with the same epoch.

    None stands for a rank that has no epoch to do.
    """
    for rank, epoch in enumerate(epochs):
        if epoch != epochs[0]:
            raise RunError(
                f"rank 0 begins with {_epoch_in_words(epochs[0])} and rank {rank} with "
                f"{_epoch_in_words(epoch)}; give all ranks the same initial_epoch, and resume with "
                "recipe.keras.callbacks.BackupAndRestore on all of them",
                everywhere=True,
            )


def _check_rank(rank: int, facts: RankFacts, first: RankFacts) -> None:
    """Compare a rank's facts with those of rank 0."""
    # What this rank can't do on several ranks at all.
    if facts.refusal:
        _refuse_everywhere(f"rank {rank}: {facts.refusal}")

    # What must be the same on all.
    if facts.epochs != first.epochs:
        _refuse_everywhere(
            f"fit(epochs=…) is {first.epochs} on rank 0 and {facts.epochs} on rank {rank}"
        )
    if facts.collective_callbacks != first.collective_callbacks:
        names = ", ".join(facts.collective_callbacks) or "none"
        names_on_0 = ", ".join(first.collective_callbacks) or "none"
        _refuse_everywhere(
            "the ranks meet in these callbacks, so all need the same: "
            f"rank 0 has {names_on_0}; rank {rank} has {names}"
        )


def _check_steps_per_execution(facts: list[RankFacts]) -> None:
    """Several steps run as one only where all ranks have as many."""
    steps = [f.steps for f in facts]
    is_equal = None not in steps and len(set(steps)) == 1
    if is_equal or max(f.steps_per_execution for f in facts) <= 1:
        return
    numbers = ", ".join("unknown" if count is None else str(count) for count in steps)
    _refuse_everywhere(
        "with steps_per_execution > 1 all ranks need the same number of steps an epoch, "
        f"not {numbers}; pass steps_per_epoch to fit()"
    )


def _epoch_in_words(epoch: int | None) -> str:
    return "no epoch at all" if epoch is None else f"epoch {epoch}"


def _refuse_everywhere(message: str) -> NoReturn:
    """Raise a ValueError that all ranks raise together."""
    error = ValueError(message)
    error.everywhere = True  # type: ignore[attr-defined]  # as RunError has it
    raise error
