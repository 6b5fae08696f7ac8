"""The end of a job whose ranks wait for each other for ever, with where each of them is.

A thread of each rank meets the others' every few seconds in an allgather of its own. It goes on
while the main threads wait in other collectives. So all ranks know where all are, and decide the
same.
"""

import contextlib
import json
import os
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import keras
import numpy as np

from recipe.keras import backend
from recipe.ranks import binding, collectives, elastic
from recipe.system import watchdog

VARIABLE = "RECIPE_STEP_TIMEOUT"  # seconds; 0: no limit
DEFAULT = 600.0  # seconds, as config.run.step_timeout
PERIOD = 2.0  # seconds between two meetings
PATIENCE = 5.0  # seconds that ranks wait for one that has failed
ROW = 768  # bytes of a rank's status
SHOWN = 8  # ranks of a kind that the last message names

_LIBRARIES = tuple({sysconfig.get_path(p) for p in ("purelib", "platlib", "stdlib")})
_PROJECT = str(Path(__file__).parent.parent)
# Where a thread is whose innermost Python frame waits for other ranks, or for a traced step that
# does.
_WAITING = ("/horovod/", "/tensorflow/python/eager/")
_GENERATED = "<string>"  # the wrapper of an operation, between Horovod's function and the wait


class Here:
    """Where this rank is, as its main thread notes it."""

    def __init__(self) -> None:
        self.place = "before its first fit"
        self.count = 0  # grows whenever something has been done
        self.failure = ""  # the error that ended this rank's last fit; empty: none
        self._inside: list[str] = []  # callbacks and validations, the outermost first

    def at(self, place: str) -> None:
        """Note that the rank goes on at `place`."""
        self.place = place
        self.count += 1

    def begin(self, activity: str) -> None:
        """Note that a callback or a validation begins, which may be long on one rank only."""
        self._inside.append(activity)
        self.count += 1

    def end(self) -> None:
        """Note that what began last has ended."""
        self._inside.pop()
        self.count += 1

    @property
    def depth(self) -> int:
        """How many callbacks and validations the rank is in, one inside the other."""
        return len(self._inside)

    def reset(self, place: str, depth: int, failure: str = "") -> None:
        """Note that a fit begins or has ended, `depth` callbacks deep in other fits."""
        del self._inside[depth:]
        self.failure = failure
        self.at(place)

    @property
    def busy(self) -> str:
        """The callback or validation that runs. Empty: none."""
        return self._inside[-1] if self._inside else ""


here = Here()
# Distributed optimizers, whose updates are progress.
optimizers: weakref.WeakSet[keras.optimizers.Optimizer] = weakref.WeakSet()


@contextlib.contextmanager
def failure_announced() -> Iterator[None]:
    """Tell the other ranks of an error that ends the fit, unless all ranks have it."""
    depth = here.depth
    here.reset("the beginning of fit", depth)
    try:
        yield
    except BaseException as error:
        on_all_ranks = getattr(error, "everywhere", False)
        failure = "" if on_all_ranks else f"{type(error).__name__}: {error}"
        here.reset("after fit", depth, failure)
        raise
    here.reset("after fit", depth)


@dataclass(frozen=True)
class Status:
    """What a rank says of itself at a meeting."""

    count: int
    waits: bool  # its main thread waits for other ranks
    busy: str
    failure: str
    where: str


class Position(NamedTuple):
    """Where the main thread's computation is. Another position is progress."""

    instructions: list[tuple[int, int]]  # (id of the code, offset), the innermost frame first
    updates: int


class RollCall(threading.Thread):
    """Meets the other ranks' threads, and ends the process when no rank goes on any more."""

    def __init__(self, limit: float) -> None:
        super().__init__(name="rollcall", daemon=True)
        self.limit = limit
        self._position = Position([], 0)
        self._counts: list[int] = []  # of all ranks, at the last meeting
        self._progressed = time.monotonic()

    def run(self) -> None:
        while True:
            time.sleep(PERIOD)
            try:
                statuses = _meet(self._own_status())
            except Exception as error:
                watchdog.keep(0.0, "step_timeout")
                if "Horovod" in str(error) or not binding.started():
                    return  # it was shut down
                raise
            reason = self._reason_to_end(statuses)
            if reason:
                _end_job(reason, statuses)

    def _own_status(self) -> Status:
        """Return where this rank's main thread is."""
        main_thread = threading.main_thread().ident
        frames = _frames(sys._current_frames().get(main_thread or 0))

        # Python code that runs, or an optimizer that steps, is progress as well.
        instructions = [(id(f.f_code), f.f_lasti) for f in frames]
        position = Position(instructions, _updates())
        if position != self._position:
            here.count += 1
        self._position = position

        files = [f.f_code.co_filename for f in frames if f.f_code.co_filename != _GENERATED]
        waits = bool(files) and any(part in files[0] for part in _WAITING)
        where = f"{here.place}, {_user_line(frames)}" if frames else here.place
        return Status(here.count, waits, here.busy, here.failure, where)

    def _reason_to_end(self, statuses: list[Status]) -> str:
        """Return why the job can't go on. Empty: it can, or may."""
        # Since when has no rank gone on?
        counts = [s.count for s in statuses]
        works_alone = any(s.busy and not s.waits for s in statuses)
        if counts != self._counts or works_alone:
            self._counts = counts
            self._progressed = time.monotonic()
            watchdog.beat("a meeting of all ranks")
        waited = time.monotonic() - self._progressed

        # A rank has failed, and another one waits for it.
        failed = [rank for rank, s in enumerate(statuses) if s.failure]
        others_wait = any(s.waits and not s.failure for s in statuses)
        if failed and others_wait and waited > PATIENCE:
            failure = statuses[failed[0]].failure
            return f"rank {failed[0]} has failed, and the others wait for it: {failure}"

        # Nobody goes on.
        if waited > self.limit and any(s.waits for s in statuses):
            limit = f"step_timeout={self.limit:g}"
            return f"the ranks wait for each other since {waited:.0f} s ({limit})"
        return ""


_rollcall: RollCall | None = None


def start(limit: float | None) -> None:
    """Begin to meet the other ranks. `limit`: seconds without progress.

    None stands for the limit in the environment, 0 for no limit. Do nothing on one rank, and in
    elastic jobs, whose ranks come and go. Raise ValueError for a limit that is no number of
    seconds.
    """
    global _rollcall
    seconds = _checked_limit(limit)
    if not seconds or collectives.size() == 1 or elastic.wanted():
        return
    if _rollcall is None or not _rollcall.is_alive():
        watchdog.start()
        # A meeting that doesn't end: a host or a link is gone.
        watchdog.keep(seconds + 2 * PATIENCE, "step_timeout")
        _rollcall = RollCall(seconds)
        _rollcall.start()
    _rollcall.limit = seconds


def _checked_limit(limit: float | None) -> float:
    """Return the limit, by default the environment's. Raise ValueError for no number of seconds."""
    name = VARIABLE if limit is None else "step_timeout"
    value = (os.environ.get(VARIABLE) or DEFAULT) if limit is None else limit
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{name}={value!r} must be a number of seconds, 0 for no limit")
    return seconds


def _meet(own: Status) -> list[Status]:
    """Return the statuses of all ranks. Collective."""
    rows = backend.gathered_bytes(_packed(own), "rollcall")
    return [Status(**json.loads(bytes(row))) for row in rows.reshape(-1, ROW)]


def _packed(status: Status) -> np.ndarray:
    """Return a status as JSON, uint8[ROW]. Its texts are cut until it fits."""
    for length in (400, 200, 100, 50, 20):
        cut = replace(
            status,
            busy=status.busy[:length],
            failure=status.failure[:length],
            where=status.where[:length],
        )
        text = json.dumps(asdict(cut)).encode()
        if len(text) <= ROW:
            break
    return np.frombuffer(text.ljust(ROW), np.uint8)


def _frames(innermost: FrameType | None) -> list[FrameType]:
    """Return a thread's frames, the innermost first."""
    frames = []
    frame = innermost
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _user_line(frames: list[FrameType]) -> str:
    """Return the innermost line that is the user's own: neither a library's nor the project's."""
    for frame in frames:
        name = frame.f_code.co_filename
        if not name.startswith((*_LIBRARIES, _PROJECT, "<")):
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
    return "no line of the script"


def _updates() -> int:
    """Return how many updates this process's distributed optimizers have done."""
    return sum(int(keras.ops.convert_to_numpy(o.iterations)) for o in list(optimizers))


def _end_job(reason: str, statuses: list[Status]) -> None:
    """End the process. Rank 0 prints why and where all ranks are; the others give it time to."""
    # Rank 0 speaks for all.
    if collectives.rank():
        time.sleep(1)
        os._exit(1)

    # First the ranks that don't wait: they are what the others wait for.
    ranks = range(len(statuses))
    elsewhere = [rank for rank in ranks if not statuses[rank].waits] or list(ranks)
    waiting = [rank for rank in ranks if rank not in elsewhere]
    lines = []
    for rank in elsewhere[:SHOWN]:
        busy = statuses[rank].busy
        activity = f" ({busy})" if busy else ""
        lines.append(f"rank {rank}: {statuses[rank].where}{activity}")
    for rank in waiting[:SHOWN]:
        lines.append(f"rank {rank} waits: {statuses[rank].where}")

    # Say it and leave, without waiting for Horovod.
    if len(lines) < len(statuses):
        lines.append(f"and {len(statuses) - len(lines)} more")
    print(f"error: {reason}", *lines, sep="\n  ", file=sys.stderr, flush=True)
    os._exit(1)
