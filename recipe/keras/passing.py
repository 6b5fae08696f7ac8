"""Batches that pass by without a step: so an epoch is taken up in its middle, on either backend."""

from collections.abc import Callable
from typing import Any

import keras


def pass_by(
    model: keras.Model, batches: int, logs: Callable[[Any], dict] = lambda batch: {}
) -> None:
    """Makes the model's next `batches` batches no steps; then its own train function comes back.

    They are drawn from the data, and callbacks see their numbers, with the logs that `logs` gives for a batch."""
    real = model.train_function

    def train_function(data: Any) -> dict:
        if not train_function.left:
            model.train_function = real
            return real(data)
        train_function.left -= 1
        return logs(_drawn(data, model.steps_per_execution))

    train_function.real, train_function.left = real, batches // model.steps_per_execution
    model.train_function = train_function


def is_passing(model: keras.Model) -> bool:
    """Whether the batch that is about to begin is no step."""
    return getattr(model.train_function, "left", 0) > 0


def stop_passing(model: keras.Model) -> None:
    """Gives the model its own train function back, where a run was interrupted while batches passed by."""
    model.train_function = getattr(model.train_function, "real", model.train_function)


def _drawn(data: Any, batches: int) -> Any:
    """The first of the batches that an execution takes. Keras draws them itself with PyTorch; with TensorFlow it hands
    over the iterator, which must go on."""
    if isinstance(data, list):
        return data[0]
    first, *_ = [next(data) for _ in range(batches)]
    return first
