"""The logs of a Keras `fit` and an evaluation on 2 real ranks, on both backends.

The tests' bodies run on the ranks.
"""

from typing import Any

import keras
import numpy as np
import pytest

import recipe.keras as hvd
from recipe.keras.callbacks import BroadcastState, MetricSums
from tests.pools import on_ranks
from tests.recipe.keras.comparing import assert_same_on_all_ranks
from tests.recipe.keras.regression import BATCH, data, target

SIZES = (3, 1)  # batches of the ranks
QUIET = {"batch_size": BATCH, "verbose": 0}


class Largest(keras.metrics.Metric):
    """A metric whose state is no sum."""

    def __init__(self, name: str = "largest") -> None:
        super().__init__(name=name)
        self.seen = self.add_variable((), "zeros", name="seen")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.seen.assign(keras.ops.maximum(self.seen, keras.ops.max(y_true)))

    def result(self) -> Any:
        return self.seen


class Counted(keras.metrics.Metric):
    """A metric of a user's whose state is a sum: the share of positive targets."""

    def __init__(self, name: str = "counted") -> None:
        super().__init__(name=name)
        self.positive = self.add_variable((), "zeros", name="positive")
        self.all = self.add_variable((), "zeros", name="all")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        is_positive = keras.ops.cast(y_true > 0, "float32")
        self.positive.assign_add(keras.ops.sum(is_positive))
        self.all.assign_add(keras.ops.cast(keras.ops.size(y_true), "float32"))

    def result(self) -> Any:
        return self.positive / self.all


def frozen() -> keras.optimizers.Optimizer:
    """Make an optimizer that leaves the weights what they are."""
    return hvd.DistributedOptimizer(keras.optimizers.SGD(0.0))


def classifier(optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """Make a model with metrics of each kind. All ranks have the same."""
    keras.utils.set_random_seed(3)
    layers = [keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid")]
    model = keras.Sequential(layers)
    metrics = [
        "accuracy",
        keras.metrics.AUC(name="auc"),
        keras.metrics.F1Score(threshold=0.5),
        Counted(),
        Largest(),
    ]
    model.compile(optimizer, "mse", metrics=metrics)
    return model


def labels(x: np.ndarray) -> np.ndarray:
    return (target(x) > 0).astype(np.float32)


def own_data() -> np.ndarray:
    return data(SIZES[hvd.rank()], hvd.rank())


def logs_of_fit(model: keras.Model, *callbacks: keras.callbacks.Callback) -> dict:
    """Return the logs of a classifier's fit, with validation, on this rank's data."""
    x = own_data()
    y = labels(x)
    callbacks = [BroadcastState(), *callbacks]
    options = {"shuffle": False, "validation_data": (x, y), "callbacks": callbacks}
    return model.fit(x, y, **options, **QUIET).history


@on_ranks(2)
def test_logs_are_what_one_process_would_log():
    """Means, areas under curves, one number for each class and a metric of the user's are exact."""
    model = classifier(frozen())
    fitted = logs_of_fit(model, MetricSums())
    x = own_data()
    options = {"return_dict": True} | QUIET
    evaluated = model.evaluate(x, labels(x), callbacks=[MetricSums()], **options)

    all_x = np.concatenate([data(count, rank) for rank, count in enumerate(SIZES)])
    alone = classifier(keras.optimizers.SGD(0.0))
    expected = alone.evaluate(all_x, labels(all_x), **options)

    assert fitted.keys() == expected.keys() | {f"val_{name}" for name in expected}
    for name, whole in expected.items():
        for key in (name, f"val_{name}"):
            np.testing.assert_allclose(fitted[key], [whole], rtol=1e-6, err_msg=key)
        np.testing.assert_allclose(evaluated[name], whole, rtol=1e-6, err_msg=name)
    assert_same_on_all_ranks(fitted)


class Named(keras.Sequential):
    """A train_step whose logs have names of their own: of trackers, and of plain numbers."""

    def __init__(self, layers: list, has_tracker: bool) -> None:
        super().__init__(layers)
        self.total = keras.metrics.Mean(name="total_loss") if has_tracker else None

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        return [self.total] if self.total is not None else []

    def train_step(self, data: Any) -> dict:
        x, y = data
        loss = keras.ops.mean((self(x) - y) ** 2)
        if self.total is not None:
            self.total.update_state(loss)
            return {"loss": self.total.result(), "last": loss}
        return {"raw_loss": loss}


def logs_of_own_step(has_tracker: bool) -> dict:
    """Return the logs of a fit on this rank's data, of a model whose weights are 0."""
    layers = [keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")]
    model = Named(layers, has_tracker)
    model.compile(frozen(), jit_compile=False)
    x = own_data()
    return model.fit(x, target(x), shuffle=False, callbacks=[MetricSums()], **QUIET).history


@on_ranks(2)
def test_logs_of_a_step_of_its_own_keep_their_names():
    """A tracker by another name is exact. A plain number is the ranks' last, weighted."""
    tracked = logs_of_own_step(has_tracker=True)
    plain = logs_of_own_step(has_tracker=False)

    own_losses = [float(np.mean(target(x) ** 2)) for x in np.split(own_data(), SIZES[hvd.rank()])]
    losses = hvd.allgather_object(own_losses)
    mean = pytest.approx([np.mean(np.concatenate(losses))], rel=1e-6)
    last_losses = [of_rank[-1] for of_rank in losses]
    last = pytest.approx([np.average(last_losses, weights=SIZES)], rel=1e-6)
    assert tracked == {"loss": mean, "last": last}
    assert plain == {"raw_loss": last}
    assert_same_on_all_ranks(tracked)


class Score(keras.callbacks.Callback):
    """Puts numbers and words into the logs, some on rank 0 only."""

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        logs["everywhere"] = float(hvd.rank())
        if hvd.rank() == 0:
            logs["on one rank"] = 7.5
        logs["words"] = "not a number"


@on_ranks(2)
def test_what_callbacks_put_into_the_logs_is_averaged():
    """Rank 0 has 3 of 4 examples. A name of one rank is on all. What is no number stays."""
    mean_of_means = hvd.callbacks.MetricAverageCallback(unweighted=True)
    weighted = logs_of_fit(classifier(frozen()), Score(), MetricSums())
    unweighted = logs_of_fit(classifier(frozen()), Score(), mean_of_means)
    assert weighted["everywhere"] == [0.25]
    assert unweighted["everywhere"] == [0.5]
    assert weighted["on one rank"] == unweighted["on one rank"] == [7.5]
    assert weighted["words"] == ["not a number"]
