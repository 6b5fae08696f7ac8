"""Callbacks that set the learning rate, each in its own epochs only, with momentum correction."""

from collections.abc import Callable, Sequence

import keras
import numpy as np

from recipe.keras import velocities
from recipe.keras.passing import is_passing
from recipe.rules.schedule import Rate


class ScheduledRate(keras.callbacks.Callback):
    """Sets η = rate(epoch) before each step. The epoch is a float: epoch + step / steps_per_epoch.

    With momentum correction (paper, remark 2): Keras's SGD folds η into its velocity, so that the
    velocity is multiplied by η_new/η_old whenever η changes. This is exact, for classical and for
    Nesterov momentum. η_old is the rate of the last step, whatever another callback has set since.
    """

    def __init__(self, rate: Callable[[float], float], *, momentum_correction: bool = True) -> None:
        super().__init__()
        self.rate = rate
        self.momentum_correction = momentum_correction
        self._epoch = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        n = self.model.steps_per_execution
        if n > 1:
            raise ValueError(
                f"steps_per_execution={n}: a callback sees only one step in {n}; leave it 1, "
                "or give the optimizer a recipe.keras.RateSchedule as its learning rate"
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if not is_passing(self.model):
            self._before_step(batch)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if batch + 1 == self._known_steps():  # before other callbacks set η for the next epoch
            velocities.hold(self.model.optimizer, rate_of(self.model.optimizer))

    def _before_step(self, batch: int) -> None:
        self._set(self.rate(self._epoch + batch / self._steps()))

    def _set(self, rate: float) -> None:
        set_rate(self.model.optimizer, rate, self.momentum_correction)

    def _known_steps(self) -> int | None:
        return self.params.get("steps")

    def _steps(self) -> int:
        steps = self._known_steps()
        if not steps:
            raise ValueError(
                "the number of steps of an epoch is unknown; pass steps_per_epoch to fit()"
            )
        return steps


class GradualWarmup(ScheduledRate):
    """Raises η from base_rate to k·base_rate in the first `epochs` epochs, gradually (sec. 2.2).

    After that it leaves η alone. base_rate is η for one worker's share of the minibatch. k is the
    number of workers, usually `size()`.

    The peak is set where the warmup ends: at the end of its last epoch, so that it is in a
    checkpoint. It is set again as the next epoch begins, so that a run which is resumed there has
    it. What other callbacks set later is kept.
    """

    rate: Rate

    def __init__(
        self, base_rate: float, k: int, epochs: float = 5.0, *, momentum_correction: bool = True
    ) -> None:
        rate = Rate(start=base_rate, peak=k * base_rate, warmup_epochs=epochs, decay_epochs=())
        super().__init__(rate, momentum_correction=momentum_correction)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        super().on_epoch_begin(epoch, logs)
        is_over = ends_between_epochs(self.rate.warmup_epochs, epoch, self._known_steps())
        if is_over and not is_passing(self.model):
            self._set(self.rate.peak)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if ends_between_epochs(self.rate.warmup_epochs, epoch + 1, self._known_steps()):
            self._set(self.rate.peak)

    def _before_step(self, batch: int) -> None:
        if in_warmup(self.rate.warmup_epochs, self._epoch, batch, self._steps):
            super()._before_step(batch)


class StepDecay(ScheduledRate):
    """η = rate · factor^i from the i-th of `epochs` on (sec. 5.1: 1/10 at 30, 60, 80).

    It leaves η alone before the first of them, and so goes with a GradualWarmup to the same `rate`.
    """

    rate: Rate

    def __init__(
        self,
        rate: float,
        epochs: Sequence[float] = (30.0, 60.0, 80.0),
        factor: float = 0.1,
        *,
        momentum_correction: bool = True,
    ) -> None:
        decay = Rate(
            start=rate, peak=rate, warmup="none", decay_epochs=tuple(epochs), decay_factor=factor
        )
        super().__init__(decay, momentum_correction=momentum_correction)

    def _before_step(self, batch: int) -> None:
        first = self.rate.decay_epochs[0]
        if self._epoch + 1 > first and self._epoch + batch / self._steps() >= first:
            super()._before_step(batch)


def ends_between_epochs(end: float, epoch: int, steps: int | None) -> bool:
    """Return whether a warmup of `end` epochs ends between the steps of two epochs.

    That is: after the start of the last of the `steps` steps of the epoch before `epoch`, and not
    after the start of the first step of this one. With unknown `steps` only where `end` is this
    very epoch.
    """
    last = epoch - 1 + (steps - 1) / steps if steps else epoch
    return last < end < epoch or end == epoch


def in_warmup(end: float, epoch: int, batch: int, steps: Callable[[], int]) -> bool:
    """Return whether a step belongs to a warmup of `end` epochs.

    It starts before the end, or is the first after it and not the first of its epoch (see
    `ends_between_epochs`). `steps` gives the steps of an epoch.
    """
    if epoch >= end:
        return False
    return batch == 0 or epoch + (batch - 1) / steps() < end


def set_rate(
    optimizer: keras.optimizers.Optimizer, rate: float, momentum_correction: bool = True
) -> None:
    """Set the optimizer's learning rate.

    With momentum correction (paper, remark 2) rescale the velocities that have the rate as a
    factor: those of `keras.optimizers.SGD` and of RMSprop with momentum.
    """
    # The rate, and whether a velocity depends on it.
    inner = velocities.innermost(optimizer)
    present_rate = rate_of(inner)
    new_rate = float(np.float32(rate))  # as the variable will hold it
    if new_rate != present_rate:
        inner.learning_rate = rate
    if not (momentum_correction and inner.built):
        return

    # The velocities have the rate of the last step, which another callback may have changed since.
    held_rate = velocities.held(inner)
    old_rate = present_rate if held_rate is None else held_rate
    if new_rate != old_rate and old_rate > 0:
        for velocity in velocities.with_rate(inner):
            velocity.assign(velocity * (new_rate / old_rate))
    if held_rate is not None:
        velocities.hold(inner, new_rate)


def rate_of(optimizer: keras.optimizers.Optimizer) -> float:
    """Return η of the next step."""
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))
