"""One rank's part of arrays, or of the batches of a PyDataset."""

import multiprocessing
import sys
import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from recipe.keras import backend
from recipe.keras.division.order import TOO_SMALL, Order
from recipe.ranks import collectives
from recipe.rules import sharding

Structure = Any  # arrays, alone or in nested tuples and dictionaries, with None among them


def divided_arrays(data: Structure, batch_size: int, order: Order) -> "DividedArrays":
    """Divide arrays that all ranks have. Collective.

    Raise ValueError for what is no array, and for arrays of different numbers of examples.
    """
    # fit() may add a sample_weight of None.
    while isinstance(data, tuple) and data and data[-1] is None:
        data = data[:-1]
    arrays = keras.tree.map_structure(_indexable, data)
    if not isinstance(arrays, (tuple, list, dict)):
        arrays = (arrays,)

    # All have the same number of examples.
    shapes = [tuple(array.shape) for array in keras.tree.flatten(arrays) if array is not None]
    counts = {shape[0] if shape else None for shape in shapes}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            f"arrays of shapes {shapes} have no common number of examples along the first axis"
        )
    count = shapes[0][0]
    order.check("examples", count, batch_size)
    return DividedArrays(arrays, count, batch_size, order, collectives.rank(), collectives.size())


def divided_batches(
    data: keras.utils.PyDataset, batch_size: int | None, order: Order
) -> "DividedBatches":
    """Divide the batches of a PyDataset. Collective.

    Raise ValueError for a batch size and for a PyDataset without end.
    """
    if batch_size is not None:
        raise ValueError(
            f"batch_size={batch_size}: a PyDataset makes its batches itself; leave it out"
        )
    if data.num_batches is None:
        raise ValueError(
            "a PyDataset without end can't be divided; let its num_batches be those of an epoch"
        )
    order.check("batches of the PyDataset", data.num_batches, None)
    return DividedBatches(data, order, collectives.rank(), collectives.size())


class _Divided(keras.utils.PyDataset):
    """Steps of one rank.

    `epoch` may be set. Keras doesn't tell a PyDataset the number of the epoch, so that epochs are
    counted.
    """

    def __init__(self, order: Order, count: int, **parallel: Any) -> None:
        super().__init__(**parallel)
        self._order = order
        self._count = count
        self._parallel = self.workers > 1 or (self.workers > 0 and self.use_multiprocessing)
        self._begun = False
        self._reset = False
        self._pass = order.epoch  # the epoch whose order is being drawn
        self._drawn: dict[int, int] = {}  # the last step drawn, by thread where Keras has several

    @property
    def epoch(self) -> int:
        return self._order.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._order.epoch = epoch

    def on_epoch_begin(self) -> None:
        self._begun = True

    def on_epoch_end(self) -> None:
        if self._begun and self._reset:
            self._order.next()
        # Keras ends an epoch before the first. With PyTorch it begins one before that, to build
        # the model.
        self._begun = False
        self._reset = True
        if self._parallel:
            self._drawn.clear()

    def _epoch_of(self, step: int) -> int:
        """Return the epoch of this step: that of the pass over the data.

        A pass may take several of Keras's epochs.
        """
        self._check_turn(step)
        if step == 0 or self._parallel:
            self._pass = self.epoch
        return self._pass

    def _check_turn(self, step: int) -> None:
        """Raise ValueError when Keras shuffles the steps, by a generator of each rank's own."""
        thread = threading.get_ident() if self._parallel else 0
        last = self._drawn.get(thread, -1)
        self._drawn[thread] = step
        in_turn = step in (0, last + 1)
        skips_others = self._parallel and step > last  # other threads draw the steps between
        is_training = self._parallel or self._begun
        if is_training and not (in_turn or skips_others):
            raise ValueError(
                "Keras shuffles the steps, differently on each rank; call fit(…, shuffle=False)"
            )


class DividedArrays(_Divided):
    """A rank's batches of arrays that all ranks have."""

    def __init__(
        self, arrays: Structure, count: int, batch_size: int, order: Order, rank: int, size: int
    ) -> None:
        super().__init__(order, count)
        self._arrays = arrays
        cuts = sharding.cuts(count, batch_size * size, size)
        self._begins, self._ends = sharding.parts(cuts, rank, size)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, step: int) -> Structure:
        part = slice(self._begins[step], self._ends[step])
        epoch = self._epoch_of(step)
        chosen: slice | np.ndarray = part
        if self._order.shuffle:
            chosen = self._order.of(self._count, epoch)[part]
        return _mapped(lambda array: _chosen_examples(array, chosen), self._arrays)


class DividedBatches(_Divided):
    """Every size-th batch of a PyDataset, and a share of those that are left over.

    If some are left over, each rank's last batch and its share of their examples make two smaller
    steps. The last batch, which may be a short one, stays the
    last.
    """

    def __init__(self, batches: keras.utils.PyDataset, order: Order, rank: int, size: int) -> None:
        super().__init__(
            order,
            batches.num_batches,
            workers=batches.workers,
            use_multiprocessing=batches.use_multiprocessing,
            max_queue_size=batches.max_queue_size,
        )
        self._batches = batches
        self._rank = rank
        self._size = size
        self._rounds, self._left = divmod(self._count, size)

    def __len__(self) -> int:
        return self._rounds + (1 if self._left else 0)

    def __getitem__(self, step: int) -> Structure:
        if not 0 <= step < len(self):
            raise IndexError(step)
        if self._is_left_behind(step):
            return None
        order = self._order.of(self._count, self._epoch_of(step), last=1)
        if self._left and step >= self._rounds - 1:
            return self._half(order, step - (self._rounds - 1))
        return self._batch(order, step * self._size + self._rank)

    def on_epoch_begin(self) -> None:
        super().on_epoch_begin()
        self._batches.on_epoch_begin()

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        self._batches.on_epoch_end()

    def _is_left_behind(self, step: int) -> bool:
        """Return whether Keras's workers draw a step ahead that nobody will take.

        With PyTorch one batch builds the model. Keras would hand out those drawn after it in the
        first epoch, before its own. It skips None.
        """
        is_building = self._parallel and not self._reset and backend.FRAMEWORK == "torch"
        in_process = multiprocessing.parent_process() is not None
        in_thread = threading.current_thread() is not threading.main_thread()
        return is_building and (in_process or in_thread) and step > 0

    def _batch(self, order: np.ndarray, place: int) -> Structure:
        return self._batches[int(order[place])]

    def _half(self, order: np.ndarray, half: int) -> Structure:
        """Return one half, 0 or 1, of this rank's last batch and its share of what is left over.

        Raise ValueError when they are one example.
        """
        last_round = (self._rounds - 1) * self._size
        parts = [_part(self._batch(order, last_round + self._rank), 0, 1, 1)]
        for j, a, b in sharding.shares(self._left, self._rank, self._size):
            batch = self._batch(order, last_round + self._size + j)
            parts.append(_part(batch, a, b, self._size))
        joined = _mapped(lambda *arrays: np.concatenate(arrays), *parts)
        if _length(joined) < 2:
            raise ValueError(TOO_SMALL)
        return _part(joined, half, half + 1, 2)


def _indexable(leaf: Any) -> Any:
    """Return an array or a tensor from which examples can be taken.

    Raise ValueError for anything else.
    """
    if hasattr(leaf, "to_numpy"):  # pandas
        leaf = leaf.to_numpy()
    if leaf is None or isinstance(leaf, np.ndarray) or keras.ops.is_tensor(leaf):
        return leaf
    if _is_tensor_of("tensorflow", leaf) or _is_tensor_of("torch", leaf):
        return leaf
    raise ValueError(
        f"{type(leaf).__name__} can't be divided: pass arrays, a tf.data.Dataset, a "
        "keras.utils.PyDataset or a torch.utils.data.DataLoader"
    )


def _is_tensor_of(framework: str, value: Any) -> bool:
    """Return whether `value` is a tensor of a framework that may not even be installed."""
    module = sys.modules.get(framework)
    return module is not None and isinstance(value, module.Tensor)


def _mapped(function: Callable, *structures: Structure) -> Structure:
    """Return the structure of the function's results. None stays None."""
    return keras.tree.map_structure(lambda *a: None if a[0] is None else function(*a), *structures)


def _length(batch: Structure) -> int:
    return len(next(array for array in keras.tree.flatten(batch) if array is not None))


def _part(batch: Structure, a: int, b: int, whole: int) -> Structure:
    """Return a batch from a/whole to b/whole, as NumPy arrays."""
    if isinstance(batch, list):
        batch = tuple(batch)
    batch = _mapped(keras.ops.convert_to_numpy, batch)
    n = _length(batch)
    return _mapped(lambda array: array[a * n // whole : b * n // whole], batch)


def _chosen_examples(array: Any, chosen: slice | np.ndarray) -> Any:
    """Return some of an array's examples."""
    if isinstance(chosen, np.ndarray) and _is_tensor_of("tensorflow", array):
        return sys.modules["tensorflow"].gather(array, chosen)
    return array[chosen]
