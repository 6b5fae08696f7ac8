"""Batch normalisation over one worker's examples (paper, sec. 2.3)."""

from typing import Any

import keras

from recipe.frameworks.keras import compute


@keras.saving.register_keras_serializable("recipe")
class WorkerBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` that normalises each worker's part of a batch by itself.

    In training the batch is divided into `workers` equal parts, in order. The moving statistics
    move by the mean of the parts' statistics. Each part is one call of the framework's own kernel,
    where Keras has a dozen operations in float32. It reads and writes the layer's dtype, and takes
    the statistics in float32.

    Inputs are batches of images. Masks are not supported. Raise ValueError for other inputs, and
    for arguments that the kernels don't have.
    """

    def __init__(self, *args: Any, workers: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.workers = workers
        wanted = {"scale": True, "center": True, "renorm": False, "synchronized": False}
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(f"WorkerBatchNormalization: {name} can only be {value}")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if len(input_shape) != 4 or self.axis % 4 not in (1, 3):
            raise ValueError(
                "WorkerBatchNormalization: inputs must have 4 axes, and channels on axis 1 or 3; "
                f"the shape {input_shape} with axis={self.axis} is another"
            )
        super().build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if not training or not self.trainable:
            return super().call(inputs, training=False)
        output, mean, variance = compute.normalised(
            inputs,
            keras.ops.convert_to_tensor(self.gamma),
            keras.ops.convert_to_tensor(self.beta),
            self.epsilon,
            self.workers,
            channels_first=self.axis % 4 == 1,
        )
        self._move(self.moving_mean, mean)
        self._move(self.moving_variance, variance)
        return output

    def get_config(self) -> dict:
        return super().get_config() | {"workers": self.workers}

    def _move(self, moving: keras.Variable, statistic: Any) -> None:
        """Move a moving statistic by this batch's."""
        moving.assign(moving * self.momentum + statistic * (1.0 - self.momentum))
