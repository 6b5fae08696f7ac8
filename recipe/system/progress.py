"""The progress of long work: a bar on a terminal, a line now and then in a log."""

import contextlib
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Self

from tqdm import tqdm

from recipe.system import output, ticking, watchdog


class LongWork(ABC):
    """Work that shows that it goes on: a terminal's bar moves, and in a log no silence is long."""

    def __init__(self, bar: tqdm | None) -> None:
        """Begin. Without a `bar` there are lines. Set what `refresh` and `line` use before this."""
        self._bar = bar
        self._began = self._last_line = time.monotonic()
        self._ticks = contextlib.ExitStack()
        self._ticks.enter_context(ticking.every(ticking.TERMINAL, self._tick))

    @abstractmethod
    def refresh(self) -> None:
        """Draw the bar again, also where nothing has moved it for a while."""

    @abstractmethod
    def line(self) -> str:
        """Return what a log says after a long silence."""

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar when there is one."""
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            output.say(text)

    def close(self) -> None:
        """Stop, and remove the bar."""
        self._ticks.close()
        if self._bar is not None:
            self._bar.close()

    def _tick(self) -> None:
        if self._bar is not None:
            self.refresh()
        elif time.monotonic() - self._last_line >= ticking.LOG:
            self.say(self.line())


class Tally(LongWork):
    """Counts the images done, of `total`. Any thread may call `add`."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._lock = threading.Lock()
        bar = None
        if ticking.is_terminal():
            # A terminal may say that it has no columns and rows.
            size = {"ncols": ticking.columns(), "nrows": 24}
            bar = tqdm(total=total, desc=what, unit=" images", leave=False, smoothing=0, **size)
        super().__init__(bar)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, count: int = 1) -> None:
        """Count so many more images as done."""
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(count)

    def refresh(self) -> None:
        """Draw the bar with the time that has passed."""
        with self._lock:
            if self._bar is not None:
                self._bar.refresh()

    def line(self) -> str:
        """Return the count, the speed and the time left."""
        rate = self._done / (time.monotonic() - self._began)
        left = "not one yet"
        if rate:
            seconds = max(0, self._total - self._done) / rate
            left = f"{tqdm.format_interval(seconds)} left"
        count = f"{self._done:,} of {self._total:,} images"
        return f"{self._what}: {count}, {rate:,.0f} images/s, {left}"


@contextlib.contextmanager
def telling(what: str | Callable[[], str]) -> Iterator[None]:
    """Say now and then that `what` goes on, on one rank only."""
    if watchdog.launched_rank() != "0":
        yield
        return
    with ticking.ticking(what):
        yield
