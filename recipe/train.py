"""Trains a recipe, as in `mpirun -np 2 python -m recipe.train --config=quick`.

--config names a preset of recipe/configs or a run's config.json; --config.SECTION.FIELD=VALUE
changes one field: --config.k=4 --config.optimizer.base_rate=0.05
"--config.schedule.decay_epochs=(8,9)". recipe/config.py explains all.
"""

import shlex
import time
from pathlib import Path

from absl import flags

from recipe import cli, config
from recipe.config import Recipe
from recipe.ranks import preemption
from recipe.system import again, noise, watchdog
from recipe.system.progress import telling

VALUES = flags.FlagValues()
flags.DEFINE_string(
    "run_dir", "", "where the run is recorded; runs/PRESET-DATE when empty", flag_values=VALUES
)
flags.DEFINE_enum(
    "resume",
    "no",
    ["no", "yes", "force"],
    "continue the run in --run_dir after its last checkpoint; --resume=force: though the recipe "
    "has changed",
    flag_values=VALUES,
)


def main(argv: list[str]) -> None:
    recipe, name, others = cli.parse_recipe(argv)
    fields = [f"config.{field}" for field in config.flatten(recipe)]
    cli.parse_flags(
        VALUES, ["--resume=yes" if other == "--resume" else other for other in others], fields
    )
    with preemption.noticed() as notice:
        train(
            recipe, VALUES.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}", argv, notice
        )


def train(recipe: Recipe, run_dir: str, arguments: list[str], notice: preemption.Notice) -> None:
    """Train on all ranks, and say how it ended. Collective."""
    # The frameworks are loaded here: a wrong command line is refused at once.
    with noise.filtered():
        from recipe.frameworks.replica import load_framework
        from recipe.ranks import collectives, elastic
        from recipe.rules import sums
        from recipe.run import training
        from recipe.run.commits import Commits
        from recipe.run.resume import Mode

        framework = load_framework(recipe.framework)

    # Ranks that join an elastic run wait for the next commit.
    patience = 0.0 if elastic.wanted() else recipe.run.step_timeout
    with watchdog.patience(patience), telling("waiting for all ranks"):
        framework.start(recipe.run.deterministic)

    # An elastic run is tried again whenever ranks come or go.
    mode, make_replica = Mode(VALUES.resume), framework.make_replica
    if elastic.wanted():

        def attempt(commits: Commits) -> list[float]:
            again.begun(commits.run_dir, arguments)
            folder = Path(commits.run_dir)
            return training.train(recipe, folder, mode, make_replica, notice, commits)

        # The ranks that stay go on from the last commit.
        commits = Commits(run_dir)
        errors = elastic.rerun(attempt, commits)
        run_dir = commits.run_dir  # rank 0's
    else:
        run_dir = collectives.broadcast(run_dir, "run_dir")
        again.begun(run_dir, arguments)
        errors = training.train(recipe, Path(run_dir), mode, make_replica, notice)

    # How it ended.
    if collectives.rank() == 0:
        median, last = sums.final_error(errors), len(errors[-5:])
        print(f"top-1 error {median:.2%} (median of the last {last} epochs) in {run_dir}")
        print(f"curves: python -m recipe.report {shlex.quote(run_dir)}")


if __name__ == "__main__":
    cli.run(main, VALUES)
