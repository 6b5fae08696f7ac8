"""Prints a run's top-1 error, by any number of ranks: `python -m recipe.evaluate --run_dir=RUN`."""

from pathlib import Path

from absl import flags

from recipe import cli
from recipe.errors import UsageError
from recipe.run import runlog
from recipe.system import noise, watchdog

VALUES = flags.FlagValues()
flags.DEFINE_string("run_dir", "", "a run directory of recipe.train", flag_values=VALUES)


def main(argv: list[str]) -> None:
    # The run's own recipe says what to evaluate, and how.
    cli.parse_flags(VALUES, argv)
    if not VALUES.run_dir:
        raise UsageError("--run_dir is missing: name a run directory of recipe.train")
    run_dir = Path(VALUES.run_dir)
    recipe = runlog.read_recipe(run_dir)

    # Load the framework only now: a wrong command line is refused at once.
    with noise.filtered():
        from recipe.frameworks.replica import load_framework
        from recipe.ranks import collectives
        from recipe.run import training

        framework = load_framework(recipe.framework)

    # Evaluate on all ranks; one prints.
    with watchdog.patience(recipe.run.step_timeout):
        framework.start(recipe.run.deterministic)
    sums = training.evaluate_run(recipe, run_dir, framework.make_replica)
    if collectives.rank() == 0:
        print(f"top-1 error {sums.error:.2%}  loss {sums.mean_loss:.4f}  examples {sums.count:.0f}")


if __name__ == "__main__":
    cli.run(main, VALUES)
