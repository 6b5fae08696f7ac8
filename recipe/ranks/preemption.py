"""SIGTERM, SIGUSR1 and Ctrl-C: noted at once, acted upon at a step's end, when all ranks know."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from recipe.errors import Preempted
from recipe.system import watchdog

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
CTRL_C_NOTICE = (
    b"\nCtrl-C: saving after one of the next steps, then leaving; "
    b"Ctrl-C once more leaves at once, without saving\n"
)


class Notice:
    """Whether this process has received one of the signals."""

    received = False


@contextlib.contextmanager
def noticed() -> Iterator[Notice]:
    """Let the signals only set a notice. If the run fails inside, give them back their handlers.

    After a normal end or a Preempted exit the handlers stay in place: a late signal would otherwise
    kill the process before it reports status 75. It may also be the first signal to a rank that
    leaves because another one was told to.
    """
    notice = Notice()

    def receive(number: int, frame: FrameType | None) -> None:
        notice.received = True
        if number == signal.SIGINT:
            # The next Ctrl-C ends the process.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if watchdog.launched_rank() == "0":
                # Not by print(), which might be at work where the signal came.
                with contextlib.suppress(OSError):
                    os.write(2, CTRL_C_NOTICE)

    # A shell's background job ignores Ctrl-C, which is meant for the foreground. Leave it so.
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    old_handlers = {number: signal.signal(number, receive) for number in heeded}
    try:
        yield notice
    except Preempted:
        raise
    except BaseException:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        raise
