"""Reports runs as the paper does: `python -m recipe.report RUN…` prints errors, draws curves."""

import statistics
from pathlib import Path

from recipe import cli
from recipe.errors import RunError, UsageError
from recipe.rules.sums import final_error
from recipe.run import runlog

PICTURE = "report.png"  # written into the first run's directory


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise UsageError(
            "name one run directory or more, such as runs/quick-*; several are reported as mean ± "
            "std"
        )
    runs = {folder: runlog.read_epochs(Path(folder)) for folder in argv}
    results = [_print_run(folder, epochs) for folder, epochs in runs.items()]
    if len(results) > 1:
        print(
            f"{len(results)} runs: {statistics.mean(results):.2%} ± {statistics.stdev(results):.2%}"
        )
    picture = Path(argv[0]) / PICTURE
    try:
        print(f"curves: {draw(runs, picture)}")
    except OSError as error:
        raise RunError(
            f"{picture} can't be written: {error.strerror}; name a run directory first that can be"
        ) from None


def draw(runs: dict[str, list[dict]], path: Path) -> Path:
    """Training and evaluation error and η by epoch, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (error, rate) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 6), height_ratios=(3, 1), layout="constrained"
    )
    for folder, epochs in runs.items():
        name = Path(folder).name
        (line,) = error.plot(
            *_series(epochs, "error"), linestyle="--", linewidth=1, label=f"{name}, training"
        )
        error.plot(
            *_series(epochs, "eval_error"), color=line.get_color(), label=f"{name}, evaluation"
        )
        rate.plot(*_series(epochs, "rate"), color=line.get_color())
    error.set(ylabel="top-1 error, %", ylim=(0, None))
    error.legend(fontsize="small")
    rate.set(xlabel="epoch", ylabel="η at the epoch's end", yscale="log")
    for axes in (error, rate):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _print_run(folder: str, epochs: list[dict]) -> float:
    errors = [line["eval_error"] for line in epochs if line.get("eval_error") is not None]
    if not errors:
        raise UsageError(f"{folder} has no evaluated epoch yet")
    speeds = [line["images_per_second"] for line in epochs if line.get("images_per_second")]
    speed = f"; {statistics.median(speeds):,.0f} images/s" if speeds else ""
    print(
        f"{folder}: top-1 error {final_error(errors):.2%}, median of the last {len(errors[-5:])} "
        "of "
        f"{len(epochs)} epochs{speed}"
    )
    return final_error(errors)


def _series(epochs: list[dict], name: str) -> tuple[list[float], list[float]]:
    scale = 100 if name.endswith("error") else 1
    points = [(line["epoch"], scale * line[name]) for line in epochs if line.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


if __name__ == "__main__":
    cli.run(main)
