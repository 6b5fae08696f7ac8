"""What Horovod does to gradients and variables under Keras's TensorFlow backend."""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from horovod.common.process_sets import ProcessSet

from recipe.keras import recording
from recipe.keras.tensors import Gradient, Reduced

if TYPE_CHECKING:
    from recipe.keras.reduction import Reduction

Compression = hvd.Compression
OVERLAP_GROUPS = None  # a graph reduces each gradient beside backprop anyway
DEVICES = True  # tf.device takes the names that device_dense and device_sparse give
WORD_ALONE = True  # an agreement's word is an operation of its own, to be heard before any gradient


def reduce(
    gradients: list[Gradient],
    variables: list[keras.Variable],
    groups: list[list[int]],
    reduction: "Reduction",
    word: tf.Tensor | None = None,
) -> Reduced:
    """Reduce the gradients at the places in `groups` over the ranks, and keep the others.

    Each group is one named allreduce. In a traced step it starts when backprop has produced its
    gradients, and Horovod fuses those that wait together. None stays None: the traced step, and so
    None, is the same on all ranks. Collective.
    """
    # The word comes first, to be heard before any gradient.
    summed_word = None if word is None else sum_word(word, reduction, gradients)
    reduced = list(gradients)
    if reduction.options.sparse_as_dense:
        reduced = [dense(gradient) for gradient in gradients]
    for group in groups:
        # Sparse gradients travel one by one.
        present = [i for i in group if reduced[i] is not None]
        sparse = [i for i in present if isinstance(reduced[i], tf.IndexedSlices)]
        for i in sparse:
            reduced[i] = _gathered(reduced[i], f"{reduction.wire_name}.{i}", reduction)

        # Dense ones travel together.
        together = [i for i in present if i not in sparse]
        name = f"{reduction.wire_name}.{group[0]}"
        results = _allreduced([reduced[i] for i in together], name, reduction)
        for i, result in zip(together, results, strict=True):
            reduced[i] = result
    return Reduced(reduced, summed_word)


def sum_word(
    word: tf.Tensor, reduction: "Reduction", gradients: Sequence[Gradient] = ()
) -> tf.Tensor:
    """Return the sum of all ranks' `word`, which travels alone. Collective.

    It waits for the first of the gradients that backprop makes, the last variable's. A step that
    finds no more data must not have told its word.
    """
    reduction.give_name()
    name = f"{reduction.wire_name}.word"
    present = [_values(gradient) for gradient in gradients if gradient is not None]
    with tf.control_dependencies(present[-1:]):
        return hvd.allreduce(tf.identity(word), op=hvd.Sum, name=name, ignore_name_scope=True)


def after(tensor: tf.Tensor | None) -> contextlib.AbstractContextManager:
    """Return a context whose operations wait for `tensor`.

    In a step that finds no more data they must not run, even where they don't depend on the data,
    as the count of steps.
    """
    return tf.control_dependencies([tensor]) if tensor is not None else contextlib.nullcontext()


def divided(gradients: list[Gradient], by: tf.Tensor) -> list[Gradient]:
    """Return the gradients divided by a number. Where it is 1, as usual, nothing is computed.

    They are not multiplied: TensorFlow would merge products with other numbers. It would do so
    otherwise on a rank without examples, and the ranks' weights would differ in their last bit.
    """
    values = [_values(gradient) for gradient in gradients if gradient is not None]
    if not values:
        return gradients

    def quotients() -> list[tf.Tensor]:
        return [value / tf.cast(by, value.dtype) for value in values]

    results = iter(tf.nest.flatten(tf.cond(by < 1, quotients, lambda: values)))
    return [None if g is None else _with_values(g, next(results)) for g in gradients]


def _values(gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _with_values(
    gradient: tf.Tensor | tf.IndexedSlices, values: tf.Tensor
) -> tf.Tensor | tf.IndexedSlices:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values


def kind(gradient: Gradient) -> str:
    """Return "none", "sparse" or "dense"."""
    if gradient is None:
        return "none"
    return "sparse" if isinstance(gradient, tf.IndexedSlices) else "dense"


def nothing(variable: keras.Variable, kind: str) -> Gradient:
    """Return the gradient of no examples, of this kind."""
    if kind == "none":
        return None
    shape = tuple(variable.shape)
    if kind == "dense":
        return zeros(shape, variable.dtype)
    values = zeros((1, *shape[1:]), variable.dtype)
    indices = tf.cast(zeros((1,), "float32"), tf.int32)
    return tf.IndexedSlices(values[:0], indices[:0], tf.constant(shape))


def zeros(shape: tuple[int, ...], dtype: str) -> tf.Tensor:
    """Return zeros that are no constant in a graph.

    TensorFlow evaluates what depends on constants only, an allreduce among it, once and for all.
    """
    return tf.fill(shape, tf.cast(_zero().read_value(), dtype))


@functools.cache
def _zero() -> tf.Variable:
    with tf.init_scope():
        return tf.Variable(0.0, trainable=False)


def _allreduced(tensors: list[tf.Tensor], name: str, reduction: "Reduction") -> list[tf.Tensor]:
    options = reduction.options
    arguments = {
        "name": name,
        "op": options.op,
        "compression": options.compression,
        "prescale_factor": 1 / options.gradient_predivide_factor,
        "postscale_factor": options.gradient_predivide_factor,
        "process_set": options.process_set,
        "device_dense": options.device_dense,
        # Keras puts the optimizer's name there, which may differ from rank to rank.
        "ignore_name_scope": True,
    }

    # A group is one operation, which starts when all of it is ready.
    if len(tensors) > 1:
        return hvd.grouped_allreduce(tensors, **arguments)
    return [hvd.allreduce(tensor, **arguments) for tensor in tensors]


def _gathered(gradient: tf.IndexedSlices, name: str, reduction: "Reduction") -> tf.IndexedSlices:
    """Return all ranks' slices, each row once.

    Optimizers that square the gradient must see its sum first.
    """
    options = {"process_set": reduction.process_set, "ignore_name_scope": True}
    with tf.device(reduction.options.device_sparse):
        values = hvd.allgather(gradient.values, name=f"{name}.values", **options)
        indices = hvd.allgather(gradient.indices, name=f"{name}.indices", **options)
    rows, places = tf.unique(indices)
    summed = tf.math.unsorted_segment_sum(values, places, tf.size(rows))
    slices = tf.IndexedSlices(summed, rows, gradient.dense_shape)
    if reduction.options.op == hvd.Average:
        return divided_by_size(slices, reduction.process_set)
    return slices


def dense(gradient: Gradient) -> Gradient:
    """Return IndexedSlices as a tensor, their repeated rows added up, anything else as it is."""
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def divided_by_size(gradient: Gradient, process_set: ProcessSet) -> Gradient:
    """Return the gradient divided by the number of ranks in the set."""
    if os.environ.get("HOROVOD_ELASTIC", "0") != "0":
        # An elastic job may change the number after the tracing.
        size = hvd.size_op(process_set_id=process_set.process_set_id)
    else:
        size = process_set.size()
    values = _values(gradient)
    return _with_values(gradient, values / tf.cast(size, values.dtype))


def total(
    tensor: tf.Tensor, name: str, process_set: ProcessSet = hvd.global_process_set
) -> tf.Tensor:
    """Return the sum of a tensor over all ranks. Collective.

    It is differentiable: its gradient is the sum of all ranks' gradients.
    """

    def allreduced(x: tf.Tensor, name: str) -> tf.Tensor:
        recording.note(recording.Total(name, tuple(x.shape), x.dtype.name, process_set))
        return hvd.allreduce(
            x, name=name, op=hvd.Sum, process_set=process_set, ignore_name_scope=True
        )

    @tf.custom_gradient
    def summed(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        return allreduced(x, name), lambda g: allreduced(g, f"{name}.gradient")

    return summed(tensor)


def broadcast(variables: list[keras.Variable], root_rank: int, name: str) -> None:
    """Give floating-point Keras variables rank root_rank's values. Collective.

    It is one traced call, so that the broadcasts overlap.
    """

    @tf.function
    def assign_all() -> None:
        for i, v in enumerate(variables):
            v.value.assign(hvd.broadcast(v.value.read_value(), root_rank, name=f"{name}.{i}"))

    # A call of the function itself would warn of retracing from the fifth on.
    assign_all.get_concrete_function()()


def gathered_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Return all ranks' bytes, uint8 of one length, one after another. Collective.

    It is traced: an eager operation goes by its type, whatever its name, and would meet another
    thread's.
    """
    return _gather(name, len(values))(tf.constant(values)).numpy()


@functools.cache
def _gather(name: str, length: int) -> Callable[[tf.Tensor], tf.Tensor]:
    def gather(values: tf.Tensor) -> tf.Tensor:
        with tf.device("/cpu:0"):
            return hvd.allgather(values, name=name, ignore_name_scope=True)

    return compiled(gather, [("uint8", (length,))])


def compiled(function: Callable, signature: list[tuple[str, tuple]]) -> Callable:
    """Return the function, traced once, for arguments of these (types, shapes)."""
    specs = [tf.TensorSpec(shape, dtype) for dtype, shape in signature]
    # There is no Python control flow to convert.
    return tf.function(function, input_signature=specs, autograph=False)


def without_gradients() -> contextlib.AbstractContextManager:
    """Return a context for updates outside of a step: TensorFlow records on its tapes only."""
    return contextlib.nullcontext()


def strategy() -> str:
    """Return the name of the tf.distribute strategy in force, or nothing."""
    return type(tf.distribute.get_strategy()).__name__ if tf.distribute.has_strategy() else ""


def prepare(train_function: Callable, batch: Any) -> None:
    """Trace a training step on a batch without running it, so that its variables come to exist."""
    tf.function(lambda: train_function([batch]), autograph=False).get_concrete_function()


def take_over(variables: Sequence[keras.Variable]) -> None:
    """Do nothing: gradients have no hooks here."""


def array(variable: keras.Variable) -> np.ndarray:
    """Return a variable's value, to compare with other ranks'."""
    return keras.ops.convert_to_numpy(variable)


def random_state() -> np.ndarray:
    """Return nothing: Keras's random layers draw from the seeds among the model's variables."""
    return np.zeros(0, np.uint8)


def set_random_state(state: np.ndarray) -> None:
    """Do nothing, see `random_state`."""
