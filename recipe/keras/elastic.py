"""Elastic training with Keras 3: ranks may die and join.

The survivors go on from the last commit.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import keras
import numpy as np
from horovod.common.elastic import ObjectState

from recipe.keras import backend, passing, state, velocities
from recipe.keras.distributed import reduction_of
from recipe.ranks import elastic

T = TypeVar("T")

_hvd = backend.horovod


class KerasState(ObjectState):
    """A model, its optimizer (default: the compiled one) and picklable properties, as attributes.

    `commit()` keeps a copy of all variables in host memory. `restore()` goes back to it. `sync()`
    brings rank 0's to all ranks, but for the seeds of random layers: each rank has its own, by its
    number after a reset.

    Raise ValueError for a model without variables or without an optimizer.
    """

    def __init__(
        self, model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None, **kwargs: Any
    ) -> None:
        # A class's `build` may mark a model as built without making any variables.
        if not model.built or not model.variables:
            raise ValueError(
                f"model {model.name!r} has no variables yet; call it once on a batch first: "
                "model(x[:1])"
            )
        self.model = model
        self.optimizer = optimizer or model.optimizer
        if self.optimizer is None:
            raise ValueError(f"model {model.name!r} is not compiled; compile it or pass optimizer=")
        if not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        self._save_variables()
        super().__init__(bcast_object=_hvd.broadcast_object, get_rank=_hvd.rank, **kwargs)

    def save(self) -> None:
        """Keep a copy of all variables and properties in host memory."""
        self._save_variables()
        super().save()

    def restore(self) -> None:
        """Go back to the last copy."""
        for v, value in zip(self._variables(), self._saved, strict=True):
            v.assign(value)
        velocities.forget(self.optimizer)
        self._forget_passes()
        super().restore()

    def sync(self) -> None:
        """Bring rank 0's variables and properties to all ranks. Collective."""
        with elastic.lost_ranks_as_horovod_errors():
            state.broadcast_model(self.model, [self.optimizer])
        self._forget_passes()
        self._save_variables()
        super().sync()

    def _variables(self) -> list[keras.Variable]:
        return self.model.variables + self.optimizer.variables

    def _save_variables(self) -> None:
        self._saved = [np.array(keras.ops.convert_to_numpy(v)) for v in self._variables()]

    def _forget_passes(self) -> None:
        """Drop gradients that no update has used: a new rank has none."""
        if reduction := reduction_of(self.optimizer):
            reduction.forget()


def run(func: Callable[..., T]) -> Callable[..., T]:
    """Decorate a training function `func(state, …)`, to run it again from the synchronised state.

    That happens when ranks are lost, after `state.restore()`, or when they join, at a commit.
    """

    @functools.wraps(func)
    def rerun(state: ObjectState, *args: Any, **kwargs: Any) -> T:
        return elastic.rerun(lambda state: func(state, *args, **kwargs), state)

    return rerun


class CommitStateCallback(keras.callbacks.Callback):
    """Call `commit()` every `batches_per_commit` batches and at the end of each epoch."""

    def __init__(self, state: ObjectState, batches_per_commit: int = 1) -> None:
        super().__init__()
        self.state = state
        self.batches_per_commit = batches_per_commit
        self.batches_remaining = batches_per_commit

    def commit(self) -> None:
        """Commit the state. A subclass may do more, or choose when to."""
        self.state.commit()

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.batches_remaining = self.batches_per_commit  # all ranks count from the same batch

    def on_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.batches_remaining -= 1
        if self.batches_remaining == 0:
            self.commit()
            self.batches_remaining = self.batches_per_commit

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Keep in `state.batch` how many batches of the epoch are done, and 0 between epochs.

    The first epoch after a reset trains only the batches that were not done. The done ones pass by
    without a step, so that every callback sees the batch's number in the whole epoch. Place it
    before CommitStateCallback.
    """

    def __init__(self, state: ObjectState) -> None:
        super().__init__()
        self.state = state
        self.steps_per_epoch: int | None = None  # of a whole epoch, once one has begun

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.steps_per_epoch = None
        passing.stop_passing(self.model)
        if self.state.batch:
            passing.pass_by(self.model, self.state.batch)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.steps_per_epoch = self.params.get("steps")

    def on_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.state.batch = max(self.state.batch, batch + 1)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.state.batch = 0


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Keep in `state.epoch` how many epochs are done, over all resets.

    It is right for `fit(initial_epoch=state.epoch, epochs=N)`, which schedules need, and for
    `fit(epochs=N - state.epoch)`. Place it before CommitStateCallback.
    """

    def __init__(self, state: ObjectState) -> None:
        super().__init__()
        self.state = state
        self.initial_epoch = state.epoch  # how many epochs were done when training began
        self._first: int | None = None  # Keras's number of the first epoch since then

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.initial_epoch = self.state.epoch
        self._first = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if self._first is None:
            self._first = epoch

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        assert self._first is not None
        self.state.epoch = self.initial_epoch + epoch - self._first + 1
