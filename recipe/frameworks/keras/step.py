"""One step of one rank: forward and backward of each of its workers, one round of allreduces, one update."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from recipe.frameworks.keras import compute
from recipe.frameworks.replica import Figures, figures
from recipe.keras import backend, names
from recipe.ranks import collectives


class Step:
    """Gradients add up over this rank's workers, `together` of them in one forward pass, and are reduced while the last
    backward pass is still running; then the optimizer, a DistributedOptimizer, updates.

    With the gradients goes one vector: the moving statistics after this step, averaged over all k workers, so that
    they are equal on all ranks at any time; and the workers' losses, one place each, which so are the same numbers
    whatever the number of ranks."""

    def __init__(
        self, model: keras.Model, k: int, workers: range, together: int, signature: list
    ) -> None:
        """`workers`: the numbers of this rank's; `signature`: type and shape of each part of an element of the input.

        The optimizer must be built."""
        self.model, self.k, self.workers, self.together = model, k, workers, together
        self.calls = len(workers) // together
        self._share = k / (collectives.size() * together)  # `calls`, where all ranks have as many
        self.moving = moving_statistics(model)
        self._name: str | None = None  # of the vector's allreduce
        self._gradients = (
            [_zeros(v.shape) for v in model.trainable_variables] if self.calls > 1 else []
        )
        self._vector = _zeros(sum(math.prod(v.shape) for v in self.moving) + 2 * k + 1)
        number = ("int32", ())
        self._accumulate = backend.compiled(self._accumulated, [number, *signature])
        self._finish = backend.compiled(self._finished, [number, number, *signature])

    def __call__(self, elements: Iterator[tuple], stop: bool) -> Callable[[], Figures]:
        """Draws this rank's elements and updates. Collective.

        Returns a function that waits for the step and gives (the k workers' sums of cross-entropies, float32[k]; their
        numbers of hits, float32[k]; whether any rank passed `stop`)."""
        for call in range(self.calls):
            element = compute.on_device(next(elements))
            first = np.int32(self.workers[call * self.together])
            if call + 1 < self.calls:
                self._accumulate(first, *element)
        found = self._finish(first, np.int32(stop), *element)
        return lambda: figures(ops.convert_to_numpy(found), self.k)

    def _accumulated(self, first: Any, *element: Any) -> None:
        gradients, vector = self._backward(first, *element)
        for total, gradient in zip(self._gradients, gradients, strict=True):
            total.assign(total + gradient)
        self._vector.assign(self._vector + vector)

    def _finished(self, first: Any, stop: Any, *element: Any) -> Any:
        gradients, vector = self._backward(first, *element)
        if self.calls > 1:
            gradients = [t + g for t, g in zip(self._gradients, gradients, strict=True)]
            vector = self._vector + vector
        if self._share != 1:
            gradients = [g / self._share for g in gradients]
        self._name = self._name or names.give("workers")
        stop = ops.reshape(ops.cast(stop, "float32"), (1,))
        vector = ops.concatenate([vector[:-1], stop])
        if collectives.size() > 1:
            vector = backend.total(vector, self._name)
        self.model.optimizer.apply(gradients, self.model.trainable_variables)
        for v, mean in zip(self.moving, split(vector, self.moving), strict=False):
            v.assign(mean)
        for total in [*self._gradients, self._vector] if self.calls > 1 else []:
            total.assign(ops.zeros_like(total))
        return vector[-(2 * self.k + 1) :]

    def _backward(
        self, first: Any, images: Any, labels: Any, weights: Any, *keys: Any
    ) -> tuple[list, Any]:
        """(the gradients of the mean loss of `together` workers, their part of the vector)."""

        def forward() -> tuple:
            with keras.StatelessScope() as scope:
                logits = self.model(inputs(images, *keys), training=True)
            penalties = sum(self.model.losses)
            moved = [
                ops.ravel(ops.convert_to_tensor(scope.get_current_value(v))) for v in self.moving
            ]
            losses = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            hits = ops.cast(
                ops.equal(ops.argmax(logits, axis=-1), ops.cast(labels, "int32")), "float32"
            )
            # The paper's remarks 1 and 3: weight decay is part of the loss; the mean is over all kn examples.
            loss = self.model.optimizer.scale_loss(ops.mean(losses * weights) + penalties)
            share = self.together / self.k
            vector = (
                [m * share for m in moved]
                + [self._placed(first, v) for v in (losses, hits)]
                + [ops.zeros(1)]
            )
            return loss, ops.concatenate(vector)

        gradients, (vector,) = compute.gradients(forward, self.model.trainable_variables)
        return gradients, vector

    def _placed(self, first: Any, values: Any) -> Any:
        """float32[k]: the sums of each of `together` workers' values, at their places."""
        sums = ops.sum(ops.reshape(values, (self.together, -1)), axis=1)
        places = ops.reshape(first + ops.arange(self.together, dtype="int32"), (-1, 1))
        return ops.scatter(places, sums, (self.k,))


def inputs(images: Any, *keys: Any) -> Any:
    """What the network takes: images, and keys when it has dropout."""
    return [images, *keys] if keys else images


def moving_statistics(model: keras.Model) -> list[keras.Variable]:
    """The means and variances that batch normalisation has seen."""
    return [v for v in model.non_trainable_variables if keras.backend.is_float_dtype(v.dtype)]


def batch_statistics(model: keras.Model, momentum: float, signature: list) -> Callable:
    """A function of an element that gives the statistics of this one batch, in the order of `moving_statistics`, as one
    vector: what the moving ones become from zero, divided by 1 − momentum."""
    moving = moving_statistics(model)

    def statistics(images: Any, labels: Any, weights: Any, *keys: Any) -> Any:
        with keras.StatelessScope([(v, ops.zeros(v.shape)) for v in moving]) as scope:
            model(inputs(images, *keys), training=True)
        return ops.concatenate([ops.ravel(scope.get_current_value(v)) for v in moving]) / (
            1 - momentum
        )

    return backend.compiled(statistics, signature)


def split(vector: Any, variables: list) -> list:
    """A vector's pieces in the shapes of the variables that it begins with."""
    ends = np.cumsum([math.prod(v.shape) for v in variables]).tolist()
    starts = [0, *ends]
    return [
        ops.reshape(vector[a:b], v.shape) for a, b, v in zip(starts, ends, variables, strict=False)
    ]


def _zeros(shape: tuple | int) -> keras.Variable:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return keras.Variable(initializer="zeros", shape=shape, dtype="float32", trainable=False)
