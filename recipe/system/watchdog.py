"""A rank leaves by itself when its launcher has gone, or when no step ends for too long.

Launchers don't always see to it. Open MPI waits for ever behind a cut link. A horovodrun that is
ended leaves ranks on other hosts running, and with --mpi all of them.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from recipe.system import again, output

RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
LAUNCHERS = (
    "horovodrun",
    "mpirun",
    "mpiexec",
    "mpiexec.hydra",
    "orterun",
    "orted",
    "srun",
    "slurmstepd",
)
# Where a server inside the launcher listens.
RENDEZVOUS = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
TRIES = 3  # to reach that server, LOOK seconds apart
LOOK = 5.0


class Watchdog(threading.Thread):
    """Looks at launcher and steps from the side. Ends the process with status 1 and a message."""

    def __init__(self) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.patience = 0.0  # seconds without a sign of life; 0: any time
        self.setting = "config.run.step_timeout"  # what sets it
        self._launchers = launchers()
        self._rendezvous = [os.environ[v] for v in RENDEZVOUS if v in os.environ]
        self._failures = 0
        self._last_sign = "the start"
        self._last_time = time.monotonic()

    def beat(self, what: str) -> None:
        """Note a sign of life: `what` has just been done, or "" for something too small to name."""
        self._last_sign = what or self._last_sign
        self._last_time = time.monotonic()

    def run(self) -> None:
        looked = time.monotonic()
        while True:
            time.sleep(1)
            self._check_processes()
            if time.monotonic() - looked > LOOK:
                self._check_rendezvous()
                looked = time.monotonic()
            self._check_patience()

    def _check_processes(self) -> None:
        """Leave when a launcher above this process has ended."""
        for launcher in self._launchers:
            if not alive(launcher):
                leave(
                    f"the launcher, process {launcher.pid}, has gone; "
                    f"the last sign of life was {self._last_sign}"
                )

    def _check_rendezvous(self) -> None:
        """Leave when the rendezvous server that began this job no longer listens."""
        if len(self._rendezvous) < len(RENDEZVOUS):
            return
        host, port = self._rendezvous
        try:
            socket.create_connection((host, int(port)), timeout=LOOK).close()
            self._failures = 0
        except OSError as error:
            self._failures += 1
            if self._failures == TRIES:
                leave(
                    f"the launcher at {host}:{port} has gone ({error}); "
                    f"the last sign of life was {self._last_sign}"
                )

    def _check_patience(self) -> None:
        """Leave when there has been no sign of life for longer than the patience."""
        waited = time.monotonic() - self._last_time
        if 0 < self.patience < waited:
            leave(
                f"nothing was heard for {waited:.0f} s ({self.setting}={self.patience:g}); "
                f"the last sign of life was {self._last_sign}: "
                "a host or a link is gone, or another rank hangs"
            )


_watchdog: Watchdog | None = None


def start() -> Watchdog:
    """Begin to look after the launcher, once in a process, and return what does."""
    global _watchdog
    if _watchdog is None:
        _watchdog = Watchdog()
        _watchdog.start()
    return _watchdog


def beat(what: str = "") -> None:
    """Note a sign of life: `what` has just been done, or "" for something too small to name."""
    if _watchdog:
        _watchdog.beat(what)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Inside, let the process leave after so many seconds without a sign of life; 0: never."""
    watchdog = start()
    watchdog.beat("the start")
    watchdog.patience = seconds
    try:
        yield
    finally:
        watchdog.patience = 0.0


def keep(seconds: float, setting: str) -> None:
    """From now on, let the process leave after so many seconds without a sign of life.

    `setting` names the seconds in the message.
    """
    watchdog = start()
    watchdog.beat("the start")
    watchdog.patience = seconds
    watchdog.setting = setting


def launched_rank() -> str:
    """Return this process's rank as the launcher says, before Horovod knows; "0" without one."""
    for variable in RANK_VARIABLES:
        if os.environ.get(variable):
            return os.environ[variable]
    return "0"


def launchers() -> list[psutil.Process]:
    """Return this process's ancestors up to the topmost launcher: they live as long as the job."""
    with contextlib.suppress(psutil.Error):
        parents = psutil.Process().parents()
        places = [place for place, parent in enumerate(parents) if _starts_ranks(parent)]
        return parents[: max(places) + 1] if places else []
    return []


def alive(process: psutil.Process) -> bool:
    """Return whether a process still runs; one that ended and was not waited for doesn't."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # it may not be looked at, and this thread must not end of it


def leave(why: str) -> None:
    """End the process with status 1, whatever its other threads wait for."""
    try:
        advice = again.advice()
        if advice and launched_rank() == "0":
            output.say(advice)
        output.say(f"error: rank {launched_rank()} on {socket.gethostname()}: {why}")
    finally:
        os._exit(1)


def _starts_ranks(process: psutil.Process) -> bool:
    """Return whether a process is a launcher, by its name or the first words of its command."""
    with contextlib.suppress(psutil.Error):
        # `horovodrun --mpi` becomes `sh -c "mpirun …"`, whose third word has words of its own.
        command = " ".join(process.cmdline()[:3])
        words = [process.name(), *command.split()[:3]]
        return any(Path(word).name in LAUNCHERS for word in words)
    return False
