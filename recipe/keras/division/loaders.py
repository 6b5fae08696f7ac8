"""One rank's part of the examples of a PyTorch DataLoader."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from recipe.keras.division.order import Order
from recipe.ranks import collectives
from recipe.rules import sharding

# What a DataLoader was made with, but for the order and the batches.
_SETTINGS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


def divided_loader(loader: DataLoader, batch_size: int | None, order: Order) -> DataLoader:
    """Divide the examples of a DataLoader. Collective.

    Raise ValueError for one without a length, an order or a batch size that are known.
    """
    # Refuse what has no known order or size.
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            "a DataLoader of an IterableDataset can't be divided: give it a dataset with __len__"
        )
    _check_sampler(loader, len(dataset))
    n = batch_size or loader.batch_size
    if n is None:
        raise ValueError("the DataLoader has no batch_size: pass it one, or divide() a batch_size")

    # Deal out the examples.
    order.check("examples of the DataLoader", len(dataset), n)
    batches = _OwnBatches(order, len(dataset), n, collectives.rank(), collectives.size())
    settings = {name: getattr(loader, name) for name in _SETTINGS if hasattr(loader, name)}
    return _DividedLoader(dataset, batches, order, settings)


class _OwnBatches:
    """A batch sampler: this rank's indices, step by step."""

    def __init__(self, order: Order, count: int, n: int, rank: int, size: int) -> None:
        self._order = order
        self._count = count
        cuts = sharding.cuts(count, n * size, size)
        self._begins, self._ends = sharding.parts(cuts, rank, size)

    def __iter__(self) -> Iterator[list[int]]:
        indices: np.ndarray = self._order.of(self._count, self._order.epoch)
        bounds = zip(self._begins, self._ends, strict=True)
        return iter([indices[begin:end].tolist() for begin, end in bounds])

    def __len__(self) -> int:
        return len(self._begins)


class _DividedLoader(DataLoader):
    """A DataLoader that ends the epoch with its last batch."""

    def __init__(
        self, dataset: Any, batches: _OwnBatches, order: Order, settings: dict[str, Any]
    ) -> None:
        super().__init__(dataset, batch_sampler=batches, **settings)
        self._order = order

    def __iter__(self) -> Any:
        for step, batch in enumerate(super().__iter__(), 1):
            # An epoch that was left before its last step does not count.
            if step == len(self):
                self._order.next()
            yield batch


def _check_sampler(loader: DataLoader, count: int) -> None:
    """Raise ValueError when the DataLoader's own order is more than the data's or a random one."""
    # Only PyTorch's plain orders over all examples can be dealt out anew.
    sampler: Any = loader.sampler
    batch_sampler = loader.batch_sampler
    is_known = type(sampler) in (SequentialSampler, RandomSampler)
    is_plain = is_known and not getattr(sampler, "replacement", False)
    is_whole = is_plain and len(sampler) == count
    if is_whole and type(batch_sampler) in (BatchSampler, type(None)):
        return

    # Name what decides instead.
    culprit = sampler
    if is_known:
        culprit = batch_sampler or sampler
    raise ValueError(
        f"the DataLoader's {type(culprit).__name__} decides which examples come: "
        "make it with shuffle=… instead"
    )
