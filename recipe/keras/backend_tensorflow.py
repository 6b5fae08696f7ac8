"""What Horovod does to gradients and variables under Keras's TensorFlow backend."""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from recipe.keras import recording

Compression = hvd.Compression
DEVICES = True  # tf.device takes the names that device_dense and device_sparse give
WORD_ALONE = True  # an agreement's word is an operation of its own, so that it can be heard before any gradient


def reduce(
    gradients: list,
    variables: list,
    groups: list[list[int]],
    how: Any,
    word: tf.Tensor | None = None,
) -> tuple[list, tf.Tensor | None]:
    """Returns the gradients (tensors, IndexedSlices or None) at the places in `groups`, reduced over the ranks as
    `how`, a Reduction, says, the others as they are; and the sum of all ranks' `word`, a vector that goes with them.

    One named allreduce for each group: in a traced step it starts when backprop has produced its gradients, and
    Horovod fuses those that wait together. None stays None: the traced step, and so None, is the same on all ranks."""
    heard = None if word is None else spoken(word, how, gradients)
    reduced = [dense(g) if how.sparse_as_dense else g for g in gradients]
    for group in groups:
        sparse = [i for i in group if isinstance(reduced[i], tf.IndexedSlices)]
        for i in sparse:
            reduced[i] = _gathered(reduced[i], f"{how.wire_name}.{i}", how)
        together = [i for i in group if reduced[i] is not None and i not in sparse]
        for i, result in zip(
            together, _allreduced([reduced[i] for i in together], group[0], how), strict=True
        ):
            reduced[i] = result
    return reduced, heard


def spoken(word: tf.Tensor, how: Any, gradients: Sequence = ()) -> tf.Tensor:
    """The sum of all ranks' `word`, alone. `how`, a Reduction, names it.

    It follows the first of the gradients that backprop makes, the last variable's: a step that finds no more data
    must not have spoken."""
    how.give_name()
    made = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients if g is not None]
    with tf.control_dependencies(made[-1:]):
        return hvd.allreduce(
            tf.identity(word), op=hvd.Sum, name=f"{how.wire_name}.word", ignore_name_scope=True
        )


def after(tensor: tf.Tensor | None) -> contextlib.AbstractContextManager:
    """A context whose operations wait for `tensor`: in a step that finds no more data they must not run, also where
    they don't depend on the data, as the count of steps."""
    return tf.control_dependencies([tensor]) if tensor is not None else contextlib.nullcontext()


def divided(gradients: list, by: tf.Tensor) -> list:
    """The gradients (tensors, IndexedSlices or None) divided by a number; where it is 1, as nearly always, nothing is
    computed.

    Not multiplied: TensorFlow would put products with other numbers together, otherwise on a rank without examples
    than on the others, whose weights would differ in their last bit."""
    tensors = [
        g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients if g is not None
    ]
    if not tensors:
        return gradients
    quotients = iter(
        tf.nest.flatten(
            tf.cond(by < 1, lambda: [t / tf.cast(by, t.dtype) for t in tensors], lambda: tensors)
        )
    )
    return [None if g is None else _with_values(g, next(quotients)) for g in gradients]


def _with_values(gradient: Any, values: tf.Tensor) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values


def kind(gradient: Any) -> str:
    """ "none", "sparse" or "dense"."""
    if gradient is None:
        return "none"
    return "sparse" if isinstance(gradient, tf.IndexedSlices) else "dense"


def nothing(variable: Any, kind: str) -> Any:
    """The gradient of no examples, of this kind."""
    if kind == "none":
        return None
    shape = tuple(variable.shape)
    if kind == "sparse":
        indices = tf.cast(zeros((1,), "float32"), tf.int32)[:0]
        return tf.IndexedSlices(
            zeros((1, *shape[1:]), variable.dtype)[:0], indices, tf.constant(shape)
        )
    return zeros(shape, variable.dtype)


def zeros(shape: tuple, dtype: str) -> tf.Tensor:
    """Zeros that are no constant in a graph: TensorFlow evaluates what depends on constants only, an allreduce among
    it, once and for all."""
    return tf.fill(shape, tf.cast(_zero().read_value(), dtype))


@functools.cache
def _zero() -> tf.Variable:
    with tf.init_scope():
        return tf.Variable(0.0, trainable=False)


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

    def allreduced(x: tf.Tensor, name: str) -> tf.Tensor:
        recording.note(recording.Total(name, tuple(x.shape), x.dtype.name, process_set))
        return hvd.allreduce(x, name=name, **options)

    @tf.custom_gradient
    def summed(x: tf.Tensor) -> tuple:
        return allreduced(x, name), lambda g: allreduced(g, f"{name}.gradient")

    return summed(tensor)


def broadcast(variables: list, root_rank: int, name: str) -> None:
    """Rank root_rank's values in floating-point Keras variables, on all ranks; one traced call, so they overlap."""

    @tf.function
    def assign_all() -> None:
        for i, v in enumerate(variables):
            v.value.assign(hvd.broadcast(v.value.read_value(), root_rank, name=f"{name}.{i}"))

    assign_all.get_concrete_function()()  # a call of the function itself would warn of retracing from the fifth on


def gathered_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """All ranks' bytes, uint8 of one length, one after another. Collective.

    Traced: an eager operation goes by its type, whatever its name, and would meet another thread's."""
    return _gather(name, len(values))(tf.constant(values)).numpy()


@functools.cache
def _gather(name: str, length: int) -> Callable:
    def gather(values: tf.Tensor) -> tf.Tensor:
        with tf.device("/cpu:0"):
            return hvd.allgather(values, name=name, ignore_name_scope=True)

    return compiled(gather, [("uint8", (length,))])


def compiled(function: Callable, signature: list[tuple]) -> Callable:
    """The function, traced once, for arguments of these (types, shapes)."""
    specs = [tf.TensorSpec(shape, dtype) for dtype, shape in signature]
    return tf.function(
        function, input_signature=specs, autograph=False
    )  # there is no Python control flow to convert


def without_gradients() -> contextlib.AbstractContextManager:
    """A context for updates outside of a step: TensorFlow records gradients on its tapes only."""
    return contextlib.nullcontext()


def strategy() -> str:
    """The name of the tf.distribute strategy in force; empty: none."""
    return type(tf.distribute.get_strategy()).__name__ if tf.distribute.has_strategy() else ""


def prepare(train_function: Callable, batch: Any) -> None:
    """Traces a training step on a batch and doesn't run it: variables that it makes come to exist."""
    tf.function(lambda: train_function([batch]), autograph=False).get_concrete_function()


def random_state() -> np.ndarray:
    """Nothing: Keras's random layers draw from the seeds among the model's variables."""
    return np.zeros(0, np.uint8)


def set_random_state(state: np.ndarray) -> None:
    """Nothing, see `random_state`."""
