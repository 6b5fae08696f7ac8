"""What can be seen before Horovod starts: the launcher's processes, and what would kill Horovod."""

import os
import pwd
import socket
from dataclasses import dataclass

import psutil

from recipe.errors import UsageError

# The launcher by the environment variable in which it counts its processes, the nearest first:
# a rank of horovodrun or mpirun has inherited Slurm's variables from where it was started.
LAUNCHERS = {
    "HOROVOD_SIZE": "horovodrun",
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "another MPI's mpiexec",
    "SLURM_STEP_NUM_TASKS": "srun",
    "WORLD_SIZE": "torchrun",
}
# The launchers all of whose processes are meant to be ranks.
CERTAIN = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Open MPI's mpirun refuses root, as in containers, and hosts with an underscore in their names,
# without these environment variables.
ANYWHERE = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_regx": "naive",
}
SLURM_STEPS = 2**32 - 16  # steps from here on are not srun's: batch scripts, interactive shells


@dataclass(frozen=True)
class LauncherCount:
    """How many processes the nearest launcher has started, and the variable that says so."""

    variable: str = ""  # empty: there is no launcher
    processes: int = 1

    @property
    def launcher(self) -> str:
        return LAUNCHERS[self.variable]

    @property
    def is_certain(self) -> bool:
        """Whether these processes must find each other."""
        return self.variable in CERTAIN


def launcher_count() -> LauncherCount:
    """Return the nearest launcher's count.

    An elastic launcher, whose ranks come and go, counts as none.
    """
    # What the launchers say.
    if os.environ.get("HOROVOD_ELASTIC", "0") != "0":
        return LauncherCount()
    counts = {name: os.environ.get(name, "") for name in LAUNCHERS}

    # Leave out the variables that have another meaning here.
    if not _in_srun():
        del counts["SLURM_STEP_NUM_TASKS"]
    elif counts["PMI_SIZE"] == counts["SLURM_STEP_NUM_TASKS"]:
        del counts["PMI_SIZE"]  # of srun --mpi=pmi2
    if not (os.environ.get("RANK") and os.environ.get("LOCAL_RANK")):
        del counts["WORLD_SIZE"]  # of a pod

    # The first in the table is the nearest.
    for name, count in counts.items():
        if count.isdecimal():
            return LauncherCount(name, int(count))
    return LauncherCount()


def check_srun() -> None:
    """Raise UsageError for the tasks of an srun without MPI.

    Open MPI would end them with pages of its own.
    """
    meeting_points = ("PMI_RANK", "PMIX_RANK", "HOROVOD_GLOO_RENDEZVOUS_ADDR")
    if any(os.environ.get(name) for name in meeting_points):
        return
    count = launcher_count()
    if count.variable == "SLURM_STEP_NUM_TASKS" and count.processes > 1:
        raise UsageError(
            f"srun started {count.processes} processes without MPI, which can't find each other: "
            "give --mpi=pmix, or take python -m launch.run --launcher=srun-gloo, which needs none"
        )


def check_gloo() -> None:
    """Raise UsageError for what would kill Gloo by a signal, without a message.

    Gloo is used by horovodrun --gloo and srun-gloo.
    """
    # Only Gloo's ranks have a rendezvous.
    if not os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"):
        return
    host = socket.gethostname()

    # Gloo looks up both in its start.
    interface = os.environ.get("HOROVOD_GLOO_IFACE", "")
    if interface and not _has_address(interface):
        usable = ", ".join(name for _, name in socket.if_nameindex() if _has_address(name))
        raise UsageError(
            f"HOROVOD_GLOO_IFACE={interface} is no network interface of {host} with an address: "
            f"name one of {usable}"
        )
    if not is_own(host):
        raise UsageError(
            f"the name of this machine, {host}, does not resolve to an address of its own, "
            f"and Gloo needs one: add it to /etc/hosts, `127.0.1.1 {host}` or, with several hosts, "
            "its address on their network"
        )


def homeless() -> bool:
    """Return whether this user has no home directory, as in containers with any user number.

    Open MPI then dies by signal 11, and `~` stands for nothing.
    """
    if "HOME" in os.environ:
        return False
    try:
        return not pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return True


def no_home() -> str:
    """Return the message about a missing home directory."""
    return (
        f"HOME is not set, and user {os.getuid()} has no entry in /etc/passwd: "
        "export HOME=FOLDER, one you may write to"
    )


def is_own(name: str) -> bool:
    """Return whether a name resolves to an address of this machine, to which it can bind."""
    try:
        addresses = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return any(_can_bind(family, address) for family, _, _, _, address in addresses)


def _in_srun() -> bool:
    """Return whether this is a task of srun, and not the shell of `srun --pty`.

    A process of that shell is meant to be alone.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < SLURM_STEPS and "SLURM_PTY_PORT" not in os.environ


def _has_address(interface: str) -> bool:
    addresses = psutil.net_if_addrs().get(interface, [])
    return any(address.family in (socket.AF_INET, socket.AF_INET6) for address in addresses)


def _can_bind(family: int, address: tuple) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind(address)
    except OSError:
        return False
    return True
