"""Notes what ranks have trained, and compares it with other ranks' and with one process's."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

import recipe.keras as hvd

Weights = list[np.ndarray]


def value(v: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(v).copy()


def values(variables: Iterable[Any]) -> Weights:
    return [value(v) for v in variables]


def assert_same(one: Sequence, other: Sequence, **bound: float) -> None:
    """Check that arrays are equal to the bit or, with rtol and atol, within this bound."""
    for a, b in zip(one, other, strict=True):
        if bound:
            np.testing.assert_allclose(a, b, **bound)
        else:
            np.testing.assert_array_equal(a, b)


def assert_same_on_all_ranks(own: Any) -> None:
    """Check that arrays or numbers, in lists or by name, are rank 0's to the bit. Collective."""
    first, *others = hvd.allgather_object(own)
    for other in others:
        np.testing.assert_equal(other, first)


class Rates(keras.callbacks.Callback):
    """Notes the learning rate of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.rates.append(float(value(self.model.optimizer.learning_rate)))
