"""Batch normalisation over one worker's examples (paper, sec. 2.3)."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("recipe")
class WorkerBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` that normalises each worker's part of a batch by itself.

    In training the batch is divided into `workers` equal parts, in order. The moving statistics
    move by the mean of the parts' statistics. Masks and renormalisation are not supported.
    """

    def __init__(self, *args: Any, workers: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.workers = workers

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if not training or self.workers == 1:
            return super().call(inputs, training=training)
        # Put the workers on an axis of their own, and take the moments over all others but the
        # channels.
        x = ops.reshape(ops.cast(inputs, "float32"), (self.workers, -1, *inputs.shape[1:]))
        channel = self.axis % len(inputs.shape) + 1
        axes = [axis for axis in range(1, len(x.shape)) if axis != channel]
        mean, variance = ops.moments(x, axes, keepdims=True)
        self._move(self.moving_mean, mean)
        self._move(self.moving_variance, variance)

        # Normalise.
        shape = [-1 if axis == channel else 1 for axis in range(len(x.shape))]
        factor = ops.rsqrt(variance + self.epsilon) * ops.reshape(self.gamma, shape)
        outputs = x * factor + (ops.reshape(self.beta, shape) - mean * factor)
        return ops.cast(ops.reshape(outputs, ops.shape(inputs)), self.compute_dtype)

    def get_config(self) -> dict:
        return super().get_config() | {"workers": self.workers}

    def _move(self, moving: keras.Variable, statistics: Any) -> None:
        """Move a moving statistic by the mean over the workers."""
        mean = ops.mean(ops.reshape(statistics, (self.workers, -1)), axis=0)
        moving.assign(moving * self.momentum + mean * (1.0 - self.momentum))
