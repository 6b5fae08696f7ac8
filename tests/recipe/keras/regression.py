"""A small regression, of which each rank trains on batches of its own."""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import recipe.keras as hvd
from recipe.keras.callbacks import BroadcastState

BATCH = 16


def data(batches: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batches * BATCH, 4)).astype(np.float32)


def target(x: np.ndarray) -> np.ndarray:
    return x.sum(1, keepdims=True)


def minibatches(counts: Sequence[int]) -> list[np.ndarray]:
    """Return what one process would train on: each step's batches of the ranks that have one.

    Rank r has counts[r] batches, of the seed r.
    """
    of_ranks = [np.split(data(count, rank), count) for rank, count in enumerate(counts)]
    of_steps = itertools.zip_longest(*of_ranks)
    return [np.concatenate([b for b in step if b is not None]) for step in of_steps]


def network(*layers: keras.layers.Layer) -> keras.Model:
    """Make other weights on each rank. Rank 0's are those of the seed 100."""
    keras.utils.set_random_seed(100 + hvd.rank())
    return keras.Sequential(
        [keras.Input((4,)), *layers, keras.layers.Dense(3), keras.layers.Dense(1)]
    )


def momentum() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.02, momentum=0.9)


def compiled(
    model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None, **options: Any
) -> keras.Model:
    options = {"jit_compile": False} | options
    model.compile(hvd.DistributedOptimizer(optimizer or momentum()), "mse", **options)
    return model


def fit(
    *callbacks: keras.callbacks.Callback,
    model: keras.Model | None = None,
    epochs: int = 3,
    batches: int = 4,
    **options: Any,
) -> keras.callbacks.History:
    """Train on this rank's batches, from rank 0's weights on."""
    x = data(batches, 10 + hvd.rank())
    model = model or compiled(network())
    return model.fit(
        x,
        target(x),
        batch_size=BATCH,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=[BroadcastState(), *callbacks],
        **options,
    )


class Steps(keras.callbacks.Callback):
    """Notes the (epoch, batch) that callbacks see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.seen.append((self.epoch, batch))
