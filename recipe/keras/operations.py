"""Collective operations on values and variables, by the names that `horovod.keras` gives them.

All ranks of the process set must call them, in the same order. `name` must then be the same on all
of them. A value is anything that `keras.ops.convert_to_tensor` takes. Results are tensors of the
backend.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
from horovod.common.process_sets import ProcessSet
from numpy.typing import ArrayLike

from recipe.keras import backend, names, recording
from recipe.keras.backend import Compression
from recipe.keras.tensors import Tensor

_hvd = backend.horovod

Value = ArrayLike | Tensor


def allreduce(
    value: Value,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: int | None = None,
    compression: type = Compression.none,
    process_set: ProcessSet = _hvd.global_process_set,
) -> Tensor:
    """Return the mean of a value of the same shape over the ranks. Collective.

    `op` chooses another reduction: Sum, Min, Max, Product, Adasum. `average` is an old way to say
    op=Average (True) or op=Sum (False). Raise ValueError for both at once.
    """
    recording.note(recording.Foreign("hvd.allreduce"))
    op = _op(op, average)
    return _hvd.allreduce(
        _tensor(value),
        name=name or _name("allreduce", process_set),
        op=op,
        compression=compression,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        process_set=process_set,
    )


def grouped_allreduce(
    values: Sequence[Value],
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: int | None = None,
    compression: type = Compression.none,
    process_set: ProcessSet = _hvd.global_process_set,
) -> list[Tensor]:
    """Return several values of one type, reduced as one operation, like `allreduce`. Collective."""
    recording.note(recording.Foreign("hvd.grouped_allreduce"))
    op = _op(op, average)
    reduced = _hvd.grouped_allreduce(
        [_tensor(value) for value in values],
        name=name or _name("allreduce", process_set),
        op=op,
        compression=compression,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        process_set=process_set,
    )
    return list(reduced)


def allgather(
    value: Value, name: str | None = None, process_set: ProcessSet = _hvd.global_process_set
) -> Tensor:
    """Return all ranks' values one after another along the first axis. Collective.

    Along that axis they may differ in length.
    """
    recording.note(recording.Foreign("hvd.allgather"))
    name = name or _name("allgather", process_set)
    return _hvd.allgather(_tensor(value), name=name, process_set=process_set)


def broadcast(
    value: Value,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = _hvd.global_process_set,
) -> Tensor:
    """Return rank root_rank's value, on all ranks. Collective."""
    recording.note(recording.Foreign("hvd.broadcast"))
    name = name or _name("broadcast", process_set)
    return _hvd.broadcast(_tensor(value), root_rank, name=name, process_set=process_set)


def reducescatter(
    value: Value,
    name: str | None = None,
    op: int = _hvd.Average,
    process_set: ProcessSet = _hvd.global_process_set,
) -> Tensor:
    """Return this rank's part, along the first axis, of the reduced value. Collective.

    `op` is Average or Sum.
    """
    recording.note(recording.Foreign("hvd.reducescatter"))
    name = name or _name("reducescatter", process_set)
    return _hvd.reducescatter(_tensor(value), name=name, op=op, process_set=process_set)


def alltoall(
    value: Value,
    splits: Value | None = None,
    name: str | None = None,
    process_set: ProcessSet = _hvd.global_process_set,
) -> Tensor | tuple[Tensor, Tensor]:
    """Send the i-th part of the value's first axis to rank i, and join what this rank gets.

    Without `splits`, one length for each rank, the parts are equal. With it, return (joined,
    lengths received). Collective.
    """
    recording.note(recording.Foreign("hvd.alltoall"))
    if splits is not None:
        splits = keras.ops.cast(_tensor(splits), "int32")
    name = name or _name("alltoall", process_set)
    return _hvd.alltoall(_tensor(value), splits=splits, name=name, process_set=process_set)


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = _hvd.global_process_set,
) -> Any:
    """Return rank root_rank's object, which must be picklable, on all ranks. Collective."""
    recording.note(recording.Foreign("hvd.broadcast_object"))
    # Horovod's own default is the name of the object's type, which may differ from rank to rank.
    name = name or "broadcast_object"
    return _hvd.broadcast_object(obj, root_rank=root_rank, name=name, process_set=process_set)


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """Return all ranks' objects, which must be picklable, in the order of the ranks. Collective."""
    recording.note(recording.Foreign("hvd.allgather_object"))
    return _hvd.allgather_object(obj, name=name or "allgather_object")


def broadcast_variables(variables: Iterable[keras.Variable], root_rank: int) -> None:
    """Give Keras variables the values that they have on rank root_rank. Collective.

    These may be `model.variables` or `optimizer.variables`.
    """
    variables = list(variables)
    floats = [v for v in variables if keras.backend.is_float_dtype(v.dtype)]
    others = [v for v in variables if not keras.backend.is_float_dtype(v.dtype)]
    backend.broadcast(floats, root_rank, "variables")

    # Horovod has no unsigned types, which the seeds of random layers are. They are few and small.
    own = [keras.ops.convert_to_numpy(v) for v in others]
    values = _hvd.broadcast_object(own, root_rank, name="variables.others")
    for v, value in zip(others, values, strict=True):
        v.assign(value)


def broadcast_global_variables(root_rank: int) -> None:
    """Raise ValueError: Keras 3 keeps no global collection of variables."""
    raise ValueError(
        f"broadcast_global_variables({root_rank}): Keras 3 keeps no global collection of "
        "variables; call broadcast_variables(model.variables, root_rank) or train with "
        "callbacks.BroadcastState(root_rank)"
    )


def _tensor(value: Value) -> Tensor:
    return keras.ops.convert_to_tensor(value)


def _name(operation: str, process_set: ProcessSet) -> str | None:
    """Return a name for an operation that the caller has not named.

    PyTorch's binding counts unnamed operations whatever their process set. Ranks that are in one
    would wait for ranks that are not. TensorFlow's binding takes the graph's names.
    """
    if backend.FRAMEWORK == "torch":
        return names.give(operation, process_set.process_set_id)
    return None


def _op(op: int | None, average: bool | None) -> int:
    """Return the reduction to do. Raise ValueError where it is given twice."""
    if op is not None and average is not None:
        raise ValueError(
            f"op={op} and average={average} say the same thing twice; leave average out"
        )
    if op is None:
        return _hvd.Sum if average is False else _hvd.Average
    return op
