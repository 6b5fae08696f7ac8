"""Functions of a test module on real Horovod ranks, which are started once for many tests.

`@on_ranks(2, 4)` makes a test whose body runs on 2 and on 4 ranks, on each of Keras's backends.
`run_on_ranks` runs any function of the test's module, and returns what each rank returned. For a
test that calls it, `@with_sizes(2, 4)` gives the sizes. Ranks find each other through MPI or Gloo.
"""

import atexit
import contextlib
import ctypes
import inspect
import os
import pickle
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.ranks import ROOT, command, environment

START_LIMIT = 200.0  # seconds, until all ranks of a pool have started Horovod
LIMIT = 300.0  # seconds, for a function
PATIENCE = 10.0  # seconds, for the other ranks when one has failed
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SHOWN = 6000  # characters of the ranks' output that a failure shows


class Greeting(NamedTuple):
    """What a rank sends first."""

    rank: int
    pid: int


class Call(NamedTuple):
    """A function that a rank runs."""

    module: str
    name: str
    arguments: dict[str, Any]


class Answer(NamedTuple):
    """What a function did on a rank."""

    value: bytes  # pickled
    error: str  # the traceback of the exception that it raised; empty: none


class RanksFailed(AssertionError):
    """A function raised an exception on a rank, a rank died, or a function took too long."""


class Pool:
    """Ranks with one of Keras's backends, which run one function after another."""

    def __init__(self, backend: str, size: int, launcher: str) -> None:
        """Start the ranks as tests.ranks.command does. Raise RanksFailed when they don't start."""
        self.backend = backend
        self.size = size
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._output = self._folder / "output"
        self._connections: list[Connection] = []  # in the order of the ranks
        self._pids: list[int] = []

        address = str(self._folder / "socket")
        with socket.socket(socket.AF_UNIX) as listener, self._output.open("wb") as output:
            listener.bind(address)
            listener.listen(size)
            listener.settimeout(0.5)
            self._process = subprocess.Popen(
                command(size, ["-m", "tests.rank_worker", address], launcher),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(KERAS_BACKEND=backend),
                start_new_session=True,  # Ctrl-C reaches pytest alone, which ends the pool
                preexec_fn=_end_with_parent,
            )
            with self._killed_on_failure():
                self._accept(listener)
        self._send(signal.SIGSTOP)

    def _accept(self, listener: socket.socket) -> None:
        """Wait until all ranks have greeted. Raise RanksFailed when they don't."""
        deadline = time.monotonic() + START_LIMIT
        greetings: dict[Greeting, Connection] = {}
        while len(greetings) < self.size:
            if self._process.poll() is not None:
                raise RanksFailed(f"the ranks ended at their start\n{self._printed()}")
            if time.monotonic() > deadline:
                raise RanksFailed(f"no start in {START_LIMIT:g} s\n{self._printed()}")
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                continue
            accepted.setblocking(True)
            connection = Connection(accepted.detach())
            greetings[connection.recv()] = connection

        for greeting in sorted(greetings):
            self._connections.append(greetings[greeting])
            self._pids.append(greeting.pid)

    @property
    def alive(self) -> bool:
        """Whether the ranks can run a function."""
        return self._process.poll() is None

    def run(self, call: Call, limit: float) -> list[Any]:
        """Run a function on all ranks; return what each of them returned, in their order.

        Raise RanksFailed, and end the pool, when a rank raises an exception or dies, or when a rank
        takes longer than `limit` seconds.
        """
        __tracebackhide__ = True
        output_begin = self._output.stat().st_size
        self._send(signal.SIGCONT)
        with self._killed_on_failure():
            for connection in self._connections:
                connection.send(call)
            answers = self._answers(time.monotonic() + limit)

            missing = [rank for rank in range(self.size) if rank not in answers]
            errors = [f"rank {rank}: {a.error}" for rank, a in sorted(answers.items()) if a.error]
            if missing and not errors:
                errors = [f"no answer from ranks {missing} in {limit:g} s"]
            if errors:
                raise RanksFailed("\n".join([call.name, *errors, self._printed(output_begin)]))
        self._send(signal.SIGSTOP)
        return [pickle.loads(answers[rank].value) for rank in range(self.size)]

    def _answers(self, deadline: float) -> dict[int, Answer]:
        """Return the answers by rank, without those of ranks that answer too late.

        When one rank has failed, the others may wait for it for ever: they get a few seconds.
        """
        answers: dict[int, Answer] = {}
        while len(answers) < self.size:
            pending = {c: r for r, c in enumerate(self._connections) if r not in answers}
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                answer = _received(connection)
                answers[pending[connection]] = answer
                if answer.error:
                    deadline = min(deadline, time.monotonic() + PATIENCE)
        return answers

    def _printed(self, begin: int = 0) -> str:
        """Return the end of what the ranks have printed, from byte `begin` on."""
        text = self._output.read_bytes()[begin:].decode(errors="replace")
        return f"output of the ranks:\n{text[-SHOWN:]}"

    def stop(self) -> None:
        """Let the ranks end, and kill those that don't."""
        self._send(signal.SIGCONT)
        for connection in self._connections:
            connection.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, number: signal.Signals) -> None:
        """Signal all ranks. Between functions they are stopped: Horovod's idle ranks cost time."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End the ranks at once."""
        if self._process.poll() is None:
            self._send(signal.SIGKILL)
            self._process.terminate()  # the launcher ends ranks that haven't greeted
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for connection in self._connections:
            connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def _killed_on_failure(self) -> Iterator[None]:
        """End the ranks when what runs meanwhile fails or is interrupted: they may wait for ever."""
        try:
            yield
        except BaseException:
            self.kill()
            raise


def _end_with_parent() -> None:
    """Let the kernel end this process when pytest is killed: stopped ranks can't notice it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _received(connection: Connection) -> Answer:
    """Return a rank's answer, also for a rank that has died."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return Answer(b"", "it died")


# By size and launcher: one backend at a time, to save memory.
_pools: dict[tuple[int, str], Pool] = {}


def _pool(backend: str, size: int, launcher: str) -> Pool:
    """Return the living pool, or start one."""
    pool = _pools.get((size, launcher))
    if pool and pool.alive and pool.backend == backend:
        return pool
    if pool:
        pool.stop()
    _pools[size, launcher] = Pool(backend, size, launcher)
    return _pools[size, launcher]


def stop_pools() -> None:
    """End the ranks of all pools."""
    while _pools:
        _pools.popitem()[1].stop()


atexit.register(stop_pools)


def run_on_ranks(
    backend: str,
    size: int,
    function: Callable,
    launcher: str = "mpirun",
    limit: float = LIMIT,
    **arguments: Any,
) -> list[Any]:
    """Run a function of a test module on `size` ranks; return what each of them returned.

    The ranks find the function by its module and its name, and get the arguments pickled. Raise
    RanksFailed with the traceback of a rank on which the function raises an exception.
    """
    __tracebackhide__ = True  # a failure shows the ranks' tracebacks alone
    path = Path(function.__code__.co_filename).relative_to(ROOT)
    module = ".".join(path.with_suffix("").parts)
    return _pool(backend, size, launcher).run(Call(module, function.__name__, arguments), limit)


def with_sizes(*sizes: int, gloo: Collection[int] = ()) -> pytest.MarkDecorator:
    """Parametrize a test by `size` and `launcher`: MPI's for the sizes, and Gloo's for those."""
    ways = [pytest.param(size, "mpirun", id=str(size)) for size in sizes]
    ways += [pytest.param(size, "gloo", id=f"{size}-gloo") for size in gloo]
    return pytest.mark.parametrize(("size", "launcher"), ways)


def on_ranks(
    *sizes: int, gloo: Collection[int] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test whose body runs on so many ranks, on each of Keras's backends.

    Those of the sizes in `gloo` are started by Gloo's launcher. The test fails when a rank raises
    an exception. The body's parameters are fixtures or parameters of the test, which the ranks get
    pickled.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.ranks
        @with_sizes(*sizes, gloo=gloo)
        def test(backend: str, size: int, launcher: str, **arguments: Any) -> None:
            __tracebackhide__ = True
            run_on_ranks(backend, size, body, launcher, **arguments)

        # pytest reads the fixtures from the signature. No functools.wraps: with it pytest would
        # take the body's.
        own = [p for p in inspect.signature(test).parameters.values() if p.name != "arguments"]
        parameters = [*own, *inspect.signature(body).parameters.values()]
        test.__signature__ = inspect.Signature(parameters)
        test.__name__ = body.__name__
        test.__qualname__ = body.__qualname__
        test.__module__ = body.__module__
        test.__doc__ = body.__doc__
        test.body = body  # what the ranks run
        return test

    return decorate
