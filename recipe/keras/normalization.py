"""Batch normalisation over the examples of all ranks."""

from typing import Any

import keras
from keras import ops

from recipe.keras import backend, names


@keras.saving.register_keras_serializable("recipe")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` with the mean and variance of all ranks' examples.

    Ranks may hold different numbers of examples, and masks are respected. The variance is taken
    around the common mean (a difference of squares would cancel), which costs a second small
    allreduce. Gradients flow through both.

    All ranks must train the layer in the same steps. Raise ValueError for `fused=True`, as Horovod
    does.
    """

    def __init__(self, *args: Any, fused: bool = False, **kwargs: Any) -> None:
        if fused in (True, None):
            raise ValueError(
                f"fused={fused}: a fused kernel can't ask the other ranks; leave it False"
            )
        super().__init__(*args, **kwargs)
        # The prefix of the names of its collectives, given at its first use.
        self.wire_name: str | None = None

    def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        """Return the mean and the variance of each channel over all ranks' examples."""
        self.wire_name = self.wire_name or names.give("sync_batch_norm")
        axes, channels = self._reduction_axes, inputs.shape[self.axis]

        # Which values count?
        if mask is None:
            counted = ops.ones_like(inputs)
        else:
            mask = ops.expand_dims(ops.cast(mask, inputs.dtype), -1)
            counted = ops.broadcast_to(mask, ops.shape(inputs))
            inputs = ops.where(counted > 0, inputs, 0)

        # The mean over all ranks.
        sums = ops.concatenate([ops.sum(inputs, axes), ops.sum(counted, axes)])
        sums = backend.total(sums, f"{self.wire_name}.mean")
        count = ops.maximum(sums[channels:], 1)
        mean = sums[:channels] / count

        # The variance around it.
        dimensions = len(inputs.shape)
        channel_axis = self.axis % dimensions
        shape = [channels if axis == channel_axis else 1 for axis in range(dimensions)]
        deviations = ops.square(inputs - ops.reshape(mean, shape)) * counted
        variance = backend.total(ops.sum(deviations, axes), f"{self.wire_name}.variance") / count
        return mean, variance
