"""What the passes of a step in Keras give, in either backend."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras


class Forward(NamedTuple):
    """What a forward pass gives."""

    loss: Any  # of which the gradients are wanted
    vector: Any  # the pass's part of the StepVector


class LastPass(NamedTuple):
    """What the last backward pass of a step gives."""

    vector: Any
    gradients: Callable[[], list[Any]]  # waits for the sums of all passes, in variables' order


def zeros(shape: Sequence[int]) -> keras.Variable:
    """Return a variable of float32 zeros for sums over passes."""
    return keras.Variable(initializer="zeros", shape=tuple(shape), dtype="float32", trainable=False)
