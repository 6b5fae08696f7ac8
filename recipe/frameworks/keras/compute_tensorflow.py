"""How a rank computes in TensorFlow: its device, the way to it, gradients, batch normalisation."""

import math
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from recipe.config import Recipe
from recipe.data.batches import ALIGNMENT
from recipe.data.element import Element
from recipe.frameworks.keras.passes import Forward, LastPass, zeros
from recipe.frameworks.normalised import Normalised
from recipe.frameworks.replica import gradient_groups
from recipe.keras import backend
from recipe.keras.distributed import DistributedOptimizer
from recipe.ranks import collectives
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


class Input:
    """The elements that a rank's passes take. TensorFlow copies each to a GPU when it is used."""

    def take(self, elements: Iterator[Element]) -> tuple[tf.Tensor, ...]:
        """Return the next element."""
        return on_device(next(elements))

    def look_ahead(self, elements: Iterator[Element]) -> None:
        """Do nothing."""


def _tensor(array: np.ndarray) -> tf.Tensor:
    """Share the array's memory where it lies as TensorFlow's own, so that images are not copied."""
    is_numpy = isinstance(array, np.ndarray) and array.size > 0
    if is_numpy and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.convert_to_tensor(array)


class Gradients:
    """The gradients of a step: sums over its passes on this rank.

    The model's optimizer becomes a DistributedOptimizer, which takes the mean over the ranks.
    TensorFlow runs its reductions beside the last backward pass.
    """

    def __init__(self, recipe: Recipe, model: keras.Model, passes: int) -> None:
        self._variables = model.trainable_variables
        self._sums = [zeros(v.shape) for v in self._variables] if passes > 1 else []
        self._compile = recipe.run.compile
        if collectives.size() > 1:  # one rank has nothing to reduce, and needs no copies for it
            _distribute(recipe, model)

    def add(self, forward: Callable[[], Forward]) -> tf.Tensor:
        """Run one of several passes, and return its vector."""
        result = self._backward(forward)
        for total, gradient in zip(self._sums, result.gradients(), strict=True):
            total.assign(total + gradient)
        return result.vector

    def last(self, forward: Callable[[], Forward]) -> LastPass:
        """Run the last pass. The sums begin anew."""
        result = self._backward(forward)
        if not self._sums:
            return result
        sums = zip(self._sums, result.gradients(), strict=True)
        totals = [total + gradient for total, gradient in sums]
        for total in self._sums:
            total.assign(tf.zeros_like(total))
        return LastPass(result.vector, lambda: totals)

    def _backward(self, forward: Callable[[], Forward]) -> LastPass:
        """Run one pass forward and backward, with run.compile in one XLA computation.

        That hands over all gradients at its end. Horovod's operations can't be in it.
        """

        def backward() -> tuple[list[tf.Tensor], tf.Tensor]:
            with tf.GradientTape() as tape:
                loss, vector = forward()
            return tape.gradient(loss, [v.value for v in self._variables]), vector

        run = tf.function(backward, jit_compile=True) if self._compile else backward
        gradients, vector = run()
        return LastPass(vector, lambda: gradients)


def _distribute(recipe: Recipe, model: keras.Model) -> None:
    """Make the model's optimizer reduce the gradients over the ranks."""
    parameters = sum(math.prod(v.shape) for v in model.trainable_variables)
    compression = getattr(backend.Compression, recipe.optimizer.compression)
    groups = gradient_groups(recipe, parameters)
    DistributedOptimizer(model.optimizer, compression=compression, groups=groups)


def decayed(
    gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable], decay: float
) -> list[tf.Tensor]:
    """Return the gradients, each with `decay` times its variable added."""
    pairs = zip(gradients, variables, strict=True)
    return [gradient + decay * variable.value for gradient, variable in pairs]


def normalised(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
    workers: int,
    channels_first: bool,
) -> Normalised:
    """Normalise each of the workers' equal parts of a batch of images, in order."""
    layout = "NCHW" if channels_first else "NHWC"
    if workers == 1:
        return _normalised(x, gamma, beta, epsilon, layout)
    parts = [_normalised(part, gamma, beta, epsilon, layout) for part in tf.split(x, workers)]
    return Normalised(
        tf.concat([part.output for part in parts], axis=0),
        tf.add_n([part.mean for part in parts]) / workers,
        tf.add_n([part.variance for part in parts]) / workers,
    )


def _normalised(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float, layout: str
) -> Normalised:
    """Normalise one worker's batch. Mean and variance are by-products of the kernel."""
    output, mean, unbiased, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=[],
        variance=[],
        epsilon=epsilon,
        data_format=layout,
        is_training=True,
    )
    # A channel has `count` values. Where it is one, the variance is 0, whatever the kernel says.
    count = tf.cast(tf.size(x, tf.int64) // tf.size(gamma, tf.int64), tf.float32)
    return Normalised(output, mean, tf.math.multiply_no_nan(unbiased, (count - 1) / count))
