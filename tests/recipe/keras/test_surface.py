"""Horovod's Keras surface on 2 and 4 real ranks, on both Keras backends.

The body of a test with `@on_ranks` runs on the ranks, and so do the functions that the others give
to `run_on_ranks`.

What Horovod 0.28.1's own tests for Keras check, and the test here that covers it:

| upstream test | what it checks | here |
|---|---|---|
| train_model_lr_schedule | warmup, schedules, losses | test_learning_rates_…, test_metrics_… |
| sparse_as_dense, …_with_grad_aggregation | an embedding trains | test_embeddings_… |
| legacy_optimizer | keras.optimizers.legacy | refused: test_everything_that_is_refused_… |
| grad_aggregation_with_inf_grad | an overflow ends | test_an_overflow_in_one_pass_… |
| from_config | the configuration makes the round trip | test_configurations_… |
| elastic_state | sync, restore, commit | test_elastic_state_… |
| gradient_aggregation, …_with_local_vars | passes, local variables, sparse | test_passes_… |
| partial_distributed_optimizer | 0, 1, 2 local layers | test_local_layers_… |
| broadcast_…_callback_with_local_vars | the local ones stay | test_local_variables_… |
| load_model, …_custom_optimizers, …_custom_objects | saved and loaded | test_saved_models_… |
| load_model_broadcast | rank 0 loads, the others don't | test_rank_0_may_load_… |
| process sets | reduction within a set | test_process_sets_… |
"""

import contextlib
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

import recipe.keras as hvd
from recipe.keras import state
from recipe.keras.callbacks import BroadcastState, ReplicaCheck, ScheduledRate
from recipe.keras.distributed import is_distributed, reduction_of
from recipe.rules.schedule import Rate
from tests import rank_worker
from tests.pools import on_ranks, run_on_ranks
from tests.ranks import ROOT
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
from tests.recipe.keras.comparing import Rates, Weights, assert_same, value, values

TENSORFLOW = keras.backend.backend() == "tensorflow"

# A gradient is a float32 sum of about 400 terms whose order depends on the ranks: 1e-6 of it.
# After 4 to 6 steps of η = 0.01 to 0.1 the weights differ by 5e-7 at most, as was seen for every
# optimizer, both backends, 2 and 4 ranks.
ROUNDING = {"rtol": 1e-5, "atol": 5e-6}

on_2_and_4_ranks = pytest.mark.parametrize("size", (2, 4))
pytestmark = pytest.mark.ranks


@functools.cache
def run_alone(backend: str, function: Callable[[], Any]) -> Any:
    """Return what a function returns on one rank."""
    (result,) = run_on_ranks(backend, 1, function)
    return result


def number(v: Any) -> float:
    """Return the first number of a variable."""
    return float(value(v).flat[0])


def variable(*shape: int) -> keras.Variable:
    return keras.Variable(np.zeros(shape, np.float32))


def tensor(numbers: Any) -> Any:
    return keras.ops.convert_to_tensor(np.asarray(numbers, np.float32))


class SumsUp(keras.optimizers.Optimizer):
    """w ← w + g: what an update did is easily read."""

    def __init__(self, learning_rate: float = 0.1, **kwargs: Any) -> None:
        super().__init__(learning_rate, **kwargs)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign_add(variable, gradient)


@on_ranks(2, 4)
def test_reductions():
    """Average, Sum, predivided, in groups.

    Powers of two and small integers, so that nothing is rounded but 3/4.
    """
    variables = [variable(2), variable(3), variable(1)]
    options = {
        "average": {},
        "sum": {"op": hvd.Sum},
        "predivided": {"gradient_predivide_factor": 4.0},
        "one group": {"groups": 1},
        "two groups": {"groups": 2},
        "named": {"name": "mine"},
        "lists": {"groups": [[variables[0], variables[2]]]},
    }
    mean, total = (hvd.size() + 1) / 2, hvd.size() * (hvd.size() + 1) / 2
    for name, chosen in options.items():
        optimizer = hvd.DistributedOptimizer(SumsUp(), **chosen)
        for v in variables:
            v.assign(0 * v)

        # The gradients of rank r are r + 1, 10(r + 1) and 100(r + 1).
        numbers = [10.0**i * (hvd.rank() + 1) for i in range(3)]
        gradients = [tensor(np.full(v.shape, n)) for v, n in zip(variables, numbers, strict=True)]
        optimizer.apply(gradients, variables)

        added = [value(v)[0] for v in variables]
        reduced = total if name == "sum" else mean
        assert added == pytest.approx([reduced, 10 * reduced, 100 * reduced], rel=1e-6), name


@on_ranks(2, 4)
def test_process_sets_reduce_among_themselves():
    """The ranks of a set reduce among themselves, the others keep what they have."""
    rank = hvd.rank()
    members = [0, 2] if hvd.size() > 2 else [0]
    expected = np.mean([member + 1 for member in members]) if rank in members else rank + 1

    v = variable(1)
    optimizer = hvd.DistributedOptimizer(SumsUp(), process_set=rank_worker.PAIR)
    optimizer.apply([tensor([rank + 1.0])], [v])
    assert value(v)[0] == expected

    assert rank_worker.PAIR.included() == (rank in members)
    if rank in members:
        assert float(hvd.allreduce(rank + 1.0, process_set=rank_worker.PAIR)) == expected

    unknown = hvd.DistributedOptimizer(SumsUp(), process_set=hvd.ProcessSet([0, 1, 5]))
    with pytest.raises(ValueError, match="unknown to Horovod"):
        unknown.apply([tensor([1.0])], [variable(1)])


@pytest.mark.parametrize("average", (False, True))
@on_ranks(2, 4)
def test_passes_are_reduced_once_and_count_as_one_step(average):
    """Ten backward passes, four to a step, in a traced step where there is one.

    Sums, or means, of 4 passes. All numbers are exact. The last two variables are local, and weigh
    1/size. TensorFlow's gradients of y are IndexedSlices.
    """
    optimizer = hvd.DistributedOptimizer(
        SumsUp(), backward_passes_per_step=4, average_aggregated_gradients=average
    )
    x, y, local_x, local_y = variables = [variable(1), variable(2), variable(1), variable(2)]
    optimizer.register_local_var(local_x)
    optimizer.register_local_var(local_y)
    step = stepper(optimizer, variables, hvd.rank() + 1.0)

    mean, own = (hvd.size() + 1) / 2, (hvd.rank() + 1) / hvd.size()
    for n in range(1, 11):
        step()
        steps = n // 4
        factor = steps * (1 if average else 4)
        assert int(optimizer.iterations) == steps
        np.testing.assert_allclose(value(x), [factor * mean], rtol=1e-6)
        np.testing.assert_allclose(value(y), [0, -2 * factor * mean], rtol=1e-6)
        np.testing.assert_allclose(value(local_x), [factor * own], rtol=1e-6)
        np.testing.assert_allclose(value(local_y), [0, -2 * factor * own], rtol=1e-6)
    assert int(reduction_of(optimizer).accumulator.count) == 2  # of ten passes


def stepper(
    optimizer: keras.optimizers.Optimizer, variables: list, number: float
) -> Callable[[], None]:
    """Return a step with the gradients `number` and [0, -2·number] for each pair of variables."""

    def step() -> None:
        gradients = [tensor([number]), sparse(number), tensor([number]), sparse(number)]
        optimizer.apply(gradients, variables)

    if TENSORFLOW:
        import tensorflow as tf

        return tf.function(step)
    return step


def sparse(number: float) -> Any:
    """Return [0, -2·number], its one row given twice where there is a sparse type for it."""
    if TENSORFLOW:
        import tensorflow as tf

        return tf.IndexedSlices(
            tf.constant([-number, -number]), tf.constant([1, 1]), tf.constant([2])
        )
    import torch

    return torch.sparse_coo_tensor([[1, 1]], [-number, -number], [2])


@on_ranks(2, 4)
def test_an_overflow_in_one_pass_skips_the_step_everywhere_and_is_forgotten():
    """The last rank's first pass of the first step is infinite."""
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    optimizer = hvd.DistributedOptimizer(scaled, backward_passes_per_step=2)
    v, path = variable(1), []
    for n in range(4):
        overflows = n == 0 and hvd.rank() == hvd.size() - 1
        scale = value(optimizer.dynamic_scale) if optimizer.built else 4.0
        optimizer.apply([tensor([np.inf if overflows else scale])], [v])
        path.append(number(v))
    assert path == [0, 0, 0, -2]  # two passes of gradient 1, summed
    assert float(value(optimizer.dynamic_scale)) == 2
    assert int(optimizer.iterations) == 1


@on_ranks(2, 4)
def test_an_overflow_of_a_local_gradient_skips_the_step_everywhere():
    """Only the last rank's gradient of a local variable overflows."""
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    optimizer = hvd.DistributedOptimizer(scaled)
    shared, local = variable(1), variable(1)
    optimizer.register_local_var(local.value)

    local_gradient = np.inf if hvd.rank() == hvd.size() - 1 else 4.0
    optimizer.apply([tensor([4.0]), tensor([local_gradient])], [shared, local])
    assert [number(shared), number(local)] == [0, 0]

    optimizer.apply([tensor([2.0]), tensor([2.0])], [shared, local])
    assert [number(shared), number(local)] == [-1, -1 / hvd.size()]


@on_ranks(2, 4)
def test_a_gradient_that_some_ranks_lack_is_no_hang():
    """Nobody has the second gradient; with PyTorch only rank 0 has the third."""
    optimizer = hvd.DistributedOptimizer(SumsUp())
    variables = [variable(1), variable(1), variable(1)]
    third = tensor([4.0]) if TENSORFLOW or hvd.rank() == 0 else None
    optimizer.apply([tensor([1.0]), None, third], variables)
    assert [number(v) for v in variables] == [1, 0, 4 if TENSORFLOW else 4 / hvd.size()]


def train(make: Callable, steps: int = 6, **options: Any) -> Weights:
    """Return the weights and the optimizer's slots after steps on a minibatch each.

    Each minibatch is divided among the ranks. `make()` is the optimizer, `options` are those of
    its wrapper.
    """
    model = compiled(network(), hvd.DistributedOptimizer(make(), **options))
    state.broadcast_state(model)
    x, y = (share(a, hvd.size(), hvd.rank()) for a in (EXAMPLES, LABELS))
    n = MINIBATCH // hvd.size()
    for t in range(steps):
        part = slice((t % 4) * n, (t % 4 + 1) * n)
        model.train_on_batch(x[part], y[part])
    return values(model.trainable_variables + model.optimizer.variables)


def train_with_each_setting() -> dict[str, Weights]:
    """Return weights and slots, by setting that is wrong if it sees one rank's gradient only."""
    sgd, adam = keras.optimizers.SGD, keras.optimizers.Adam
    ema = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    optimizers = {
        "clipnorm": lambda: sgd(0.1, 0.9, clipnorm=0.1),
        "clipvalue": lambda: sgd(0.1, 0.9, clipvalue=0.01),
        "global_clipnorm": lambda: sgd(0.1, 0.9, global_clipnorm=0.1),
        "ema": lambda: sgd(0.1, 0.9, **ema),
        "weight_decay": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        "keras accumulation": lambda: adam(0.01, gradient_accumulation_steps=3),
        "scaled accumulation": lambda: keras.optimizers.LossScaleOptimizer(
            adam(0.01, gradient_accumulation_steps=3)
        ),
    }
    weights = {name: train(make) for name, make in optimizers.items()}
    weights["horovod accumulation"] = train(
        lambda: adam(0.01), backward_passes_per_step=3, average_aggregated_gradients=True
    )
    return weights


@on_2_and_4_ranks
def test_settings_of_the_optimizer_act_on_the_averaged_gradient(backend, size):
    """Clipping, moving averages, weight decay, accumulation.

    They act as on one rank with the whole minibatch. All ranks' weights and slots are bitwise
    equal.
    """
    alone = run_alone(backend, train_with_each_setting)
    first, *others = run_on_ranks(backend, size, train_with_each_setting)
    for name, weights in first.items():
        assert_same(weights[:4], alone[name][:4], **ROUNDING)
        for other in others:
            assert_same(other[name], weights)


def every_optimizer() -> dict[str, Callable]:
    """Return what makes an optimizer, for every class of keras.optimizers by name."""
    abstract = ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
    optimizers: dict[str, Callable] = {}
    for name, kind in vars(keras.optimizers).items():
        is_class = isinstance(kind, type) and issubclass(kind, keras.optimizers.Optimizer)
        if is_class and not name.startswith("_") and name not in abstract:
            optimizers[name] = functools.partial(kind, learning_rate=0.01)

    # Those that wrap others.
    optimizers["LossScaleOptimizer"] = lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01)
    )
    if hasattr(keras.optimizers, "MultiOptimizer"):
        optimizers["MultiOptimizer"] = lambda: keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                keras.optimizers.Adam(0.01), {".*bias": keras.optimizers.SGD(0.01)}
            )
        )
    return optimizers


def train_with_every_optimizer() -> dict[str, Weights]:
    """Return the weights after four steps, by optimizer."""
    return {name: train(make, 4)[:4] for name, make in every_optimizer().items()}


def test_every_optimizer_on_two_ranks_is_one_rank_with_the_whole_minibatch(backend):
    alone = run_alone(backend, train_with_every_optimizer)
    first, second = run_on_ranks(backend, 2, train_with_every_optimizer)
    assert len(first) > 12
    for name, weights in first.items():
        assert_same(weights, second[name])
        for a, b in zip(weights, alone[name], strict=True):
            np.testing.assert_allclose(a, b, **ROUNDING, err_msg=name)


def train_embeddings() -> dict[str, np.ndarray]:
    """Return an embedding after Adam's steps, by the options of the wrapper.

    Its rows repeat within a rank and over ranks.
    """
    words = np.random.default_rng(5).integers(0, 6, (4, 24, 5))
    targets = np.random.default_rng(6).normal(size=(4, 24, 5, 3)).astype(np.float32)
    n = MINIBATCH // hvd.size()
    own_part = slice(hvd.rank() * n, (hvd.rank() + 1) * n)
    options = {
        "sparse": {},
        "dense": {"sparse_as_dense": True},
        "predivided": {"gradient_predivide_factor": 2.0},
        "passes": {"backward_passes_per_step": 2, "average_aggregated_gradients": True},
    }
    embeddings = {}
    for name, chosen in options.items():
        layer = keras.layers.Embedding(7, 3)
        model = keras.Sequential([keras.Input((5,), dtype="int32"), layer])
        optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.05), **chosen)
        keras.utils.set_random_seed(hvd.rank())
        model.compile(optimizer, "mse", jit_compile=False)
        state.broadcast_state(model)
        layer.embeddings.assign(np.linspace(-1, 1, 21).reshape(7, 3))
        for x, y in zip(words, targets, strict=True):
            model.train_on_batch(x[own_part], y[own_part])
        embeddings[name] = value(layer.embeddings)
    return embeddings


@on_2_and_4_ranks
def test_embeddings_get_the_averaged_gradient_sparse_and_dense(backend, size):
    alone = run_alone(backend, train_embeddings)
    bound = {"rtol": 1e-4, "atol": 1e-5}
    for embeddings in run_on_ranks(backend, size, train_embeddings):
        for name in ("sparse", "dense", "predivided"):
            np.testing.assert_allclose(embeddings[name], alone["dense"], **bound, err_msg=name)
        np.testing.assert_allclose(embeddings["passes"], alone["passes"], **bound)


@pytest.mark.parametrize("scaled", (True, False))
@pytest.mark.parametrize("count", (0, 1, 2))
@on_ranks(2, 4)
def test_local_layers_keep_their_gradients_and_are_scaled(count, scaled):
    """None, one and two of the layers are local.

    And ReplicaCheck lets them differ, with their slots.
    """
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(3)])
    optimizer = hvd.PartialDistributedOptimizer(
        keras.optimizers.SGD(1.0, momentum=0.9),
        local_layers=model.layers[0] if count == 1 else model.layers[:count],
        scale_local_gradients=scaled,
    )
    model.compile(optimizer, "mse", jit_compile=False)
    model.set_weights([np.zeros(w.shape) for w in model.get_weights()])

    gradients = [tensor(np.full(v.shape, hvd.rank() + 1.0)) for v in model.trainable_variables]
    optimizer.apply(gradients, model.trainable_variables)
    state.check_replicas(model)

    own = (hvd.rank() + 1) / (hvd.size() if scaled else 1)
    mean = (hvd.size() + 1) / 2
    steps = [-float(w.flat[0]) for w in model.get_weights()]
    assert steps == pytest.approx([own] * 2 * count + [mean] * 2 * (2 - count))


@on_ranks(2, 4)
def test_local_layers_that_cannot_be_local_are_refused():
    sgd, unbuilt = keras.optimizers.SGD(), keras.layers.Dense(2, name="unbuilt")
    with pytest.raises(ValueError, match="'unbuilt' has no variables yet"):
        hvd.PartialDistributedOptimizer(sgd, local_layers=[unbuilt])
    with pytest.raises(ValueError, match="must be Keras layers"):
        hvd.PartialDistributedOptimizer(keras.optimizers.SGD(), local_layers=["a"])


@on_ranks(2, 4)
def test_local_variables_and_their_slots_are_not_broadcast():
    """The last rank broadcasts all but the first layer, and its slots."""
    model = compiled(network(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.0, momentum=0.9)))
    model.optimizer.build(model.trainable_variables)
    fill_with_the_rank(model)
    model.train_on_batch(EXAMPLES[:4] * 0, LABELS[:4])  # traced before the callback
    fill_with_the_rank(model)

    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(
        hvd.size() - 1, local_variables=model.layers[0].variables[0]
    )
    callback.set_model(model)
    callback.on_train_begin()
    last = hvd.size() - 1
    assert [number(v) for v in model.trainable_variables] == [hvd.rank(), last, last, last]
    assert [number(v) for v in model.optimizer.momentums] == [hvd.rank(), last, last, last]


def fill_with_the_rank(model: keras.Model) -> None:
    for v in model.trainable_variables + model.optimizer.momentums:
        v.assign(keras.ops.full(v.shape, float(hvd.rank())))


def train_after_uneven_creation() -> Weights:
    """Train where rank 0 has made optimizers and synchronised layers that the others have not."""
    if hvd.rank() == 0:
        for _ in range(3):
            hvd.DistributedOptimizer(keras.optimizers.SGD())
            hvd.SyncBatchNormalization()
    model = keras.Sequential(
        [keras.Input((8, 8, 2)), hvd.SyncBatchNormalization(), keras.layers.Flatten()]
    )
    model.add(keras.layers.Dense(3))
    fit(compiled(model, nesterov()), 1, ReplicaCheck())
    return values(model.trainable_variables)


def test_ranks_that_made_other_optimizers_before_do_not_hang(backend):
    first, second = run_on_ranks(backend, 2, train_after_uneven_creation)
    assert_same(first, second)


@keras.saving.register_keras_serializable("tests")
class Registered(keras.optimizers.RMSprop):
    pass


class Unregistered(keras.optimizers.RMSprop):
    pass


@pytest.mark.parametrize("name", ("RMSprop", "SGD", "Registered", "Unregistered"))
@on_ranks(2)
def test_saved_models_load_with_and_without_the_wrapper(tmp_path, name):
    """The optimizers are Keras's, ours, a registered one and another."""
    own = {"SGD": hvd.SGD, "Registered": Registered, "Unregistered": Unregistered}
    kind = own.get(name, keras.optimizers.RMSprop)
    model = compiled(network(), hvd.DistributedOptimizer(kind(0.01, momentum=0.9)))
    model.train_on_batch(EXAMPLES[:4], LABELS[:4])
    path = tmp_path / f"{hvd.rank()}.keras"
    model.save(path)

    custom_objects = {name: kind}
    plain_objects = custom_objects if kind is Unregistered else None
    custom_optimizers = {"custom_optimizers": [kind]} if kind is Unregistered else {}
    plain = keras.models.load_model(path, custom_objects=plain_objects)
    loaded = hvd.load_model(path, compression=hvd.Compression.fp16, **custom_optimizers)
    by_objects = hvd.load_model(path, custom_objects=custom_objects)

    assert isinstance(plain.optimizer, kind) and not is_distributed(plain.optimizer)
    for wrapped in (loaded, by_objects):
        assert is_distributed(wrapped.optimizer) and isinstance(wrapped.optimizer, kind)
    assert reduction_of(loaded.optimizer).options.compression is hvd.Compression.fp16
    for other in (plain, loaded, by_objects):
        saved = values(state.everything(model))
        assert_same(saved, values(state.everything(other)))
    assert np.isfinite(loaded.train_on_batch(EXAMPLES[:4], LABELS[:4])[0])

    with pytest.raises(ValueError, match="Keras 3 has no legacy optimizers"):
        hvd.load_model(path, legacy_opts=True)


class Loaded(NamedTuple):
    """A model that was loaded or made anew, and then trained."""

    slots_before: int
    slots: int
    iterations: int
    weights: Weights


def train_what_rank_0_has_loaded(folder: Path) -> Loaded:
    """Load a trained model on rank 0, make a new one on the others; go on together."""
    model = compiled(network(), nesterov())
    model.train_on_batch(EXAMPLES[:4], LABELS[:4])
    path = folder / f"root{hvd.rank()}.keras"
    model.save(path)
    again = hvd.load_model(path) if hvd.rank() == 0 else compiled(network(), nesterov())
    slots_before = len(again.optimizer.variables)
    fit(again, 1, ReplicaCheck())
    iterations = int(again.optimizer.iterations)
    return Loaded(slots_before, len(again.optimizer.variables), iterations, again.get_weights())


def test_rank_0_may_load_what_the_others_make_anew(backend, tmp_path):
    first, second = run_on_ranks(backend, 2, train_what_rank_0_has_loaded, folder=tmp_path)
    # The counter and η; four velocities.
    assert (first.slots_before, second.slots_before) == (6, 2)
    for model in (first, second):
        assert (model.slots, model.iterations) == (6, 1 + 4)
    assert_same(first.weights, second.weights)


@on_ranks(2)
def test_configurations_make_the_round_trip():
    """from_config of the object and of its class gives the same configuration and reduction."""
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.3, clipnorm=2.0), op=hvd.Sum)
    config = optimizer.get_config()
    for source in (optimizer, optimizer.__class__):
        copy = source.from_config(dict(config))
        assert copy.get_config() == config
        assert reduction_of(copy).options.op == hvd.Sum


def assert_refused(word: str, action: Callable, *arguments: Any, **options: Any) -> None:
    """Check that the action is refused in one sentence that names `word`."""
    with pytest.raises(ValueError) as error:
        action(*arguments, **options)
    sentence = str(error.value)
    assert word in sentence
    assert len(sentence) < 250 and "\n" not in sentence


@on_ranks(2)
def test_everything_that_is_refused_says_why():
    sgd, wrap, callbacks = keras.optimizers.SGD, hvd.DistributedOptimizer, hvd.callbacks
    broadcast = callbacks.BroadcastGlobalVariablesCallback

    # The wrapper.
    assert_refused("Adasum", wrap, sgd(), op=hvd.Adasum)
    assert_refused("op=", wrap, sgd(), op=hvd.Max)
    predivided_sum = {"op": hvd.Sum, "gradient_predivide_factor": 2.0}
    assert_refused("gradient_predivide_factor=", wrap, sgd(), **predivided_sum)
    negative = {"gradient_predivide_factor": -1.0}
    assert_refused("gradient_predivide_factor=-1", wrap, sgd(), **negative)
    assert_refused("backward_passes_per_step=0", wrap, sgd(), backward_passes_per_step=0)
    assert_refused("groups=0", wrap, sgd(), groups=0)
    assert_refused("groups=[1", wrap, sgd(), groups=[1, 2])
    assert_refused("keras.optimizers.Optimizer", wrap, "sgd")
    assert_refused("already", wrap, wrap(sgd()))
    if not TENSORFLOW:  # TensorFlow takes it
        assert_refused("device_dense='/cpu:0'", wrap, sgd(), device_dense="/cpu:0")

    # Functions and layers.
    assert_refused("legacy_opts=True", hvd.load_model, "x.keras", legacy_opts=True)
    assert_refused("broadcast_variables", hvd.broadcast_global_variables, 0)
    assert_refused("average=True", hvd.allreduce, 1.0, average=True, op=hvd.Sum)
    assert_refused("fused=True", hvd.SyncBatchNormalization, fused=True)

    # Callbacks and schedules.
    assert_refused("initial_lr=None", callbacks.LearningRateScheduleCallback, None, 1.0)
    assert_refused("device='/gpu:0'", broadcast, 0, device="/gpu:0")
    assert_refused("device='/cpu:0'", callbacks.MetricAverageCallback, "/cpu:0")
    assert_refused("local_variables", broadcast, 0, local_variables=["w"])
    assert_refused("no filepath", callbacks.BestModelCheckpoint().on_train_begin)
    assert_refused("steps_per_epoch=0", hvd.RateSchedule, Rate(0.1, 0.1), 0)
    assert_refused("steps_per_execution=2", begin_with_several_steps_per_execution)

    # An elastic state of a model without weights.
    unbuilt = keras.Sequential([keras.layers.Dense(1)])
    assert_refused("model(x[:1])", hvd.elastic.KerasState, unbuilt, sgd())


def begin_with_several_steps_per_execution() -> None:
    model = network()
    model.compile(nesterov(), "mse", steps_per_execution=2, jit_compile=False)
    callback = ScheduledRate(Rate(0.1, 0.1))
    callback.set_model(model)
    callback.on_train_begin()


def rates_of(epochs: int, *callbacks: keras.callbacks.Callback) -> list[float]:
    """Return the rate of each step of a fit with the callbacks."""
    rates = Rates()
    fit(compiled(network(), nesterov()), epochs, *callbacks, rates)
    return rates.rates


def usual_callbacks(compatible: bool = False) -> list[keras.callbacks.Callback]:
    """Return the schedule of the upstream test: a warmup, two constants and a function.

    `compatible`: with the options that restore Horovod's old learning rates.
    """
    schedule = functools.partial(hvd.callbacks.LearningRateScheduleCallback, 0.1 * hvd.size())
    return [
        schedule(1e-1, start_epoch=3, end_epoch=6, compounding=compatible),
        schedule(1e-2, start_epoch=6, end_epoch=9, compounding=compatible),
        schedule(lambda epoch: epoch / 10, start_epoch=9, end_epoch=11),
        schedule(lambda epoch: epoch / 10, start_epoch=11, staircase=False),
        hvd.callbacks.LearningRateWarmupCallback(
            initial_lr=0.1 * hvd.size(), warmup_epochs=3, one_step_early=compatible, verbose=1
        ),
    ]


@on_ranks(2)
def test_learning_rates_are_those_that_the_documentation_promises():
    """The rate of each step.

    It is a warmup from η/size to η at epoch 3 exactly, constants that stay constant, functions.
    """
    rates = Rates()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        history = fit(compiled(network(), nesterov()), 12, *usual_callbacks(), rates)

    lr, steps = 0.2, 4
    expected = [lr / 2 * (1 + t / 12) for t in range(12)]
    expected += [lr * 0.1] * 12 + [lr * 0.01] * 12 + [lr * 0.9] * 4 + [lr * 1.0] * 4
    expected += [lr * (11 + t / steps) / 10 for t in range(4)]
    assert rates.rates == pytest.approx(expected, rel=1e-6)
    assert history.history["lr"] == pytest.approx(expected[steps - 1 :: steps], rel=1e-6)
    assert ("warmed up to 0.2" in output.getvalue()) == (hvd.rank() == 0)


@on_ranks(2)
def test_a_warmup_of_a_fraction_ends_inside_its_epoch():
    warmup = hvd.callbacks.LearningRateWarmupCallback(0.1 * hvd.size(), warmup_epochs=1.5)
    ramp = [0.1 * (1 + t / 6) for t in range(6)] + [0.2] * 6
    assert rates_of(3, warmup) == pytest.approx(ramp, rel=1e-6)


@on_ranks(2)
def test_gradual_warmup_and_step_decay_go_together():
    warmup = hvd.callbacks.GradualWarmup(0.1, 4, 1.0)
    decay = hvd.callbacks.StepDecay(0.4, (1.5, 2.0))
    expected = [0.1 + 0.3 * t / 4 for t in range(4)] + [0.4] * 2 + [0.04] * 2 + [0.004] * 4
    assert rates_of(3, warmup, decay) == pytest.approx(expected, rel=1e-6)


@on_ranks(2)
def test_options_restore_horovods_old_learning_rates():
    """Compounding constants, and a warmup that is one step ahead."""
    lr = 0.2
    warm = [lr / 2 * (1 + (t + 1) / 12) for t in range(12)]
    constants = [lr * 0.1 ** (e - 3) for e in (3, 4, 5)] + [lr * 0.01 ** (e - 6) for e in (6, 7, 8)]
    expected = warm + [rate for rate in constants for _ in range(4)]
    rates = rates_of(12, *usual_callbacks(compatible=True))
    assert rates[: len(expected)] == pytest.approx(expected, rel=1e-6)


Metrics = dict[str, float]


class Averages(NamedTuple):
    """The metrics of a fit and an evaluation, by name."""

    whole: Metrics  # of all examples
    own: Metrics  # of this rank's
    weighted: Metrics
    unweighted: Metrics


def average_metrics() -> Averages:
    """Average metrics over ranks of which rank r holds r + 1 times 8 examples."""
    sizes = 8 * np.arange(1, hvd.size() + 1)
    end = np.cumsum(sizes)[hvd.rank()]
    part = slice(end - sizes[hvd.rank()], end)
    x, y = EXAMPLES[part], LABELS[part]
    all_x, all_y = EXAMPLES[: sizes.sum()], LABELS[: sizes.sum()]

    model = compiled(network(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)))
    state.broadcast_state(model)
    whole = model.evaluate(all_x, all_y, verbose=0, return_dict=True)
    own = model.evaluate(x, y, verbose=0, return_dict=True)

    def averaged(**options: bool) -> Metrics:
        history = model.fit(
            x,
            y,
            batch_size=8 * (hvd.rank() + 1),
            validation_data=(x, y),
            verbose=0,
            callbacks=[hvd.callbacks.MetricAverageCallback(**options)],
        )
        return {metric: values[0] for metric, values in history.history.items()}

    return Averages(whole, own, averaged(), averaged(unweighted=True))


def test_metrics_are_those_of_all_examples_and_the_old_ones_on_request(backend):
    """Sums divided once, and Horovod's unweighted mean of means."""
    ranks = run_on_ranks(backend, 2, average_metrics)
    for averages in ranks:
        for metric, whole in averages.whole.items():
            mean = np.mean([other.own[metric] for other in ranks])
            for logs, expected in ((averages.weighted, whole), (averages.unweighted, mean)):
                assert logs[metric] == pytest.approx(expected, rel=1e-5)
                assert logs[f"val_{metric}"] == pytest.approx(expected, rel=1e-5)
    first = ranks[0]
    assert first.weighted["loss"] != pytest.approx(first.unweighted["loss"], rel=1e-3)


@on_ranks(2)
def test_the_best_model_is_written_by_rank_0_alone(tmp_path):
    path = tmp_path / f"best{hvd.rank()}.keras"
    best = hvd.callbacks.BestModelCheckpoint(monitor="loss")
    best.filepath = str(path)
    history = fit(compiled(network(), nesterov()), 3, hvd.callbacks.MetricAverageCallback(), best)
    assert path.exists() == (hvd.rank() == 0)
    if hvd.rank() == 0:
        assert keras.models.load_model(path) is not None
        assert best.best == pytest.approx(min(history.history["loss"]))


@pytest.mark.parametrize("nesterov", (False, True))
@on_ranks(2)
def test_schedule_and_callback_are_the_same_rate_and_the_same_training(nesterov):
    """The callback with Keras's SGD, the schedule with ours, also several steps at a time.

    The rates are bitwise equal. The weights are equal to the rounding of velocities that hold η
    and of those that don't.
    """
    rate = Rate(0.02, 0.1, warmup_epochs=1.1, decay_epochs=(2.0, 2.3))
    sgd = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, 0.9, nesterov))
    with_callback = compiled(network(), sgd)
    rates = Rates()
    fit(with_callback, 3, ScheduledRate(rate), rates)

    for steps in (1, 4) if TENSORFLOW else (1,):  # Keras has no others with PyTorch
        schedule = hvd.RateSchedule(rate, 4)
        assert [float(value(schedule(t))) for t in range(12)] == rates.rates
        scheduled = network()
        scheduled.compile(
            hvd.DistributedOptimizer(hvd.SGD(schedule, 0.9, nesterov)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=steps,
            jit_compile=False,
        )
        fit(scheduled, 3)
        bound = {"rtol": 1e-4, "atol": 1e-5}
        assert_same(scheduled.get_weights(), with_callback.get_weights(), **bound)


class Normalised(NamedTuple):
    """A network with SyncBatchNormalization after two steps."""

    weights: Weights
    outputs: np.ndarray


def train_with_synchronised_normalisation() -> Normalised:
    """Train two steps of 24 examples. Unequal shares need the sums to be weighted."""
    keras.utils.set_random_seed(100 + hvd.rank())
    layers = [
        keras.layers.Conv2D(4, 3, activation="relu"),
        hvd.SyncBatchNormalization(momentum=0.5),
        keras.layers.Flatten(),
        keras.layers.Dense(3),
    ]
    model = keras.Sequential([keras.Input((8, 8, 2)), *layers])
    # The sum over examples, so that ranks with unequal numbers of them weigh right.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.003), op=hvd.Sum)
    model.compile(optimizer, loss, jit_compile=False)
    state.broadcast_state(model)

    # Rank r has about r + 1 times as many examples as rank 0.
    parts = np.arange(1, hvd.size() + 1)
    ends = np.cumsum(parts * 24 // parts.sum())
    ends[-1] = 24
    begin = 0 if hvd.rank() == 0 else ends[hvd.rank() - 1]
    own_part = slice(begin, ends[hvd.rank()])
    for _ in range(2):
        model.train_on_batch(EXAMPLES[own_part], LABELS[own_part])
    outputs = value(model(EXAMPLES[24:32], training=False))
    return Normalised([value(v) for v in model.variables if v.dtype == "float32"], outputs)


@on_2_and_4_ranks
def test_synchronised_normalisation_is_that_of_the_whole_batch(backend, size):
    """Unequal shares, two steps: weights, moving statistics and outputs as on one rank."""
    alone = run_alone(backend, train_with_synchronised_normalisation)
    for normalised in run_on_ranks(backend, size, train_with_synchronised_normalisation):
        assert_same(normalised.weights, alone.weights, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(normalised.outputs, alone.outputs, rtol=1e-4, atol=1e-4)


@on_ranks(2, 4)
def test_synchronised_normalisation_does_not_count_masked_steps():
    size = hvd.size()
    x = np.ones((3, 2, 4), np.float32) * (hvd.rank() + 1)
    masked = keras.layers.Masking()(tensor(np.concatenate([x, 0 * x], axis=1)))
    layer = hvd.SyncBatchNormalization(momentum=0.0)
    layer(masked, training=True, mask=tensor([[1, 1, 0, 0]] * 3))
    mean, variance = np.average(np.arange(1, size + 1)), np.var(np.arange(size))
    np.testing.assert_allclose(value(layer.moving_mean), np.full(4, mean), rtol=1e-6)
    np.testing.assert_allclose(value(layer.moving_variance), np.full(4, variance), rtol=1e-5)


@on_ranks(2, 4)
def test_reductions_of_values():
    rank, size = hvd.rank(), hvd.size()
    own = np.float32(rank + 1)
    mean, total = (size + 1) / 2, size * (size + 1) / 2
    fp16 = hvd.Compression.fp16
    scaled = hvd.allreduce(own, op=hvd.Sum, prescale_factor=2.0, postscale_factor=3.0)
    assert float(hvd.allreduce(own)) == pytest.approx(mean, rel=1e-6)
    assert float(hvd.allreduce(own, compression=fp16)) == pytest.approx(mean, rel=1e-6)
    assert float(hvd.allreduce(own, average=False)) == pytest.approx(total, rel=1e-6)
    assert float(scaled) == pytest.approx(6 * total, rel=1e-6)
    assert float(hvd.allreduce(own, op=hvd.Min)) == 1
    assert float(hvd.allreduce(own, op=hvd.Max)) == size
    assert float(hvd.allreduce(own, op=hvd.Product)) == np.prod(np.arange(size) + 1)

    grouped = hvd.grouped_allreduce([np.ones(1, "f"), np.full(2, rank, "f")])
    assert [float(value(g)[0]) for g in grouped] == [1, (size - 1) / 2]
    scattered = hvd.reducescatter(np.arange(size, dtype="f"), op=hvd.Sum)
    np.testing.assert_array_equal(value(scattered), [rank * size])


@on_ranks(2, 4)
def test_exchanges_of_values():
    rank, size = hvd.rank(), hvd.size()
    ranks, last = np.arange(size), size - 1
    gathered = value(hvd.allgather(np.full((rank + 1, 2), rank, "f")))
    np.testing.assert_array_equal(gathered[:, 0], np.repeat(ranks, ranks + 1))
    broadcast = hvd.broadcast(np.full(2, rank, "f"), root_rank=last)
    np.testing.assert_array_equal(value(broadcast), [last, last])

    own = np.full(size, rank, "f")
    np.testing.assert_array_equal(value(hvd.alltoall(own)), ranks)
    received, splits = hvd.alltoall(own, splits=[1] * size)
    np.testing.assert_array_equal(value(received), ranks)
    np.testing.assert_array_equal(value(splits), [1] * size)

    assert hvd.broadcast_object({"rank": rank}, root_rank=last) == {"rank": last}
    assert hvd.allgather_object(rank) == list(ranks)
    v, counter = variable(2), keras.Variable(rank, dtype="int32", trainable=False)
    v.assign(v + rank)
    hvd.broadcast_variables([v, counter], root_rank=last)
    assert [number(v), int(value(counter))] == [last, last]


@on_ranks(2, 4)
def test_horovod_tells_how_it_was_built_and_where_this_rank_is():
    assert hvd.mpi_enabled() + hvd.gloo_enabled() == 1
    libraries = (hvd.mpi_built, hvd.gloo_built, hvd.nccl_built, hvd.ddl_built, hvd.ccl_built)
    assert any(is_built() for is_built in libraries)
    places = [hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()]
    assert places == [hvd.rank(), hvd.size(), 0, 1]


@on_ranks(2)
def test_elastic_state_synchronises_restores_and_commits():
    """The upstream test: sync, change, restore, change, commit, restore."""
    rank = hvd.rank()
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.set_weights([np.full((2, 2), 1.0 + rank), np.full(2, 1.0 + rank)])
    optimizer = keras.optimizers.Adam(0.001 * hvd.size())
    held = hvd.elastic.KerasState(model, optimizer, batch=20 + rank, epoch=10 + rank)

    def numbers() -> list[float]:
        weight = float(model.get_weights()[0].flat[0])
        return [weight, held.batch, held.epoch, int(optimizer.iterations)]

    def change() -> None:
        model.set_weights([np.full((2, 2), 7.0), np.full(2, 7.0)])
        optimizer.iterations.assign(5)
        held.batch, held.epoch = 21, 11

    held.sync()
    assert numbers() == [1, 20, 10, 0]
    change()
    held.restore()
    assert numbers() == [1, 20, 10, 0]
    change()
    held.commit()
    model.set_weights([np.zeros((2, 2)), np.zeros(2)])
    held.batch = 99
    held.restore()
    assert numbers() == [7, 21, 11, 5]


class Positions(keras.callbacks.Callback):
    """Notes after each batch its number, those of the elastic state, and the optimizer's count."""

    def __init__(self, held: hvd.elastic.KerasState) -> None:
        super().__init__()
        self.held = held
        self.positions: list[tuple[int, int, int, int]] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        iterations = int(value(self.model.optimizer.iterations))
        self.positions.append((batch, self.held.batch, self.held.epoch, iterations))


@pytest.mark.parametrize("epochs", ({"epochs": 2}, {"initial_epoch": 1, "epochs": 3}))
@on_ranks(2)
def test_elastic_callbacks_take_up_an_epoch_where_it_was_left(epochs):
    """Two of four batches of epoch 1 are done: two pass by without a step, two are trained.

    Then another epoch. By both conventions for fit().
    """
    size, rank = hvd.size(), hvd.rank()
    model = compiled(network(), nesterov())
    held = hvd.elastic.KerasState(model, batch=2, epoch=1)
    held.on_commit = []
    positions = Positions(held)
    callbacks = [
        BroadcastState(),
        hvd.elastic.UpdateBatchStateCallback(held),
        hvd.elastic.UpdateEpochStateCallback(held),
        hvd.elastic.CommitStateCallback(held, batches_per_commit=3),
        positions,
    ]
    x, y = share(EXAMPLES, size, rank), share(LABELS, size, rank)
    model.fit(x, y, batch_size=MINIBATCH // size, verbose=0, callbacks=callbacks, **epochs)

    batches, done, epoch_numbers, iterations = zip(*positions.positions, strict=True)
    assert batches == (0, 1, 2, 3) * 2
    assert done == (2, 2, 3, 4, 1, 2, 3, 4)
    assert epoch_numbers == (1,) * 4 + (2,) * 4
    assert iterations == (0, 0, 1, 2, 3, 4, 5, 6)
    assert (held.epoch, held.batch) == (3, 0)


def train_by_the_page(folder: Path) -> Weights:
    """Run the script of docs/keras.md, for two epochs."""
    page = (ROOT / "docs/keras.md").read_text()
    script = page.split("```python\n")[1].split("```")[0].replace("epochs=90", "epochs=2")
    names = {
        "x": EXAMPLES,
        "y": LABELS,
        "model": network(),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
        "batch": 12,
    }
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        exec(compile(script, "docs/keras.md", "exec"), names)
    # The last of 4 steps of the second epoch is 7/20 into the warmup from 0.01 to 0.02.
    assert float(value(names["optimizer"].learning_rate)) == pytest.approx(0.01 * (1 + 7 / 20))
    return names["model"].get_weights()


def test_the_fifteen_lines_of_the_page_train(backend, tmp_path):
    first, second = run_on_ranks(backend, 2, train_by_the_page, folder=tmp_path)
    assert_same(first, second)
