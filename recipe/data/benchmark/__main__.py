"""The input pipeline against its peers: `python -m recipe.data.benchmark [REPEATS]` (default: 3).

All make training batches from the same JPEGs, made for this: noise with the spectrum, size and
weight of ImageNet's photographs. Each runs in a process of its own on all cores, in turns. Printed
as median and range over the repeats: images per second of processor time, images/s, seconds to the
first batch once its packages are imported, KB read an image (0: from memory or mapped files), peak
memory of all its processes. The floor is libjpeg-turbo decoding the same crops from memory, nothing
around it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from recipe import cli
from recipe.data.benchmark.contender import CONTENDERS, Measurement
from recipe.data.benchmark.settings import BATCH, CORES, IMAGES, SIZE
from recipe.errors import RunError, UsageError
from recipe.system import noise, ticking

# Ours by theirs, per second of processor time, at least.
TARGETS = {"floor": 0.85, "tf.data-float32": 1.4, "dali-cpu": 1.0, "ffcv": 1.0}


class Column(NamedTuple):
    """How a field of the measurements is printed."""

    field: str
    unit: str
    digits: int
    scale: float = 1


COLUMNS = (
    Column("cpu", "images/cpu s", 0),
    Column("wall", "images/s", 0),
    Column("first", "s to the first batch", 2),
    Column("read", "KB read", 0, 1e-3),
    Column("memory", "MB", 0, 1e-6),
)


@dataclass(frozen=True)
class Missing:
    """What a contender lacks."""

    package: str


def main(argv: list[str]) -> None:
    """Run the benchmark, and print a line for each contender and each target."""
    # Measure all contenders on the same photos.
    if argv and (not argv[0].isdecimal() or int(argv[0]) == 0):
        raise UsageError(f"{argv[0]} is no number of repeats: give 1 or more")
    repeats = int(argv[0]) if argv else 3
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder))
        runs = measure_all(folder, repeats)

    # A line for each contender.
    measured: dict[str, list[Measurement]] = {}
    for name, results in runs.items():
        first = results[0]
        measured[name] = [result for result in results if isinstance(result, Measurement)]
        text = missing_line(first) if isinstance(first, Missing) else line(measured[name])
        print(f"{name:17} {text}")

    # A line for each target.
    for name, target in TARGETS.items():
        if measured[name]:
            print(target_line(name, measured["ours"], measured[name], target))


def make_photos(folder: Path) -> None:
    """Make the photos, and say what they are."""
    with noise.filtered():
        from recipe.data.benchmark import photos
    with ticking.ticking("making the photos"):
        sizes = photos.make(folder)
    print(
        f"{len(sizes)} JPEGs of {statistics.mean(sizes) / 1e3:.0f} KB to {SIZE}², batches of "
        f"{BATCH}, {IMAGES} images after a warm-up, {CORES} cores; median (range)",
        flush=True,
    )


def measure_all(folder: str, repeats: int) -> dict[str, list[Measurement | Missing]]:
    """Measure all contenders in turns, so many times."""
    runs: dict[str, list[Measurement | Missing]] = {name: [] for name in CONTENDERS}
    for repeat in range(1, repeats + 1):
        for name in CONTENDERS:
            with ticking.ticking(f"measuring {name}, repeat {repeat} of {repeats}"):
                runs[name].append(measure(name, folder))
    return runs


def measure(name: str, folder: str) -> Measurement | Missing:
    """Measure one contender in a process of its own. Raise RunError when it fails."""
    command = [sys.executable, "-m", "recipe.data.benchmark.contender", name, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{name} failed: {done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return Missing(**result) if "package" in result else Measurement(**result)


def line(runs: list[Measurement]) -> str:
    """Return what was measured of one contender."""
    parts = []
    for column in COLUMNS:
        values = [getattr(run, column.field) * column.scale for run in runs]
        parts.append(f"{spread(values, column.digits)} {column.unit}")
    return "  ".join(parts)


def missing_line(missing: Missing) -> str:
    """Return why a contender wasn't measured."""
    return f"left out: {missing.package} is not installed"


def target_line(
    name: str, ours: list[Measurement], theirs: list[Measurement], target: float
) -> str:
    """Return how ours compares with a contender."""
    ratios = [own.cpu / other.cpu for own, other in zip(ours, theirs, strict=True)]
    return f"ours by {name}, per second of processor time: {spread(ratios, 2)}; target {target}"


def spread(values: list[float], digits: int) -> str:
    """Return the median and the range of values."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    cli.run(main)
