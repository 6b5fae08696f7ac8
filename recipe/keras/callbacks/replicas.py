"""Callbacks that make all ranks' state equal before the first step, and compare it later."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from recipe.keras import backend, state
from recipe.keras.agreement import check_started
from recipe.keras.distributed import is_distributed, optimizers_of, reduction_of


class BroadcastState(keras.callbacks.Callback):
    """Gives all ranks the state of rank root_rank before the first step.

    It is the weights, moving statistics, optimizer slots and counters.

    Horovod's callback does this after the first step, which then averages gradients of different
    networks. A model that Keras builds at its first batch is built on that batch, broadcast, and
    then trained on it.

    `local_variables`, Keras's or the framework's, and their slots keep what each rank has. Random
    layers get a seed of each rank's own, a function of the root's seed and the rank. With
    `same_seeds` they get the root's.
    """

    def __init__(
        self, root_rank: int = 0, local_variables: Sequence = (), *, same_seeds: bool = False
    ) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.local_variables = list(local_variables)
        self.same_seeds = same_seeds

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        check_started()
        if backend.FRAMEWORK == "tensorflow":
            model.jit_compile = False  # Horovod's operations can't be part of an XLA cluster

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not _is_built_later(self.model):
            self._broadcast()
            return
        if self.model.run_eagerly:
            raise ValueError(
                f"model {self.model.name!r} is built at its first batch, which can't be tried with "
                "run_eagerly=True; call it once before fit(), as in model(x[:1])"
            )
        self.model.train_function = self._broadcasting(self.model.train_function)

    def _broadcasting(self, train_on: Callable[[Iterator], dict]) -> Callable[[Iterator], dict]:
        """Return a train function that broadcasts before its first step, once the variables exist.

        They come to exist when the first batch is tried.
        """

        def train_function(batches: Iterator) -> dict:
            self.model.train_function = train_on
            first = next(batches)
            backend.prepare(train_on, first)
            self._broadcast()
            return train_on(_chained(first, batches))

        return train_function

    def _broadcast(self) -> None:
        state.broadcast_state(
            self.model, self.root_rank, self.local_variables, same_seeds=self.same_seeds
        )


class ReplicaCheck(keras.callbacks.Callback):
    """Compares all ranks' weights and optimizer state, and the variables in `also`, bit for bit.

    It does so every `every` steps. Raises RunError on all ranks when a variable differs, naming the
    first.
    """

    def __init__(self, every: int = 500, also: Sequence = ()) -> None:
        super().__init__()
        self.every = every
        self.also = also
        self._steps = 0

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        check_started()

    def on_train_begin(self, logs: dict | None = None) -> None:
        for optimizer in optimizers_of(self.model):
            reduction = reduction_of(optimizer)
            if reduction is not None and reduction.process_set.process_set_id:
                raise ValueError(
                    "ReplicaCheck compares all ranks, "
                    f"which {reduction.process_set} does not keep equal"
                )

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._steps += 1
        if self._steps % self.every == 0:
            state.check_replicas(self.model, self.also)

    def on_train_end(self, logs: dict | None = None) -> None:
        state.check_replicas(self.model, self.also)


def _is_built_later(model: keras.Model) -> bool:
    """Return whether variables come to exist at the first batch only.

    With PyTorch Keras builds the model beforehand.
    """
    if backend.FRAMEWORK != "tensorflow":
        return False
    optimizers = [o for o in optimizers_of(model) if is_distributed(o) and o is not model.optimizer]
    parts = [*model._flatten_layers(), *optimizers]
    return not all(part.built for part in parts)


def _chained(first: Any, batches: Iterator) -> Iterator:
    """Yield the first batch and then the others, for which several steps per execution ask."""
    yield first
    yield from batches
