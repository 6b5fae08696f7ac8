"""Data that end earlier on some ranks: on 2 and 4 real ranks, on both backends.

The body of a test with `@on_ranks` runs on the ranks, and so do the functions that the others give
to `run_on_ranks`.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

import recipe.keras as hvd
from recipe.keras.callbacks import BroadcastState, MetricSums, ReplicaCheck
from tests.pools import on_ranks, run_on_ranks
from tests.recipe.keras.comparing import Weights, assert_same, assert_same_on_all_ranks, values
from tests.recipe.keras.regression import BATCH, Steps, data, minibatches, momentum, network, target

TENSORFLOW = keras.backend.backend() == "tensorflow"

# A gradient is a float32 sum of 16 to 64 terms in an order that depends on the ranks: 1e-6 of it,
# over 10 steps of η ≤ 0.2 on weights around 1. The smallest mistake, one batch more or less in one
# step, is 1e-2.
ROUNDING = {"rtol": 1e-5, "atol": 5e-6}

pytestmark = pytest.mark.ranks


def adam() -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(0.02)


def accumulating() -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(0.02, gradient_accumulation_steps=2)


def scaled() -> keras.optimizers.Optimizer:
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.02), initial_scale=4.0)


def synchronised() -> keras.Model:
    return network(hvd.SyncBatchNormalization(momentum=0.5))


def normalised() -> keras.Model:
    return network(keras.layers.BatchNormalization(momentum=0.5))


def sparse() -> keras.Model:
    """Make word numbers from signs. TensorFlow's gradient of the embedding is sparse."""
    keras.utils.set_random_seed(100 + hvd.rank())
    inputs = keras.Input((4,))
    signs = keras.layers.Lambda(lambda x: keras.ops.cast(x > 0, "int32"), output_shape=(4,))
    words = keras.layers.Embedding(2, 3)(signs(inputs))
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(words)))


COUNTS = (5, 3, 4, 2)  # batches of the ranks


@dataclass(frozen=True)
class Case:
    """Two epochs of training, and how one process does the same."""

    model: Callable[[], keras.Model] = network
    optimizer: Callable[[], keras.optimizers.Optimizer] = momentum
    options: dict[str, Any] = field(default_factory=dict)  # of DistributedOptimizer
    counts: tuple[int, ...] = COUNTS
    as_generator: bool = False
    steps_per_epoch: int | None = None
    model_alone: Callable[[], keras.Model] | None = None  # None: the same
    optimizer_alone: Callable[[], keras.optimizers.Optimizer] | None = None  # None: the same


PASSES = {"backward_passes_per_step": 2, "average_aggregated_gradients": True}
CASES = {
    "arrays": Case(),
    "first rank has fewer": Case(counts=(3, 5, 2, 4)),
    "generators": Case(as_generator=True),
    "steps_per_epoch": Case(as_generator=True, steps_per_epoch=5),
    "accumulation": Case(optimizer=accumulating),
    "passes": Case(optimizer=adam, options=PASSES, optimizer_alone=accumulating),
    "sparse": Case(sparse),
    "grouped": Case(options={"groups": 1}),
    "synchronised": Case(synchronised, model_alone=normalised),
    "scaled": Case(optimizer=scaled),
    "even generators": Case(counts=(3, 3, 3, 3), as_generator=True),
}
UNEVEN = [name for name in CASES if name != "even generators"]
# The generator has no more data for a second epoch.
REPEATED = [name for name in UNEVEN if name != "steps_per_epoch"]


def in_cases(*names: str) -> pytest.MarkDecorator:
    """Parametrize a test by `size` and `case`: those cases on 2 ranks, three of them on 4."""
    on_4 = ("arrays", "generators", "passes")
    pairs = [(2, name) for name in names] + [(4, name) for name in names if name in on_4]
    return pytest.mark.parametrize(("size", "case"), pairs)


class Trained(NamedTuple):
    """What a rank has after a training."""

    weights: Weights
    losses: list[float]  # of the epochs
    steps: list[tuple[int, int]]  # that callbacks have seen: (epoch, batch)
    warnings: list[str]  # of data that end early


def train(case: str) -> Trained:
    """Train on this rank's batches."""
    chosen = CASES[case]
    model = chosen.model()
    optimizer = hvd.DistributedOptimizer(chosen.optimizer(), **chosen.options)
    model.compile(optimizer, "mse", jit_compile=False)
    steps = Steps()
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        history = model.fit(
            **own_data(chosen),
            steps_per_epoch=chosen.steps_per_epoch,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[BroadcastState(), MetricSums(), steps, ReplicaCheck(every=3)],
        )
    messages = [str(w.message) for w in caught_warnings]
    of_data = [message for message in messages if "takes part with nothing" in message]
    weights = values(model.trainable_variables)
    return Trained(weights, history.history["loss"], steps.seen, of_data)


def own_data(case: Case) -> dict[str, Any]:
    """Return this rank's batches as arguments of fit."""
    x = data(case.counts[hvd.rank()], hvd.rank())
    if case.as_generator:
        return {"x": generated(x)}
    return {"x": x, "y": target(x), "batch_size": BATCH}


def generated(x: np.ndarray) -> Any:
    """Return a data set whose length Keras doesn't know: a tf.data generator or a DataLoader."""
    if TENSORFLOW:
        import tensorflow as tf

        spec = (tf.TensorSpec((None, 4), tf.float32), tf.TensorSpec((None, 1), tf.float32))
        return tf.data.Dataset.from_generator(lambda: batches(x), output_signature=spec)
    import torch

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator:
            for batch in batches(x):
                yield tuple(torch.from_numpy(array) for array in batch)

    return torch.utils.data.DataLoader(Batches(), batch_size=None)


def batches(x: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for i in range(0, len(x), BATCH):
        batch = x[i : i + BATCH]
        yield batch, target(batch)


@functools.cache
def trained_on(backend: str, size: int, case: str) -> list[Trained]:
    """Return what every rank has after one training for all tests."""
    return run_on_ranks(backend, size, train, case=case)


class Alone(NamedTuple):
    """What one process has after a training."""

    weights: Weights
    losses: list[float]  # of the epochs


def train_alone(case: str, ranks: int) -> Alone:
    """Train one process, from rank 0's weights on, on the union of the ranks' batches."""
    chosen = CASES[case]
    model = (chosen.model_alone or chosen.model)()
    optimizer = chosen.optimizer_alone or chosen.optimizer
    model.compile(optimizer(), "mse", jit_compile=False)
    losses = []
    for _ in range(2):
        of_steps = []
        steps = minibatches(chosen.counts[:ranks])
        for x in steps:
            model.reset_metrics()
            of_steps.append(float(model.train_on_batch(x, target(x))))
        losses.append(float(np.average(of_steps, weights=[len(x) for x in steps])))
    return Alone(values(model.trainable_variables), losses)


def check_as_alone(backend: str, size: int, case: str) -> None:
    """Check that the ranks' weights and losses are those of one process."""
    (alone,) = run_on_ranks(backend, 1, train_alone, case=case, ranks=size)
    for trained in trained_on(backend, size, case):
        assert_same(trained.weights, alone.weights, **ROUNDING)
        np.testing.assert_allclose(trained.losses, alone.losses, rtol=1e-5)


@in_cases(*REPEATED)
def test_data_that_end_early_are_the_mean_over_those_who_have_some(backend, size, case):
    """Weights and logs are those of one process on the union of the ranks' batches.

    So it is with arrays, data of unknown length, accumulation, sparse gradients, groups,
    synchronised normalisation and loss scaling.
    """
    check_as_alone(backend, size, case)


@in_cases(*UNEVEN)
def test_ranks_whose_data_end_early_are_equal_to_the_bit(backend, size, case):
    first, *others = trained_on(backend, size, case)
    for other in others:
        assert_same(other.weights, first.weights)
        assert other.losses == first.losses


def steps_of_two_epochs(count: int) -> list[tuple[int, int]]:
    """Return the (epoch, batch) that callbacks see."""
    return [(epoch, batch) for epoch in (0, 1) for batch in range(count)]


@in_cases(*REPEATED)
def test_callbacks_of_all_ranks_see_all_steps(backend, size, case):
    for trained in trained_on(backend, size, case):
        assert trained.steps == steps_of_two_epochs(5)


def test_data_that_end_for_good_are_no_hang(backend):
    """steps_per_epoch asks for more than a generator has: rank 0's five batches are used, once."""
    for trained in trained_on(backend, 2, "steps_per_epoch"):
        assert trained.steps[:5] == [(0, b) for b in range(5)]
        assert all(epoch == 1 for epoch, _ in trained.steps[5:])


@in_cases(*UNEVEN)
def test_one_warning_has_the_numbers(backend, size, case):
    on_rank_0, *on_others = trained_on(backend, size, case)
    (message,) = on_rank_0.warnings
    assert "takes part with nothing" in message and "recipe.keras.divide" in message
    assert ("5 steps" in message) == (not CASES[case].as_generator)
    for trained in on_others:
        assert not trained.warnings


@pytest.mark.parametrize("size", (2, 4))
def test_data_of_unknown_length_that_end_together_are_one_process(backend, size):
    """Nothing happens but the steps."""
    check_as_alone(backend, size, "even generators")
    for trained in trained_on(backend, size, "even generators"):
        assert trained.steps == steps_of_two_epochs(3)
        assert not trained.warnings


class Pair(keras.Model):
    """Two layers, each with an optimizer and a loss of its own; as a GAN, in small."""

    def __init__(
        self, first: keras.optimizers.Optimizer, second: keras.optimizers.Optimizer
    ) -> None:
        super().__init__()
        self.a, self.b = keras.layers.Dense(2), keras.layers.Dense(2)
        if not TENSORFLOW:  # Keras builds a model with PyTorch only through its call
            self.a.build((None, 4))
            self.b.build((None, 4))
        self.compile(jit_compile=False)
        self.first, self.second = first, second

    def train_step(self, x: Any) -> dict:
        x = keras.ops.convert_to_tensor(x[0] if isinstance(x, (tuple, list)) else x)
        return {
            "a_loss": descend(lambda: self.loss_of(self.a, x), self.a, self.first),
            "b_loss": descend(lambda: self.loss_of(self.b, x), self.b, self.second),
        }

    def loss_of(self, layer: keras.layers.Layer, x: Any) -> Any:
        return keras.ops.mean((layer(x) - x[:, :2]) ** 2)

    def call(self, x: Any) -> Any:
        return self.a(x) + self.b(x)


def descend(
    loss_of: Callable[[], Any], layer: keras.layers.Layer, optimizer: keras.optimizers.Optimizer
) -> Any:
    """Do one step of the layer's weights, in the words of the backend. Return the loss."""
    if TENSORFLOW:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = loss_of()
        gradients = tape.gradient(loss, layer.trainable_weights)
        optimizer.apply(gradients, layer.trainable_weights)
        return loss
    import torch

    layer.zero_grad()
    loss = loss_of()
    loss.backward()
    with torch.no_grad():
        optimizer.apply([v.value.grad for v in layer.trainable_weights], layer.trainable_weights)
    return loss.detach()


@on_ranks(2, 4)
def test_two_optimizers_and_a_step_of_its_own():
    """Layers that come to exist in the step, data that end early: as one process."""
    counts = (4, 2, 3, 1)[: hvd.size()]
    keras.utils.set_random_seed(100 + hvd.rank())
    model = Pair(hvd.DistributedOptimizer(adam()), hvd.DistributedOptimizer(momentum()))
    steps = Steps()
    logs = model.fit(
        data(counts[hvd.rank()], hvd.rank()),
        batch_size=BATCH,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[BroadcastState(), MetricSums(), steps],
    ).history
    weights = values(model.trainable_variables)

    keras.utils.set_random_seed(100)
    alone = Pair(adam(), momentum())
    for x in minibatches(counts) * 2:
        alone.train_on_batch(x)

    assert_same(weights, values(alone.trainable_variables), **ROUNDING)
    assert_same_on_all_ranks(weights)
    assert_same_on_all_ranks(logs)
    assert logs.keys() == {"a_loss", "b_loss"}
    assert steps.seen == steps_of_two_epochs(4)
