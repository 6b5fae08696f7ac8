"""Run on real ranks by test_division.py.

Which examples each rank trained on, and which masks it drew.
"""

import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import torch

import recipe.keras as hvd
from recipe.configs import quick
from recipe.frameworks.keras import resnet
from recipe.keras import seeds, state
from recipe.keras.callbacks import BroadcastGlobalVariablesCallback, BroadcastState, ReplicaCheck
from tests.ranks import report

COUNT = 43
MINIBATCH = 8
X = np.arange(COUNT, dtype=np.float32)[:, None]
Y = -X


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


def recorder() -> Recorder:
    inputs = keras.Input((1,))
    model = Recorder(inputs, keras.layers.Dense(1)(inputs))
    model.seen = []
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1e-6))
    model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=True, jit_compile=False)
    return model


def kinds() -> dict[str, Callable]:
    """Data of each kind, divided anew with the given options."""
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


def trained(data: Any, first: int = 0, epochs: int = 3, **options: Any) -> list:
    """[epoch][step] → this rank's examples."""
    tf.random.set_seed(100 + hvd.rank())  # ranks that draw as they like
    model = recorder()
    options = {"shuffle": False, "verbose": 0} | options
    model.fit(
        data, initial_epoch=first, epochs=epochs, callbacks=[BroadcastState(), Epochs()], **options
    )
    return [
        [list(step) for step in epoch]  # Keras made lists of its own of these
        for epoch in model.seen
    ]


def division() -> dict:
    """Three epochs; again from the second on; in the data's own order."""
    outcomes = {}
    for kind, make in kinds().items():
        evaluated = recorder().evaluate(make(shuffle=False), verbose=0)
        outcomes[kind] = {
            "seen": trained(make(seed=5)),
            "resumed": trained(make(seed=5, first_epoch=1), first=1),
            "in order": trained(make(shuffle=False), epochs=1),
            "evaluated": len(evaluated),
        }
    return outcomes


def halves_of_an_epoch() -> dict:
    """Keras's epochs of three steps, of which the data have six."""
    return {"seen": trained(kinds()["arrays"](), epochs=4, steps_per_epoch=3)}


def hooks() -> dict:
    """What of the user's own PyDataset and DataLoader is kept."""
    own = Batches(workers=3, use_multiprocessing=True, max_queue_size=7)
    divided = hvd.divide(own)
    divided.on_epoch_end()
    parallel = (divided.workers, divided.use_multiprocessing, divided.max_queue_size)

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
    lost = [name for name, value in settings.items() if getattr(loader, name) != value]
    return {"PyDataset": (*parallel, own.shift), "loader": lost}


def refused(action: Callable) -> str:
    """The sentence of the error that `action` must raise.

    TensorFlow makes its own of one in the data.
    """
    try:
        action()
    except (ValueError, tf.errors.OpError) as error:
        return str(error)
    return "nothing"


def refusals() -> dict:
    """What can't be divided; the key is what the sentence must name."""
    random.seed(7)  # so that all ranks fail in the same step: here they live on
    data = torch.utils.data
    examples = tf.data.Dataset.from_tensor_slices((X, Y))
    single_examples = tf.data.Dataset.from_tensor_slices(X[:3]).batch(1)
    weighted = data.DataLoader(Pairs(), sampler=data.WeightedRandomSampler(np.ones(COUNT), COUNT))

    class Endless(data.IterableDataset):
        def __iter__(self) -> Iterator:
            return iter(X)

    return {
        "shuffle=False": refused(lambda: trained(hvd.divide((X, Y), 1), shuffle=True)),
        "generator can't be divided": refused(lambda: hvd.divide(x for x in X)),
        "list of numbers: int": refused(lambda: hvd.divide([1, 2, 3])),
        "common number": refused(lambda: hvd.divide((X, Y[:-1]))),
        "too few": refused(lambda: hvd.divide(X[: hvd.size() - 1])),
        "pass the same": refused(lambda: hvd.divide(X[: COUNT - hvd.rank()])),
        "seed=-1": refused(lambda: hvd.divide(X, seed=-1)),
        "batch_size=0": refused(lambda: hvd.divide(X, 0)),
        "shuffled": refused(lambda: hvd.divide(examples.shuffle(9).batch(4))),
        "repeat": refused(lambda: hvd.divide(examples.repeat(), 4)),
        "pass batch_size": refused(lambda: hvd.divide(tf.data.Dataset.range(9))),
        "batch_size=4: a PyDataset": refused(lambda: hvd.divide(Batches(), 4)),
        "IterableDataset": refused(lambda: hvd.divide(data.DataLoader(Endless()))),
        "WeightedRandomSampler": refused(lambda: hvd.divide(weighted)),
        "one example": refused(lambda: list(hvd.divide(single_examples))),
    }


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
    """What the random layers do to ones, several times."""
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


def randomness() -> dict:
    """Masks of an uninterrupted run, and of the ways to repeat it and to go on from it."""
    # An uninterrupted run.
    model = begun(BroadcastState(), random_network())
    states = seed_values(model)
    first = masks(model, 3)
    saved = state.to_arrays(model)
    going_on = masks(model, 2)

    # One that rank 0 resumes from its checkpoint.
    resumed = random_network()
    if hvd.rank() == 0:
        state.from_arrays(resumed, saved)
    begun(BroadcastState(), resumed)

    # Replicas stay equal, although the masks differ.
    checked = begun(BroadcastState(), random_network())
    x, y = np.ones((4, 4, 4, 1), np.float32), np.ones((4, 1), np.float32)
    targets = [np.zeros((4, 4, 4, 5), np.float32), y]
    checked.fit(x, targets, verbose=0, callbacks=[ReplicaCheck(every=1)])

    # Other ways to broadcast.
    twice = begun(BroadcastState(), begun(BroadcastState(), random_network()))
    elastic = random_network()
    hvd.elastic.KerasState(elastic).sync()

    # The recipe's network with dropout.
    dropping = dataclasses.replace(quick.RECIPE.model, dropout=0.5)
    recipe_network = resnet.build(dataclasses.replace(quick.RECIPE, model=dropping), 10)
    return {
        "states": states,
        "first": first,
        "second": masks_after(BroadcastState()),
        "going on": going_on,
        "resumed": masks(resumed, 2),
        "again": masks(twice, 3),
        "same": masks_after(BroadcastState(same_seeds=True)),
        "same, Horovod's": masks_after(BroadcastGlobalVariablesCallback(0, same_seeds=True)),
        "last is root": masks_after(BroadcastState(hvd.size() - 1)),
        "elastic": masks(elastic, 3),
        "recipe's": [v.path for v in seeds.states(recipe_network)],
        "unbroadcast": seed_values(random_network()),
        "in the checkpoint": sum("seed_generator" in name for name in saved),
    }


def main() -> None:
    hvd.init()
    report(hvd.rank(), {name: globals()[name]() for name in sys.argv[1:]})


if __name__ == "__main__":
    main()
