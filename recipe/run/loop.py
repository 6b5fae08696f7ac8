"""The training loop of all frameworks: steps, figures, evaluation, checkpoints, preemption."""

import contextlib
import functools
import math
import socket
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recipe import config
from recipe.config import Recipe
from recipe.data import decode
from recipe.data.pipeline import replaced, train_batches
from recipe.data.sources import open_source, prepare
from recipe.data.work import telling
from recipe.errors import Preempted, RunError, UsageError
from recipe.frameworks.replica import Replica
from recipe.ranks import collectives, elastic
from recipe.ranks.preemption import Notice
from recipe.rules import sharding
from recipe.rules.sums import Sums
from recipe.run import checkpoint, runlog
from recipe.run import state as standing
from recipe.run.commits import Commits
from recipe.run.evaluation import Sources, evaluate
from recipe.run.progress import Progress
from recipe.run.state import Standing
from recipe.system import again, output, owner, watchdog
from recipe.system.arrays import digest
from recipe.system.processor import processor

WAITS = (
    0.05  # share of the time spent waiting for images above which the run's end advises what to do
)

MakeReplica = Callable[[Recipe, int], Replica]  # of a recipe and the number of classes


def train(
    recipe: Recipe,
    run_dir: Path,
    resume: str,
    make_replica: MakeReplica,
    notice: Notice,
    commits: Commits | None = None,
) -> list[float]:
    """Runs the recipe on all ranks; collective. Returns the top-1 error of each evaluated epoch, oldest first.

    `resume`: "no", "yes", or "force", which takes up another recipe's state; `commits`, in an elastic run, comes before
    what is on disk. Raises UsageError, RunError or, when a
    rank's `notice` tells it to leave, Preempted, on every rank."""
    check_recipe(recipe)
    check_size(recipe)
    prepare_data(recipe)
    with (
        watchdog.patience(recipe.run.step_timeout),
        telling("opening the data and building the network"),
    ):
        sources = open_data(recipe)
        replica = make_replica(recipe, sources[0].num_classes)
    with owned(recipe, run_dir, resume, commits), watchdog.patience(recipe.run.step_timeout):
        stands = begin(recipe, run_dir, resume, replica, len(sources[0]), commits)
        again.saved(stands.step)
        if stands.epochs >= recipe.epochs:  # more, after --resume=force
            return stands.errors
        return Loop(recipe, run_dir, replica, sources, stands, commits).run(notice)


@contextlib.contextmanager
def owned(recipe: Recipe, run_dir: Path, resume: str, commits: Commits | None) -> Iterator[None]:
    """Makes the run directory this run's alone, held by rank 0. Collective."""
    with contextlib.ExitStack() as held:

        def own() -> None:
            goes_on = commits is not None and commits.stands is not None
            if not goes_on:
                runlog.check_run(run_dir, recipe, resume)  # before anything is made there
            held.enter_context(runlog.owned(run_dir))

        timeout = recipe.run.step_timeout
        with watchdog.patience(timeout and max(timeout, owner.LONGEST)):
            collectives.on_root(own, "owned")
        yield


def begin(
    recipe: Recipe,
    run_dir: Path,
    resume: str,
    replica: Replica,
    examples: int,
    commits: Commits | None,
) -> Standing:
    """Where the run stands, and its state on rank 0's replica. Collective."""
    steps = sharding.steps_per_epoch(examples, recipe.k, recipe.n, recipe.data.remainder)
    ranks = collectives.gather((socket.gethostname(), processor()), "ranks")

    def begun() -> Standing:
        if commits and commits.stands:
            output.warn(f"on {len(ranks)} ranks now, going on after step {commits.stands.step}")
            return commits.taken_up(replica)
        runlog.check_run(
            run_dir, recipe, resume
        )  # once more, for another process may have written there before this
        stands = Standing()
        if resume != "no":
            stands = standing.restore(replica, run_dir, recipe, examples, steps, resume == "force")
        runlog.begin_run(run_dir, recipe, ranks)
        output.say(
            f"run directory: {run_dir}"
            + (f", going on after step {stands.step}" if stands.step else "")
        )
        return stands

    return collectives.on_root(begun, "begun")


def evaluate_run(recipe: Recipe, run_dir: Path, make_replica: MakeReplica) -> Sums:
    """Evaluates the newest whole checkpoint of a run, on any number of ranks. Collective."""
    check_recipe(recipe)
    recipe = replace(
        recipe, run=replace(recipe.run, workers_at_once=1)
    )  # with precise BN ranks may share k unevenly
    prepare_data(recipe)
    with watchdog.patience(recipe.run.step_timeout):
        sources = open_data(recipe)
        replica = make_replica(recipe, sources[0].num_classes)
        epochs = restore(replica, run_dir)
        replica.begin(steps=1)
        with telling("evaluating"):
            sums = evaluate(recipe, replica, sources, epochs)
        check_evaluation(sums, epochs)
        return sums


def restore(replica: Replica, run_dir: Path) -> int:
    """The newest whole checkpoint on rank 0's replica: the epochs it had finished. Collective."""

    def restored() -> int:
        found = checkpoint.newest(run_dir / runlog.CHECKPOINTS, output.warn)
        if found is None:
            raise RunError(f"{run_dir / runlog.CHECKPOINTS} holds no checkpoint")
        replica.restore(found[0])
        return found[1]["epochs"]

    return collectives.on_root(restored, "restore")


def check_evaluation(sums: Sums, epochs: int) -> None:
    """Raises RunError when the weights are no good. All ranks have the same sums, and raise it together."""
    if not math.isfinite(sums.loss):
        raise RunError(
            f"the evaluation's loss is {sums.mean_loss} after {epochs} epochs: training has diverged; lower "
            "config.optimizer.base_rate or lengthen config.schedule.warmup_epochs",
            everywhere=True,
        )


def prepare_data(recipe: Recipe) -> None:
    """Rank 0 prepares the examples where they are not, which may take hours: nobody watches. Collective."""
    collectives.on_root(lambda: prepare(recipe.data), "prepare")


def open_data(recipe: Recipe) -> Sources:
    """The training and the evaluation examples. Collective."""
    sources = collectives.agreed(
        lambda: (
            open_source(recipe.data, "train", recipe.seed),
            open_source(recipe.data, "eval", recipe.seed),
        ),
        "open_data",
    )
    check_data(sources)
    watchdog.beat("the opening of the data")
    return sources


def check_data(sources: Sources) -> None:
    """Raises RunError when a rank has other data; says when one decodes slowly. Collective."""
    mine = [(len(source), source.num_classes) for source in sources], decode.why_slow()
    found = collectives.gather(mine, "data")
    for rank, (shape, _) in enumerate(found):
        if shape != found[0][0]:
            raise RunError(
                f"rank {rank} has other data than rank 0: (examples, classes) {shape} instead of {found[0][0]} for "
                "training and evaluation: copy the data to its host again",
                everywhere=True,
            )
    slow = [f"rank {rank}: {why}" for rank, (_, why) in enumerate(found) if why]
    if slow and collectives.rank() == 0:
        output.warn(slow[0])


def check_recipe(recipe: Recipe) -> None:
    """Raises UsageError when a rank has another recipe, from another copy of its file, say: the ranks would wait for
    each other, or train on other examples without a word. The data's folders may differ. Collective."""
    mine = {
        name: value for name, value in config.flatten(recipe).items() if name not in config.FOLDERS
    }
    first, *others = collectives.gather(mine, "recipe")
    for rank, theirs in enumerate(others, 1):
        if theirs != first:
            different = [
                f"config.{n}={v} instead of {first.get(n)}"
                for n, v in theirs.items()
                if v != first.get(n)
            ]
            raise UsageError(
                f"rank {rank} has another recipe than rank 0: {', '.join(different)}; give all ranks the same command "
                "and the same files",
                everywhere=True,
            )


def check_size(recipe: Recipe) -> None:
    """Raises UsageError when the ranks can't share the k workers."""
    if elastic.wanted() and collectives.size() <= recipe.k and recipe.run.workers_at_once == 1:
        return  # ranks come and go: some may play one worker more than others
    sharding.check_size(recipe.k, collectives.size(), recipe.run.workers_at_once)


class Loop:
    """One run. Its methods are collective: all ranks call them, in the same order."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        replica: Replica,
        sources: Sources,
        stands: Standing,
        commits: Commits | None,
    ) -> None:
        self.recipe, self.run_dir, self.replica, self.sources, self.stands = (
            recipe,
            run_dir,
            replica,
            sources,
            stands,
        )
        self.commits = commits
        self.examples = len(sources[0])
        self.steps = sharding.steps_per_epoch(
            self.examples, recipe.k, recipe.n, recipe.data.remainder
        )
        self.workers = sharding.own_workers(recipe.k, collectives.rank(), collectives.size())
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: sharding.permutation(
                self.examples, recipe.seed, epoch, recipe.data.shuffle_block
            )
        )
        self._pending: Callable[[], tuple] | None = None  # gives the last step's figures
        self._first_images: list[
            int
        ] = []  # checksums of what this rank's workers see in the run's first step
        self._since_epoch, self._since_line, self._timed = Speed(), Speed(), False
        self._waits: list[
            float
        ] = []  # for each epoch the share of its time that a rank waited for images, the longest
        root = collectives.rank() == 0
        self.log = runlog.RunLog(run_dir, stands.step, stands.epochs) if root else None
        self.progress = (
            Progress(recipe.epochs * self.steps, self.steps, stands.step) if root else None
        )

    def run(self, notice: Notice) -> list[float]:
        """To the recipe's end: the top-1 error of each evaluated epoch."""
        elements = self._seen(
            iter(train_batches(self.sources[0], self.recipe, self.workers, self.stands.step))
        )
        self.replica.begin(self.steps)
        watchdog.beat("the first step's beginning")
        if self.stands.step == 0:
            self._initial_weights = digest(self.replica.weights())
        try:
            self._commit()
            while self.stands.epochs < self.recipe.epochs:
                if self.stands.step == (self.stands.epochs + 1) * self.steps:
                    self._end_epoch()
                elif self._step(elements, notice.received):
                    self._leave()
            self.replica.end()
            self._tell_waits()
            self._tell_replaced()
        finally:
            if self.log:
                self.log.close()
                self.progress.close()
        return self.stands.errors

    def _step(self, elements: Iterator[tuple], stop: bool) -> bool:
        """One step; true when the ranks have agreed to leave after it.

        Its figures are read when the next step is under way, so that a GPU is never idle; before anything depends on
        them, at once."""
        figures = self.replica.step(*divmod(self.stands.step, self.steps), elements, stop)
        stop = self._settle()
        self._pending = figures
        self.stands.step += 1
        run = self.recipe.run
        line_due, save_due, epoch_ends, commit_due = (
            every > 0 and self.stands.step % every == 0
            for every in (
                run.log_every,
                run.checkpoint_steps,
                self.steps,
                run.commit_steps if self.commits else 0,
            )
        )
        if stop or line_due or save_due or epoch_ends or commit_due:
            stop = self._settle() or stop
        if self.stands.step == 1:
            self._write_start()
        if line_due:
            self._write_line()
        if save_due and not epoch_ends and not stop:
            self._on_root(self._save)
            again.saved(self.stands.step)
        if commit_due and not epoch_ends and not stop:
            self._commit()
        return stop

    def _settle(self) -> bool:
        """Waits for the figures of the last step, if they weren't read yet; true when a rank wants to leave."""
        if self._pending is None:
            return False
        losses, hits, stop = self._pending()
        self._pending = None
        step = self.stands.step - 1
        watchdog.beat(f"step {step + 1} of {self.recipe.epochs * self.steps}")
        self._check_finite(losses, step)
        count = sharding.minibatch(self.examples, step % self.steps, self.recipe.k, self.recipe.n)
        sums = Sums(float(losses.sum(dtype=np.float64)), float(hits.sum(dtype=np.float64)), count)
        self.stands.epoch += sums
        self.stands.line += sums
        self._since_epoch.examples += count
        self._since_line.examples += count
        if self.progress:
            self.progress.step(step + 1)
        if not self._timed:  # the first step, with all that is made ready in it, counts in no speed
            self._timed, self._since_epoch, self._since_line = True, Speed(), Speed()
        return stop

    def _check_finite(self, losses: np.ndarray, step: int) -> None:
        """All ranks have the same losses, and stop here together."""
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad) == 0:
            return
        worker, epoch = int(bad[0]), step // self.steps
        examples = sharding.worker_indices(
            self._order(epoch), step % self.steps, worker, self.recipe.k, self.recipe.n
        ).tolist()
        raise RunError(
            f"the loss is {losses[worker]} at step {step + 1}, in epoch {epoch}, on worker {worker}"
            + (f" and {len(bad) - 1} others" if len(bad) > 1 else "")
            + ": training has diverged (lower config.optimizer.base_rate or lengthen config.schedule.warmup_epochs) or "
            f"the worker's batch is bad: the training examples {', '.join(map(str, examples))}",
            everywhere=True,
        )

    def _seen(self, elements: Iterator[tuple]) -> Iterator[tuple]:
        """The elements, and how long they were waited for; remembers the run's first, for the reproduction report."""
        while True:
            began = time.monotonic()
            element = next(elements, None)
            self._since_epoch.waited += time.monotonic() - began
            if element is None:
                return
            if self.stands.step == 0:
                workers = np.split(element[0], self.recipe.run.workers_at_once)
                self._first_images += [
                    zlib.crc32(np.ascontiguousarray(images)) for images in workers
                ]
            yield element

    def _write_start(self) -> None:
        images = np.concatenate(collectives.gather(self._first_images, "first_images")).astype(
            np.int64
        )
        if self.log:
            digests = {
                "first_images": f"{zlib.crc32(images):08x}",
                "initial_weights": self._initial_weights,
            }
            self.log.write("start", 0, digests)

    def _write_line(self) -> None:
        figures = {
            "epoch": self.stands.step / self.steps,
            **self._figures(self.stands.line, self._since_line),
        }
        self.stands.line, self._since_line = Sums(), Speed()
        self._on_root(lambda: self.log.write("step", self.stands.step, figures))
        if self.progress:
            self.progress.line(self.stands.step, figures)

    def _figures(self, sums: Sums, speed: "Speed") -> dict[str, float | None]:
        return {
            "loss": sums.mean_loss,
            "error": sums.error,
            "rate": self.replica.rate(),
            "images_per_second": speed.per_second(),
        }

    def _end_epoch(self) -> None:
        """Evaluates, writes the figures and the checkpoint, and begins the next epoch."""
        self.stands.epochs += 1
        figures = {
            "epoch": self.stands.epochs,
            **self._figures(self.stands.epoch, self._since_epoch),
        }
        self._waits.append(max(collectives.gather(self._since_epoch.share_waited(), "waits")))
        figures["data_wait"] = self._waits[-1]
        if self._evaluation_due():
            self._doing(f"the evaluation after epoch {self.stands.epochs}")
            sums = evaluate(self.recipe, self.replica, self.sources, self.stands.epochs)
            check_evaluation(sums, self.stands.epochs)
            self.stands.errors.append(sums.error)
            figures |= {
                "eval_loss": sums.mean_loss,
                "eval_error": sums.error,
                "eval_examples": int(sums.count),
            }
        self.stands.epoch = Sums()
        self._doing(f"the record of epoch {self.stands.epochs}")
        if self._on_root(lambda: self._record(figures)):
            again.saved(self.stands.step)
        self._since_epoch, self._since_line = Speed(), Speed()
        self._commit()

    def _commit(self) -> None:
        """What the other ranks go on from when one is lost after this."""
        if self.commits:
            self.commits.commit_run(self.stands, self.replica)

    def _tell_waits(self) -> None:
        """Whether the images were the bottleneck: all ranks wait for the one that gets its last."""
        if self.progress:
            share = statistics.median(self._waits)
            advice = ": docs/data.md says what makes them faster" if share > WAITS else ""
            self.progress.say(
                f"images: {share:.1%} of the time of a step was spent waiting for them{advice}"
            )

    def _tell_replaced(self) -> None:
        """How many different training images were bad, on all ranks."""
        if self.recipe.data.bad_images == "replace":
            names = set().union(*collectives.gather(replaced, "replaced"))
            if self.progress and names:
                self.progress.say(
                    f"images: {len(names)} could not be decoded, and others took their place"
                )

    def _evaluation_due(self) -> bool:
        """The result is the median of the last five epochs, so that these always count."""
        finished = self.stands.epochs
        return finished % self.recipe.run.eval_every == 0 or finished > self.recipe.epochs - 5

    def _doing(self, what: str) -> None:
        """For the progress of long work beside the steps."""
        if self.progress:
            self.progress.doing(what)

    def _record(self, figures: dict[str, Any]) -> bool:
        """Rank 0's part of an epoch's end; whether there is a checkpoint of it."""
        finished, weights = self.stands.epochs, self.replica.weights()
        standing.check_finite(weights, self.stands.step)
        digests = {
            "order": f"{zlib.crc32(self._order(finished - 1)):08x}",
            "weights": digest(weights),
        }
        self.log.write("epoch", self.stands.step, figures | digests | {"norm": norm(weights)})
        evaluated = (
            f"  evaluation error {figures['eval_error']:.2%}" if "eval_error" in figures else ""
        )
        self.progress.say(
            f"epoch {finished} of {self.recipe.epochs}: training error {figures['error']:.2%}{evaluated}  "
            + (f"{speed:,.0f} images/s" if (speed := figures["images_per_second"]) else "")
        )
        due = finished == self.recipe.epochs or finished % self.recipe.run.checkpoint_every == 0
        if due:
            self._save()
        return due

    def _save(self) -> str:
        return str(
            standing.save(
                self.stands, self.replica, self.run_dir, self.recipe, self.examples, self.steps
            )
        )

    def _leave(self) -> None:
        """Saves, and ends the run on all ranks."""
        path = self._on_root(self._save)
        again.saved(self.stands.step)
        raise Preempted(
            f"told to leave after step {self.stands.step}: the state is in {path}, and --resume goes on from there",
            everywhere=True,
        )

    def _on_root(self, action: Callable[[], Any]) -> Any:
        """Rank 0 writes something; if it can't, its disk full, all ranks hear of it and stop."""
        return collectives.on_root(action, "loop")


class Speed:
    """Examples per second since it was made, and the share of the time that was spent waiting for their images."""

    def __init__(self) -> None:
        self.examples, self.waited, self._began = 0, 0.0, time.monotonic()

    def per_second(self) -> float | None:
        """None before there are any."""
        return self.examples / (time.monotonic() - self._began) if self.examples else None

    def share_waited(self) -> float:
        return self.waited / max(time.monotonic() - self._began, 1e-9)


def norm(weights: dict[str, np.ndarray]) -> float:
    """The Euclidean norm of all weights: it tells a difference of rounding from a real one, as no digest can."""
    return math.sqrt(sum(float(np.square(w, dtype=np.float64).sum()) for w in weights.values()))
