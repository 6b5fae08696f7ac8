"""Builds decode.c with the libjpeg-turbo that Pillow brings: `python -m recipe.data.decode_build`.

It needs the standard library alone, as the installation asks it before there is an environment.
What is built lies in the environment's site-packages, where relative paths lead to libjpeg-turbo.
Its name changes with the source and with libjpeg-turbo: several copies of the project can share an
environment.
"""

import hashlib
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from recipe.errors import RunError

SOURCE = Path(__file__).with_name("decode.c")
# TensorFlow's headers of libjpeg-turbo have the same interface, version 62, as Pillow's library.
HEADERS = "tensorflow/include/external/libjpeg_turbo"
# Each operation is rounded by itself, so that the pixels are the same on all processors.
FLAGS = ("-O3", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-psabi")


def site_packages() -> Path:
    """Return the site-packages of this Python's environment."""
    return Path(sysconfig.get_paths()["platlib"])


def library(site: Path) -> Path:
    """Return where the decoder of this source belongs in an environment, there or not."""
    libjpeg = bundled(site)
    name = libjpeg.name if libjpeg else "system"
    key = hashlib.sha256(SOURCE.read_bytes() + name.encode()).hexdigest()
    return site / f"imagenet_1hr_decode-{key[:12]}.so"


def bundled(site: Path) -> Path | None:
    """Return the libjpeg-turbo of Pillow's wheel, if TensorFlow's headers are there.

    A distribution's Pillow has none.
    """
    if not (site / HEADERS).is_dir():
        return None
    libraries = sorted(site.glob("pillow.libs/libjpeg-*.so.62.*"))
    return libraries[0] if libraries else None


def command(site: Path, result: Path) -> list[str]:
    """Return the compiler's command, with the bundled libjpeg-turbo or else the system's."""
    compiler = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS]
    libjpeg = bundled(site)
    if libjpeg is None:
        return [*compiler, str(SOURCE), "-ljpeg", "-lm", "-o", str(result)]
    source = [f"-I{site / HEADERS}", str(SOURCE)]
    libraries = [str(libjpeg), "-Wl,-rpath,$ORIGIN/pillow.libs", "-lm"]
    return [*compiler, *source, *libraries, "-o", str(result)]


def build(site: Path) -> Path:
    """Build the decoder, which appears whole or not at all, and return its path.

    Raise RunError when it can't be built.
    """
    target = library(site)
    try:
        # The compiler writes into a folder of its own, which goes with all that it has left.
        with tempfile.TemporaryDirectory(prefix=".decode-", dir=site) as folder:
            part = Path(folder) / target.name
            words = command(site, part)
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise RunError(
                    f"the image decoder can't be built: {shlex.join(words)} says\n"
                    f"{done.stderr.strip()}"
                )
            part.replace(target)
    except OSError as error:
        hint = "" if error.filename else ": a C compiler, cc or $CC, is needed"
        raise RunError(f"the image decoder can't be built: {error}{hint}") from None
    return target


def main() -> int:
    """Build the decoder for this Python's environment, and return the exit status."""
    try:
        print(f"image decoder: {build(site_packages())}")
    except RunError as error:
        print(f"decode_build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
