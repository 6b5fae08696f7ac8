"""Callbacks with the names and arguments of `horovod.keras.callbacks`, as they are documented."""

from collections.abc import Callable
from typing import Any

import keras

from recipe.keras import backend, velocities
from recipe.keras.callbacks.metrics import MetricSums, unweighted
from recipe.keras.callbacks.rates import ScheduledRate, ends_between_epochs, in_warmup, rate_of
from recipe.keras.callbacks.replicas import BroadcastState
from recipe.keras.passing import is_passing
from recipe.ranks import collectives

# Keras insists on a file name when a ModelCheckpoint is made.
_UNSET, _UNSET_WEIGHTS = "unset.keras", "unset.weights.h5"


class BroadcastGlobalVariablesCallback(BroadcastState):
    """Gives all ranks the state of rank root_rank before the first step.

    The `local_variables` keep what each rank has. `device` may be left empty only: the variables
    are broadcast where they lie. With `same_seeds` random layers draw the same numbers on all
    ranks. Without it each rank draws its own.
    """

    def __init__(
        self,
        root_rank: int,
        device: str = "",
        local_variables: Any = None,
        same_seeds: bool = False,
    ) -> None:
        _refuse_device(device)
        super().__init__(root_rank, same_seeds=same_seeds)
        self.device = device
        for variable in _listed(local_variables):
            self.register_local_var(variable)

    def register_local_var(self, var: Any) -> None:
        """Make `var`, a Keras or a framework variable, one of `local_variables`.

        It takes effect when training begins. Raise ValueError when it is no variable.
        """
        is_assignable = hasattr(var, "assign") or backend.FRAMEWORK == "torch"
        if not hasattr(var, "shape") or not is_assignable:
            raise ValueError(f"local_variables must be variables, not {var!r}")
        self.local_variables.append(var)


class MetricAverageCallback(MetricSums):
    """Makes the epoch's logs speak of all ranks: sums over all examples, divided once.

    With `unweighted` it gives Horovod's old numbers: the mean over ranks of what is in their logs,
    however many examples each of them holds. Place it before the callbacks that read the logs.
    """

    def __init__(self, device: str = "", unweighted: bool = False) -> None:
        _refuse_device(device)
        super().__init__()
        self.device = device
        self.unweighted = unweighted

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
        if not self.unweighted:
            super().on_epoch_end(epoch, logs)
        elif logs is not None:
            logs.update(unweighted(logs))


class LearningRateScheduleCallback(ScheduledRate):
    """Sets η = initial_lr · multiplier in the epochs from `start_epoch` to before `end_epoch`.

    - `end_epoch=None` means no end.
    - `multiplier` is a number, or a function of the epoch.
    - With `staircase` the epoch is an integer, at the beginning of each epoch. Else it is the float
      epoch + batch / steps, at the beginning of each batch.
    - `compounding` gives Horovod's old numbers: a constant multiplier m means
      m^(epoch − start_epoch).
    - `steps_per_epoch` is only needed where Keras doesn't know it.

    The epoch's logs get "lr", the rate of its last step. Raises ValueError without initial_lr.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: float | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        compounding: bool = False,
    ) -> None:
        if initial_lr is None:
            raise ValueError("initial_lr=None: give the rate that the multiplier multiplies")
        self.initial_lr = initial_lr
        self.multiplier = multiplier
        self.compounding = compounding
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.steps_per_epoch = steps_per_epoch
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
        is_over = self.end_epoch is not None and self._epoch >= self.end_epoch
        if self._epoch < self.start_epoch or is_over:
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
    """Raises η from initial_lr / size to initial_lr in the first `warmup_epochs` epochs (sec. 2.2).

    The first step has initial_lr / size, the first step of epoch `warmup_epochs` has initial_lr. η
    grows by a constant amount per step. After that η is left alone, as by `GradualWarmup`.
    `warmup_epochs` may be a fraction. `one_step_early` gives Horovod's old numbers: every step has
    the rate of its successor, and initial_lr comes a step early. `verbose` prints a line on rank 0
    when the warmup is done.
    """

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
        self.warmup_epochs = warmup_epochs
        self.verbose = verbose
        self.one_step_early = one_step_early

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        super().on_epoch_begin(epoch, logs)
        is_over = ends_between_epochs(self.warmup_epochs, epoch, self._known_steps())
        if is_over and not is_passing(self.model):
            self._set(self.initial_lr)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        if ends_between_epochs(self.warmup_epochs, epoch + 1, self._known_steps()):
            self._set(self.initial_lr)
        is_last = epoch < self.warmup_epochs <= epoch + 1
        if is_last and self.verbose and collectives.rank() == 0:
            print(f"\nEpoch {epoch + 1}: the learning rate has warmed up to {self.initial_lr:g}.")

    def _before_step(self, batch: int) -> None:
        if in_warmup(self.warmup_epochs, self._epoch, batch, self._steps):
            super()._before_step(batch)

    def _ramp(self, epoch: float) -> float:
        if self.one_step_early:
            epoch += 1 / self._steps()
        size = collectives.size()
        ramp = min(epoch / self.warmup_epochs, 1.0)
        return (1 + (size - 1) * ramp) / size


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """A ModelCheckpoint that keeps the best model only, written by rank 0.

    `filepath` may also be set as an attribute before training. Raises ValueError when it is
    missing. Place it after MetricAverageCallback, so that "best" speaks of all ranks.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        filepath: str | None = None,
    ) -> None:
        super().__init__(
            filepath or (_UNSET_WEIGHTS if save_weights_only else _UNSET),
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


def _listed(variables: Any) -> list:
    """Return what `local_variables` was given, a variable or several, as a list."""
    if variables is None:
        return []
    is_collection = isinstance(variables, (list, tuple, set, frozenset))
    return list(variables) if is_collection else [variables]


def _refuse_device(device: str) -> None:
    if device:
        raise ValueError(f"device={device!r}: values are exchanged where they lie; leave it empty")
