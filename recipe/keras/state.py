"""All variables of a model and its optimizer: broadcast and compared over ranks."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import keras
import numpy as np

from recipe.errors import RunError
from recipe.keras import backend, names, seeds, velocities
from recipe.keras.distributed import optimizers_of, reduction_of
from recipe.keras.normalization import SyncBatchNormalization
from recipe.keras.reduction import Reduction, framework_variable
from recipe.keras.tensors import Variable
from recipe.ranks import collectives
from recipe.system.arrays import check_structure

# An optimizer's lists of variables that are not one slot for each trained variable.
_NO_SLOTS = ("_variables", "_trainable_variables")


class _Names(NamedTuple):
    """The names of a rank's collectives."""

    owners: list[str | None]  # of each layer and optimizer that has collectives
    counts: dict[int, int]  # how many were given, by process set


class _Kind(NamedTuple):
    """What two variables must have in common to be broadcast together."""

    shape: tuple[int, ...]
    dtype: str


def replicated(model: keras.Model) -> list[keras.Variable]:
    """Return the variables that must be equal on all ranks after every step.

    They are weights and optimizer state. Left out are the moving statistics of batch normalisation,
    as each worker has its own (paper, sec. 2.3), and what an optimizer accumulates between its
    updates. So are the variables that a DistributedOptimizer leaves on their ranks.
    """
    variables = list(model.trainable_variables)
    for optimizer in optimizers_of(model):
        excluded = _accumulators(optimizer)
        reduction = reduction_of(optimizer)
        if reduction is not None:
            excluded += [v for v in model.trainable_variables if reduction.is_local(v)]
        variables = without(variables + optimizer.variables, excluded, optimizer)
    return variables


def everything(model: keras.Model) -> list[keras.Variable]:
    """Return all state of training.

    It is weights, moving statistics, random seeds, optimizer slots, learning rates, counters.
    """
    return model.variables + [v for optimizer in optimizers_of(model) for v in optimizer.variables]


def _accumulators(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Return a rank's own sums of gradients.

    `gradient_accumulation_steps` keeps them among the optimizer's variables.
    """
    accumulators = list(getattr(optimizer, "_accumulated_gradients", []))
    inner = getattr(optimizer, "inner_optimizer", None)
    return accumulators + list(getattr(inner, "_accumulated_gradients", []))


def without(
    variables: list[keras.Variable],
    excluded: Iterable[Variable],
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """Return the variables but the excluded ones and their slots in the optimizer.

    Those excluded are Keras's variables or the framework's.
    """
    out = {id(framework_variable(v)) for v in excluded}
    inner = velocities.innermost(optimizer)
    for single in getattr(inner, "_inner_optimizers", [inner]):  # inside a MultiOptimizer
        trained = single._trainable_variables
        places = [i for i, v in enumerate(trained) if id(framework_variable(v)) in out]
        for name, slots in vars(single).items():
            if isinstance(slots, list) and len(slots) == len(trained) and name not in _NO_SLOTS:
                out |= {id(framework_variable(slots[i])) for i in places}
    return [v for v in variables if id(framework_variable(v)) not in out]


def broadcast_state(
    model: keras.Model,
    root_rank: int = 0,
    local: Sequence[Variable] = (),
    *,
    same_seeds: bool = False,
) -> None:
    """Give every rank rank root_rank's state, with optimizer slots, which are built first.

    The variables in `local`, and their slots, keep what they have. Random layers get a seed of each
    rank's own, made of the root's and the rank. With `same_seeds` they get the root's own.
    Collective.
    """
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    broadcast_model(model, optimizers_of(model), root_rank, local, same_seeds=same_seeds)


def broadcast_model(
    model: keras.Model,
    optimizers: Sequence[keras.optimizers.Optimizer],
    root_rank: int = 0,
    local: Sequence[Variable] = (),
    *,
    same_seeds: bool = False,
) -> None:
    """Do `broadcast_state` for a model and optimizers that may not be compiled into it.

    Collective.
    """
    # What to broadcast, the same on all ranks.
    variables = model.variables
    for optimizer in optimizers:
        velocities.forget(optimizer)
        variables = without(variables + optimizer.variables, local, optimizer)
    _check_same_structure(variables)
    _agree_on_names(model, optimizers, root_rank)

    # Horovod has no unsigned types, which seeds may be. They are few and small.
    floats = [v for v in variables if keras.backend.is_float_dtype(v.dtype)]
    others = [v for v in variables if not keras.backend.is_float_dtype(v.dtype)]
    backend.broadcast(floats, root_rank, "state")
    own_values = [keras.ops.convert_to_numpy(v) for v in others]
    values = collectives.gather(own_values, "state.others")[root_rank]

    # Seeds differ from rank to rank.
    seeds.draw_by_state(model)
    seed_ids = set() if same_seeds else {id(v) for v in seeds.states(model)}
    for v, value in zip(others, values, strict=True):
        if id(v) in seed_ids:
            value = seeds.of_rank(value, collectives.rank(), root_rank)
        v.assign(value)


def check_replicas(model: keras.Model, also: Sequence[keras.Variable] = ()) -> None:
    """Compare the bytes of all replicated variables, and of those in `also`, over all ranks.

    Raise RunError on every rank, naming the first variable that differs. Collective.
    """
    variables = [*replicated(model), *also]
    named = ((v.path, backend.array(v)) for v in variables)
    collectives.check_equal(named, int(keras.ops.convert_to_numpy(model.optimizer.iterations)))


def to_arrays(model: keras.Model) -> dict[str, np.ndarray]:
    """Return all state by unique names, for a checkpoint."""
    return {name: keras.ops.convert_to_numpy(v) for name, v in _named(model).items()}


def from_arrays(model: keras.Model, arrays: dict[str, np.ndarray]) -> None:
    """Restore what `to_arrays` returned. Raise RunError when the arrays are another model's."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = _named(model)
    velocities.forget(model.optimizer)
    check_structure({name: tuple(v.shape) for name, v in variables.items()}, arrays)
    for name, v in variables.items():
        v.assign(arrays[name])


def _agree_on_names(
    model: keras.Model, optimizers: Sequence[keras.optimizers.Optimizer], root_rank: int
) -> None:
    """Give optimizers and layers the names that their collectives have on the root. Collective.

    This rank may be new to an elastic job.
    """
    # All that reduces by a name of its own.
    owners: list[SyncBatchNormalization | Reduction] = []
    for layer in model._flatten_layers():
        if isinstance(layer, SyncBatchNormalization):
            owners.append(layer)
    for optimizer in optimizers:
        reduction = reduction_of(optimizer)
        if reduction is not None:
            owners.append(reduction)

    # The root's names, and its counts, so that the next names agree as well.
    own = _Names([owner.wire_name for owner in owners], names.counts())
    roots = collectives.gather(own, "state.names")[root_rank]
    names.continue_from(roots.counts)
    for owner, name in zip(owners, roots.owners, strict=True):
        owner.wire_name = name or owner.wire_name


def _named(model: keras.Model) -> dict[str, keras.Variable]:
    named = {f"model/{v.path}": v for v in model.variables}
    for i, v in enumerate(model.optimizer.variables):
        named[f"optimizer/{i:03d}/{v.path}"] = v
    return named


def _check_same_structure(variables: list[keras.Variable]) -> None:
    """Raise RunError where ranks built different models. Collective.

    They would wait for each other for ever in the first broadcast.
    """
    own = [_Kind(tuple(v.shape), keras.backend.standardize_dtype(v.dtype)) for v in variables]
    for rank, theirs in enumerate(collectives.gather(own, "state.structure")):
        if theirs == own:
            continue
        shortest = min(len(own), len(theirs))
        different = (i for i in range(shortest) if own[i] != theirs[i])
        place = next(different, shortest)
        what = variables[place].path if place < len(own) else f"variable number {place}"
        raise RunError(
            f"rank {rank} built another model than rank {collectives.rank()}: "
            f"{len(theirs)} and {len(own)} variables, the first difference at {what}"
        )
