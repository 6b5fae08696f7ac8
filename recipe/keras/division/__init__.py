"""Divides training data among the ranks: each example once an epoch, as many steps on all."""

import importlib
import sys
from numbers import Integral
from types import ModuleType
from typing import Any

import keras

from recipe.keras.division import datasets
from recipe.keras.division.order import Order

# The modules that divide what belongs to a framework, which may not be installed.
_LOADERS = "recipe.keras.division.loaders"
_STREAMS = "recipe.keras.division.streams"


def divide(
    data: Any,
    batch_size: int | None = None,
    *,
    shuffle: bool | int = True,
    seed: int = 0,
    first_epoch: int = 0,
) -> Any:
    """Return this rank's part of `data`, for fit(…, shuffle=False) or evaluate(). Collective.

    All ranks pass the same, whole data. Every example is used once an epoch, on one rank, and all
    ranks have as many steps. `batch_size` is a rank's: a minibatch has `size()` times as many. A
    last, short minibatch and the one before it become about as large. In them a rank may have one
    example less than another, which weighs as much more: ranks' gradients are averaged with equal
    weights.

    The order of an epoch is a function of `seed` and the epoch: another one in each epoch, and the
    same for all numbers of ranks. `first_epoch` is the number of the first one: that of
    fit(initial_epoch=…). With shuffle=False the order is that of the data.

    - NumPy arrays and tensors, alone or in tuples and dictionaries, become a PyDataset, which takes
      its examples batch by batch. `batch_size` is 32 unless given.
    - A `torch.utils.data.DataLoader` becomes another, with its own settings but for the order and
      `drop_last`. `batch_size` is its own unless given. A sampler of the user's is refused.
    - A `tf.data.Dataset` must not be shuffled or repeated before. With `batch_size` its elements
      are examples, without it batches, which are divided as those of a PyDataset. Every rank reads
      all elements. The shuffle buffer holds all of them, or as many as `shuffle` says.
    - A `keras.utils.PyDataset` has its batches divided, of which the i-th must be the same on all
      ranks: seed what it draws. See `DividedBatches`.

    Raise ValueError for other data, for fewer examples than ranks, and on all ranks if their data
    or arguments differ.
    """
    _check_arguments(batch_size, shuffle, seed, first_epoch)
    order = Order(shuffle, seed, first_epoch)
    if isinstance(data, keras.utils.PyDataset):
        return datasets.divided_batches(data, batch_size, order)
    if _is_dataset(data, sys.modules.get("tensorflow")):
        return importlib.import_module(_STREAMS).divided_stream(data, batch_size, order)
    if _is_loader(data, sys.modules.get("torch.utils.data")):
        return importlib.import_module(_LOADERS).divided_loader(data, batch_size, order)
    return datasets.divided_arrays(data, batch_size or 32, order)


def _is_dataset(data: Any, tensorflow: ModuleType | None) -> bool:
    return tensorflow is not None and isinstance(data, tensorflow.data.Dataset)


def _is_loader(data: Any, torch_data: ModuleType | None) -> bool:
    return torch_data is not None and isinstance(data, torch_data.DataLoader)


def _check_arguments(
    batch_size: int | None, shuffle: bool | int, seed: int, first_epoch: int
) -> None:
    """Raise ValueError for arguments of a wrong type or out of range."""
    if batch_size is not None and (not isinstance(batch_size, Integral) or batch_size < 1):
        raise ValueError(
            f"batch_size={batch_size!r} must be an integer of at least 1, "
            "a rank's examples in a step"
        )
    for name, value in (("shuffle", shuffle), ("seed", seed), ("first_epoch", first_epoch)):
        if not isinstance(value, Integral) or value < 0:
            raise ValueError(f"{name}={value!r} must be an integer of at least 0")
