"""Where examples come from: a prepared TFDS data set, a tree of files, or nowhere (synthetic). Access by index."""

import functools
import os
import resource
import weakref
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from recipe.config import Data, nearest
from recipe.data import files, records, work
from recipe.data.folders import FolderSource
from recipe.data.prepare import builders
from recipe.errors import RunError, UsageError
from recipe.rules import augment


class UnknownLabel(RunError):
    """An example's label is no class's."""


class TFDSSource:
    """The encoded images and labels of a prepared TFDS split, in the order of TFDS's files.

    `split` is TFDS's notation, also "train[:10%]". Raises UsageError when there is no such split or it has no labels,
    or when the data set's features aren't an `image` and its `label`."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        self.num_classes = class_count(builder)
        parts = _file_instructions(builder, split)
        index = _index(builder)
        self._paths = [part.filename for part in parts]
        chosen = [index[part.filename][part.skip : part.skip + part.take + 1] for part in parts]
        self._file = np.repeat(np.arange(len(parts)), [part.take for part in parts])
        self._start = np.concatenate([positions[:-1] for positions in chosen])
        self._end = np.concatenate([positions[1:] for positions in chosen])
        self._fds = _open_all(self._paths)
        weakref.finalize(self, _close_all, self._fds)
        self._states = [
            _state(fd, path, index[path]) for fd, path in zip(self._fds, self._paths, strict=True)
        ]
        self._check_first_label(builder.name, split)

    def __len__(self) -> int:
        return len(self._start)

    def read(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """(encoded images, labels int32[b]) of these examples. Raises RunError naming an unreadable example."""
        examples = [self._example(int(i)) for i in indices]
        return [image for image, _ in examples], np.array(
            [label for _, label in examples], dtype=np.int32
        )

    def where(self, index: int) -> str:
        """An example's name for messages: its index, file and position."""
        return f"example {index} (byte {self._start[index]} of {self._paths[self._file[index]]})"

    def take(self, count: int) -> "TFDSSource":
        """Keeps only the first `count` examples; returns itself."""
        self._file, self._start, self._end = (
            self._file[:count],
            self._start[:count],
            self._end[:count],
        )
        return self

    def _check_first_label(self, name: str, split: str) -> None:
        """TFDS's label of an example whose class isn't known is −1: then it is that of all others in the split."""
        try:
            self._example(0)
        except UnknownLabel as error:
            raise UsageError(f"the split {split!r} of {name} can't be used: {error}") from None
        except RunError:
            pass  # who reads it hears of it

    def _example(self, i: int) -> tuple[bytes, int]:
        try:
            features = tf_example_pb2.Example.FromString(self._record(i)).features.feature
            image, label = (
                features["image"].bytes_list.value[0],
                features["label"].int64_list.value[0],
            )
            if not 0 <= label < self.num_classes:
                raise UnknownLabel(
                    f"{self.where(i)} has the label {label}, which is none of the {self.num_classes} classes'; name a "
                    "split that has labels in config.data.train_split and config.data.eval_split"
                )
            return image, label
        except OSError as error:
            raise RunError(f"{self.where(i)} can't be read: {error.strerror}") from None
        except (ValueError, IndexError, DecodeError) as error:
            raise RunError(f"{self.where(i)} is damaged: {error}") from None

    def _record(self, i: int) -> bytes:
        """Its checksum costs 1 % of a decoding; a record of another file than the one that was opened is worse."""
        file, start, end = self._file[i], int(self._start[i]), int(self._end[i])
        block, state = files.read_at(self._paths[file], self._fds[file], start, end - start)
        if state != self._states[file]:
            raise ValueError(files.CHANGED)
        return records.content(block)


class SyntheticSource:
    """Images from no disk, for measurements: uint8 noise that depends on (seed, index), ImageNet's 1000 classes.

    All images of a class are one pattern, moved sideways by up to 63 pixels: so they can be learned, and they cost a
    copy each. Evaluation examples are other moves of the same patterns. They aren't augmented."""

    num_classes = 1000
    MOVES = 64

    def __init__(self, examples: int, seed: int, split: str) -> None:
        self._examples, self._seed, self._split = examples, seed, ("train", "eval").index(split)

    def __len__(self) -> int:
        return self._examples

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """int32[b]"""
        return self._draw(indices)[0]

    def images(self, indices: np.ndarray, size: int) -> np.ndarray:
        """uint8[b, size, size, 3]"""
        labels, moves = self._draw(indices)
        length = 3 * size * size
        noise = _noise(self._seed, 3 * self.MOVES * self.num_classes + length)
        starts = 3 * (self.MOVES * labels + moves)
        return np.stack([noise[start : start + length].reshape(size, size, 3) for start in starts])

    def _draw(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u = augment.uniforms(indices, self._seed, self._split, 2)
        return (u[:, 0] * self.num_classes).astype(np.int32), (u[:, 1] * self.MOVES).astype(
            np.int32
        )


Source = (
    TFDSSource | FolderSource | SyntheticSource
)  # the examples of a split, numbered in an order that stays


def open_source(data: Data, split: str, seed: int = 0) -> Source:
    """The examples of a recipe: `split` is "train" or "eval"; `seed` matters to synthetic data only.

    Raises UsageError (data not prepared, no such split, fewer examples than asked for) or RunError (damaged data)."""
    limit = data.train_examples if split == "train" else data.eval_examples
    if data.name == builders.SYNTHETIC:
        usual = builders.IMAGENET_EXAMPLES["train" if split == "train" else "validation"]
        return SyntheticSource(limit or usual, seed, split)
    part = data.train_split if split == "train" else data.eval_split
    if data.name == builders.FOLDER:
        source = FolderSource(data, part)
    else:
        source = TFDSSource(builders.prepared_builder(data), part)
    if limit > len(source):
        raise UsageError(
            f"config.data.{split}_examples={limit} is more than the {len(source)} that there are"
        )
    return source.take(limit or len(source))


def prepare(data: Data) -> None:
    """Makes a run's data ready, on one rank before the others open it; does nothing when it is.

    Small data sets are written or downloaded here. ImageNet isn't: hours don't belong into a run on many GPUs, and
    `python -m recipe.data.prepare imagenet2012` has its own progress. Raises UsageError or RunError."""
    if data.name not in (builders.SYNTHETIC, builders.FOLDER, builders.IMAGENET):
        builder = builders.find_builder(data)
        if not builders.is_prepared(builder):
            builders.run_builder(builder, builders.manual_dir(data))
    for split in ("train", "eval"):
        open_source(data, split)  # keeps the index, so that not every rank has to scan


def class_count(builder: tfds.core.DatasetBuilder) -> int:
    """The classes of a data set. Raises UsageError unless its features have an image and a label."""
    features = builder.info.features
    wanted = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    if not all(
        name in features and isinstance(features[name], kind) for name, kind in wanted.items()
    ):
        raise UsageError(
            f"config.data.name={builder.name!r} has the features {', '.join(features)}: the recipe needs an image and "
            "a label of that name"
        )
    if not features["label"].num_classes:
        raise UsageError(
            f"config.data.name={builder.name!r} doesn't say how many classes its label has"
        )
    return features["label"].num_classes


def _file_instructions(builder: tfds.core.DatasetBuilder, split: str) -> list:
    """Which records of which files belong to a split, in TFDS's order."""
    try:
        parts = builder.info.splits[split].file_instructions
    except (ValueError, KeyError):
        known = list(builder.info.splits)
        raise UsageError(
            f"{split!r} is not a split of {builder.name} ({', '.join(known)}); did you mean {nearest(split, known)!r}?"
        ) from None
    if not any(part.take for part in parts):
        raise UsageError(
            f"the split {split!r} of {builder.name} has no examples: name a larger part"
        )
    return parts


def _index(builder: tfds.core.DatasetBuilder) -> dict[str, np.ndarray]:
    """The record positions in all files of a data set; as many records as TFDS counted, or RunError."""
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise UsageError(
            f"{builder.data_dir} has no TFRecord files: prepare the data set again as such"
        )
    splits = builder.info.splits.values()
    paths = [os.fspath(path) for split in splits for path in split.filepaths]
    if missing := next((path for path in paths if not Path(path).exists()), None):
        raise RunError(
            f"{missing} is missing: copy it there again, or delete the folder and prepare it again"
        )
    with work.telling(f"finding the records in {builder.data_dir}"):
        index = records.read_index(paths, Path(builder.data_dir) / "records.npz")
    counts = [count for split in splits for count in split.shard_lengths]
    for path, count in zip(paths, counts, strict=True):
        if len(index[path]) - 1 != count:
            raise RunError(
                f"{path} has {len(index[path]) - 1} records instead of {count}: copy it again"
            )
    return index


def _open_all(paths: list[str]) -> list[int]:
    """Opens a split's files, once: on a network file system each opening is a request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if (
        soft != resource.RLIM_INFINITY
    ):  # ImageNet has 1024 files, as many as the usual soft limit allows
        more = soft + len(paths) if hard == resource.RLIM_INFINITY else min(hard, soft + len(paths))
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
    fds = []
    try:
        for path in paths:
            fds.append(files.open_file(path))
    except OSError as error:
        _close_all(fds)
        raise RunError(f"{path} can't be opened: {error.strerror}") from None
    return fds


def _state(fd: int, path: str, positions: np.ndarray) -> tuple[int, int]:
    try:
        _, state = files.read_at(path, fd, 0, 0)
    except OSError as error:
        raise RunError(f"{path} can't be read: {error.strerror}") from None
    if state[0] != positions[-1]:
        raise RunError(
            f"{path} has {state[0]:,} bytes and had {positions[-1]:,} a moment ago: it is being written"
        )
    return state


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


@functools.lru_cache(maxsize=2)
def _noise(seed: int, length: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(length // 8 + 1)
    return words.view(np.uint8)[:length]
