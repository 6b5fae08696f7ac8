"""Thin callbacks by the names and arguments of `horovod.keras.callbacks`, doing what its documentation promises."""

from collections.abc import Callable
from typing import Any

import keras

from recipe.keras import backend, velocities
from recipe.keras.callbacks.metrics import MetricSums, unweighted
from recipe.keras.callbacks.rates import ScheduledRate, ends_between_epochs, in_warmup, rate_of
from recipe.keras.callbacks.replicas import BroadcastState
from recipe.keras.passing import is_passing
from recipe.ranks import collectives

_UNSET = "unset.keras"  # Keras insists on a file name when a ModelCheckpoint is made


class BroadcastGlobalVariablesCallback(BroadcastState):
    """Rank root_rank's state on all ranks before the first step; `local_variables` keep what each rank has.

    `device` may be left empty only: the variables are broadcast where they lie. With `same_seeds`
    random layers draw the same numbers on all ranks; without it each rank draws its own."""

    def __init__(
        self,
        root_rank: int,
        device: str = "",
        local_variables: Any = None,
        same_seeds: bool = False,
    ) -> None:
        _refuse_device(device)
        if local_variables is not None and not isinstance(
            local_variables, (list, tuple, set, frozenset)
        ):
            local_variables = [local_variables]
        super().__init__(root_rank, same_seeds=same_seeds)
        self.device = device
        for v in local_variables or ():
            self.register_local_var(v)

    def register_local_var(self, var: Any) -> None:
        """Makes `var`, a Keras or a framework variable, one of `local_variables`: it keeps what its rank has.

        Takes effect when training begins."""
        if not hasattr(var, "shape") or (
            not hasattr(var, "assign") and backend.FRAMEWORK == "tensorflow"
        ):
            raise ValueError(f"local_variables must be variables, not {var!r}")
        self.local_variables.append(var)


class MetricAverageCallback(MetricSums):
    """Makes the epoch's logs speak of all ranks: sums over all examples, divided once.

    With `unweighted`, Horovod's old numbers: the mean over ranks of what is in their logs, however many examples each
    of them holds. Place it before the callbacks that read the logs."""

    def __init__(self, device: str = "", unweighted: bool = False) -> None:
        _refuse_device(device)
        super().__init__()
        self.device, self.unweighted = device, unweighted

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        super().on_train_batch_end(batch, logs)
        self.on_batch_end(batch, logs)

    def on_test_begin(self, logs: dict | None = None) -> None:
        if not self.unweighted:
            super().on_test_begin(logs)

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if not self.unweighted:
            super().on_test_batch_end(batch, logs)

    def on_test_end(self, logs: dict | None = None) -> None:
        if not self.unweighted:
            super().on_test_end(logs)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if self.unweighted:
            logs.update(unweighted(logs))
        else:
            super().on_epoch_end(epoch, logs)


class LearningRateScheduleCallback(ScheduledRate):
    """η = initial_lr · multiplier in the epochs from `start_epoch` up to `end_epoch` (exclusive; None: no end).

    `multiplier` is a number, or a function of the epoch: an integer at the beginning of each epoch with `staircase`,
    else the float epoch + batch / steps at the beginning of each batch. With `compounding`, Horovod's old numbers: a
    constant multiplier m means m^(epoch − start_epoch). `steps_per_epoch`: only where Keras doesn't know it. The
    epoch's logs get "lr", the rate of its last step. Raises ValueError without initial_lr."""

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        compounding: bool = False,
    ) -> None:
        if initial_lr is None:
            raise ValueError("initial_lr=None: give the rate that the multiplier multiplies")
        self.initial_lr, self.multiplier, self.compounding = initial_lr, multiplier, compounding
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.staircase, self.steps_per_epoch = staircase, steps_per_epoch
        super().__init__(self._rate, momentum_correction=momentum_correction)

    @property
    def current_epoch(self) -> int:
        """The epoch that has begun last."""
        return self._epoch

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not self.staircase:
            super().on_train_begin(logs)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None:
            held = velocities.held(self.model.optimizer)  # others may have set the next epoch's
            logs.setdefault("lr", rate_of(self.model.optimizer) if held is None else held)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self.on_batch_begin(batch, logs)

    def on_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if not is_passing(self.model):
            self._before_step(batch)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        super().on_train_batch_end(batch, logs)
        self.on_batch_end(batch, logs)

    def _before_step(self, batch: int) -> None:
        if self._epoch < self.start_epoch or (
            self.end_epoch is not None and self._epoch >= self.end_epoch
        ):
            return
        if not self.staircase:
            super()._before_step(batch)
        elif batch == 0:
            self._set(self.rate(self._epoch))

    def _rate(self, epoch: float) -> float:
        if callable(self.multiplier):
            return self.initial_lr * self.multiplier(epoch)
        power = epoch - self.start_epoch if self.compounding else 1
        return self.initial_lr * self.multiplier**power

    def _known_steps(self) -> int | None:
        return self.steps_per_epoch or super()._known_steps()

    def _steps(self) -> int:
        steps = self._known_steps()
        if not steps:
            raise ValueError(
                "the number of steps of an epoch is unknown; pass steps_per_epoch to fit() or here"
            )
        return steps


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """η from initial_lr / size at the first step to initial_lr at the first step of epoch `warmup_epochs`, by a
    constant amount per step (sec. 2.2); after that η is left alone, as by `GradualWarmup`.

    `warmup_epochs` may be a fraction. With `one_step_early`, Horovod's old numbers: every step has the rate of its
    successor, and initial_lr comes a step early. `verbose` prints a line on rank 0 when the warmup is done."""

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: float = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
        one_step_early: bool = False,
    ) -> None:
        super().__init__(
            initial_lr,
            self._ramp,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.warmup_epochs, self.verbose, self.one_step_early = (
            warmup_epochs,
            verbose,
            one_step_early,
        )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        super().on_epoch_begin(epoch, logs)
        if not is_passing(self.model) and ends_between_epochs(
            self.warmup_epochs, epoch, self._known_steps()
        ):
            self._set(self.initial_lr)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        if ends_between_epochs(self.warmup_epochs, epoch + 1, self._known_steps()):
            self._set(self.initial_lr)
        if epoch < self.warmup_epochs <= epoch + 1 and self.verbose and collectives.rank() == 0:
            print(f"\nEpoch {epoch + 1}: the learning rate has warmed up to {self.initial_lr:g}.")

    def _before_step(self, batch: int) -> None:
        if in_warmup(self.warmup_epochs, self._epoch, batch, self._steps):
            super()._before_step(batch)

    def _ramp(self, epoch: float) -> float:
        if self.one_step_early:
            epoch += 1 / self._steps()
        size = collectives.size()
        return (1 + (size - 1) * min(epoch / self.warmup_epochs, 1.0)) / size


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """A ModelCheckpoint that keeps the best model only, written by rank 0.

    `filepath` may also be set as an attribute before training; ValueError says so when it is missing. Place it after
    MetricAverageCallback, so that "best" speaks of all ranks."""

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        filepath: str | None = None,
    ) -> None:
        unset = "unset.weights.h5" if save_weights_only else _UNSET
        super().__init__(
            filepath or unset,
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        self.filepath = filepath

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not self.filepath:
            raise ValueError(
                "BestModelCheckpoint has no filepath; pass filepath= or set it before training"
            )
        super().on_train_begin(logs)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if collectives.rank() == 0:
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if collectives.rank() == 0:
            super().on_epoch_end(epoch, logs)


def _refuse_device(device: str) -> None:
    if device:
        raise ValueError(f"device={device!r}: values are exchanged where they lie; leave it empty")
