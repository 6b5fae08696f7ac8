"""(seed, epoch) → order of the examples; (step, worker) → example indices. Pure functions, NumPy only."""

import numpy as np

from recipe.errors import UsageError


def permutation(examples: int, seed: int, epoch: int, block: int = 1) -> np.ndarray:
    """int64[examples]: one random order of the whole training set for one epoch (paper, remark 4).

    It ranks the raw 64-bit words of Philox with the key (seed, epoch). NumPy promises that stream for ever;
    it does not promise that Generator.permutation stays as it is.

    Deviation with `block` > 1, for slow disks: so many examples that follow one another stay together, and only the
    blocks are shuffled. Where they begin is drawn anew for each epoch."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(
        examples // block + 3
    )
    shift = int(words[-1] % np.uint64(block))
    starts = np.arange(-shift, examples, block).clip(0)
    lengths = np.diff(starts, append=examples)
    turns = np.argsort(words[: len(starts)], kind="stable")
    before = (
        np.cumsum(lengths[turns]) - lengths[turns]
    )  # examples that come earlier in the order than a block's
    return np.repeat(starts[turns] - before, lengths[turns]) + np.arange(examples)


def steps_per_epoch(examples: int, k: int, n: int, remainder: str) -> int:
    """Steps of an epoch with a minibatch of kn examples.

    "drop" is the paper's floor(N/kn): the N mod kn examples that come last in an epoch's order are left out of that
    epoch. "short" gives them a last, short minibatch, unless they are fewer than the k workers: a worker never gets
    an empty batch. Raises UsageError when no step is left."""
    steps, rest = divmod(examples, k * n)
    if remainder == "short" and rest >= k:
        steps += 1
    if steps == 0:
        fix = (
            "lower config.k"
            if examples < k
            else "lower config.n or config.k, or set config.data.remainder='short'"
        )
        raise UsageError(
            f"{examples} training examples are fewer than one minibatch of config.k={k} times config.n={n}: {fix}"
        )
    return steps


def own_workers(k: int, rank: int, size: int) -> range:
    """The workers that a rank plays, one after another: k/size in a row, or the whole numbers next to it."""
    return range(rank * k // size, (rank + 1) * k // size)


def check_size(k: int, size: int, together: int) -> None:
    """Raises UsageError when `size` ranks can't share k workers evenly, `together` of them in a forward pass."""
    if k % size:
        possible = [ranks for ranks in range(1, k + 1) if k % ranks == 0]
        raise UsageError(
            f"config.k={k} workers can't be shared evenly by {size} ranks: start as many ranks as divide k "
            f"({', '.join(map(str, possible))}), or change config.k, and with it the minibatch and kη",
            everywhere=True,
        )
    if k // size % together:
        raise UsageError(
            f"config.run.workers_at_once={together} doesn't divide the {k // size} workers of each of {size} "
            "ranks; set it to a number that does",
            everywhere=True,
        )


def minibatch(examples: int, step: int, k: int, n: int) -> int:
    """M, the examples in step t of an epoch: kn, but for a last, short minibatch."""
    return min(k * n, examples - step * k * n)


def worker_indices(order: np.ndarray, step: int, worker: int, k: int, n: int) -> np.ndarray:
    """int64[n_j]: the examples of worker j < k in step t of an epoch with this order (paper, remark 4).

    A minibatch is kn examples in a row of the order, a worker's batch n in a row of these. The last, short minibatch
    is divided so that the workers' n_j differ by one at most, the larger ones first."""
    start, count = _slice(len(order), step, worker, k, n)
    return order[start : start + count]


def worker_weight(examples: int, step: int, worker: int, k: int, n: int) -> float:
    """k·n_j/M: the factor of worker j's mean loss with which the mean over k workers is the mean over the minibatch's
    M examples (paper, remark 3). Exactly 1.0 for a full minibatch."""
    _, count = _slice(examples, step, worker, k, n)
    return k * count / minibatch(examples, step, k, n)


def cuts(examples: int, minibatch: int, ranks: int) -> np.ndarray:
    """int64[steps + 1]: where an epoch's minibatches begin in its order, and its end; every example is in one.

    A rest that fills no minibatch is shared with the last full one: both become about as large. So the cuts are the
    same for all numbers of ranks, and no rank goes without an example. Only with one example a rank can they be too
    few for that: then the rest joins the last minibatch."""
    full, rest = divmod(examples, minibatch)
    starts = np.append(np.arange(max(full, 1), dtype=np.int64) * minibatch, examples)
    if full and rest and minibatch + rest >= 2 * ranks:
        return np.insert(starts, full, examples - (minibatch + rest) // 2)
    return starts


def parts(cuts: np.ndarray, rank: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where this rank's part of each minibatch begins and ends in the order: int64[steps] both.

    The ranks' parts follow one another and differ by one example at most, the larger ones first."""
    share, larger = np.divmod(np.diff(cuts), size)
    begins = cuts[:-1] + rank * share + np.minimum(rank, larger)
    return begins, begins + share + (rank < larger)


def shares(left: int, rank: int, size: int) -> list[tuple[int, int, int]]:
    """(j, a, b): this rank's share of `left` < size batches is that from a/size to b/size of batch j; two at most.

    The shares of all ranks, one after another, are all of the batches. A batch of n is cut at ⌊a·n/size⌋."""
    cut = [
        (j, max(rank * left - j * size, 0), min((rank + 1) * left - j * size, size))
        for j in range(left)
    ]
    return [(j, a, b) for j, a, b in cut if a < b]


def eval_indices(examples: int, rank: int, size: int) -> np.ndarray:
    """int64: this rank's block of 0 … examples−1. Every example is in exactly one rank's block, also when size does
    not divide the examples; with fewer examples than ranks some blocks are empty."""
    return np.arange(examples * rank // size, examples * (rank + 1) // size, dtype=np.int64)


def _slice(examples: int, step: int, worker: int, k: int, n: int) -> tuple[int, int]:
    """(where worker j's examples begin in the order, how many they are)."""
    size = minibatch(examples, step, k, n)
    if not (0 <= worker < k and step >= 0 and size >= k):
        raise IndexError(
            f"worker {worker} of {k} has no examples in step {step} of an epoch of {examples}"
        )
    share, larger = divmod(size, k)
    return step * k * n + worker * share + min(worker, larger), share + (worker < larger)
