"""Keras callbacks of the recipe, made to be reused: initial broadcast, learning rate, metric sums, replica check."""

from collections.abc import Callable, Sequence

import keras
import numpy as np

from recipe import collectives
from recipe.keras import backend, state
from recipe.keras.distributed import is_distributed, reduction_of
from recipe.keras.sgd import SGD
from recipe.schedule import Rate


class BroadcastState(keras.callbacks.Callback):
    """Before the first step: rank root_rank's weights, moving statistics, optimizer slots and counters on all.

    Horovod's callback does this after the first step, which then averages gradients of different networks.
    `local_variables`, Keras's or the framework's, and their slots keep what each rank has. Random layers get a seed
    of each rank's own, a function of the root's seed and the rank; with `same_seeds` the root's."""

    def __init__(self, root_rank: int = 0, local_variables: Sequence = (), *, same_seeds: bool = False) -> None:
        super().__init__()
        self.root_rank, self.local_variables, self.same_seeds = root_rank, list(local_variables), same_seeds

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        _refuse_what_would_hang(model)
        if backend.FRAMEWORK == "tensorflow":
            model.jit_compile = False  # Horovod's operations can't be part of an XLA cluster

    def on_train_begin(self, logs: dict | None = None) -> None:
        state.broadcast_state(self.model, self.root_rank, self.local_variables, same_seeds=self.same_seeds)


class ScheduledRate(keras.callbacks.Callback):
    """Sets η = rate(epoch) before each step; epoch is a float, `epoch + step/steps_per_epoch` at the step's start.

    With momentum correction (paper, remark 2): Keras's SGD folds η into its velocity, so that the velocity is
    multiplied by η_new/η_old whenever η changes. This is exact, for classical and for Nesterov momentum."""

    def __init__(self, rate: Callable[[float], float], *, momentum_correction: bool = True) -> None:
        super().__init__()
        self.rate = rate
        self.momentum_correction = momentum_correction
        self._epoch = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        if (n := self.model.steps_per_execution) > 1:
            raise ValueError(
                f"steps_per_execution={n}: a callback sees only one step in {n}; leave it 1, or give the optimizer a "
                "recipe.keras.RateSchedule as its learning rate"
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        steps = self.params.get("steps")
        if not steps:
            raise ValueError("the number of steps of an epoch is unknown; pass steps_per_epoch to fit()")
        set_rate(self.model.optimizer, self.rate(self._epoch + batch / steps), self.momentum_correction)


class GradualWarmup(ScheduledRate):
    """Gradual warmup from base_rate to k·base_rate over the first `epochs` epochs (sec. 2.2), then leaves η alone.

    base_rate is η for one worker's share of the minibatch; k is the number of workers, usually `size()`."""

    def __init__(self, base_rate: float, k: int, epochs: float = 5.0, *, momentum_correction: bool = True) -> None:
        rate = Rate(start=base_rate, peak=k * base_rate, warmup_epochs=epochs, decay_epochs=())
        super().__init__(rate, momentum_correction=momentum_correction)
        self._done = False

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if not self._done:
            super().on_train_batch_begin(batch, logs)
            self._done = self._epoch + batch / self.params["steps"] >= self.rate.warmup_epochs


class StepDecay(ScheduledRate):
    """η = rate · factor^i from the i-th of `epochs` on (sec. 5.1: 1/10 at 30, 60, 80); leaves η alone before the
    first. So it goes with a GradualWarmup to the same `rate`."""

    def __init__(
        self,
        rate: float,
        epochs: Sequence[float] = (30.0, 60.0, 80.0),
        factor: float = 0.1,
        *,
        momentum_correction: bool = True,
    ) -> None:
        decay = Rate(start=rate, peak=rate, warmup="none", decay_epochs=tuple(epochs), decay_factor=factor)
        super().__init__(decay, momentum_correction=momentum_correction)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        steps = self.params.get("steps")
        if not steps or self._epoch + batch / steps >= self.rate.decay_epochs[0]:
            super().on_train_batch_begin(batch, logs)


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


def set_rate(optimizer: keras.optimizers.Optimizer, rate: float, momentum_correction: bool = True) -> None:
    """Sets the optimizer's learning rate; with momentum correction rescales the velocities that hold it (remark 2):
    those of `keras.optimizers.SGD` and of RMSprop with momentum."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # inside a LossScaleOptimizer
    old = rate_of(inner)
    new = float(np.float32(rate))  # as the variable will hold it
    if new == old:
        return
    inner.learning_rate = rate
    if momentum_correction and inner.built and old > 0:
        for velocity in _velocities_with_rate(inner):
            velocity.assign(velocity * (new / old))


def rate_of(optimizer: keras.optimizers.Optimizer) -> float:
    """η of the next step."""
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def _velocities_with_rate(optimizer: keras.optimizers.Optimizer) -> list:
    if isinstance(optimizer, keras.optimizers.SGD) and not isinstance(optimizer, SGD):
        return optimizer.momentums if optimizer.momentum else []
    if isinstance(optimizer, keras.optimizers.RMSprop):
        return optimizer._momentums if optimizer.momentum > 0 else []
    return []


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
