"""The order of the examples, or batches, of an epoch."""

from typing import NamedTuple

import numpy as np

from recipe.ranks import collectives
from recipe.rules.epoch import permutation

TOO_SMALL = (
    "a batch of one example can't be shared out: make batches larger, or their number a multiple "
    "of size()"
)


class _EpochOrder(NamedTuple):
    epoch: int
    indices: np.ndarray  # int64[count]


class Order:
    """The order of the examples, or batches, in the epoch that has come."""

    def __init__(self, shuffle: bool | int, seed: int, first_epoch: int) -> None:
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = first_epoch
        self._latest: _EpochOrder | None = None

    def of(self, count: int, epoch: int, last: int = 0) -> np.ndarray:
        """Return the order of an epoch, int64[count], in which the `last` ones stay last."""
        if not self.shuffle:
            return np.arange(count)
        # Several threads may ask: the order in hand may become another epoch's meanwhile.
        latest = self._latest
        if latest is None or latest.epoch != epoch:
            shuffled = permutation(count - last, self.seed, epoch)
            latest = _EpochOrder(epoch, np.append(shuffled, np.arange(count - last, count)))
            self._latest = latest
        return latest.indices

    def next(self) -> None:
        """End the epoch."""
        self.epoch += 1

    def check(self, what: str, count: int, batch_size: int | None) -> None:
        """Raise ValueError on all ranks when they don't divide the same. Collective.

        Raise it also when there is less than one for each rank.
        """
        # The same data, in the same order, on all ranks.
        own = {
            what: count,
            "batch_size": batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "first_epoch": self.epoch,
        }
        for rank, theirs in enumerate(collectives.gather(own, "division")):
            if theirs != own:
                raise ValueError(
                    f"rank {rank} divides {theirs}, rank {collectives.rank()} {own}: "
                    "pass the same on all"
                )

        # Enough of it for all.
        if count < collectives.size():
            raise ValueError(
                f"{count} {what} are too few for {collectives.size()} ranks: start fewer"
            )
