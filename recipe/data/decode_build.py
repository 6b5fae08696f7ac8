"""Builds decode.c with the libjpeg-turbo that Pillow brings: `python -m recipe.data.decode_build`.

Of the standard library alone, as the installation asks it before there is an environment. What is built lies in the
environment's site-packages, where relative paths lead to libjpeg-turbo, under a name that changes with the source and
with libjpeg-turbo: several copies of the project can share an environment.
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
HEADERS = "tensorflow/include/external/libjpeg_turbo"  # of the same interface, version 62, as Pillow's library
# Each operation rounded by itself, so that the pixels are the same on all processors.
FLAGS = ("-O3", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-psabi")


def site_packages() -> Path:
    """Of this Python's environment."""
    return Path(sysconfig.get_paths()["platlib"])


def library(site: Path) -> Path:
    """Where the decoder of this source belongs in an environment, whether it is there or not."""
    found = bundled(site)
    key = hashlib.sha256(
        SOURCE.read_bytes() + (found.name if found else "system").encode()
    ).hexdigest()
    return site / f"imagenet_1hr_decode-{key[:12]}.so"


def bundled(site: Path) -> Path | None:
    """The libjpeg-turbo of Pillow's wheel, if TensorFlow's headers are there; a distribution's Pillow has none."""
    found = sorted(site.glob("pillow.libs/libjpeg-*.so.62.*")) if (site / HEADERS).is_dir() else []
    return next(iter(found), None)


def command(site: Path, result: Path) -> list[str]:
    """The compiler's, with the bundled libjpeg-turbo or else the system's."""
    compiler = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS]
    found = bundled(site)
    if found:
        place = "-Wl,-rpath,$ORIGIN/pillow.libs"
        return [
            *compiler,
            f"-I{site / HEADERS}",
            str(SOURCE),
            str(found),
            place,
            "-lm",
            "-o",
            str(result),
        ]
    return [*compiler, str(SOURCE), "-ljpeg", "-lm", "-o", str(result)]


def build(site: Path) -> Path:
    """The built decoder, which appears whole or not at all. Raises RunError when it can't be built."""
    wanted = library(site)
    try:
        with tempfile.TemporaryDirectory(prefix=".decode-", dir=site) as folder:
            part = Path(folder) / wanted.name
            words = command(site, part)
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise RunError(
                    f"the image decoder can't be built: {shlex.join(words)} says\n{done.stderr.strip()}"
                )
            part.replace(wanted)
    except OSError as error:
        hint = "" if error.filename else ": a C compiler, cc or $CC, is needed"
        raise RunError(f"the image decoder can't be built: {error}{hint}") from None
    return wanted


def main() -> int:
    try:
        print(f"image decoder: {build(site_packages())}")
    except RunError as error:
        print(f"decode_build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
