"""How fast a run goes, and how long it waits for images."""

import time
from collections.abc import Iterator

from recipe.data.element import Element


class Meter:
    """Counts examples and the time spent waiting for their images, since the last restart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.examples, self.seconds_waited = 0, 0.0
        self._start = time.monotonic()

    def per_second(self) -> float | None:
        """Return examples per second; None before there are any."""
        return self.examples / (time.monotonic() - self._start) if self.examples else None

    def share_waited(self) -> float:
        """Return the share of the time that was spent waiting."""
        return self.seconds_waited / max(time.monotonic() - self._start, 1e-9)

    def timed(self, elements: Iterator[Element]) -> Iterator[Element]:
        """Yield the elements, and count how long each was waited for."""
        while True:
            start = time.monotonic()
            element = next(elements, None)
            self.seconds_waited += time.monotonic() - start
            if element is None:
                return
            yield element
