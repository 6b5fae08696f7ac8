"""Logs that speak of all ranks' examples: metrics' states are summed, other numbers averaged."""

import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from recipe.errors import RunError
from recipe.keras.agreement import check_started
from recipe.keras.distributed import optimizers_of, reduction_of
from recipe.ranks import collectives

Number = float | np.ndarray  # what Keras logs: a number, or one for each class


@dataclass(frozen=True)
class Weight:
    """How much a rank's numbers weigh in a mean: the first of these that any rank has."""

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
    def shapes(self) -> list[tuple[int, ...]]:
        return [array.shape for array in self.state]


@dataclass(frozen=True)
class Message:
    """What a rank says at the end of an epoch."""

    logs: dict[str, Number]
    captured: dict[str, Captured]  # by the prefix of their names in the logs, without their states
    shapes: dict[str, list[tuple[int, ...]]]  # of the states, by prefix
    own_shapes: list[tuple[int, ...]]  # of the states of this rank's model, now


class MetricSums(keras.callbacks.Callback):
    """Makes the logs of epochs and evaluations speak of all ranks, with the same bits on each of them.

    Exact, as one process would log it, for every metric whose state is a sum: Keras's own, and a user's whose class
    assigns by `assign_add` only. All other numbers are means over the ranks that have them, weighted by their
    examples: what a `train_step` or a callback puts into the logs, and other metrics. Place it before the callbacks
    that read the logs and after those that add to them. What `evaluate()` returns is corrected too, when Keras knows
    its number of steps beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self._in_fit = False
        self._batches = 0
        self._train: Captured | None = None
        self._test: Captured | None = None

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        check_started()
        self._in_fit = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._in_fit = True

    def on_train_end(self, logs: dict | None = None) -> None:
        self._in_fit = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._train, self._test, self._batches = None, None, 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._batches += not _has_nothing(self.model)

    def on_test_begin(self, logs: dict | None = None) -> None:
        if self._in_fit:  # the evaluation is about to reset the metrics
            self._train = self._train or _captured(self.model, self._batches)
        self._test, self._batches = None, 0

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._batches += 1
        if not self._in_fit and batch + 1 == self.params.get(
            "steps"
        ):  # inside fit() these are the training steps
            self._test = _captured(self.model, self._batches)
            _assign(
                self.model, _summed(self._test.state, self._test.shapes)
            )  # what evaluate() will return

    def on_test_end(self, logs: dict | None = None) -> None:
        self._test = self._test or _captured(self.model, self._batches)
        if not self._in_fit:  # there the other ranks may have no validation
            logs.update(_agreed(self.model, logs, {"": self._test}))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        captured = {"": self._train or _captured(self.model, self._batches)}
        if self._test:
            captured["val_"] = self._test
        logs.update(_agreed(self.model, logs, captured))


def unweighted(logs: dict) -> dict[str, Number]:
    """The mean of each number over the ranks that have it, however many examples each holds. Collective."""
    mine = _numbers(logs)
    ranks = collectives.gather(mine, "logs")
    return {
        name: _mean([(theirs[name], 1.0) for theirs in ranks if name in theirs])
        for name in _names(ranks, mine)
    }


def _agreed(model: keras.Model, logs: dict, captured: dict[str, Captured]) -> dict[str, Number]:
    """The numbers of the logs over all ranks; a name that only some ranks have is there on all. Collective."""
    mine = _numbers(logs)
    plain = {
        prefix: Captured(c.results, c.summable, [], c.weight) for prefix, c in captured.items()
    }
    shapes = {prefix: c.shapes for prefix, c in captured.items()}
    own_shapes = [v.shape for v in _summable_variables(model)]
    ranks = collectives.gather(Message(mine, plain, shapes, own_shapes), "logs")
    wholes = {prefix: _whole(model, ranks, captured.get(prefix), prefix) for prefix in ("", "val_")}
    agreed = {}
    for name in _names([message.logs for message in ranks], mine):
        prefix = "val_" if name.startswith("val_") and wholes["val_"] is not None else ""
        agreed[name] = _agreed_number(name, prefix, ranks, wholes[prefix] or {})
    return agreed


def _whole(
    model: keras.Model, ranks: list[Message], mine: Captured | None, prefix: str
) -> dict[str, Number] | None:
    """The metrics' results over all ranks; None when no rank has this kind. Collective."""
    having = [message.shapes[prefix] for message in ranks if prefix in message.shapes]
    if not having:
        return None
    if any(shapes != having[0] for shapes in having):
        raise RunError(
            "the ranks' models have different metrics; compile all with the same", everywhere=True
        )
    total = _summed(mine.state if mine else None, having[0])
    results = None
    if [v.shape for v in _summable_variables(model)] == having[0]:
        before = _state(model)
        _assign(model, total)
        results = _results(model)
        _assign(model, before)
    if any(
        message.own_shapes != having[0] for message in ranks
    ):  # a model that has seen no batch yet
        results = next(r for r in collectives.gather(results, f"results{prefix}") if r is not None)
    return results


def _agreed_number(
    name: str, prefix: str, ranks: list[Message], whole: dict[str, Number]
) -> Number:
    """A metric's result over all ranks, when that is what all of them have logged by this name; else their mean."""
    having = [message for message in ranks if name in message.logs]
    captured = [message.captured[prefix] for message in having if prefix in message.captured]
    if len(captured) == len(having):
        own = name.removeprefix(prefix)
        for metric in [own, *(n for n in whole if n != own)]:
            same = all(
                _same(m.logs[name], c.results.get(metric))
                for m, c in zip(having, captured, strict=True)
            )
            if same and all(metric in c.summable for c in captured):
                return whole[metric]
    weights = _weights(
        [
            message.captured[prefix].weight if prefix in message.captured else None
            for message in having
        ]
    )
    return _mean([(message.logs[name], w) for message, w in zip(having, weights, strict=True)])


def _same(logged: Number, result: Number | None) -> bool:
    return result is not None and np.array_equal(logged, result, equal_nan=True)


def _weights(weights: list[Weight | None]) -> list[float]:
    """One number for each rank, of the first kind that any of them has."""
    for kind in ("examples", "counted", "batches"):
        found = [getattr(weight, kind) if weight else 0.0 for weight in weights]
        if any(found):
            return found
    return [1.0] * len(weights)


def _mean(numbers: list[tuple[Number, float]]) -> Number:
    """The mean of (number, weight); equal numbers stay what they are."""
    values = [number for number, weight in numbers if weight] or [number for number, _ in numbers]
    if all(_same(value, values[0]) for value in values):
        return values[0]
    weights = [weight for _, weight in numbers]
    mean = np.average(
        [number for number, _ in numbers], axis=0, weights=weights if any(weights) else None
    )
    return _number(mean)


def _numbers(logs: dict | None) -> dict[str, Number]:
    """The numbers among the logs; what is none stays each rank's own."""
    return {
        name: _number(value)
        for name, value in (logs or {}).items()
        if isinstance(value, (int, float, np.number, np.ndarray))
        and np.asarray(value).dtype.kind in "biuf"
    }


def _number(value: Any) -> Number:
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array


def _names(ranks: list[dict[str, Number]], mine: dict[str, Number]) -> list[str]:
    """All ranks' names, this rank's first."""
    return list(dict.fromkeys([*mine, *(name for names in ranks for name in names)]))


def _captured(model: keras.Model, batches: int) -> Captured:
    results = _results(model)
    kept_apart = {m.name for m in _leaves(model) if not _is_sum(type(m))}
    summable = frozenset(
        n for n in results if not any(n == k or n.endswith(f"_{k}") for k in kept_apart)
    )
    means = [m for m in _leaves(model) if isinstance(m, keras.metrics.Mean)]
    examples = next((_count(m) for m in means if m.name == "loss"), 0.0)
    weight = Weight(examples, next(map(_count, means), 0.0), float(batches))
    return Captured(results, summable, _state(model), weight)


def _results(model: keras.Model) -> dict[str, Number]:
    """What Keras would log of the metrics now."""
    results = model.get_metrics_result().items()
    return {name: _number(keras.ops.convert_to_numpy(value)) for name, value in results}


def _state(model: keras.Model) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v)) for v in _summable_variables(model)]


def _assign(model: keras.Model, state: list[np.ndarray]) -> None:
    for v, value in zip(_summable_variables(model), state, strict=True):
        v.assign(value.reshape(v.shape))


def _summed(state: list[np.ndarray] | None, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The sums of all ranks' states of these shapes, of which a rank may have none. Collective."""
    state = [np.zeros(shape) for shape in shapes] if state is None else state
    flat = [np.ravel(array).astype(np.float64) for array in state]
    total = collectives.total(np.concatenate([np.zeros(1), *flat]), "metrics")[
        1:
    ]  # never of length 0
    ends = np.cumsum([array.size for array in state], dtype=int)
    return [
        part.reshape(shape) for part, shape in zip(np.split(total, ends[:-1]), shapes, strict=False)
    ]


def _summable_variables(model: keras.Model) -> list:
    return [v for metric in _leaves(model) if _is_sum(type(metric)) for v in metric.variables]


def _leaves(model: keras.Model) -> list[keras.metrics.Metric]:
    """The model's metrics, those of `compile` one by one."""
    return [leaf for metric in model.metrics for leaf in _leaves_of(metric)]


def _leaves_of(metric: keras.metrics.Metric) -> Iterator[keras.metrics.Metric]:
    held = getattr(metric, "metrics", None)  # a container's, whose own variables are theirs
    if held:
        for inner in held:
            yield from _leaves_of(inner)
    else:
        yield metric


@functools.cache
def _is_sum(kind: type) -> bool:
    """Whether the states of two such metrics, of different examples, add up to the state of all of them.

    So it is with Keras's own. A class of the user's counts as one when, besides resetting, it assigns by assign_add
    only; what can't be read doesn't."""
    for cls in kind.__mro__:
        if cls.__module__.split(".")[0] in ("keras", "builtins"):
            return True
        for name, method in vars(cls).items():
            if not inspect.isfunction(method) or name in (
                "__init__",
                "reset_state",
                "reset_states",
            ):
                continue
            try:
                source = textwrap.dedent(inspect.getsource(method))
            except (OSError, TypeError):
                return False
            if ".assign(" in source:
                return False
    return True


def _has_nothing(model: keras.Model) -> bool:
    """Whether this rank is taking part in the others' steps without examples."""
    agreements = [r.agreement for o in optimizers_of(model) if (r := reduction_of(o))]
    return any(agreement and agreement.nothing for agreement in agreements)


def _count(mean: keras.metrics.Mean) -> float:
    """How many examples, or batches, a mean is of."""
    return float(keras.ops.convert_to_numpy(mean.count))
