"""launch.run: the command it prints is the one it runs.

It has what people forget, and not their secrets.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from launch import run
from tests.hosts import hosts, needs_hosts
from tests.ranks import ROOT, command, environment
from tests.recipes import LONG

HELLO = (
    "import os, socket, numpy, horovod.torch as hvd, torch; hvd.init(); "
    "total = hvd.allreduce(torch.ones(1), op=hvd.Sum).item(); "
    "secrets = [name for name, value in os.environ.items() if value == 'secret']; "
    "print(f'rank {hvd.rank()} of {total:.0f} on {socket.gethostname()}, secrets {secrets}', "
    "os.environ.get('HOROVOD_FUSION_THRESHOLD'), flush=True)"
)


SECRETS = dict.fromkeys(
    ("API_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "SLURM_JWT"), "secret"
)
ELASTIC = ["--launcher", "horovodrun", "--hostfile", "hostfiles/localhost", "--elastic"]


def launch_run(*words: str, **extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.run", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
        env=environment(**SECRETS, **extra),
    )


class Plan(NamedTuple):
    """What a dry run says would be run."""

    variables: dict[str, str]
    command: list[str]


def dry(*words: str, **extra: str) -> Plan:
    """Return what would be run."""
    done = launch_run("--dry-run", *words, **extra)
    assert done.returncode == 0, done.stderr
    printed = shlex.split(done.stdout)
    assert printed[:2] == ["env", "-i"]
    end = next(i for i, word in enumerate(printed) if i > 1 and "=" not in word)
    return Plan(dict(word.split("=", 1) for word in printed[2:end]), printed[end:])


def test_mpirun_on_32_servers():
    variables, command = dry(
        "--hostfile", "hostfiles/bigbasin-32", "--interface", "ib0", "--", "python", "-m", "x"
    )
    text = " ".join(command)
    assert command[:4] == ["mpirun", "-np", "256", "-H"] and command[4].startswith("bb01:8,bb02:8,")
    assert "--bind-to none --map-by slot" in text
    assert "--mca oob_tcp_if_include ib0 --mca btl_tcp_if_include ib0" in text
    assert "--mca oob_tcp_keepalive_time 10" in text
    assert command[-3:] == ["python", "-m", "x"]
    sent = [command[i + 1] for i, word in enumerate(command) if word == "-x"]
    assert (
        {"PATH", "PYTHONPATH", "NCCL_SOCKET_IFNAME", "HOROVOD_CYCLE_TIME"}
        <= set(sent)
        <= set(variables)
    )
    assert not SECRETS.keys() & variables.keys()


def test_what_the_user_sets_wins_and_is_sent():
    variables, command = dry(
        "--hostfile", "hostfiles/bigbasin-4", "x", HOROVOD_CYCLE_TIME="7", NCCL_DEBUG="INFO"
    )
    assert (variables["HOROVOD_CYCLE_TIME"], variables["NCCL_DEBUG"]) == ("7", "INFO")
    assert {"HOROVOD_CYCLE_TIME", "NCCL_DEBUG"} <= set(command)


def test_horovodrun_on_this_machine():
    variables, command = dry("--launcher", "horovodrun", "-np", "2", "python", "-c", "print('a b')")
    assert command == [
        "horovodrun",
        "--gloo",
        "-np",
        "2",
        "-H",
        "localhost:2",
        "python",
        "-c",
        "print('a b')",
    ]
    assert (
        not SECRETS.keys() & variables.keys() and "HOROVOD_HIERARCHICAL_ALLREDUCE" not in variables
    )


def test_srun_in_an_allocation():
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "bb[01-02]",
        "SLURM_TASKS_PER_NODE": "8(x2)",
    }
    options = ["--launcher", "srun", "--log-dir", "100%"]
    variables, command = dry(
        *options, "x", **slurm, SLURM_EXPORT_ENV="NONE", CUDA_VISIBLE_DEVICES="2,3"
    )
    assert "--mpi=pmix --ntasks=16 --distribution=block --kill-on-bad-exit=1" in " ".join(command)
    assert command[-3:] == ["--output", "100%%/rank.%t", "x"]
    assert (variables["SLURM_JOB_ID"], variables["CUDA_VISIBLE_DEVICES"]) == ("1", "2,3")
    assert "SLURM_EXPORT_ENV" not in variables, "srun would send no other variable"
    _, command = dry("x", **slurm)
    assert command[:3] == ["mpirun", "-np", "16"] and "-H" not in command, (
        "mpirun asks Slurm for the hosts"
    )
    assert dry("x", **slurm, SLURM_NTASKS="9").command[:3] == ["mpirun", "-np", "9"], (
        "of sbatch --ntasks=9"
    )
    assert dry("x", **slurm, SLURM_NTASKS="").command[:3] == ["mpirun", "-np", "16"]
    assert dry("-np", "2", "x", SLURM_JOB_ID="").command[:5] == [
        "mpirun",
        "-np",
        "2",
        "-H",
        "localhost:2",
    ]


def test_what_a_scheduler_does_not_tell_is_said(tmp_path):
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "bb[01-02]",
        "SLURM_TASKS_PER_NODE": "1(x2)",
    }
    note = launch_run("--dry-run", "x", **slurm).stderr
    assert note.startswith(
        "note: Slurm was not told how many tasks, and counts 1(x2) a node: 2 ranks; give sbatch"
    )
    assert launch_run("--dry-run", "x", **slurm, SLURM_NTASKS_PER_NODE="1").stderr == ""
    assert launch_run("--dry-run", "-np", "2", "x", **slurm).stderr == ""
    done = launch_run("--dry-run", "x", **slurm, SLURM_HET_SIZE="2")
    assert (
        done.returncode == 2
        and "is the first only of this job's 2 components (SLURM_HET_SIZE)" in done.stderr
    )
    done = launch_run("--dry-run", "x", **slurm, SLURM_NTASKS="many")
    assert (
        done.returncode == 2 and "error: SLURM_NTASKS=many is not a number of tasks" in done.stderr
    )
    nodes = tmp_path / "the nodes"
    nodes.write_text("h1\nh1\nh2\n")
    note = launch_run("--dry-run", "-np", "3", "x", PBS_NODEFILE=str(nodes)).stderr
    assert note.startswith(
        f"note: all ranks are on this machine; PBS_NODEFILE names the hosts of this job: '{nodes}'"
    )
    conversion = note[note.index("(") + 1 : note.rindex(")")]
    subprocess.run(conversion, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "hosts").read_text() == "h1 slots=2\nh2 slots=1\n"
    nodes.write_text("h1\nh1\n")
    assert launch_run("--dry-run", "-np", "2", "x", PBS_NODEFILE=str(nodes)).stderr == ""


def test_mpirun_keeps_names_that_it_would_cut_or_refuse(tmp_path):
    file = tmp_path / "hosts"
    cut = ["--mca", "orte_keep_fqdn_hostnames", "1", "--mca", "regx", "naive"]
    for name, settings in (
        ("bb01", []),
        ("10.0.0.1", []),
        ("bb_01", cut[3:]),
        ("bb01.example.org", cut),
    ):
        file.write_text(f"{name} slots=1\n")
        command = dry("--hostfile", str(file), "x").command
        first = command.index("--mca") if "--mca" in command else 0
        assert (
            command[first : first + len(settings)] == settings
            and command.count("--mca") == len(settings) // 3
        )


def test_a_list_too_long_for_a_command_is_given_as_a_file(tmp_path):
    file = tmp_path / "many hosts"
    lines = [f"gpu-worker-{i}.training.cluster.example.org slots=8" for i in range(3000)]
    file.write_text("\n".join(lines))
    for launcher in ("mpirun", "horovodrun"):
        command = dry("--launcher", launcher, "--hostfile", str(file), "x").command
        assert command[command.index("--hostfile") + 1] == str(file) and "-H" not in command
        assert max(map(len, command)) < 2**17
    file.write_text(",".join(lines))
    done = launch_run("--hostfile", str(file), "x")
    assert done.returncode == 2
    assert (
        f"python -m launch.hostfile convert '{file}' --to openmpi > NEW, then --hostfile NEW"
        in done.stderr
    )


def test_an_elastic_run_asks_for_the_hosts_again_and_again():
    words = ["--launcher", "horovodrun", "--elastic", "8:64", "--hostfile", "hostfiles/bigbasin-4"]
    _, command = dry(*words, "python", "-m", "recipe.train", "--config=imagenet_1hr")
    discovery = f"{sys.executable} -m launch.hostfile discover hostfiles/bigbasin-4"
    elastic = ["--min-np", "8", "--max-np", "64", "--host-discovery-script", discovery]
    assert command[: 4 + len(elastic)] == ["horovodrun", "--gloo", "-np", "32", *elastic]


def test_one_server_gets_no_settings():
    assert run.settings(1, False, "") == {}


def test_several_servers_reduce_by_nccl_alone_without_delay():
    assert run.settings(4, False, "ib0,ib1") == {
        "HOROVOD_FUSION_THRESHOLD": "67108864",
        "HOROVOD_CYCLE_TIME": "0.5",
        "NCCL_SOCKET_IFNAME": "ib0,ib1",
        "HOROVOD_GLOO_IFACE": "ib0",  # Gloo takes one
    }


def test_the_papers_three_phases_are_an_option():
    words = ["--hostfile", "hostfiles/bigbasin-4", "x"]
    assert "HOROVOD_HIERARCHICAL_ALLREDUCE" not in dry(*words).variables
    assert dry("--hierarchical", *words).variables["HOROVOD_HIERARCHICAL_ALLREDUCE"] == "1"


def test_what_compilers_and_allocators_read_is_sent():
    values = {
        "XLA_FLAGS": "--xla_gpu_autotune_level=2 --xla_dump_to=a b",
        "TF_XLA_FLAGS": "--tf_xla_auto_jit=2",
        "TF_GPU_ALLOCATOR": "cuda_malloc_async",
        "TORCHINDUCTOR_CACHE_DIR": "cache",
        "TRITON_CACHE_DIR": "cache",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVIDIA_TF32_OVERRIDE": "0",
    }
    variables, command = dry("--hostfile", "hostfiles/bigbasin-4", "x", **values)
    assert variables.items() >= values.items()
    assert values.keys() <= set(command)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-np", "2"], "nothing to run"),
        (["python"], "how many ranks? Give -np for this machine, or --hostfile"),
        (
            ["--hostfile", "hostfiles/localhost", "-np", "3", "x"],
            "-np 3 ranks don't fit into 2 slots",
        ),
        (["--hostfile", "hostfiles/none", "x"], "hostfiles/none"),
        (["-np", "0", "x"], "-np 0 ranks don't fit"),
        (
            ["-np", "1", "--log-dir", "at:noon", "x"],
            "--log-dir=at:noon: mpirun would cut it at the colon",
        ),
        (["--hostfile", "hostfiles/localhost", "-np", "0", "x"], "-np 0 ranks don't fit"),
        (["--launcher", "srun", "-np", "2", "x"], "srun needs a Slurm allocation"),
        (
            ["--elastic", "1:2", "--hostfile", "hostfiles/localhost", "x"],
            "--elastic needs --launcher=horovodrun",
        ),
        (
            ["--launcher", "horovodrun", "--elastic", "1:2", "-np", "2", "x"],
            "--elastic needs --hostfile",
        ),
        (
            [
                "--launcher",
                "horovodrun",
                "--hostfile",
                "hostfiles/bigbasin-4",
                "--hierarchical",
                "x",
            ],
            "--hierarchical needs MPI between the servers",
        ),
        (["-np", "2", "--hierarchical", "x"], "needs several servers of several ranks, not 2 on 1"),
        (["--elastic", "2", "x"], "'2' is not MIN:MAX ranks"),
        ([*ELASTIC, "8:9", "x"], "2 ranks to begin with are not among --elastic=8:9"),
        (
            [*ELASTIC, "1:3", "python", "-m", "recipe.train", "--config=quick"],
            "config.k=2 workers have work for 2",
        ),
        (["--launcher", "pbs", "x"], "invalid choice: 'pbs'"),
        (["--launcher", "gloo", "x"], "did you mean horovodrun?"),
        (["--launcher", "srun_gloo", "x"], "did you mean srun-gloo?"),
        (["--np", "2", "x"], "unrecognized arguments: --np; did you mean -np?"),
        (["--machinefile", "f", "x"], "did you mean --hostfile?"),
        (["-H", "a:2", "x"], "did you mean --hostfile?"),
        (["--network-interfaces=eth0", "x"], "did you mean --interface?"),
        (["--logdir", "x"], "did you mean --log-dir?"),
        (["--dryrun", "x"], "did you mean --dry-run?"),
        (["--purple", "x"], "unrecognized arguments: --purple (--help says more)"),
        (
            ["-np", "3", "python", "-m", "recipe.train", "--config=imagenet_8gpu"],
            "config.k=8 workers can't be shared",
        ),
        (
            ["-np", "8", "python", "-m", "recipe.train", "--config=imagenet_8"],
            "did you mean --config=imagenet_8gpu?",
        ),
    ],
)
def test_a_mistake_is_one_sentence(words, says):
    done = launch_run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_folder_for_the_output_that_cannot_be_made():
    done = launch_run("--log-dir", "/proc/none", "-np", "1", sys.executable, "-c", "")
    assert done.returncode == 2
    assert (
        "error: --log-dir=/proc/none can't be made" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_an_interface_that_is_not_there(launcher):
    """Without the check, horovodrun ends with a traceback."""
    done = launch_run(
        "--launcher", launcher, "--interface", "ib7", "-np", "1", sys.executable, "-c", ""
    )
    assert done.returncode == 2
    assert (
        "error: --interface=ib7: this machine has lo" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_another_mpi_that_comes_first_is_told(tmp_path):
    """It behaves as MPICH's.

    That takes the options for a call for help, starts nothing, and ends with 0.
    """
    other = tmp_path / "mpirun"
    other.write_text("#!/bin/sh\necho Usage: ./mpiexec\n")
    other.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch_run("-np", "1", sys.executable, "-c", "", PATH=path)
    assert done.returncode == 2
    assert (
        f"error: {other} is not Open MPI's: put the environment's first: source .venv/bin/activate"
        in done.stderr
    )
    command = [sys.executable, "-m", "launch.doctor", "--hostfile", "hostfiles/localhost"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(PATH=path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and f"{other} is not Open MPI's" in done.stdout, done.stdout


@pytest.mark.ranks
@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_ranks_of_this_machine(launcher):
    done = launch_run("--launcher", launcher, "-np", "2", sys.executable, "-c", HELLO)
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2 on" in done.stdout and "rank 1 of 2 on" in done.stdout
    assert done.stdout.count("secrets []") == 2


def on_hosts(launcher: str, file: Path) -> list[str]:
    """Return a command that runs HELLO on the hosts of a file."""
    command = [sys.executable, "-m", "launch.run", "--launcher", launcher]
    command += ["--hostfile", str(file), "--interface", "eth0"]
    return [*command, sys.executable, "-c", HELLO]


def test_the_exit_status_is_the_programs():
    assert launch_run("-np", "1", sys.executable, "-c", "raise SystemExit(75)").returncode == 75


@pytest.mark.ranks
@needs_hosts
@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_ranks_of_three_hosts(tmp_path, launcher):
    file = tmp_path / "three"
    file.write_text("h[1-3] slots=1\n")
    with hosts(tmp_path / "hosts", 3) as cluster:
        command = on_hosts(launcher, file)
        done = cluster.run("h1", command, **SECRETS)
    assert done.returncode == 0, done.stdout
    for host in ("h1", "h2", "h3"):
        assert f"of 3 on {host}, secrets [] {64 * 2**20}" in done.stdout


@pytest.mark.ranks
@needs_hosts
@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_ranks_of_hosts_with_full_names_and_underscores(tmp_path, launcher):
    """Two of the names have the same first label."""
    names = ["node_1", "node.rack1.example.org", "node.rack2.example.org"]
    file = tmp_path / "three"
    file.write_text("".join(f"{name} slots=1\n" for name in names))
    with hosts(tmp_path / "hosts", 3, names) as cluster:
        command = on_hosts(launcher, file)
        done = cluster.run(names[0], command)
        assert done.returncode == 0, done.stdout
        doctor = [sys.executable, "-m", "launch.doctor", "--hostfile", str(file)]
        doctor += ["--interface", "eth0"]
        examination = cluster.run(names[0], doctor) if launcher == "mpirun" else None
    for name in names:
        assert f"of 3 on {name}, secrets [] {64 * 2**20}" in done.stdout
    if examination is not None:
        assert "all is well (3 hosts, " in examination.stdout, examination.stdout


NOBODY = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
HOMELESS = [*NOBODY, "env", "-u", "HOME", "-u", "TFDS_DATA_DIR"]
no_users = subprocess.run([*HOMELESS, "true"], capture_output=True, check=False).returncode != 0


@pytest.mark.ranks
@pytest.mark.skipif(no_users, reason="a user without an entry in /etc/passwd needs unshare --user")
def test_a_user_without_a_home_is_told_and_served(tmp_path):
    """Without launch.run, Open MPI dies by signal 11."""

    def homeless(*words: str) -> subprocess.CompletedProcess:
        command = [*HOMELESS, sys.executable, *words]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment(TMPDIR=str(tmp_path)),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    sentence = "HOME is not set, and user 54321 has no entry in /etc/passwd: export HOME=FOLDER"
    for launcher in ("mpirun", "horovodrun"):
        done = homeless(
            "-m", "launch.run", "--launcher", launcher, "-np", "2", sys.executable, "-c", HELLO
        )
        assert done.returncode == 0 and "rank 1 of 2" in done.stdout, done.stderr
        assert f"note: {sentence}" in done.stderr
    alone = homeless("-c", "from recipe.ranks import binding; print(binding.init('torch').size())")
    assert (alone.returncode, alone.stdout) == (0, "1\n"), alone.stderr
    prepare = homeless("-m", "recipe.data.prepare", "fashion_photos")
    assert (
        prepare.returncode == 2
        and f"error: {sentence}" in prepare.stderr
        and "Traceback" not in prepare.stderr
    )
    doctor = homeless("-m", "launch.doctor", "--hostfile", str(ROOT / "hostfiles/localhost"))
    assert (
        doctor.returncode == 1 and "FAULT  a plain mpirun dies by signal 11 here" in doctor.stdout
    ), doctor.stdout
    assert not (tmp_path / "~" / ".horovod").exists(), "horovodrun's cache"


START = 120  # seconds, on a busy machine


@pytest.mark.ranks
@pytest.mark.parametrize("launcher", ["mpirun", "gloo", "launch.run"])
def test_the_readmes_signal_reaches_the_ranks_of_every_launcher(tmp_path, launcher):
    """It reaches neither the launcher nor its shells, which it would end."""
    readme = (ROOT / "README.md").read_text().splitlines()
    (signal_command,) = (line for line in readme if line.startswith("pkill -USR1"))
    run_dir = tmp_path / "its run"
    start = [sys.executable, "-m", "launch.run", "--launcher", "horovodrun", "-np", "2"]
    start.append(sys.executable)
    words = start if launcher == "launch.run" else command(2, [], launcher)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*words, *LONG.train(run_dir)],
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=log,
        )
    end = time.monotonic() + START
    while "step" not in (tmp_path / "log").read_text():
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.2)
    subprocess.run(signal_command.replace("runs/mine", str(run_dir)), shell=True, check=True)
    assert process.wait(START) == (75 if launcher == "mpirun" else 1)
    printed = (tmp_path / "log").read_text()
    assert "preempted: told to leave after step" in printed, printed
    assert list((run_dir / "checkpoints").iterdir())
