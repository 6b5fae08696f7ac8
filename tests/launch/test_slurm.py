"""The sbatch template on a real Slurm of two nodes: launchers, preemption, seeds, mistakes."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipe.run import runlog
from tests.ranks import BIN, ROOT
from tests.recipes import SYNTHETIC
from tests.runs import has_line, series
from tests.slurm import Slurm, needs_pmix, needs_slurm, slurm

pytestmark = [pytest.mark.ranks, needs_slurm]

TEMPLATE = str(ROOT / "launch/slurm/train.sbatch")
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10"]
RECIPE = SYNTHETIC.flags
LONGER = SYNTHETIC.but(train_examples=6400, log_every=5).flags  # 400 steps
HOLD = """\
import sys, time
from pathlib import Path
if sys.orig_argv[1:3] == ["-m", "recipe.train"]:  # a rank, before it can notice a signal
    while not Path("go").exists():
        time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm") / "d") as cluster:
        yield cluster


@pytest.fixture
def project(tmp_path, cluster) -> Iterator[Path]:
    """A project whose jobs end with the test, so that a failed one doesn't keep the nodes."""
    yield project_at(tmp_path)
    cluster.cancel_all()


def project_at(folder: Path) -> Path:
    """Make a folder with the project's names in it, from which jobs are submitted.

    So the runs of different tests stay apart.
    """
    for name in ("recipe", "launch"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(BIN.parent)
    return folder


def submit(cluster: Slurm, project: Path, *words: str, **extra: str) -> str:
    return cluster.submit("--chdir", str(project), *TWO_NODES, *words, **extra)


def log(project: Path, job: str) -> str:
    return (project / f"imagenet-1hr-{job}.log").read_text()


def weights(run: Path) -> list[str]:
    """Return the digests of the weights after each epoch."""
    return series(run, "epoch", "weights")


def output(ranks: Path) -> str:
    """Return what the ranks have printed."""
    return "".join(path.read_text() for path in ranks.rglob("*") if path.is_file())


def preempt(cluster: Slurm) -> None:
    """Submit a job that needs all nodes and goes before others. It ends after a second."""
    high = cluster.submit(
        "--partition=high", "--exclusive", "--nodes=2", "--wrap", "sleep 1", "--output=/dev/null"
    )
    cluster.until(lambda: cluster.state(high) != "PENDING", 150)


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory) -> list[str]:
    """Return the weights that LONGER ends with.

    It runs on the same nodes, since the number of torch's threads changes the rounding.
    """
    project = project_at(tmp_path_factory.mktemp("undisturbed"))
    job = submit(cluster, project, TEMPLATE, *LONGER)
    assert cluster.ends(job) == "COMPLETED", log(project, job)
    return weights(project / f"runs/imagenet-1hr-{job}")


@pytest.mark.parametrize(
    ("launcher", "signal"),
    [("mpirun", "TERM"), pytest.param("srun", "USR1", marks=needs_pmix), ("srun-gloo", "TERM")],
)
def test_a_preempted_job_goes_on_and_ends_the_same(cluster, project, undisturbed, launcher, signal):
    cluster.preempt_with(signal)
    job = submit(cluster, project, TEMPLATE, *LONGER, LAUNCHER=launcher)
    run = project / f"runs/imagenet-1hr-{job}"
    cluster.until(lambda: has_line(run, "step"), 150)
    preempt(cluster)
    assert cluster.ends(job, 200) == "COMPLETED", log(project, job)
    assert "--resume" in log(project, job)
    if launcher != "mpirun":  # with TERM a race: Slurm ends its daemons, too
        assert "preempted: told to leave after step" in output(run / f"ranks/{job}-0")
        assert " step 5 of 400" not in output(run / f"ranks/{job}-1")
    assert json.loads((run / "environment.json").read_text())["hosts"] == [socket.gethostname()] * 2
    assert weights(run) == undisturbed  # two ranks: a + b is the same in any order, whoever adds


def test_a_job_told_to_leave_before_its_run_began_begins_it_later(cluster, project):
    (project / "sitecustomize.py").write_text(HOLD)
    job = submit(cluster, project, TEMPLATE, *RECIPE, PYTHONPATH=f"{project}:{ROOT}")
    log_file = project / f"imagenet-1hr-{job}.log"
    # Launched: the ranks start Python.
    cluster.until(lambda: log_file.exists() and "env -i " in log_file.read_text(), 150)
    assert cluster.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    cluster.until(lambda: log_file.read_text().count("env -i ") == 2, 150)
    (project / "go").touch()
    assert "--resume" not in log_file.read_text()
    assert cluster.ends(job) == "COMPLETED", log(project, job)
    assert len(weights(project / f"runs/imagenet-1hr-{job}")) == 2


EARLY = """\
[ -n "${SLURM_RESTART_COUNT:-}" ] || trap 'case $BASH_COMMAND in restarts=*) kill -USR1 $$ ;; esac' DEBUG
"""


def test_a_job_told_to_leave_before_it_has_launched_anything_begins_later(cluster, project):
    """The batch script's bash reads EARLY first.

    It then signals itself at its first command after the trap.
    """
    (project / "early").write_text(EARLY)
    (project / "sitecustomize.py").write_text(HOLD)
    early = {"BASH_ENV": str(project / "early"), "PYTHONPATH": f"{project}:{ROOT}"}
    job = submit(cluster, project, TEMPLATE, *RECIPE, **early)
    run = project / f"runs/imagenet-1hr-{job}"
    cluster.until((run / f"ranks/{job}-1").exists, 150)  # it was queued again
    (project / "go").touch()
    assert cluster.ends(job) == "COMPLETED", log(project, job)
    assert "--resume" not in log(project, job)
    assert len(weights(run)) == 2


def test_a_cancelled_job_stays_cancelled(cluster, project):
    """It is a job of an array, whose runs the user has named."""
    job = submit(cluster, project, "--array=3", TEMPLATE, *LONGER, RUN_DIR="runs/five seeds")
    run = project / "runs/five seeds-seed3"
    cluster.until(lambda: has_line(run, "step"), 150)
    cluster.run("scancel", job)
    cluster.until(lambda: not cluster.run("squeue", "-h").stdout, 150)
    assert cluster.state(job) == "CANCELLED", log(project, job)


def test_a_job_that_may_not_queue_again_says_how_to_go_on(cluster, project):
    """When such a run has done all its epochs and is resumed once more, it ends at once."""
    job = submit(cluster, project, "--no-requeue", TEMPLATE, *LONGER)
    run = f"runs/imagenet-1hr-{job}"
    cluster.until(lambda: has_line(project / run, "step"), 150)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.ends(job) == "FAILED"
    assert "preempted: told to leave after step" in log(project, job)
    again = (
        f"Go on by: RUN_DIR={run} LAUNCHER=mpirun "
        "sbatch --nodes=2 launch/slurm/train.sbatch --config=quick"
    )
    assert again in log(project, job)
    for ends in (True, False):
        job = submit(cluster, project, TEMPLATE, *LONGER, RUN_DIR=run)
        assert cluster.ends(job) == "COMPLETED", log(project, job)
        assert ("epoch 2 of 2" in log(project, job)) == ends


def test_an_array_of_seeds_and_its_summary(cluster, project):
    """Each seed runs on one node, side by side.

    Told to leave, each queues itself again, and not the others.
    """
    job = submit(cluster, project, "--nodes=1", "--array=0-1", TEMPLATE, *RECIPE)
    cluster.until(
        lambda: sum("env -i " in log_file.read_text() for log_file in project.glob("*.log")) == 2,
        150,
    )
    assert cluster.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    commands = [line for line in Path(TEMPLATE).read_text().splitlines() if "recipe.report" in line]
    words = shlex.split(commands[0].removeprefix("#   sbatch ").replace("$job", job))
    report = cluster.submit("--chdir", str(project), "--output=report.log", *words)
    assert cluster.ends(report, 200) == "COMPLETED", cluster.state(job)
    assert "2 runs:" in (project / "report.log").read_text()
    seeds = [
        runlog.read_recipe(project / f"runs/imagenet-1hr-{job}-seed{seed}").seed for seed in (0, 1)
    ]
    assert seeds == [0, 1]


def test_the_doctor_in_an_allocation(cluster, project):
    """It needs no ssh.

    It names a host of the hostfile that isn't the job's, and examines the others.
    """
    (project / "hosts").write_text("n2 slots=1\nn9 slots=1\nn1 slots=1\n")
    doctor = ".venv/bin/python -m launch.doctor --json --hostfile hosts"
    job = cluster.submit(
        "--chdir", str(project), *TWO_NODES, "--output=doctor.log", "--wrap", doctor
    )
    cluster.ends(job)
    printed = (project / "doctor.log").read_text()
    report = json.loads(printed[printed.index("{\n") :])
    assert [host["how"] for host in report["hosts"]] == ["srun", "", "srun"]
    assert list(report["facts"]) == ["n1", "n2"] and len(report["network"]["links"]) == 2
    assert {"host": "n9", "what": "it is not in this job's allocation"}.items() <= report[
        "findings"
    ][0].items()


def test_nodes_that_are_down_drop_out_of_an_elastic_run(cluster):
    allocation = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_TASKS_PER_NODE": "4(x2)",
    }
    discover = [str(BIN / "python"), "-m", "launch.hostfile", "discover"]
    assert cluster.run(*discover, **allocation).stdout == "n1:4\nn2:4\n"
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        assert cluster.run(*discover, **allocation).stdout == "n1:4\n"
    finally:
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    done = cluster.run(*discover, **allocation, PATH="/none")
    assert (done.returncode, done.stdout) == (1, "") and "error: sinfo doesn't tell" in done.stderr


def test_a_k_that_the_tasks_cannot_share_fails_at_once(cluster, project):
    job = submit(cluster, project, TEMPLATE, *SYNTHETIC.but(k=3).flags)
    assert cluster.ends(job, 150) == "FAILED"
    assert "error: config.k=3 workers can't be shared evenly by 2 ranks" in log(project, job)
    assert not list((project / "runs").rglob("config.json"))


def test_a_run_named_in_the_recipes_way_is_refused(cluster, project):
    job = submit(cluster, project, TEMPLATE, *RECIPE, "--run_dir=runs/mine")
    assert cluster.ends(job, 150) == "FAILED"
    assert "error: --run_dir is set here: name the run by RUN_DIR=" in log(project, job)


def test_tasks_of_an_srun_without_mpi_refuse_to_train_alone(cluster, project):
    """The batch script's own process may be alone, since srun has not started it."""
    alone = (
        "from recipe.ranks import binding, collectives; binding.start('torch', False); "
        "print('alone:', collectives.size())"
    )
    srun = [
        "srun",
        "--mpi=none",
        ".venv/bin/python",
        *SYNTHETIC.train("runs/mine"),
    ]
    words = f"{shlex.join(['.venv/bin/python', '-c', alone])}; {shlex.join(srun)}"
    job = cluster.submit("--chdir", str(project), *TWO_NODES, "--output=alone.log", "--wrap", words)
    assert cluster.ends(job) == "FAILED"
    printed = (project / "alone.log").read_text()
    assert "alone: 1" in printed, printed
    assert (
        printed.count(
            "srun started 2 processes without MPI, which can't find each other: give --mpi=pmix"
        )
        == 2
    ), printed
    assert not (project / "runs").exists()


def test_a_slurm_without_pmix_is_told(cluster, project, tmp_path):
    """Slurm gets a copy of its plugin folder, without the plugins of PMIx."""
    config = cluster.run("scontrol", "show", "config").stdout
    plugins = Path(re.search(r"PluginDir\s*= (\S+)", config)[1])
    (tmp_path / "plugins").mkdir()
    for file in plugins.iterdir():
        if "pmix" not in file.name:
            (tmp_path / "plugins" / file.name).symlink_to(file)
    conf = tmp_path / "slurm.conf"
    conf.write_text(cluster.conf.read_text() + f"PluginDir={tmp_path / 'plugins'}\n")
    shutil.copy(cluster.conf.with_name("cgroup.conf"), tmp_path)
    words = [str(BIN / "python"), "-m", "launch.run", "--launcher", "srun", "x"]
    done = cluster.run("salloc", "--quiet", *TWO_NODES, *words, SLURM_CONF=str(conf))
    assert done.returncode == 2
    assert "error: srun --mpi=pmix does not work here (" in done.stderr, done.stderr


def test_the_gloo_step_passes_on_a_signal_that_comes_before_its_program_has_started():
    program = (
        "import signal, subprocess; from launch import gloo; start = subprocess.Popen; "
        "subprocess.Popen = lambda words: (signal.raise_signal(signal.SIGUSR1), start(words))[1]; "
        "print(gloo.status_of(['sleep', '60']))"
    )
    done = subprocess.run(
        [BIN / "python", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.stdout == f"{128 + signal.SIGUSR1}\n", done.stderr


def test_the_gloo_step_outside_of_slurm_says_so():
    variables = {n: value for n, value in os.environ.items() if not n.startswith("SLURM_")}
    done = subprocess.run(
        [BIN / "python", "-m", "launch.gloo", "x"],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "this is no task of Slurm's" in done.stderr
