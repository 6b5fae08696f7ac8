"""What can be seen before Horovod starts: how many processes the launcher started, what MPI and Gloo would die of."""

import os
import pwd
import socket
from dataclasses import dataclass

import psutil

from recipe.errors import UsageError

# The nearest launcher first: a rank of horovodrun's or mpirun's has inherited Slurm's words from where it was started.
LAUNCHERS = {
    "HOROVOD_SIZE": "horovodrun",
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "another MPI's mpiexec",
    "SLURM_STEP_NUM_TASKS": "srun",
    "WORLD_SIZE": "torchrun",
}
CERTAIN = (
    "HOROVOD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
)  # who starts processes that are meant to be ranks
# Open MPI's mpirun refuses root, as in containers, and machines whose name has an underscore, unless told.
ANYWHERE = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_regx": "naive",
}
SLURM_STEPS = 2**32 - 16  # steps from here on are none of srun's: batch scripts, interactive shells


@dataclass(frozen=True)
class Word:
    """How many processes the nearest launcher says it has started, by which variable."""

    variable: str = ""  # empty: there is no launcher
    processes: int = 1

    @property
    def launcher(self) -> str:
        return LAUNCHERS[self.variable]

    @property
    def certain(self) -> bool:
        """Whether these processes must find each other."""
        return self.variable in CERTAIN


def word() -> Word:
    """The nearest launcher's; of an elastic one, whose ranks come and go, nothing."""
    if os.environ.get("HOROVOD_ELASTIC", "0") != "0":
        return Word()
    counts = {name: os.environ.get(name, "") for name in LAUNCHERS}
    if not _in_srun():
        del counts["SLURM_STEP_NUM_TASKS"]
    elif counts["PMI_SIZE"] == counts["SLURM_STEP_NUM_TASKS"]:
        del counts["PMI_SIZE"]  # of srun --mpi=pmi2
    if not (os.environ.get("RANK") and os.environ.get("LOCAL_RANK")):
        del counts["WORLD_SIZE"]  # of a pod
    return next(
        (Word(name, int(count)) for name, count in counts.items() if count.isdecimal()), Word()
    )


def check_srun() -> None:
    """Raises UsageError for tasks of an srun without MPI, in which Open MPI ends the process by pages of its own."""
    told = any(
        os.environ.get(name) for name in ("PMI_RANK", "PMIX_RANK", "HOROVOD_GLOO_RENDEZVOUS_ADDR")
    )
    if word().variable == "SLURM_STEP_NUM_TASKS" and word().processes > 1 and not told:
        raise UsageError(
            f"srun started {word().processes} processes without MPI, which can't find each other: give --mpi=pmix, "
            "or take python -m launch.run --launcher=srun-gloo, which needs none"
        )


def check_gloo() -> None:
    """Raises UsageError for what Gloo, of horovodrun --gloo and srun-gloo, dies of by a signal, without a sentence."""
    if not os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"):
        return
    host, interface = socket.gethostname(), os.environ.get("HOROVOD_GLOO_IFACE", "")
    if interface and not _has_address(interface):
        have = ", ".join(name for _, name in socket.if_nameindex() if _has_address(name))
        raise UsageError(
            f"HOROVOD_GLOO_IFACE={interface} is no network interface of {host} with an address: name one of {have}"
        )
    if not is_own(host):
        raise UsageError(
            f"the name of this machine, {host}, does not resolve to an address of its own, and Gloo needs one: add it "
            f"to /etc/hosts, `127.0.1.1 {host}` or, with several hosts, its address on their network"
        )


def homeless() -> bool:
    """Whether this user has no home directory to anybody's knowledge, as in containers that run as any number.

    Open MPI dies of that by signal 11, and `~` stands for nothing."""
    if "HOME" in os.environ:
        return False
    try:
        return not pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return True


def no_home() -> str:
    """The sentence about it."""
    return f"HOME is not set, and user {os.getuid()} has no entry in /etc/passwd: export HOME=FOLDER, one you may write to"


def is_own(name: str) -> bool:
    """Whether a name resolves to an address of this machine: only such a one can be bound to."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return any(_binds(family, address) for family, _, _, _, address in found)


def _in_srun() -> bool:
    """Whether this is a task of srun's, and not the shell of `srun --pty`, where one process is meant to be alone."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < SLURM_STEPS and "SLURM_PTY_PORT" not in os.environ


def _has_address(interface: str) -> bool:
    found = psutil.net_if_addrs().get(interface, [])
    return any(address.family in (socket.AF_INET, socket.AF_INET6) for address in found)


def _binds(family: int, address: tuple) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind(address)
    except OSError:
        return False
    return True
