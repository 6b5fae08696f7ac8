"""What a program prints: a line that can't be printed is lost, and nothing else is."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

DESCRIPTORS = (0, 1, 2)  # of the standard streams
LOGGER = logging.getLogger("recipe")  # of all warnings


class Forgiving:
    """A text stream whose reader may go away, or whose disk may be full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # A closed stream raises ValueError.
        with contextlib.suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forgive() -> None:
    """Let neither stdout nor stderr raise from here on: closed, full, or without a character.

    A standard descriptor that was closed before the program began is opened to nowhere. Otherwise
    the next file to be opened would get its number, and would receive what native code prints.
    """
    for descriptor in DESCRIPTORS:
        _occupy(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Forgiving):
            continue
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115, PTH123
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Forgiving(stream))


class WarningLines(logging.Handler):
    """Prints `warning: ` and the text on stderr, whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


LOGGER.addHandler(WarningLines())
# Other libraries give the root logger a handler, which would print each warning once more.
LOGGER.propagate = False


def warn(text: str) -> None:
    """Give a warning to the logger `recipe`, which prints it on stderr by default."""
    LOGGER.warning("%s", text)


def say(text: str) -> None:
    """Print a line on stderr at once; it is lost where it can't be printed."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _occupy(descriptor: int) -> None:
    """Open a descriptor to nowhere, unless it is open."""
    try:
        os.fstat(descriptor)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
