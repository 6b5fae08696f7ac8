"""The states of a model's metrics: read, assigned, and added up over ranks where they are sums."""

import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import keras
import numpy as np

from recipe.ranks import collectives

Number = float | np.ndarray  # what Keras logs: a number, or one for each class
Shapes = list[tuple[int, ...]]

_RESETTING = ("__init__", "reset_state", "reset_states")  # methods that may assign


class Weight(NamedTuple):
    """How much a rank's numbers weigh in a mean, by the first of these that any rank has."""

    examples: float  # that the model's loss has counted
    counted: float  # by another mean of the model's: examples, or batches
    batches: float


@dataclass(frozen=True)
class Captured:
    """A rank's metrics after an epoch's training or an evaluation, before they are reset."""

    results: dict[str, Number]  # by the names that Keras logs
    summable: frozenset[str]  # names among them whose metric's state can be summed
    state: list[np.ndarray]  # of the metrics whose state can be summed
    weight: Weight

    @property
    def shapes(self) -> Shapes:
        """The shapes of the state's arrays."""
        return [array.shape for array in self.state]

    def has_logged(self, number: Number, metric: str) -> bool:
        """Return whether `number` is the result of this metric, and its state can be summed."""
        result = self.results.get(metric)
        return metric in self.summable and result is not None and same(number, result)


def capture(model: keras.Model, batches: int) -> Captured:
    """Return the model's metrics as they are after so many batches."""
    # The results that Keras would log.
    metrics = _single_metrics(model)
    results = results_of(model)

    # Keras may put the name of an output before that of a metric.
    no_sums = [m.name for m in metrics if not _is_sum(m.__class__)]
    endings = tuple(f"_{name}" for name in no_sums)
    summable = frozenset(n for n in results if n not in no_sums and not n.endswith(endings))

    # How much the rank's numbers weigh.
    counts = [(m.name, _count(m)) for m in metrics if isinstance(m, keras.metrics.Mean)]
    examples = [count for name, count in counts if name == "loss"]
    weight = Weight(
        examples=examples[0] if examples else 0.0,
        counted=counts[0][1] if counts else 0.0,
        batches=float(batches),
    )
    return Captured(results, summable, state_of(model), weight)


def results_of(model: keras.Model) -> dict[str, Number]:
    """Return what Keras would log of the metrics now."""
    results = model.get_metrics_result().items()
    return {name: as_number(keras.ops.convert_to_numpy(value)) for name, value in results}


def state_of(model: keras.Model) -> list[np.ndarray]:
    """Return copies of the variables of the metrics whose state is a sum."""
    return [np.array(keras.ops.convert_to_numpy(v)) for v in _summable_variables(model)]


def shapes_of(model: keras.Model) -> Shapes:
    """Return the shapes of the variables that `state_of` copies."""
    return [v.shape for v in _summable_variables(model)]


def assign_state(model: keras.Model, state: list[np.ndarray]) -> None:
    """Give the metrics whose state is a sum the values that `state_of` or `summed` has returned."""
    for v, value in zip(_summable_variables(model), state, strict=True):
        v.assign(value.reshape(v.shape))


def summed(state: list[np.ndarray]) -> list[np.ndarray]:
    """Return the sums of all ranks' states, float64, which have the same shapes. Collective."""
    flat = [np.ravel(array).astype(np.float64) for array in state]
    never_empty = [np.zeros(1), *flat]
    total = collectives.total(np.concatenate(never_empty), "metrics")[1:]

    sums = []
    start = 0
    for array in state:
        end = start + array.size
        sums.append(total[start:end].reshape(array.shape))
        start = end
    return sums


def as_number(value: Any) -> Number:
    """Return an array, or a float where it has no dimension."""
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array


def same(one: Number, other: Number) -> bool:
    """Return whether two numbers are equal, NaN being equal to NaN."""
    return np.array_equal(one, other, equal_nan=True)


def _summable_variables(model: keras.Model) -> list[keras.Variable]:
    metrics = [m for m in _single_metrics(model) if _is_sum(m.__class__)]
    return [v for metric in metrics for v in metric.variables]


def _single_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Return the model's metrics, those of `compile` one by one."""
    return [single for metric in model.metrics for single in _members(metric)]


def _members(metric: keras.metrics.Metric) -> Iterator[keras.metrics.Metric]:
    """Yield the metrics in a container of metrics, or a single metric itself."""
    inner_metrics = getattr(metric, "metrics", None)
    if not inner_metrics:
        yield metric
        return
    for inner in inner_metrics:  # whose variables the container has as its own, too
        yield from _members(inner)


@functools.cache
def _is_sum(kind: type) -> bool:
    """Return whether the states of two such metrics add up to the state over the examples of both.

    So it is with Keras's own. A class of the user's counts as a sum when, besides resetting, it
    assigns by `assign_add` only. One whose source can't be read doesn't.
    """
    for cls in kind.__mro__:
        if cls.__module__.split(".")[0] in ("keras", "builtins"):
            return True
        for name, member in vars(cls).items():
            is_update = inspect.isfunction(member) and name not in _RESETTING
            if is_update and _may_assign(member):
                return False
    return True


def _may_assign(method: FunctionType) -> bool:
    try:
        source = textwrap.dedent(inspect.getsource(method))
    except (OSError, TypeError):
        return True
    return ".assign(" in source


def _count(mean: keras.metrics.Mean) -> float:
    """Return how many examples, or batches, a mean is of."""
    return float(keras.ops.convert_to_numpy(mean.count))
