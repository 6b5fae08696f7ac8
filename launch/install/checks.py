"""What must be there before anything is installed.

Each check passes, or says in one sentence what is missing and how to get it.
"""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from recipe.errors import RunError

PYTHONS = ((3, 11), (3, 13))
CPU_GB, GPU_GB = 4.0, 15.0  # .venv, the build and the wheel


def python(version: tuple[int, ...]) -> None:
    """Raise RunError for a Python that the pins don't fit.

    keras 3.15.1 needs 3.11, tensorflow 2.21 ends at 3.13.
    """
    if not PYTHONS[0] <= version[:2] <= PYTHONS[1]:
        name = ".".join(map(str, version[:2]))
        raise RunError(
            f"Python {name} does not fit the pinned packages: install Python 3.11, 3.12 or 3.13"
        )


def venv_module() -> None:
    """Raise RunError when Python came without its venv module, as Debian's does."""
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        raise RunError(
            "Python's venv module is missing: "
            "install it (on Debian and Ubuntu: apt install python3-venv)"
        )


def headers(include: str = "") -> None:
    """Raise RunError without Python's headers, which PyTorch's include."""
    folder = include or sysconfig.get_paths()["include"]
    if not (Path(folder) / "Python.h").is_file():
        raise RunError(
            f"Python's C headers are missing (no {folder}/Python.h): install them"
            " (on Debian and Ubuntu: apt install python3-dev)"
        )


def compiler(path: str) -> str:
    """Return the C++ compiler that CMake will find, with its version. Raise RunError if none."""
    name = os.environ.get("CXX", "").split() or ["c++"]
    program = shutil.which(name[0], path=path) or shutil.which("g++", path=path)
    if program is None:
        raise RunError(
            f"no C++ compiler ({name[0]}) on PATH: "
            "install g++ 9 or newer (on Debian and Ubuntu: apt install g++)"
        )
    return version(program)


def version(program: str) -> str:
    """Return what a program says of its version, in one line."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    return " ".join(done.stdout.split()) or program


def tools(path: str) -> None:
    """Raise RunError when a program is missing.

    Horovod's sources are patched with patch and built with make. Open MPI looks for ssh even on one
    machine.
    """
    for name, package in (("make", "make"), ("patch", "patch"), ("ssh", "openssh-client")):
        if shutil.which(name, path=path) is None:
            raise RunError(
                f"`{name}` is not on PATH: install it (on Debian and Ubuntu: apt install {package})"
            )


def disk(folder: Path, need_gb: float, what: str) -> None:
    """Raise RunError when a folder has too little room for `what`."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < need_gb:
        raise RunError(
            f"{folder} has {free:.1f} GB free and {what} needs {need_gb:g} GB: "
            "free some space there"
        )


def gpu_here(path: str) -> bool:
    """Return whether there are an NVIDIA driver that answers, and a CUDA compiler."""
    smi = shutil.which("nvidia-smi", path=path)
    if smi is None or cuda_home(path) is None:
        return False
    return subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def cuda(path: str) -> str:
    """Return the CUDA toolkit that --gpu builds with. Raise RunError without one."""
    home = cuda_home(path)
    if home is None:
        raise RunError(
            "--gpu needs the CUDA compiler and there is no nvcc in $CUDA_HOME/bin, "
            "/usr/local/cuda/bin or on PATH: install the CUDA toolkit, or use --cpu"
        )
    return home


def cuda_home(path: str) -> str | None:
    """Return the CUDA toolkit's root: $CUDA_HOME, the usual place, or where nvcc on the path is."""
    places = [os.environ.get("HOROVOD_CUDA_HOME"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc", path=path):
        places.append(str(Path(nvcc).resolve().parent.parent))
    for place in places:
        if place and os.access(f"{place}/bin/nvcc", os.X_OK):
            return place
    return None
