"""Native PyTorch and Keras here against their peers: `python -m recipe.benchmark [REPEATS] [CONTENDER …]`.

By default three repeats of all. Each contender (torch-here, torch-ddp, keras-here, keras-fit, tf-mirrored) trains the
same small network on the same images on 1 and 2 ranks of this machine, one core a rank, all in turns. Prints medians
over the repeats and their range:

- images/s of a rank, and the seconds from the launch to the end of the first step;
- ours to the peer's speed, within each repeat; the target is 1;
- weak scaling: what a rank of two does of what one alone does; the target is 0.95. It is the product of what the
  machine keeps (two alone, side by side, share its caches and memory) and what working together keeps.
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
from typing import NamedTuple

from recipe import cli
from recipe.benchmark.contender import BATCH, CONTENDERS, STEPS
from recipe.errors import RunError, UsageError
from recipe.ranks import launched
from recipe.system import noise, ticking

WARMUP = 5  # steps that don't count
PEERS = {
    "torch-here": ("torch-ddp", "torch-ddp"),
    "keras-here": ("keras-fit", "tf-mirrored"),
}  # on 1 and 2 ranks
PATIENCE = 300  # seconds for the steps of one contender
PROGRAM = ["-m", "recipe.benchmark.contender"]


class Entry(NamedTuple):
    """What is measured: a contender on so many ranks; or copies of one, side by side."""

    name: str
    ranks: int
    copies: int = 1

    def __str__(self) -> str:
        return f"{self.name:12} {'2 alone' if self.copies > 1 else f'{self.ranks} rank' + 's' * (self.ranks > 1):8}"


Found = dict[
    Entry, list[tuple[float, float]]
]  # images/s of a rank and seconds to the first step, of each repeat


def main(argv: list[str]) -> None:
    repeats, names = argv[0] if argv else "3", argv[1:] or list(CONTENDERS)
    check(repeats, names)
    with noise.filtered():
        from recipe.data.prepare.builders import prepare

        prepare(cli.load_recipe("quick").data)
    found: Found = {entry: [] for entry in entries(names)}
    print(
        f"{BATCH} images per rank and step, {STEPS - WARMUP} steps after {WARMUP}, one core per rank; median (range)",
        flush=True,
    )
    total, done = int(repeats) * len(found), 0
    for _ in range(int(repeats)):
        for entry, pairs in found.items():
            done += 1
            with ticking.ticking(f"measuring {str(entry).strip()}, {done} of {total}"):
                pairs.append(measured(entry))
    report(found)


def check(repeats: str, names: list[str]) -> None:
    """Raises UsageError."""
    if not repeats.isdecimal() or int(repeats) == 0:
        raise UsageError(
            f"{repeats} is no number of repeats: give 1 or more, then the contenders' names, if not all"
        )
    if unknown := set(names) - set(CONTENDERS):
        raise UsageError(f"{min(unknown)} is no contender; there are {', '.join(CONTENDERS)}")
    if len(os.sched_getaffinity(0)) < 2:
        raise UsageError("this process may use one core only; two ranks with a core each need 2")


def entries(names: list[str]) -> list[Entry]:
    """Those that are compared stand side by side."""
    several = [name for name in names if name != "keras-fit"]
    apart = [Entry(name, 1, copies=2) for name in names if name in PEERS]
    return [*(Entry(name, 1) for name in names), *(Entry(name, 2) for name in several), *apart]


def measured(entry: Entry) -> tuple[float, float]:
    """(images/s of a rank, seconds from the launch to the end of the first step); of copies, while all of them run."""
    with tempfile.TemporaryDirectory() as folder:
        began, results = (
            time.time(),
            [Path(folder) / f"{copy}.json" for copy in range(entry.copies)],
        )
        jobs = [
            subprocess.Popen(
                command, env=os.environ | extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for core, result in enumerate(results)
            for command, extra in commands(
                entry, core, [*PROGRAM, entry.name, str(entry.ranks), str(result)]
            )
        ]
        printed = outputs(entry, jobs)
        if failed := [text for text, job in zip(printed, jobs, strict=True) if job.returncode]:
            raise RunError(f"{entry} failed: {failed[0][-2000:]}")
        times = [json.loads(result.read_text()) for result in results]
    return speed(times), max(each[0] for each in times) - began


def outputs(entry: Entry, jobs: list[subprocess.Popen]) -> list[str]:
    """What the jobs print until they end; none of them outlives this."""
    try:
        return [job.communicate(timeout=PATIENCE)[0].decode() for job in jobs]
    except subprocess.TimeoutExpired:
        raise RunError(f"{entry} has not ended after {PATIENCE} s") from None
    finally:
        for job in jobs:
            job.terminate()


def speed(times: list[list[float]]) -> float:
    """Mean images/s of copies, from the ends of their steps, over the time that they have in common."""
    begin, end = max(each[WARMUP - 1] for each in times), min(each[-1] for each in times)
    common = [[t for t in each if begin <= t <= end] for each in times]
    if min(map(len, common)) < 3:
        raise RunError("the copies did not run side by side: the machine is too busy to measure")
    return statistics.mean(BATCH * (len(each) - 1) / (each[-1] - each[0]) for each in common)


def commands(
    entry: Entry, core: int, arguments: list[str]
) -> list[tuple[list[str], dict[str, str]]]:
    """The processes of a copy, each with what its environment lacks, as the contender's users would start them."""
    name, size, first = entry.name, entry.ranks, {"BENCHMARK_CORE": str(core)}
    if name in PEERS:
        launcher = shutil.which(
            "mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        )
        mpirun = [launcher, "-np", str(size), "--oversubscribe", "--bind-to", "none"]
        return [([*mpirun, sys.executable, *arguments], first | launched.ANYWHERE)]
    if name == "torch-ddp":
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={size}",
        ]
        return [([*torchrun, *arguments], first)]
    if name == "tf-mirrored":
        workers = [f"localhost:{free_port()}" for _ in range(size)]
        tasks = [
            {"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}}
            for rank in range(size)
        ]
        return [([sys.executable, *arguments], first | {"TF_CONFIG": json.dumps(task), "BENCHMARK_RANK": str(rank)})
                for rank, task in enumerate(tasks)]  # fmt: skip
    return [([sys.executable, *arguments], first)]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def report(found: Found) -> None:
    speeds = {entry: [speed for speed, _ in pairs] for entry, pairs in found.items()}
    for entry, pairs in found.items():
        starts = [start for _, start in pairs]
        print(
            f"{entry} images/s per rank {spread(speeds[entry], 0):22} first step after {spread(starts, 1)} s"
        )
    for name, peers in PEERS.items():
        for ranks, peer in enumerate(peers, 1):
            ratio(
                f"{name} to {peer}, {ranks} rank{'s' * (ranks > 1)}",
                speeds,
                Entry(name, ranks),
                Entry(peer, ranks),
                1,
            )
    for name in CONTENDERS:
        ratio(
            f"{name}, weak scaling",
            speeds,
            Entry(name, 2),
            Entry(name, 1),
            0.95 if name in PEERS else None,
        )
        apart = Entry(name, 1, copies=2)
        ratio(f"{name}, kept by the machine", speeds, apart, Entry(name, 1))
        ratio(f"{name}, kept by working together", speeds, Entry(name, 2), apart)


def ratio(
    title: str,
    speeds: dict[Entry, list[float]],
    one: Entry,
    other: Entry,
    target: float | None = None,
) -> None:
    """Prints the ratios of two speeds within each repeat, if both were measured, and how they stand to the target."""
    if one in speeds and other in speeds:
        values = [a / b for a, b in zip(speeds[one], speeds[other], strict=True)]
        print(f"{title:42} {spread(values, 3)}{'' if target is None else verdict(values, target)}")


def verdict(values: list[float], target: float) -> str:
    if statistics.median(values) >= target:
        return f"  target {target:g}: reached"
    return f"  target {target:g}: {'within the spread' if max(values) >= target else 'missed'}"


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    cli.run(main)
