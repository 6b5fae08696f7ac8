"""Elastic runs of recipe.train under the real launcher: a rank joins, rank 0 is killed, the losses
stay the same.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.ranks import BIN, ROOT, environment, launch
from tests.recipes import ELASTIC, RecipeFlags
from tests.runs import series, succeeded

pytestmark = pytest.mark.ranks

COMMIT = ELASTIC.value.run.commit_steps  # steps between two commits
STEPS = ELASTIC.value.epochs * ELASTIC.steps
# Other ranks sum in another order, a rounding of 6e-8 that 300 steps amplify. Measured: see
# LOSS_BOUND's test; a factor of ten for other processors.
LOSS_BOUND = 1e-3


class Elastic:
    """An elastic job on the hosts that its hostfile names; `printed` is what it has said so far.

    With Keras by launch.run, with PyTorch by horovodrun."""

    def __init__(self, folder: Path, recipe: RecipeFlags) -> None:
        self.hosts, self.log, self.run = folder / "hosts", folder / "log", folder / "run"
        self.set_hosts("localhost")
        if "--config.framework=keras" in recipe.flags:  # a recipe that is refused has no value
            front = [
                sys.executable,
                "-m",
                "launch.run",
                "--launcher",
                "horovodrun",
                "--elastic",
                "1:2",
            ]
            front += ["--hostfile", str(self.hosts), "--interface", "lo"]
        else:
            front = [
                str(BIN / "horovodrun"),
                "-np",
                "1",
                "--min-np",
                "1",
                "--max-np",
                "2",
                "--network-interfaces",
                "lo",
            ]
            front += [
                "--host-discovery-script",
                f"{sys.executable} -m launch.hostfile discover {self.hosts}",
            ]
        command = [*front, sys.executable, *recipe.train(self.run)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=environment(), start_new_session=True
            )

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def set_hosts(self, *names: str) -> None:
        """Two names of this machine, since horovodrun never comes back to one on which a rank died."""
        self.write("".join(f"{name} slots=1\n" for name in names))

    def write(self, text: str) -> None:
        new = self.hosts.with_suffix(".new")
        new.write_text(text)
        new.rename(self.hosts)

    def step(self) -> int:
        return max(map(int, re.findall(r"step (\d+) of", self.printed)), default=0)

    def ranks(self) -> list[psutil.Process]:
        """Oldest first."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if (
                words[:3] == [sys.executable, "-m", "recipe.train"]
                and f"--run_dir={self.run}" in words
            ):
                found.append(process)
        return sorted(found, key=psutil.Process.create_time)

    def until(self, true: Callable[[], object], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end and self.process.poll() is None, self.printed[-3000:]
            time.sleep(0.1)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        for rank in self.ranks():
            rank.kill()


@pytest.fixture
def job():
    made: list[Elastic] = []

    def start(*arguments) -> Elastic:
        made.append(Elastic(*arguments))
        return made[-1]

    yield start
    for each in made:
        each.stop()


def losses(run: Path) -> np.ndarray:
    assert series(run, "step", "step") == list(range(1, STEPS + 1))
    return np.array(series(run, "step", "loss"))


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_rank_joins_and_rank_0_dies(tmp_path, job, framework):
    recipe = ELASTIC.but(framework=framework)
    elastic = job(tmp_path, recipe)
    elastic.until(lambda: elastic.step() >= 5)
    elastic.write("localhost slots=none\n")  # a slip while the run goes on costs nothing
    elastic.until(
        lambda: f"error: {elastic.hosts}:1: slots=none is not a whole number" in elastic.printed
    )
    elastic.set_hosts("localhost", "127.0.0.1")
    elastic.until(lambda: "on 2 ranks now" in elastic.printed)
    joined = elastic.step()
    elastic.until(lambda: elastic.step() >= joined + 2 * COMMIT)
    last = elastic.step()
    elastic.ranks()[0].kill()  # the oldest, rank 0
    elastic.until(lambda: "on 1 ranks now" in elastic.printed)
    resumed = int(re.search(r"on 1 ranks now, going on after step (\d+)", elastic.printed)[1])
    assert last - COMMIT <= resumed, "more was lost than the steps since the last commit"
    assert elastic.process.wait(120) == 0, elastic.printed[-3000:]

    succeeded(launch(1, recipe.train(tmp_path / "alone")))
    disturbed, undisturbed = losses(elastic.run), losses(tmp_path / "alone")
    print(
        framework, "losses apart by at most", (worst := np.abs(disturbed / undisturbed - 1).max())
    )
    assert worst < LOSS_BOUND
    assert resumed < STEPS - COMMIT, "the rank was lost too late to show anything"


def test_a_broken_hostfile_at_the_start_is_an_error(tmp_path, job, monkeypatch):
    monkeypatch.setattr(Elastic, "set_hosts", lambda self, *names: self.write("localhost\n"))
    for framework, status in (("torch", 1), ("keras", 2)):
        elastic = job(tmp_path, ELASTIC.but(framework=framework))
        assert elastic.process.wait(30) == status
        assert f"error: {elastic.hosts}:1: localhost has no slots" in elastic.printed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base_rate": 1e12}, "error: the loss is"),
        (
            {"workers_at_once": 2},
            "error: config.run.workers_at_once=2 must divide config.k=3",
        ),
    ],
)
def test_an_error_ends_an_elastic_job(tmp_path, job, change, says):
    elastic = job(tmp_path, ELASTIC.but(framework="torch", **change))
    assert elastic.process.wait(60) == 1
    assert says in elastic.printed
