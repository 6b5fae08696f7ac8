"""What Horovod does to gradients and variables under Keras's TensorFlow backend."""

import os
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from recipe.collectives import check_gpus
from recipe.data.batches import ALIGNMENT

Compression = hvd.Compression
DEVICES = True  # tf.device takes the names that device_dense and device_sparse give


def reduce(gradients: list, variables: list, groups: list[list[int]], how: Any) -> list:
    """The gradients (tensors, IndexedSlices or None) at the places in `groups`, reduced over the ranks as `how`, a
    Reduction, says; the others as they are.

    One named allreduce for each group: in a traced step it starts when backprop has produced its gradients, and
    Horovod fuses those that wait together. None stays None: the traced step, and so None, is the same on all ranks."""
    reduced = [dense(g) if how.sparse_as_dense else g for g in gradients]
    for group in groups:
        sparse = [i for i in group if isinstance(reduced[i], tf.IndexedSlices)]
        for i in sparse:
            reduced[i] = _gathered(reduced[i], f"{how.wire_name}.{i}", how)
        together = [i for i in group if reduced[i] is not None and i not in sparse]
        for i, result in zip(together, _allreduced([reduced[i] for i in together], group[0], how), strict=True):
            reduced[i] = result
    return reduced


def _allreduced(tensors: list, number: int, how: Any) -> list:
    options = {
        "name": f"{how.wire_name}.{number}",
        "op": how.op,
        "compression": how.compression,
        "prescale_factor": 1 / how.predivide,
        "postscale_factor": how.predivide,
        "process_set": how.process_set,
        "device_dense": how.device_dense,
        "ignore_name_scope": True,  # Keras puts the optimizer's name there, which may differ from rank to rank
    }
    if len(tensors) > 1:
        return hvd.grouped_allreduce(tensors, **options)
    return [hvd.allreduce(tensor, **options) for tensor in tensors]


def _gathered(gradient: tf.IndexedSlices, name: str, how: Any) -> tf.IndexedSlices:
    """All ranks' slices, each row once: optimizers that square the gradient must see its sum first."""
    options = {"process_set": how.process_set, "ignore_name_scope": True}
    with tf.device(how.device_sparse):
        values = hvd.allgather(gradient.values, name=f"{name}.values", **options)
        indices = hvd.allgather(gradient.indices, name=f"{name}.indices", **options)
    rows, places = tf.unique(indices)
    summed = tf.math.unsorted_segment_sum(values, places, tf.size(rows))
    slices = tf.IndexedSlices(summed, rows, gradient.dense_shape)
    return divided_by_size(slices, how.process_set) if how.op == hvd.Average else slices


def dense(gradient: Any) -> Any:
    """IndexedSlices as a tensor, their repeated rows added up; anything else as it is."""
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def divided_by_size(gradient: Any, process_set: Any) -> Any:
    """The gradient divided by the number of ranks in the set, which an elastic job may change after the tracing."""
    elastic = os.environ.get("HOROVOD_ELASTIC", "0") != "0"
    size = hvd.size_op(process_set_id=process_set.process_set_id) if elastic else process_set.size()
    if isinstance(gradient, tf.IndexedSlices):
        divided = gradient.values / tf.cast(size, gradient.dtype)
        return tf.IndexedSlices(divided, gradient.indices, gradient.dense_shape)
    return gradient / tf.cast(size, gradient.dtype)


def total(tensor: tf.Tensor, name: str, process_set: Any = hvd.global_process_set) -> tf.Tensor:
    """The sum of a tensor over all ranks; differentiable: its gradient is the sum of all ranks' gradients."""
    options = {"op": hvd.Sum, "process_set": process_set, "ignore_name_scope": True}

    @tf.custom_gradient
    def summed(x: tf.Tensor) -> tuple:
        return hvd.allreduce(x, name=name, **options), lambda g: hvd.allreduce(g, name=f"{name}.gradient", **options)

    return summed(tensor)


def broadcast(variables: list, root_rank: int, name: str) -> None:
    """Rank root_rank's values in floating-point Keras variables, on all ranks; one traced call, so they overlap."""

    @tf.function
    def assign_all() -> None:
        for i, v in enumerate(variables):
            v.value.assign(hvd.broadcast(v.value.read_value(), root_rank, name=f"{name}.{i}"))

    assign_all()


def compiled(function: Callable, signature: list[tuple]) -> Callable:
    """The function, traced once, for arguments of these (types, shapes)."""
    specs = [tf.TensorSpec(shape, dtype) for dtype, shape in signature]
    return tf.function(function, input_signature=specs, autograph=False)  # there is no Python control flow to convert


def gradients(forward: Callable[[], tuple], variables: list) -> tuple[list, tuple]:
    """forward() gives (loss, anything else): (the loss's gradients, what else there was)."""
    with tf.GradientTape() as tape:
        loss, *found = forward()
    return tape.gradient(loss, [v.value for v in variables]), found


def on_device(element: tuple) -> tuple:
    """The arrays of an element of the input pipeline as tensors, for `compiled` functions."""
    return tuple(_tensor(part) for part in element)


def _tensor(part: Any) -> tf.Tensor:
    """Shares an array's memory where it lies as TensorFlow's own: images are copied neither here nor in a step."""
    if isinstance(part, np.ndarray) and part.size and part.flags.writeable and part.ctypes.data % ALIGNMENT == 0:
        return tf.experimental.dlpack.from_dlpack(part.__dlpack__())
    return tf.convert_to_tensor(part)


def use_local_device(local_rank: int, threads: int, deterministic: bool = False) -> None:
    """Gives this rank the GPU of its local rank, if there is one, and `threads` CPU threads."""
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        check_gpus(len(gpus), local_rank)
        tf.config.set_visible_devices(gpus[local_rank], "GPU")
        tf.config.experimental.set_memory_growth(gpus[local_rank], True)
    tf.config.threading.set_intra_op_parallelism_threads(threads)


def random_state() -> np.ndarray:
    """Nothing: Keras's random layers draw from the seeds among the model's variables."""
    return np.zeros(0, np.uint8)


def set_random_state(state: np.ndarray) -> None:
    """Nothing, see `random_state`."""
