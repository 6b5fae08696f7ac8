"""PyTorch and Keras here beside their peers: `python -m recipe.benchmark [REPEATS] [CONTENDER …]`.

By default three repeats of all but the last three. Each contender (torch-here, torch-ddp,
keras-here, keras-fit, tf-mirrored, and keras-torch-here, keras-torch-fit, keras-wrapped,
keras-overlap, keras-parallel on Keras's PyTorch backend) trains the same small network on the same
images on 1 and 2 ranks of this machine, one core a rank, all in turns. The last three are on the
coming Keras: recipe.keras in `fit`, the same with overlap=True, and Keras's own DataParallel.
Prints medians over the repeats and their range:

- images/s of a rank, the seconds from the launch to the end of the first step, and the most memory
  of rank 0;
- ours to the peer's speed, within each repeat;
- weak scaling: what a rank of two does of what one alone does. It is the product of what the
  machine keeps (two alone, side by side, share its caches and memory) and what working together
  keeps;
- whether the machine was too busy: a fixed computation on both cores, before and after each.

`python -m recipe.benchmark --gpu [PART] [--json=FILE] [--device=cpu]` measures ResNet-50 on one GPU
instead, on PyTorch alone, beside a plain loop and the step of Keras's `fit`. PART is 1 (native
PyTorch) or 2 (Keras on PyTorch, memory), by default both. Each ends within 9 minutes and names the
rows that it has not reached. FILE, by default gpu.json, gets all results. --device=cpu is a
rehearsal without a GPU: it runs each row in a tiny size, and its figures mean nothing.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recipe import cli
from recipe.benchmark import gpu
from recipe.benchmark.contender import BATCH, CONTENDERS, STEPS
from recipe.errors import RunError, UsageError
from recipe.ranks import launched
from recipe.system import noise, processor, ticking

WARMUP = 5  # steps that don't count


class Goal(NamedTuple):
    """What one of ours is compared with, and the ratio of speeds to reach."""

    peer: str
    target: float


# Of each of ours, by the number of ranks.
PEERS = {
    "torch-here": {1: Goal("torch-ddp", 1.0), 2: Goal("torch-ddp", 1.0)},
    "keras-here": {1: Goal("keras-fit", 1.25), 2: Goal("tf-mirrored", 1.2)},
    "keras-torch-here": {1: Goal("keras-torch-fit", 1.25)},
    "keras-wrapped": {2: Goal("keras-parallel", 1.1)},
    "keras-overlap": {2: Goal("keras-parallel", 1.1)},
}
ONE_PROCESS = ("keras-fit", "keras-torch-fit")  # contenders that know one rank only
# These run when they are named only, on the coming Keras, where tests/coming-keras puts it.
ON_COMING_KERAS = ("keras-wrapped", "keras-overlap", "keras-parallel")
ON_PYTORCH = ("keras-torch-here", "keras-torch-fit", *ON_COMING_KERAS)
COMING_KERAS = Path(__file__).parents[2] / ".cache/coming-keras"
SCALING_TARGET = 0.97
BUSY = 1.2  # the longest to the shortest time of the fixed computation, on a machine at rest
PATIENCE = 300  # seconds for the steps of one contender
PROGRAM = ["-m", "recipe.benchmark.contender"]


class Entry(NamedTuple):
    """What is measured: a contender on so many ranks, or copies of one rank side by side."""

    name: str
    ranks: int
    copies: int = 1

    def __str__(self) -> str:
        how = "2 alone" if self.copies > 1 else ranks_in_words(self.ranks)
        return f"{self.name:16} {how:8}"


class Measurement(NamedTuple):
    """What one repeat of an entry has shown."""

    speed: float  # images/s of a rank
    start: float  # seconds from the launch to the end of the first step
    memory: float  # MB, the most that rank 0 had


class Process(NamedTuple):
    """A process to start."""

    command: list[str]
    environment: dict[str, str]  # what it needs beside ours


Measurements = dict[Entry, list[Measurement]]  # of each repeat


def main(argv: list[str]) -> None:
    # A GPU is another program's: it needs neither TensorFlow nor a second core.
    if argv[:1] == ["--gpu"]:
        gpu.main(argv[1:])
        return

    # Prepare the images before anything is timed.
    repeats = argv[0] if argv else "3"
    names = argv[1:] or [name for name in CONTENDERS if name not in ON_COMING_KERAS]
    check(repeats, names)
    with noise.filtered():
        from recipe.data.prepare.builders import prepare

        prepare(cli.load_recipe("quick").data)

    # Measure in turns: what disturbs the machine disturbs all.
    measurements: Measurements = {entry: [] for entry in entries(names)}
    print(
        f"{BATCH} images per rank and step, {STEPS - WARMUP} steps after {WARMUP}, "
        f"one core per rank; median (range); {processor.processor()}",
        flush=True,
    )
    total = int(repeats) * len(measurements)
    number = 0
    calm = [fixed_computation()]
    for _ in range(int(repeats)):
        for entry, of_entry in measurements.items():
            number += 1
            with ticking.ticking(f"measuring {str(entry).strip()}, {number} of {total}"):
                of_entry.append(measure(entry))
                calm.append(fixed_computation())
    report(measurements)
    print(calmness(calm))


def check(repeats: str, names: list[str]) -> None:
    """Raise UsageError for wrong arguments, or when there is one core only."""
    if not repeats.isdecimal() or int(repeats) == 0:
        raise UsageError(
            f"{repeats} is no number of repeats: "
            "give 1 or more, then the contenders' names, if not all"
        )
    if unknown := set(names) - set(CONTENDERS):
        raise UsageError(f"{min(unknown)} is no contender; there are {', '.join(CONTENDERS)}")
    if (coming := set(names) & set(ON_COMING_KERAS)) and not COMING_KERAS.exists():
        raise UsageError(f"{min(coming)} needs the coming Keras: tests/coming-keras installs it")
    if len(os.sched_getaffinity(0)) < 2:
        raise UsageError("this process may use one core only; two ranks with a core each need 2")


def entries(names: list[str]) -> list[Entry]:
    """Return what is measured, in an order in which those that are compared are neighbours."""
    alone = [Entry(name, 1) for name in names]
    together = [Entry(name, 2) for name in names if name not in ONE_PROCESS]
    side_by_side = [Entry(name, 1, copies=2) for name in names if name in PEERS]
    return [*alone, *together, *side_by_side]


def measure(entry: Entry) -> Measurement:
    """Run an entry once. Copies are measured while all of them run."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()

        # Start all copies at once, each on a core of its own.
        results = [Path(folder) / f"{copy}.json" for copy in range(entry.copies)]
        jobs = []
        for core, result in enumerate(results):
            arguments = [*PROGRAM, entry.name, str(entry.ranks), str(result)]
            jobs += [start(process) for process in processes(entry, core, arguments)]

        # A copy that failed has no times.
        printed = outputs(entry, jobs)
        for text, job in zip(printed, jobs, strict=True):
            if job.returncode:
                raise RunError(f"{entry} failed: {text[-2000:]}")
        written = [json.loads(result.read_text()) for result in results]
    times = [of_copy["ends"] for of_copy in written]
    first_steps = [ends[0] for ends in times]
    memory = max(of_copy["memory"] for of_copy in written) / 1e6
    return Measurement(speed(times), max(first_steps) - began, memory)


def start(process: Process) -> subprocess.Popen:
    return subprocess.Popen(
        process.command,
        env=os.environ | process.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def outputs(entry: Entry, jobs: list[subprocess.Popen]) -> list[str]:
    """Return what each job prints until it ends. None of them outlives this.

    Raise RunError when they don't end in PATIENCE seconds.
    """
    try:
        return [job.communicate(timeout=PATIENCE)[0].decode() for job in jobs]
    except subprocess.TimeoutExpired:
        raise RunError(f"{entry} has not ended after {PATIENCE} s") from None
    finally:
        for job in jobs:
            job.terminate()


def speed(times: list[list[float]]) -> float:
    """Return the mean images/s of copies over the time that they have in common.

    `times` are the ends of each copy's steps. Raise RunError when they have too little in common.
    """
    begin = max(ends[WARMUP - 1] for ends in times)
    end = min(ends[-1] for ends in times)
    speeds = []
    for ends in times:
        common = [moment for moment in ends if begin <= moment <= end]
        if len(common) < 3:
            raise RunError(
                "the copies did not run side by side: the machine is too busy to measure"
            )
        speeds.append(BATCH * (len(common) - 1) / (common[-1] - common[0]))
    return statistics.mean(speeds)


def fixed_computation() -> float:
    """Return the seconds that the same work takes on two cores at once, half a second at rest."""
    matrices = [np.full((400, 400), 0.5) for _ in range(2)]

    def work(matrix: np.ndarray) -> None:
        for _ in range(60):
            np.sin(matrix)
            np.sqrt(matrix).sum()

    with ThreadPoolExecutor(2) as cores:
        began = time.perf_counter()
        list(cores.map(work, matrices))
        return time.perf_counter() - began


def calmness(times: list[float]) -> str:
    """Say whether the machine had other work, by the times of the fixed computation."""
    ratio = max(times) / min(times)
    line = f"a fixed computation between them took up to {ratio:.2f} times its least time"
    if ratio <= BUSY:
        return f"{line}: the machine was at rest"
    return f"{line}: the machine was too busy to believe these figures"


def processes(entry: Entry, core: int, arguments: list[str]) -> list[Process]:
    """Return the processes of a copy, as the contender's users would start them."""
    core_variable = {"BENCHMARK_CORE": str(core)}
    if entry.name.startswith("keras"):
        backend = "torch" if entry.name in ON_PYTORCH else "tensorflow"
        core_variable["KERAS_BACKEND"] = backend
    if entry.name in ON_COMING_KERAS:
        folders = [str(COMING_KERAS), *filter(None, [os.environ.get("PYTHONPATH")])]
        core_variable["PYTHONPATH"] = os.pathsep.join(folders)

    # mpirun starts ours.
    if entry.name in PEERS:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        mpirun = shutil.which("mpirun", path=path) or "mpirun"
        options = ["-np", str(entry.ranks), "--oversubscribe", "--bind-to", "none"]
        command = [mpirun, *options, sys.executable, *arguments]
        return [Process(command, core_variable | launched.ANYWHERE)]

    # torchrun starts DistributedDataParallel, and Keras's way with it.
    if entry.name in ("torch-ddp", "keras-parallel"):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc-per-node={entry.ranks}", *arguments]
        return [Process(command, core_variable)]

    # The mirrored strategy wants a process with its own variables for each worker.
    if entry.name == "tf-mirrored":
        workers = [f"localhost:{free_port()}" for _ in range(entry.ranks)]
        return [
            Process([sys.executable, *arguments], core_variable | mirrored_variables(workers, rank))
            for rank in range(entry.ranks)
        ]
    return [Process([sys.executable, *arguments], core_variable)]


def mirrored_variables(workers: list[str], rank: int) -> dict[str, str]:
    """Return what TensorFlow's MultiWorkerMirroredStrategy finds its workers by."""
    config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}}
    return {"TF_CONFIG": json.dumps(config), "BENCHMARK_RANK": str(rank)}


def free_port() -> int:
    """Return a port of this host that nobody listens to now."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def report(measurements: Measurements) -> None:
    """Print the speeds of all entries, and the ratios of those that were measured."""
    # The speeds alone.
    speeds = {entry: [m.speed for m in of_entry] for entry, of_entry in measurements.items()}
    for entry, of_entry in measurements.items():
        starts = [m.start for m in of_entry]
        print(
            f"{entry} images/s per rank {spread(speeds[entry], 0):22} "
            f"first step after {spread(starts, 1)} s, "
            f"memory {spread([m.memory for m in of_entry], 0)} MB"
        )

    # Ours to its peers.
    for name, peers in PEERS.items():
        for ranks, goal in peers.items():
            title = f"{name} to {goal.peer}, {ranks_in_words(ranks)}"
            print_ratio(title, speeds, Entry(name, ranks), Entry(goal.peer, ranks), goal.target)

    # Two ranks to one, and what that is the product of.
    for name in CONTENDERS:
        one, two = Entry(name, 1), Entry(name, 2)
        side_by_side = Entry(name, 1, copies=2)
        target = SCALING_TARGET if name in PEERS else None
        print_ratio(f"{name}, weak scaling", speeds, two, one, target)
        print_ratio(f"{name}, kept by the machine", speeds, side_by_side, one)
        print_ratio(f"{name}, kept by working together", speeds, two, side_by_side)


def print_ratio(
    title: str,
    speeds: dict[Entry, list[float]],
    one: Entry,
    other: Entry,
    target: float | None = None,
) -> None:
    """Print the ratios of two speeds in each repeat, and a verdict, if both were measured."""
    if one not in speeds or other not in speeds:
        return
    ratios = [a / b for a, b in zip(speeds[one], speeds[other], strict=True)]
    ending = "" if target is None else verdict(ratios, target)
    print(f"{title:46} {spread(ratios, 3)}{ending}")


def verdict(values: list[float], target: float) -> str:
    """Say whether values reach a target, by their median."""
    if statistics.median(values) >= target:
        outcome = "reached"
    else:
        outcome = "within the spread" if max(values) >= target else "missed"
    return f"  target {target:g}: {outcome}"


def spread(values: list[float], digits: int) -> str:
    """Return the median and the range of values, with so many digits after the point."""
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def ranks_in_words(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


if __name__ == "__main__":
    cli.run(main)
