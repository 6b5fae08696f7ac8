"""The vector that travels with the gradients of a step: its layout, and what is read from it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class StepResult(NamedTuple):
    """What all ranks know of a step when it is done, the same on each of them."""

    losses: np.ndarray  # float32[k], the workers' sums of cross-entropies
    hits: (
        np.ndarray
    )  # float32[k], the workers' numbers of examples whose largest logit is the label's
    stop: bool  # whether any rank wants to leave


@dataclass(frozen=True)
class StepVector:
    """The layout of float32[length]: statistics, the workers' losses and hits, and `stop`.

    Each worker has a place of its own for its loss and its hits. The sum over ranks then adds zeros
    to them, and gives the same numbers for any number of ranks.
    """

    statistics_length: int  # of all means and variances together
    k: int  # workers

    @property
    def length(self) -> int:
        return self.stop + 1

    @property
    def statistics(self) -> slice:
        return slice(0, self.statistics_length)

    @property
    def stop(self) -> int:
        return self.statistics_length + 2 * self.k

    @property
    def result(self) -> slice:
        """The part that `read` reads: all but the statistics."""
        return slice(self.statistics_length, self.length)

    def losses_of(self, first_worker: int, count: int) -> slice:
        """Return the places of the losses of so many workers in a row."""
        start = self.statistics_length + first_worker
        return slice(start, start + count)

    def hits_of(self, first_worker: int, count: int) -> slice:
        """Return the places of the hits of so many workers in a row."""
        return self.losses_of(self.k + first_worker, count)

    def parts(self, statistics: list[Any], losses: Any, hits: Any, stop: Any) -> list[Any]:
        """Return the vector's parts in their order, for a framework to concatenate."""
        return [*statistics, losses, hits, stop]

    def read(self, values: np.ndarray) -> StepResult:
        """Return what the `result` part of a reduced vector says."""
        losses, hits, stop = values[: self.k], values[self.k : 2 * self.k], values[2 * self.k]
        return StepResult(losses, hits, bool(stop))
