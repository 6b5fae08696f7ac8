"""How an epoch is divided into steps, minibatches and the workers' batches. NumPy only."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from recipe.errors import UsageError

if TYPE_CHECKING:
    from recipe.config import Recipe


@dataclass(frozen=True)
class Epoch:
    """The division of an epoch into minibatches of kn, and of these into the workers' batches.

    Raise UsageError when the epoch has no step.
    """

    examples: int  # N, the training examples
    k: int  # workers
    n: int  # examples per worker and step
    remainder: str = "drop"  # what becomes of the last N mod kn examples: "drop" or "short"

    def __post_init__(self) -> None:
        if self.steps > 0:
            return
        fix = "lower config.n or config.k, or set config.data.remainder='short'"
        if self.examples < self.k:
            fix = "lower config.k"
        raise UsageError(
            f"{self.examples} training examples are fewer than one minibatch of config.k={self.k} "
            f"times config.n={self.n}: {fix}"
        )

    @classmethod
    def of(cls, recipe: "Recipe", examples: int) -> "Epoch":
        """Return how a recipe divides so many training examples."""
        return cls(examples, recipe.k, recipe.n, recipe.data.remainder)

    @property
    def steps(self) -> int:
        """The steps of an epoch.

        "drop" is the paper's floor(N/kn): the N mod kn examples that come last in an epoch's order
        are left out of that epoch. "short" gives them a last, short minibatch, unless they are
        fewer than the k workers: a worker never gets an empty batch.
        """
        steps, rest = divmod(self.examples, self.k * self.n)
        has_short_minibatch = self.remainder == "short" and rest >= self.k
        return steps + has_short_minibatch

    def minibatch(self, step: int) -> int:
        """Return M, the examples in a step of the epoch: kn, but for a last, short minibatch."""
        return min(self.k * self.n, self.examples - step * self.k * self.n)

    def indices(self, order: np.ndarray, step: int, worker: int) -> np.ndarray:
        """Return int64[n_j]: worker j's examples in a step of this order (paper, remark 4).

        A minibatch is kn examples in a row of the order, a worker's batch n in a row of these. The
        last, short minibatch is divided so that the workers' n_j differ by one at most, the larger
        ones first.
        """
        return order[self._batch(step, worker)]

    def weight(self, step: int, worker: int) -> float:
        """Return k·n_j/M, the factor of worker j's mean loss (paper, remark 3).

        With it the mean over k workers is the mean over the minibatch's M examples. It is exactly
        1.0 for a full minibatch.
        """
        batch = self._batch(step, worker)
        return self.k * (batch.stop - batch.start) / self.minibatch(step)

    def _batch(self, step: int, worker: int) -> slice:
        """Return where worker j's examples are in the order."""
        minibatch = self.minibatch(step)
        if not (0 <= worker < self.k and step >= 0 and minibatch >= self.k):
            raise IndexError(
                f"worker {worker} of {self.k} has no examples in step {step} of an epoch of "
                f"{self.examples}"
            )
        # The first `larger` workers have one example more than the others.
        smaller, larger = divmod(minibatch, self.k)
        start = step * self.k * self.n + worker * smaller + min(worker, larger)
        return slice(start, start + smaller + (worker < larger))


@dataclass(frozen=True)
class Share:
    """Which of the k workers a rank plays, and how many of them in one forward pass."""

    workers: range
    workers_at_once: int = 1

    @classmethod
    def of(cls, recipe: "Recipe", rank: int, size: int) -> "Share":
        """Return a rank's share: k/size workers in a row, or the whole numbers next to it."""
        workers = range(rank * recipe.k // size, (rank + 1) * recipe.k // size)
        return cls(workers, recipe.run.workers_at_once)

    @property
    def passes(self) -> int:
        """The forward passes of the rank in a step."""
        return len(self.workers) // self.workers_at_once

    def workers_of(self, forward_pass: int) -> range:
        """Return the workers that are played together in one of the rank's passes."""
        first = forward_pass * self.workers_at_once
        return self.workers[first : first + self.workers_at_once]


def check_size(recipe: "Recipe", size: int) -> None:
    """Raise UsageError when `size` ranks can't share the k workers evenly."""
    # As many workers on each rank.
    k, workers_at_once = recipe.k, recipe.run.workers_at_once
    if k % size:
        possible = ", ".join(str(ranks) for ranks in range(1, k + 1) if k % ranks == 0)
        raise UsageError(
            f"config.k={k} workers can't be shared evenly by {size} ranks: start as many ranks as "
            "divide k "
            f"({possible}), or change config.k, and with it the minibatch and kη",
            everywhere=True,
        )

    # As many in each of its passes.
    if k // size % workers_at_once:
        raise UsageError(
            f"config.run.workers_at_once={workers_at_once} doesn't divide the {k // size} workers "
            f"of each of {size} "
            "ranks; set it to a number that does",
            everywhere=True,
        )


def permutation(examples: int, seed: int, epoch: int, block: int = 1) -> np.ndarray:
    """Return int64[examples]: a random order of the training set (paper, remark 4).

    It ranks the raw 64-bit words of Philox with the key (seed, epoch). NumPy promises that stream
    for ever. It does not promise that Generator.permutation stays as it is.

    Deviation with `block` > 1, for slow disks: so many examples that follow one another stay
    together, and only the blocks are shuffled. Where they begin is drawn anew for each epoch.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(examples // block + 3)

    # Cut the set into blocks, the first and the last of which may be shorter.
    shift = int(words[-1] % np.uint64(block))
    starts = np.arange(-shift, examples, block).clip(0)
    lengths = np.diff(starts, append=examples)

    # Put the blocks into the order of their words.
    turns = np.argsort(words[: len(starts)], kind="stable")
    examples_before = np.cumsum(lengths[turns]) - lengths[turns]
    return np.repeat(starts[turns] - examples_before, lengths[turns]) + np.arange(examples)


def eval_indices(examples: int, rank: int, size: int) -> np.ndarray:
    """Return int64: this rank's block of 0 … examples−1.

    Every example is in exactly one rank's block, also when size does not divide the examples. With
    fewer examples than ranks some blocks are empty.
    """
    return np.arange(examples * rank // size, examples * (rank + 1) // size, dtype=np.int64)
