"""Keras callbacks of the recipe, made to be reused: initial broadcast, metric sums, replica check."""

from collections.abc import Sequence

import keras
import numpy as np

from recipe import collectives
from recipe.keras import backend, state
from recipe.keras.distributed import is_distributed, reduction_of


class BroadcastState(keras.callbacks.Callback):
    """Before the first step: rank root_rank's weights, moving statistics, optimizer slots, counters and seeds on all.

    Horovod's callback does this after the first step, which then averages gradients of different networks.
    `local_variables`, Keras's or the framework's, and their slots keep what each rank has."""

    def __init__(self, root_rank: int = 0, local_variables: Sequence = ()) -> None:
        super().__init__()
        self.root_rank, self.local_variables = root_rank, list(local_variables)

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        _refuse_what_would_hang(model)
        if backend.FRAMEWORK == "tensorflow":
            model.jit_compile = False  # Horovod's operations can't be part of an XLA cluster

    def on_train_begin(self, logs: dict | None = None) -> None:
        state.broadcast_state(self.model, self.root_rank, self.local_variables)


class MetricSums(keras.callbacks.Callback):
    """Makes the logs of epochs and evaluations speak of all ranks: adds up the metrics' own sums, divides once.

    So ranks may hold different numbers of examples. Right for every metric whose state is additive: means,
    accuracies, losses, counts, areas under curves. Place it before the callbacks that read the logs. What
    `evaluate()` returns is corrected too, when Keras knows its number of steps beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self._in_fit = False
        self._train: dict[str, float] = {}
        self._test: dict[str, float] = {}

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._in_fit = True

    def on_train_end(self, logs: dict | None = None) -> None:
        self._in_fit = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._train, self._test = {}, {}

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if batch + 1 == self.params.get("steps"):  # before Keras reads the metrics for the epoch's logs
            self._train = sum_metrics(self.model)

    def on_test_begin(self, logs: dict | None = None) -> None:
        self._test = {}
        if self._in_fit and not self._train:  # the evaluation is about to reset the metrics
            self._train = sum_metrics(self.model)

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if not self._in_fit and batch + 1 == self.params.get("steps"):  # inside fit() these are the training steps
            self._test = sum_metrics(self.model)

    def on_test_end(self, logs: dict | None = None) -> None:
        self._test = self._test or sum_metrics(self.model)
        logs.update(self._test)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._train = self._train or sum_metrics(self.model)
        logs.update(self._train | {f"val_{name}": value for name, value in self._test.items()})


class ReplicaCheck(keras.callbacks.Callback):
    """Every `every` steps compares all ranks' weights and optimizer state, and the variables in `also`, bit for bit,
    and raises RunError on all ranks when one differs, naming the first variable."""

    def __init__(self, every: int = 500, also: Sequence = ()) -> None:
        super().__init__()
        self.every, self.also = every, also
        self._steps = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        reduction = reduction_of(self.model.optimizer)
        if reduction and reduction.process_set.process_set_id:
            raise ValueError(f"ReplicaCheck compares all ranks, which {reduction.process_set} does not keep equal")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._steps += 1
        if self._steps % self.every == 0:
            state.check_replicas(self.model, self.also)

    def on_train_end(self, logs: dict | None = None) -> None:
        state.check_replicas(self.model, self.also)


def sum_metrics(model: keras.Model) -> dict[str, float]:
    """Adds up the state of the model's metrics over all ranks, in place, and returns their results. Collective."""
    variables = [v for metric in model.metrics for v in metric.variables]
    mine = [keras.ops.convert_to_numpy(v) for v in variables]
    summed = collectives.total(np.concatenate([np.ravel(m).astype(np.float64) for m in mine]), "metrics")
    ends = np.cumsum([m.size for m in mine])
    for v, value in zip(variables, np.split(summed, ends[:-1]), strict=True):
        v.assign(value.reshape(v.shape))
    return {name: float(keras.ops.convert_to_numpy(value)) for name, value in model.get_metrics_result().items()}


def _refuse_what_would_hang(model: keras.Model) -> None:
    if is_distributed(getattr(model.optimizer, "inner_optimizer", None)):
        raise ValueError(
            "the LossScaleOptimizer is outside the DistributedOptimizer, so that ranks would disagree about "
            "overflows and hang; use DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer))"
        )
