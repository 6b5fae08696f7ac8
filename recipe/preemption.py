"""SIGTERM and SIGUSR1: noticed at once, acted upon at the next step boundary, when all ranks know."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STATUS = 75  # EX_TEMPFAIL: exit status of a run that has saved its state and can be resumed
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Notice:
    """Whether this process has received one of the signals."""

    received = False


@contextlib.contextmanager
def noticed() -> Iterator[Notice]:
    """Inside it the signals only set the notice; outside of it they do what they did before."""
    notice = Notice()

    def receive(number: int, frame: FrameType | None) -> None:
        notice.received = True

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
