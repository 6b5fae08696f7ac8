"""Opens what a run needs, then trains or evaluates. All functions are collective."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from recipe.config import Recipe
from recipe.data.prepare.builders import prepare
from recipe.data.sources import open_source
from recipe.errors import RunError
from recipe.frameworks.replica import Replica
from recipe.ranks import collectives
from recipe.ranks.preemption import Notice
from recipe.rules.epoch import Epoch
from recipe.rules.sums import Sums
from recipe.run import checkpoint, resume, runlog
from recipe.run.checks import Sources, check_data, check_evaluation, check_recipe, check_size
from recipe.run.commits import Commits
from recipe.run.evaluation import RunData, evaluate
from recipe.run.loop import Loop
from recipe.run.runlog import RankHost
from recipe.run.state import RunState
from recipe.system import again, output, owner, watchdog
from recipe.system.processor import processor
from recipe.system.progress import telling

MakeReplica = Callable[[Recipe, int], Replica]  # of a recipe and the number of classes


def train(
    recipe: Recipe,
    run_dir: Path,
    mode: resume.Mode,
    make_replica: MakeReplica,
    notice: Notice,
    commits: Commits | None = None,
) -> list[float]:
    """Run the recipe, and return the top-1 error of each evaluated epoch, oldest first. Collective.

    In an elastic run, `commits` takes precedence over checkpoints on disk. Raise UsageError,
    RunError or, when a rank's `notice` tells it to leave, Preempted, on every rank.
    """
    # Check what the user asks for, then open it.
    check_recipe(recipe)
    check_size(recipe)
    prepare_data(recipe)
    with (
        watchdog.patience(recipe.run.step_timeout),
        telling("opening the data and building the network"),
    ):
        sources = open_data(recipe)
        epoch = Epoch.of(recipe, len(sources.training))
        replica = make_replica(recipe, sources.training.num_classes)

    # Begin where the run directory says, or the last commit.
    with owned(recipe, run_dir, mode, commits), watchdog.patience(recipe.run.step_timeout):
        state = begin(recipe, run_dir, mode, replica, epoch, commits)
        again.saved(state.step)
        if state.epochs >= recipe.epochs:  # more, after --resume=force
            return state.errors
        data = RunData.of(recipe, sources)
        return Loop(recipe, run_dir, replica, data, state, commits).run(notice)


def evaluate_run(recipe: Recipe, run_dir: Path, make_replica: MakeReplica) -> Sums:
    """Evaluate the newest whole checkpoint of a run, on any number of ranks. Collective."""
    check_recipe(recipe)
    # With precise BN ranks may share k unevenly.
    recipe = replace(recipe, run=replace(recipe.run, workers_at_once=1))
    prepare_data(recipe)
    with watchdog.patience(recipe.run.step_timeout):
        sources = open_data(recipe)
        replica = make_replica(recipe, sources.training.num_classes)
        epochs = restore(replica, run_dir)
        replica.begin(steps=1)
        with telling("evaluating"):
            sums = evaluate(recipe, replica, RunData.of(recipe, sources), epochs)
        check_evaluation(sums, epochs)
        return sums


@contextlib.contextmanager
def owned(
    recipe: Recipe, run_dir: Path, mode: resume.Mode, commits: Commits | None
) -> Iterator[None]:
    """Make the run directory this run's alone, held by rank 0. Collective."""
    with contextlib.ExitStack() as stack:

        def own() -> None:
            goes_on = commits is not None and commits.state is not None
            if not goes_on:
                resume.check_directory(run_dir, recipe, mode)  # before anything is made there
            stack.enter_context(runlog.owned(run_dir))

        timeout = recipe.run.step_timeout
        with watchdog.patience(timeout and max(timeout, owner.LONGEST)):
            collectives.on_root(own, "owned")
        yield


def begin(
    recipe: Recipe,
    run_dir: Path,
    mode: resume.Mode,
    replica: Replica,
    epoch: Epoch,
    commits: Commits | None,
) -> RunState:
    """Return where the run begins, with that state on rank 0's replica. Collective."""
    # Rank 0 decides; the others get its state.
    hosts = collectives.gather(RankHost(socket.gethostname(), processor()), "ranks")

    def begin_on_root() -> RunState:
        # Ranks have come or gone: the last commit is newer than any checkpoint.
        if commits and commits.state:
            ranks, step = len(hosts), commits.state.step
            output.warn(f"on {ranks} ranks now, going on after step {step}")
            return commits.restore_run(replica)

        # A new run, or one that goes on from a checkpoint.
        plan = resume.decide(run_dir, recipe, epoch, mode)
        state = resume.carry_out(plan, replica, run_dir, recipe, epoch)
        runlog.begin_run(run_dir, recipe, hosts)
        place = f", going on after step {state.step}" if state.step else ""
        output.say(f"run directory: {run_dir}{place}")
        return state

    return collectives.on_root(begin_on_root, "begun")


def restore(replica: Replica, run_dir: Path) -> int:
    """Bring the newest checkpoint to rank 0's replica, and return its epochs. Collective."""

    def restore_on_root() -> int:
        newest = checkpoint.newest(run_dir / runlog.CHECKPOINTS, output.warn)
        if newest is None:
            raise RunError(f"{run_dir / runlog.CHECKPOINTS} holds no checkpoint")
        replica.restore(newest.arrays)
        return newest.meta["epochs"]

    return collectives.on_root(restore_on_root, "restore")


def prepare_data(recipe: Recipe) -> None:
    """Prepare the examples on rank 0, which may take hours: nobody watches. Collective."""
    collectives.on_root(lambda: prepare(recipe.data), "prepare")


def open_data(recipe: Recipe) -> Sources:
    """Open the training and the evaluation examples. Collective."""

    def open_both() -> Sources:
        return Sources(
            training=open_source(recipe.data, "train", recipe.seed),
            evaluation=open_source(recipe.data, "eval", recipe.seed),
        )

    sources = collectives.agreed(open_both, "open_data")
    check_data(sources)
    watchdog.beat("the opening of the data")
    return sources
