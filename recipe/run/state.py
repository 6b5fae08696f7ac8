"""The state of a run: kept in its checkpoints and taken over from them, on any number of ranks."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recipe import config
from recipe.config import Recipe
from recipe.errors import RunError
from recipe.frameworks.replica import Replica
from recipe.rules.epoch import Epoch
from recipe.rules.sums import Sums
from recipe.run import checkpoint, runlog
from recipe.system.arrays import Arrays


@dataclass
class RunState:
    """All that a run's future depends on, beside the replica's arrays and the recipe."""

    step: int = 0  # updates done
    epochs: int = 0  # epochs evaluated and recorded
    epoch_sums: Sums = field(default_factory=Sums)  # over the examples since the epoch began
    line_sums: Sums = field(default_factory=Sums)  # over those since the last line of figures
    errors: list[float] = field(default_factory=list)  # top-1 error of each evaluated epoch

    def to_meta(self) -> dict[str, Any]:
        """Return the state as it is written in a checkpoint's description."""
        return {
            "step": self.step,
            "epochs": self.epochs,
            "epoch": asdict(self.epoch_sums),
            "line": asdict(self.line_sums),
            "errors": self.errors,
        }

    @classmethod
    def from_meta(cls, meta: dict[str, Any], step: int) -> "RunState":
        """Return the state that a checkpoint describes, but with `step` of the present recipe."""
        return cls(
            step=step,
            epochs=meta["epochs"],
            epoch_sums=Sums(**meta["epoch"]),
            line_sums=Sums(**meta["line"]),
            errors=meta["errors"],
        )


def save(state: RunState, replica: Replica, run_dir: Path, recipe: Recipe, epoch: Epoch) -> Path:
    """Write the checkpoint of a run. One rank.

    Raise RunError when the state is not finite or the disk is full. The older checkpoints are then
    untouched.
    """
    # A state that is not finite is worth nothing.
    arrays = replica.arrays()
    check_finite(arrays, state.step)
    meta = state.to_meta() | {
        "seed": recipe.seed,
        "recipe": config.identity(recipe),
        "fingerprint": config.fingerprint(recipe),
        "examples": epoch.examples,
        "steps_per_epoch": epoch.steps,
        "versions": runlog.versions(),
    }

    # Beside the newest ones some are kept for good.
    return checkpoint.save(
        run_dir / runlog.CHECKPOINTS,
        state.step,
        arrays,
        meta,
        keep=recipe.run.keep_checkpoints,
        keep_every=recipe.run.keep_every * epoch.steps,
    )


def check_finite(arrays: Arrays, step: int) -> None:
    """Raise RunError when a state isn't worth keeping."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RunError(
                f"{name} has values that are no finite numbers after step {step}: training has "
                "diverged, and this "
                "state is not kept; lower config.optimizer.base_rate or lengthen "
                "config.schedule.warmup_epochs"
            )
