"""Files that appear whole or not at all, also when the process is killed or the disk is full."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TOKEN = 8  # random hexadecimal digits in the name of a file that is not whole yet


@contextlib.contextmanager
def whole_file(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing and reading, which gets its name when all of it is on the disk.

    Until then it is called `partial`, by default a random name beside it. Raise OSError when the
    file can't be written. After any error the partial file is deleted, and `path` is as it was.
    """
    # A name of its own for each writer, unless it is given one.
    mode = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    if partial is None:
        partial = path.with_name(f".{path.name}-{secrets.token_hex(TOKEN // 2)}")
        mode |= os.O_EXCL
    descriptor = os.open(partial, mode, 0o666)  # less the umask

    # Give it its name when it is on the disk: a crash may come at any moment.
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            _write_to_disk(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def leftovers(folder: Path, name: str) -> list[Path]:
    """Return the partial files that killed processes left in `folder`.

    `name` is a regular expression: only partial files of files with such names are returned.
    """
    pattern = re.compile(rf"\.{name}-[0-9a-f]{{{TOKEN}}}")
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]


def _write_to_disk(descriptor: int) -> None:
    """Raise OSError when the disk is full or broken, but not when the file system has no fsync."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
