"""Compares runs by their digests: `python -m recipe.fingerprint RUN…`, also of two people's runs.

For each run it prints two lines. The first has the digests of its recipe, of its examples' order,
of the first minibatch's images (as they entered the network) and of the initial weights. The second
has those of the weights after each epoch, with their norm after the last.

On the same ranks and one kind of processor, with --config.run.deterministic, all are equal.
Elsewhere sums are rounded otherwise: the weights' digests then differ, and the norms agree in their
first digits. Where two runs part and were on processors of other kinds, that is said.
"""

import zlib
from pathlib import Path
from typing import NamedTuple

from recipe import cli, config
from recipe.errors import UsageError
from recipe.run import runlog

DIGITS = 8  # hexadecimal, of each digest


class Digests(NamedTuple):
    """What identifies a run and its results; each digest has DIGITS digits."""

    inputs: dict[str, str]  # by what it is of, such as "order"
    weights: dict[int, str]  # after each epoch
    norm: float  # of the weights after the last epoch
    processors: list[str]  # the kinds that it ran on; empty where they aren't known


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise UsageError(
            "name one run directory or more, such as runs/mine; each is compared with the first"
        )
    runs = {folder: read_digests(Path(folder)) for folder in argv}
    for folder, digests in runs.items():
        _print_digests(folder, digests)
    first, *others = runs
    for other in others:
        print(f"{other} and {first}: {compare(runs[first], runs[other])}")


def read_digests(run_dir: Path) -> Digests:
    """Return the digests of a run. Raise UsageError when it was not written by recipe.train."""
    # What the run wrote of itself.
    recipe = runlog.read_recipe(run_dir)
    epochs = runlog.read_epochs(run_dir)
    (start,) = runlog.read_lines(run_dir, "start") or [{}]

    # Its digests; an older or a foreign run lacks some.
    try:
        orders = " ".join(line["order"] for line in epochs)
        inputs = {
            "recipe": config.fingerprint(recipe)[:DIGITS],
            "order": f"{zlib.crc32(orders.encode()):08x}",
            "first images": start["first_images"],
            "initial weights": start["initial_weights"][:DIGITS],
        }
        weights = {line["epoch"]: line["weights"][:DIGITS] for line in epochs}
        return Digests(inputs, weights, epochs[-1]["norm"], runlog.read_processors(run_dir))
    except KeyError as error:
        raise UsageError(
            f"{run_dir / runlog.METRICS} has no {error}: it was not written by recipe.train"
        )


def compare(first: Digests, other: Digests) -> str:
    """Return one sentence: where two runs part."""
    # The same inputs?
    same_length = first.weights.keys() == other.weights.keys()
    for name in first.inputs:
        # The order's digest covers only the epochs run so far.
        is_comparable = name != "order" or same_length
        if is_comparable and first.inputs[name] != other.inputs[name]:
            return f"another {name}"

    # The same weights, epoch by epoch?
    common_epochs = [epoch for epoch in first.weights if epoch in other.weights]
    for epoch in common_epochs:
        if first.weights[epoch] != other.weights[epoch]:
            difference = abs(first.norm - other.norm) / max(first.norm, other.norm)
            return (
                f"other weights from epoch {epoch} on; the last norms differ by {difference:.1e}"
                f"{_processors_sentence(first.processors, other.processors)}"
            )
    return f"the same to the bit, up to epoch {common_epochs[-1]}"


def _processors_sentence(first: list[str], other: list[str]) -> str:
    """Return what the runs' processors explain; "" where they are the same, or not known."""
    if first == other or not (first and other):
        return ""
    return (
        f"; they ran on other processors ({', '.join(first)}; {', '.join(other)}), "
        "whose libraries round otherwise"
    )


def _print_digests(folder: str, digests: Digests) -> None:
    inputs = "  ".join(f"{name} {digest}" for name, digest in digests.inputs.items())
    weights = ", ".join(f"{epoch} {digest}" for epoch, digest in digests.weights.items())
    print(f"{folder}: {inputs}")
    print(f"  weights after epoch {weights}  norm {digests.norm:.7g}")


if __name__ == "__main__":
    cli.run(main)
