"""Batches that pass by without a step: an epoch is resumed in its middle, on either backend."""

from collections.abc import Callable
from typing import Any

import keras


class _PassingBy:
    """A train function that takes batches and does no step. Then the model's own one comes back."""

    def __init__(
        self, model: keras.Model, executions: int, logs: Callable[[Any], dict[str, Any]]
    ) -> None:
        self.model = model
        self.own: Callable[[Any], dict[str, Any]] = model.train_function
        self.left = executions
        self.logs = logs

    def __call__(self, data: Any) -> dict[str, Any]:
        if not self.left:
            self.model.train_function = self.own
            return self.own(data)
        self.left -= 1
        return self.logs(_first_batch(data, self.model.steps_per_execution))


def pass_by(
    model: keras.Model, batches: int, logs: Callable[[Any], dict] = lambda batch: {}
) -> None:
    """Let the model's next `batches` batches pass by without a step.

    They are drawn from the data. Callbacks see their numbers, with the logs that `logs` returns for
    a batch. Then the model's own train function comes back.
    """
    model.train_function = _PassingBy(model, batches // model.steps_per_execution, logs)


def is_passing(model: keras.Model) -> bool:
    """Return whether the batch that is about to begin is no step."""
    return isinstance(model.train_function, _PassingBy) and model.train_function.left > 0


def stop_passing(model: keras.Model) -> None:
    """Give the model its own train function back, where a run was interrupted meanwhile."""
    if isinstance(model.train_function, _PassingBy):
        model.train_function = model.train_function.own


def _first_batch(data: Any, batches: int) -> Any:
    """Return the first of the batches that an execution takes.

    With PyTorch Keras draws them itself. With TensorFlow it hands over the iterator, which must go
    on.
    """
    if isinstance(data, list):
        return data[0]
    first, *_ = [next(data) for _ in range(batches)]
    return first
