"""What the environment tells of the job before Horovod starts, compared with what Horovod says."""

import shutil
import socket
import subprocess
import sys

import pytest

from recipe.ranks import binding, launched
from tests.hosts import named, needs_names
from tests.ranks import BIN, ROOT, environment, launch
from tests.recipes import NEVER_BEGUN

VARIABLES = (
    *launched.LAUNCHERS,
    "RANK",
    "LOCAL_RANK",
    "SLURM_STEP_ID",
    "SLURM_PTY_PORT",
    "HOROVOD_ELASTIC",
)


@pytest.mark.parametrize("variable", [None, *binding.SIZE_VARIABLES])
def test_every_launcher_tells_whether_a_rank_is_alone(monkeypatch, variable):
    """One that isn't must not wait 10 ms for Horovod's next cycle."""
    for name in ("HOROVOD_ELASTIC", *binding.SIZE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert binding._is_alone()
    if variable:
        monkeypatch.setenv(variable, "1")
        assert binding._is_alone()
        monkeypatch.setenv(variable, "2")
        assert not binding._is_alone()


def test_mpich_is_among_the_launchers():
    assert "PMI_SIZE" in binding.SIZE_VARIABLES


def step(**more: str) -> dict[str, str]:
    """Return Slurm's variables in a task of `srun -n 2`, and others."""
    return {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"} | more


BATCH = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}  # of a batch script, and of salloc's shell
PMI2 = {"PMI_RANK": "0", "PMI_SIZE": "2"}  # of srun --mpi=pmi2; Open MPI's wheel ignores it
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "variable", "processes"),
    [
        ({}, "", 1),
        (BATCH, "", 1),
        (step(SLURM_STEP_ID=str(2**32 - 6)), "", 1),  # the shell of an interactive step
        (step(SLURM_PTY_PORT="1234"), "", 1),  # the shell of srun -n 2 --pty
        ({"WORLD_SIZE": "2", "RANK": "0"}, "", 1),  # a pod's
        ({"HOROVOD_ELASTIC": "1", "HOROVOD_SIZE": "2"}, "", 1),
        ({"PMI_SIZE": "", "OMPI_COMM_WORLD_SIZE": "x"}, "", 1),
        (step(), "SLURM_STEP_NUM_TASKS", 2),
        (step(PMI_SIZE="2"), "SLURM_STEP_NUM_TASKS", 2),  # srun --mpi=pmi2
        # mpiexec in an interactive shell
        (step(SLURM_STEP_NUM_TASKS="1", PMI_SIZE="2"), "PMI_SIZE", 2),
        # mpirun -np 1, whose daemon srun has started
        (step(OMPI_COMM_WORLD_SIZE="1"), "OMPI_COMM_WORLD_SIZE", 1),
        (step(HOROVOD_SIZE="1", OMPI_COMM_WORLD_SIZE="4"), "HOROVOD_SIZE", 1),
        ({"PMI_SIZE": "2"}, "PMI_SIZE", 2),
        (TORCHRUN, "WORLD_SIZE", 2),
        (TORCHRUN | {"OMPI_COMM_WORLD_SIZE": "1"}, "OMPI_COMM_WORLD_SIZE", 1),
    ],
)
def test_the_nearest_launcher_counts(monkeypatch, variables, variable, processes):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched.launcher_count() == launched.LauncherCount(variable, processes)


def alone(*words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run Python in a process that sees no launcher but that of `variables`."""
    others = {name: value for name, value in environment().items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=others | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.ranks
@pytest.mark.skipif(
    shutil.which("mpiexec.hydra") is None, reason="MPICH (mpiexec.hydra) is not installed"
)
def test_ranks_of_another_mpis_mpiexec_refuse_to_train_alone(tmp_path):
    """Each rank says so, because MPICH's mpiexec ends no rank when another has failed."""
    command = ["mpiexec.hydra", "-n", "2", sys.executable, *NEVER_BEGUN.train(tmp_path / "run")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    message = "Horovod has 1 rank, but another MPI's mpiexec started 2 processes (PMI_SIZE)"
    assert done.stderr.count(message) == 2
    assert f"error: rank 1 on {socket.gethostname()}: Horovod has" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.ranks
@pytest.mark.parametrize("variables", [step(**PMI2), TORCHRUN], ids=["srun", "torchrun"])
def test_a_rank_that_finds_no_other_refuses_to_train_alone(tmp_path, variables):
    done = alone(*NEVER_BEGUN.train(tmp_path / "run"), **variables)
    assert done.returncode == 2, done.stderr
    assert "started 2 processes" in done.stderr, done.stderr
    assert "python -m launch.run --launcher=srun-gloo" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.ranks
def test_a_script_of_a_users_ends_where_it_is_certain_and_is_warned_elsewhere():
    program = "import recipe.keras as hvd; hvd.init(); print('went on', hvd.size())"

    certain = alone("-c", program, PMI_SIZE="2", PMI_RANK="0")
    assert certain.returncode == 1
    assert "RunError: Horovod has 1 rank, but another MPI's" in certain.stderr

    warned = alone("-c", program, **step(**PMI2))
    assert warned.returncode == 0, warned.stderr
    assert warned.stdout == "went on 1\n"
    assert "RuntimeWarning: Horovod has 1 rank, but srun started 2 processes" in warned.stderr

    silent = alone("-c", program, **BATCH)
    assert silent.returncode == 0
    assert "Horovod has" not in silent.stderr

    # A group of its own for each rank is what the user asked for.
    own = program.replace("init()", "init(comm=[int(os.environ['OMPI_COMM_WORLD_RANK'])])")
    groups = launch(2, ["-c", f"import os; {own}"])
    assert groups.stdout.count("went on 1") == 2, groups.stdout
    assert "Horovod has" not in groups.stdout, groups.stdout


# --- Gloo

GLOO = "from recipe.ranks import binding; print('rank', binding.init('torch').rank())"


@pytest.mark.ranks
@needs_names
@pytest.mark.parametrize(
    ("line", "starts"),
    [
        ("", False),
        ("10.99.99.99 odd-host", False),
        ("127.0.1.1 odd-host", True),
        ("::1 odd-host", True),
    ],
    ids=["no address", "another's", "loopback", "IPv6"],
)
def test_a_machine_whose_name_gloo_can_not_use_is_told_before_it_dies(tmp_path, line, starts):
    command = [str(BIN / "horovodrun"), "--gloo", "-np", "2", sys.executable, "-c", GLOO]
    done = named(tmp_path, "odd-host", line, *command)
    output = done.stdout + done.stderr
    if starts:
        assert done.returncode == 0, output
        assert "rank 1" in output, output
    else:
        message = "UsageError: the name of this machine, odd-host, does not resolve to an address"
        assert f"{message} of its own" in output, output


@pytest.mark.ranks
@pytest.mark.parametrize("interface", ["eth77", "lo,lo"])
def test_an_interface_that_gloo_would_die_of_is_told(interface):
    program = f"import os; os.environ['HOROVOD_GLOO_IFACE'] = {interface!r}; {GLOO}"
    done = launch(1, ["-c", program], "gloo")
    message = f"UsageError: HOROVOD_GLOO_IFACE={interface} is no network interface of"
    assert message in done.stdout, done.stdout
    assert "with an address: name one of lo" in done.stdout
