"""Decides where a run begins: anew, or from a checkpoint; then carries it out.

`decide` only reads the run directory. `carry_out` changes it.
"""

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe import config
from recipe.config import Recipe
from recipe.errors import UsageError
from recipe.frameworks.replica import Replica
from recipe.rules.epoch import Epoch
from recipe.run import checkpoint, runlog, state
from recipe.run.state import RunState
from recipe.system.arrays import Arrays
from recipe.system.output import warn


class Mode(enum.StrEnum):
    """Whether a run may continue one that is there."""

    NO = "no"
    YES = "yes"
    FORCE = "force"  # also with another recipe, other data, or where its checkpoints are gone


@dataclass(frozen=True)
class Plan:
    """Where a run begins."""

    state: RunState = field(default_factory=RunState)  # step 0 for a new run
    arrays: Arrays | None = None  # of the checkpoint whose state the replica takes over
    set_aside: tuple[Path, ...] = ()  # newer checkpoints, damaged
    save_again: bool = False  # as this recipe's: all checkpoints that are there are another's


def decide(run_dir: Path, recipe: Recipe, epoch: Epoch, mode: Mode) -> Plan:
    """Return where a run begins, by what lies in its directory. One rank.

    Without a checkpoint the run begins anew. Raise UsageError when the directory can't be this
    run's or, unless forced, when the state is another recipe's, of other data or gone; RunError
    when all checkpoints are damaged.
    """
    # Find the newest checkpoint that is whole.
    check_directory(run_dir, recipe, mode)
    if mode is Mode.NO:
        return Plan()
    folder = run_dir / runlog.CHECKPOINTS
    newest = checkpoint.newest(folder, warn)
    if newest is None:
        if mode is not Mode.FORCE:
            check_progress(run_dir)
        warn(f"{folder} holds no checkpoint: the run begins at step 0")
        return Plan()

    # Is it the state of this recipe on these data?
    meta = newest.meta
    if mode is not Mode.FORCE:
        _refuse_other_recipe(meta["recipe"], recipe, run_dir)
        _refuse_other_data(meta["examples"], recipe, epoch, run_dir)
    _warn_of_other_versions(meta["versions"])

    # Newer checkpoints are damaged: set them aside. That of another recipe is saved again, as
    # this one's.
    paths = checkpoint.checkpoints(folder)
    newer = (path for path in paths if checkpoint.step_of(path) > meta["step"])
    is_own = (meta["fingerprint"], meta["examples"]) == (config.fingerprint(recipe), epoch.examples)
    run_state = RunState.from_meta(meta, _step(meta, epoch))
    return Plan(run_state, newest.arrays, tuple(newer), save_again=not is_own)


def carry_out(
    plan: Plan, replica: Replica, run_dir: Path, recipe: Recipe, epoch: Epoch
) -> RunState:
    """Bring this rank's replica and the run's checkpoints to where the plan says. One rank."""
    if plan.arrays is None:
        return plan.state
    replica.restore(plan.arrays)
    checkpoint.set_aside(plan.set_aside)
    if plan.save_again:
        own = state.save(plan.state, replica, run_dir, recipe, epoch)
        paths = checkpoint.checkpoints(run_dir / runlog.CHECKPOINTS)
        checkpoint.set_aside([path for path in paths if path != own])
    return plan.state


def check_directory(run_dir: Path, recipe: Recipe, mode: Mode) -> None:
    """Make sure that a run may be written into the directory, and change nothing. One rank.

    Raise UsageError when the directory holds a run already and `mode` is NO, holds another recipe's
    and it isn't FORCE, holds none to resume, or can't be a run directory.
    """
    # Look what is there.
    try:
        for folder in (run_dir, run_dir / runlog.CHECKPOINTS):
            _check_folder(folder)
        remains = []
        if runlog.exists(run_dir / runlog.METRICS):
            remains.append(runlog.METRICS)
        if checkpoint.checkpoints(run_dir / runlog.CHECKPOINTS):
            remains.append(runlog.CHECKPOINTS)
        holds_run = runlog.exists(run_dir / runlog.CONFIG)
    except OSError as error:
        raise UsageError(
            f"--run_dir={run_dir} can't be used: {error.strerror}; name another directory"
        )

    # A run is resumed only where the user asks for it, and only the same one.
    if holds_run and mode is Mode.NO:
        raise UsageError(
            f"--run_dir={run_dir} holds a run already; add --resume or choose another directory"
        )
    if holds_run and mode is Mode.YES:
        _refuse_other_recipe(config.identity(runlog.read_recipe(run_dir)), recipe, run_dir)

    # Without a run nothing of one may be there, and nothing can be resumed.
    if not holds_run and remains:
        raise UsageError(
            f"--run_dir={run_dir} holds {' and '.join(remains)} of a run, and its {runlog.CONFIG} "
            "is missing: "
            "bring that back, or choose another directory"
        )
    if not holds_run and mode is not Mode.NO:
        raise UsageError(
            f"--run_dir={run_dir} holds no run to resume; leave --resume out to start one"
        )


def _check_folder(path: Path) -> None:
    """Raise UsageError when something is there that is no folder."""
    if runlog.exists(path) and not path.is_dir():
        kind = "a link that leads to no folder" if path.is_symlink() else "a file and no folder"
        raise UsageError(
            f"{path} is {kind}: mend it or take it away, or name another directory with --run_dir"
        )


def _refuse_other_recipe(old: dict[str, Any], recipe: Recipe, run_dir: Path) -> None:
    """Raise UsageError, naming the fields, when `old` is the identity of another recipe."""
    if changes := config.differences(old, config.identity(recipe)):
        raise UsageError(
            f"--run_dir={run_dir} was started with another recipe: {changes}; resume with the old "
            "values, or with "
            "--resume=force"
        )


def _refuse_other_data(examples: int, recipe: Recipe, epoch: Epoch, run_dir: Path) -> None:
    if examples != epoch.examples:
        raise UsageError(
            f"--run_dir={run_dir} was trained on {examples} examples, and config.data.name="
            f"{recipe.data.name!r} has {epoch.examples} now; bring back the old data, or "
            "--resume=force"
        )


def _warn_of_other_versions(old: dict[str, str]) -> None:
    new = runlog.versions()
    changes = [
        f"{name} {new.get(name)} (was {old.get(name)})"
        for name in new | old
        if new.get(name) != old.get(name)
    ]
    if changes:
        warn(f"resuming with other versions, which may round differently: {', '.join(changes)}")


def _step(meta: dict[str, Any], epoch: Epoch) -> int:
    """Return the step to go on from. By force an epoch may have another number of steps now."""
    old_steps = meta["steps_per_epoch"]
    inside = meta["step"] - meta["epochs"] * old_steps
    if inside and epoch.steps != old_steps:
        raise UsageError(
            f"the newest checkpoint is {inside} steps into an epoch of {old_steps} steps, which "
            "the changed recipe "
            f"divides into {epoch.steps}: resume from a checkpoint at an epoch's end (delete the "
            "newer ones)"
        )
    return meta["epochs"] * epoch.steps + inside


def check_progress(run_dir: Path) -> None:
    """Raise UsageError when the figures of a run without checkpoints say that it had some."""
    # A run may well have no checkpoint yet.
    has_no_figures = not runlog.exists(run_dir / runlog.METRICS)
    if has_no_figures or checkpoint.unfinished(run_dir / runlog.CHECKPOINTS):
        return  # ended before the first one, or while it was written

    # By their figures, should there be checkpoints?
    recipe = runlog.read_recipe(run_dir)
    epochs, steps = runlog.read_lines(run_dir, "epoch"), runlog.read_lines(run_dir, "step")
    if _saved_at_epoch(recipe, epochs) or _saved_at_step(recipe.run.checkpoint_steps, steps):
        progress = f"{len(epochs)} finished epochs" if epochs else f"{steps[-1]['step']} steps"
        raise UsageError(
            f"--run_dir={run_dir}: its {runlog.METRICS} has {progress}, and its "
            f"{runlog.CHECKPOINTS}/ holds no "
            "checkpoint to go on from: bring the checkpoints back, or begin at step 0 in another "
            "directory, or here "
            "with --resume=force"
        )


def _saved_at_epoch(recipe: Recipe, lines: list[dict[str, Any]]) -> bool:
    """Return whether a run with these lines of epochs has had a checkpoint at the end of one."""
    every = recipe.run.checkpoint_every
    finished = [line.get("epoch", 0) for line in lines]
    return any(epoch == recipe.epochs or epoch % every == 0 for epoch in finished)


def _saved_at_step(every: int, lines: list[dict[str, Any]]) -> bool:
    """Return whether a run with these lines has had a checkpoint within an epoch."""
    if not every or not lines or not lines[-1].get("epoch"):
        return False
    steps_per_epoch = round(lines[-1]["step"] / lines[-1]["epoch"])
    return any(step % steps_per_epoch for step in range(every, lines[-1]["step"], every))
