"""How a rank computes in TensorFlow: its device, the way of the input to it, gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from recipe.data.batches import ALIGNMENT
from recipe.ranks.machine import check_gpus


def use_local_device(local_rank: int, threads: int, deterministic: bool = False) -> None:
    """Give this rank the GPU of its local rank, if there is one, and `threads` CPU threads."""
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    # Products of float32 keep 10 of its 23 bits on GPUs with TF32, as is TensorFlow's default.
    tf.config.experimental.enable_tensor_float_32_execution(not deterministic)
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        check_gpus(len(gpus), local_rank)
        tf.config.set_visible_devices(gpus[local_rank], "GPU")
        tf.config.experimental.set_memory_growth(gpus[local_rank], True)
    tf.config.threading.set_intra_op_parallelism_threads(threads)


def on_device(element: Sequence[np.ndarray | None]) -> tuple[tf.Tensor, ...]:
    """Return the arrays of an element of the input pipeline as tensors, for compiled functions."""
    return tuple(_tensor(array) for array in element if array is not None)


def _tensor(array: np.ndarray) -> tf.Tensor:
    """Share the array's memory where it lies as TensorFlow's own, so that images are not copied."""
    is_numpy = isinstance(array, np.ndarray) and array.size > 0
    if is_numpy and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.convert_to_tensor(array)


def gradients(
    forward: Callable[[], tuple[Any, Any]], variables: Sequence[keras.Variable]
) -> tuple[list[Any], Any]:
    """Return the gradients of the loss, and the vector: `forward` gives both, (loss, vector)."""
    with tf.GradientTape() as tape:
        loss, vector = forward()
    return tape.gradient(loss, [v.value for v in variables]), vector
