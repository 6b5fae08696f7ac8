"""Divides training data among the ranks: every example once an epoch, as many steps on all ranks."""

import importlib
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import keras
import numpy as np

from recipe.keras import backend
from recipe.ranks import collectives
from recipe.rules import sharding
from recipe.rules.epoch import permutation

_TOO_SMALL = "a batch of one example can't be shared out: make batches larger, or their number a multiple of size()"


def divide(
    data: Any,
    batch_size: int | None = None,
    *,
    shuffle: bool | int = True,
    seed: int = 0,
    first_epoch: int = 0,
) -> Any:
    """This rank's part of `data`, to be handed to fit(…, shuffle=False) or evaluate(). Collective.

    All ranks pass the same, whole data. Every example is used once an epoch, on one rank, and all ranks have as many
    steps. `batch_size` is a rank's: a minibatch has `size()` times as many. The order of an epoch is a function of
    `seed` and the epoch, the same for all numbers of ranks, and another one in each epoch. `first_epoch` is the
    number of the first one: that of fit(initial_epoch=…). With shuffle=False the order is that of the data.

    A last, short minibatch and the one before it become about as large. A rank may have one example less than another
    in them, which weighs as much more there: ranks' gradients are averaged with equal weights.

    NumPy arrays and tensors, alone or in tuples and dictionaries as Keras takes them, become a PyDataset, which takes
    its examples batch by batch; `batch_size` is 32 unless given.

    A `torch.utils.data.DataLoader` becomes another, with its own settings but for the order and `drop_last`;
    `batch_size` is its own unless given. A sampler that isn't PyTorch's sequential or random one is refused.

    A `tf.data.Dataset` must not be shuffled or repeated before. With `batch_size` its elements are examples, without
    it batches, which are divided as those of a PyDataset. Every rank reads all elements and keeps its own. The
    shuffle buffer holds all elements, or as many as `shuffle` says. A dataset of unknown length is read once, to
    count its elements.

    A `keras.utils.PyDataset` has its batches divided, of which the i-th must be the same on all ranks: seed what it
    draws. If their number isn't a multiple of `size()`, each rank's last batch and its share of the examples in those
    left over make two smaller steps. The last batch, which may be a short one, stays the last.

    Raises ValueError for other data, for fewer examples than ranks, and on all ranks if their data or arguments
    differ."""
    _check_arguments(batch_size, shuffle, seed, first_epoch)
    order = _Order(shuffle, seed, first_epoch)
    if isinstance(data, keras.utils.PyDataset):
        return _divided_batches(data, batch_size, order)
    if _is_a(data, "tensorflow", "data.Dataset"):
        return _divided_stream(data, batch_size, order)
    if _is_a(data, "torch.utils.data", "DataLoader"):
        return _divided_loader(data, batch_size, order)
    return _divided_arrays(data, batch_size or 32, order)


class _Order:
    """The order of the examples, or batches, in the epoch that has come."""

    def __init__(self, shuffle: bool | int, seed: int, first_epoch: int) -> None:
        self.shuffle, self.seed, self.epoch = shuffle, seed, first_epoch
        self._kept: tuple[int, np.ndarray] | None = None

    def of(self, count: int, epoch: int, last: int = 0) -> np.ndarray:
        """int64[count]: the order of an epoch, in which the `last` ones stay last; kept until another is asked for."""
        if not self.shuffle:
            return np.arange(count)
        if (kept := self._kept) is None or kept[0] != epoch:  # several threads may ask
            shuffled = permutation(count - last, self.seed, epoch)
            kept = self._kept = epoch, np.append(shuffled, np.arange(count - last, count))
        return kept[1]

    def next(self) -> None:
        """The epoch is over."""
        self.epoch += 1

    def check(self, what: str, count: int, batch_size: int | None) -> None:
        """Raises ValueError on all ranks when they don't divide the same; else when there is too little. Collective."""
        mine = {
            what: count,
            "batch_size": batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "first_epoch": self.epoch,
        }
        for rank, theirs in enumerate(collectives.gather(mine, "division")):
            if theirs != mine:
                raise ValueError(
                    f"rank {rank} divides {theirs}, rank {collectives.rank()} {mine}: pass the same on all"
                )
        if count < collectives.size():
            raise ValueError(
                f"{count} {what} are too few for {collectives.size()} ranks: start fewer"
            )


class _Divided(keras.utils.PyDataset):
    """Steps of one rank. `epoch` may be set: Keras doesn't tell a PyDataset its number, so that epochs are counted."""

    def __init__(self, order: _Order, count: int, **parallel: Any) -> None:
        super().__init__(**parallel)
        self._order, self._count = order, count
        self._parallel = self.workers > 1 or (self.workers > 0 and self.use_multiprocessing)
        self._begun, self._reset = False, False
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
        # Keras ends an epoch before the first, and with PyTorch begins one before that, to build the model.
        self._begun, self._reset = False, True
        if self._parallel:
            self._drawn.clear()

    def _now(self, step: int) -> int:
        """The epoch that this step belongs to: that of the pass over the data, which may take several of Keras's."""
        self._check_turn(step)
        if step == 0 or self._parallel:
            self._pass = self.epoch
        return self._pass

    def _check_turn(self, step: int) -> None:
        """Raises ValueError when Keras shuffles the steps, which it does by a generator of each rank's own."""
        thread = threading.get_ident() if self._parallel else 0
        last = self._drawn.get(thread, -1)
        self._drawn[thread] = step
        if not (step in (0, last + 1) or (step > last if self._parallel else not self._begun)):
            raise ValueError(
                "Keras shuffles the steps, differently on each rank; call fit(…, shuffle=False)"
            )


class DividedArrays(_Divided):
    """This rank's batches of arrays that all ranks have."""

    def __init__(
        self, arrays: Any, count: int, batch_size: int, order: _Order, rank: int, size: int
    ) -> None:
        super().__init__(order, count)
        self._arrays = arrays
        self._begins, self._ends = sharding.parts(
            sharding.cuts(count, batch_size * size, size), rank, size
        )

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, step: int) -> Any:
        part = slice(self._begins[step], self._ends[step])
        epoch = self._now(step)
        chosen = self._order.of(self._count, epoch)[part] if self._order.shuffle else part
        return _mapped(lambda array: _taken(array, chosen), self._arrays)


class DividedBatches(_Divided):
    """Every size-th batch of a PyDataset, and a share of those that are left over."""

    def __init__(self, batches: keras.utils.PyDataset, order: _Order, rank: int, size: int) -> None:
        parallel = ("workers", "use_multiprocessing", "max_queue_size")
        super().__init__(
            order, batches.num_batches, **{name: getattr(batches, name) for name in parallel}
        )
        self._batches, self._rank, self._size = batches, rank, size
        self._rounds, self._left = divmod(self._count, size)

    def __len__(self) -> int:
        return self._rounds + (self._left > 0)

    def __getitem__(self, step: int) -> Any:
        if not 0 <= step < len(self):
            raise IndexError(step)
        if self._is_left_behind(step):
            return None
        order = self._order.of(self._count, self._now(step), last=1)
        if self._left and step >= self._rounds - 1:
            return self._half(order, step == self._rounds)
        return self._batches[int(order[step * self._size + self._rank])]

    def on_epoch_begin(self) -> None:
        super().on_epoch_begin()
        self._batches.on_epoch_begin()

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        self._batches.on_epoch_end()

    def _is_left_behind(self, step: int) -> bool:
        """Whether Keras's workers draw a step ahead that nobody will take: with PyTorch one batch builds the model, and
        Keras would hand out those drawn after it in the first epoch, before its own. It skips None."""
        drawn_ahead = (
            multiprocessing.parent_process()
            or threading.current_thread() is not threading.main_thread()
        )
        building = self._parallel and not self._reset and backend.FRAMEWORK == "torch"
        return bool(building and drawn_ahead and step > 0)

    def _half(self, order: np.ndarray, second: bool) -> Any:
        """One half of this rank's batch of the last round and its share of what is left over."""
        last = (self._rounds - 1) * self._size
        parts = [_part(self._batches[int(order[last + self._rank])], 0, 1, 1)]
        for j, a, b in sharding.shares(self._left, self._rank, self._size):
            parts.append(_part(self._batches[int(order[last + self._size + j])], a, b, self._size))
        joined = _mapped(lambda *arrays: np.concatenate(arrays), *parts)
        if _length(joined) < 2:
            raise ValueError(_TOO_SMALL)
        return _part(joined, second, second + 1, 2)


def _divided_arrays(data: Any, batch_size: int, order: _Order) -> DividedArrays:
    while isinstance(data, tuple) and data and data[-1] is None:  # fit's sample_weight, perhaps
        data = data[:-1]
    arrays = keras.tree.map_structure(_indexable, data)
    leaves = [a for a in keras.tree.flatten(arrays) if a is not None]
    shapes = [tuple(a.shape) for a in leaves]
    if not leaves or any(len(shape) == 0 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"arrays of shapes {shapes} have no common number of examples along the first axis"
        )
    order.check("examples", shapes[0][0], batch_size)
    if not isinstance(arrays, (tuple, list, dict)):
        arrays = (arrays,)
    return DividedArrays(
        arrays, shapes[0][0], batch_size, order, collectives.rank(), collectives.size()
    )


def _divided_batches(
    data: keras.utils.PyDataset, batch_size: int | None, order: _Order
) -> DividedBatches:
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


def _divided_loader(loader: Any, batch_size: int | None, order: _Order) -> Any:
    torch_data = importlib.import_module("torch.utils.data")
    if isinstance(loader.dataset, torch_data.IterableDataset) or not hasattr(
        loader.dataset, "__len__"
    ):
        raise ValueError(
            "a DataLoader of an IterableDataset can't be divided: give it a dataset with __len__"
        )
    _check_sampler(loader, torch_data)
    if loader.batch_size is None and batch_size is None:
        raise ValueError("the DataLoader has no batch_size: pass it one, or divide() a batch_size")
    n, count = batch_size or loader.batch_size, len(loader.dataset)
    order.check("examples of the DataLoader", count, n)
    size = collectives.size()
    begins, ends = sharding.parts(sharding.cuts(count, n * size, size), collectives.rank(), size)

    class Batches:
        """A batch sampler: this rank's indices, step by step."""

        def __iter__(self) -> Iterator[list[int]]:
            now = order.of(count, order.epoch)
            return iter([now[b:e].tolist() for b, e in zip(begins, ends, strict=True)])

        def __len__(self) -> int:
            return len(begins)

    class DividedLoader(torch_data.DataLoader):
        def __iter__(self) -> Iterator:
            for step, batch in enumerate(super().__iter__(), 1):
                if step == len(begins):  # an epoch that was left before has not been
                    order.next()
                yield batch

    return DividedLoader(loader.dataset, batch_sampler=Batches(), **_settings(loader))


def _check_sampler(loader: Any, torch_data: Any) -> None:
    """Raises ValueError when the DataLoader's own order is more than the data's or a random one."""
    sampler, known = loader.sampler, (torch_data.SequentialSampler, torch_data.RandomSampler)
    plain = type(sampler) in known and not getattr(sampler, "replacement", False)
    batches = loader.batch_sampler
    if (
        not plain
        or len(sampler) != len(loader.dataset)
        or type(batches) not in (torch_data.BatchSampler, type(None))
    ):
        name = type(sampler if type(sampler) not in known else batches or sampler).__name__
        raise ValueError(
            f"the DataLoader's {name} decides which examples come: make it with shuffle=… instead"
        )


def _settings(loader: Any) -> dict[str, Any]:
    """What a DataLoader was made with, but for the order and the batches."""
    names = (
        "num_workers",
        "collate_fn",
        "pin_memory",
        "timeout",
        "worker_init_fn",
        "multiprocessing_context",
    )
    names += ("generator", "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order")
    return {name: getattr(loader, name) for name in names if hasattr(loader, name)}


def _divided_stream(data: Any, batch_size: int | None, order: _Order) -> Any:
    tf = importlib.import_module("tensorflow")
    if data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "the tf.data.Dataset has no end; divide it before repeat(), which fit() doesn't need"
        )
    _check_unshuffled(data)
    options = tf.data.Options()
    options.deterministic = True  # an order of each rank's own would use examples twice
    data = data.with_options(options)
    count = int(data.cardinality())
    if count == tf.data.UNKNOWN_CARDINALITY:
        count = int(data.reduce(np.int64(0), lambda n, *_: n + 1))
    order.check("elements of the tf.data.Dataset", count, batch_size)
    if batch_size is None:
        _check_batched(tf, data)
        ordered = _ordered(tf, data.enumerate(), count, order)
        ordered = _last_stays_last(ordered, count) if order.shuffle else ordered
        steps, mine = _own_batches(tf, ordered.map(lambda _, batch: batch).enumerate(), count)
    else:
        steps, mine = _own_examples(
            tf, _ordered(tf, data, count, order).enumerate(), count, batch_size
        )
    return _told(tf, mine.prefetch(tf.data.AUTOTUNE), steps, order)


def _ordered(tf: Any, data: Any, count: int, order: _Order) -> Any:
    """The dataset in the order of the epoch that has come when its first element is drawn."""
    if not order.shuffle:
        return data
    buffer = count if order.shuffle is True else order.shuffle

    def shuffled(epoch: Any) -> Any:
        tf.compat.v1.set_random_seed(
            1 + order.seed
        )  # this function's; tf.random.set_seed() may be a rank's own
        return data.shuffle(buffer, seed=epoch + 1, reshuffle_each_iteration=False)

    epochs = tf.data.Dataset.from_generator(
        lambda: [order.epoch], output_signature=tf.TensorSpec((), tf.int64)
    )
    return epochs.flat_map(shuffled)


def _last_stays_last(numbered: Any, count: int) -> Any:
    """Holds the batch with the last number, which may be a short one, back until the others have come."""
    return numbered.group_by_window(
        key_func=lambda number, _: number // (count - 1) if count > 1 else number,
        reduce_func=lambda _, window: window,
        window_size_func=lambda last: (
            last + 1
        ),  # a window of two, which is given out when no more come
    )


def _own_examples(tf: Any, numbered: Any, count: int, batch_size: int) -> tuple[int, Any]:
    """(steps, this rank's batches) of examples that are numbered in the epoch's order."""
    rank, size = collectives.rank(), collectives.size()
    cuts = sharding.cuts(count, batch_size * size, size)
    begins, ends = (tf.constant(a) for a in sharding.parts(cuts, rank, size))
    largest = int(tf.reduce_max(ends - begins))

    def step(place: Any, _: Any = None) -> Any:
        return tf.searchsorted(cuts, [place], side="right", out_type=tf.int64)[0] - 1

    mine = numbered.filter(
        lambda place, _: (begins[step(place)] <= place) & (place < ends[step(place)])
    )
    batches = mine.group_by_window(
        key_func=step,
        reduce_func=lambda _, window: window.map(lambda _, example: example).batch(largest),
        window_size_func=lambda step: ends[step] - begins[step],
    )
    return len(cuts) - 1, batches


def _own_batches(tf: Any, numbered: Any, count: int) -> tuple[int, Any]:
    """(steps, this rank's batches) of batches that are numbered in the epoch's order."""
    rank, size = collectives.rank(), collectives.size()
    rounds, left = divmod(count, size)
    if not left:
        return rounds, numbered.filter(lambda place, _: place % size == rank).map(
            lambda _, batch: batch
        )
    # What each place of the last round, and of those left over, gives this rank: from a/size to b/size.
    last = (rounds - 1) * size
    bounds = np.zeros((size + left, 2), np.int32)
    bounds[rank] = 0, size
    for j, a, b in sharding.shares(left, rank, size):
        bounds[size + j] = a, b
    table, parts = tf.constant(bounds), int((bounds[:, 0] < bounds[:, 1]).sum())

    def is_mine(place: Any, _: Any) -> Any:
        a, b = tf.unstack(table[tf.maximum(place - last, 0)])
        return tf.where(place < last, place % size == rank, a < b)

    def part(place: Any, batch: Any) -> Any:
        a, b = tf.unstack(
            tf.where(place < last, tf.constant([0, size]), table[tf.maximum(place - last, 0)])
        )
        n = tf.shape(tf.nest.flatten(batch)[0])[0]
        return tf.nest.map_structure(lambda array: array[a * n // size : b * n // size], batch)

    def halves(step: Any, window: Any) -> Any:
        """A batch as it is; of the last round, with what is left over, two halves."""
        window = window.map(part)
        joined = window.skip(1).reduce(
            window.take(1).get_single_element(),
            lambda a, b: tf.nest.map_structure(lambda *both: tf.concat(both, 0), a, b),
        )
        n = tf.shape(tf.nest.flatten(joined)[0], out_type=tf.int64)[0]
        pieces = tf.where(step < rounds - 1, np.int64(1), np.int64(2))
        tf.debugging.Assert(n >= pieces, [_TOO_SMALL])
        return tf.data.Dataset.range(pieces).map(
            lambda i: tf.nest.map_structure(
                lambda array: array[i * n // pieces : (i + 1) * n // pieces], joined
            )
        )

    batches = numbered.filter(is_mine).group_by_window(
        key_func=lambda place, _: tf.minimum(place // size, rounds - 1),
        reduce_func=halves,
        window_size_func=lambda step: tf.where(step < rounds - 1, np.int64(1), np.int64(parts)),
    )
    return rounds + 1, batches


def _told(tf: Any, batches: Any, steps: int, order: _Order) -> Any:
    """The batches, of which the last says that the epoch is over."""
    if order.shuffle:

        def tell(step: Any, batch: Any) -> Any:
            if step == steps - 1:  # an epoch that was left before has not been
                tf.numpy_function(lambda: order.next() or np.int64(0), [], tf.int64)
            return batch

        batches = batches.enumerate().map(tell)
    return batches.apply(tf.data.experimental.assert_cardinality(steps))


def _check_unshuffled(data: Any) -> None:
    """Raises ValueError when the dataset, or one that it is made from, is shuffled."""
    if type(data).__name__ == "_ShuffleDataset":
        raise ValueError(
            "the tf.data.Dataset is shuffled, differently on each rank; leave shuffle() to divide()"
        )
    for source in data._inputs():
        _check_unshuffled(source)


def _check_batched(tf: Any, data: Any) -> None:
    if any(spec.shape.rank == 0 for spec in tf.nest.flatten(data.element_spec)):
        raise ValueError("the tf.data.Dataset's elements are no batches; pass batch_size")


def _check_arguments(
    batch_size: int | None, shuffle: bool | int, seed: int, first_epoch: int
) -> None:
    if batch_size is not None and (not isinstance(batch_size, Integral) or batch_size < 1):
        raise ValueError(
            f"batch_size={batch_size!r} must be an integer of at least 1, a rank's examples in a step"
        )
    for name, value in (("shuffle", shuffle), ("seed", seed), ("first_epoch", first_epoch)):
        if not isinstance(value, Integral) or value < 0:
            raise ValueError(f"{name}={value!r} must be an integer of at least 0")


def _is_a(data: Any, module: str, name: str) -> bool:
    """Whether `data` is of a class of a framework that may not even be installed."""
    if module not in sys.modules:
        return False
    kind: Any = sys.modules[module]
    for part in name.split("."):
        kind = getattr(kind, part)
    return isinstance(data, kind)


def _indexable(leaf: Any) -> Any:
    if hasattr(leaf, "to_numpy"):  # pandas
        leaf = leaf.to_numpy()
    if leaf is None or isinstance(leaf, np.ndarray) or keras.ops.is_tensor(leaf):
        return leaf
    if _is_a(leaf, "tensorflow", "Tensor") or _is_a(leaf, "torch", "Tensor"):
        return leaf
    raise ValueError(
        f"{type(leaf).__name__} can't be divided: pass arrays, a tf.data.Dataset, a keras.utils.PyDataset or a "
        "torch.utils.data.DataLoader"
    )


def _mapped(function: Callable, *structures: Any) -> Any:
    """The structure of the function's results; None stays None."""
    return keras.tree.map_structure(lambda *a: None if a[0] is None else function(*a), *structures)


def _length(batch: Any) -> int:
    return len(next(a for a in keras.tree.flatten(batch) if a is not None))


def _part(batch: Any, a: int, b: int, whole: int) -> Any:
    """From a/whole to b/whole of a batch, as NumPy arrays."""
    batch = _mapped(keras.ops.convert_to_numpy, tuple(batch) if isinstance(batch, list) else batch)
    n = _length(batch)
    return _mapped(lambda array: array[a * n // whole : b * n // whole], batch)


def _taken(array: Any, chosen: Any) -> Any:
    """Some of an array's examples."""
    if isinstance(chosen, np.ndarray) and _is_a(array, "tensorflow", "Tensor"):
        return sys.modules["tensorflow"].gather(array, chosen)
    return array[chosen]
