"""`python -m recipe.keras.compare [ROW …]`: starts two processes of each contender for each row, and prints the table.

A cell says what happened: a hang is a time limit, an error its first words, a number stands beside the right one.
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

import numpy as np

from recipe.keras.compare import expected

CONTENDER = str(Path(__file__).with_name("contender.py"))
ROOT = Path(__file__).parents[3]
COMING = ROOT / ".cache/coming-keras"
SETUP, LIMIT = 120.0, 30.0  # seconds until both processes train, and from then on
TOLERANCE = 1e-4  # of weights around 1: float32's rounding over 32 steps is below 1e-5, a batch too many 1e-2
MPIRUN = [
    str(Path(sys.executable).parent / "mpirun"),
    "-np",
    "2",
    "--oversubscribe",
    "--bind-to",
    "none",
]
PLAIN = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Contender:
    title: str
    name: str  # in contender.py
    backend: str
    start: Callable[
        [list[str]], list[tuple[list[str], dict[str, str]]]
    ]  # commands and what each adds to environ
    path: tuple[str, ...] = ()  # before the others on PYTHONPATH


@dataclass
class Outcome:
    """What became of a contender's two processes."""

    found: list[dict] = field(default_factory=list)  # of each process that came to its end
    errors: dict[int, str] = field(default_factory=dict)  # by rank
    hung: bool = False
    seconds: float = 0.0  # since both began to train
    output: str = ""


def by_mpirun(program: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    return [([*MPIRUN, *program], {})]


def by_torchrun(program: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={_port()}",
    ]
    return [([*command, *program[1:]], {})]


def by_tf_config(program: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    cluster = {"worker": [f"localhost:{_port()}", f"localhost:{_port()}"]}
    configs = [
        json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}}) for i in range(2)
    ]
    return [(program, {"TF_CONFIG": config, "TASK": str(i)}) for i, config in enumerate(configs)]


CONTENDERS = (
    Contender("Keras 3.16, DataParallel, PyTorch", "keras", "torch", by_torchrun, (str(COMING),)),
    Contender("MultiWorkerMirroredStrategy, Keras 3.15", "mirrored", "tensorflow", by_tf_config),
    Contender("Horovod 0.28.1's Keras layer", "horovod", "tensorflow", by_mpirun),
    Contender("recipe.keras, TensorFlow", "ours", "tensorflow", by_mpirun, (str(ROOT),)),
    Contender("recipe.keras, PyTorch", "ours", "torch", by_mpirun, (str(ROOT),)),
)


def run(contender: Contender, row: str) -> Outcome:
    """Starts the contender's processes and waits for their end, or for the time limit."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        log = stack.enter_context((folder / "log").open("w"))
        start = by_mpirun if row == "mpirun" else contender.start
        environ = (
            os.environ
            | PLAIN
            | {"KERAS_BACKEND": contender.backend, "PYTHONPATH": ":".join(contender.path)}
        )
        processes = []
        for command, extra in start([sys.executable, CONTENDER, contender.name, row, name]):
            options = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            processes.append(subprocess.Popen(command, env=environ | extra, **options))
        outcome = _waited(processes, folder)
        outcome.found = [json.loads(path.read_text()) for path in sorted(folder.glob("found*"))]
        outcome.errors = {
            int(path.name[-1]): path.read_text() for path in sorted(folder.glob("error*"))
        }
        outcome.output = (folder / "log").read_text(errors="replace")
        return outcome


def _waited(processes: list[subprocess.Popen], folder: Path) -> Outcome:
    started, began = time.monotonic(), None
    while any(p.poll() is None for p in processes):
        time.sleep(0.2)
        now = time.monotonic()
        if began is None and len(list(folder.glob("began*"))) == 2:
            began = now
        if now - (began or started) > (LIMIT if began else SETUP):
            _end(processes, folder)
            return Outcome(hung=True, seconds=now - (began or started))
    return Outcome(seconds=time.monotonic() - (began or time.monotonic()))


def _end(processes: list[subprocess.Popen], folder: Path) -> None:
    """Kills the launchers and what they have started, which names the folder in its command line."""
    for process in processes:
        process.kill()
        process.wait()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)


def failed(outcome: Outcome) -> str:
    """The words of a cell whose processes didn't both come to their end; empty: they did."""
    if outcome.hung:
        return f"hang: no end within {outcome.seconds:.0f} s"
    if len(outcome.found) == 2:
        return ""
    if outcome.errors:
        return _short(next(iter(outcome.errors.values())))
    said = re.findall(r"^error: (.*)$", outcome.output, re.MULTILINE)
    return f"error: {_short(said[0])}" if said else "ended without a word"


def _short(text: str) -> str:
    """The first seven words, without a file's place, safe in a table."""
    words = re.sub(r"\[[^\]]*:\d+\]", "", text).replace("|", "/").split()
    return " ".join(words[:7]) + (" …" if len(words) > 7 else "")


def weights(batches: tuple[int, int] = (8, 8), epochs: int = 1) -> Callable[[Outcome], str]:
    """Judges by the weights: those of one process on all examples."""
    right = expected.weights(batches, epochs)

    def judge(outcome: Outcome) -> str:
        if words := failed(outcome):
            return words
        both = [np.array(f["weights"]) for f in outcome.found]
        if not np.array_equal(both[0], both[1]):
            return f"wrong: the ranks differ, w₀ {both[0][0]:.3f} and {both[1][0]:.3f}, not {right[0]:.3f}"
        if not np.allclose(both[0], right, atol=TOLERANCE):
            return f"wrong: w₀ {both[0][0]:.3f}, not {right[0]:.3f}"
        return "right"

    return judge


def metric(outcome: Outcome) -> str:
    if words := failed(outcome):
        return words
    right = expected.largest()
    found = [f["logs"]["largest"][0] for f in outcome.found]
    if np.allclose(found, right, rtol=1e-5):
        return "right"
    return f"wrong: {found[0]:.2f} and {found[1]:.2f}, not {right:.2f}"


def deciding(outcome: Outcome) -> str:
    if words := failed(outcome):
        return words
    first, second = (len(f["epochs"]) for f in outcome.found)
    if first != second:
        return f"ranks did {first} and {second} epochs"
    return "all stop after that epoch" if first == 2 else f"wrong: all go on, {first} epochs"


def lost(outcome: Outcome) -> str:
    if outcome.hung or 1 in outcome.errors:
        return failed(outcome)
    return f"the job ended within {outcome.seconds:.0f} s"


def mpirun(outcome: Outcome) -> str:
    if words := failed(outcome):
        return words
    sizes = [f["size"] for f in outcome.found]
    return "right" if sizes == [2, 2] else f"wrong: two jobs of {sizes[0]} rank each"


ROWS: dict[str, tuple[str, Callable[[Outcome], str]]] = {
    "own_step": ("an own `train_step`, as in Keras's guide", weights()),
    "early": ("data that end early: 8 and 6 batches", weights((8, 6))),
    "metric": ("a metric whose state is no sum: a maximum", metric),
    "deciding": ("a callback on rank 1 stops after epoch 2", deciding),
    "resuming": ("resuming after epoch 2 with BackupAndRestore", weights(epochs=4)),
    "lost": ("rank 1 is killed (SIGKILL)", lost),
    "mpirun": ("starting under mpirun", mpirun),
}


def overlap(contender: Contender) -> str:
    """How much of the reduction begins beside backprop: by Horovod's timeline for us, PyTorch's hook for Keras."""
    if contender.name == "keras":
        outcome = run(contender, "overlap")
        return failed(outcome) or "{before} of {all} buckets begin before its end".format(
            **outcome.found[0]
        )
    if contender.name != "ours":
        return "not run"
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "from recipe.benchmark import library as benchmark; print(benchmark.overlap())",
        ],
        env=os.environ | PLAIN | {"KERAS_BACKEND": contender.backend, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = re.search(r"(\d+) of (\d+) allreduces began", said)
    return f"{found[1]} of {found[2]} begin before its end" if found else "not measured"


def cell(contender: Contender, row: str) -> str:
    if contender.name == "keras" and not (COMING / "keras").exists():
        return "not installed: tests/coming-keras"
    if row == "overlap":
        return overlap(contender)
    if row == "slurm":
        return "tests/launch/test_slurm.py" if contender.name == "ours" else "not run"
    return ROWS[row][1](run(contender, row))


def _port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def main(wanted: list[str]) -> None:
    titles = {row: title for row, (title, _) in ROWS.items()}
    titles |= {"slurm": "starting under Slurm", "overlap": "allreduces beside backprop"}
    print("| two ranks |", " | ".join(c.title for c in CONTENDERS), "|")
    print("|---" * (1 + len(CONTENDERS)) + "|", flush=True)
    for row in wanted or titles:
        print(f"| {titles[row]} |", end="", flush=True)
        for contender in CONTENDERS:
            print(f" {cell(contender, row)} |", end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
