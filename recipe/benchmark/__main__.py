"""Native PyTorch and Keras here against their peers: `python -m recipe.benchmark [REPEATS]` (default: 3).

Each contender trains the same small network on the same images on 1 and 2 ranks of this machine, one core a rank, all
in turns. Prints, as median and range over the repeats: images/s of a rank, seconds from the launch to the end of the
first step, and the weak-scaling efficiency: what a rank of two does of what one alone does.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recipe import cli
from recipe.benchmark.contender import BATCH, CONTENDERS, STEPS
from recipe.data.sources import prepare
from recipe.errors import RunError

WARMUP = 5  # steps that don't count
RUNS = [(name, size) for size in (1, 2) for name in CONTENDERS if (name, size) != ("keras-fit", 2)]
PROGRAM = ["-m", "recipe.benchmark.contender"]


def main(argv: list[str]) -> None:
    prepare(cli.load_recipe("quick").data)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {run: [] for run in RUNS}
    for _ in range(int(argv[0]) if argv else 3):
        for name, size in RUNS:
            found[name, size].append(measured(name, size))
    print(f"{BATCH} images per rank and step, {STEPS - WARMUP} steps after {WARMUP}, one core per rank; median (range)")
    for (name, size), pairs in found.items():
        speeds, starts = zip(*pairs, strict=True)
        print(
            f"{name:12} {size} ranks  images/s per rank {spread(speeds, 0):22} first step after {spread(starts, 1)} s"
        )
    for name in CONTENDERS:
        if (name, 2) in found:
            pairs = zip(found[name, 1], found[name, 2], strict=True)
            print(f"{name:12} weak scaling 1 → 2 {spread([two[0] / one[0] for one, two in pairs], 3)}")


def measured(name: str, size: int) -> tuple[float, float]:
    """(images/s per rank, seconds from the launch to the end of the first step) of one run."""
    with tempfile.TemporaryDirectory() as folder:
        result, began = Path(folder) / "times.json", time.time()
        arguments = [*PROGRAM, name, str(size), str(result)]
        jobs = [subprocess.Popen(command, env=os.environ | extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                for command, extra in commands(name, size, arguments)]  # fmt: skip
        printed = [job.communicate(timeout=300)[0].decode() for job in jobs]
        if any(job.returncode for job in jobs):
            raise RunError(f"{name} on {size} ranks failed: {printed[0][-2000:]}")
        times = json.loads(result.read_text())
    return BATCH * (STEPS - WARMUP) / (times[-1] - times[WARMUP - 1]), times[0] - began


def commands(name: str, size: int, arguments: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """The processes to start, each with what its environment lacks, as the contender's users would."""
    if name.endswith("here"):
        launcher = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        mpirun = [launcher, "-np", str(size), "--oversubscribe", "--bind-to", "none"]
        return [([*mpirun, sys.executable, *arguments], {})]
    if name == "torch-ddp":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        return [([*torchrun, *arguments], {})]
    if name == "tf-mirrored":
        workers = [f"localhost:{free_port()}" for _ in range(size)]
        tasks = [{"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}} for rank in range(size)]
        return [([sys.executable, *arguments], {"TF_CONFIG": json.dumps(task), "BENCHMARK_RANK": str(rank)})
                for rank, task in enumerate(tasks)]  # fmt: skip
    return [([sys.executable, *arguments], {})]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    cli.run(main)
