"""What ranks tell each other with every reduction of a `fit`: data or none, a wish to stop, η.

A rank's word travels with the gradients, in the same round. It is a vector with a row for each
rank, of which a rank fills its own. The sum over the ranks holds all rows, so that all ranks know
in the same step what one of them has decided.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from recipe.errors import RunError
from recipe.keras.recording import Call
from recipe.ranks import binding, collectives

ROW = 3  # numbers of a row: has examples, wants to stop, η

Tensor = Any  # of Keras's backend


def check_started() -> None:
    """Raise ValueError before Horovod's start, since Horovod's own errors have internal names."""
    if not binding.started():
        raise ValueError("Horovod is not initialised; call recipe.keras.init() before fit()")


@dataclass(frozen=True)
class Words:
    """The words of all ranks in one step. Each array has a place for each rank."""

    has_data: np.ndarray  # bool[size]
    stops: np.ndarray  # bool[size]
    rates: np.ndarray  # float32[size]; 0 where an optimizer has no single η

    def ranks_without_data(self) -> list[int]:
        """Return the ranks that took part in the step without examples."""
        return np.flatnonzero(~self.has_data).tolist()

    def check_rates(self) -> None:
        """Raise RunError, on all ranks, when those with examples have different learning rates."""
        ranks = np.flatnonzero(self.has_data)
        rates = self.rates[ranks]
        if len(np.unique(rates)) <= 1:
            return
        first = ranks[0]
        other = ranks[rates != rates[0]][0]
        raise RunError(
            f"the ranks' learning rates differ: {self.rates[first]:g} on rank {first}, "
            f"{self.rates[other]:g} on rank {other}; a callback set it by its own rank's numbers: "
            "put hvd.callbacks.MetricSums() before it, and give all ranks the same callbacks",
            everywhere=True,
        )


class Agreement:
    """The word of one rank, and the last words of all. A traced step reads and assigns them."""

    def __init__(self) -> None:
        self.size = collectives.size()
        self.rank = collectives.rank()
        self.nothing = False  # this rank takes part without examples
        # The calls of a model's training step; None before the first step.
        self.calls: weakref.WeakKeyDictionary[keras.Model, list[Call] | None] = (
            weakref.WeakKeyDictionary()
        )
        self._is_exchanged = False  # the word of this step has travelled already

        # Masks over the vector of all rows: this rank's η, and every rank's "has examples".
        places = np.arange(self.size * ROW)
        self._own_rate = places == self.rank * ROW + 2
        self._has_data = np.float32(places % ROW == 0)

        self._own_word = _variable(self._word_of(has_data=True, stop=False))
        self._all_words = _variable(np.zeros(self.size * ROW))

    def begin(self) -> None:
        """Forget all words, for another epoch or another `fit`."""
        self.say(nothing=False, stop=False)
        self._all_words.assign(self._has_data)

    def say(self, *, nothing: bool, stop: bool) -> None:
        """Set what this rank says from its next reduction on."""
        self.nothing = nothing
        self._own_word.assign(self._word_of(has_data=not nothing, stop=stop))

    def word(self, optimizer: keras.optimizers.Optimizer) -> Tensor | None:
        """Return this rank's word, float32[size · 3], zero outside its row. None inside `told`."""
        if self._is_exchanged:
            return None
        return ops.where(self._own_rate, _rate(optimizer), ops.convert_to_tensor(self._own_word))

    def hear(self, summed: Tensor | None) -> Tensor:
        """Keep the sum of all ranks' words and return the share of ranks with examples.

        With None the share is that of the words that came last.
        """
        if summed is not None:
            self._all_words.assign(summed)
        words = ops.convert_to_tensor(self._all_words)
        return ops.sum(ops.multiply(words, self._has_data)) / self.size

    def nobody(self) -> bool:
        """Return whether this rank has no examples and has learned that no other rank has any."""
        return self.nothing and not self.words().has_data.any()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Make every `apply` in this context go without the word, which has travelled already."""
        self._is_exchanged = True
        try:
            yield
        finally:
            self._is_exchanged = False

    def words(self) -> Words:
        """Return the words of the last reduction."""
        rows = ops.convert_to_numpy(self._all_words).reshape(self.size, ROW)
        return Words(has_data=rows[:, 0] > 0, stops=rows[:, 1] > 0, rates=rows[:, 2].copy())

    def _word_of(self, has_data: bool, stop: bool) -> np.ndarray:
        rows = np.zeros((self.size, ROW), np.float32)
        rows[self.rank, :2] = has_data, stop
        return rows.reshape(-1)


def _rate(optimizer: keras.optimizers.Optimizer) -> Tensor:
    """Return η as the update will use it; 0 for an optimizer that has several."""
    if hasattr(optimizer, "_inner_optimizers"):  # a MultiOptimizer: its rate can't be read
        return ops.zeros((), "float32")
    return ops.cast(optimizer.learning_rate, "float32")


def _variable(value: np.ndarray) -> keras.Variable:
    return keras.Variable(value, dtype="float32", trainable=False)
