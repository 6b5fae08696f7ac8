"""Callbacks that set the learning rate."""

from collections.abc import Callable, Sequence

import keras
import numpy as np

from recipe.keras.sgd import SGD
from recipe.schedule import Rate


class ScheduledRate(keras.callbacks.Callback):
    """Sets η = rate(epoch) before each step; epoch is a float, `epoch + step/steps_per_epoch` at the step's start.

    With momentum correction (paper, remark 2): Keras's SGD folds η into its velocity, so that the velocity is
    multiplied by η_new/η_old whenever η changes. This is exact, for classical and for Nesterov momentum."""

    def __init__(self, rate: Callable[[float], float], *, momentum_correction: bool = True) -> None:
        super().__init__()
        self.rate = rate
        self.momentum_correction = momentum_correction
        self._epoch = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        if (n := self.model.steps_per_execution) > 1:
            raise ValueError(
                f"steps_per_execution={n}: a callback sees only one step in {n}; leave it 1, or give the optimizer a "
                "recipe.keras.RateSchedule as its learning rate"
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        steps = self.params.get("steps")
        if not steps:
            raise ValueError("the number of steps of an epoch is unknown; pass steps_per_epoch to fit()")
        set_rate(self.model.optimizer, self.rate(self._epoch + batch / steps), self.momentum_correction)


class GradualWarmup(ScheduledRate):
    """Gradual warmup from base_rate to k·base_rate over the first `epochs` epochs (sec. 2.2), then leaves η alone.

    base_rate is η for one worker's share of the minibatch; k is the number of workers, usually `size()`."""

    def __init__(self, base_rate: float, k: int, epochs: float = 5.0, *, momentum_correction: bool = True) -> None:
        rate = Rate(start=base_rate, peak=k * base_rate, warmup_epochs=epochs, decay_epochs=())
        super().__init__(rate, momentum_correction=momentum_correction)
        self._done = False

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if not self._done:
            super().on_train_batch_begin(batch, logs)
            self._done = self._epoch + batch / self.params["steps"] >= self.rate.warmup_epochs


class StepDecay(ScheduledRate):
    """η = rate · factor^i from the i-th of `epochs` on (sec. 5.1: 1/10 at 30, 60, 80); leaves η alone before the
    first. So it goes with a GradualWarmup to the same `rate`."""

    def __init__(
        self,
        rate: float,
        epochs: Sequence[float] = (30.0, 60.0, 80.0),
        factor: float = 0.1,
        *,
        momentum_correction: bool = True,
    ) -> None:
        decay = Rate(start=rate, peak=rate, warmup="none", decay_epochs=tuple(epochs), decay_factor=factor)
        super().__init__(decay, momentum_correction=momentum_correction)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        steps = self.params.get("steps")
        if not steps or self._epoch + batch / steps >= self.rate.decay_epochs[0]:
            super().on_train_batch_begin(batch, logs)


def set_rate(optimizer: keras.optimizers.Optimizer, rate: float, momentum_correction: bool = True) -> None:
    """Sets the optimizer's learning rate; with momentum correction rescales the velocities that hold it (remark 2):
    those of `keras.optimizers.SGD` and of RMSprop with momentum."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # inside a LossScaleOptimizer
    old = rate_of(inner)
    new = float(np.float32(rate))  # as the variable will hold it
    if new == old:
        return
    inner.learning_rate = rate
    if momentum_correction and inner.built and old > 0:
        for velocity in _velocities_with_rate(inner):
            velocity.assign(velocity * (new / old))


def rate_of(optimizer: keras.optimizers.Optimizer) -> float:
    """η of the next step."""
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def _velocities_with_rate(optimizer: keras.optimizers.Optimizer) -> list:
    if isinstance(optimizer, keras.optimizers.SGD) and not isinstance(optimizer, SGD):
        return optimizer.momentums if optimizer.momentum else []
    if isinstance(optimizer, keras.optimizers.RMSprop):
        return optimizer._momentums if optimizer.momentum > 0 else []
    return []
