"""Compares runs by their digests: `python -m recipe.fingerprint RUN…`, also of two people on two clusters.

For each run two lines: the digests of its recipe, of its examples' order, of the first minibatch's
images (as they entered the network) and of the initial weights; and those of the weights after each
epoch, with their norm after the last. On the same ranks and one kind of processor, with
--config.run.deterministic, all are equal. Elsewhere sums are rounded otherwise: the weights'
digests then differ, and the norms agree in their first digits. Where two runs part and were on
processors of other kinds, that is said.
"""

import zlib
from pathlib import Path
from typing import Any

from recipe import cli, config
from recipe.errors import UsageError
from recipe.run import runlog

DIGITS = 8  # hexadecimal, of each digest
PART = "other weights"  # how the sentence begins where runs part


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise UsageError(
            "name one run directory or more, such as runs/mine; each is compared with the first"
        )
    runs = {folder: digests(Path(folder)) for folder in argv}
    for folder, (given, weights, norm) in runs.items():
        print(f"{folder}: " + "  ".join(f"{name} {digest}" for name, digest in given.items()))
        print(
            f"  weights after epoch {', '.join(f'{e} {d}' for e, d in weights.items())}  norm "
            f"{norm:.7g}"
        )
    first, *others = runs
    for other in others:
        found = compared(runs[first], runs[other])
        found += processors(Path(first), Path(other)) if found.startswith(PART) else ""
        print(f"{other} and {first}: {found}")


def digests(run_dir: Path) -> tuple[dict[str, str], dict[int, str], float]:
    """(what was given to a run, its weights after each epoch, their last norm), as digests of DIGITS digits."""
    recipe = runlog.read_recipe(run_dir)
    epochs = runlog.read_epochs(run_dir)
    (start,) = runlog.read_lines(run_dir, "start") or [{}]
    try:
        given = {
            "recipe": config.fingerprint(recipe)[:DIGITS],
            "order": f"{zlib.crc32(' '.join(line['order'] for line in epochs).encode()):08x}",
            "first images": start["first_images"],
            "initial weights": start["initial_weights"][:DIGITS],
        }
        return (
            given,
            {line["epoch"]: line["weights"][:DIGITS] for line in epochs},
            epochs[-1]["norm"],
        )
    except KeyError as error:
        raise UsageError(
            f"{run_dir / runlog.METRICS} has no {error}: it was not written by recipe.train"
        )


def compared(one: tuple, other: tuple) -> str:
    """One sentence: where two runs part."""
    for name in one[0]:
        # Of the order there is as much as there are epochs.
        if one[0][name] != other[0][name] and (name != "order" or one[1].keys() == other[1].keys()):
            return f"another {name}"
    common = [epoch for epoch in one[1] if epoch in other[1]]
    for epoch in common:
        if one[1][epoch] != other[1][epoch]:
            return f"{PART} from epoch {epoch} on; the last norms differ by {_relative(one[2], other[2]):.1e}"
    return f"the same to the bit, up to epoch {common[-1]}"


def processors(first: Path, other: Path) -> str:
    """What the runs' processors have to do with it; empty where they are the same, or not known."""
    one, two = runlog.read_processors(first), runlog.read_processors(other)
    if one == two or not (one and two):
        return ""
    return f"; they ran on other processors ({', '.join(one)}; {', '.join(two)}), whose libraries round otherwise"


def _relative(one: Any, other: Any) -> float:
    return abs(one - other) / max(one, other)


if __name__ == "__main__":
    cli.run(main)
