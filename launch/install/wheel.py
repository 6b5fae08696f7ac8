"""Horovod's wheel as a function of its inputs.

The inputs have a key, and the cache keeps a wheel for each key.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from launch.install.lock import locked

VERSION = "0.28.1"
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
PATCH = Path(__file__).with_name(f"horovod-{VERSION}.patch")
BUILD_GB = 1.5

FLAGS = {
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_MPI": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_CPU_OPERATIONS": "MPI",
}
# Where the built libraries look for others: the environment's lib, for Open MPI's wheel;
# TensorFlow; PyTorch.
RUN_PATHS = ("$ORIGIN/../../../..", "$ORIGIN/../../tensorflow", "$ORIGIN/../../torch/lib")
NCCL_RUN_PATH = "$ORIGIN/../../nvidia/nccl/lib"
COMPILER_SETTINGS = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "HOROVOD_BUILD_CUDA_CC_LIST")


def build_flags(mpi_libraries: list[str], cuda_home: str | None) -> dict[str, str]:
    """Return the variables that decide what is built; all of them are part of the key."""
    flags = {**FLAGS, "HOROVOD_RPATH": ";".join([*RUN_PATHS, *mpi_libraries])}
    flags |= {name: os.environ[name] for name in COMPILER_SETTINGS if name in os.environ}
    if cuda_home:
        flags |= {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_LINK": "SHARED",
            "HOROVOD_CUDA_HOME": cuda_home,
            "CUDA_HOME": cuda_home,  # PyTorch's name for it; it would guess from the place of nvcc
            "HOROVOD_RPATH": f"{flags['HOROVOD_RPATH']};{NCCL_RUN_PATH}",
        }
    return flags


def key(inputs: Mapping[str, object]) -> str:
    """Return a name for everything that a wheel depends on."""
    text = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sources() -> dict[str, str]:
    """Return what Horovod is built from."""
    return {"horovod": VERSION, "sdist": SHA256, "patch": sha256(PATCH)}


def sha256(path: Path) -> str:
    """Return the checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cache() -> Path:
    """Return the user's cache of built wheels, shared by all copies of this project."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return folder / "imagenet-1hr-recipe" / "wheels"


def finished(folder: Path) -> Path | None:
    """Return the wheel in a folder of the cache, None if there is no whole one."""
    wheels = sorted(folder.glob("horovod-*.whl"))
    return wheels[0] if wheels and zipfile.is_zipfile(wheels[0]) else None


def keep(folder: Path, inputs: Mapping[str, object], build: Callable[[Path], Path]) -> Path:
    """Return the wheel of a folder of the cache.

    If there is none, `build` makes it in a scratch folder. The folder appears by a rename when its
    wheel is whole: whatever interrupts a build leaves only scratch.
    """
    waiting = "\n  another installation builds the same wheel: waiting for it"
    with locked(folder.with_name(folder.name + ".lock"), waiting):
        if wheel := finished(folder):
            return wheel
        # Left by builds that were interrupted.
        for leftover in [folder, *folder.parent.glob(f"{folder.name}.part-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
        try:
            store(build(scratch), inputs, scratch / "done").rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return next(folder.glob("horovod-*.whl"))


def store(wheel: Path, inputs: Mapping[str, object], folder: Path) -> Path:
    """Make a folder with the wheel and, for people, what it was built from."""
    folder.mkdir()
    shutil.move(wheel, folder)
    (folder / "inputs.json").write_text(json.dumps(inputs, indent=1, sort_keys=True) + "\n")
    return folder
