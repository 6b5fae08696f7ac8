"""Elastic training with Keras 3: ranks may die and join; the survivors go on from the last commit."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from horovod.common.elastic import ObjectState, run_fn

from recipe.elastic import lost_ranks_told
from recipe.keras import backend, state
from recipe.keras.distributed import reduction_of

_hvd = backend.horovod


class KerasState(ObjectState):
    """A model, its optimizer (default: the compiled one) and any picklable properties, as attributes.

    `commit()` keeps a copy of all variables in host memory, `restore()` goes back to it, `sync()` brings rank 0's to
    all ranks, but for the seeds of random layers: each rank has its own, by its number after a reset. Raises ValueError
    for a model without variables or without an optimizer."""

    def __init__(self, model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None, **kwargs: Any) -> None:
        if not model.built:
            raise ValueError(f"model {model.name!r} has no variables yet; call model.build(input_shape) first")
        self.model, self.optimizer = model, optimizer or model.optimizer
        if self.optimizer is None:
            raise ValueError(f"model {model.name!r} is not compiled; compile it or pass optimizer=")
        if not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        self._save_variables()
        super().__init__(bcast_object=_hvd.broadcast_object, get_rank=_hvd.rank, **kwargs)

    def save(self) -> None:
        self._save_variables()
        super().save()

    def restore(self) -> None:
        for v, value in zip(self._variables(), self._saved, strict=True):
            v.assign(value)
        self._forget_passes()
        super().restore()

    def sync(self) -> None:
        with lost_ranks_told():
            state.broadcast_model(self.model, self.optimizer)
        self._forget_passes()
        self._save_variables()
        super().sync()

    def _variables(self) -> list:
        return self.model.variables + self.optimizer.variables

    def _save_variables(self) -> None:
        self._saved = [np.array(keras.ops.convert_to_numpy(v)) for v in self._variables()]

    def _forget_passes(self) -> None:
        """A new rank has accumulated nothing, so that the others must forget what they have."""
        if (reduction := reduction_of(self.optimizer)) and reduction.sums:
            reduction.forget()


def run(func: Callable) -> Callable:
    """Decorates a training function `func(state, …)`: runs it again, from the synchronised state, whenever ranks are
    lost (after `state.restore()`) or join (at a commit)."""

    @functools.wraps(func)
    def told(*args: Any, **kwargs: Any) -> Any:
        with lost_ranks_told():
            return func(*args, **kwargs)

    return run_fn(told, _reset)


def _reset() -> None:
    _hvd.shutdown()
    _hvd.init()


class CommitStateCallback(keras.callbacks.Callback):
    """Commits `state` every `batches_per_commit` batches and at the end of each epoch."""

    def __init__(self, state: Any, batches_per_commit: int = 1) -> None:
        super().__init__()
        self.state, self.batches_per_commit = state, batches_per_commit
        self._batches = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._batches = 0  # all ranks count from the same batch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._batches += 1
        if self._batches % self.batches_per_commit == 0:
            self.state.commit()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Keeps in `state.batch` how many batches of the epoch are done, and 0 between epochs.

    The first epoch after a reset trains only the batches that were not done: the done ones pass by without a step,
    so that every callback sees the batch's number in the whole epoch. Place it before CommitStateCallback."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self._first = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._first = True
        self.model.train_function = getattr(self.model.train_function, "real", self.model.train_function)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if self._first and self.state.batch:
            _pass_by(self.model, self.state.batch)
        self._first = False

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.state.batch = max(self.state.batch, batch + 1)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.state.batch = 0


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Keeps in `state.epoch` how many epochs are done, over all resets.

    Right for `fit(initial_epoch=state.epoch, epochs=N)`, which schedules need, and for `fit(epochs=N - state.epoch)`.
    Place it before CommitStateCallback."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self._offset: int | None = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._offset = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if self._offset is None:
            self._offset = self.state.epoch - epoch

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.state.epoch = self._offset + epoch + 1


def _pass_by(model: keras.Model, batches: int) -> None:
    """Makes the model's next `batches` batches no steps; then its own train function comes back."""
    real, left = model.train_function, batches // model.steps_per_execution

    def train_function(data: Any) -> dict:
        nonlocal left
        if left:
            left -= 1
            return {}
        model.train_function = real
        return real(data)

    train_function.real = real
    model.train_function = train_function
