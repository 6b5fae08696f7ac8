"""Hosts that die, links that are cut, launchers that are killed.

The job ends everywhere, soon, and says why.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts import Hosts, hosts, needs_hosts
from tests.ranks import BIN, ROOT, environment
from tests.recipes import LONG

pytestmark = [pytest.mark.ranks, needs_hosts]

# Seconds, for config.run.step_timeout. START should not end the run: on a busy machine the start
# takes many. PATIENCE should.
START = 120
PATIENCE = 24
RANK = f"{sys.executable} -m recipe.train"
RUN = LONG.but(step_timeout=START)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[Hosts]:
    with hosts(tmp_path_factory.mktemp("hosts"), 2) as cluster:
        yield cluster


class Job:
    """A run on h1 and h2, started on h1.

    What it prints goes to a file, so that no reader keeps anybody alive.
    """

    def __init__(self, pair: Hosts, folder: Path, launcher: list[str], **changes: object) -> None:
        self.hosts, self.log = pair, folder / "log"
        run = RUN.but(**changes).train(folder / "run")
        with self.log.open("w") as log:
            self.process = pair.popen(
                "h1",
                [*launcher, sys.executable, *run],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment(),
            )
        self.until(lambda: re.search(r"step +\d", self.printed), START, "no step")

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def left(self) -> list[str]:
        """Return the command lines of what lives, on either host."""
        return [
            command for host in self.hosts.names for command in self.hosts.commands(host).values()
        ]

    def ranks(self, host: str) -> list[int]:
        return [
            pid for pid, command in self.hosts.commands(host).items() if command.startswith(RANK)
        ]

    def ends(self, seconds: float) -> float:
        """Wait until nothing of it lives, and return the seconds that took."""
        began = time.monotonic()
        self.until(lambda: not self.left(), seconds, "still there")
        self.process.wait(10)
        return time.monotonic() - began

    def until(
        self, true: Callable[[], object], seconds: float, what: str = "ranks still there"
    ) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, (
                f"{what} after {seconds} s: {self.left()}\n{self.printed[-3000:]}"
            )
            time.sleep(0.2)


def mpirun(pair: Hosts, *options: str) -> list[str]:
    return pair.mpirun(2, pair.names, *options)


def horovodrun(*transport: str) -> Callable[[Hosts], list[str]]:
    where = ["--disable-cache", "-np", "2", "-H", "h1:1,h2:1"]
    return lambda pair: [str(BIN / "horovodrun"), *transport, *where]


GLOO = horovodrun("--gloo")
MPI = horovodrun("--mpi", f"--mpi-args=--prefix {BIN.parent} --mca oob_tcp_if_include eth0")


def test_a_cut_link_ends_the_job(pair, tmp_path):
    """mpirun has a keepalive, as launch.run gives it one.

    Its own would take 8 minutes to see a cut link, if at all.
    """
    keepalive = {"time": 4, "intvl": 2, "probes": 3}  # seconds, seconds, tries: 10 s
    options = []
    for name, value in keepalive.items():
        options += ["--mca", f"oob_tcp_keepalive_{name}", str(value)]
    job = Job(pair, tmp_path, mpirun(pair, *options))
    pair.cut("h2")
    try:
        job.ends(40)
    finally:
        pair.mend("h2")
    assert job.process.returncode not in (0, 2, 75)
    assert re.search(r"lost communication with a remote daemon.*h2", job.printed, re.DOTALL)


@pytest.mark.parametrize(
    ("launcher", "framework"),
    [(mpirun, "torch"), (mpirun, "keras"), (GLOO, "torch")],
    ids=["mpirun-torch", "mpirun-keras", "gloo-torch"],
)
def test_ranks_behind_a_cut_link_leave_by_themselves(pair, tmp_path, launcher, framework):
    job = Job(pair, tmp_path, launcher(pair), framework=framework, step_timeout=PATIENCE)
    pair.cut("h2")
    try:
        job.until(lambda: not [*job.ranks("h1"), *job.ranks("h2")], PATIENCE + 20)
    finally:
        pair.mend("h2")
    job.ends(15)  # mpirun goes when it can reach the other host again
    assert job.process.returncode == 1
    assert re.search(
        r"rank 0 on h1: nothing was heard for \d+ s .* the last sign of life was step \d+",
        job.printed,
    )


@pytest.mark.parametrize(("launcher", "within"), [(mpirun, 15), (GLOO, 15)], ids=["mpirun", "gloo"])
def test_a_killed_rank_ends_the_job(pair, tmp_path, launcher, within):
    job = Job(pair, tmp_path, launcher(pair))
    os.kill(job.ranks("h2")[0], signal.SIGKILL)
    job.ends(within)
    assert job.process.returncode not in (0, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
@pytest.mark.parametrize("launcher", [mpirun, GLOO, MPI], ids=["mpirun", "gloo", "mpi"])
def test_a_launcher_that_is_killed_leaves_nothing_behind(pair, tmp_path, launcher, number):
    job = Job(pair, tmp_path, launcher(pair))
    os.kill(job.process.pid, number)
    job.ends(40)


def test_a_dead_host_ends_the_job(pair, tmp_path):
    job = Job(pair, tmp_path, mpirun(pair))
    pair.kill("h2")
    job.ends(15)
    assert job.process.returncode not in (0, 2)
