"""What one host is: versions, GPUs, limits, addresses, data. Imports no framework: a broken one doesn't matter."""

import hashlib
import importlib.metadata
import mmap
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from recipe.ranks import launched

ROOT = Path(__file__).parents[2]
SAMPLED = 32  # files of a folder whose contents are looked at
PIECE = 4096  # bytes of each, at its beginning, middle and end
FILES = 20_000  # of a folder at most: a million of small ones would take minutes on a network disk
NOT_READ = re.compile(
    r"downloads|records\.npz|SHA256SUMS|.*\.index\.npz"
)  # archives, and what is made anew anywhere


def collect(data_dir: str) -> dict[str, Any]:
    """The facts of this host but for what it knows of the others, as JSON; `data_dir`: "" for the recipe's default."""
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "recipe": _sources(),
        "packages": packages(),
        "horovod_build": _horovod_build(),
        "horovod_mpi": _horovod_mpi(),
        "prefix": sys.prefix,
        "disk_of_prefix": mount_of(Path(sys.prefix)),
        **gpus(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().available,
        "disk": {
            folder: shutil.disk_usage(folder).free
            for folder in (str(Path.cwd()), tempfile.gettempdir())
        },
        "open_files": _hard_limit(resource.RLIMIT_NOFILE),
        "locked_memory": _hard_limit(resource.RLIMIT_MEMLOCK),
        "infiniband": Path("/sys/class/infiniband").is_dir(),
        "address": resolve(socket.gethostname()),
        "own_name": launched.is_own(socket.gethostname()),
        "interfaces": interfaces(),
        "data": data(data_folder(data_dir)),
    }


def data_folder(data_dir: str) -> Path:
    """Where the recipe looks for data, by --data_dir's value and the environment."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def data(folder: Path) -> dict[str, Any]:
    """Count, bytes and digest of a folder's files; {"error": why} when it can't be read."""
    try:
        found = list(islice(_files(folder), FILES))
        return {"folder": str(folder), **sample(folder, found), "all": len(found) < FILES}
    except OSError as error:
        return {"folder": str(folder), "error": error.strerror or str(error)}


def sample(folder: Path, found: list[Path]) -> dict[str, Any]:
    """`found`, in order: how many, how many bytes, and a digest of names, sizes and pieces of SAMPLED contents."""
    sizes = [path.stat().st_size for path in found]
    digest = hashlib.sha256()
    for path, size in zip(found, sizes, strict=True):
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode(errors="surrogateescape"))
    for index in sorted({i * len(found) // SAMPLED for i in range(SAMPLED)} if found else ()):
        with found[index].open("rb") as file:
            for start in (0, sizes[index] // 2, max(sizes[index] - PIECE, 0)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return {"files": len(found), "bytes": sum(sizes), "digest": digest.hexdigest()[:12]}


def packages() -> dict[str, str]:
    """All packages of the environment with their versions."""
    found = (
        (d.metadata["Name"], d.version) for d in importlib.metadata.distributions(path=sys.path)
    )
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found if name}


def gpus() -> dict[str, Any]:
    """{"gpus": what nvidia-smi lists, none where there is no such program, "gpu_error": why it fails}."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return {"gpus": [], "gpu_error": ""}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"gpus": [], "gpu_error": str(error)}
    if done.returncode:
        return {
            "gpus": [],
            "gpu_error": (done.stdout + done.stderr).strip() or f"exit status {done.returncode}",
        }
    return {"gpus": parse_gpus(done.stdout), "gpu_error": ""}


def parse_gpus(printed: str) -> list[dict[str, str]]:
    """The lines of nvidia-smi's CSV, of three columns."""
    rows = (line.split(", ") for line in printed.splitlines())
    return [
        dict(zip(("name", "memory", "driver"), row, strict=True)) for row in rows if len(row) == 3
    ]


def interfaces() -> dict[str, list[str]]:
    """The IPv4 addresses of each interface, with their networks: {"eth0": ["10.0.0.1/255.255.255.0"]}."""
    return {
        name: [f"{a.address}/{a.netmask}" for a in addresses if a.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }


def resolve(name: str) -> str:
    """The IPv4 address of a name; "" if it has none."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def mount_of(folder: Path) -> str:
    """The network disk that a folder lies on, as "server:/home", or a local one's kind, as "ext4"; "" if unknown."""
    inside = [
        p for p in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(p.mountpoint)
    ]
    found = max(inside, key=lambda p: len(p.mountpoint), default=None)
    if found is None:
        return ""
    return found.device if ":" in found.device else found.fstype


def resolve_all(names: list[str]) -> dict[str, str]:
    """The addresses of all hosts, as this one knows them."""
    with ThreadPoolExecutor(max_workers=64) as pool:  # a name that is unknown takes seconds
        return dict(zip(names, pool.map(resolve, names), strict=True))


def _sources() -> str:
    """A digest of the project's own source."""
    found = [path for part in ("recipe", "launch") for path in sorted((ROOT / part).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in found:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _horovod_build() -> str:
    """A digest of Horovod's compiled libraries: of one version, there are many builds."""
    try:
        folder = Path(importlib.metadata.distribution("horovod").locate_file("horovod"))
        return sample(folder, sorted(folder.rglob("*.so")))["digest"]
    except (importlib.metadata.PackageNotFoundError, OSError):
        return ""


def _horovod_mpi() -> list[str]:
    """The MPI libraries that Horovod's compiled ones ask for, such as libmpi.so.40, which is Open MPI's."""
    try:
        folder = Path(importlib.metadata.distribution("horovod").locate_file("horovod"))
        libraries = sorted(folder.rglob("mpi_lib*.so"))
    except importlib.metadata.PackageNotFoundError:
        return []
    return sorted(
        {
            name.decode()
            for path in libraries
            for name in re.findall(rb"libmpi\w*\.so\.\d+", _bytes(path))
        }
    )


def _bytes(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _files(folder: Path) -> Iterable[Path]:
    """All files below, in an order that is the same everywhere."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if NOT_READ.fullmatch(entry.name):
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def _hard_limit(kind: int) -> int | None:
    """What the recipe may raise its own to; None: no limit."""
    _, hard = resource.getrlimit(kind)
    return None if hard == resource.RLIM_INFINITY else hard
