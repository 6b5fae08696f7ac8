"""One process a host, started by launch.doctor.

It collects facts, meets the others by MPI, and measures the network.

Rank 0 reads the hosts' names on stdin as JSON, in the order of the ranks. It prints a line of JSON
on stdout after each part, so that a part is kept when a later one hangs. Every rank says on stderr
how far it is, so that the doctor knows who hangs.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from launch.preflight import network, verdicts
from launch.preflight.measurements import RankLinks
from recipe.errors import RunError

if TYPE_CHECKING:
    from mpi4py import MPI

# Begins a line on stderr: MARK rank order part, MARK rank error what, MARK rank alive.
MARK = "launch.doctor:"
MPI_STARTS = 1  # the order of the part in which no thread beats: mpi4py holds Python's lock
LISTENS = 3.0  # seconds that the doctor listens, after the limit, for who is alive


def main(data_dir: str, limit: float) -> None:
    """Run all parts. After `limit` seconds this process ends, come what may. Collective."""
    # Neither a hang nor a crash may go unnoticed.
    signal.alarm(int(limit + LISTENS) + 2)
    threading.Thread(target=_beat, daemon=True).start()

    # Imported here, so that a package that is missing is reported with the host's name.
    say(0, "the facts of this host")
    from launch.preflight import facts

    # What can be found out alone, before MPI may hang.
    own_facts = facts.collect(data_dir)
    say(MPI_STARTS, "MPI's start")
    from mpi4py import MPI

    # Does MPI see the ranks that its launcher has started?
    comm = MPI.COMM_WORLD
    _check_size(comm.size, os.environ.get("OMPI_COMM_WORLD_SIZE", ""), MPI.Get_library_version())

    # Facts, now that the names of the others are known.
    input_names = json.load(sys.stdin) if comm.rank == 0 else []
    names = network.broadcast(comm, input_names)
    say(2, "collecting the facts")
    own_facts = replace(own_facts, names=facts.resolve_all(names))
    emit(comm, "facts", network.gather(comm, asdict(own_facts)))

    # Measurements.
    say(3, "the clocks")
    emit(comm, "clocks", [asdict(clock) for clock in network.clocks(comm)])
    if comm.size > 1:
        _measure_pairs(comm, names)
        say(network.LAST, "the allreduce")
        emit(comm, "together", asdict(network.together(comm)))
    say(network.LAST + 1, "the end")


def _check_size(size: int, started: str, library: str) -> None:
    """Raise RunError when processes that mpirun has started don't find each other.

    In training each of them would be alone.
    """
    if started not in ("", str(size)):
        raise RunError(
            f"mpirun started {started} processes, of which mpi4py's MPI found {size}: "
            f"it is another MPI, {library.split(',')[0].strip()}"
        )


def _measure_pairs(comm: "MPI.Comm", names: list[str]) -> None:
    """Measure all links; when one or a host seems at fault, once more, and take the better.

    A moment's disturbance is no fault. Collective.
    """
    first = _gather_links(comm, network.pairs(comm, names, say))
    _emit_links(comm, first)
    findings = verdicts.links([link for result in first for link in result.links])
    suspicious = any(finding.fault for finding in findings)
    if network.agreed(comm, suspicious):
        second = _gather_links(comm, network.pairs(comm, names, say, comm.size + 1))
        _emit_links(comm, list(map(network.better, first, second)))


def _gather_links(comm: "MPI.Comm", links: RankLinks) -> list[RankLinks]:
    """Gather the ranks' links at rank 0; elsewhere return []. Collective."""
    return [RankLinks.from_json(each) for each in network.gather(comm, asdict(links))]


def _emit_links(comm: "MPI.Comm", results: list[RankLinks]) -> None:
    """Print the links of all ranks, on rank 0."""
    emit(comm, "pairs", [asdict(result) for result in results])


def say(order: int, part: str) -> None:
    """Say that this rank begins a part. The others wait for whoever has come least far."""
    _write(f"{order} {part}")


def emit(comm: "MPI.Comm", part: str, value: Any) -> None:
    """Print a part as a line of JSON, on rank 0."""
    if comm.rank == 0:
        print(json.dumps({part: value}), flush=True)


def _beat() -> None:
    """Say every second that this process runs, also while it waits for another."""
    while True:
        time.sleep(1)
        _write("alive")


def _write(what: str) -> None:
    """Write a line on stderr, in one call, since there are two threads."""
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    sys.stderr.write(f"{MARK} {rank} {what}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    try:
        main(**json.loads(sys.argv[1]))
    except Exception as error:  # whatever it is, the doctor names the host
        kind = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
        _write(f"error {kind}{error}")
        os._exit(1)  # MPI's own end would wait for the others
