"""Data divided among 1 and 2 real ranks, and each rank's own random layers, on both backends.

The body of a test with `@on_ranks` runs on the ranks, and so do the functions that the others give
to `run_on_ranks`.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import recipe.keras as hvd
from recipe.configs import quick
from recipe.frameworks.keras import resnet
from recipe.keras import seeds, state
from recipe.keras.callbacks import BroadcastGlobalVariablesCallback, BroadcastState, ReplicaCheck
from tests.pools import on_ranks, run_on_ranks

COUNT = 43
MINIBATCH = 8
X = np.arange(COUNT, dtype=np.float32)[:, None]
Y = -X

KINDS = (
    "arrays",
    "weighted",
    "tensors",
    "stream",
    "uncounted",
    "batches",
    "PyDataset",
    "threads",
    "loader",
)
BY_EXAMPLE = ("arrays", "weighted", "tensors", "stream", "uncounted", "loader")

Steps = list[list[int]]  # of an epoch: the numbers of each step's examples

pytestmark = pytest.mark.ranks


class Recorder(keras.Model):
    """Notes the examples of each training step, and that inputs and targets belong together."""

    def train_step(self, data: Any) -> dict:
        x, y, *weights = data
        x, y = (keras.ops.convert_to_numpy(a) for a in (x, y))
        assert np.array_equal(x, -y)
        self.seen[-1].append(x[:, 0].astype(int).tolist())
        assert all(keras.ops.convert_to_numpy(w).shape == (len(x),) for w in weights)
        return super().train_step(data)


class Epochs(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.model.seen.append([])


class Batches(keras.utils.PyDataset):
    """Batches of four, in an order of its own in each epoch."""

    shift = 0

    def __len__(self) -> int:
        return -(-COUNT // 4)

    def __getitem__(self, i: int) -> tuple:
        return X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]

    def on_epoch_end(self) -> None:
        self.shift += 1


class Pairs(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> tuple:
        return X[i], Y[i]


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator:
        return iter(X)


def recorder() -> Recorder:
    inputs = keras.Input((1,))
    model = Recorder(inputs, keras.layers.Dense(1)(inputs))
    model.seen = []
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1e-6))
    model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=True, jit_compile=False)
    return model


def kinds() -> dict[str, Callable]:
    """Return what divides data of each kind anew, with the given options."""
    n = MINIBATCH // hvd.size()
    examples = tf.data.Dataset.from_tensor_slices((X, Y))
    tensors = tuple(keras.ops.convert_to_tensor(a) for a in (X, Y))
    weighted = (X, Y, np.ones(COUNT, np.float32))
    return {
        "arrays": lambda **how: hvd.divide((X, Y), n, **how),
        "weighted": lambda **how: hvd.divide(weighted, n, **how),
        "tensors": lambda **how: hvd.divide(tensors, n, **how),
        "stream": lambda **how: hvd.divide(examples, n, **how),
        "uncounted": lambda **how: hvd.divide(examples.filter(lambda x, y: True), n, **how),
        "batches": lambda **how: hvd.divide(examples.batch(4), **how),
        "PyDataset": lambda **how: hvd.divide(Batches(), **how),
        "threads": lambda **how: hvd.divide(Batches(workers=2, max_queue_size=3), **how),
        "loader": lambda **how: hvd.divide(
            torch.utils.data.DataLoader(Pairs(), n, shuffle=True), **how
        ),
    }


def trained(data: Any, first: int = 0, epochs: int = 3, **options: Any) -> list[Steps]:
    """Train, and return this rank's examples by epoch and step."""
    tf.random.set_seed(100 + hvd.rank())  # ranks that draw as they like
    model = recorder()
    options = {"shuffle": False, "verbose": 0} | options
    model.fit(
        data, initial_epoch=first, epochs=epochs, callbacks=[BroadcastState(), Epochs()], **options
    )
    # Keras made lists of its own of these.
    return [[list(step) for step in epoch] for epoch in model.seen]


class Division(NamedTuple):
    """What one rank trained on, by epoch."""

    seen: list[Steps]
    resumed: list[Steps]  # from the second epoch on
    in_order: list[Steps]  # one epoch, not shuffled
    evaluated: int  # how many numbers an evaluation returns


def train_on_divided_data(kind: str) -> Division:
    make = kinds()[kind]
    evaluated = recorder().evaluate(make(shuffle=False), verbose=0)
    return Division(
        seen=trained(make(seed=5)),
        resumed=trained(make(seed=5, first_epoch=1), first=1),
        in_order=trained(make(shuffle=False), epochs=1),
        evaluated=len(evaluated),
    )


@functools.cache
def divisions(backend: str, size: int, kind: str) -> list[Division]:
    """Return every rank's division, of one run for all tests."""
    return run_on_ranks(backend, size, train_on_divided_data, kind=kind)


def flat(lists: Iterable[list]) -> list:
    return list(itertools.chain.from_iterable(lists))


def minibatches(ranks: Iterable[list[Steps]]) -> list[Steps]:
    """Return by epoch and step the minibatch: all ranks' examples, one rank's after another's."""
    epochs = zip(*ranks, strict=True)  # strict: as many epochs and steps on all ranks
    return [[flat(parts) for parts in zip(*epoch, strict=True)] for epoch in epochs]


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_is_used_once_an_epoch_in_as_many_steps(backend, kind):
    ranks = divisions(backend, 2, kind)
    epochs = minibatches(division.seen for division in ranks)
    assert len(epochs) == 3
    for epoch in epochs:
        assert sorted(flat(epoch)) == list(range(COUNT))
    assert epochs[0] != epochs[1] != epochs[2]
    for division in ranks:
        assert all(step for epoch in division.seen for step in epoch)
        assert division.evaluated == 2  # the loss and a metric


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_the_same_after_a_restart(backend, kind):
    for size in (1, 2):
        for division in divisions(backend, size, kind):
            assert division.resumed == division.seen[1:]


@pytest.mark.parametrize("kind", BY_EXAMPLE)
def test_minibatches_are_those_of_one_rank(backend, kind):
    """43 examples by 8: four minibatches, and two for the last 11."""
    (alone,) = divisions(backend, 1, kind)
    ranks = divisions(backend, 2, kind)
    seen = minibatches(division.seen for division in ranks)
    in_order = minibatches(division.in_order for division in ranks)
    assert seen == alone.seen
    assert in_order == alone.in_order
    for epochs in (seen, in_order):
        assert [len(step) for step in epochs[0]] == [8, 8, 8, 8, 6, 5]
    assert flat(alone.in_order[0]) == list(range(COUNT))


@pytest.mark.parametrize("kind", ("batches", "PyDataset", "threads"))
def test_batches_are_dealt_out_and_the_last_shared(backend, kind):
    """Eleven batches of four, the last of three.

    Five to a rank, of which the fifth goes with half of the last.
    """
    first, second = divisions(backend, 2, kind)
    assert first.in_order[0] == [
        [0, 1, 2, 3],
        [8, 9, 10, 11],
        [16, 17, 18, 19],
        [24, 25, 26, 27],
        [32, 33],
        [34, 35, 40],
    ]
    assert second.in_order[0] == [
        [4, 5, 6, 7],
        [12, 13, 14, 15],
        [20, 21, 22, 23],
        [28, 29, 30, 31],
        [36, 37, 38],
        [39, 41, 42],
    ]
    (alone,) = divisions(backend, 1, kind)
    order = [batch[0] for batch in alone.seen[0]]
    together = minibatches([first.seen, second.seen])[0]
    assert flat(together[:4])[::4] == order[:8]


def test_arrays_tensors_and_loaders_have_the_same_order(backend):
    arrays, tensors, loaders = (
        divisions(backend, 2, kind) for kind in ("arrays", "tensors", "loader")
    )
    for rank in range(2):
        assert arrays[rank].seen == tensors[rank].seen == loaders[rank].seen


def train_on_halves_of_an_epoch() -> list[Steps]:
    """Train epochs of three steps, of which the data have six."""
    return trained(kinds()["arrays"](), epochs=4, steps_per_epoch=3)


def test_a_pass_over_the_data_may_take_several_epochs(backend):
    epochs = minibatches(run_on_ranks(backend, 2, train_on_halves_of_an_epoch))
    for first, second in (epochs[:2], epochs[2:]):
        assert sorted(flat(first + second)) == list(range(COUNT))
    assert epochs[0] != epochs[2]


@on_ranks(2)
def test_settings_and_hooks_are_kept():
    """Those of the user's own PyDataset and DataLoader."""
    own = Batches(workers=3, use_multiprocessing=True, max_queue_size=7)
    divided = hvd.divide(own)
    divided.on_epoch_end()
    parallel = (divided.workers, divided.use_multiprocessing, divided.max_queue_size)
    assert parallel == (3, True, 7)
    assert own.shift == 1

    settings = {
        "num_workers": 2,
        "prefetch_factor": 3,
        "timeout": 9,
        "persistent_workers": True,
        "collate_fn": len,
        "worker_init_fn": abs,
        "generator": torch.Generator(),
        "pin_memory": True,
    }
    loader = hvd.divide(torch.utils.data.DataLoader(Pairs(), 4, **settings))
    assert {name: getattr(loader, name) for name in settings} == settings


def assert_refused(word: str, action: Callable, *arguments: Any, **options: Any) -> None:
    """Check that the action is refused in a sentence that names `word`."""
    # TensorFlow makes an error of its own of one in the data.
    with pytest.raises((ValueError, tf.errors.OpError)) as error:
        action(*arguments, **options)
    assert word in str(error.value)


@on_ranks(2)
def test_what_cannot_be_divided_is_refused_in_a_sentence():
    random.seed(7)  # so that all ranks fail in the same step: here they live on
    data, size = torch.utils.data, hvd.size()
    assert_refused("shuffle=False", trained, hvd.divide((X, Y), 1), shuffle=True)

    # Arrays, and what is none.
    assert_refused("generator can't be divided", hvd.divide, (x for x in X))
    assert_refused("int", hvd.divide, [1, 2, 3])
    assert_refused("common number", hvd.divide, (X, Y[:-1]))
    assert_refused("too few", hvd.divide, X[: size - 1])
    assert_refused("pass the same", hvd.divide, X[: COUNT - hvd.rank()])
    assert_refused("seed=-1", hvd.divide, X, seed=-1)
    assert_refused("batch_size=0", hvd.divide, X, 0)

    # TensorFlow's and Keras's data sets.
    examples = tf.data.Dataset.from_tensor_slices((X, Y))
    assert_refused("shuffled", hvd.divide, examples.shuffle(9).batch(4))
    assert_refused("repeat", hvd.divide, examples.repeat(), 4)
    assert_refused("pass batch_size", hvd.divide, tf.data.Dataset.range(9))
    assert_refused("batch_size=4: a PyDataset", hvd.divide, Batches(), 4)

    # PyTorch's.
    weighted = data.WeightedRandomSampler(np.ones(COUNT), COUNT)
    assert_refused("IterableDataset", hvd.divide, data.DataLoader(Endless()))
    sampled = data.DataLoader(Pairs(), sampler=weighted)
    assert_refused("WeightedRandomSampler", hvd.divide, sampled)


@on_ranks(2)
def test_a_batch_of_one_example_that_is_left_over_is_refused():
    single_examples = tf.data.Dataset.from_tensor_slices(X[:3]).batch(1)
    divided = hvd.divide(single_examples)
    if hvd.rank() == 0:
        with pytest.raises((ValueError, tf.errors.OpError), match="one example"):
            list(divided)
    else:
        list(divided)  # it has half of the batch left over as well


class Noisy(keras.layers.Layer):
    """Keeps its generator in a list, and a random layer within."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generators = [keras.random.SeedGenerator(3)]
        self.inner = keras.layers.GaussianNoise(1.0)

    def call(self, x: Any, training: bool = False) -> Any:
        noise = keras.random.normal(keras.ops.shape(x), seed=self.generators[0])
        return self.inner(x + noise, training=training)


def random_network() -> keras.Model:
    """Random layers of several kinds, side by side; every rank draws other seeds for them."""
    keras.utils.clear_session()  # the names of another process's first model
    keras.utils.set_random_seed(100 + hvd.rank())
    inputs = keras.Input((4, 4, 1))
    layers = [
        keras.layers.Dropout(0.5),
        keras.Sequential([keras.layers.Dropout(0.5)]),
        keras.layers.RandomTranslation(0.5, 0.5, fill_mode="constant"),
        keras.layers.SpatialDropout2D(0.5),
        Noisy(),
    ]
    outputs = keras.layers.Concatenate()([layer(inputs) for layer in layers])
    model = keras.Model(inputs, [outputs, keras.layers.Dense(1)(keras.layers.Flatten()(outputs))])
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), [None, "mse"], jit_compile=False
    )
    return model


def masks(model: keras.Model, times: int) -> list[np.ndarray]:
    """Return what the random layers do to ones, several times."""
    ones = np.arange(1, 6 * 16 + 1, dtype=np.float32).reshape(6, 4, 4, 1)
    return [keras.ops.convert_to_numpy(model(ones, training=True)[0]) for _ in range(times)]


def begun(callback: keras.callbacks.Callback, model: keras.Model) -> keras.Model:
    """Return the model as it is when the callback has begun a training."""
    callback.set_model(model)
    callback.on_train_begin()
    return model


def masks_after(callback: keras.callbacks.Callback) -> list[np.ndarray]:
    """Return three masks of a new network whose training the callback begins."""
    return masks(begun(callback, random_network()), 3)


def seed_values(model: keras.Model) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(v) for v in seeds.states(model)]


def draw_masks() -> list[np.ndarray]:
    """Check that all ways to repeat a run draw the same masks, and return these."""
    first = masks_after(BroadcastState())
    assert not np.array_equal(first[0], first[1])
    twice = begun(BroadcastState(), begun(BroadcastState(), random_network()))
    elastic = random_network()
    hvd.elastic.KerasState(elastic).sync()
    np.testing.assert_array_equal(masks_after(BroadcastState()), first)
    np.testing.assert_array_equal(masks(twice, 3), first)
    np.testing.assert_array_equal(masks(elastic, 3), first)
    return first


def test_ranks_draw_their_own_masks_reproducibly(backend):
    for own, others in zip(*run_on_ranks(backend, 2, draw_masks), strict=True):
        for layer in range(5):  # each of them random
            assert not np.array_equal(own[..., layer], others[..., layer])


class Seeds(NamedTuple):
    """The seeds and counters of a network's random layers."""

    unbroadcast: list[np.ndarray]
    broadcast: list[np.ndarray]


def broadcast_seeds() -> Seeds:
    unbroadcast = seed_values(random_network())
    return Seeds(unbroadcast, seed_values(begun(BroadcastState(), random_network())))


def test_rank_0_keeps_its_seeds_and_counters_are_common(backend):
    first, second = run_on_ranks(backend, 2, broadcast_seeds)
    assert len(first.broadcast) == 6
    np.testing.assert_array_equal(first.broadcast, first.unbroadcast)
    for own, others in zip(first.broadcast, second.broadcast, strict=True):
        assert own[0] != others[0] and own[1] == others[1]
        assert 0 <= others[0] < 2**31


@on_ranks(2)
def test_masks_go_on_from_rank_0s_checkpoint():
    model = begun(BroadcastState(), random_network())
    masks(model, 3)
    saved = state.to_arrays(model)
    assert sum("seed_generator" in name for name in saved) == 6
    going_on = masks(model, 2)

    resumed = random_network()
    if hvd.rank() == 0:
        state.from_arrays(resumed, saved)
    begun(BroadcastState(), resumed)
    np.testing.assert_array_equal(masks(resumed, 2), going_on)


@on_ranks(2)
def test_replicas_stay_equal_although_the_masks_differ():
    model = begun(BroadcastState(), random_network())
    x, y = np.ones((4, 4, 4, 1), np.float32), np.ones((4, 1), np.float32)
    targets = [np.zeros((4, 4, 4, 5), np.float32), y]
    model.fit(x, targets, verbose=0, callbacks=[ReplicaCheck(every=1)])


class BroadcastMasks(NamedTuple):
    """Masks after several ways to broadcast."""

    own_seeds: list[np.ndarray]
    same_seeds: list[np.ndarray]
    horovods_same_seeds: list[np.ndarray]
    last_is_root: list[np.ndarray]


def draw_masks_after_broadcasts() -> BroadcastMasks:
    return BroadcastMasks(
        masks_after(BroadcastState()),
        masks_after(BroadcastState(same_seeds=True)),
        masks_after(BroadcastGlobalVariablesCallback(0, same_seeds=True)),
        masks_after(BroadcastState(hvd.size() - 1)),
    )


def test_same_seeds_gives_all_ranks_the_roots_masks(backend):
    first, second = run_on_ranks(backend, 2, draw_masks_after_broadcasts)
    for drawn in (first, second):
        np.testing.assert_array_equal(drawn.same_seeds, first.own_seeds)
        np.testing.assert_array_equal(drawn.horovods_same_seeds, first.own_seeds)
    assert not np.array_equal(first.last_is_root, second.last_is_root)


@on_ranks(2)
def test_the_recipes_network_has_no_seeds():
    """Its dropout is a function of the example: nothing for ranks to draw."""
    dropping = dataclasses.replace(quick.RECIPE.model, dropout=0.5)
    network = resnet.build(dataclasses.replace(quick.RECIPE, model=dropping), 10)
    assert [v.path for v in seeds.states(network)] == []
