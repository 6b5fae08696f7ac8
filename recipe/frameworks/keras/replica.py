"""The recipe's replica in Keras 3: the network, its distributed optimizer and the recipe's callbacks."""

import contextlib
import math
from collections.abc import Callable, Iterator

import keras
import numpy as np

from recipe.config import Recipe
from recipe.frameworks.keras import compute, resnet
from recipe.frameworks.keras.step import Step, batch_statistics, inputs, moving_statistics, split
from recipe.frameworks.replica import groups
from recipe.keras import backend, state
from recipe.keras.callbacks import BroadcastState, ReplicaCheck, ScheduledRate, rate_of
from recipe.keras.distributed import DistributedOptimizer
from recipe.ranks import binding, collectives
from recipe.rules import sharding
from recipe.rules.schedule import recipe_rate


def start(deterministic: bool = False) -> None:
    """Horovod, and this rank's share of the machine: one GPU, or its part of the CPU's cores."""
    compute.use_local_device(*binding.start(backend.FRAMEWORK, deterministic), deterministic)


class KerasReplica:
    """`recipe.frameworks.replica.Replica` in Keras, on either backend."""

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self.recipe = recipe
        self.model = compiled(recipe, num_classes)
        if collectives.size() > 1:  # one rank has nothing to reduce, and needs no copies for it
            _distribute(recipe, self.model)
        workers = sharding.own_workers(recipe.k, collectives.rank(), collectives.size())
        self._step = Step(
            self.model, recipe.k, workers, recipe.run.workers_at_once, signature(recipe)
        )
        self._statistics = batch_statistics(self.model, recipe.model.bn_momentum, signature(recipe))

    def begin(self, steps: int) -> None:
        callbacks = [BroadcastState(), ScheduledRate(recipe_rate(self.recipe))]
        if every := self.recipe.run.replica_check_every:
            callbacks.append(ReplicaCheck(every, moving_statistics(self.model)))
        self._callbacks = keras.callbacks.CallbackList(callbacks, model=self.model, steps=steps)
        self._callbacks.on_train_begin()

    def step(
        self, epoch: int, step: int, elements: Iterator[tuple], stop: bool
    ) -> Callable[[], tuple]:
        self._callbacks.on_epoch_begin(epoch)
        self._callbacks.on_train_batch_begin(step)
        figures = self._step(elements, stop)
        self._callbacks.on_train_batch_end(step)
        return figures

    def end(self) -> None:
        self._callbacks.on_train_end()

    def rate(self) -> float:
        return rate_of(self.model.optimizer)

    def predict(self, images: object) -> np.ndarray:
        keys = [np.zeros(len(images), np.int64)] if self.recipe.model.dropout else []
        return self.model.predict_on_batch(inputs(*compute.on_device((images, *keys))))

    @contextlib.contextmanager
    def statistics_of(self, elements: Iterator[tuple]) -> Iterator[None]:
        moving = moving_statistics(self.model)
        kept = [keras.ops.convert_to_numpy(v) for v in moving]
        found = (
            keras.ops.convert_to_numpy(self._statistics(*compute.on_device(e))) for e in elements
        )
        mean = collectives.mean(found, sum(math.prod(v.shape) for v in moving), "precise_bn")
        for v, value in zip(moving, split(mean, moving), strict=True):
            v.assign(value)
        try:
            yield
        finally:
            for v, value in zip(moving, kept, strict=True):
                v.assign(value)

    def arrays(self) -> dict[str, np.ndarray]:
        return state.to_arrays(self.model)

    def weights(self) -> dict[str, np.ndarray]:
        return {v.path: keras.ops.convert_to_numpy(v) for v in self.model.trainable_variables}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        state.from_arrays(self.model, arrays)


def compiled(recipe: Recipe, num_classes: int) -> keras.Model:
    """The network with its optimizer, on this rank alone."""
    model = resnet.build(recipe, num_classes)
    model.compile(optimizer=_optimizer(recipe), jit_compile=False, auto_scale_loss=False)
    model.optimizer.build(model.trainable_variables)
    return model


def signature(recipe: Recipe) -> list[tuple[str, tuple]]:
    """Type and shape of images, labels, weights and perhaps keys in an element of the recipe's training input."""
    size = recipe.data.image_size
    batch = None if recipe.data.remainder == "short" else recipe.n * recipe.run.workers_at_once
    keys = [("int64", (batch,))] if recipe.model.dropout else []
    return [("uint8", (batch, size, size, 3)), ("int32", (batch,)), ("float32", (batch,)), *keys]


def _optimizer(recipe: Recipe) -> keras.optimizers.Optimizer:
    settings = recipe.optimizer
    # Names of its own: Keras would number them in a process that has others, and they are in the checkpoints' names.
    optimizer = keras.optimizers.SGD(
        settings.base_rate, settings.momentum, settings.nesterov, name="sgd"
    )
    if recipe.model.precision == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    return optimizer


def _distribute(recipe: Recipe, model: keras.Model) -> None:
    """Makes the model's optimizer reduce the gradients over the ranks."""
    parameters = sum(math.prod(v.shape) for v in model.trainable_variables)
    compression = getattr(backend.Compression, recipe.optimizer.compression)
    DistributedOptimizer(
        model.optimizer, compression=compression, groups=groups(recipe, parameters)
    )


make_replica = KerasReplica
