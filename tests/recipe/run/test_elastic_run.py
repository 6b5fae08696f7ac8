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

from recipe.run import runlog
from tests.ranks import BIN, ROOT, environment, launch

pytestmark = pytest.mark.ranks

EPOCHS, STEPS, COMMIT = 4, 75, 10
RUN = [
    "-m",
    "recipe.train",
    "--config=quick",
    "--config.k=3",  # two ranks share it unevenly
    "--config.n=16",
    f"--config.epochs={EPOCHS}",
    "--config.optimizer.base_rate=0.01",
    f"--config.data.train_examples={STEPS * 48}",
    "--config.data.eval_examples=131",
    "--config.schedule.warmup_epochs=1.5",
    "--config.schedule.decay_epochs=(3.0,)",
    "--config.model.blocks=(1,)",
    "--config.model.width=8",
    "--config.run.log_every=1",
    f"--config.run.commit_steps={COMMIT}",
]
# Other ranks sum in another order, a rounding of 6e-8 that 300 steps amplify. Measured: see
# LOSS_BOUND's test; a factor of ten for other processors.
LOSS_BOUND = 1e-3


class Elastic:
    """An elastic job on the hosts that its hostfile names; `printed` is what it has said so far.

    With Keras by launch.run, with PyTorch by horovodrun."""

    def __init__(self, folder: Path, framework: str, *options: str) -> None:
        self.hosts, self.log, self.run = folder / "hosts", folder / "log", folder / "run"
        self.set_hosts("localhost")
        if framework == "keras":
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
        command = [*front, sys.executable, *RUN]
        command += [f"--config.framework={framework}", f"--run_dir={self.run}", *options]
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
    lines = runlog.read_lines(run, "step")
    assert [line["step"] for line in lines] == list(range(1, EPOCHS * STEPS + 1))
    return np.array([line["loss"] for line in lines])


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_rank_joins_and_rank_0_dies(tmp_path, job, framework):
    elastic = job(tmp_path, framework)
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

    alone = launch(1, [*RUN, f"--config.framework={framework}", f"--run_dir={tmp_path / 'alone'}"])
    assert alone.returncode == 0, alone.stdout[-3000:]
    disturbed, undisturbed = losses(elastic.run), losses(tmp_path / "alone")
    print(
        framework, "losses apart by at most", (worst := np.abs(disturbed / undisturbed - 1).max())
    )
    assert worst < LOSS_BOUND
    assert resumed < EPOCHS * STEPS - COMMIT, "the rank was lost too late to show anything"


def test_a_broken_hostfile_at_the_start_is_an_error(tmp_path, job, monkeypatch):
    monkeypatch.setattr(Elastic, "set_hosts", lambda self, *names: self.write("localhost\n"))
    for framework, status in (("torch", 1), ("keras", 2)):
        elastic = job(tmp_path, framework)
        assert elastic.process.wait(30) == status
        assert f"error: {elastic.hosts}:1: localhost has no slots" in elastic.printed


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--config.optimizer.base_rate=1e12", "error: the loss is"),
        (
            "--config.run.workers_at_once=2",
            "error: config.run.workers_at_once=2 must divide config.k=3",
        ),
    ],
)
def test_an_error_ends_an_elastic_job(tmp_path, job, option, says):
    elastic = job(tmp_path, "torch", option)
    assert elastic.process.wait(60) == 1
    assert says in elastic.printed
