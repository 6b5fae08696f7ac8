"""How a rank computes in TensorFlow: its device, the way of the input to it, gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from recipe.data.batches import ALIGNMENT
from recipe.ranks.machine import check_gpus


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


def on_device(element: tuple) -> tuple:
    """The arrays of an element of the input pipeline as tensors, for `compiled` functions."""
    return tuple(_tensor(part) for part in element if part is not None)


def _tensor(part: Any) -> tf.Tensor:
    """Shares an array's memory where it lies as TensorFlow's own: images are copied neither here nor in a step."""
    if (
        isinstance(part, np.ndarray)
        and part.size
        and part.flags.writeable
        and part.ctypes.data % ALIGNMENT == 0
    ):
        return tf.experimental.dlpack.from_dlpack(part.__dlpack__())
    return tf.convert_to_tensor(part)


def gradients(forward: Callable[[], tuple], variables: list) -> tuple[list, tuple]:
    """forward() gives (loss, anything else): (the loss's gradients, what else there was)."""
    with tf.GradientTape() as tape:
        loss, *found = forward()
    return tape.gradient(loss, [v.value for v in variables]), found
