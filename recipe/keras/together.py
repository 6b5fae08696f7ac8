"""The callback that keeps the loops of all ranks in step: what one decides holds for all.

Where ranks agree: on the facts of a `fit` in `on_train_begin`, in each step in `_end_step`, and at
the end of each epoch in `_agree_to_stop`. What a rank without data does: `_do_others_steps`.
"""

import sys
import warnings
from typing import Any

import keras

from recipe.keras import recording, rollcall
from recipe.keras.agreement import Agreement
from recipe.keras.callbacks.backup import BackupAndRestore
from recipe.keras.callbacks.metrics import MetricSums
from recipe.keras.callbacks.replicas import BroadcastState, ReplicaCheck
from recipe.keras.empty_step import EmptyStep, possible_calls
from recipe.keras.facts import RankFacts, check_facts, check_first_epochs
from recipe.ranks import collectives

# Callbacks in which the ranks meet: all ranks have these, in one order.
_COLLECTIVE = (BackupAndRestore, BroadcastState, MetricSums, ReplicaCheck)


class Together(keras.callbacks.Callback):
    """The callbacks of a rank's `fit`, which see the same steps as those of the other ranks.

    A wish to stop goes with the next step's gradients, and all ranks stop after that step. At the
    end of an epoch the ranks ask each other. A rank whose data end early takes part in the others'
    steps with nothing.
    """

    def __init__(
        self, callbacks: list[keras.callbacks.Callback], agreement: Agreement, refusal: str
    ) -> None:
        super().__init__()

        # What it calls, and by what it speaks.
        self.callbacks = callbacks
        self.agreement = agreement
        self._refusal = refusal  # why these callbacks can't train on several ranks; empty: they can

        # The wish to stop, and whether it is granted.
        self._wish = ""  # why this rank wants to stop; empty: it doesn't
        self._all_stop = False
        self._has_warned = False

        # Of an epoch, on the rank that has most. None: not known on all ranks.
        self._steps: int | None = None
        self._epoch: int | None = None
        self._done = 0  # steps of this epoch
        self._begun = -1  # the last step that callbacks have seen begin
        self._in_steps = False  # between an epoch's beginning and the end of its last step
        self._logs: dict | None = None  # of the last step
        self._empty_step = EmptyStep([])

    def set_params(self, params: dict) -> None:
        self.params = params
        for callback in self.callbacks:
            callback.set_params(params)

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        for callback in self.callbacks:
            callback.set_model(model)

    def on_train_begin(self, logs: dict | None = None) -> None:
        # Ranks that can't train together are refused before the first step.
        collective_callbacks = [c for c in self.callbacks if isinstance(c, _COLLECTIVE)]
        own_facts = RankFacts(
            steps=self.params["steps"],
            steps_per_execution=self.model.steps_per_execution,
            epochs=self.params["epochs"],
            collective_callbacks=[type(c).__name__ for c in collective_callbacks],
            refusal=self._refusal,
        )
        facts = collectives.gather(own_facts, "fit.begin")
        check_facts(facts)

        # From here on they meet in each step.
        self._agree_on_steps([f.steps for f in facts])
        self.agreement.begin()
        self._call("on_train_begin", logs)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if self._epoch is None:
            check_first_epochs(collectives.gather(epoch, "fit.epoch"))
        self._epoch = epoch
        self._done = 0
        self._begun = -1
        self._in_steps = True
        self._call("on_epoch_begin", epoch, logs)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._begun = batch
        self._call("on_train_batch_begin", batch, logs)
        rollcall.here.at(f"epoch {self._epoch}, step {batch}")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        calls = recording.stop()
        if calls is not None:
            self.agreement.calls[self.model] = calls
        self._end_step(batch, logs)

    def on_test_begin(self, logs: dict | None = None) -> None:
        self._do_others_steps()
        rollcall.here.begin("the validation")
        self._call("on_test_begin", logs)

    def on_test_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._call("on_test_batch_begin", batch, logs)

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._call("on_test_batch_end", batch, logs)

    def on_test_end(self, logs: dict | None = None) -> None:
        self._call("on_test_end", logs)
        rollcall.here.end()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._do_others_steps()
        self._call("on_epoch_end", epoch, logs)
        rollcall.here.at(f"the end of epoch {epoch}")
        self._agree_to_stop(f"at the end of epoch {epoch}")

    def on_train_end(self, logs: dict | None = None) -> None:
        if self._epoch is None:
            check_first_epochs(collectives.gather(None, "fit.epoch"))
        self._call("on_train_end", logs)

    def _call(self, event: str, *args: Any) -> None:
        """Call this rank's callbacks. One that stops the training is the rank's wish to stop."""
        for callback in self.callbacks:
            name = type(callback).__name__
            rollcall.here.begin(f"{name}.{event}")
            getattr(callback, event)(*args)
            rollcall.here.end()
            if self.model.stop_training and not self._wish and not self._all_stop:
                self._wish = name

    def _agree_on_steps(self, steps: list[int | None]) -> None:
        """Give an epoch as many steps as the rank with most has, where all know their number."""
        known = [count for count in steps if count is not None]
        self._steps = max(known) if len(known) == len(steps) else None
        for callback in self.callbacks:
            callback.set_params(self.params | {"steps": self._steps})
        if self._steps is None:
            return
        fewest = min(known)
        if fewest < self._steps:
            self._warn_once(
                f"an epoch has {self._steps} steps on rank {known.index(self._steps)} "
                f"and {fewest} on rank {known.index(fewest)}"
            )

    def _end_step(self, batch: int, logs: dict | None) -> None:
        """Act on the words of the step's reduction, once the callbacks have seen the step."""
        # What the ranks said with the gradients.
        self._done = batch + 1
        self._logs = logs
        words = self.agreement.words()
        words.check_rates()
        without_data = words.ranks_without_data()
        if without_data:
            self._warn_once(
                f"the data of rank {without_data[0]} end before step {batch} of epoch {self._epoch}"
            )

        # The callbacks may ask to stop: all ranks stop together, after a later step.
        self._call("on_train_batch_end", batch, logs)
        if words.stops.any():
            self._agree_to_stop(f"in epoch {self._epoch}, step {batch}")
        elif self.model.stop_training:
            self._wish = self._wish or "stop_training was set"
            self.model.stop_training = False  # until all ranks know of it
            self.agreement.say(nothing=self.agreement.nothing, stop=True)

    def _warn_once(self, what: str) -> None:
        """Warn on rank 0 that not all ranks have examples in all steps."""
        if not self._has_warned and collectives.rank() == 0:
            warnings.warn(
                f"{what}: in the steps for which a rank has no data it takes part with nothing, "
                "and the gradient is the mean over the ranks that have some "
                "(recipe.keras.divide gives all ranks as many steps)",
                stacklevel=2,
            )
        self._has_warned = True

    def _agree_to_stop(self, where: str) -> None:
        """Stop all ranks if any wants to. Rank 0 prints which, unless all do. Collective."""
        # One wish is enough for all.
        wishes = collectives.gather(self._wish, "fit.stop")
        if not any(wishes):
            return
        self._all_stop = True
        self.model.stop_training = True

        # Say whose wish it was, where the ranks differ.
        if collectives.rank() == 0 and not all(wishes):
            rank = next(r for r, wish in enumerate(wishes) if wish)
            print(
                f"rank {rank} stops the training of all ranks {where}: {wishes[rank]}",
                file=sys.stderr,
                flush=True,
            )
        self._wish = ""

    def _do_others_steps(self) -> None:
        """Take part, without data, in the steps that other ranks still do."""
        if not self._in_steps:
            return
        self._in_steps = False
        recording.stop()
        try:
            while self._others_may_have_steps() and self._do_empty_step(self._done):
                self._end_step(self._done, self._logs)
        finally:
            self.agreement.begin()
            self.agreement.say(nothing=False, stop=bool(self._wish))

    def _others_may_have_steps(self) -> bool:
        if self._all_stop:
            return False
        return self._steps is None or self._done < self._steps

    def _do_empty_step(self, batch: int) -> bool:
        """Do one step without examples. Return whether any rank had some. Collective.

        Raise RunError where this rank can't.
        """
        rank = collectives.rank()
        where = f"rank {rank}'s data end after {self._done} steps of epoch {self._epoch}"
        recorded = self.agreement.calls[self.model]
        calls = possible_calls(recorded, self.model.steps_per_execution, where)
        if not calls:
            return False
        if self._begun < batch:
            self.on_train_batch_begin(batch)
        self.agreement.say(nothing=True, stop=bool(self._wish))

        # A step that was traced anew has other calls.
        if self._empty_step.calls is not calls:
            self._empty_step = EmptyStep(calls)
        return self._empty_step.run(self.agreement)
