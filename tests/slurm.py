"""A real Slurm of a few nodes on this machine for the tests: its own daemons, ports and folder."""

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.ranks import ROOT, environment

# Two virtual nodes have one kernel: ranks of both would give their shared memory the same names.
ONE_KERNEL = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,tcp",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_MCA_oob_tcp_if_include": "lo",
}
MORTAL = [
    "setpriv",
    "--pdeathsig",
    "KILL",
]  # a daemon dies with the tests, also when these are killed
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/log/%n
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{parameters}
KillWait=2
SlurmdTimeout=30
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=8 RealMemory=4000 Gres=gpu:8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=off
"""


def missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if os.getuid() != 0:
        return "Slurm's daemons run as root"
    lacking = [
        command
        for command in ("slurmctld", "slurmd", "sbatch", "srun", "setpriv")
        if not shutil.which(command)
    ]
    return f"{', '.join(lacking)} not installed (slurm-wlm)" if lacking else ""


needs_pmix = pytest.mark.skipif(
    not list(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so")),
    reason="libpmix.so is not where Slurm's plugin looks for it (libpmix-dev)",
)
needs_slurm = pytest.mark.skipif(bool(missing()), reason=missing())


class Slurm:
    """Nodes n1 and n2 of 8 CPUs and 8 GPUs, by their word; partitions low, the default, and high,
    which preempts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._ports = free_ports(3)
        self._daemons: list[subprocess.Popen] = []

    def preempt_with(self, signal: str) -> None:
        """USR1 to the batch shell, as its --signal asks for, or TERM to the steps, as Slurm does
        unless told.
        """
        self._write(signal)
        assert self.run("scontrol", "reconfigure").returncode == 0

    def _write(self, signal: str) -> None:
        parameters = "SlurmctldParameters=preempt_send_user_signal" if signal == "USR1" else ""
        host, ports = socket.gethostname(), self._ports
        self.conf.write_text(
            CONF.format(host=host, folder=self.folder, ports=ports, parameters=parameters)
        )

    def start(self) -> None:
        for name in ("log", "state", "spool/n1", "spool/n2", "tmp/n1", "tmp/n2"):
            (self.folder / name).mkdir(parents=True)
        self._write("USR1")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for number in range(8):
            os.mknod(
                self.folder / f"gpu{number}", stat.S_IFCHR, os.makedev(1, 3)
            )  # /dev/null by another name
        (self.folder / "gres.conf").write_text(
            f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-7]\n"
        )
        for daemon in (
            ["slurmctld", "-D", "-i"],
            ["slurmd", "-D", "-N", "n1"],
            ["slurmd", "-D", "-N", "n2"],
        ):
            log = (self.folder / "log" / "-".join(daemon)).open("w")
            words, options = (
                [*MORTAL, *daemon],
                {"env": self.environment(), "stdout": log, "stderr": log},
            )
            self._daemons.append(subprocess.Popen(words, **options, start_new_session=True))
        self.until(lambda: self.run("sinfo", "-h", "-o", "%T %D").stdout == "idle 2\n", 20)

    def stop(self) -> None:
        """Daemons and whatever they started, also when they don't answer."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.cancel_all()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(self.conf):
                    process.kill()
        for daemon in self._daemons:
            daemon.wait()

    def cancel_all(self) -> None:
        """Cancel all jobs and wait until they have gone."""
        if self.run("squeue", "-h").stdout:
            self.run("scancel", "--user=root")
            self.until(lambda: not self.run("squeue", "-h").stdout, 60)

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {
            name: value for name, value in environment().items() if not name.startswith("SLURM_")
        }
        return kept | ONE_KERNEL | {"SLURM_CONF": str(self.conf), **extra}

    def run(self, *command: str, **extra: str) -> subprocess.CompletedProcess:
        """Runs one of Slurm's commands; stdout and stderr apart."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def submit(self, *words: str, **extra: str) -> str:
        """sbatch: the job's number."""
        done = self.run("sbatch", "--parsable", *words, **extra)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETED or FAILED; of an array, of its tasks, each once."""
        done = self.run("scontrol", "show", "job", job, "--oneliner")
        states = [
            word.partition("=")[2] for word in done.stdout.split() if word.startswith("JobState=")
        ]
        return " ".join(sorted(set(states)))

    def ends(self, job: str, seconds: float = 150) -> str:
        """Waits for a job's end: the state it ended in."""
        going_on = {"PENDING", "RUNNING", "SIGNALING", "COMPLETING"}
        self.until(lambda: not going_on & set(self.state(job).split()), seconds)
        return self.state(job)

    def until(self, true, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not true():
            logs = [path.read_text()[-1500:] for path in (self.folder / "log").iterdir()]
            assert time.monotonic() < end, "\n".join([*logs, self.run("squeue").stdout])
            time.sleep(0.3)


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A running Slurm, and nothing of it afterwards."""
    made = Slurm(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def free_ports(count: int) -> list[int]:
    """Ports in a row that nobody listens at."""
    for first in range(17000 + os.getpid() % 1000, 30000, 7):
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            for port in range(first, first + count):
                opened.enter_context(socket.socket()).bind(("", port))
            return list(range(first, first + count))
    raise RuntimeError("no free ports")
