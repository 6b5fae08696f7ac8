"""The content of a backup: its description, and its arrays by name, with what is each rank's own.

An array that is not the same on all ranks is in the file once for each rank, as well as rank 0's
under the plain name.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from recipe.errors import RunError
from recipe.keras import velocities
from recipe.keras.distributed import reduction_of
from recipe.keras.reduction import Accumulator
from recipe.ranks import collectives
from recipe.system.arrays import digest

Arrays = dict[str, np.ndarray]
Variables = dict[str, keras.Variable]

FORMAT = "recipe.keras.BackupAndRestore 1"

# Beginnings of names.
MODEL, OPTIMIZER, METRICS, PASSES, OF_RANK = "model/", "optimizer/", "metrics/", "passes/", "rank/"
# Places of the gradients that came in the backward passes since the last step.
SEEN = f"{PASSES}seen"
RANDOM = "random"  # state of the framework's generators


@dataclass(frozen=True)
class Description:
    """What a backup says of itself. The file has these names."""

    format: str
    epoch: int  # in which the run goes on
    batch: int  # of this epoch, with which it goes on
    steps: int | None  # of an epoch; None: unknown
    size: int
    rate: float | None  # η of the velocities; None: what the optimizer has
    accumulating: bool  # gradients were added up since the last step
    own: list[str]  # names of the arrays that are each rank's own


class Backup(NamedTuple):
    """A whole backup."""

    arrays: Arrays
    description: Description


def variables_of(model: keras.Model) -> Variables:
    """Return all state but the metrics', by names that hold in every process."""
    variables = _numbered(MODEL, model.variables)
    variables |= _numbered(OPTIMIZER, model.optimizer.variables)
    accumulator = accumulator_of(model)
    if accumulator is not None:
        variables |= _numbered(PASSES, [*accumulator.sums, accumulator.count])
    return variables


def accumulator_of(model: keras.Model) -> Accumulator | None:
    """Return the sums of gradients since the last step, if DistributedOptimizer adds them up."""
    reduction = reduction_of(model.optimizer)
    return reduction.accumulator if reduction is not None else None


def metrics_of(model: keras.Model) -> Variables:
    """Return the state of the metrics, by name."""
    return _numbered(METRICS, [v for metric in model.metrics for v in metric.variables])


def statistics_of(model: keras.Model) -> set[str]:
    """Return the names of the model's untrained variables: moving statistics and seeds."""
    variables = _numbered(MODEL, model.variables)
    return {name for name, variable in variables.items() if not variable.trainable}


def without_metrics(arrays: Arrays) -> Arrays:
    """Return the arrays of all variables but the metrics'."""
    return {
        name: array
        for name, array in arrays.items()
        if name not in (SEEN, RANDOM) and not name.startswith((METRICS, OF_RANK))
    }


def metrics_only(arrays: Arrays) -> Arrays:
    """Return the arrays of the metrics' variables."""
    return {name: array for name, array in arrays.items() if name.startswith(METRICS)}


def check_same(variables: Variables, arrays: Arrays, folder: Path) -> None:
    """Raise RunError, with the first difference, when arrays are no state of these variables."""
    own = [
        f"{name} {tuple(v.shape)} {keras.backend.standardize_dtype(v.dtype)}"
        for name, v in variables.items()
    ]
    backed_up = [f"{name} {array.shape} {array.dtype}" for name, array in arrays.items()]
    for one, other in itertools.zip_longest(own, backed_up, fillvalue="nothing more"):
        if one != other:
            raise RunError(
                f"the backup in {folder} is of another model: it holds {other} where this one has "
                f"{one}; give another backup_dir, or the model that it is of"
            )


def differing(arrays: Arrays) -> list[str]:
    """Return the names of the arrays that are not the same on all ranks. Collective."""
    own = {name: digest({name: array}) for name, array in arrays.items()}
    digests = collectives.gather(own, "backup.digests")
    return [name for name in own if any(other.get(name) != own[name] for other in digests)]


def gather_own(arrays: Arrays, names: list[str]) -> Arrays:
    """Return all ranks' arrays of these names, by rank and name. Collective."""
    of_ranks = {}
    for name in names:
        for rank, array in enumerate(collectives.gather(arrays[name], "backup.own")):
            of_ranks[_name_of_rank(rank, name)] = array
    return of_ranks


def receive_own(arrays: Arrays, differing: set[str], size: int) -> Arrays:
    """Return this rank's own arrays, and those that no broadcast of variables brings. Collective.

    Rank 0 has the `arrays` of a backup by `size` ranks, the others none. A rank that the backup
    doesn't know gets rank 0's.
    """
    names = [n for n in arrays if n in differing or n.startswith((METRICS, PASSES, RANDOM))]
    rank = collectives.rank()
    own = {}
    for name in collectives.broadcast(names, "backup"):
        is_own = name in differing
        stored = [_name_of_rank(r, name) for r in range(size)] if is_own else [name]
        values = [arrays[n] for n in stored if n in arrays]  # on rank 0
        values = collectives.broadcast(values, "backup.own")
        own[name] = values[rank] if rank < len(values) else values[0]
    return own


def is_accumulating(model: keras.Model) -> bool:
    """Return whether DistributedOptimizer, or Keras, has added up gradients since the last step."""
    accumulator = accumulator_of(model)
    if accumulator is not None and _integer(accumulator.count):
        return True
    inner = velocities.innermost(model.optimizer)
    passes = inner.gradient_accumulation_steps
    return bool(passes) and _integer(inner._iterations) % passes > 0


def _numbered(group: str, variables: list) -> Variables:
    """Name variables by their place and their path without Keras's numbers.

    Keras numbers layers within a process: dense_3 may be dense when the program is started again.
    """
    named = {}
    for i, variable in enumerate(variables):
        path = re.sub("_[0-9]+(?=[_/]|$)", "", variable.path)
        named[f"{group}{i:04d}/{path}"] = variable
    return named


def _name_of_rank(rank: int, name: str) -> str:
    return f"{OF_RANK}{rank}/{name}"


def _integer(variable: keras.Variable) -> int:
    return int(keras.ops.convert_to_numpy(variable))
