"""How the library's ranks share the examples of any data set. Pure functions, NumPy only."""

from typing import NamedTuple

import numpy as np


class Parts(NamedTuple):
    """Where a rank's part of each minibatch begins and ends in the epoch's order."""

    begins: np.ndarray  # int64[steps]
    ends: np.ndarray  # int64[steps]


class BatchPart(NamedTuple):
    """A part of a batch, in fractions of a common number of pieces."""

    batch: int
    begin: int
    end: int


def cuts(examples: int, minibatch: int, ranks: int) -> np.ndarray:
    """Return int64[steps + 1]: where an epoch's minibatches begin in its order, and its end.

    Every example is in one minibatch. A rest that fills none is shared with the last full one: both
    become about as large. So the cuts are the same for all numbers of ranks, and no rank goes
    without an example. Only with one example a rank can they be too few for that: then the rest
    joins the last minibatch.
    """
    full, rest = divmod(examples, minibatch)
    starts = np.append(np.arange(max(full, 1), dtype=np.int64) * minibatch, examples)
    if full and rest and minibatch + rest >= 2 * ranks:
        return np.insert(starts, full, examples - (minibatch + rest) // 2)
    return starts


def parts(cuts: np.ndarray, rank: int, size: int) -> Parts:
    """Return this rank's parts of the minibatches between the cuts.

    The ranks' parts follow one another and differ by one example at most, the larger ones first.
    """
    smaller, larger = np.divmod(np.diff(cuts), size)
    begins = cuts[:-1] + rank * smaller + np.minimum(rank, larger)
    return Parts(begins, begins + smaller + (rank < larger))


def shares(left: int, rank: int, size: int) -> list[BatchPart]:
    """Return this rank's share of `left` < size batches, two parts at most.

    A part (j, a, b) is batch j from a/size to b/size. A batch of n is cut at ⌊a·n/size⌋. The shares
    of all ranks, one after another, are all of the batches.
    """
    share = []
    for batch in range(left):
        # In pieces of 1/size batch, this rank has those from rank·left to (rank + 1)·left.
        begin = max(rank * left - batch * size, 0)
        end = min((rank + 1) * left - batch * size, size)
        if begin < end:
            share.append(BatchPart(batch, begin, end))
    return share
