"""Where a run stands: kept in its checkpoints and taken up from them, on any number of ranks."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recipe import config
from recipe.config import Recipe
from recipe.errors import RunError, UsageError
from recipe.frameworks.replica import Replica
from recipe.rules.sums import Sums
from recipe.run import checkpoint, runlog
from recipe.system.output import warn


@dataclass
class Standing:
    """All that a run's future depends on, beside the replica's arrays and the recipe."""

    step: int = 0  # updates done
    epochs: int = 0  # epochs evaluated and recorded
    epoch: Sums = field(default_factory=Sums)  # over the examples since the epoch began
    line: Sums = field(default_factory=Sums)  # over those since the last line of figures
    errors: list[float] = field(default_factory=list)  # top-1 error of each evaluated epoch


def save(
    standing: Standing, replica: Replica, run_dir: Path, recipe: Recipe, examples: int, steps: int
) -> Path:
    """Writes the checkpoint of a run with so many training examples and steps per epoch. One rank.

    Raises RunError when the disk is full, say; the older checkpoints are then untouched."""
    run, arrays = recipe.run, replica.arrays()
    check_finite(arrays, standing.step)
    meta = asdict(standing) | {
        "seed": recipe.seed,
        "recipe": config.identity(recipe),
        "fingerprint": config.fingerprint(recipe),
        "examples": examples,
        "steps_per_epoch": steps,
        "versions": runlog.versions(),
    }
    folder = run_dir / runlog.CHECKPOINTS
    return checkpoint.save(
        folder, standing.step, arrays, meta, run.keep_checkpoints, run.keep_every * steps
    )


def check_finite(arrays: dict[str, np.ndarray], step: int) -> None:
    """Raises RunError when a state isn't worth keeping."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RunError(
                f"{name} has values that are no finite numbers after step {step}: training has diverged, and this "
                "state is not kept; lower config.optimizer.base_rate or lengthen config.schedule.warmup_epochs"
            )


def restore(
    replica: Replica, run_dir: Path, recipe: Recipe, examples: int, steps: int, force: bool
) -> Standing:
    """Takes up the newest whole checkpoint, on this rank; a run that never had one begins anew.

    Newer ones, damaged, are set aside; with `force` all that are another recipe's, once the state is saved as this
    one's. Raises UsageError when the state is another recipe's, of other data or gone, unless `force`; RunError when
    all checkpoints are damaged."""
    folder = run_dir / runlog.CHECKPOINTS
    found = checkpoint.newest(folder, warn)
    if found is None:
        if not force:
            runlog.check_progress(run_dir)
        warn(f"{folder} holds no checkpoint: the run begins at step 0")
        return Standing()
    arrays, meta = found
    if not force:
        runlog.refuse_another(meta["recipe"], recipe, run_dir)
        if meta["examples"] != examples:
            raise UsageError(
                f"--run_dir={run_dir} was trained on {meta['examples']} examples, and config.data.name="
                f"{recipe.data.name!r} has {examples} now; bring back the old data, or --resume=force"
            )
    _compare_versions(meta["versions"])
    stands = Standing(
        step=_step(meta, steps),
        epochs=meta["epochs"],
        epoch=Sums(**meta["epoch"]),
        line=Sums(**meta["line"]),
        errors=meta["errors"],
    )
    replica.restore(arrays)
    checkpoint.set_aside(
        [path for path in checkpoint.checkpoints(folder) if checkpoint.step_of(path) > meta["step"]]
    )
    if (meta["fingerprint"], meta["examples"]) != (config.fingerprint(recipe), examples):
        mine = save(stands, replica, run_dir, recipe, examples, steps)
        checkpoint.set_aside([path for path in checkpoint.checkpoints(folder) if path != mine])
    return stands


def _compare_versions(old: dict[str, str]) -> None:
    new = runlog.versions()
    changed = [
        f"{name} {new.get(name)} (was {old.get(name)})"
        for name in new | old
        if new.get(name) != old.get(name)
    ]
    if changed:
        warn(f"resuming with other versions, which may round differently: {', '.join(changed)}")


def _step(meta: dict[str, Any], steps: int) -> int:
    """The step to go on from. After --resume=force an epoch may have another number of steps than it had."""
    inside = meta["step"] - meta["epochs"] * meta["steps_per_epoch"]
    if inside and steps != meta["steps_per_epoch"]:
        raise UsageError(
            f"the newest checkpoint is {inside} steps into an epoch of {meta['steps_per_epoch']} steps, which the "
            f"changed recipe divides into {steps}: resume from a checkpoint at an epoch's end (delete the newer ones)"
        )
    return meta["epochs"] * steps + inside
