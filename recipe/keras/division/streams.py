"""One rank's part of a tf.data.Dataset.

Every rank reads all elements and keeps its own. A dataset of unknown length is read once, to count
its elements.
"""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from recipe.keras.division.order import TOO_SMALL, Order
from recipe.ranks import collectives
from recipe.rules import sharding

Element = Any  # a structure of tensors


class _OwnSteps(NamedTuple):
    """A rank's part of an epoch."""

    steps: int
    batches: tf.data.Dataset


def divided_stream(data: tf.data.Dataset, batch_size: int | None, order: Order) -> tf.data.Dataset:
    """Divide the elements of a dataset: examples with `batch_size`, batches without. Collective.

    Raise ValueError for a dataset that has no end, is shuffled or has no batches.
    """
    # Refuse what can't be divided, and read it in one order.
    if data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "the tf.data.Dataset has no end; divide it before repeat(), which fit() doesn't need"
        )
    _check_unshuffled(data)
    options = tf.data.Options()
    options.deterministic = True  # an order of each rank's own would use examples twice
    data = data.with_options(options)

    # All ranks must have the same elements.
    count = int(data.cardinality())
    if count == tf.data.UNKNOWN_CARDINALITY:
        count = int(data.reduce(np.int64(0), lambda n, *_: n + 1))
    order.check("elements of the tf.data.Dataset", count, batch_size)

    # Number them in the order of the epoch, and keep this rank's.
    if batch_size is not None:
        numbered = _ordered(data, count, order).enumerate()
        own = _own_examples(numbered, count, batch_size)
    else:
        _check_batched(data)
        ordered = _ordered(data.enumerate(), count, order)
        if order.shuffle:
            ordered = _last_stays_last(ordered, count)
        own = _own_batches(ordered.map(lambda _, batch: batch).enumerate(), count)
    batches = own.batches.prefetch(tf.data.AUTOTUNE)
    if order.shuffle:
        batches = _ending_epochs(batches, own.steps, order)
    return batches.apply(tf.data.experimental.assert_cardinality(own.steps))


def _ordered(data: tf.data.Dataset, count: int, order: Order) -> tf.data.Dataset:
    """Return the dataset in the order of the epoch in which its first element is drawn."""
    if not order.shuffle:
        return data
    buffer = count if order.shuffle is True else order.shuffle

    def shuffled(epoch: tf.Tensor) -> tf.data.Dataset:
        # The seed of this function's graph: tf.random.set_seed() may be a rank's own.
        tf.compat.v1.set_random_seed(1 + order.seed)
        return data.shuffle(buffer, seed=epoch + 1, reshuffle_each_iteration=False)

    epochs = tf.data.Dataset.from_generator(
        lambda: [order.epoch], output_signature=tf.TensorSpec((), tf.int64)
    )
    return epochs.flat_map(shuffled)


def _last_stays_last(numbered: tf.data.Dataset, count: int) -> tf.data.Dataset:
    """Hold the batch with the last number, which may be a short one, back until the others came.

    It waits in a window of two, which is given out when no more come.
    """

    def is_last(number: tf.Tensor, _: Element) -> tf.Tensor:
        return number // (count - 1) if count > 1 else number

    return numbered.group_by_window(
        key_func=is_last,
        reduce_func=lambda _, window: window,
        window_size_func=lambda last: last + 1,
    )


def _own_examples(numbered: tf.data.Dataset, count: int, batch_size: int) -> _OwnSteps:
    """Return this rank's batches of examples that are numbered in the epoch's order."""
    # Where each step's part of this rank begins and ends, in the epoch's order.
    rank, size = collectives.rank(), collectives.size()
    cuts = sharding.cuts(count, batch_size * size, size)
    begins, ends = (tf.constant(bounds) for bounds in sharding.parts(cuts, rank, size))
    largest = int(tf.reduce_max(ends - begins))

    # What group_by_window asks of an example: its step, and whether it is this rank's.
    def step_of(place: tf.Tensor, _: Element = None) -> tf.Tensor:
        return tf.searchsorted(cuts, [place], side="right", out_type=tf.int64)[0] - 1

    def is_own(place: tf.Tensor, _: Element) -> tf.Tensor:
        step = step_of(place)
        return (begins[step] <= place) & (place < ends[step])

    def batch(step: tf.Tensor, window: tf.data.Dataset) -> tf.data.Dataset:
        return window.map(lambda _, example: example).batch(largest)

    # One batch a step, as large as this rank's part of it.
    batches = numbered.filter(is_own).group_by_window(
        key_func=step_of,
        reduce_func=batch,
        window_size_func=lambda step: ends[step] - begins[step],
    )
    return _OwnSteps(len(cuts) - 1, batches)


def _own_batches(numbered: tf.data.Dataset, count: int) -> _OwnSteps:
    """Return this rank's batches, of batches that are numbered in the epoch's order."""
    rank, size = collectives.rank(), collectives.size()
    rounds, left = divmod(count, size)
    if not left:
        own = numbered.filter(lambda place, _: place % size == rank)
        return _OwnSteps(rounds, own.map(lambda _, batch: batch))
    return _OwnSteps(rounds + 1, _Rounds(rounds, left, rank, size).divide(numbered))


class _Rounds:
    """Rounds of `size` batches, one for each rank, and fewer than that left over.

    A rank's batch of the last round and its share of what is left over make two smaller steps.
    """

    def __init__(self, rounds: int, left: int, rank: int, size: int) -> None:
        self.rounds = rounds
        self.rank = rank
        self.size = size
        self.last = (rounds - 1) * size  # the place where the last round begins

        # What each place from there on gives this rank: from a/size to b/size of the batch.
        bounds = np.zeros((size + left, 2), np.int32)
        bounds[rank] = 0, size
        for j, a, b in sharding.shares(left, rank, size):
            bounds[size + j] = a, b
        self.bounds = tf.constant(bounds)
        self.parts = int((bounds[:, 0] < bounds[:, 1]).sum())  # how many of them give something

    def divide(self, numbered: tf.data.Dataset) -> tf.data.Dataset:
        """Return this rank's batches."""
        return numbered.filter(self._is_own).group_by_window(
            key_func=self._round_of, reduce_func=self._steps_of, window_size_func=self._window_size
        )

    def _is_own(self, place: tf.Tensor, _: Element) -> tf.Tensor:
        a, b = tf.unstack(self.bounds[tf.maximum(place - self.last, 0)])
        return tf.where(place < self.last, place % self.size == self.rank, a < b)

    def _round_of(self, place: tf.Tensor, _: Element) -> tf.Tensor:
        return tf.minimum(place // self.size, self.rounds - 1)

    def _window_size(self, number: tf.Tensor) -> tf.Tensor:
        return tf.where(number < self.rounds - 1, np.int64(1), np.int64(self.parts))

    def _steps_of(self, number: tf.Tensor, window: tf.data.Dataset) -> tf.data.Dataset:
        """Return a round's batch, or two halves of the last round's and what is left over."""
        window = window.map(self._own_part)
        first = window.take(1).get_single_element()
        joined = window.skip(1).reduce(first, _concatenated)
        n = tf.shape(tf.nest.flatten(joined)[0], out_type=tf.int64)[0]
        pieces = tf.where(number < self.rounds - 1, np.int64(1), np.int64(2))
        tf.debugging.Assert(n >= pieces, [TOO_SMALL])

        def piece(i: tf.Tensor) -> Element:
            return _cut(joined, i * n // pieces, (i + 1) * n // pieces)

        return tf.data.Dataset.range(pieces).map(piece)

    def _own_part(self, place: tf.Tensor, batch: Element) -> Element:
        whole = tf.constant([0, self.size])
        bounds = self.bounds[tf.maximum(place - self.last, 0)]
        a, b = tf.unstack(tf.where(place < self.last, whole, bounds))
        n = tf.shape(tf.nest.flatten(batch)[0])[0]
        return _cut(batch, a * n // self.size, b * n // self.size)


def _cut(batch: Element, begin: tf.Tensor, end: tf.Tensor) -> Element:
    return tf.nest.map_structure(lambda array: array[begin:end], batch)


def _concatenated(first: Element, second: Element) -> Element:
    return tf.nest.map_structure(lambda *arrays: tf.concat(arrays, 0), first, second)


def _ending_epochs(batches: tf.data.Dataset, steps: int, order: Order) -> tf.data.Dataset:
    """Return the batches, of which the last ends the epoch."""

    def end_epoch() -> np.int64:
        order.next()
        return np.int64(0)

    def end_with_last(step: tf.Tensor, batch: Element) -> Element:
        if step == steps - 1:  # an epoch that was left before its last step does not count
            tf.numpy_function(end_epoch, [], tf.int64)
        return batch

    return batches.enumerate().map(end_with_last)


def _check_unshuffled(data: tf.data.Dataset) -> None:
    """Raise ValueError when the dataset, or one that it is made from, is shuffled."""
    if type(data).__name__ == "_ShuffleDataset":
        raise ValueError(
            "the tf.data.Dataset is shuffled, differently on each rank; leave shuffle() to divide()"
        )
    for source in data._inputs():
        _check_unshuffled(source)


def _check_batched(data: tf.data.Dataset) -> None:
    """Raise ValueError when the elements have no axis of examples."""
    if any(spec.shape.rank == 0 for spec in tf.nest.flatten(data.element_spec)):
        raise ValueError("the tf.data.Dataset's elements are no batches; pass batch_size")
