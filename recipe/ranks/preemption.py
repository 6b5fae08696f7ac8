"""SIGTERM, SIGUSR1 and Ctrl-C: noticed at once, acted upon at the next step boundary, when all ranks know."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from recipe.errors import Preempted
from recipe.system import watchdog

STATUS = 75  # EX_TEMPFAIL: exit status of a run that has saved its state and can be resumed
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
HEARD = b"\nCtrl-C: saving after one of the next steps, then leaving; Ctrl-C once more leaves at once, without saving\n"


class Notice:
    """Whether this process has received one of the signals."""

    received = False


@contextlib.contextmanager
def noticed() -> Iterator[Notice]:
    """The signals only set the notice; when a run fails inside, they do again what they did before.

    Not after its end, nor when it leaves by Preempted: one more signal, also the first to a rank that another one has
    told, would end the process before it has said so, and with another status."""
    notice = Notice()

    def receive(number: int, frame: FrameType | None) -> None:
        notice.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one
            if watchdog.launched_rank() == "0":
                with contextlib.suppress(OSError):
                    os.write(2, HEARD)  # print() might be at work where the signal came

    # A shell's background job ignores Ctrl-C, which is meant for another one.
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in heeded}
    try:
        yield notice
    except Preempted:
        raise
    except BaseException:
        for number, handler in before.items():
            signal.signal(number, handler)
        raise
