"""One step of one rank in Keras: forward and backward, one round of allreduces, one update."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from recipe.config import Recipe
from recipe.data.element import Element
from recipe.frameworks.keras import compute
from recipe.frameworks.keras.passes import Forward, zeros
from recipe.frameworks.vector import StepResult, StepVector
from recipe.keras import backend, names
from recipe.ranks import collectives
from recipe.rules.epoch import Share

# Type and shape of each part of an element, for the tracing of a function.
Signature = list[tuple[str, tuple[int | None, ...]]]

NUMBER = ("int32", ())


class Step:
    """The step of a rank.

    Gradients add up over its forward passes, and are reduced while the last one's backward pass is
    still running. Then the optimizer updates.

    A StepVector goes with the gradients. Its statistics are the moving ones after this step,
    averaged over all k workers, so that they are equal on all ranks at any time.
    """

    def __init__(
        self, model: keras.Model, recipe: Recipe, share: Share, signature: Signature
    ) -> None:
        """Take the model, whose optimizer must be built, and this rank's share of the k workers."""
        self.model, self.k, self.share = model, recipe.k, share
        self.moving = moving_statistics(model)
        self.layout = StepVector(_size(self.moving), self.k)
        self._vector_name: str | None = None  # of its allreduce

        # What all ranks' gradients are divided by: their passes, where every rank has as many.
        self._mean_passes = self.k / (collectives.size() * share.workers_at_once)
        self._input = compute.Input()
        self._gradients = compute.Gradients(recipe, model, share.passes)
        self._vector_sum = zeros((self.layout.length,))

        self._accumulate = backend.compiled(self._accumulate_pass, [NUMBER, *signature])
        self._finish = backend.compiled(self._finish_step, [NUMBER, NUMBER, *signature])

    def __call__(self, elements: Iterator[Element], stop: bool) -> Callable[[], StepResult]:
        """Draw this rank's elements and update. Collective.

        The function that comes back waits for the step and returns its result.
        """
        firsts = [np.int32(self.share.workers_of(i)[0]) for i in range(self.share.passes)]
        for first_worker in firsts[:-1]:
            self._accumulate(first_worker, *self._input.take(elements))
            self._input.look_ahead(elements)
        result = self._finish(firsts[-1], np.int32(stop), *self._input.take(elements))
        self._input.look_ahead(elements)
        return lambda: self.layout.read(ops.convert_to_numpy(result))

    def _accumulate_pass(self, first_worker: Any, *element: Any) -> None:
        """Add one pass to the sums."""
        vector = self._gradients.add(self._forward(first_worker, *element))
        self._vector_sum.assign(self._vector_sum + vector)

    def _finish_step(self, first_worker: Any, stop: Any, *element: Any) -> Any:
        """Run the last pass, reduce and update. Return the result part of the vector."""
        # The gradients begin to be reduced, then the vector, and the optimizer waits for them.
        last = self._gradients.last(self._forward(first_worker, *element))
        vector = last.vector
        if self.share.passes > 1:
            vector = self._vector_sum + vector
        vector = self._reduced(vector, stop)
        self.model.optimizer.apply(last.gradients(), self.model.trainable_variables)

        # All ranks have the same statistics from here on.
        for variable, mean in zip(self.moving, split(vector, self.moving), strict=False):
            variable.assign(mean)
        if self.share.passes > 1:
            self._vector_sum.assign(ops.zeros_like(self._vector_sum))
        return vector[self.layout.result]

    def _reduced(self, vector: Any, stop: Any) -> Any:
        """Return the sum of all ranks' vectors, with this rank's wish to stop in it."""
        self._vector_name = self._vector_name or names.give("workers")
        stop = ops.reshape(ops.cast(stop, "float32"), (1,))
        vector = ops.concatenate([vector[: self.layout.stop], stop])
        if collectives.size() == 1:
            return vector
        return backend.total(vector, self._vector_name)

    def _forward(
        self, first_worker: Any, images: Any, labels: Any, weights: Any, *keys: Any
    ) -> Callable[[], Forward]:
        """Return a function that runs one pass forward."""
        share_of_k = self.share.workers_at_once / self.k

        def forward() -> Forward:
            with keras.StatelessScope() as scope:
                logits = self.model(inputs(images, *keys), training=True)
            losses = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            predictions = ops.argmax(logits, axis=-1)
            hits = ops.cast(ops.equal(predictions, ops.cast(labels, "int32")), "float32")

            # The paper's remark 3: the mean is over all kn examples. Weight decay (remark 1) is the
            # optimizer's.
            mean = ops.mean(losses * weights) / self._mean_passes
            loss = self.model.optimizer.scale_loss(mean)

            moved = [ops.convert_to_tensor(scope.get_current_value(v)) for v in self.moving]
            parts = self.layout.parts(
                statistics=[ops.ravel(statistic) * share_of_k for statistic in moved],
                losses=self.sums_of_workers(first_worker, losses),
                hits=self.sums_of_workers(first_worker, hits),
                stop=ops.zeros(1),
            )
            return Forward(loss, ops.concatenate(parts))

        return forward

    def sums_of_workers(self, first_worker: Any, values: Any) -> Any:
        """Return float32[k]: the sums of each worker's values in a pass, at the workers' places."""
        together = self.share.workers_at_once
        sums = ops.sum(ops.reshape(values, (together, -1)), axis=1)
        places = ops.reshape(first_worker + ops.arange(together, dtype="int32"), (-1, 1))
        return ops.scatter(places, sums, (self.k,))


def inputs(images: Any, *keys: Any) -> Any:
    """Return what the network takes: images, and keys when it has dropout."""
    return [images, *keys] if keys else images


def moving_statistics(model: keras.Model) -> list[keras.Variable]:
    """Return the variables of the means and variances that batch normalisation has seen."""
    return [v for v in model.non_trainable_variables if keras.backend.is_float_dtype(v.dtype)]


def batch_statistics(
    model: keras.Model, momentum: float, signature: Signature
) -> Callable[..., Any]:
    """Return a function of an element that gives the statistics of this one batch, as one vector.

    They are in the order of `moving_statistics`: what these become from zero, divided by 1 −
    momentum.
    """
    moving = moving_statistics(model)

    def statistics(images: Any, labels: Any, weights: Any, *keys: Any) -> Any:
        with keras.StatelessScope([(v, ops.zeros(v.shape)) for v in moving]) as scope:
            model(inputs(images, *keys), training=True)
        moved = [ops.ravel(scope.get_current_value(v)) for v in moving]
        return ops.concatenate(moved) / (1 - momentum)

    return backend.compiled(statistics, signature)


def split(vector: Any, variables: Sequence[keras.Variable]) -> list[Any]:
    """Return the vector's pieces in the shapes of the variables that it begins with."""
    starts = itertools.accumulate((math.prod(v.shape) for v in variables), initial=0)
    return [
        ops.reshape(vector[start : start + math.prod(v.shape)], v.shape)
        for start, v in zip(starts, variables, strict=False)
    ]


def _size(variables: Sequence[keras.Variable]) -> int:
    return sum(math.prod(v.shape) for v in variables)
