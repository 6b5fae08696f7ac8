"""Keeps the frameworks' start-up chatter out of a program's output."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

import absl.logging

# TensorFlow's C++ libraries write these before their own log level is in force.
_CHATTER = re.compile(
    rb"(I0000 |WARNING: All log messages before absl::InitializeLog|To enable the following instr)"
)


@contextlib.contextmanager
def filtered() -> Iterator[None]:
    """For the import of the frameworks: what they write to stderr comes out afterwards, without the chatter."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    absl.logging.set_verbosity(absl.logging.ERROR)
    sys.stderr.flush()
    with os.fdopen(os.memfd_create("stderr"), "w+b") as written:
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written:
                if not _CHATTER.match(line):
                    with contextlib.suppress(OSError):  # what can't be printed is lost
                        os.write(2, line)
