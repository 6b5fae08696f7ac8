"""A rank leaves by itself when its launcher has gone or no step ends for too long: launchers don't always see to it.

Open MPI waits for ever behind a cut link, horovodrun that is ended leaves ranks on other hosts, and with --mpi all of
them, running.
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
RENDEZVOUS = (
    "HOROVOD_GLOO_RENDEZVOUS_ADDR",
    "HOROVOD_GLOO_RENDEZVOUS_PORT",
)  # a server inside the launcher
TRIES = 3  # to reach that server, LOOK seconds apart
LOOK = 5.0


class Watchdog(threading.Thread):
    """Looks at launcher and steps from the side; ends the process with status 1 and one sentence."""

    def __init__(self) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.patience = 0.0  # seconds without a sign of life; 0: any time
        self.setting = "config.run.step_timeout"  # what sets it
        self._launchers = launchers()
        self._rendezvous = [os.environ[v] for v in RENDEZVOUS if v in os.environ]
        self._failures = 0
        self._last, self._when = "the start", time.monotonic()

    def beat(self, what: str) -> None:
        """A sign of life: `what` has just been done; empty: something too small to tell."""
        self._last, self._when = what or self._last, time.monotonic()

    def run(self) -> None:
        looked = time.monotonic()
        while True:
            time.sleep(1)
            if gone := next((p for p in self._launchers if not alive(p)), None):
                leave(
                    f"the launcher, process {gone.pid}, has gone; the last sign of life was {self._last}"
                )
            if time.monotonic() - looked > LOOK:
                self._look()
                looked = time.monotonic()
            waited = time.monotonic() - self._when
            if 0 < self.patience < waited:
                leave(
                    f"nothing was heard for {waited:.0f} s ({self.setting}={self.patience:g}); the last sign "
                    f"of life was {self._last}: a host or a link is gone, or another rank hangs"
                )

    def _look(self) -> None:
        """Whether the rendezvous server that began this job still listens."""
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
                    f"the launcher at {host}:{port} has gone ({error}); the last sign of life was {self._last}"
                )


_watchdog: Watchdog | None = None


def start() -> None:
    """Begins to look after the launcher, once in a process."""
    global _watchdog
    if _watchdog is None:
        _watchdog = Watchdog()
        _watchdog.start()


def beat(what: str = "") -> None:
    """A sign of life: `what` has just been done; empty: something too small to tell."""
    if _watchdog:
        _watchdog.beat(what)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Inside it the process leaves when it has given no sign of life for so many seconds; 0: it never does."""
    start()
    _watchdog.beat("the start")
    _watchdog.patience = seconds
    try:
        yield
    finally:
        _watchdog.patience = 0.0


def keep(seconds: float, setting: str) -> None:
    """From now on the process leaves when it has given no sign of life for so many seconds; `setting` names them."""
    start()
    _watchdog.beat("the start")
    _watchdog.patience, _watchdog.setting = seconds, setting


def launched_rank() -> str:
    """This process's rank by the launcher's word, before Horovod knows it; "0" without a launcher."""
    return next((os.environ[v] for v in RANK_VARIABLES if os.environ.get(v)), "0")


def launchers() -> list[psutil.Process]:
    """This process's ancestors up to the topmost that starts ranks: they live as long as the job."""
    with contextlib.suppress(psutil.Error):
        parents = psutil.Process().parents()
        starts = [i for i, parent in enumerate(parents) if _starts_ranks(parent)]
        return parents[: max(starts) + 1] if starts else []
    return []


def alive(process: psutil.Process) -> bool:
    """Whether it runs still; one that ended and was not waited for doesn't."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # it may not be looked at, and this thread must not end of it


def leave(why: str) -> None:
    """Ends the process with status 1, whatever its other threads wait for."""
    try:
        if launched_rank() == "0" and (advice := again.advice()):
            output.say(advice)
        output.say(f"error: rank {launched_rank()} on {socket.gethostname()}: {why}")
    finally:
        os._exit(1)


def _starts_ranks(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = " ".join(process.cmdline()[:3]).split()[
            :3
        ]  # horovodrun --mpi becomes `sh -c "mpirun …"`
        return any(Path(word).name in LAUNCHERS for word in [process.name(), *words])
    return False
