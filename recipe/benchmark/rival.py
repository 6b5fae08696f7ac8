"""A contender's processes, which run only when it is their turn."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from recipe.errors import RunError

PATIENCE = 300  # seconds for a turn, or for the first step


class Rival:
    """One contender on `size` ranks of its own, on the cores from `core` on. Suspended but in its turns."""

    def __init__(self, name: str, size: int, core: int, turns: int, folder: Path) -> None:
        """Starts it and waits for the end of the first step. Raises RunError when it fails."""
        self.title = f"{name} on {size} ranks"
        meeting = Path(tempfile.mkdtemp(dir=folder)) / "line"
        arguments = ["-m", "recipe.benchmark.contender", name, *map(str, (size, turns, core, meeting))]
        self._printed = meeting.with_name("printed").open("w+b")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(meeting))
            listening.listen()
            listening.settimeout(1)
            began = time.monotonic()
            self._jobs = [
                subprocess.Popen(command, env=os.environ | extra, stdout=self._printed, stderr=subprocess.STDOUT)
                for command, extra in commands(name, size, arguments)
            ]
            try:
                self._line = self._met(listening).makefile("rw")
                self.heard()
            except BaseException:
                self.end()
                raise
        self.start = time.monotonic() - began  # seconds
        self.suspend()

    def go(self) -> None:
        """Begins a turn."""
        for process in self._processes():
            process.resume()
        print("go", file=self._line, flush=True)

    def heard(self) -> list[float]:
        """Waits for the turn's end: seconds of each of its steps."""
        try:
            if told := self._line.readline():
                return json.loads(told)
        except TimeoutError:
            pass
        raise self._failed()

    def suspend(self) -> None:
        for process in self._processes():
            process.suspend()

    def end(self) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # its launcher's end has ended it
                process.kill()
        for job in self._jobs:
            job.wait()
        self._printed.close()

    def _met(self, listening: socket.socket) -> socket.socket:
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE and all(job.poll() is None for job in self._jobs):
            try:
                line = listening.accept()[0]
                line.settimeout(PATIENCE)
                return line
            except TimeoutError:
                pass
        raise self._failed()

    def _failed(self) -> RunError:
        self._printed.seek(0)
        return RunError(f"{self.title} failed: {self._printed.read().decode(errors='replace')[-2000:]}")

    def _processes(self) -> list[psutil.Process]:
        """Its launcher and ranks, that still run."""
        found = []
        for job in self._jobs:
            if job.poll() is None:
                launcher = psutil.Process(job.pid)
                found += [launcher, *launcher.children(recursive=True)]
        return found


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
