"""What one host is: versions, GPUs, limits, addresses, data.

It imports no framework, so that a broken one doesn't matter.
"""

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
from typing import NamedTuple

import psutil

from launch.preflight.measurements import DataFolder, Gpu, HostFacts, UnreadableFolder
from recipe.ranks import launched

ROOT = Path(__file__).parents[2]
SAMPLED = 32  # files of a folder whose contents are looked at
PIECE = 4096  # bytes of each, at its beginning, middle and end
FILES = 20_000  # of a folder at most: a million of small ones take minutes on a network disk
# Archives, and what each host makes for itself.
NOT_READ = re.compile(r"downloads|records\.npz|SHA256SUMS|.*\.index\.npz")
NVIDIA_SMI = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version"]
MPI_LIBRARY = re.compile(rb"libmpi\w*\.so\.\d+")


class Sample(NamedTuple):
    """Files of a folder: how many, how many bytes, and a digest."""

    files: int
    bytes: int
    digest: str


class GpuQuery(NamedTuple):
    """The GPUs that nvidia-smi lists, and why it fails ("" when it doesn't)."""

    gpus: list[Gpu]
    error: str


def collect(data_dir: str) -> HostFacts:
    """Return the facts of this host, without what it knows of the others.

    `data_dir` is the value of --data_dir, "" for the recipe's default.
    """
    # What several facts come from.
    hostname = socket.gethostname()
    horovod = _horovod_folder()
    prefix = Path(sys.prefix)
    gpu_query = query_gpus()
    folders = [str(Path.cwd()), tempfile.gettempdir()]
    disk: dict[str, float] = {folder: shutil.disk_usage(folder).free for folder in folders}

    # All facts, of which those about the environment must be the same everywhere.
    return HostFacts(
        hostname=hostname,
        python=platform.python_version(),
        recipe=_source_digest(),
        packages=packages(),
        horovod_build=_build_digest(horovod),
        horovod_mpi=_mpi_libraries(horovod),
        prefix=str(prefix),
        disk_of_prefix=mount_of(prefix),
        gpus=gpu_query.gpus,
        gpu_error=gpu_query.error,
        cores=len(os.sched_getaffinity(0)),
        memory=psutil.virtual_memory().available,
        disk=disk,
        open_files=_hard_limit(resource.RLIMIT_NOFILE),
        locked_memory=_hard_limit(resource.RLIMIT_MEMLOCK),
        infiniband=Path("/sys/class/infiniband").is_dir(),
        address=resolve(hostname),
        own_name=launched.is_own(hostname),
        interfaces=interfaces(),
        data=data(data_folder(data_dir)),
    )


def data_folder(data_dir: str) -> Path:
    """Return where the recipe looks for data, by --data_dir's value and the environment."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def data(folder: Path) -> DataFolder | UnreadableFolder:
    """Count and sample a folder's files, at most FILES of them."""
    try:
        files = list(islice(_files(folder), FILES))
        counted = sample(folder, files)
    except OSError as error:
        return UnreadableFolder(str(folder), error.strerror or str(error))
    return DataFolder(
        str(folder), counted.files, counted.bytes, counted.digest, all=len(files) < FILES
    )


def sample(folder: Path, files: list[Path]) -> Sample:
    """Count these files of a folder, and digest names, sizes and pieces of SAMPLED contents."""
    # Names and sizes of all files.
    sizes = [path.stat().st_size for path in files]
    digest = hashlib.sha256()
    for path, size in zip(files, sizes, strict=True):
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode(errors="surrogateescape"))

    # Contents of some, spread evenly: their beginning, middle and end.
    chosen = {i * len(files) // SAMPLED for i in range(SAMPLED)}
    for index in sorted(chosen) if files else []:
        with files[index].open("rb") as file:
            for start in (0, sizes[index] // 2, max(sizes[index] - PIECE, 0)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return Sample(len(files), sum(sizes), digest.hexdigest()[:12])


def packages() -> dict[str, str]:
    """Return the versions of all packages of the environment, by normalized name."""
    versions = {}
    for distribution in importlib.metadata.distributions(path=sys.path):
        name = distribution.metadata["Name"]
        if name:
            versions[re.sub(r"[-_.]+", "-", name).lower()] = distribution.version
    return versions


def query_gpus() -> GpuQuery:
    """Ask nvidia-smi for the GPUs. There are none where there is no such program."""
    command = [*NVIDIA_SMI, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return GpuQuery([], "")
    except (OSError, subprocess.TimeoutExpired) as error:
        return GpuQuery([], str(error))
    if done.returncode:
        message = (done.stdout + done.stderr).strip()
        return GpuQuery([], message or f"exit status {done.returncode}")
    return GpuQuery(parse_gpus(done.stdout), "")


def parse_gpus(printed: str) -> list[Gpu]:
    """Read nvidia-smi's CSV. Lines that don't have three columns are left out."""
    rows = [line.split(", ") for line in printed.splitlines()]
    return [Gpu(*row) for row in rows if len(row) == 3]


def interfaces() -> dict[str, list[str]]:
    """Return the IPv4 addresses of each interface: {"eth0": ["10.0.0.1/255.255.255.0"]}."""
    return {
        name: [f"{a.address}/{a.netmask}" for a in addresses if a.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }


def resolve(name: str) -> str:
    """Return the IPv4 address of a name, "" if it has none."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def resolve_all(names: list[str]) -> dict[str, str]:
    """Return the addresses of all hosts, as this one knows them."""
    with ThreadPoolExecutor(max_workers=64) as pool:  # a name that is unknown takes seconds
        return dict(zip(names, pool.map(resolve, names), strict=True))


def mount_of(folder: Path) -> str:
    """Return the disk that a folder lies on, "" if it is unknown.

    A network disk is named, as "server:/home"; of a local one, it is the kind, as "ext4".
    """
    disks = psutil.disk_partitions(all=True)
    holding = [disk for disk in disks if folder.resolve().is_relative_to(disk.mountpoint)]
    if not holding:
        return ""
    innermost = max(holding, key=lambda disk: len(disk.mountpoint))
    return innermost.device if ":" in innermost.device else innermost.fstype


def _source_digest() -> str:
    """Return a digest of the project's own source."""
    digest = hashlib.sha256()
    for folder in ("recipe", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _horovod_folder() -> Path | None:
    """Return where Horovod is installed."""
    try:
        return Path(str(importlib.metadata.distribution("horovod").locate_file("horovod")))
    except importlib.metadata.PackageNotFoundError:
        return None


def _build_digest(horovod: Path | None) -> str:
    """Return a digest of Horovod's compiled libraries: one version has many builds."""
    if horovod is None:
        return ""
    try:
        return sample(horovod, sorted(horovod.rglob("*.so"))).digest
    except OSError:
        return ""


def _mpi_libraries(horovod: Path | None) -> list[str]:
    """Return the MPI libraries that Horovod's compiled ones ask for, such as libmpi.so.40."""
    if horovod is None:
        return []
    names: set[str] = set()
    for path in sorted(horovod.rglob("mpi_lib*.so")):
        names |= {name.decode() for name in MPI_LIBRARY.findall(_bytes(path))}
    return sorted(names)


def _bytes(path: Path) -> mmap.mmap:
    """Map a file's contents into memory."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _files(folder: Path) -> Iterable[Path]:
    """List all files below a folder, in an order that is the same everywhere."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if NOT_READ.fullmatch(entry.name):
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def _hard_limit(kind: int) -> int | None:
    """Return what the recipe may raise its own limit to. None: there is no limit."""
    _, hard = resource.getrlimit(kind)
    return None if hard == resource.RLIM_INFINITY else hard
