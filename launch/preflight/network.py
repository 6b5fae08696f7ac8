"""The network between hosts, by MPI: clocks, latency and bandwidth of every pair, an allreduce of all.

n hosts meet in n - 1 rounds, in each of them all in disjoint pairs, and each direction of a pair gets BOX seconds: the
time grows with n, though the pairs grow with n². All pairs of a round send at once, as they do in a ring allreduce.
What seems to be a fault is measured again: a moment's disturbance is none.
"""

import array
import json
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi4py import MPI

BOX = 0.2  # seconds of sending, for each direction of a pair
PINGS, PING_BOX = 200, 0.05  # of 8 bytes, at most, and the seconds they may take
CLOCK_PINGS = 20
SMALLEST, LARGEST = (
    2**17,
    2**22,
)  # bytes of a message; below, MPI only buffers it and says that it is sent
GRADIENTS = 25_557_032  # float32, ResNet-50's: an allreduce of a training step
MORE, END = 1, 2  # tags
FIRST, LAST = 10, 10**6  # the orders of parts that `say` is told, before the rounds and after them
DOUBLE = struct.Struct("d")


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """A tournament: 0 … count - 1 in disjoint pairs, so that every two meet once.

    count - 1 rounds, or count when it is odd, where one rests in each."""
    places = [*range(count), *([-1] if count % 2 else [])]
    for _ in range(len(places) - 1):
        pairs = zip(places[: len(places) // 2], reversed(places), strict=False)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        places = [places[0], places[-1], *places[1:-1]]  # the first stays, the others move on


def gather(comm: "MPI.Comm", value: Any) -> list[Any]:
    """JSON values of all ranks, at rank 0."""
    from mpi4py import MPI

    if comm.rank:
        comm.Send(json.dumps(value).encode(), 0)
        return []
    found, status = [value], MPI.Status()
    for rank in range(1, comm.size):
        comm.Probe(rank, status=status)
        text = bytearray(status.Get_count())
        comm.Recv(text, rank)
        found.append(json.loads(text))
    return found


def clocks(comm: "MPI.Comm") -> list[dict[str, float]]:
    """At rank 0, for each rank: by how many seconds its clock is ahead of rank 0's, give or take the bound."""
    there = bytearray(DOUBLE.size)
    if comm.rank:
        for _ in range(CLOCK_PINGS):
            comm.Recv(there, 0)
            comm.Send(DOUBLE.pack(time.time()), 0)
        return []
    found = [{"ahead": 0.0, "bound": 0.0}]
    for rank in range(1, comm.size):
        pings = []
        for _ in range(CLOCK_PINGS):
            began = time.time()
            comm.Send(there, rank)
            comm.Recv(there, rank)
            ended = time.time()
            (theirs,) = DOUBLE.unpack(there)
            pings.append((ended - began, theirs - (began + ended) / 2))
        trip, ahead = min(pings)  # the quickest is the least disturbed
        found.append({"ahead": ahead, "bound": trip / 2})
    return found


def agreed(comm: "MPI.Comm", mine: bool) -> bool:
    """What rank 0 says."""
    said = bytearray([mine])
    comm.Bcast(said)
    return bool(said[0])


def told(comm: "MPI.Comm", value: Any) -> Any:
    """Rank 0's JSON value, everywhere."""
    text = json.dumps(value).encode() if comm.rank == 0 else b""
    length = bytearray(len(text).to_bytes(8, "little"))
    comm.Bcast(length)
    text = bytearray(text or int.from_bytes(length, "little"))
    comm.Bcast(text)
    return json.loads(text)


def pairs(
    comm: "MPI.Comm", names: list[str], say: Callable[[int, str], None], start: int = 1
) -> dict[str, Any]:
    """What this rank measured as a sender, and the seconds of all rounds.

    {"rows": [{"from", "to", "latency" in seconds, "bandwidth" in bytes/s}, … one a peer], "seconds"}; `names`: the
    ranks' hosts; `say`: is told of each round's beginning and end; `start`: the first round's number."""
    rows, buffer = [], bytearray(LARGEST)
    comm.Barrier()
    began = time.monotonic()
    for number, meetings in enumerate(rounds(comm.size), start):
        mine = next((pair for pair in meetings if comm.rank in pair), ())
        peer = sum(mine) - comm.rank
        say(
            FIRST + 2 * number,
            f"round {number}, with {names[peer]}" if mine else f"round {number}, resting",
        )
        for sender in mine:
            if comm.rank == sender:
                latency, bandwidth = _ping(comm, peer), _send(comm, peer, buffer)
                rows.append(
                    {"from": comm.rank, "to": peer, "latency": latency, "bandwidth": bandwidth}
                )
            else:
                _echo(comm, peer)
                _receive(comm, peer, buffer)
        say(FIRST + 2 * number + 1, f"the end of round {number}")
        comm.Barrier()
    return {"rows": rows, "seconds": time.monotonic() - began}


def better(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Of two results of `pairs` of one rank, each link's lower latency and higher bandwidth."""
    rows = [
        one
        | {
            "latency": min(one["latency"], two["latency"]),
            "bandwidth": max(one["bandwidth"], two["bandwidth"]),
        }
        for one, two in zip(first["rows"], second["rows"], strict=True)
    ]
    return first | {"rows": rows}


def together(comm: "MPI.Comm") -> dict[str, float]:
    """The allreduce of all hosts: {"bytes", "seconds"} of the largest that the time allows, up to GRADIENTS floats."""
    from mpi4py import MPI

    ours, sums = array.array("f", bytes(4 * GRADIENTS)), array.array("f", bytes(4 * GRADIENTS))
    count, seconds = GRADIENTS // 4**5, 0.0
    while True:
        comm.Barrier()
        began = time.monotonic()
        comm.Allreduce([ours, count, MPI.FLOAT], [sums, count, MPI.FLOAT])
        seconds = time.monotonic() - began
        if agreed(comm, count == GRADIENTS or seconds > BOX):
            return {"bytes": 4 * count, "seconds": seconds}
        count = min(4 * count, GRADIENTS)


def _ping(comm: "MPI.Comm", peer: int) -> float:
    """Seconds that 8 bytes take: half of a round trip, the median."""
    message, trips, end = bytearray(8), [], time.monotonic() + PING_BOX
    while len(trips) < 3 or (len(trips) < PINGS and time.monotonic() < end):
        began = time.perf_counter()
        comm.Send(message, peer, MORE)
        comm.Recv(message, peer)
        trips.append(time.perf_counter() - began)
    comm.Send(message, peer, END)
    return statistics.median(trips[1:]) / 2


def _echo(comm: "MPI.Comm", peer: int) -> None:
    from mpi4py import MPI

    message, status = bytearray(8), MPI.Status()
    while True:
        comm.Recv(message, peer, status=status)
        if status.tag == END:
            return
        comm.Send(message, peer)


def _send(comm: "MPI.Comm", peer: int, buffer: bytearray) -> float:
    """Bytes a second, until the peer has them all."""
    size, sent, began = SMALLEST, 0, time.monotonic()
    while (started := time.monotonic()) < began + BOX:
        comm.Send(memoryview(buffer)[:size], peer, MORE)
        sent += size
        if time.monotonic() - started < BOX / 20:
            size = min(2 * size, LARGEST)
    comm.Send(bytearray(0), peer, END)
    comm.Recv(bytearray(8), peer)
    return sent / (time.monotonic() - began)


def _receive(comm: "MPI.Comm", peer: int, buffer: bytearray) -> None:
    from mpi4py import MPI

    status = MPI.Status()
    while status.tag != END:
        comm.Recv(buffer, peer, status=status)
    comm.Send(bytearray(8), peer)
