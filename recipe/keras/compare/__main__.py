"""The table of what contenders do on two ranks: `python -m recipe.keras.compare [ROW …]`.

For each row it starts two processes of each contender. A cell says what happened: a hang is a time
limit, an error its first words, a number stands beside the right one.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recipe.keras.compare import expected

CONTENDER = str(Path(__file__).with_name("contender.py"))
ROOT = Path(__file__).parents[3]
COMING = ROOT / ".cache/coming-keras"
SETUP, LIMIT = 120.0, 30.0  # seconds until both processes train, and from then on
# Of weights around 1: float32's rounding over 32 steps is below 1e-5, a batch too many 1e-2.
TOLERANCE = 1e-4
MPIRUN = [str(Path(sys.executable).parent / "mpirun"), "-np", "2", "--oversubscribe"]
MPIRUN += ["--bind-to", "none"]
PLAIN = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
WORDS = 7  # of an error that a cell shows


class Process(NamedTuple):
    """A process to start."""

    command: list[str]
    environment: dict[str, str]  # what it needs beside ours


@dataclass(frozen=True)
class Contender:
    """A way to train a Keras model on several ranks: a column of the table."""

    title: str
    name: str  # in contender.py
    backend: str
    start: Callable[[list[str]], list[Process]]  # of contender.py's command line
    path: tuple[str, ...] = ()  # before the others on PYTHONPATH


@dataclass(frozen=True)
class Report:
    """What a process of contender.py leaves at its end, as far as its row has it."""

    weights: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)  # that it has done
    logs: dict[str, list[float]] = field(default_factory=dict)
    size: int = 0
    before: int = 0  # buckets of gradients whose reduction began before backprop's end
    buckets: int = 0


@dataclass
class Outcome:
    """What became of a contender's two processes."""

    reports: list[Report] = field(default_factory=list)  # of each process that came to its end
    errors: dict[int, str] = field(default_factory=dict)  # by rank
    hung: bool = False
    seconds: float = 0.0  # since both began to train
    output: str = ""


Judge = Callable[[Outcome], str]  # gives the words of a cell


class Row(NamedTuple):
    """What is asked of every contender."""

    title: str
    judge: Judge


def by_mpirun(program: list[str]) -> list[Process]:
    """Start two processes with mpirun."""
    return [Process([*MPIRUN, *program], {})]


def by_torchrun(program: list[str]) -> list[Process]:
    """Start two processes with torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    return [Process([*torchrun, f"--master-port={_port()}", *program[1:]], {})]


def by_tf_config(program: list[str]) -> list[Process]:
    """Start two processes that find each other by TF_CONFIG."""
    cluster = {"worker": [f"localhost:{_port()}", f"localhost:{_port()}"]}
    processes = []
    for rank in range(2):
        config = {"cluster": cluster, "task": {"type": "worker", "index": rank}}
        environment = {"TF_CONFIG": json.dumps(config), "TASK": str(rank)}
        processes.append(Process(program, environment))
    return processes


CONTENDERS = (
    Contender("Keras 3.16, DataParallel, PyTorch", "keras", "torch", by_torchrun, (str(COMING),)),
    Contender("MultiWorkerMirroredStrategy, Keras 3.15", "mirrored", "tensorflow", by_tf_config),
    Contender("Horovod 0.28.1's Keras layer", "horovod", "tensorflow", by_mpirun),
    Contender("recipe.keras, TensorFlow", "ours", "tensorflow", by_mpirun, (str(ROOT),)),
    Contender("recipe.keras, PyTorch", "ours", "torch", by_mpirun, (str(ROOT),)),
)


def run(contender: Contender, row: str) -> Outcome:
    """Start the contender's processes and wait for their end, or for the time limit."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        # Start.
        folder = Path(name)
        log = stack.enter_context((folder / "log").open("w"))
        start = by_mpirun if row == "mpirun" else contender.start
        environment = os.environ | PLAIN
        environment["KERAS_BACKEND"] = contender.backend
        environment["PYTHONPATH"] = ":".join(contender.path)
        processes = [
            subprocess.Popen(
                process.command,
                env=environment | process.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for process in start([sys.executable, CONTENDER, contender.name, row, name])
        ]

        # Wait, and read what they left.
        outcome = _wait(processes, folder)
        for path in sorted(folder.glob("report*")):
            outcome.reports.append(Report(**json.loads(path.read_text())))
        for path in sorted(folder.glob("error*")):
            outcome.errors[int(path.name[-1])] = path.read_text()
        outcome.output = (folder / "log").read_text(errors="replace")
        return outcome


def _wait(processes: list[subprocess.Popen], folder: Path) -> Outcome:
    """Wait until all processes have ended, or end them at their limit."""
    since = time.monotonic()
    both_train = False
    while any(p.poll() is None for p in processes):
        time.sleep(0.2)
        now = time.monotonic()
        if not both_train and len(list(folder.glob("began*"))) == 2:
            both_train = True
            since = now
        if now - since > (LIMIT if both_train else SETUP):
            _end(processes, folder)
            return Outcome(hung=True, seconds=now - since)
    return Outcome(seconds=time.monotonic() - since if both_train else 0.0)


def _end(processes: list[subprocess.Popen], folder: Path) -> None:
    """Kill the launchers and what they have started, which names the folder in its command line."""
    for process in processes:
        process.kill()
        process.wait()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)


def failure(outcome: Outcome) -> str:
    """Return the words of a cell whose processes didn't both come to their end. Empty: they did."""
    if outcome.hung:
        return f"hang: no end within {outcome.seconds:.0f} s"
    if len(outcome.reports) == 2:
        return ""
    if outcome.errors:
        return _short(next(iter(outcome.errors.values())))
    message = re.search(r"^error: (.*)$", outcome.output, re.MULTILINE)
    return f"error: {_short(message[1])}" if message else "ended without a word"


def _short(text: str) -> str:
    """Return the first words, without a file's place, safe in a table."""
    words = re.sub(r"\[[^\]]*:\d+\]", "", text).replace("|", "/").split()
    ending = " …" if len(words) > WORDS else ""
    return " ".join(words[:WORDS]) + ending


def judge_weights(batches: tuple[int, int] = (8, 8), epochs: int = 1) -> Judge:
    """Judge by the weights: the right ones are those of one process on all examples."""
    right = expected.weights(batches, epochs)

    def judge(outcome: Outcome) -> str:
        if words := failure(outcome):
            return words

        # Replicas that differ are wrong, whatever their weights.
        first, second = (np.array(report.weights) for report in outcome.reports)
        if not np.array_equal(first, second):
            return (
                f"wrong: the ranks differ, w₀ {first[0]:.3f} and {second[0]:.3f}, "
                f"not {right[0]:.3f}"
            )

        # The same on both.
        if not np.allclose(first, right, atol=TOLERANCE):
            return f"wrong: w₀ {first[0]:.3f}, not {right[0]:.3f}"
        return "right"

    return judge


def judge_metric(outcome: Outcome) -> str:
    """Judge by the logs: the largest target of all ranks."""
    if words := failure(outcome):
        return words
    right = expected.largest()
    largest = [report.logs["largest"][0] for report in outcome.reports]
    if np.allclose(largest, right, rtol=1e-5):
        return "right"
    return f"wrong: {largest[0]:.2f} and {largest[1]:.2f}, not {right:.2f}"


def judge_deciding(outcome: Outcome) -> str:
    """Judge by the epochs that the ranks did, one of which stopped after two."""
    if words := failure(outcome):
        return words
    first, second = (len(report.epochs) for report in outcome.reports)
    if first != second:
        return f"ranks did {first} and {second} epochs"
    return "all stop after that epoch" if first == 2 else f"wrong: all go on, {first} epochs"


def judge_lost(outcome: Outcome) -> str:
    """Judge by the end of the job, one rank of which was killed."""
    if outcome.hung or 1 in outcome.errors:
        return failure(outcome)
    return f"the job ended within {outcome.seconds:.0f} s"


def judge_mpirun(outcome: Outcome) -> str:
    """Judge by the number of ranks that each process has."""
    if words := failure(outcome):
        return words
    sizes = [report.size for report in outcome.reports]
    return "right" if sizes == [2, 2] else f"wrong: two jobs of {sizes[0]} rank each"


ROWS = {
    "own_step": Row("an own `train_step`, as in Keras's guide", judge_weights()),
    "early": Row("data that end early: 8 and 6 batches", judge_weights((8, 6))),
    "metric": Row("a metric whose state is no sum: a maximum", judge_metric),
    "deciding": Row("a callback on rank 1 stops after epoch 2", judge_deciding),
    "resuming": Row("resuming after epoch 2 with BackupAndRestore", judge_weights(epochs=4)),
    "lost": Row("rank 1 is killed (SIGKILL)", judge_lost),
    "mpirun": Row("starting under mpirun", judge_mpirun),
}
# Rows that no process of contender.py is asked by all contenders.
OTHER_ROWS = {"slurm": "starting under Slurm", "overlap": "allreduces beside backprop"}


def overlap(contender: Contender) -> str:
    """Return how much of the reduction begins beside backprop.

    By Horovod's timeline for us, by PyTorch's hook for Keras.
    """
    # Keras's buckets, counted by PyTorch's hook.
    if contender.name == "keras":
        outcome = run(contender, "overlap")
        if words := failure(outcome):
            return words
        report = outcome.reports[0]
        return f"{report.before} of {report.buckets} buckets begin before its end"
    if contender.name != "ours":
        return "not run"

    # Our allreduces, by Horovod's timeline.
    program = "from recipe.benchmark import library; print(library.overlap())"
    output = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | PLAIN | {"KERAS_BACKEND": contender.backend, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    counts = re.search(r"(\d+) of (\d+) allreduces began", output)
    return f"{counts[1]} of {counts[2]} begin before its end" if counts else "not measured"


def cell(contender: Contender, row: str) -> str:
    """Return what the table says of a contender in a row."""
    if contender.name == "keras" and not (COMING / "keras").exists():
        return "not installed: tests/coming-keras"
    if row == "overlap":
        return overlap(contender)
    if row == "slurm":
        return "tests/launch/test_slurm.py" if contender.name == "ours" else "not run"
    return ROWS[row].judge(run(contender, row))


def _port() -> int:
    """Return a port of this host that nobody listens to now."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def main(rows: list[str]) -> None:
    titles = {name: row.title for name, row in ROWS.items()} | OTHER_ROWS
    print("| two ranks |", " | ".join(c.title for c in CONTENDERS), "|")
    print("|---" * (1 + len(CONTENDERS)) + "|", flush=True)
    for row in rows or titles:
        print(f"| {titles[row]} |", end="", flush=True)
        for contender in CONTENDERS:
            print(f" {cell(contender, row)} |", end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
