"""Keeps the frameworks' start-up chatter out of a program's output."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import BinaryIO

import absl.logging

# TensorFlow's C++ libraries write these before their own log level is in force.
_CHATTER = re.compile(
    rb"(I0000 |WARNING: All log messages before absl::InitializeLog|To enable the following instr)"
)


@contextlib.contextmanager
def filtered() -> Iterator[None]:
    """Hold back stderr while the frameworks are imported, then print it without the chatter."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    absl.logging.set_verbosity(absl.logging.ERROR)
    sys.stderr.flush()
    with os.fdopen(os.memfd_create("stderr"), "w+b") as buffer:
        # Native code writes to descriptor 2, so that is redirected, not sys.stderr.
        stderr = os.dup(2)
        os.dup2(buffer.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            _print_without_chatter(buffer)


def _print_without_chatter(buffer: BinaryIO) -> None:
    buffer.seek(0)
    for line in buffer:
        if not _CHATTER.match(line):
            with contextlib.suppress(OSError):  # a line that can't be printed is lost
                os.write(2, line)
