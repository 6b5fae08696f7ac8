"""Collective operations on values and variables, by the names that `horovod.keras` gives them.

All ranks of the process set must call them, in the same order; `name` must then be the same on all of them. A value is
anything that `keras.ops.convert_to_tensor` takes; what comes back is a tensor of the backend.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import keras

from recipe.keras import backend, names, recording
from recipe.keras.backend import Compression

_hvd = backend.horovod


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: int | None = None,
    compression: type = Compression.none,
    process_set: Any = _hvd.global_process_set,
) -> Any:
    """The mean of a value of the same shape over the ranks, or what `op` says: Sum, Min, Max, Product, Adasum.

    `average` is an old way to say op=Average (True) or op=Sum (False); both at once is a ValueError."""
    recording.note(recording.Foreign("hvd.allreduce"))
    options = {
        "op": _op(op, average),
        "name": name or _name("allreduce", process_set),
        "compression": compression,
        "prescale_factor": prescale_factor,
        "postscale_factor": postscale_factor,
        "process_set": process_set,
    }
    return _hvd.allreduce(_tensor(value), **options)


def grouped_allreduce(
    values: Sequence,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: int | None = None,
    compression: type = Compression.none,
    process_set: Any = _hvd.global_process_set,
) -> list:
    """Several values of one type, reduced as one operation; otherwise as `allreduce`."""
    recording.note(recording.Foreign("hvd.grouped_allreduce"))
    options = {
        "op": _op(op, average),
        "name": name or _name("allreduce", process_set),
        "compression": compression,
        "prescale_factor": prescale_factor,
        "postscale_factor": postscale_factor,
        "process_set": process_set,
    }
    return list(_hvd.grouped_allreduce([_tensor(v) for v in values], **options))


def allgather(
    value: Any, name: str | None = None, process_set: Any = _hvd.global_process_set
) -> Any:
    """All ranks' values one after another along the first axis, in which they may differ."""
    recording.note(recording.Foreign("hvd.allgather"))
    return _hvd.allgather(
        _tensor(value), name=name or _name("allgather", process_set), process_set=process_set
    )


def broadcast(
    value: Any, root_rank: int, name: str | None = None, process_set: Any = _hvd.global_process_set
) -> Any:
    """Rank root_rank's value, on all ranks."""
    recording.note(recording.Foreign("hvd.broadcast"))
    name = name or _name("broadcast", process_set)
    return _hvd.broadcast(_tensor(value), root_rank, name=name, process_set=process_set)


def reducescatter(
    value: Any,
    name: str | None = None,
    op: int = _hvd.Average,
    process_set: Any = _hvd.global_process_set,
) -> Any:
    """This rank's part, along the first axis, of the reduced value; op is Average or Sum."""
    recording.note(recording.Foreign("hvd.reducescatter"))
    name = name or _name("reducescatter", process_set)
    return _hvd.reducescatter(_tensor(value), name=name, op=op, process_set=process_set)


def alltoall(
    value: Any,
    splits: Any = None,
    name: str | None = None,
    process_set: Any = _hvd.global_process_set,
) -> Any:
    """Sends the i-th part of the value's first axis to rank i and joins what all ranks sent here.

    Without `splits` (one length for each rank) the parts are equal; with it, (joined, lengths received) comes back."""
    recording.note(recording.Foreign("hvd.alltoall"))
    if splits is not None:
        splits = keras.ops.cast(_tensor(splits), "int32")
    name = name or _name("alltoall", process_set)
    return _hvd.alltoall(_tensor(value), splits=splits, name=name, process_set=process_set)


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    name: str | None = None,
    process_set: Any = _hvd.global_process_set,
) -> Any:
    """Rank root_rank's object, which must be picklable, on all ranks."""
    recording.note(recording.Foreign("hvd.broadcast_object"))
    # Horovod's own default is the name of the object's type, which may differ from rank to rank.
    return _hvd.broadcast_object(
        obj, root_rank=root_rank, name=name or "broadcast_object", process_set=process_set
    )


def allgather_object(obj: Any, name: str | None = None) -> list:
    """All ranks' objects, which must be picklable, in the order of the ranks."""
    recording.note(recording.Foreign("hvd.allgather_object"))
    return _hvd.allgather_object(obj, name=name or "allgather_object")


def broadcast_variables(variables: Iterable[keras.Variable], root_rank: int) -> None:
    """Rank root_rank's values in Keras variables (`model.variables`, `optimizer.variables`), on all ranks."""
    variables = list(variables)
    floats = [v for v in variables if keras.backend.is_float_dtype(v.dtype)]
    others = [v for v in variables if not keras.backend.is_float_dtype(v.dtype)]
    backend.broadcast(floats, root_rank, "variables")
    # Horovod has no unsigned types, which the seeds of random layers are; they are few and small.
    values = [keras.ops.convert_to_numpy(v) for v in others]
    for v, value in zip(
        others, _hvd.broadcast_object(values, root_rank, name="variables.others"), strict=True
    ):
        v.assign(value)


def broadcast_global_variables(root_rank: int) -> None:
    """Refused: Keras 3 keeps no global collection of variables."""
    raise ValueError(
        f"broadcast_global_variables({root_rank}): Keras 3 keeps no global collection of variables; call "
        "broadcast_variables(model.variables, root_rank) or train with callbacks.BroadcastState(root_rank)"
    )


def _tensor(value: Any) -> Any:
    return keras.ops.convert_to_tensor(value)


def _name(operation: str, process_set: Any) -> str | None:
    """PyTorch's binding counts unnamed operations whatever their process set, so that ranks that are in one and ranks
    that are not would wait for each other; TensorFlow's takes the graph's names."""
    return (
        names.give(operation, process_set.process_set_id) if backend.FRAMEWORK == "torch" else None
    )


def _op(op: int | None, average: bool | None) -> int:
    if op is not None and average is not None:
        raise ValueError(
            f"op={op} and average={average} say the same thing twice; leave average out"
        )
    if op is None:
        return _hvd.Sum if average is False else _hvd.Average
    return op
