"""Horovod's wheel from its source release: fetched, verified, patched, compiled."""

import os
from pathlib import Path

from launch.install.console import Console
from launch.install.target import PYTHON, Target
from launch.install.wheel import PATCH, SHA256, VERSION, sha256
from recipe.errors import RunError


def make(console: Console, target: Target, site_packages: Path, scratch: Path) -> Path:
    """Build the wheel in the scratch folder, with the environment's frameworks, MPI and NCCL."""
    env = {"MAKEFLAGS": f"-j{jobs()}"}
    env |= target.environment()
    env |= target.flags()
    env["TMPDIR"] = str(scratch)
    if target.cuda:
        env |= stage_nccl(site_packages, scratch)

    source = patched(console, fetch(console, target, scratch))
    wheels = scratch / "wheels"
    pip_wheel: list[str | Path] = [PYTHON, "-m", "pip", "wheel", "-v", "--no-deps"]
    pip_wheel += ["--no-build-isolation", "-w", wheels, source]
    console.run(pip_wheel, f"building Horovod {VERSION}", env)
    return next(wheels.glob("horovod-*.whl"))


def patched(console: Console, archive: Path) -> Path:
    """Return the folder of the sources with our patch, which must fit to the line."""
    console.run(["tar", "-xzf", archive, "-C", archive.parent], "unpacking Horovod")
    source = archive.parent / f"horovod-{VERSION}"
    strict: list[str | Path] = ["patch", "-p1", "--batch", "--fuzz=0"]
    strict += ["-d", source, "-i", PATCH]
    console.run(strict, f"applying {PATCH.name}")
    return source


def fetch(console: Console, target: Target, scratch: Path) -> Path:
    """Download Horovod's source release from the package index.

    pip checks its sha256 before running any of it.
    """
    wanted = scratch / "horovod.txt"
    wanted.write_text(f"horovod=={VERSION} --hash=sha256:{SHA256}\n")
    download: list[str | Path] = [PYTHON, "-m", "pip", "download", "--no-deps"]
    download += ["--no-build-isolation", "--no-binary", "horovod", "-d", scratch, "-r", wanted]
    env = {**target.environment(), "TMPDIR": str(scratch)}
    console.run(download, f"downloading Horovod {VERSION}", env)
    archive = scratch / f"horovod-{VERSION}.tar.gz"
    verify(archive)
    return archive


def verify(archive: Path) -> None:
    """Raise RunError unless this is the release that was tested."""
    checksum = sha256(archive)
    if checksum != SHA256:
        raise RunError(
            f"{archive.name} has sha256 {checksum}, not {SHA256}: "
            "it is not the release that this recipe trusts; check `pip config list`"
        )


def jobs() -> int:
    """Return how many compilers to run at once: one a core, with 2 GB of memory each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, int(memory / 2e9)))


def stage_nccl(site_packages: Path, scratch: Path) -> dict[str, str]:
    """Name the frameworks' own NCCL as a linker expects it: their package has libnccl.so.2 only.

    Return the variables for Horovod's build. Raise RunError when the frameworks bring no NCCL.
    """
    nccl = site_packages / "nvidia" / "nccl"
    if not (nccl / "lib" / "libnccl.so.2").exists():
        raise RunError(
            f"no NCCL in {nccl}: "
            "the packages installed for TensorFlow and PyTorch are not those for GPUs"
        )
    folder = scratch / "nccl"
    folder.mkdir()
    (folder / "libnccl.so").symlink_to(nccl / "lib" / "libnccl.so.2")
    return {"HOROVOD_NCCL_INCLUDE": str(nccl / "include"), "HOROVOD_NCCL_LIB": str(folder)}
