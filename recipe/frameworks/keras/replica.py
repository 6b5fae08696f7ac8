"""The recipe's replica in Keras 3: network, distributed optimizer and the recipe's callbacks."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from recipe.config import Recipe
from recipe.data.element import Element
from recipe.frameworks.keras import compute, resnet
from recipe.frameworks.keras.sgd import DecayedSGD
from recipe.frameworks.keras.step import (
    Signature,
    Step,
    batch_statistics,
    inputs,
    moving_statistics,
    split,
)
from recipe.frameworks.replica import Replica, first_loss_scale
from recipe.frameworks.vector import StepResult
from recipe.keras import backend, state
from recipe.keras.callbacks import BroadcastState, ReplicaCheck, ScheduledRate, rate_of
from recipe.ranks import binding, collectives
from recipe.rules.epoch import Share
from recipe.rules.schedule import recipe_rate
from recipe.system.arrays import Arrays


def start(deterministic: bool = False) -> None:
    """Start Horovod, and take this rank's share of its host: one GPU, or some CPU cores."""
    host_share = binding.start(backend.FRAMEWORK, deterministic)
    compute.use_local_device(host_share.local_rank, host_share.threads, deterministic)


def make_replica(recipe: Recipe, num_classes: int) -> Replica:
    """Return this rank's replica, with its initial weights."""
    return KerasReplica(recipe, num_classes)


class KerasReplica:
    """`recipe.frameworks.replica.Replica` in Keras, on either backend."""

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self.recipe = recipe
        self.model = compiled(recipe, num_classes)
        share = Share.of(recipe, collectives.rank(), collectives.size())
        self._step = Step(self.model, recipe, share, signature(recipe))
        self._statistics = batch_statistics(self.model, recipe.model.bn_momentum, signature(recipe))

    def begin(self, steps: int) -> None:
        callbacks = [BroadcastState(), ScheduledRate(recipe_rate(self.recipe))]
        if every := self.recipe.run.replica_check_every:
            callbacks.append(ReplicaCheck(every, moving_statistics(self.model)))
        self._callbacks = keras.callbacks.CallbackList(callbacks, model=self.model, steps=steps)
        self._callbacks.on_train_begin()

    def begin_epoch(self, epoch: int) -> None:
        self._callbacks.on_epoch_begin(epoch)

    def step(self, step: int, elements: Iterator[Element], stop: bool) -> Callable[[], StepResult]:
        self._callbacks.on_train_batch_begin(step)
        result = self._step(elements, stop)
        self._callbacks.on_train_batch_end(step)
        return result

    def end(self) -> None:
        self._callbacks.on_train_end()

    def rate(self) -> float:
        return rate_of(self.model.optimizer)

    def predict(self, images: np.ndarray) -> np.ndarray:
        keys = [np.zeros(len(images), np.int64)] if self.recipe.model.dropout else []
        return self.model.predict_on_batch(inputs(*compute.on_device((images, *keys))))

    @contextlib.contextmanager
    def statistics_of(self, elements: Iterator[Element]) -> Iterator[None]:
        moving = moving_statistics(self.model)
        own_values = [keras.ops.convert_to_numpy(v) for v in moving]
        vectors = (
            keras.ops.convert_to_numpy(self._statistics(*compute.on_device(element)))
            for element in elements
        )
        length = sum(math.prod(v.shape) for v in moving)
        mean = collectives.mean(vectors, length, "precise_bn")
        _assign(moving, split(mean, moving))
        try:
            yield
        finally:
            _assign(moving, own_values)

    def arrays(self) -> Arrays:
        return state.to_arrays(self.model)

    def weights(self) -> Arrays:
        return {v.path: keras.ops.convert_to_numpy(v) for v in self.model.trainable_variables}

    def restore(self, arrays: Arrays) -> None:
        state.from_arrays(self.model, arrays)


def compiled(recipe: Recipe, num_classes: int) -> keras.Model:
    """Return the network with its optimizer, on this rank alone."""
    model = resnet.build(recipe, num_classes)
    model.compile(optimizer=_optimizer(recipe), jit_compile=False, auto_scale_loss=False)
    model.optimizer.build(model.trainable_variables)
    return model


def signature(recipe: Recipe) -> Signature:
    """Return type and shape of each part of an element of the recipe's training input."""
    size = recipe.data.image_size
    batch = None if recipe.data.remainder == "short" else recipe.n * recipe.run.workers_at_once
    images, labels, weights = (
        ("uint8", (batch, size, size, 3)),
        ("int32", (batch,)),
        ("float32", (batch,)),
    )
    keys = [("int64", (batch,))] if recipe.model.dropout else []
    return [images, labels, weights, *keys]


def _optimizer(recipe: Recipe) -> keras.optimizers.Optimizer:
    settings = recipe.optimizer
    # Keras would number the optimizers of a process, and the names are in the checkpoints.
    optimizer = DecayedSGD(
        settings.base_rate,
        settings.momentum,
        settings.nesterov,
        decay=settings.weight_decay,
        name="sgd",
    )
    scale = first_loss_scale(recipe)
    if scale is None:
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer, scale, name="loss_scale_optimizer")


def _assign(variables: list[keras.Variable], values: list[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
