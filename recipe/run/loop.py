"""The training loop of all frameworks: step, settle, log, evaluate, save, leave."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from recipe.config import Recipe
from recipe.data.element import Element
from recipe.errors import Preempted
from recipe.frameworks.replica import Replica
from recipe.frameworks.vector import StepResult
from recipe.ranks import collectives
from recipe.ranks.preemption import Notice
from recipe.rules.sums import Sums
from recipe.run import state
from recipe.run.checks import check_evaluation, check_losses
from recipe.run.commits import Commits
from recipe.run.evaluation import RunData, evaluate
from recipe.run.record import Record, evaluation_figures, is_due
from recipe.run.runlog import Figures
from recipe.run.state import RunState
from recipe.system import again, watchdog


class Loop:
    """One run. Its methods are collective: all ranks call them, in the same order."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        replica: Replica,
        data: RunData,
        run_state: RunState,
        commits: Commits | None,
    ) -> None:
        self.recipe, self.run_dir, self.replica = recipe, run_dir, replica
        self.data, self.epoch = data, data.training.division
        self.state, self.commits = run_state, commits
        self.record = Record(run_dir, recipe, self.epoch, run_state)
        self._pending: Callable[[], StepResult] | None = None  # gives the last step's result

    def run(self, notice: Notice) -> list[float]:
        """Train to the recipe's end, and return the top-1 error of each evaluated epoch."""
        # Begin: the images are read ahead, and all ranks get rank 0's state.
        elements = self.record.elements(iter(self.data.training.elements(self.state.step)))
        self.replica.begin(self.epoch.steps)
        watchdog.beat("the first step's beginning")
        if self.state.step == 0:
            self.record.remember(self.replica.weights())

        # Train, epoch by epoch. A resumed run may begin within one.
        try:
            self._commit()
            while self.state.epochs < self.recipe.epochs:
                epoch_end = (self.state.epochs + 1) * self.epoch.steps
                if self.state.step < epoch_end:
                    self.replica.begin_epoch(self.state.epochs)
                while self.state.step < epoch_end:
                    if self._step(elements, notice.received):
                        self._leave()
                self._end_epoch()

            # End: the replicas are compared.
            self.replica.end()
            self.record.say_waits()
            self.record.say_replaced(self.data.training.replaced)
        finally:
            self.record.close()
        return self.state.errors

    def _step(self, elements: Iterator[Element], stop: bool) -> bool:
        """Do one step, and return whether the ranks have agreed to leave after it.

        Its result is read when the next step is under way, so that a GPU is never idle. Where
        anything depends on the result it is read at once.
        """
        # Start this step, then read the result of the one before.
        result = self.replica.step(self.state.step % self.epoch.steps, elements, stop)
        leave = self._settle()
        self._pending = result
        self.state.step += 1

        # What is due after so many steps?
        run, steps = self.recipe.run, self.state.step
        line_due = is_due(steps, run.log_every)
        save_due = is_due(steps, run.checkpoint_steps)
        commit_due = self.commits is not None and is_due(steps, run.commit_steps)
        epoch_ends = is_due(steps, self.epoch.steps)
        if leave or line_due or save_due or commit_due or epoch_ends:
            leave = self._settle() or leave

        # Write and save what is due.
        if steps == 1:
            self.record.write_start()
        if line_due:
            self.record.write_line(self.replica.rate())
        # An epoch's end is saved after its evaluation. Who leaves saves too.
        if save_due and not (epoch_ends or leave):
            self._save()
        if commit_due and not (epoch_ends or leave):
            self._commit()
        return leave

    def _settle(self) -> bool:
        """Read the last step's result, if it wasn't, and return whether a rank wants to leave."""
        if self._pending is None:
            return False
        result = self._pending()
        self._pending = None
        step = self.state.step - 1  # counted from 0
        watchdog.beat(f"step {step + 1} of {self.recipe.epochs * self.epoch.steps}")
        check_losses(result.losses, step, self.epoch, self.data.training.order)
        loss, hits = result.losses.sum(dtype=np.float64), result.hits.sum(dtype=np.float64)
        examples = self.epoch.minibatch(step % self.epoch.steps)
        self.record.settled(step + 1, Sums(float(loss), float(hits), examples))
        return result.stop

    def _end_epoch(self) -> None:
        """Evaluate, and write the figures and the checkpoint."""
        # The training's figures of this epoch.
        self.state.epochs += 1
        epochs = self.state.epochs
        figures = self.record.epoch_figures(self.replica.rate())

        # The run's result is the median of the last five epochs, so that these always count.
        if is_due(epochs, self.recipe.run.eval_every) or epochs > self.recipe.epochs - 5:
            self.record.doing(f"the evaluation after epoch {epochs}")
            sums = evaluate(self.recipe, self.replica, self.data, epochs)
            check_evaluation(sums, epochs)
            self.state.errors.append(sums.error)
            figures |= evaluation_figures(sums)
        self.state.epoch_sums = Sums()

        # Write both, and let an elastic run go on from here.
        self.record.doing(f"the record of epoch {epochs}")
        if collectives.on_root(lambda: self._record_epoch(figures), "loop"):
            again.saved(self.state.step)
        self.record.begin_epoch()
        self._commit()

    def _record_epoch(self, figures: Figures) -> bool:
        """Do rank 0's part of an epoch's end, and return whether there is a checkpoint of it."""
        epochs, weights = self.state.epochs, self.replica.weights()
        state.check_finite(weights, self.state.step)
        self.record.write_epoch(figures, weights, self.data.training.order(epochs - 1))
        save_due = is_due(epochs, self.recipe.run.checkpoint_every) or epochs == self.recipe.epochs
        if save_due:
            self._write_checkpoint()
        return save_due

    def _commit(self) -> None:
        """Keep what the other ranks go on from when one is lost after this."""
        if self.commits:
            self.commits.commit_run(self.state, self.replica)

    def _write_checkpoint(self) -> Path:
        """Write the state. Rank 0 only."""
        return state.save(self.state, self.replica, self.run_dir, self.recipe, self.epoch)

    def _save(self) -> str:
        """Let rank 0 write the state, and return the file. If its disk is full, all ranks stop."""
        path = collectives.on_root(lambda: str(self._write_checkpoint()), "loop")
        again.saved(self.state.step)
        return path

    def _leave(self) -> NoReturn:
        """Save, and end the run on all ranks."""
        path = self._save()
        raise Preempted(
            f"told to leave after step {self.state.step}: the state is in {path}, and --resume "
            "goes on from there",
            everywhere=True,
        )
