"""One process a host, started by launch.doctor: finds the facts, meets the others by MPI, measures the network.

Rank 0 is told the hosts' names, in the order of the ranks, as JSON on stdin.
Rank 0 prints a line of JSON on stdout after each part, so that a part is kept when a later one hangs. All say on
stderr how far they are, so that it can be said who hangs.
"""

import json
import os
import signal
import sys
import threading
import time
from typing import Any

from launch.preflight import network, verdicts
from recipe.errors import RunError

MARK = "launch.doctor:"  # begins a line on stderr: MARK rank order part, MARK rank error what, MARK rank alive
MPI_STARTS = 1  # the order of the part in which nobody beats: mpi4py holds Python's lock until MPI has started
LISTENS = 3.0  # seconds that the doctor listens, after the limit, for who is alive


def main(data_dir: str, limit: float) -> None:
    """`limit`: seconds after which this process ends, come what may."""
    signal.alarm(int(limit + LISTENS) + 2)
    threading.Thread(target=_beat, daemon=True).start()
    say(0, "the facts of this host")
    from launch.preflight import (
        facts,
    )  # here, so that a package that is missing is said with the host's name

    found = facts.collect(data_dir)
    say(MPI_STARTS, "MPI's start")
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    _check_found(comm.size, os.environ.get("OMPI_COMM_WORLD_SIZE", ""), MPI.Get_library_version())
    names = network.told(comm, json.load(sys.stdin) if comm.rank == 0 else [])
    say(2, "collecting the facts")
    found["names"] = facts.resolve_all(names)
    emit(comm, "facts", network.gather(comm, found))
    say(3, "the clocks")
    emit(comm, "clocks", network.clocks(comm))
    if comm.size > 1:
        _measure_pairs(comm, names)
        say(network.LAST, "the allreduce")
        emit(comm, "together", network.together(comm))
    say(network.LAST + 1, "the end")


def _check_found(size: int, started: str, library: str) -> None:
    """Raises RunError when processes that mpirun has started don't find each other: in training each would be alone."""
    if started not in ("", str(size)):
        raise RunError(
            f"mpirun started {started} processes, of which mpi4py's MPI found {size}: it is another MPI, "
            f"{library.split(',')[0].strip()}"
        )


def _measure_pairs(comm: Any, names: list[str]) -> None:
    """Twice, and the better of both, when a link or a host seems to be at fault."""
    found = network.gather(comm, network.pairs(comm, names, say))
    emit(comm, "pairs", found)
    seem = verdicts.links([row for each in found for row in each["rows"]])
    if network.agreed(comm, any(finding.fault for finding in seem)):
        again = network.gather(comm, network.pairs(comm, names, say, comm.size + 1))
        emit(comm, "pairs", list(map(network.better, found, again)))


def say(order: int, part: str) -> None:
    """That this rank begins a part; whoever has come least far is who the others wait for."""
    _tell(f"{order} {part}")


def emit(comm: Any, part: str, value: Any) -> None:
    if comm.rank == 0:
        print(json.dumps({part: value}), flush=True)


def _beat() -> None:
    """Says that this process runs, also while it waits for another."""
    while True:
        time.sleep(1)
        _tell("alive")


def _tell(what: str) -> None:
    sys.stderr.write(f"{MARK} {_rank()} {what}\n")  # at once: there are two threads
    sys.stderr.flush()


def _rank() -> str:
    return os.environ.get("OMPI_COMM_WORLD_RANK", "0")


if __name__ == "__main__":
    try:
        main(**json.loads(sys.argv[1]))
    except Exception as error:  # whatever it is, the doctor names the host
        _tell(
            f"error {error}"
            if isinstance(error, RunError)
            else f"error {type(error).__name__}: {error}"
        )
        os._exit(1)  # MPI's own end would wait for the others
