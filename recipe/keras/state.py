"""All variables of a model and its optimizer: broadcast and compared over ranks."""

from collections.abc import Sequence

import keras
import numpy as np

from recipe.errors import RunError
from recipe.keras import backend, names, seeds, velocities
from recipe.keras.distributed import optimizers_of, reduction_of
from recipe.keras.normalization import SyncBatchNormalization
from recipe.keras.reduction import framework_variable
from recipe.ranks import collectives
from recipe.system.arrays import check_structure

_NO_SLOTS = (
    "_variables",
    "_trainable_variables",
)  # lists of variables that don't go with the trained ones


def replicated(model: keras.Model) -> list:
    """The variables that must be equal on all ranks after every step: weights and optimizer state.

    Not the moving statistics of batch normalisation: each worker has its own (paper, sec. 2.3). Nor what an optimizer
    accumulates between its updates, nor the variables that a DistributedOptimizer leaves on their ranks."""
    found = list(model.trainable_variables)
    for optimizer in optimizers_of(model):
        reduction = reduction_of(optimizer)
        local = [v for v in model.trainable_variables if reduction and reduction.is_local(v)]
        found = without(found + optimizer.variables, [*local, *_accumulators(optimizer)], optimizer)
    return found


def everything(model: keras.Model) -> list:
    """All state of training: weights, moving statistics, random seeds, optimizer slots, learning rates, counters."""
    return model.variables + [v for optimizer in optimizers_of(model) for v in optimizer.variables]


def _accumulators(optimizer: keras.optimizers.Optimizer) -> list:
    """A rank's own sums of gradients, which `gradient_accumulation_steps` keeps among the optimizer's variables."""
    singles = [optimizer, getattr(optimizer, "inner_optimizer", None)]
    return [v for single in singles for v in getattr(single, "_accumulated_gradients", [])]


def without(variables: list, excluded: list, optimizer: keras.optimizers.Optimizer) -> list:
    """The variables but the excluded ones, Keras's or the framework's, and their slots in the optimizer."""
    out = {id(framework_variable(v)) for v in excluded}
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # inside a LossScaleOptimizer
    for single in getattr(inner, "_inner_optimizers", [inner]):  # inside a MultiOptimizer
        trained = single._trainable_variables
        places = [i for i, v in enumerate(trained) if id(framework_variable(v)) in out]
        for name, slots in vars(single).items():
            if isinstance(slots, list) and len(slots) == len(trained) and name not in _NO_SLOTS:
                out |= {id(framework_variable(slots[i])) for i in places}
    return [v for v in variables if id(framework_variable(v)) not in out]


def broadcast_state(
    model: keras.Model, root_rank: int = 0, local: Sequence = (), *, same_seeds: bool = False
) -> None:
    """Rank root_rank's state on every rank, optimizer slots included, which are built first. Collective.

    The variables in `local`, and their slots, keep what they have. Random layers get a seed of each rank's own, made
    of the root's and the rank; with `same_seeds` the root's own."""
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    broadcast_model(model, optimizers_of(model), root_rank, local, same_seeds=same_seeds)


def broadcast_model(
    model: keras.Model,
    optimizers: Sequence[keras.optimizers.Optimizer],
    root_rank: int = 0,
    local: Sequence = (),
    *,
    same_seeds: bool = False,
) -> None:
    """`broadcast_state` for a model and optimizers that are perhaps not compiled into it. Collective."""
    variables = model.variables
    for optimizer in optimizers:
        velocities.forget(optimizer)
        variables = without(variables + optimizer.variables, local, optimizer)
    _check_same_structure(variables)
    _agree_on_names(model, optimizers, root_rank)
    floats = [v for v in variables if keras.backend.is_float_dtype(v.dtype)]
    others = [v for v in variables if not keras.backend.is_float_dtype(v.dtype)]
    backend.broadcast(floats, root_rank, "state")
    # Horovod has no unsigned types, which seeds may be; they are few and small.
    values = [keras.ops.convert_to_numpy(v) for v in others]
    seeds.draw_by_state(model)
    own = set() if same_seeds else {id(v) for v in seeds.states(model)}
    for v, value in zip(others, collectives.gather(values, "state.others")[root_rank], strict=True):
        v.assign(seeds.of_rank(value, collectives.rank(), root_rank) if id(v) in own else value)


def check_replicas(model: keras.Model, also: Sequence = ()) -> None:
    """Compares the bytes of all replicated variables, and of those in `also`, over all ranks. Collective.

    Raises RunError on every rank, naming the first variable that differs."""
    named = ((v.path, keras.ops.convert_to_numpy(v)) for v in [*replicated(model), *also])
    collectives.check_equal(named, int(keras.ops.convert_to_numpy(model.optimizer.iterations)))


def to_arrays(model: keras.Model) -> dict[str, np.ndarray]:
    """All state by unique names, for a checkpoint."""
    return {name: keras.ops.convert_to_numpy(v) for name, v in _named(model).items()}


def from_arrays(model: keras.Model, arrays: dict[str, np.ndarray]) -> None:
    """The inverse of `to_arrays`. Raises RunError when the arrays are another model's."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = _named(model)
    velocities.forget(model.optimizer)
    check_structure({name: tuple(v.shape) for name, v in variables.items()}, arrays)
    for name, v in variables.items():
        v.assign(arrays[name])


def _agree_on_names(model: keras.Model, optimizers: Sequence, root_rank: int) -> None:
    """Optimizers and layers of a rank that is new to an elastic job go by the names they have on the others."""
    layers = [
        layer for layer in model._flatten_layers() if isinstance(layer, SyncBatchNormalization)
    ]
    named = [*layers, *filter(None, map(reduction_of, optimizers))]
    mine = [n.wire_name for n in named], names.given()
    theirs, given = collectives.gather(mine, "state.names")[root_rank]
    names.go_on_from(given)
    for n, name in zip(named, theirs, strict=True):
        n.wire_name = name or n.wire_name


def _named(model: keras.Model) -> dict[str, keras.Variable]:
    named = {f"model/{v.path}": v for v in model.variables}
    return named | {
        f"optimizer/{i:03d}/{v.path}": v for i, v in enumerate(model.optimizer.variables)
    }


def _check_same_structure(variables: list) -> None:
    """Ranks that built different models would wait for each other for ever in the first broadcast."""
    mine = [(tuple(v.shape), keras.backend.standardize_dtype(v.dtype)) for v in variables]
    for rank, theirs in enumerate(collectives.gather(mine, "state.structure")):
        if theirs != mine:
            place = next(
                (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
                min(len(mine), len(theirs)),
            )
            what = variables[place].path if place < len(mine) else f"variable number {place}"
            raise RunError(
                f"rank {rank} built another model than rank {collectives.rank()}: "
                f"{len(theirs)} and {len(mine)} variables, the first difference at {what}"
            )
