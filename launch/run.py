"""Starts a program on all ranks by mpirun, horovodrun or Slurm's srun: prints the whole command, then runs it.

    python -m launch.run --hostfile hostfiles/bigbasin-32 python -m recipe.train --config=imagenet_1hr
    python -m launch.run --launcher horovodrun -np 2 python -m recipe.train --config=quick       # this machine
    python -m launch.run --launcher horovodrun --elastic 8:256 --hostfile hosts python -m recipe.train …    # may change
    python -m launch.run --launcher srun python -m recipe.train --config=imagenet_1hr       # in a Slurm allocation
    python -m launch.run --launcher srun-gloo python -m recipe.train --config=imagenet_1hr  # the same without MPI

The ranks get the environment's variables below and no others, so that no secret travels; HOROVOD_… and NCCL_… ones
that are set win over the settings chosen here.
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

from launch import hostfile
from launch.command import Parser, run
from launch.hostfile import Host
from recipe.errors import UsageError
from recipe.ranks import launched

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
)
FORWARDED_PREFIXES = ("HOROVOD_", "NCCL_", "UCX_", "FI_", "TF_FORCE_GPU_")
LOCAL = (
    "CUDA_VISIBLE_DEVICES",
    "SSH_AUTH_SOCK",
    "TERM",
    "OMPI_MCA_",
    "OMPI_ALLOW_RUN_AS_ROOT",
    "SLURM_",
    "PMIX_",
)  # beginnings; the launcher's
OURS = (
    Path(sys.prefix) / "bin" / "orted"
).exists()  # Open MPI is the environment's, not the system's
PATIENCE = 120  # seconds until srun must have started something
LONGEST = 32 * os.sysconf("SC_PAGE_SIZE")  # bytes of one argument, for Linux
# Where schedulers that this launcher doesn't know keep a job's hosts, and what makes a hostfile of it.
A_LINE_A_SLOT = "sort {0} | uniq -c | awk '{{print $2, \"slots=\" $1}}' > hosts"
SCHEDULERS = {
    "PBS_NODEFILE": A_LINE_A_SLOT,
    "LSB_DJOB_HOSTFILE": A_LINE_A_SLOT,
    "PE_HOSTFILE": "awk '{{print $1, \"slots=\" $2}}' {0} > hosts",
    "OMPI_MCA_orte_default_hostfile": "--hostfile {0}",
}
# A lost host is noticed after 10 + 3 · 5 seconds: Open MPI's own 8 minutes, or for ever.
KEEPALIVE = {
    "oob_tcp_keepalive_time": "10",
    "oob_tcp_keepalive_intvl": "5",
    "oob_tcp_keepalive_probes": "3",
}


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
        return len(self.hosts)


def main(argv: list[str]) -> None:
    options = _parsed(argv)
    job = _job(options, os.environ)
    command = LAUNCHERS[options.launcher](job)
    for note in _notes(options, job, os.environ):
        print(f"note: {note}", file=sys.stderr, flush=True)
    variables = job.environment | _local(os.environ)
    text = shlex.join(
        ["env", "-i", *(f"{name}={value}" for name, value in variables.items()), *command]
    )
    print(text, file=sys.stdout if options.dry_run else sys.stderr, flush=True)
    if not options.dry_run:
        _ready(command, job, variables)
        os.execvpe(command[0], command, variables)


def mpirun(job: Job) -> list[str]:
    """Open MPI: no rank bound to a core, ranks in the order of the hosts, one network, a lost host noticed."""
    if ":" in job.log_dir:
        raise UsageError(
            f"--log-dir={job.log_dir}: mpirun would cut it at the colon; name a folder without"
        )
    place = [] if job.allocated else _place(job, "mpirun")
    if (
        "--hostfile" in place
    ):  # it would look up thousands of names, one after the other, deaf to signals
        place += ["--mca", "if_base_do_not_resolve", "1"]
    words = ["mpirun", "-np", str(job.ranks), *place, "--bind-to", "none", "--map-by", "slot"]
    if os.geteuid() == 0:
        words.append("--allow-run-as-root")
    if OURS:
        words += ["--prefix", sys.prefix]  # where the other hosts find Open MPI
    names = hostfile.mpirun_settings(host.name for host in job.hosts) | hostfile.mpirun_settings(
        _own_name()
    )
    several = KEEPALIVE | _networks(job.interface) if job.servers > 1 else {}
    for name, value in (names | several).items():
        words += ["--mca", name, value]
    words += ["--output-filename", job.log_dir] if job.log_dir else []
    return words + [word for name in job.environment for word in ("-x", name)] + job.program


def horovodrun(job: Job) -> list[str]:
    """Horovod's own launcher by Gloo: ssh, and no MPI."""
    words = ["horovodrun", "--gloo", "-np", str(job.ranks)]
    if launched.homeless():
        words.append("--disable-cache")  # it would lie there
    words += job.elastic or _place(job, "horovodrun")
    if job.interface:
        words += ["--network-interfaces", job.interface]
    words += ["--output-filename", job.log_dir] if job.log_dir else []
    return words + job.program


def srun(job: Job) -> list[str]:
    """Slurm, with PMIx."""
    return _srun(job, "pmix") + job.program


def srun_gloo(job: Job) -> list[str]:
    """Slurm, without MPI."""
    return [*_srun(job, "none"), sys.executable, "-m", "launch.gloo", *job.program]


LAUNCHERS = {"mpirun": mpirun, "horovodrun": horovodrun, "srun": srun, "srun-gloo": srun_gloo}
MPI = ("mpirun", "srun")


def _place(job: Job, launcher: str) -> list[str]:
    """Where mpirun or horovodrun starts ranks: a list or, where that would be too long for an argument, the file."""
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


def _own_name() -> list[str]:
    """This machine's name, up to the first dot, as mpirun has it."""
    return [socket.gethostname().partition(".")[0]]


def _srun(job: Job, mpi: str) -> list[str]:
    if not hostfile.in_slurm(os.environ):
        raise UsageError(
            "srun needs a Slurm allocation, of salloc or sbatch; elsewhere take --launcher=horovodrun"
        )
    words = [
        "srun",
        f"--mpi={mpi}",
        f"--ntasks={job.ranks}",
        "--distribution=block",
        "--kill-on-bad-exit=1",
    ]
    folder = job.log_dir.replace("%", "%%")
    return [*words, "--cpu-bind=none", *(["--output", f"{folder}/rank.%t"] if folder else [])]


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that ranks get."""
    return {
        name: value
        for name, value in environ.items()
        if name in FORWARDED or name.startswith(FORWARDED_PREFIXES)
    }


def settings(servers: int, ranks: int, interface: str, launcher: str) -> dict[str, str]:
    """Horovod's and NCCL's variables for so many servers, as starting points: `horovodrun --autotune` finds better.

    Several servers of several GPUs each reduce in three phases, as in the paper (sec. 4): inside a server by NCCL,
    between servers by MPI, inside again."""
    found = {}
    if servers > 1 and ranks > servers and launcher in MPI:  # the phase between servers is MPI's
        found["HOROVOD_HIERARCHICAL_ALLREDUCE"] = "1"
    if servers > 1:
        # ResNet-50's 102 MB of gradients in several pieces: the first travels while backprop makes the next.
        found["HOROVOD_FUSION_THRESHOLD"] = str(32 * 2**20)
        found["HOROVOD_CYCLE_TIME"] = "3.5"  # ms
    if interface:
        found |= {
            "NCCL_SOCKET_IFNAME": interface,
            "HOROVOD_GLOO_IFACE": interface.split(",")[0],
        }  # Gloo takes one
    return found


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m launch.run", description=__doc__)
    parser.add_argument("--launcher", choices=list(LAUNCHERS), default="mpirun")
    parser.add_argument("--hostfile", help="default: the Slurm allocation, or this machine")
    parser.add_argument("-np", type=int, metavar="RANKS", help="default: all slots")
    parser.add_argument(
        "--elastic", type=_range, metavar="MIN:MAX", help="horovodrun: ranks; the hosts may change"
    )
    parser.add_argument(
        "--interface", default="", help="the network between the hosts, such as eth0"
    )
    parser.add_argument("--log-dir", default="", help="a folder for a file of each rank's output")
    parser.add_argument("--dry-run", action="store_true", help="print the command only")
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, help="what to run, such as python -m recipe.train …"
    )
    return parser.parse_args(argv)


def _job(options: argparse.Namespace, environ: Mapping[str, str]) -> Job:
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        raise UsageError(
            "nothing to run: end the command with one, such as python -m recipe.train --config=quick"
        )
    hosts = _hosts(options, environ)
    slots = sum(host.slots for host in hosts)
    asked = slots if options.hostfile else _tasks(environ) or slots  # --ntasks may leave slots free
    most = min(slots, asked, options.elastic[1] if options.elastic else slots)
    ranks = most if options.np is None else options.np
    if not 1 <= ranks <= slots:
        raise UsageError(f"-np {ranks} ranks don't fit into {slots} slots; lower -np or add hosts")
    _check_k(program, ranks, options.elastic)
    chosen = settings(len(hosts), ranks, options.interface, options.launcher)
    return Job(
        program=program,
        hosts=hosts,
        file=options.hostfile or "",
        allocated=not options.hostfile
        and hostfile.in_slurm(environ)
        and options.launcher != "horovodrun",
        ranks=ranks,
        interface=options.interface,
        log_dir=options.log_dir,
        elastic=_elastic(options, ranks),
        environment=chosen | forwarded(environ) | ({"HOME": "/"} if launched.homeless() else {}),
    )


def _hosts(options: argparse.Namespace, environ: Mapping[str, str]) -> list[Host]:
    if options.hostfile:
        return hostfile.read(options.hostfile)
    if hostfile.in_slurm(environ):
        return hostfile.from_slurm(environ)
    if options.np is None:
        raise UsageError("how many ranks? Give -np for this machine, or --hostfile")
    return [Host("localhost", options.np)]


def _tasks(environ: Mapping[str, str]) -> int | None:
    """Of a Slurm job, if it was told."""
    told = environ.get("SLURM_NTASKS", "")
    if told and not (told.isdecimal() and int(told)):
        raise UsageError(
            f"SLURM_NTASKS={told[:80]} is not a number of tasks: unset it, or give -np"
        )
    return int(told) if told else None


def _notes(options: argparse.Namespace, job: Job, environ: Mapping[str, str]) -> list[str]:
    """What the environment does not tell, and was assumed."""
    notes = [f"{launched.no_home()}; the ranks get HOME=/"] if launched.homeless() else []
    return notes if options.hostfile else notes + _assumed(options, job, environ)


def _assumed(options: argparse.Namespace, job: Job, environ: Mapping[str, str]) -> list[str]:
    """Of the hosts and the ranks, where no hostfile says them."""
    if hostfile.in_slurm(environ):
        told = options.np is not None or _tasks(environ) or environ.get("SLURM_NTASKS_PER_NODE")
        counted = f"Slurm was not told how many tasks, and counts {environ.get('SLURM_TASKS_PER_NODE')} a node"
        return (
            []
            if told
            else [
                f"{counted}: {job.ranks} ranks; give sbatch or salloc --ntasks-per-node, a task a GPU"
            ]
        )
    return [
        f"all ranks are on this machine; {name} names the hosts of this job: {shlex.quote(path)}, to be given by "
        f"--hostfile ({form.format(shlex.quote(path))})"
        for name, form in SCHEDULERS.items()
        if (path := environ.get(name)) and len(_first_words(path)) > 1
    ]


def _first_words(path: str) -> set[str]:
    """The hosts of a scheduler's file."""
    try:
        return {
            line.split()[0]
            for line in Path(path).read_text(errors="replace").splitlines()
            if line.split()
        }
    except OSError:
        return set()


def _range(text: str) -> tuple[int, int]:
    """Of MIN:MAX."""
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX ranks, such as 8:256")
    return int(match[1]), int(match[2])


def _elastic(options: argparse.Namespace, ranks: int) -> list[str]:
    """horovodrun's options. Raises UsageError when there can be no such run."""
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
    least, most = options.elastic
    if not least <= ranks <= most:
        raise UsageError(
            f"{ranks} ranks to begin with are not among --elastic={least}:{most}; change -np or the hosts"
        )
    discovery = [
        sys.executable,
        "-m",
        "launch.hostfile",
        "discover",
        *([options.hostfile] if options.hostfile else []),
    ]
    limits = ["--min-np", str(least), "--max-np", str(most)]
    return [*limits, "--host-discovery-script", shlex.join(discovery)]


def _check_k(program: list[str], ranks: int, elastic: tuple[int, int] | None) -> None:
    """Raises UsageError when the program is the recipe and its k workers can't be shared by so many ranks."""
    if "recipe.train" in program and not {"-h", "--help"} & set(program):
        from recipe import cli
        from recipe.rules import sharding  # the recipe's flags take half a second

        recipe, *_ = cli.parse_recipe(program[program.index("recipe.train") + 1 :])
        if elastic is None:
            sharding.check_size(recipe.k, ranks, recipe.run.workers_at_once)
        elif elastic[1] > recipe.k:
            raise UsageError(
                f"--elastic up to {elastic[1]} ranks: config.k={recipe.k} workers have work for {recipe.k}"
            )


def _ready(command: list[str], job: Job, variables: dict[str, str]) -> None:
    """Raises UsageError when the command can't be run here; makes the folder for the ranks' output."""
    if not shutil.which(command[0], path=variables.get("PATH")):
        raise UsageError(
            f"{command[0]} is not on the PATH: put .venv/bin there, or take another --launcher"
        )
    if command[0] == "mpirun":
        _check_mpirun(variables)
    known = [name for _, name in socket.if_nameindex()]
    if job.interface and command[0] != "srun" and not set(job.interface.split(",")) <= set(known):
        raise UsageError(
            f"--interface={job.interface}: this machine has {', '.join(known)}; name the network of all"
        )
    if "--mpi=pmix" in command:
        _try_pmix(job.servers, variables)
    if job.log_dir:
        try:
            Path(job.log_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--log-dir={job.log_dir} can't be made ({error.strerror}): name a folder you may write to"
            )


def _check_mpirun(variables: dict[str, str]) -> None:
    """Raises UsageError when another MPI's comes first. MPICH's prints its usage, starts nothing, and ends with 0."""
    found = subprocess.run(
        ["mpirun", "--version"], env=variables, capture_output=True, text=True, check=False
    ).stdout
    if "(Open MPI)" not in found:
        path = shutil.which("mpirun", path=variables.get("PATH"))
        raise UsageError(
            f"{path} is not Open MPI's: put the environment's first: source .venv/bin/activate"
        )


def _try_pmix(servers: int, variables: dict[str, str]) -> None:
    """Raises UsageError when srun can't start MPI ranks on a host. `srun --mpi=list` lists what doesn't load, too."""
    one_each = [
        f"--nodes={servers}",
        f"--ntasks={servers}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
    ]
    words = ["srun", "--mpi=pmix", "--input=none", *one_each, "true"]
    others = "take --launcher=mpirun or srun-gloo"
    try:
        done = subprocess.run(
            words, env=variables, timeout=PATIENCE, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"`{shlex.join(words)}` did not end in {PATIENCE} s: {others}")
    if done.returncode:
        raise UsageError(
            f"srun --mpi=pmix does not work here ({'; '.join(done.stderr.splitlines())}): {others}, or have Slurm's "
            "PMIx plugin and libpmix.so (Debian: libpmix-dev) installed on all nodes"
        )


def _networks(interface: str) -> dict[str, str]:
    """Open MPI's networks for its daemons and its messages, but for what the environment says of them.

    Docker's bridge has the same address on every host."""
    kind, names = ("include", interface) if interface else ("exclude", "lo,docker0")
    said = {
        name[9:12]
        for name in os.environ
        if re.fullmatch(r"OMPI_MCA_(oob|btl)_tcp_if_(in|ex)clude", name)
    }
    return {f"{part}_tcp_if_{kind}": names for part in ("oob", "btl") if part not in said}


def _local(environ: Mapping[str, str]) -> dict[str, str]:
    """What the launcher itself needs. SLURM_JWT is a key, and SLURM_EXPORT_ENV, of `sbatch --export`, would have srun
    keep the variables chosen here from the ranks."""
    names = [
        n for n in environ if n.startswith(LOCAL) and n not in ("SLURM_JWT", "SLURM_EXPORT_ENV")
    ]
    return {name: environ[name] for name in names}


if __name__ == "__main__":
    run(main)
