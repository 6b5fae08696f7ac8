"""Reports runs as the paper does: `python -m recipe.report RUN…` prints errors, draws curves."""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from recipe import cli
from recipe.errors import RunError, UsageError
from recipe.rules.sums import LAST_EPOCHS, final_error
from recipe.run import runlog

PICTURE = "report.png"  # written into the first run's directory


def main(argv: list[str]) -> None:
    # The results, one by one and together.
    if not argv or argv[0].startswith("-"):
        raise UsageError(
            "name one run directory or more, such as runs/quick-*; "
            "several are reported as mean ± std"
        )
    runs = {folder: runlog.read_epochs(Path(folder)) for folder in argv}
    results = [_print_run(folder, epochs) for folder, epochs in runs.items()]
    if len(results) > 1:
        mean, deviation = statistics.mean(results), statistics.stdev(results)
        print(f"{len(results)} runs: {mean:.2%} ± {deviation:.2%}")

    # The curves, beside the first run.
    picture = Path(argv[0]) / PICTURE
    try:
        print(f"curves: {draw(runs, picture)}")
    except OSError as error:
        raise RunError(
            f"{picture} can't be written: {error.strerror}; name a run directory first that can be"
        ) from None


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Draw training and evaluation error and η by epoch, a line a run; return the path."""
    # Without a display.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Two pictures, one above the other, with the same epochs.
    figure, (error_axes, rate_axes) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 6), height_ratios=(3, 1), layout="constrained"
    )

    # The curves of a run have one colour.
    for folder, epochs in runs.items():
        name = Path(folder).name
        training = _curve(epochs, "error", scale=100)
        (line,) = error_axes.plot(*training, linestyle="--", linewidth=1, label=f"{name}, training")
        color = line.get_color()
        evaluation = _curve(epochs, "eval_error", scale=100)
        error_axes.plot(*evaluation, color=color, label=f"{name}, evaluation")
        rate_axes.plot(*_curve(epochs, "rate"), color=color)

    # Describe the axes.
    error_axes.set(ylabel="top-1 error, %", ylim=(0, None))
    error_axes.legend(fontsize="small")
    rate_axes.set(xlabel="epoch", ylabel="η at the epoch's end", yscale="log")
    for axes in (error_axes, rate_axes):
        axes.grid(alpha=0.3)

    # Write the picture, and free its memory.
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _print_run(folder: str, epochs: list[dict[str, Any]]) -> float:
    """Print a run's result and its speed; return the result."""
    errors = [line["eval_error"] for line in epochs if line.get("eval_error") is not None]
    if not errors:
        raise UsageError(f"{folder} has no evaluated epoch yet")
    result = final_error(errors)
    last_errors = errors[-LAST_EPOCHS:]
    speeds = [line["images_per_second"] for line in epochs if line.get("images_per_second")]
    speed = f"; {statistics.median(speeds):,.0f} images/s" if speeds else ""
    print(
        f"{folder}: top-1 error {result:.2%}, median of the last {len(last_errors)} of "
        f"{len(epochs)} epochs{speed}"
    )
    return result


class _Curve(NamedTuple):
    epochs: list[float]
    values: list[float]


def _curve(epochs: list[dict[str, Any]], name: str, scale: float = 1) -> _Curve:
    """Return the curve of a figure, over the epochs that have it."""
    lines = [line for line in epochs if line.get(name) is not None]
    values = [scale * line[name] for line in lines]
    return _Curve([line["epoch"] for line in lines], values)


if __name__ == "__main__":
    cli.run(main)
