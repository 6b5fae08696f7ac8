"""Logs that speak of all ranks' examples: metrics' states are summed, other numbers averaged."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import keras
import numpy as np

from recipe.errors import RunError
from recipe.keras.agreement import check_started
from recipe.keras.callbacks.metric_states import (
    Captured,
    Number,
    Shapes,
    Weight,
    as_number,
    assign_state,
    capture,
    results_of,
    same,
    shapes_of,
    state_of,
    summed,
)
from recipe.keras.distributed import optimizers_of, reduction_of
from recipe.ranks import collectives

TRAINING, VALIDATION = "", "val_"  # prefixes of names in the logs
NO_WEIGHT = Weight(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Report:
    """What a rank tells the others at the end of an epoch. Dictionaries of parts go by prefix."""

    logs: dict[str, Number]
    captured: dict[str, Captured]  # without their states
    shapes: dict[str, Shapes]  # of the states
    shapes_now: Shapes  # of the state of this rank's model


class MetricSums(keras.callbacks.Callback):
    """Makes the logs of epochs and evaluations speak of all ranks, with the same bits on each.

    Exact, as one process would log it, for every metric whose state is a sum: Keras's own, and a
    user's whose class assigns by `assign_add` only. All other numbers are means over the ranks that
    have them, weighted by their examples: what a `train_step` or a callback puts into the logs, and
    other metrics.

    Place it before the callbacks that read the logs and after those that add to them. What
    `evaluate()` returns is corrected too, when Keras knows its number of steps beforehand.
    """

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
        self._train = self._test = None
        self._batches = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if not _is_without_data(self.model):
            self._batches += 1

    def on_test_begin(self, logs: dict | None = None) -> None:
        if self._in_fit:  # the evaluation is about to reset the metrics
            self._train = self._train or capture(self.model, self._batches)
        self._test = None
        self._batches = 0

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._batches += 1
        if self._in_fit:  # where "steps" are those of the training
            return
        if batch + 1 == self.params.get("steps"):
            self._test = capture(self.model, self._batches)
            assign_state(self.model, summed(self._test.state))  # what evaluate() will return

    def on_test_end(self, logs: dict | None = None) -> None:
        self._test = self._test or capture(self.model, self._batches)
        if not self._in_fit:  # there the other ranks may have no validation
            self._correct(logs, {TRAINING: self._test})

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        captured = {TRAINING: self._train or capture(self.model, self._batches)}
        if self._test:
            captured[VALIDATION] = self._test
        self._correct(logs, captured)

    def _correct(self, logs: dict | None, captured: dict[str, Captured]) -> None:
        """Make the numbers in the logs those over all ranks. Collective."""
        numbers = _over_all_ranks(self.model, logs, captured)
        if logs is not None:
            logs.update(numbers)


def unweighted(logs: dict) -> dict[str, Number]:
    """Return each number's mean over the ranks that have it, without weights. Collective."""
    own_numbers = _numbers(logs)
    all_numbers = collectives.gather(own_numbers, "logs")
    means = {}
    for name in _union(own_numbers, all_numbers):
        values = [numbers[name] for numbers in all_numbers if name in numbers]
        means[name] = _mean(values, [1.0] * len(values))
    return means


def _over_all_ranks(
    model: keras.Model, logs: dict | None, captured: dict[str, Captured]
) -> dict[str, Number]:
    """Return the numbers of all logs over all ranks, also those of other ranks only. Collective."""
    # States are large: they travel as sums, afterwards.
    without_states = {prefix: replace(c, state=[]) for prefix, c in captured.items()}
    own_report = Report(
        logs=_numbers(logs),
        captured=without_states,
        shapes={prefix: c.shapes for prefix, c in captured.items()},
        shapes_now=shapes_of(model),
    )
    reports = collectives.gather(own_report, "logs")
    training = _whole_results(model, reports, captured.get(TRAINING), TRAINING)
    validation = _whole_results(model, reports, captured.get(VALIDATION), VALIDATION)

    # Each name's number, from its own part of the metrics.
    numbers = {}
    for name in _union(own_report.logs, [report.logs for report in reports]):
        if name.startswith(VALIDATION) and validation is not None:
            numbers[name] = _number_over_ranks(name, VALIDATION, reports, validation)
        else:
            numbers[name] = _number_over_ranks(name, TRAINING, reports, training or {})
    return numbers


def _whole_results(
    model: keras.Model, reports: list[Report], own: Captured | None, prefix: str
) -> dict[str, Number] | None:
    """Return the metrics' results over all ranks. None when no rank has this prefix. Collective.

    Raise RunError, on all ranks, when their models have different metrics.
    """
    # All ranks must have the same metrics.
    all_shapes = [report.shapes[prefix] for report in reports if prefix in report.shapes]
    if not all_shapes:
        return None
    shapes = all_shapes[0]
    if any(other != shapes for other in all_shapes):
        raise RunError(
            "the ranks' models have different metrics; compile all with the same", everywhere=True
        )

    # The model itself makes results of the sums, and gets its own state back.
    total = summed(own.state if own else [np.zeros(shape) for shape in shapes])
    results = None
    if shapes_of(model) == shapes:
        own_state = state_of(model)
        assign_state(model, total)
        results = results_of(model)
        assign_state(model, own_state)

    # A model that has seen no batch yet has no metrics, and can't.
    if any(report.shapes_now != shapes for report in reports):
        all_results = collectives.gather(results, f"results{prefix}")
        results = next(r for r in all_results if r is not None)
    return results


def _number_over_ranks(
    name: str, prefix: str, reports: list[Report], whole: dict[str, Number]
) -> Number:
    """Return a metric's result over all ranks, if all log it by this name; else their mean."""
    having = [report for report in reports if name in report.logs]
    if all(prefix in report.captured for report in having):
        # The metric of this name first; a train_step may log it by another one.
        own_name = name.removeprefix(prefix)
        other_names = [n for n in whole if n != own_name]
        for metric in [own_name, *other_names]:
            if all(r.captured[prefix].has_logged(r.logs[name], metric) for r in having):
                return whole[metric]

    weights = []
    for report in having:
        captured = report.captured.get(prefix)
        weights.append(captured.weight if captured else NO_WEIGHT)
    return _mean([report.logs[name] for report in having], _comparable(weights))


def _comparable(weights: list[Weight]) -> list[float]:
    """Return one number for each rank, of the first kind that any of them has."""
    for of_one_kind in zip(*weights, strict=True):
        if any(of_one_kind):
            return list(of_one_kind)
    return [1.0] * len(weights)


def _mean(numbers: list[Number], weights: list[float]) -> Number:
    """Return the weighted mean. Equal numbers stay what they are."""
    weighty = [number for number, weight in zip(numbers, weights, strict=True) if weight]
    candidates = weighty or numbers
    if all(same(number, candidates[0]) for number in candidates):
        return candidates[0]
    return as_number(
        np.average(np.array(numbers), axis=0, weights=weights if any(weights) else None)
    )


def _numbers(logs: dict | None) -> dict[str, Number]:
    """Return the numbers among the logs. Anything else stays each rank's own."""
    return {name: as_number(value) for name, value in (logs or {}).items() if _is_number(value)}


def _is_number(value: object) -> bool:
    is_numeric = isinstance(value, (int, float, np.number, np.ndarray))
    return is_numeric and np.asarray(value).dtype.kind in "biuf"


def _union(own: dict[str, Number], others: Iterable[dict[str, Number]]) -> list[str]:
    """Return all ranks' names, this rank's first."""
    names = dict.fromkeys(own)
    for other in others:
        names |= dict.fromkeys(other)
    return list(names)


def _is_without_data(model: keras.Model) -> bool:
    """Return whether this rank is taking part in the others' steps without examples."""
    reductions = [reduction_of(o) for o in optimizers_of(model)]
    agreements = [r.agreement for r in reductions if r is not None]
    return any(agreement is not None and agreement.nothing for agreement in agreements)
