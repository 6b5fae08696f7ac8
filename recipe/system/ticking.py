"""Signs of life of long work: a line that moves on a terminal, a line every half minute in a log."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

TERMINAL, LOG = 2.0, 30.0  # seconds between two signs of life


@contextlib.contextmanager
def every(seconds: float, tick: Callable[[], None]) -> Iterator[None]:
    """Calls tick() in a thread of its own, every so many seconds inside the context; not any more after it."""
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
    """Says on stderr that `what` goes on, and for how long it has; nothing of what is soon over."""
    began, terminal, said = time.monotonic(), is_terminal(), []

    def tick() -> None:
        text = f"{what if isinstance(what, str) else what()} … {elapsed(time.monotonic() - began)}"
        said.append(text)
        put(f"\r{fitting(text)}\x1b[K" if terminal else f"{text}\n")

    with every(TERMINAL if terminal else LOG, tick):
        yield
    if terminal and said:
        put("\r\x1b[K")


def is_terminal() -> bool:
    """Whether a person looks at stderr."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return sys.stderr.isatty()
    return False


def columns() -> int:
    """Of the terminal; 80 where it says that it has none."""
    return shutil.get_terminal_size((80, 24)).columns or 80


def fitting(text: str) -> str:
    """As much of a line as the terminal has columns for."""
    return text[: columns() - 1]


def elapsed(seconds: float) -> str:
    """ "12 s", "3 min 5 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def put(text: str) -> None:
    """What can't be printed is lost."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sys.stderr.write(text)
        sys.stderr.flush()
