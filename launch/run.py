"""Starts a program on all ranks by mpirun, horovodrun or Slurm's srun.

It prints the whole command, then runs it.

    python -m launch.run --hostfile hostfiles/bigbasin-32 python -m recipe.train …
    # On this machine:
    python -m launch.run --launcher horovodrun -np 2 python -m recipe.train --config=quick
    # Hosts may come and go:
    python -m launch.run --launcher horovodrun --elastic 8:256 --hostfile hosts …
    # In a Slurm allocation, with MPI and without:
    python -m launch.run --launcher srun python -m recipe.train --config=imagenet_1hr
    python -m launch.run --launcher srun-gloo python -m recipe.train --config=imagenet_1hr

The ranks get the environment's variables below and no others, so that no secret travels. HOROVOD_…
and NCCL_… variables that are set win over the settings chosen here.
"""

import argparse
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launch import hostfile
from launch.command import Parser, run
from launch.hostfile import Host
from recipe.errors import UsageError
from recipe.ranks import launched

# What the ranks get.
FORWARDED = (
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "HOME",
    "USER",
    "LANG",
    "TMPDIR",
    "KERAS_BACKEND",
    "TFDS_DATA_DIR",
    "OMP_NUM_THREADS",
    "OPAL_PREFIX",
    "TF_CPP_MIN_LOG_LEVEL",
    "CUDA_DEVICE_ORDER",
)
FORWARDED_PREFIXES = (
    "HOROVOD_",
    "NCCL_",
    "UCX_",
    "FI_",
    # What compilers, allocators and GPU libraries read.
    "XLA_",
    "TF_XLA_",
    "TF_GPU_",
    "TF_FORCE_GPU_",
    "TORCHINDUCTOR_",
    "TRITON_",
    "PYTORCH_",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)
# What the launcher itself needs, by the beginnings of names.
LAUNCHERS_PREFIXES = (
    "CUDA_VISIBLE_DEVICES",
    "SSH_AUTH_SOCK",
    "TERM",
    "OMPI_MCA_",
    "OMPI_ALLOW_RUN_AS_ROOT",
    "SLURM_",
    "PMIX_",
)
# But not these. SLURM_JWT is a key. SLURM_EXPORT_ENV, of `sbatch --export`, would have srun keep
# the variables chosen here from the ranks.
WITHHELD = ("SLURM_JWT", "SLURM_EXPORT_ENV")

# Whether Open MPI is the environment's own, and not the system's.
OWN_OPEN_MPI = (Path(sys.prefix) / "bin" / "orted").exists()
PATIENCE = 120  # seconds until srun must have started something
LONGEST = 32 * os.sysconf("SC_PAGE_SIZE")  # bytes of one argument, for Linux

# Where schedulers that this launcher doesn't know keep a job's hosts, and what makes a hostfile of
# it.
A_LINE_A_SLOT = "sort {0} | uniq -c | awk '{{print $2, \"slots=\" $1}}' > hosts"
SCHEDULERS = {
    "PBS_NODEFILE": A_LINE_A_SLOT,
    "LSB_DJOB_HOSTFILE": A_LINE_A_SLOT,
    "PE_HOSTFILE": "awk '{{print $1, \"slots=\" $2}}' {0} > hosts",
    "OMPI_MCA_orte_default_hostfile": "--hostfile {0}",
}
# A lost host is noticed after 10 + 3 · 5 seconds. By default Open MPI takes 8 minutes, or for ever.
KEEPALIVE = {
    "oob_tcp_keepalive_time": "10",
    "oob_tcp_keepalive_intvl": "5",
    "oob_tcp_keepalive_probes": "3",
}


class RankRange(NamedTuple):
    """How many ranks an elastic run may have."""

    least: int
    most: int


@dataclass(frozen=True)
class Job:
    """What is to be started, and where."""

    program: list[str]
    hosts: list[Host]
    file: str  # with these hosts; empty: the Slurm allocation's, or this machine
    allocated: bool  # Slurm has told mpirun and srun the hosts
    ranks: int
    interface: str  # the network that the hosts talk by; empty: the launcher's choice
    log_dir: str  # for a file of each rank's output; empty: none
    elastic: list[str]  # horovodrun's options when hosts may come and go; empty: they may not
    environment: dict[str, str]  # of the ranks

    @property
    def servers(self) -> int:
        """Return the number of hosts."""
        return len(self.hosts)


def main(argv: list[str]) -> None:
    """Print the command for the job, and become it."""
    options = _parse(argv)
    job = _job(options, os.environ)
    command = LAUNCHERS[options.launcher](job)
    for note in _notes(options, job, os.environ):
        print(f"note: {note}", file=sys.stderr, flush=True)

    # The command as one line for a shell.
    variables = job.environment | _launchers_own(os.environ)
    assignments = [f"{name}={value}" for name, value in variables.items()]
    text = shlex.join(["env", "-i", *assignments, *command])
    print(text, file=sys.stdout if options.dry_run else sys.stderr, flush=True)
    if not options.dry_run:
        _prepare(command, job, variables)
        os.execvpe(command[0], command, variables)


# --- the launchers


def mpirun(job: Job) -> list[str]:
    """Return Open MPI's command: no rank bound to a core, ranks in the order of the hosts.

    Raise UsageError for a log folder that it can't take.
    """
    if ":" in job.log_dir:
        raise UsageError(
            f"--log-dir={job.log_dir}: mpirun would cut it at the colon; name a folder without"
        )
    words = ["mpirun", "-np", str(job.ranks)]

    # Where. Of a file it would look up all names, one after the other, deaf to signals.
    place = [] if job.allocated else _place(job, "mpirun")
    words += place
    if "--hostfile" in place:
        words += ["--mca", "if_base_do_not_resolve", "1"]
    words += ["--bind-to", "none", "--map-by", "slot"]
    if os.geteuid() == 0:
        words.append("--allow-run-as-root")
    if OWN_OPEN_MPI:
        words += ["--prefix", sys.prefix]  # where the other hosts find it

    for name, value in _mpi_parameters(job).items():
        words += ["--mca", name, value]

    # What the ranks get, and where their output goes.
    if job.log_dir:
        words += ["--output-filename", job.log_dir]
    for name in job.environment:
        words += ["-x", name]
    return words + job.program


def horovodrun(job: Job) -> list[str]:
    """Return the command of Horovod's own launcher, by Gloo: ssh, and no MPI."""
    words = ["horovodrun", "--gloo", "-np", str(job.ranks)]
    if launched.homeless():
        words.append("--disable-cache")  # it would lie in the home directory
    words += job.elastic or _place(job, "horovodrun")
    if job.interface:
        words += ["--network-interfaces", job.interface]
    if job.log_dir:
        words += ["--output-filename", job.log_dir]
    return words + job.program


def srun(job: Job) -> list[str]:
    """Return Slurm's command, with PMIx."""
    return _srun(job, "pmix") + job.program


def srun_gloo(job: Job) -> list[str]:
    """Return Slurm's command, without MPI."""
    return [*_srun(job, "none"), sys.executable, "-m", "launch.gloo", *job.program]


LAUNCHERS = {"mpirun": mpirun, "horovodrun": horovodrun, "srun": srun, "srun-gloo": srun_gloo}
MPI = ("mpirun", "srun")
HIERARCHICAL = (
    "reduce inside a server by NCCL and between servers by MPI, as the paper did; "
    "for networks where NCCL alone is slower"
)


def _srun(job: Job, mpi: str) -> list[str]:
    """Return srun's words before the program. Raise UsageError outside of a Slurm allocation."""
    if not hostfile.in_slurm(os.environ):
        raise UsageError(
            "srun needs a Slurm allocation, of salloc or sbatch; "
            "elsewhere take --launcher=horovodrun"
        )
    words = ["srun", f"--mpi={mpi}", f"--ntasks={job.ranks}"]
    words += ["--distribution=block", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    if job.log_dir:
        folder = job.log_dir.replace("%", "%%")
        words += ["--output", f"{folder}/rank.%t"]
    return words


def _place(job: Job, launcher: str) -> list[str]:
    """Return where mpirun or horovodrun starts ranks: a list or, where that is too long, the file.

    Raise UsageError when the launcher can't read the file.
    """
    listed = hostfile.render(job.hosts, "horovod")
    if len(listed) < LONGEST:
        return ["-H", listed]
    if job.file and launcher not in hostfile.unread(job.file):
        return ["--hostfile", job.file]
    source = f"convert {shlex.quote(job.file)} --to openmpi" if job.file else "write"
    raise UsageError(
        f"{len(job.hosts)} hosts are too long a list for {launcher}'s command: "
        f"python -m launch.hostfile {source} > NEW, then --hostfile NEW"
    )


def _mpi_parameters(job: Job) -> dict[str, str]:
    """Return Open MPI's parameters for the hosts' names, the network, and hosts that get lost."""
    own_name = socket.gethostname().partition(".")[0]  # as mpirun cuts it
    parameters = hostfile.mpirun_settings(host.name for host in job.hosts)
    parameters |= hostfile.mpirun_settings([own_name])
    if job.servers > 1:
        parameters |= KEEPALIVE | _networks(job.interface)
    return parameters


def _networks(interface: str) -> dict[str, str]:
    """Return Open MPI's networks for its daemons (oob) and its messages (btl).

    What the environment sets already is left out. Docker's bridge has the same address on every
    host.
    """
    already_set = set()
    for name in os.environ:
        if match := re.fullmatch(r"OMPI_MCA_(oob|btl)_tcp_if_(?:in|ex)clude", name):
            already_set.add(match[1])
    kind, names = ("include", interface) if interface else ("exclude", "lo,docker0")
    layers = [layer for layer in ("oob", "btl") if layer not in already_set]
    return {f"{layer}_tcp_if_{kind}": names for layer in layers}


# --- variables


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that ranks get."""
    return {
        name: value
        for name, value in environ.items()
        if name in FORWARDED or name.startswith(FORWARDED_PREFIXES)
    }


def settings(servers: int, hierarchical: bool, interface: str) -> dict[str, str]:
    """Return Horovod's and NCCL's variables for so many servers.

    They are starting points: `horovodrun --autotune` finds better ones. `hierarchical` reduces in
    three phases, as in the paper (sec. 4): inside a server by NCCL, between servers by MPI, inside
    again. Each phase waits for the one before, on the processor. NCCL alone waits for none.
    """
    variables = {}
    if hierarchical:
        variables["HOROVOD_HIERARCHICAL_ALLREDUCE"] = "1"
    if servers > 1:
        # ResNet-50 has 102 MB of gradients: the first part travels while backprop makes the rest.
        variables["HOROVOD_FUSION_THRESHOLD"] = str(64 * 2**20)
        variables["HOROVOD_CYCLE_TIME"] = "0.5"  # ms, how long a ready gradient may wait
    if interface:
        variables["NCCL_SOCKET_IFNAME"] = interface
        variables["HOROVOD_GLOO_IFACE"] = interface.split(",")[0]  # Gloo takes one
    return variables


def _launchers_own(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the launcher itself needs."""
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(LAUNCHERS_PREFIXES) and name not in WITHHELD
    }


# --- the job


def _parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raise UsageError for a wrong one."""
    parser = Parser(prog="python -m launch.run", description=__doc__)
    add = parser.add_argument
    add("--launcher", choices=list(LAUNCHERS), default="mpirun")
    add("--hostfile", help="default: the Slurm allocation, or this machine")
    add("-np", type=int, metavar="RANKS", help="default: all slots")
    elastic = "horovodrun: ranks; the hosts may change"
    add("--elastic", type=_rank_range, metavar="MIN:MAX", help=elastic)
    add("--interface", default="", help="the network between the hosts, such as eth0")
    add("--log-dir", default="", help="a folder for a file of each rank's output")
    add("--hierarchical", action="store_true", help=HIERARCHICAL)
    add("--dry-run", action="store_true", help="print the command only")
    program = "what to run, such as python -m recipe.train …"
    add("program", nargs=argparse.REMAINDER, help=program)
    return parser.parse_args(argv)


def _job(options: argparse.Namespace, environ: Mapping[str, str]) -> Job:
    """Return the job that the options ask for. Raise UsageError when there can be no such job."""
    program = options.program
    if program[:1] == ["--"]:
        program = program[1:]
    if not program:
        raise UsageError(
            "nothing to run: end the command with one, "
            "such as python -m recipe.train --config=quick"
        )

    # Hosts and ranks.
    hosts = _hosts(options, environ)
    ranks = _ranks(options, hosts, environ)
    if options.hierarchical:
        _check_hierarchical(options.launcher, len(hosts), ranks)
    _check_k(program, ranks, options.elastic)
    allocated = hostfile.in_slurm(environ) and options.launcher != "horovodrun"

    # Variables: what the user sets wins over what is chosen here.
    chosen = settings(len(hosts), options.hierarchical, options.interface)
    environment = chosen | forwarded(environ)
    if launched.homeless():
        environment["HOME"] = "/"

    return Job(
        program=program,
        hosts=hosts,
        file=options.hostfile or "",
        allocated=allocated and not options.hostfile,
        ranks=ranks,
        interface=options.interface,
        log_dir=options.log_dir,
        elastic=_elastic(options, ranks),
        environment=environment,
    )


def _hosts(options: argparse.Namespace, environ: Mapping[str, str]) -> list[Host]:
    """Return the hosts of the hostfile, of the Slurm allocation, or this machine."""
    if options.hostfile:
        return hostfile.read(options.hostfile)
    if hostfile.in_slurm(environ):
        return hostfile.from_slurm(environ)
    if options.np is None:
        raise UsageError("how many ranks? Give -np for this machine, or --hostfile")
    return [Host("localhost", options.np)]


def _ranks(options: argparse.Namespace, hosts: list[Host], environ: Mapping[str, str]) -> int:
    """Return how many ranks to start: all slots, unless something asks for fewer."""
    slots = sum(host.slots for host in hosts)
    limits = [slots]
    if not options.hostfile:
        limits.append(_tasks(environ) or slots)  # --ntasks may leave slots free
    if options.elastic:
        limits.append(options.elastic.most)
    ranks = min(limits) if options.np is None else options.np
    if not 1 <= ranks <= slots:
        raise UsageError(f"-np {ranks} ranks don't fit into {slots} slots; lower -np or add hosts")
    return ranks


def _tasks(environ: Mapping[str, str]) -> int | None:
    """Return the number of tasks of a Slurm job, None when the user did not give it."""
    tasks = environ.get("SLURM_NTASKS", "")
    if not tasks:
        return None
    if not tasks.isdecimal() or int(tasks) == 0:
        raise UsageError(
            f"SLURM_NTASKS={tasks[:80]} is not a number of tasks: unset it, or give -np"
        )
    return int(tasks)


def _rank_range(text: str) -> RankRange:
    """Read MIN:MAX."""
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX ranks, such as 8:256")
    return RankRange(int(match[1]), int(match[2]))


def _elastic(options: argparse.Namespace, ranks: int) -> list[str]:
    """Return horovodrun's options for an elastic run. Raise UsageError when there can be none."""
    if options.elastic is None:
        return []
    if options.launcher != "horovodrun":
        raise UsageError(
            f"--elastic needs --launcher=horovodrun; {options.launcher} keeps its ranks to the end"
        )
    if not options.hostfile and not hostfile.in_slurm(os.environ):
        raise UsageError(
            "--elastic needs --hostfile, a file that may then change, or a Slurm allocation"
        )

    # The ranks to begin with.
    least, most = options.elastic
    if not least <= ranks <= most:
        raise UsageError(
            f"{ranks} ranks to begin with are not among --elastic={least}:{most}; "
            "change -np or the hosts"
        )

    # horovodrun asks this script for the hosts again and again.
    discovery = [sys.executable, "-m", "launch.hostfile", "discover"]
    if options.hostfile:
        discovery.append(options.hostfile)
    limits = ["--min-np", str(least), "--max-np", str(most)]
    return [*limits, "--host-discovery-script", shlex.join(discovery)]


def _check_hierarchical(launcher: str, servers: int, ranks: int) -> None:
    """Raise UsageError when there are no three phases."""
    if launcher not in MPI:
        raise UsageError(
            f"--hierarchical needs MPI between the servers, which --launcher={launcher} does not "
            f"start: take --launcher={' or '.join(MPI)}, or leave it out"
        )
    if servers == 1 or ranks <= servers:
        raise UsageError(
            f"--hierarchical needs several servers of several ranks, not {ranks} on {servers}: "
            "leave it out"
        )


def _check_k(program: list[str], ranks: int, elastic: RankRange | None) -> None:
    """Raise UsageError when the program is the recipe and the ranks can't share its k workers."""
    if "recipe.train" not in program or {"-h", "--help"} & set(program):
        return
    from recipe import cli  # here, since the recipe's flags take half a second
    from recipe.rules.epoch import check_size

    arguments = program[program.index("recipe.train") + 1 :]
    recipe, *_ = cli.parse_recipe(arguments)
    if elastic is None:
        check_size(recipe, ranks)
    elif elastic.most > recipe.k:
        raise UsageError(
            f"--elastic up to {elastic.most} ranks: "
            f"config.k={recipe.k} workers have work for {recipe.k}"
        )


# --- what the environment does not say


def _notes(options: argparse.Namespace, job: Job, environ: Mapping[str, str]) -> list[str]:
    """Return sentences about what was assumed."""
    notes = []
    if launched.homeless():
        notes.append(f"{launched.no_home()}; the ranks get HOME=/")
    if options.hostfile:
        return notes
    if hostfile.in_slurm(environ):
        return notes + _slurm_notes(options, job, environ)
    return notes + _scheduler_notes(environ)


def _slurm_notes(options: argparse.Namespace, job: Job, environ: Mapping[str, str]) -> list[str]:
    """Say how many ranks were assumed, where the user told neither Slurm nor this program."""
    if options.np is not None or _tasks(environ) or environ.get("SLURM_NTASKS_PER_NODE"):
        return []
    per_node = environ.get("SLURM_TASKS_PER_NODE")
    return [
        f"Slurm was not told how many tasks, and counts {per_node} a node: {job.ranks} ranks; "
        "give sbatch or salloc --ntasks-per-node, a task a GPU"
    ]


def _scheduler_notes(environ: Mapping[str, str]) -> list[str]:
    """Say where a scheduler that this launcher doesn't know keeps the job's hosts."""
    notes = []
    for name, conversion in SCHEDULERS.items():
        path = environ.get(name)
        if path and len(_first_words(path)) > 1:
            quoted = shlex.quote(path)
            notes.append(
                f"all ranks are on this machine; {name} names the hosts of this job: {quoted}, "
                f"to be given by --hostfile ({conversion.format(quoted)})"
            )
    return notes


def _first_words(path: str) -> set[str]:
    """Return the hosts of a scheduler's file, none when it can't be read."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {line.split()[0] for line in lines if line.split()}


# --- whether the command can be run here


def _prepare(command: list[str], job: Job, variables: dict[str, str]) -> None:
    """Raise UsageError when the command can't be run here; make the folder for the output."""
    launcher = command[0]
    if not shutil.which(launcher, path=variables.get("PATH")):
        raise UsageError(
            f"{launcher} is not on the PATH: put .venv/bin there, or take another --launcher"
        )
    if launcher == "mpirun":
        _check_mpirun(variables)
    if job.interface and launcher != "srun":
        _check_interface(job.interface)
    if "--mpi=pmix" in command:
        _try_pmix(job.servers, variables)
    if job.log_dir:
        _make_log_dir(job.log_dir)


def _make_log_dir(log_dir: str) -> None:
    """Make the folder for the ranks' output. Raise UsageError when that fails."""
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--log-dir={log_dir} can't be made ({error.strerror}): name a folder you may write to"
        )


def _check_mpirun(variables: dict[str, str]) -> None:
    """Raise UsageError when another MPI's mpirun comes first.

    MPICH's would print its usage, start nothing, and end with 0.
    """
    done = subprocess.run(
        ["mpirun", "--version"], env=variables, capture_output=True, text=True, check=False
    )
    if "(Open MPI)" not in done.stdout:
        path = shutil.which("mpirun", path=variables.get("PATH"))
        raise UsageError(
            f"{path} is not Open MPI's: put the environment's first: source .venv/bin/activate"
        )


def _check_interface(interface: str) -> None:
    """Raise UsageError when this machine lacks one of the interfaces."""
    known = [name for _, name in socket.if_nameindex()]
    if not set(interface.split(",")) <= set(known):
        raise UsageError(
            f"--interface={interface}: this machine has {', '.join(known)}; name the network of all"
        )


def _try_pmix(servers: int, variables: dict[str, str]) -> None:
    """Raise UsageError when srun can't start MPI ranks on a host.

    It is tried: `srun --mpi=list` also lists what doesn't load.
    """
    words = ["srun", "--mpi=pmix", "--input=none", f"--nodes={servers}", f"--ntasks={servers}"]
    words += ["--ntasks-per-node=1", "--kill-on-bad-exit=1", "true"]
    others = "take --launcher=mpirun or srun-gloo"
    try:
        done = subprocess.run(
            words, env=variables, timeout=PATIENCE, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"`{shlex.join(words)}` did not end in {PATIENCE} s: {others}")
    if done.returncode:
        message = "; ".join(done.stderr.splitlines())
        raise UsageError(
            f"srun --mpi=pmix does not work here ({message}): {others}, or have Slurm's "
            "PMIx plugin and libpmix.so (Debian: libpmix-dev) installed on all nodes"
        )


if __name__ == "__main__":
    run(main)
