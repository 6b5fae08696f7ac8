"""The input pipeline against its peers: `python -m recipe.data.benchmark [REPEATS]` (default: 3).

All make training batches from the same JPEGs, made for this: noise with the spectrum, size and weight of ImageNet's
photographs. Each runs in a process of its own on all cores, in turns. Printed as median and range over the repeats:
images per second of processor time, images/s, seconds to the first batch once its packages are imported, KB read an
image (0: from memory or mapped files), peak memory of all its processes. The floor is libjpeg-turbo decoding the same
crops from memory, nothing around it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from recipe import cli
from recipe.data.benchmark.contender import BATCH, CONTENDERS, CORES, IMAGES, SIZE
from recipe.errors import RunError, UsageError
from recipe.system import noise, ticking

TARGETS = {
    "floor": 0.85,
    "tf.data-float32": 1.4,
    "dali-cpu": 1.0,
    "ffcv": 1.0,
}  # ours by theirs, at least


def main(argv: list[str]) -> None:
    if argv and (not argv[0].isdecimal() or int(argv[0]) == 0):
        raise UsageError(f"{argv[0]} is no number of repeats: give 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        with noise.filtered():
            from recipe.data.benchmark import photos
        with ticking.ticking("making the photos"):
            sizes = photos.make(Path(folder))
        print(
            f"{len(sizes)} JPEGs of {statistics.mean(sizes) / 1e3:.0f} KB to {SIZE}², batches of {BATCH}, {IMAGES} "
            f"images after a warm-up, {CORES} cores; median (range)",
            flush=True,
        )
        found: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
        repeats = int(argv[0]) if argv else 3
        for repeat in range(repeats):
            for name in CONTENDERS:
                with ticking.ticking(f"measuring {name}, repeat {repeat + 1} of {repeats}"):
                    found[name].append(measured(name, folder))
    for name, runs in found.items():
        print(f"{name:17} {line(runs)}")
    for name, target in TARGETS.items():
        if "cpu" in found[name][0]:
            ratios = [
                ours["cpu"] / theirs["cpu"]
                for ours, theirs in zip(found["ours"], found[name], strict=True)
            ]
            print(
                f"ours by {name}, per second of processor time: {spread(ratios, 2)}; target {target}"
            )


def measured(name: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "recipe.data.benchmark.contender", name, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def line(runs: list[dict]) -> str:
    """What was measured of one contender."""
    if missing := runs[0].get("missing"):
        return f"left out: {missing} is not installed"
    kinds = {
        "cpu": ("images/cpu s", 1, 0),
        "wall": ("images/s", 1, 0),
        "first": ("s to the first batch", 1, 2),
    }
    kinds |= {"read": ("KB read", 1e-3, 0), "memory": ("MB", 1e-6, 0)}
    parts = [
        f"{spread([run[kind] * scale for run in runs], digits)} {unit}"
        for kind, (unit, scale, digits) in kinds.items()
    ]
    return "  ".join(parts)


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    cli.run(main)
