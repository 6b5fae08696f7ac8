"""The network between hosts, by MPI.

Measured are the clocks, latency and bandwidth of every pair, and an allreduce of all.

n hosts meet in n - 1 rounds. In each round all hosts meet in disjoint pairs, and each direction of
a pair gets BOX seconds. So the time grows with n, though the pairs grow with n². All pairs of a
round send at once, as they do in a ring allreduce.
"""

import array
import json
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.preflight.measurements import Allreduce, Clock, Link, RankLinks

if TYPE_CHECKING:
    from mpi4py import MPI

BOX = 0.2  # seconds of sending, for each direction of a pair
PINGS, PING_BOX = 200, 0.05  # of 8 bytes, at most, and the seconds they may take
CLOCK_PINGS = 20
# Bytes of a message. Below the smallest, MPI only buffers it and says that it is sent.
SMALLEST, LARGEST = 2**17, 2**22
GRADIENTS = 25_557_032  # float32, ResNet-50's: an allreduce of a training step
MORE, END = 1, 2  # tags
FIRST, LAST = 10, 10**6  # the orders of parts that `say` is given, before and after the rounds
DOUBLE = struct.Struct("d")


class Ping(NamedTuple):
    """A question for another clock: how long the answer took, and how far that clock is ahead."""

    trip: float
    ahead: float


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the rounds of a tournament of 0 … count - 1, in which every two meet once.

    A round is a list of disjoint pairs. There are count - 1 rounds. When count is odd there are
    count, and one rests in each.
    """
    places = [*range(count)]
    if count % 2:
        places.append(-1)  # whoever meets it rests
    for _ in range(len(places) - 1):
        pairs = zip(places[: len(places) // 2], reversed(places), strict=False)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        places = [places[0], places[-1], *places[1:-1]]  # the first stays, the others move on


def gather(comm: "MPI.Comm", value: Any) -> list[Any]:
    """Gather JSON values of all ranks at rank 0; elsewhere return []. Collective."""
    from mpi4py import MPI

    if comm.rank:
        comm.Send(json.dumps(value).encode(), 0)
        return []
    values, status = [value], MPI.Status()
    for rank in range(1, comm.size):
        comm.Probe(rank, status=status)
        text = bytearray(status.Get_count())
        comm.Recv(text, rank)
        values.append(json.loads(text))
    return values


def broadcast(comm: "MPI.Comm", value: Any) -> Any:
    """Return rank 0's JSON value on all ranks. Collective."""
    content = json.dumps(value).encode() if comm.rank == 0 else b""
    length = bytearray(len(content).to_bytes(8, "little"))
    comm.Bcast(length)
    text = bytearray(content or int.from_bytes(length, "little"))
    comm.Bcast(text)
    return json.loads(text)


def agreed(comm: "MPI.Comm", decision: bool) -> bool:
    """Return rank 0's decision on all ranks. Collective."""
    buffer = bytearray([decision])
    comm.Bcast(buffer)
    return bool(buffer[0])


def clocks(comm: "MPI.Comm") -> list[Clock]:
    """Compare the ranks' clocks with rank 0's, at rank 0; elsewhere return []. Collective."""
    if comm.rank == 0:
        own = Clock(ahead=0.0, bound=0.0)
        others = [_compare_clock(comm, rank) for rank in range(1, comm.size)]
        return [own, *others]
    buffer = bytearray(DOUBLE.size)
    for _ in range(CLOCK_PINGS):
        comm.Recv(buffer, 0)
        comm.Send(DOUBLE.pack(time.time()), 0)
    return []


def _compare_clock(comm: "MPI.Comm", rank: int) -> Clock:
    """Compare the clock of another rank with this one's, which is rank 0's."""
    buffer = bytearray(DOUBLE.size)
    pings = []
    for _ in range(CLOCK_PINGS):
        began = time.time()
        comm.Send(buffer, rank)
        comm.Recv(buffer, rank)
        ended = time.time()
        (theirs,) = DOUBLE.unpack(buffer)
        pings.append(Ping(ended - began, theirs - (began + ended) / 2))
    quickest = min(pings)  # the least disturbed
    return Clock(quickest.ahead, bound=quickest.trip / 2)


def pairs(
    comm: "MPI.Comm", names: list[str], say: Callable[[int, str], None], start: int = 1
) -> RankLinks:
    """Measure the links from this rank to all others, in rounds. Collective.

    `names` are the ranks' hosts. `say` is called at each round's beginning and end. `start` is the
    first round's number.
    """
    # All begin together, so that the time is that of all rounds.
    links: list[Link] = []
    buffer = bytearray(LARGEST)
    comm.Barrier()
    began = time.monotonic()

    # In a round each rank meets one other at most.
    for number, meetings in enumerate(rounds(comm.size), start):
        order = FIRST + 2 * number
        pair = next((pair for pair in meetings if comm.rank in pair), None)
        if pair is None:
            say(order, f"round {number}, resting")
        else:
            peer = sum(pair) - comm.rank
            say(order, f"round {number}, with {names[peer]}")
            links.append(_meet(comm, names, peer, buffer))
        say(order + 1, f"the end of round {number}")
        comm.Barrier()
    return RankLinks(links, time.monotonic() - began)


def _meet(comm: "MPI.Comm", names: list[str], peer: int, buffer: bytearray) -> Link:
    """Measure the link to the peer, and let it measure its own. The lower rank comes first."""
    if peer < comm.rank:
        _echo(comm, peer)
        _receive(comm, peer, buffer)
    latency = _ping(comm, peer)
    bandwidth = _send(comm, peer, buffer)
    if peer > comm.rank:
        _echo(comm, peer)
        _receive(comm, peer, buffer)
    return Link(names[comm.rank], names[peer], latency, bandwidth)


def better(first: RankLinks, second: RankLinks) -> RankLinks:
    """Take each link's lower latency and higher bandwidth, of two measurements of one rank."""
    links = []
    for one, two in zip(first.links, second.links, strict=True):
        latency = min(one.latency, two.latency)
        bandwidth = max(one.bandwidth, two.bandwidth)
        links.append(Link(one.sender, one.receiver, latency, bandwidth))
    return RankLinks(links, first.seconds)


def together(comm: "MPI.Comm") -> Allreduce:
    """Measure the largest allreduce that the time allows, up to GRADIENTS floats. Collective."""
    from mpi4py import MPI

    addends = array.array("f", bytes(4 * GRADIENTS))
    sums = array.array("f", bytes(4 * GRADIENTS))
    count, seconds = GRADIENTS // 4**5, 0.0
    while True:
        comm.Barrier()
        began = time.monotonic()
        comm.Allreduce([addends, count, MPI.FLOAT], [sums, count, MPI.FLOAT])
        seconds = time.monotonic() - began
        if agreed(comm, count == GRADIENTS or seconds > BOX):
            return Allreduce(4 * count, seconds)
        count = min(4 * count, GRADIENTS)


def _ping(comm: "MPI.Comm", peer: int) -> float:
    """Return the seconds that 8 bytes take: half of a round trip, the median."""
    message = bytearray(8)
    trips: list[float] = []
    end = time.monotonic() + PING_BOX
    while len(trips) < 3 or (len(trips) < PINGS and time.monotonic() < end):
        began = time.perf_counter()
        comm.Send(message, peer, MORE)
        comm.Recv(message, peer)
        trips.append(time.perf_counter() - began)
    comm.Send(message, peer, END)
    return statistics.median(trips[1:]) / 2


def _echo(comm: "MPI.Comm", peer: int) -> None:
    """Answer the peer's _ping."""
    from mpi4py import MPI

    message, status = bytearray(8), MPI.Status()
    while True:
        comm.Recv(message, peer, status=status)
        if status.tag == END:
            return
        comm.Send(message, peer)


def _send(comm: "MPI.Comm", peer: int, buffer: bytearray) -> float:
    """Send for BOX seconds. Return the bytes a second, until the peer has them all."""
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
    """Receive what the peer's _send sends, then tell it that all is here."""
    from mpi4py import MPI

    status = MPI.Status()
    while status.tag != END:
        comm.Recv(buffer, peer, status=status)
    comm.Send(bytearray(8), peer)
