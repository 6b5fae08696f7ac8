"""The recipe's learning rate as a Keras schedule, inside the traced step and in saved models."""

import dataclasses
import math
from typing import Any

import keras
from keras import ops

from recipe.keras.tensors import Tensor
from recipe.rules.schedule import Rate


@keras.saving.register_keras_serializable("recipe")
class RateSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """η of the step, `rate(step / steps_per_epoch)`: what `ScheduledRate(rate)` sets.

    It is right under `steps_per_execution` > 1, where callbacks see only every n-th step.

    `steps_per_epoch` counts what the optimizer counts: batches, also with Keras's
    `gradient_accumulation_steps`, but updates with Horovod's `backward_passes_per_step`. Pair it
    with `recipe.keras.SGD`, whose velocity is free of η: nothing corrects the momentum of
    `keras.optimizers.SGD` here.

    Raise ValueError when `steps_per_epoch` is not a positive integer.
    """

    def __init__(self, rate: Rate | dict[str, Any], steps_per_epoch: int) -> None:
        if not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch={steps_per_epoch!r} must be a positive integer")
        self.rate = rate if isinstance(rate, Rate) else Rate(**rate)
        self.steps_per_epoch = steps_per_epoch

        # Boundaries in steps, and η between them as the rate itself computes it.
        ramp = self.rate.warmup_epochs if self.rate.warmup != "none" else 0.0
        self._warm = self._first_step(ramp)
        self._decays = [self._first_step(epoch) for epoch in self.rate.decay_epochs]
        self._rates = []  # η after 0, 1, … decays
        for decays in range(len(self._decays) + 1):
            self._rates.append(self.rate.peak * self.rate.decay_factor**decays)

    def __call__(self, step: Tensor) -> Tensor:
        """Return η of a step, a scalar of Keras's float type."""
        step = ops.cast(step, "int64")
        decays = ops.zeros_like(step)
        for decay in self._decays:
            decays = decays + ops.cast(step >= decay, "int64")
        settled = ops.take(ops.convert_to_tensor(self._rates, dtype="float64"), decays)
        rate = ops.where(step < self._warm, self._ramp(step), settled)
        return ops.cast(rate, keras.config.floatx())

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, for a saved model."""
        rate = dataclasses.asdict(self.rate)
        rate["decay_epochs"] = list(self.rate.decay_epochs)
        return {"rate": rate, "steps_per_epoch": self.steps_per_epoch}

    def _ramp(self, step: Tensor) -> Tensor:
        """Return η of a step in the gradual or constant warmup.

        Operations and precision are those of Rate.__call__ under ScheduledRate.
        """
        rate = self.rate
        if rate.warmup != "gradual" or not self._warm:
            return ops.full_like(ops.cast(step, "float64"), rate.start)
        within = ops.cast(step % self.steps_per_epoch, "float64") / self.steps_per_epoch
        epoch = ops.cast(step // self.steps_per_epoch, "float64") + within
        return rate.start + (rate.peak - rate.start) * (epoch / rate.warmup_epochs)

    def _first_step(self, epoch: float) -> int:
        """Return the first step that is not before `epoch`, as ScheduledRate computes epochs."""
        step = max(0, math.floor(epoch * self.steps_per_epoch) - 1)
        while self._epoch(step) < epoch:
            step += 1
        return step

    def _epoch(self, step: int) -> float:
        whole, within = divmod(step, self.steps_per_epoch)
        return whole + within / self.steps_per_epoch
