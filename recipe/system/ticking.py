"""Signs of life of long work: a moving line on a terminal, a line every half minute in a log."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

# Seconds between two signs of life.
TERMINAL = 2.0
LOG = 30.0


@contextlib.contextmanager
def every(seconds: float, tick: Callable[[], None]) -> Iterator[None]:
    """Call tick() in a thread of its own, every so many seconds, until the context ends."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            tick()

    thread = threading.Thread(target=run, name="ticking", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(TERMINAL)  # not for ever: it may be printing to something that nobody reads


@contextlib.contextmanager
def ticking(what: str | Callable[[], str]) -> Iterator[None]:
    """Say on stderr that `what` goes on, and for how long. Say nothing when it is soon over."""
    # A terminal's line is written anew, a log grows by a line.
    began = time.monotonic()
    terminal = is_terminal()
    has_printed = False

    def tick() -> None:
        nonlocal has_printed
        work = what if isinstance(what, str) else what()
        text = f"{work} … {elapsed(time.monotonic() - began)}"
        has_printed = True
        put(f"\r{fitting(text)}\x1b[K" if terminal else f"{text}\n")

    # Leave nothing of it on a terminal.
    with every(TERMINAL if terminal else LOG, tick):
        yield
    if terminal and has_printed:
        put("\r\x1b[K")


def is_terminal() -> bool:
    """Return whether a person looks at stderr."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return sys.stderr.isatty()
    return False


def columns() -> int:
    """Return the terminal's columns; 80 when it says that it has none."""
    return shutil.get_terminal_size((80, 24)).columns or 80


def fitting(text: str) -> str:
    """Return as much of a line as the terminal has columns for."""
    return text[: columns() - 1]


def elapsed(seconds: float) -> str:
    """Return such as "12 s" or "3 min 5 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def put(text: str) -> None:
    """Write to stderr; text that can't be printed is lost."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sys.stderr.write(text)
        sys.stderr.flush()
