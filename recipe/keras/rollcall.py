"""Ends a job in which the ranks wait for each other and can't come together, and says where each rank is.

A thread of each rank meets the others' every few seconds in an allgather of its own, which goes on while the main
threads wait in other collectives. So all ranks know of all where they are, and decide the same.
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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import keras
import numpy as np

from recipe.keras import backend
from recipe.ranks import binding, collectives, elastic
from recipe.system import watchdog

VARIABLE = "RECIPE_STEP_TIMEOUT"  # seconds; 0: no limit
DEFAULT = 600.0  # seconds, as config.run.step_timeout
PERIOD = 2.0  # seconds between two meetings
PATIENCE = 5.0  # seconds that ranks wait for one that has failed
ROW = 768  # bytes that a rank says

_LIBRARIES = tuple({sysconfig.get_path(p) for p in ("purelib", "platlib", "stdlib")})
_PROJECT = str(Path(__file__).parent.parent)
# Where a thread is whose innermost Python frame waits for other ranks, or for a traced step that does.
_WAITING = ("/horovod/", "/tensorflow/python/eager/")
_GENERATED = "<string>"  # the wrapper of an operation, between Horovod's function and the wait


class Here:
    """Where this rank is, as its main thread notes it."""

    def __init__(self) -> None:
        self.place = "before its first fit"
        self.count = 0  # grows whenever something has been done
        self.failed = ""  # the error that ended this rank's last fit; empty: none
        self._inside: list[
            str
        ] = []  # callbacks, or a validation, from the outermost to the innermost

    def at(self, place: str) -> None:
        """The rank goes on at `place`."""
        self.place = place
        self.count += 1

    def begin(self, what: str) -> None:
        """A callback or a validation begins, which may take long on one rank while the others wait."""
        self._inside.append(what)
        self.count += 1

    def end(self) -> None:
        """What began last has ended."""
        self._inside.pop()
        self.count += 1

    @property
    def depth(self) -> int:
        """How many callbacks and validations the rank is in, one inside the other."""
        return len(self._inside)

    def reset(self, place: str, depth: int, failed: str = "") -> None:
        """A fit begins or has ended, in a callback of another perhaps: so many callbacks deep."""
        del self._inside[depth:]
        self.failed = failed
        self.at(place)

    @property
    def busy(self) -> str:
        """The callback or validation that runs; empty: none."""
        return self._inside[-1] if self._inside else ""


here = Here()
optimizers: weakref.WeakSet[keras.optimizers.Optimizer] = (
    weakref.WeakSet()
)  # whose updates are progress


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Around a fit: an error that ends it is told to the other ranks, which wait for this one, unless all have it."""
    depth = here.depth
    here.reset("the beginning of fit", depth)
    try:
        yield
    except BaseException as error:
        alone = not getattr(error, "everywhere", False)
        here.reset("after fit", depth, f"{type(error).__name__}: {error}" if alone else "")
        raise
    here.reset("after fit", depth)


@dataclass(frozen=True)
class Seen:
    """What a rank says of itself at a meeting."""

    count: int
    waits: bool  # its main thread waits for other ranks
    busy: str
    failed: str
    where: str


class RollCall(threading.Thread):
    """Meets the other ranks' threads; ends the process when no rank goes on any more."""

    def __init__(self, limit: float) -> None:
        super().__init__(name="rollcall", daemon=True)
        self.limit = limit
        self._stack: tuple = ()
        self._last: list[int] = []
        self._moved = time.monotonic()

    def run(self) -> None:
        while True:
            time.sleep(PERIOD)
            try:
                seen = _meet(self._look())
            except Exception as error:
                watchdog.keep(0.0, "step_timeout")
                if "Horovod" in str(error) or not binding.started():
                    return  # it was shut down
                raise
            if why := self._stuck(seen):
                _leave(why, seen)

    def _look(self) -> Seen:
        """Returns where this rank's main thread is. That it runs Python code, or that an optimizer steps, is progress
        as well."""
        stack = _frames(sys._current_frames().get(threading.main_thread().ident))
        found = (tuple((id(f.f_code), f.f_lasti) for f in stack), _iterations())
        if found != self._stack:
            here.count += 1
        self._stack = found
        files = [f.f_code.co_filename for f in stack if f.f_code.co_filename != _GENERATED]
        waits = bool(files) and any(part in files[0] for part in _WAITING)
        where = f"{here.place}, {_user_line(stack)}" if stack else here.place
        return Seen(here.count, waits, here.busy, here.failed, where)

    def _stuck(self, seen: list[Seen]) -> str:
        """Returns why the job can't go on; empty: it can, or may."""
        counts = [s.count for s in seen]
        if counts != self._last or any(s.busy and not s.waits for s in seen):
            self._last, self._moved = counts, time.monotonic()
            watchdog.beat("a meeting of all ranks")
        waited = time.monotonic() - self._moved
        failed = next((rank for rank, s in enumerate(seen) if s.failed), None)
        if failed is not None and waited > PATIENCE and any(s.waits and not s.failed for s in seen):
            return f"rank {failed} has failed, and the others wait for it: {seen[failed].failed}"
        if waited > self.limit and any(s.waits for s in seen):
            return (
                f"the ranks wait for each other since {waited:.0f} s (step_timeout={self.limit:g})"
            )
        return ""


_rollcall: RollCall | None = None


def start(limit: float | None) -> None:
    """Begins to meet the other ranks; `limit`: seconds without progress, None: by the environment, 0: for ever.

    Does nothing on one rank, and in elastic jobs, whose ranks come and go. Raises ValueError for a limit that is no
    number of seconds."""
    global _rollcall
    limit = _limit(limit)
    if not limit or collectives.size() == 1 or elastic.wanted():
        return
    if _rollcall is None or not _rollcall.is_alive():
        watchdog.start()
        watchdog.keep(
            limit + 2 * PATIENCE, "step_timeout"
        )  # a meeting that doesn't end: a host or a link is gone
        _rollcall = RollCall(limit)
        _rollcall.start()
    _rollcall.limit = limit


def _limit(given: float | None) -> float:
    text = os.environ.get(VARIABLE, "")
    name, value = ("step_timeout", given) if given is not None else (VARIABLE, text or DEFAULT)
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{name}={value!r} must be a number of seconds, 0 for no limit")
    return seconds


def _meet(mine: Seen) -> list[Seen]:
    """What all ranks say. Collective."""
    rows = backend.gathered_bytes(_packed(mine), "rollcall")
    return [Seen(**json.loads(bytes(row))) for row in rows.reshape(-1, ROW)]


def _packed(seen: Seen) -> np.ndarray:
    """uint8[ROW]: as JSON, its long texts cut until it fits."""
    for length in (400, 200, 100, 50, 20):
        texts = {name: getattr(seen, name)[:length] for name in ("busy", "failed", "where")}
        text = json.dumps({"count": seen.count, "waits": seen.waits, **texts}).encode()
        if len(text) <= ROW:
            break
    return np.frombuffer(text.ljust(ROW), np.uint8)


def _frames(frame: FrameType | None) -> list[FrameType]:
    """A thread's frames, the innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _user_line(stack: list[FrameType]) -> str:
    """The innermost line that is the user's own: neither a library's nor the project's."""
    for frame in stack:
        name = frame.f_code.co_filename
        if not name.startswith((*_LIBRARIES, _PROJECT, "<")):
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
    return "no line of the script"


def _iterations() -> int:
    """How many updates this process's distributed optimizers have done."""
    return sum(int(keras.ops.convert_to_numpy(o.iterations)) for o in list(optimizers))


def _leave(why: str, seen: list[Seen]) -> None:
    """Ends the process; rank 0 says why and where all are, the others give it time to."""
    if collectives.rank():
        time.sleep(1)
        os._exit(1)
    apart = [rank for rank, s in enumerate(seen) if not s.waits] or list(range(len(seen)))
    lines = [
        f"rank {rank}: {seen[rank].where}" + (f" ({b})" if (b := seen[rank].busy) else "")
        for rank in apart[:8]
    ]
    others = [rank for rank in range(len(seen)) if rank not in apart][:8]
    lines += [f"rank {rank} waits: {seen[rank].where}" for rank in others]
    if len(lines) < len(seen):
        lines.append(f"and {len(seen) - len(lines)} more")
    print(f"error: {why}", *lines, sep="\n  ", file=sys.stderr, flush=True)
    os._exit(1)
