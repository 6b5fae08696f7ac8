"""How arrays and batches that people bring are divided over the ranks.

Pure functions, NumPy only.
"""

from typing import NamedTuple

import numpy as np


class Parts(NamedTuple):
    """Where a rank's part of each minibatch begins and ends in the order of the examples."""

    begins: np.ndarray  # int64[steps]
    ends: np.ndarray  # int64[steps]


class Cut(NamedTuple):
    """A part of a batch: from start/size to stop/size of it."""

    batch: int
    start: int
    stop: int


def cuts(examples: int, minibatch: int, ranks: int) -> np.ndarray:
    """Return int64[steps + 1]: where an epoch's minibatches begin in its order, and its end.

    Every example is in one. A rest that fills no minibatch is shared with the last full one: both
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
    """Return a rank's part of each minibatch.

    The ranks' parts follow one another and differ by one example at most, the larger ones first.
    """
    smaller, larger = np.divmod(np.diff(cuts), size)
    begins = cuts[:-1] + rank * smaller + np.minimum(rank, larger)
    return Parts(begins, begins + smaller + (rank < larger))


def shares(left: int, rank: int, size: int) -> list[Cut]:
    """Return a rank's share of `left` < size batches, in two cuts at most.

    The shares of all ranks, one after another, are all of the batches. A batch of n is cut at
    ⌊start·n/size⌋.
    """
    share = []
    for batch in range(left):
        # A batch has `size` parts. This rank has the parts from rank·left to (rank + 1)·left.
        start = max(rank * left - batch * size, 0)
        stop = min((rank + 1) * left - batch * size, size)
        if start < stop:
            share.append(Cut(batch, start, stop))
    return share
