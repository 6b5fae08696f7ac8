"""Starts real Horovod processes for a test and collects what each rank found."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def environment(**extra: str) -> dict[str, str]:
    """The environment of a rank: the project importable, one CPU thread, MPI willing to run as root
    in a container.
    """
    values = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
        ),  # tests/coming-keras
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMPI_MCA_mpi_yield_when_idle": "1",  # waiting ranks leave the few cores to the others
    }
    if os.getuid() == 0:
        values |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return values | extra


def command(size: int, program: list[str], launcher: str = "mpirun") -> list[str]:
    """The command line that starts `program` on `size` ranks of this machine: "mpirun", "gloo" or
    "horovodrun-mpi".
    """
    python = [sys.executable, *program]
    if launcher == "mpirun":
        return [
            str(BIN / "mpirun"),
            "-np",
            str(size),
            "--oversubscribe",
            "--bind-to",
            "none",
            *python,
        ]
    transport = "--gloo" if launcher == "gloo" else "--mpi"
    options = [] if launcher == "gloo" else ["--mpi-args=--oversubscribe"]
    return [
        str(BIN / "horovodrun"),
        transport,
        "-np",
        str(size),
        "-H",
        f"localhost:{size}",
        *options,
        *python,
    ]


def launch(
    size: int,
    program: list[str],
    launcher: str = "mpirun",
    timeout: float = 500,
    cwd: Path = ROOT,
    **extra: str,
) -> subprocess.CompletedProcess:
    """Runs `program` on `size` ranks to its end; stdout and stderr come back together, in `stdout`."""
    return subprocess.run(
        command(size, program, launcher),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment(**extra),
        check=False,
    )


def results(
    folder: Path,
    size: int,
    program: str,
    *arguments: str,
    launcher: str = "mpirun",
    timeout: float = 500,
    **extra: str,
) -> list[dict[str, Any]]:
    """What each rank of a test program gave to `report`, in the order of the ranks."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    done = launch(size, [program, *arguments], launcher, timeout, RESULTS=str(folder), **extra)
    assert done.returncode == 0, done.stdout[-6000:]
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(size)]


def report(rank: int, found: dict[str, Any]) -> None:
    """Called by a test program: leaves what this rank found for `results`."""
    (Path(os.environ["RESULTS"]) / str(rank)).write_bytes(pickle.dumps(found))
