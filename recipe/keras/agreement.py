"""What the ranks tell each other with every reduction of a `fit`: who has examples, who wants to stop, each one's η.

The word travels with the gradients, in the same round: a row a rank, summed over the ranks, each of which fills its
own. So all ranks know in the same step what one of them has decided.
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

ROW = 3  # has examples, wants to stop, η


def check_started() -> None:
    """Raises ValueError before Horovod's start: its own errors have internal names."""
    if not binding.started():
        raise ValueError("Horovod is not initialised; call recipe.keras.init() before fit()")


@dataclass(frozen=True)
class Heard:
    """The word of all ranks in one step, a place for each rank."""

    has_data: np.ndarray  # bool[size]
    stops: np.ndarray  # bool[size]
    rates: np.ndarray  # float32[size]; 0 where an optimizer has no single η

    def check_rates(self) -> None:
        """Raises RunError, on all ranks, when ranks with examples train with other learning rates."""
        rates = np.where(self.has_data, self.rates, np.nan)
        known = np.unique(rates[self.has_data])
        if len(known) > 1:
            other = int(np.flatnonzero(self.has_data & (self.rates != rates[self.has_data][0]))[0])
            first = int(np.flatnonzero(self.has_data)[0])
            raise RunError(
                f"the ranks' learning rates differ: {self.rates[first]:g} on rank {first}, {self.rates[other]:g} on "
                f"rank {other}; a callback set it by its own rank's numbers: put hvd.callbacks.MetricSums() before "
                "it, and give all ranks the same callbacks",
                everywhere=True,
            )


class Agreement:
    """This rank's part of the word, and what was heard last. Its variables are read and assigned in the traced step."""

    def __init__(self) -> None:
        self.size, self.rank = collectives.size(), collectives.rank()
        self.nothing = False  # this rank takes part without examples
        self._told = False
        # The calls of a step; None before the first.
        self.calls: weakref.WeakKeyDictionary[keras.Model, list[Call] | None] = (
            weakref.WeakKeyDictionary()
        )
        # The word of a rank is a vector of the ranks' rows, with zeros in those of the others.
        places = np.arange(self.size * ROW)
        self._own_rate = places == self.rank * ROW + 2
        self._has_data = np.float32(places % ROW == 0)
        self._mine = _variable(self._row(has_data=True, stop=False))
        self._heard = _variable(np.zeros(self.size * ROW))

    def begin(self) -> None:
        """Forgets what was said and heard, in another epoch or another `fit`."""
        self.say(nothing=False, stop=False)
        self._heard.assign(self._has_data)

    def say(self, *, nothing: bool, stop: bool) -> None:
        """What this rank says from its next reduction on."""
        self.nothing = nothing
        self._mine.assign(self._row(has_data=not nothing, stop=stop))

    def word(self, optimizer: keras.optimizers.Optimizer) -> Any:
        """Returns this rank's vector, float32[size · 3]: zeros but for its own row. None when it was told already."""
        if self._told:
            return None
        return ops.where(self._own_rate, _rate(optimizer), ops.convert_to_tensor(self._mine))

    def hear(self, summed: Any) -> Any:
        """Takes the sum of all ranks' words; None: it was heard already. Returns the share of ranks with examples."""
        if summed is not None:
            self._heard.assign(summed)
        return ops.sum(ops.multiply(ops.convert_to_tensor(self._heard), self._has_data)) / self.size

    def nobody(self) -> bool:
        """Whether this rank, which has no examples, has heard that no other has any."""
        return self.nothing and not self.heard().has_data.any()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Inside it an `apply` goes without the word, which has been told and heard."""
        self._told = True
        try:
            yield
        finally:
            self._told = False

    def heard(self) -> Heard:
        """The word of the last reduction."""
        rows = ops.convert_to_numpy(self._heard).reshape(self.size, ROW)
        return Heard(rows[:, 0] > 0, rows[:, 1] > 0, rows[:, 2].copy())

    def _row(self, has_data: bool, stop: bool) -> np.ndarray:
        vector = np.zeros((self.size, ROW), np.float32)
        vector[self.rank, :2] = has_data, stop
        return vector.reshape(-1)


def _rate(optimizer: keras.optimizers.Optimizer) -> Any:
    """η as the update will use it; 0 for an optimizer of several."""
    if hasattr(
        optimizer, "_inner_optimizers"
    ):  # a MultiOptimizer, whose learning_rate can't be read
        return ops.zeros((), "float32")
    return ops.cast(optimizer.learning_rate, "float32")


def _variable(value: np.ndarray) -> keras.Variable:
    return keras.Variable(value, dtype="float32", trainable=False)
