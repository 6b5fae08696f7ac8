"""`Model.fit` on several ranks: what one rank decides holds for all of them, in the same step.

Keras's loop knows one process only. Here it keeps its form, and the rank's callbacks go into one, `Together`, that
tells the other ranks what this one does and does what they have agreed on.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import keras

from recipe.errors import RunError
from recipe.keras import backend, recording, rollcall
from recipe.keras.agreement import Agreement, Heard, check_started
from recipe.keras.callbacks.backup import BackupAndRestore
from recipe.keras.callbacks.metrics import MetricSums
from recipe.keras.callbacks.replicas import BroadcastState, ReplicaCheck
from recipe.keras.distributed import is_distributed, optimizers_of, reduction_of
from recipe.keras.recording import Call, Foreign, Total, Update
from recipe.ranks import collectives, elastic

# Keras looks for these in the list that `fit` is given; they speak of this rank alone.
_KERAS_OWN = (keras.callbacks.History, keras.callbacks.ProgbarLogger)
_COLLECTIVE = (
    BackupAndRestore,
    BroadcastState,
    MetricSums,
    ReplicaCheck,
)  # all ranks have these, in one order


@dataclass(frozen=True)
class Facts:
    """What all ranks must know of each other before the first step."""

    steps: int | None  # of an epoch, by this rank's data; None: unknown
    steps_per_execution: int
    epochs: int
    collective: list[str]  # names of the callbacks in which the ranks meet
    refused: str  # why this rank's `fit` can't go on; empty: it can


def install() -> None:
    """Makes `keras.Model.fit` keep the ranks together, for models that a DistributedOptimizer trains; others are as
    they were."""
    fit = keras.Model.fit
    if hasattr(fit, "of_keras"):
        return

    @functools.wraps(fit)
    def fit_together(model: keras.Model, *args: Any, **kwargs: Any) -> Any:
        if not any(is_distributed(o) for o in _with_inner(optimizers_of(model))):
            return fit(model, *args, **kwargs)
        return _fit(fit, model, *args, **kwargs)

    fit_together.of_keras = fit
    keras.Model.fit = fit_together


def refused_alone(model: keras.Model) -> str:
    """Returns why a model with a DistributedOptimizer can't be trained, on any number of ranks; empty: it can."""
    if any(is_distributed(getattr(o, "inner_optimizer", None)) for o in optimizers_of(model)):
        return (
            "the LossScaleOptimizer is outside the DistributedOptimizer, so that ranks would disagree about "
            "overflows and hang; use DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer))"
        )
    distribution = keras.distribution.distribution()
    if other := type(distribution).__name__ if distribution is not None else backend.strategy():
        return f"{other} and a DistributedOptimizer both average the gradients; use one of them"
    return ""


def _fit(fit: Callable, model: keras.Model, *args: Any, **kwargs: Any) -> Any:
    """`fit` of a model that a DistributedOptimizer trains."""
    check_started()
    if sentence := refused_alone(model):
        raise ValueError(sentence)
    _without_xla(model)
    if collectives.size() == 1 or elastic.wanted() or not (agreement := _agreement(model)):
        return fit(model, *args, **kwargs)
    bound = inspect.signature(fit).bind(model, *args, **kwargs)
    given = bound.arguments.get("callbacks") or []
    given = (
        given.callbacks
        if isinstance(given, keras.callbacks.CallbackList)
        else keras.tree.flatten(given)
    )
    mine = [c for c in given if not isinstance(c, _KERAS_OWN)]
    together = Together(mine, agreement, _refused_here(mine))
    bound.arguments["callbacks"] = [together, *[c for c in given if isinstance(c, _KERAS_OWN)]]
    own_step = vars(model).get("train_step")
    model.train_step = _recorded(model.train_step)
    try:
        with rollcall.told():
            return fit(*bound.args, **bound.kwargs)
    finally:
        del model.train_step
        if own_step is not None:
            model.train_step = own_step


def _with_inner(optimizers: list) -> list:
    return [*optimizers, *[getattr(o, "inner_optimizer", None) for o in optimizers]]


def _without_xla(model: keras.Model) -> None:
    """Horovod's operations can be compiled neither by XLA nor by PyTorch's compiler."""
    if not model.jit_compile:
        return
    if backend.FRAMEWORK == "torch" and collectives.rank() == 0:
        warnings.warn(
            "jit_compile=True is left out: PyTorch's compiler can't compile an allreduce",
            stacklevel=4,
        )
    model.jit_compile = False
    model.make_train_function(force=True)


def _agreement(model: keras.Model) -> Agreement | None:
    """The agreement of the model's optimizers, made at their first `fit`; None where they reduce over a part of the
    ranks, of which the others know nothing."""
    reductions = [reduction for o in optimizers_of(model) if (reduction := reduction_of(o))]
    if any(r.process_set.process_set_id for r in reductions):
        return None
    made = [
        r.agreement for r in reductions if r.agreement and r.agreement.size == collectives.size()
    ]
    agreement = made[0] if made else Agreement()
    for reduction in reductions:
        reduction.agreement = agreement
    if model not in agreement.calls:
        agreement.calls[model] = None
        if model.train_function is not None:  # traced without the agreement's word
            model.make_train_function(force=True)
    return agreement


def _refused_here(callbacks: list) -> str:
    """Why this rank's callbacks can't train on several ranks; empty: they can."""
    if any(isinstance(c, keras.callbacks.BackupAndRestore) for c in callbacks):
        return (
            "keras.callbacks.BackupAndRestore takes up each rank where that rank was; give all ranks "
            "recipe.keras.callbacks.BackupAndRestore, which has the same arguments"
        )
    return ""


def _recorded(train_step: Callable) -> Callable:
    """The step, which begins a new record each time that it runs or is traced."""

    @functools.wraps(train_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        recording.start()
        return train_step(*args, **kwargs)

    return step


class Together(keras.callbacks.Callback):
    """Holds the callbacks of a rank's `fit` and keeps its loop in step with the loops of the other ranks.

    A wish to stop goes with the next step's gradients, and all ranks stop after that step; at the end of an epoch the
    ranks ask each other. A rank whose data end early takes part in the others' steps with nothing."""

    def __init__(self, callbacks: list, agreement: Agreement, refused: str) -> None:
        super().__init__()
        self.callbacks, self.agreement, self._refused = callbacks, agreement, refused
        self._wish = ""  # why this rank wants to stop; empty: it doesn't
        self._agreed = False  # all ranks stop
        self._steps: int | None = (
            None  # of an epoch, on the rank that has most; None: not known on all
        )
        self._epoch: int | None = None
        self._done = 0  # steps of this epoch
        self._begun = -1  # the last step for which callbacks were told that it begins
        self._in_steps = False  # between an epoch's beginning and the end of its last step
        self._warned = False
        self._logs: dict | None = None  # of the last step
        self._parts: tuple[list | None, list[Callable]] = (
            None,
            [],
        )  # of a step without examples, and of which calls

    def set_params(self, params: dict) -> None:
        self.params = params
        for callback in self.callbacks:
            callback.set_params(params)

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        for callback in self.callbacks:
            callback.set_model(model)

    def on_train_begin(self, logs: dict | None = None) -> None:
        mine = Facts(
            steps=self.params["steps"],
            steps_per_execution=self.model.steps_per_execution,
            epochs=self.params["epochs"],
            collective=[type(c).__name__ for c in self.callbacks if isinstance(c, _COLLECTIVE)],
            refused=self._refused,
        )
        facts = collectives.gather(mine, "fit.begin")
        _check(facts)
        self._agree_on_steps([f.steps for f in facts])
        self.agreement.begin()
        self._tell("on_train_begin", logs)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if self._epoch is None:
            _check_epochs(collectives.gather(epoch, "fit.epoch"))
        self._epoch, self._done, self._begun, self._in_steps = epoch, 0, -1, True
        self._tell("on_epoch_begin", epoch, logs)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._begun = batch
        self._tell("on_train_batch_begin", batch, logs)
        rollcall.here.at(f"epoch {self._epoch}, step {batch}")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if (calls := recording.stop()) is not None:
            self.agreement.calls[self.model] = calls
        self._end_step(batch, logs)

    def on_test_begin(self, logs: dict | None = None) -> None:
        self._end_steps()
        rollcall.here.begin("the validation")
        self._tell("on_test_begin", logs)

    def on_test_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._tell("on_test_batch_begin", batch, logs)

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._tell("on_test_batch_end", batch, logs)

    def on_test_end(self, logs: dict | None = None) -> None:
        self._tell("on_test_end", logs)
        rollcall.here.end()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._end_steps()
        self._tell("on_epoch_end", epoch, logs)
        rollcall.here.at(f"the end of epoch {epoch}")
        self._agree_to_stop(f"at the end of epoch {epoch}")

    def on_train_end(self, logs: dict | None = None) -> None:
        if self._epoch is None:
            _check_epochs(collectives.gather(None, "fit.epoch"))
        self._tell("on_train_end", logs)

    def _tell(self, event: str, *args: Any) -> None:
        """Calls the rank's callbacks; one that stops the training is this rank's wish."""
        for callback in self.callbacks:
            name = type(callback).__name__
            rollcall.here.begin(f"{name}.{event}")
            getattr(callback, event)(*args)
            rollcall.here.end()
            if self.model.stop_training and not self._wish and not self._agreed:
                self._wish = name

    def _agree_on_steps(self, steps: list[int | None]) -> None:
        """An epoch has as many steps as the rank with most of them has, where all know their number."""
        self._steps = max(steps) if None not in steps else None
        for callback in self.callbacks:
            callback.set_params(self.params | {"steps": self._steps})
        if self._steps is not None and min(steps) < self._steps:
            few = steps.index(min(steps))
            self._warn(
                f"an epoch has {self._steps} steps on rank {steps.index(self._steps)} and {steps[few]} on rank {few}"
            )

    def _warn(self, what: str) -> None:
        """Says once, on rank 0, that not all ranks have examples in all steps."""
        if not self._warned and collectives.rank() == 0:
            warnings.warn(
                f"{what}: in the steps for which a rank has no data it takes part with nothing, and the gradient is "
                "the mean over the ranks that have some (recipe.keras.divide gives all ranks as many steps)",
                stacklevel=2,
            )
        self._warned = True

    def _end_step(self, batch: int, logs: dict | None) -> None:
        """Acts on what was heard with the step's reduction, after the rank's callbacks have seen the step."""
        self._done, self._logs = batch + 1, logs
        heard = self.agreement.heard()
        self._check(heard, batch)
        self._tell("on_train_batch_end", batch, logs)
        if heard.stops.any():
            self._agree_to_stop(f"in epoch {self._epoch}, step {batch}")
        elif self.model.stop_training:
            self._wish = self._wish or "stop_training was set"
            self.model.stop_training = False  # until all ranks have heard of it
            self.agreement.say(nothing=self.agreement.nothing, stop=True)

    def _check(self, heard: Heard, batch: int) -> None:
        heard.check_rates()
        if not heard.has_data.all():
            without = [rank for rank, has in enumerate(heard.has_data) if not has]
            self._warn(
                f"the data of rank {without[0]} end before step {batch} of epoch {self._epoch}"
            )

    def _agree_to_stop(self, where: str) -> None:
        """Stops all ranks if any wants to; rank 0 says which and why, unless all do. Collective."""
        wishes = collectives.gather(self._wish, "fit.stop")
        if not any(wishes):
            return
        self._agreed = self.model.stop_training = True
        if collectives.rank() == 0 and not all(wishes):
            rank = next(r for r, wish in enumerate(wishes) if wish)
            print(
                f"rank {rank} stops the training of all ranks {where}: {wishes[rank]}",
                file=sys.stderr,
                flush=True,
            )
        self._wish = ""

    def _end_steps(self) -> None:
        """This rank's loop over its data has ended: takes part with nothing in the steps that other ranks still do."""
        if not self._in_steps:
            return
        self._in_steps = False
        recording.stop()
        try:
            while not self._agreed and (self._steps is None or self._done < self._steps):
                if not self._take_part(self._done):
                    break
                self._end_step(self._done, self._logs)
        finally:
            self.agreement.begin()
            self.agreement.say(nothing=False, stop=bool(self._wish))

    def _take_part(self, batch: int) -> bool:
        """Does the collectives of one step, with no examples, and its update. Returns whether any rank had examples."""
        self._check_possible()
        if not self.agreement.calls[self.model]:
            return False  # the step has no collectives
        if self._begun < batch:
            self.on_train_batch_begin(batch)
        self.agreement.say(nothing=True, stop=bool(self._wish))
        with backend.without_gradients():
            for part in self._parts_of_step():
                part()
                if self.agreement.nobody():
                    return False
        return True

    def _parts_of_step(self) -> list[Callable]:
        """What this rank does in a step of the others, with no examples; traced, where that is how names are heeded."""
        calls = self.agreement.calls[self.model]
        if self._parts[0] is not calls:
            parts = [part for call in calls for part in _parts(call)]
            self._parts = calls, [backend.compiled(part, []) for part in parts]
        return self._parts[1]

    def _check_possible(self) -> None:
        """Raises RunError where this rank can't take part with nothing."""
        calls, rank = self.agreement.calls[self.model], collectives.rank()
        ended = f"rank {rank}'s data end after {self._done} steps of epoch {self._epoch}"
        if calls is None:
            raise RunError(
                f"{ended}, and it never had any; give each rank data (recipe.keras.divide)"
            )
        if self.model.steps_per_execution > 1:
            raise RunError(f"{ended}; with steps_per_execution > 1 all ranks need as many steps")
        if foreign := next((c for c in calls if isinstance(c, Foreign)), None):
            raise RunError(
                f"{ended}, and the training step calls {foreign.operation}, in which a rank can't take part without "
                "data; give all ranks as many steps"
            )


def _parts(call: Call) -> Iterator[Callable]:
    """What a rank without examples does in a call of the others."""
    if isinstance(call, Total):
        yield lambda: backend.total(
            backend.zeros(call.shape, call.dtype), call.name, call.process_set
        )
    elif isinstance(call, Update):
        yield from call.optimizer.take_part(call.variables, call.kinds)


def _check(facts: list[Facts]) -> None:
    """Raises ValueError, on all ranks, for what must be equal and isn't, and for what a rank must not do."""
    first = facts[0]
    for rank, theirs in enumerate(facts):
        if theirs.refused:
            _refuse_everywhere(f"rank {rank}: {theirs.refused}")
        if theirs.epochs != first.epochs:
            _refuse_everywhere(
                f"fit(epochs=…) is {first.epochs} on rank 0 and {theirs.epochs} on rank {rank}"
            )
        if theirs.collective != first.collective:
            ours, others = (
                ", ".join(names) or "none" for names in (first.collective, theirs.collective)
            )
            _refuse_everywhere(
                f"the ranks meet in these callbacks, so all need the same: rank 0 has {ours}; rank {rank} has {others}"
            )
    steps = {f.steps for f in facts}
    if max(f.steps_per_execution for f in facts) > 1 and (len(steps) > 1 or None in steps):
        found = ", ".join("unknown" if f.steps is None else str(f.steps) for f in facts)
        _refuse_everywhere(
            f"with steps_per_execution > 1 all ranks need the same number of steps an epoch, not {found}; pass "
            "steps_per_epoch to fit()"
        )


def _check_epochs(epochs: list[int | None]) -> None:
    """Raises RunError, on all ranks, when they don't begin with the same epoch; None: a rank has none to do."""
    for rank, epoch in enumerate(epochs):
        if epoch != epochs[0]:
            mine, theirs = (
                "no epoch at all" if e is None else f"epoch {e}" for e in (epochs[0], epoch)
            )
            raise RunError(
                f"rank 0 begins with {mine} and rank {rank} with {theirs}; give all ranks the same initial_epoch, and "
                "resume with recipe.keras.callbacks.BackupAndRestore on all of them",
                everywhere=True,
            )


def _refuse_everywhere(sentence: str) -> NoReturn:
    """Raises a ValueError that all ranks raise together."""
    error = ValueError(sentence)
    error.everywhere = True
    raise error
