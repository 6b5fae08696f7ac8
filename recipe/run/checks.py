"""What a run needs: the same recipe and data on all ranks, and finite figures."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from recipe import config
from recipe.config import Recipe
from recipe.data import decode
from recipe.data.sources import Source
from recipe.errors import RunError, UsageError
from recipe.ranks import collectives, elastic
from recipe.rules.epoch import Epoch
from recipe.rules.epoch import check_size as check_share
from recipe.rules.sums import Sums
from recipe.system import output

DIVERGED = "lower config.optimizer.base_rate or lengthen config.schedule.warmup_epochs"


class Sources(NamedTuple):
    """The examples of a run."""

    training: Source
    evaluation: Source


class DataFacts(NamedTuple):
    """What a rank sees of its data."""

    shapes: list[tuple[int, int]]  # (examples, classes) for training and evaluation
    why_slow: str  # why its decoder is slow; empty: it isn't


def check_recipe(recipe: Recipe) -> None:
    """Raise UsageError when a rank has another recipe, from an older file, say. Collective.

    The ranks would wait for each other, or train on other examples. The data's folders may differ.
    """
    # Compare with rank 0's.
    fields = config.flatten(recipe)
    for folder in config.FOLDERS:
        del fields[folder]
    first, *others = collectives.gather(fields, "recipe")
    for rank, theirs in enumerate(others, 1):
        if theirs == first:
            continue

        # Name the fields.
        different = [
            f"config.{name}={value} instead of {first.get(name)}"
            for name, value in theirs.items()
            if value != first.get(name)
        ]
        raise UsageError(
            f"rank {rank} has another recipe than rank 0: {', '.join(different)}; give all ranks "
            "the same command "
            "and the same files",
            everywhere=True,
        )


def check_size(recipe: Recipe) -> None:
    """Raise UsageError when the ranks can't share the k workers."""
    size = collectives.size()
    if elastic.wanted() and size <= recipe.k and recipe.run.workers_at_once == 1:
        return  # ranks come and go: some may play one worker more than others
    check_share(recipe, size)


def check_data(sources: Sources) -> None:
    """Raise RunError when a rank has other data, and warn when one decodes slowly. Collective."""
    # Compare with rank 0's.
    shapes = [(len(source), source.num_classes) for source in sources]
    all_facts = collectives.gather(DataFacts(shapes, decode.why_slow()), "data")
    first = all_facts[0]
    for rank, facts in enumerate(all_facts):
        if facts.shapes != first.shapes:
            raise RunError(
                f"rank {rank} has other data than rank 0: (examples, classes) {facts.shapes} "
                "instead of "
                f"{first.shapes} for training and evaluation: copy the data to its host again",
                everywhere=True,
            )

    # One warning is enough for all.
    slow = [
        f"rank {rank}: {facts.why_slow}" for rank, facts in enumerate(all_facts) if facts.why_slow
    ]
    if slow and collectives.rank() == 0:
        output.warn(slow[0])


def check_losses(
    losses: np.ndarray, step: int, epoch: Epoch, order: Callable[[int], np.ndarray]
) -> None:
    """Raise RunError when a worker's loss of a step, counted from 0, is not finite.

    All ranks have the same losses, and raise it together. `order` gives that of an epoch.
    """
    # Usually all are finite.
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad) == 0:
        return

    # Name the examples of the first worker whose loss is not.
    worker = int(bad[0])
    others = f" and {len(bad) - 1} others" if len(bad) > 1 else ""
    epoch_number, step_in_epoch = divmod(step, epoch.steps)
    examples = epoch.indices(order(epoch_number), step_in_epoch, worker).tolist()
    raise RunError(
        f"the loss is {losses[worker]} at step {step + 1}, in epoch {epoch_number}, on worker "
        f"{worker}{others}: "
        f"training has diverged ({DIVERGED}) or the worker's batch is bad: the training examples "
        f"{', '.join(map(str, examples))}",
        everywhere=True,
    )


def check_evaluation(sums: Sums, epochs: int) -> None:
    """Raise RunError when the loss is not finite. All ranks raise it together."""
    if not np.isfinite(sums.loss):
        raise RunError(
            f"the evaluation's loss is {sums.mean_loss} after {epochs} epochs: training has "
            f"diverged; {DIVERGED}",
            everywhere=True,
        )
