"""The recipe's learning rate as a Keras schedule: inside the traced step and inside saved models."""

import dataclasses
import math
from typing import Any

import keras
from keras import ops

from recipe.rules.schedule import Rate


@keras.saving.register_keras_serializable("recipe")
class RateSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """η of the step: `rate(step / steps_per_epoch)`, the same number at every step as `ScheduledRate(rate)` sets.

    Right under `steps_per_execution` > 1, where callbacks see only every n-th step. `steps_per_epoch` counts what the
    optimizer counts: batches, also with Keras's `gradient_accumulation_steps`; updates with Horovod's
    `backward_passes_per_step`. Pair it with `recipe.keras.SGD`, whose velocity is free of η: nothing corrects the
    momentum of `keras.optimizers.SGD` here.

    Raises ValueError when steps_per_epoch is not a positive integer."""

    def __init__(self, rate: Rate | dict, steps_per_epoch: int) -> None:
        if not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch={steps_per_epoch!r} must be a positive integer")
        self.rate = rate if isinstance(rate, Rate) else Rate(**rate)
        self.steps_per_epoch = steps_per_epoch
        ramp = self.rate.warmup_epochs if self.rate.warmup != "none" else 0.0
        self._warm = self._first_step(ramp)
        self._decays = [self._first_step(epoch) for epoch in self.rate.decay_epochs]
        # η after i decays, taken at an epoch past warmup and i boundaries, computed by the rate itself
        decays = range(len(self._decays) + 1)
        self._rates = [self.rate.peak * self.rate.decay_factor**i for i in decays]

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "int64")
        passed = sum(
            (ops.cast(step >= decay, "int64") for decay in self._decays), ops.zeros_like(step)
        )
        settled = ops.take(ops.convert_to_tensor(self._rates, dtype="float64"), passed)
        return ops.cast(
            ops.where(step < self._warm, self._ramp(step), settled), keras.config.floatx()
        )

    def get_config(self) -> dict:
        rate = dataclasses.asdict(self.rate) | {"decay_epochs": list(self.rate.decay_epochs)}
        return {"rate": rate, "steps_per_epoch": self.steps_per_epoch}

    def _ramp(self, step: Any) -> Any:
        """Gradual or constant warmup, in the operations and the precision of Rate.__call__ under ScheduledRate."""
        if self.rate.warmup != "gradual" or not self._warm:
            return ops.full_like(ops.cast(step, "float64"), self.rate.start)
        within = ops.cast(step % self.steps_per_epoch, "float64") / self.steps_per_epoch
        epoch = ops.cast(step // self.steps_per_epoch, "float64") + within
        return self.rate.start + (self.rate.peak - self.rate.start) * (
            epoch / self.rate.warmup_epochs
        )

    def _first_step(self, epoch: float) -> int:
        """The first step whose epoch, as ScheduledRate computes it, is not before `epoch`."""
        step = max(0, math.floor(epoch * self.steps_per_epoch) - 1)
        while (
            step // self.steps_per_epoch + step % self.steps_per_epoch / self.steps_per_epoch
            < epoch
        ):
            step += 1
        return step
