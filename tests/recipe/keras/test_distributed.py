"""DistributedOptimizer and callbacks on 1, 2 and 4 real ranks, through MPI and Gloo.

On both Keras backends. The body of a test with `@on_ranks` or `@on_several_ranks` runs on the
ranks, and so do the functions that the others give to `run_on_ranks`.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest

import recipe.keras as hvd
from recipe.errors import RunError
from recipe.keras import state
from recipe.keras.callbacks import (
    GradualWarmup,
    MetricSums,
    ReplicaCheck,
    ScheduledRate,
    set_rate,
)
from recipe.keras.distributed import is_distributed
from recipe.rules.schedule import Rate
from tests.pools import on_ranks, run_on_ranks, with_sizes
from tests.recipe.keras.classification import (
    EXAMPLES,
    LABELS,
    MINIBATCH,
    compiled,
    fit,
    nesterov,
    network,
    share,
)
from tests.recipe.keras.comparing import (
    Rates,
    Weights,
    assert_same,
    assert_same_on_all_ranks,
    value,
    values,
)

RATE = Rate(0.05, 0.4, warmup_epochs=1.5, decay_epochs=(2.0,))

# float32 carries 2^-24 ≈ 6e-8 of a number. A gradient is a sum over 24·16 terms in an order that
# depends on the ranks: about √(24·16)·6e-8 ≈ 1e-6 of it, times the effective rate η/(1-m) = 4 over
# 12 steps, on weights around 1.
ROUNDING = {"rtol": 5e-5, "atol": 5e-5}

with_several_ranks = with_sizes(2, 4, gloo=[2])
on_several_ranks = on_ranks(2, 4, gloo=[2])
pytestmark = pytest.mark.ranks


class Trained(NamedTuple):
    """What a rank has after a training."""

    weights: Weights
    logs: dict[str, list[float]]


def train_three_epochs() -> Trained:
    """Train with Nesterov SGD, warmup, decay and weight decay: 12 steps on kn examples."""
    model = compiled(network(), nesterov())
    history = fit(model, 3, ScheduledRate(RATE), MetricSums(), ReplicaCheck(every=2))
    return Trained(model.get_weights(), history.history)


@functools.cache
def trained_on(backend: str, size: int, launcher: str = "mpirun") -> list[Trained]:
    """Return what every rank has after one training for all tests."""
    return run_on_ranks(backend, size, train_three_epochs, launcher)


@with_several_ranks
def test_k_ranks_of_n_are_one_rank_of_kn(backend, size, launcher):
    """The paper promises it (sec. 3)."""
    (alone,) = trained_on(backend, 1)
    for together in trained_on(backend, size, launcher):
        assert_same(together.weights, alone.weights, **ROUNDING)


@with_several_ranks
def test_replicas_are_bitwise_equal(backend, size, launcher):
    """Horovod's own wrapper trains replicas that drift apart without a word."""
    first, *others = trained_on(backend, size, launcher)
    for other in others:
        assert_same(other.weights, first.weights)


@with_several_ranks
def test_epoch_metrics_are_those_of_the_whole_minibatch(backend, size, launcher):
    (alone,) = trained_on(backend, 1)
    loss = pytest.approx(alone.logs["loss"], rel=1e-5)
    accuracy = pytest.approx(alone.logs["accuracy"], abs=1.01 / len(EXAMPLES))
    for together in trained_on(backend, size, launcher):
        assert together.logs["loss"] == loss
        assert together.logs["accuracy"] == accuracy


class StateAtFirstStep(keras.callbacks.Callback):
    """Keeps all state as it is when step 1 begins."""

    arrays = None

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if self.arrays is None:
            self.arrays = state.to_arrays(self.model)


@on_several_ranks
def test_all_state_is_rank_0s_before_step_1():
    """Weights, moving statistics, optimizer slots, iteration counter, learning rate."""
    model = compiled(network(normalised=True), nesterov())
    model.optimizer.build(model.trainable_variables)
    for v in state.everything(model):
        if keras.backend.is_float_dtype(v.dtype):
            v.assign(v + 0.1 * hvd.rank())
    model.optimizer.iterations.assign(5 + hvd.rank())
    iterations = hvd.allgather_object(int(model.optimizer.iterations))
    assert len(set(iterations)) == hvd.size()

    expected = hvd.broadcast_object(state.to_arrays(model), 0)
    at_first_step = StateAtFirstStep()
    fit(model, 1, at_first_step)
    assert at_first_step.arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(at_first_step.arrays[name], array, err_msg=name)


@on_several_ranks
def test_batch_norm_statistics_are_per_worker():
    """The step is the mean of the workers' steps, each normalised by its own n examples.

    Paper, sec. 2.3.
    """
    n = MINIBATCH // hvd.size()
    workers = [slice(worker * n, (worker + 1) * n) for worker in range(hvd.size())]
    model = compiled(network(normalised=True), hvd.DistributedOptimizer(keras.optimizers.SGD(1.0)))
    state.broadcast_state(model)
    start = model.get_weights()
    own = workers[hvd.rank()]
    model.train_on_batch(EXAMPLES[own], LABELS[own])

    ends = []
    for worker in workers:
        alone = compiled(network(normalised=True), keras.optimizers.SGD(1.0))
        alone.set_weights(start)
        alone.train_on_batch(EXAMPLES[worker], LABELS[worker])
        ends.append(values(alone.trainable_variables))
    mean = [np.mean(of_workers, axis=0) for of_workers in zip(*ends, strict=True)]
    assert_same(values(model.trainable_variables), mean, rtol=1e-4, atol=1e-6)


@on_several_ranks
def test_metrics_of_unequal_shards_are_those_of_the_whole():
    """An average of the ranks' averages would weigh unequal shards alike."""
    # Rank r holds r + 1 times 8 examples.
    ends = 8 * np.cumsum(np.arange(1, hvd.size() + 1))
    batch = 8 * (hvd.rank() + 1)
    own = slice(ends[hvd.rank()] - batch, ends[hvd.rank()])
    x, y = EXAMPLES[own], LABELS[own]
    all_x, all_y = EXAMPLES[: ends[-1]], LABELS[: ends[-1]]

    model = compiled(network(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)))
    state.broadcast_state(model)
    whole = model.evaluate(all_x, all_y, verbose=0, return_dict=True)
    options = {"verbose": 0, "callbacks": [MetricSums()]}
    evaluated = model.evaluate(x, y, return_dict=True, **options)
    fitted = model.fit(x, y, batch, validation_data=(x, y), **options).history

    for name, expected in whole.items():
        assert evaluated[name] == pytest.approx(expected, rel=1e-5)
        assert fitted[name] == pytest.approx([expected], rel=1e-5)
        assert fitted[f"val_{name}"] == pytest.approx([expected], rel=1e-5)


class Poison(keras.callbacks.Callback):
    """Changes one weight of the last rank by the smallest change there is, after the third step."""

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if batch == 2 and hvd.rank() == hvd.size() - 1:
            kernel = self.model.layers[-1].kernel
            changed = value(kernel)
            changed[0, 0] = np.nextafter(changed[0, 0], np.float32(np.inf))
            kernel.assign(changed)


@on_several_ranks
def test_a_poisoned_replica_stops_every_rank_and_is_named():
    model = compiled(network(), nesterov())
    with pytest.raises(RunError) as error:
        fit(model, 3, Poison(), ReplicaCheck(every=1))
    assert model.layers[-1].kernel.path in str(error.value)
    assert "after step 3" in str(error.value)


@on_several_ranks
def test_different_models_are_an_error_and_not_a_hang():
    """Rank 0 has one unit more than the others."""
    units = 3 if hvd.rank() == 0 else 2
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units)])
    model.compile(nesterov(), "mse")
    with pytest.raises(RunError, match="built another model"):
        state.broadcast_state(model)


@on_several_ranks
def test_all_ranks_skip_when_one_overflows():
    """To check a rank's own gradient, before the allreduce, would let ranks disagree."""
    sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    scaled = keras.optimizers.LossScaleOptimizer(sgd, initial_scale=1024.0)
    model = compiled(network(), hvd.DistributedOptimizer(scaled))
    state.broadcast_state(model)
    start = model.get_weights()

    # The last rank's gradient overflows in the first step.
    x, y = (share(array, hvd.size(), hvd.rank()) for array in (EXAMPLES, LABELS))
    poisoned = x.copy()
    if hvd.rank() == hvd.size() - 1:
        poisoned[0, 0, 0, 0] = np.inf
    model.train_on_batch(poisoned, y)
    assert_same(model.get_weights(), start)

    # The next one counts.
    model.train_on_batch(x, y)
    end = model.get_weights()
    assert float(scaled.dynamic_scale) == 512.0
    assert_same_on_all_ranks(end)
    assert any((a != b).any() for a, b in zip(end, start, strict=True))


@on_ranks(1)
def test_the_wrapper_stays_outermost_under_the_mixed_float16_policy():
    """It brings the loss scaling, which compile() would put around it."""
    keras.config.set_dtype_policy("mixed_float16")
    wrapped = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    model = network()
    model.compile(optimizer=wrapped, loss="mse")
    assert model.optimizer is wrapped
    assert isinstance(wrapped, keras.optimizers.LossScaleOptimizer)


def mean_gradient(compression: type) -> np.ndarray:
    """Return the mean of 1/7, 2/7, … over the ranks, as the optimizer takes it."""
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=compression)
    v = keras.Variable(np.zeros(3, np.float32))
    gradient = np.full(3, (hvd.rank() + 1) / 7, np.float32)
    optimizer.apply([keras.ops.convert_to_tensor(gradient)], [v])
    return -value(v)


@on_several_ranks
def test_compression_rounds_to_half_precision_and_no_more():
    mean = (hvd.size() + 1) / 14
    exact = mean_gradient(hvd.Compression.none)
    rounded = mean_gradient(hvd.Compression.fp16)
    np.testing.assert_allclose(exact, mean, rtol=1e-6)
    np.testing.assert_allclose(rounded, mean, rtol=2 * 2**-11)  # two roundings to 11 bits
    assert (rounded != exact).all()


@on_ranks(2)
def test_saved_models_load_without_the_wrapper(tmp_path: Path):
    model = compiled(network(), nesterov())
    fit(model, 1)
    path = tmp_path / f"{hvd.rank()}.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    assert isinstance(loaded.optimizer, keras.optimizers.SGD)
    assert not is_distributed(loaded.optimizer)
    assert_same(loaded.get_weights(), model.get_weights())
    assert_same(values(loaded.optimizer.variables), values(model.optimizer.variables))


class AnotherRate(Rates):
    """Sets another rate after the eighth step."""

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        super().on_train_batch_end(batch, logs)
        if len(self.rates) == 8:
            self.model.optimizer.learning_rate = 0.01


@on_ranks(2)
def test_gradual_warmup_reaches_k_times_the_base_rate_and_lets_go():
    """1.5 epochs of 4 steps are six equal increments, with kη at the seventh step.

    Then η is another callback's.
    """
    noted = AnotherRate()
    warmup = GradualWarmup(base_rate=0.1, k=4, epochs=1.5)
    fit(compiled(network(), nesterov()), 3, warmup, noted)
    expected = [0.1 + 0.3 * t / 6 for t in range(6)] + [0.4, 0.4] + [0.01] * 4
    assert noted.rates == pytest.approx(expected, rel=1e-6)


GRADIENTS = np.random.default_rng(2).normal(size=(12, 5)).astype(np.float32)
RATES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.06, 0.06, 0.06, 0.006, 0.006, 0.006]


def weights_path(nesterov: bool, corrected: bool, scale: float = 1.0) -> list[np.ndarray]:
    """Return a weight after each step with the given gradients and rates.

    With a scale other than 1, of a loss that is scaled by it.
    """
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=nesterov)
    if scale != 1.0:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=scale)
    optimizer = hvd.DistributedOptimizer(optimizer)
    v, path = keras.Variable(np.zeros(5, np.float32)), []
    for gradient, rate in zip(GRADIENTS, RATES, strict=True):
        set_rate(optimizer, rate, corrected)
        optimizer.apply([keras.ops.convert_to_tensor(gradient * scale)], [v])
        path.append(value(v))
    return path


def papers_path(nesterov: bool, corrected: bool) -> list[np.ndarray]:
    """Follow the paper's equation (9), whose velocity knows no η.

    Uncorrected, follow equation (10), whose velocity holds η.
    """
    w, u, path = np.zeros(5), np.zeros(5), []
    for gradient, rate in zip(GRADIENTS.astype(np.float64), RATES, strict=True):
        g = gradient if corrected else rate * gradient
        u = 0.9 * u + g
        update = g + 0.9 * u if nesterov else u
        w = w - (rate * update if corrected else update)
        path.append(w)
    return path


@pytest.mark.parametrize("scale", (1.0, 8.0))
@pytest.mark.parametrize("corrected", (True, False))
@pytest.mark.parametrize("nesterov", (False, True))
@on_ranks(1)
def test_momentum_correction_is_the_papers(nesterov, corrected, scale):
    """Remark 2. To assign optimizer.momentum does nothing in a traced step."""
    path = weights_path(nesterov, corrected, scale)
    # float32 sums of 12 steps of size ≈ 1
    np.testing.assert_allclose(path, papers_path(nesterov, corrected), rtol=1e-4, atol=1e-5)
    other = weights_path(nesterov, not corrected, scale)
    assert not np.allclose(path, other, rtol=1e-2)
