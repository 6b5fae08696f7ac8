"""Callbacks that make all ranks' state equal before the first step, and compare it later."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from recipe.keras import backend, state
from recipe.keras.agreement import check_started
from recipe.keras.distributed import is_distributed, optimizers_of, reduction_of


class BroadcastState(keras.callbacks.Callback):
    """Before the first step: rank root_rank's weights, moving statistics, optimizer slots and counters on all.

    Horovod's callback does this after the first step, which then averages gradients of different networks. A model
    that Keras builds at its first batch is built on that batch, broadcast, and then trained on it.
    `local_variables`, Keras's or the framework's, and their slots keep what each rank has. Random layers get a seed
    of each rank's own, a function of the root's seed and the rank; with `same_seeds` the root's."""

    def __init__(
        self, root_rank: int = 0, local_variables: Sequence = (), *, same_seeds: bool = False
    ) -> None:
        super().__init__()
        self.root_rank, self.local_variables, self.same_seeds = (
            root_rank,
            list(local_variables),
            same_seeds,
        )

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        check_started()
        if backend.FRAMEWORK == "tensorflow":
            model.jit_compile = False  # Horovod's operations can't be part of an XLA cluster

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not _comes_later(self.model):
            self._broadcast()
        elif self.model.run_eagerly:
            raise ValueError(
                f"model {self.model.name!r} is built at its first batch, which can't be tried with run_eagerly=True; "
                "call it once before fit(), as in model(x[:1])"
            )
        else:
            self.model.train_function = self._at_first_step(self.model.train_function)

    def _at_first_step(self, real: Callable) -> Callable:
        """The train function: at its first call the first batch makes the variables, and the broadcast comes before
        the step on it."""

        def train_function(iterator: Any) -> dict:
            self.model.train_function = real
            first = next(iterator)
            backend.prepare(real, first)
            self._broadcast()
            return real(_chained(first, iterator))

        return train_function

    def _broadcast(self) -> None:
        state.broadcast_state(
            self.model, self.root_rank, self.local_variables, same_seeds=self.same_seeds
        )


class ReplicaCheck(keras.callbacks.Callback):
    """Every `every` steps compares all ranks' weights and optimizer state, and the variables in `also`, bit for bit,
    and raises RunError on all ranks when one differs, naming the first variable."""

    def __init__(self, every: int = 500, also: Sequence = ()) -> None:
        super().__init__()
        self.every, self.also = every, also
        self._steps = 0

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        check_started()

    def on_train_begin(self, logs: dict | None = None) -> None:
        for optimizer in optimizers_of(self.model):
            reduction = reduction_of(optimizer)
            if reduction and reduction.process_set.process_set_id:
                raise ValueError(
                    f"ReplicaCheck compares all ranks, which {reduction.process_set} does not keep equal"
                )

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._steps += 1
        if self._steps % self.every == 0:
            state.check_replicas(self.model, self.also)

    def on_train_end(self, logs: dict | None = None) -> None:
        state.check_replicas(self.model, self.also)


def _comes_later(model: keras.Model) -> bool:
    """Whether variables come to exist at the first batch only. With PyTorch Keras builds the model beforehand."""
    if backend.FRAMEWORK != "tensorflow":
        return False
    optimizers = [o for o in optimizers_of(model) if is_distributed(o) and o is not model.optimizer]
    return not all(layer.built for layer in model._flatten_layers()) or not all(
        o.built for o in optimizers
    )


def _chained(first: Any, iterator: Any) -> Any:
    """A generator of the first batch and what follows: only several steps per execution ask for more."""
    yield first
    yield from iterator
