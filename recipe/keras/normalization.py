"""Batch normalisation over one worker's examples, as the paper's (sec. 2.3), and over those of all ranks."""

from typing import Any

import keras
from keras import ops

from recipe.keras import backend, names


@keras.saving.register_keras_serializable("recipe")
class WorkerBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` of a batch that is several workers' batches, each normalised by itself.

    In training the batch is divided into `workers` equal parts, in order; the moving statistics move by the mean of
    the parts' statistics. Masks and renormalisation are not supported."""

    def __init__(self, *args: Any, workers: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.workers = workers

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if not training or self.workers == 1:
            return super().call(inputs, training=training)
        x = ops.reshape(ops.cast(inputs, "float32"), (self.workers, -1, *inputs.shape[1:]))
        channel = self.axis % len(inputs.shape) + 1
        axes = [axis for axis in range(1, len(x.shape)) if axis != channel]
        mean, variance = ops.moments(x, axes, keepdims=True)
        self._move(self.moving_mean, mean)
        self._move(self.moving_variance, variance)
        shape = [-1 if axis == channel else 1 for axis in range(len(x.shape))]
        factor = ops.rsqrt(variance + self.epsilon) * ops.reshape(self.gamma, shape)
        outputs = x * factor + (ops.reshape(self.beta, shape) - mean * factor)
        return ops.cast(ops.reshape(outputs, ops.shape(inputs)), self.compute_dtype)

    def get_config(self) -> dict:
        return super().get_config() | {"workers": self.workers}

    def _move(self, moving: keras.Variable, statistics: Any) -> None:
        mean = ops.mean(ops.reshape(statistics, (self.workers, -1)), axis=0)
        moving.assign(moving * self.momentum + mean * (1.0 - self.momentum))


@keras.saving.register_keras_serializable("recipe")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` whose mean and variance are those of all ranks' examples together.

    Ranks may hold different numbers of examples, and masks are respected. The variance is taken around the common
    mean (a difference of squares would cancel), which costs a second small allreduce. Gradients flow through both.

    All ranks must train the layer in the same steps. Raises ValueError for `fused=True`, as Horovod does."""

    def __init__(self, *args: Any, fused: bool = False, **kwargs: Any) -> None:
        if fused in (True, None):
            raise ValueError(
                f"fused={fused}: a fused kernel can't ask the other ranks; leave it False"
            )
        super().__init__(*args, **kwargs)
        self.wire_name: str | None = (
            None  # prefix of the names of its collectives; given at its first use
        )

    def _moments(self, inputs: Any, mask: Any) -> tuple:
        self.wire_name = self.wire_name or names.give("sync_batch_norm")
        axes, channels = self._reduction_axes, inputs.shape[self.axis]
        if mask is None:
            counted = ops.ones_like(inputs)
        else:
            counted = ops.broadcast_to(
                ops.expand_dims(ops.cast(mask, inputs.dtype), -1), ops.shape(inputs)
            )
            inputs = ops.where(counted > 0, inputs, 0)
        sums = ops.concatenate([ops.sum(inputs, axes), ops.sum(counted, axes)])
        sums = backend.total(sums, f"{self.wire_name}.mean")
        mean, count = (
            sums[:channels] / ops.maximum(sums[channels:], 1),
            ops.maximum(sums[channels:], 1),
        )
        shape = [
            channels if axis == self.axis % len(inputs.shape) else 1
            for axis in range(len(inputs.shape))
        ]
        deviations = ops.square(inputs - ops.reshape(mean, shape)) * counted
        variance = backend.total(ops.sum(deviations, axes), f"{self.wire_name}.variance") / count
        return mean, variance
