"""Three hosts: launch.run and the plain commands train the same by every launcher."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.hosts import Hosts, hosts, needs_hosts
from tests.ranks import ROOT
from tests.recipes import SYNTHETIC
from tests.runs import series, succeeded

pytestmark = [pytest.mark.ranks, needs_hosts]

RECIPE = SYNTHETIC.but(k=3, train_examples=480)  # 20 steps, of a worker on each host
LAUNCH_RUN = "python -m launch.run --hostfile {file} --interface eth0"
COMMANDS = {
    "launch.run, mpirun": LAUNCH_RUN,
    "launch.run, horovodrun": f"{LAUNCH_RUN} --launcher horovodrun",
    "mpirun": (
        '"$PWD/.venv/bin/mpirun" -np 3 --hostfile {file} --bind-to none --map-by slot -x PATH'
    ),
    "horovodrun": "horovodrun --gloo -np 3 --hostfile {file}",
}
# Gloo may sum three numbers in another order, a rounding of 6e-8 of each. Measured: losses 0, norms
# of all weights 1.5e-11 apart after 20 steps.
BOUND = 1e-7


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Iterator[Hosts]:
    with hosts(tmp_path_factory.mktemp("hosts"), 3) as cluster:
        yield cluster


def train(three: Hosts, folder: Path, command: str) -> Path:
    """Run a command of COMMANDS, from the project's folder on h1. Return the run's folder."""
    file, run = folder / "three", folder / "run"
    file.write_text("# one GPU each\nh1 slots=1\nh2 slots=1\nh3 slots=1\n")
    line = f"{command.format(file=file)} .venv/bin/python {shlex.join(RECIPE.train(run))}"
    succeeded(three.run("h1", ["sh", "-c", f"cd {ROOT} && {line}"]))
    return run


def test_all_commands_train_the_same(three, tmp_path_factory):
    runs = {}
    for name, command in COMMANDS.items():
        run = train(three, tmp_path_factory.mktemp("run"), command)
        environment = json.loads((run / "environment.json").read_text())
        assert environment["hosts"] == ["h1", "h2", "h3"], name
        runs[name] = run
    digests = {name: series(run, "epoch", "weights") for name, run in runs.items()}
    assert {len(each) for each in digests.values()} == {RECIPE.value.epochs}
    assert digests["mpirun"] == digests["launch.run, mpirun"]
    assert digests["horovodrun"] == digests["launch.run, horovodrun"]
    mpi_and_gloo = [runs["mpirun"], runs["horovodrun"]]
    losses, norms = ([series(run, "epoch", n) for run in mpi_and_gloo] for n in ("loss", "norm"))
    for mpi, gloo in (losses, norms):
        print("MPI and Gloo apart by", np.abs(np.array(mpi) / gloo - 1).max())
        assert np.allclose(mpi, gloo, rtol=BOUND, atol=0)
