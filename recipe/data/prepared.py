"""The examples of a prepared TFDS data set, read from its files by index."""

import os
import resource
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from recipe.config import nearest
from recipe.data import datasets, records, shared_files
from recipe.data.shared_files import FileState
from recipe.errors import RunError, UsageError
from recipe.system.progress import telling


class UnknownLabel(RunError):
    """An example's label is no class's."""


class Example(NamedTuple):
    """An encoded image and its label."""

    image: bytes
    label: int


class TFDSSource:
    """The encoded images and labels of a prepared TFDS split, in the order of TFDS's files.

    `split` is TFDS's notation, also "train[:10%]". Raise UsageError when there is no such split or
    it has no labels, or when the data set's features aren't an `image` and its `label`.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        # Refuse wrong names and damaged folders before anything is opened.
        self.num_classes = datasets.class_count(builder)
        instructions = _file_instructions(builder, split)
        index = _read_index(builder)

        # The place of each example: the number of its file, and where its record begins and ends.
        positions = []
        for part in instructions:
            in_file = index[part.filename]
            positions.append(in_file[part.skip : part.skip + part.take + 1])
        counts = [part.take for part in instructions]
        self._file = np.repeat(np.arange(len(instructions)), counts)
        self._start = np.concatenate([in_part[:-1] for in_part in positions])
        self._end = np.concatenate([in_part[1:] for in_part in positions])

        # The files are open as long as the source lives.
        self._paths = [part.filename for part in instructions]
        self._descriptors = _open_all(self._paths)
        weakref.finalize(self, _close_all, self._descriptors)
        self._states = []
        for path, descriptor in zip(self._paths, self._descriptors, strict=True):
            self._states.append(_state(descriptor, path, index[path]))
        self._check_first_label(builder.name, split)

    def __len__(self) -> int:
        return len(self._start)

    def read(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Return (encoded images, labels int32[b]) of these examples.

        Raise RunError naming an unreadable example.
        """
        examples = [self._example(int(i)) for i in indices]
        labels = np.array([example.label for example in examples], dtype=np.int32)
        return [example.image for example in examples], labels

    def where(self, index: int) -> str:
        """Name an example for messages: its index, file and position."""
        return f"example {index} (byte {self._start[index]} of {self._paths[self._file[index]]})"

    def keep_first(self, count: int) -> None:
        """Forget all but the first `count` examples."""
        self._file = self._file[:count]
        self._start = self._start[:count]
        self._end = self._end[:count]

    def _check_first_label(self, name: str, split: str) -> None:
        """Raise UsageError when the split has no labels.

        TFDS's label of an example whose class isn't known is −1. Then all others in the split have
        the same.
        """
        try:
            self._example(0)
        except UnknownLabel as error:
            raise UsageError(f"the split {split!r} of {name} can't be used: {error}") from None
        except RunError:
            pass  # whoever reads the example gets the error

    def _example(self, i: int) -> Example:
        # Every fault names the example and its file.
        try:
            features = tf_example_pb2.Example.FromString(self._record(i)).features.feature
            image = features["image"].bytes_list.value[0]
            label = features["label"].int64_list.value[0]
        except OSError as error:
            raise RunError(f"{self.where(i)} can't be read: {error.strerror}") from None
        except (ValueError, IndexError, DecodeError) as error:
            raise RunError(f"{self.where(i)} is damaged: {error}") from None

        # A split without labels has -1 instead.
        if not 0 <= label < self.num_classes:
            raise UnknownLabel(
                f"{self.where(i)} has the label {label}, which is none of the {self.num_classes} "
                "classes'; name a split that has labels in config.data.train_split and "
                "config.data.eval_split"
            )
        return Example(image, label)

    def _record(self, i: int) -> bytes:
        """Read an example's record and check that it is intact.

        The checksum costs 1 % of a decoding. A record of another file than the one that was opened
        would be worse.
        """
        file, start, end = self._file[i], int(self._start[i]), int(self._end[i])
        descriptor = self._descriptors[file]
        block = shared_files.read_at(self._paths[file], descriptor, start, end - start)
        if block.state != self._states[file]:
            raise ValueError(shared_files.CHANGED)
        return records.content(block.content)


def _file_instructions(builder: tfds.core.DatasetBuilder, split: str) -> list:
    """Return which records of which files belong to a split, in TFDS's order."""
    # TFDS parses the split's name, such as train[:10%].
    try:
        instructions = builder.info.splits[split].file_instructions
    except (ValueError, KeyError):
        known = list(builder.info.splits)
        raise UsageError(
            f"{split!r} is not a split of {builder.name} ({', '.join(known)}); did you mean "
            f"{nearest(split, known)!r}?"
        ) from None

    # A part may be so small that it is empty.
    if not any(part.take for part in instructions):
        raise UsageError(
            f"the split {split!r} of {builder.name} has no examples: name a larger part"
        )
    return instructions


def _read_index(builder: tfds.core.DatasetBuilder) -> records.Positions:
    """Return the positions of the records in all files of a data set.

    Raise RunError unless there are as many records as TFDS counted.
    """
    # Only TFRecord files can be read at any place.
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise UsageError(
            f"{builder.data_dir} has no TFRecord files: prepare the data set again as such"
        )

    # All files must be there.
    counts: dict[str, int] = {}
    for split in builder.info.splits.values():
        paths = [os.fspath(path) for path in split.filepaths]
        counts.update(zip(paths, split.shard_lengths, strict=True))
    missing = next((path for path in counts if not Path(path).exists()), None)
    if missing:
        raise RunError(
            f"{missing} is missing: copy it there again, or delete the folder and prepare it again"
        )

    # Each must have as many records as TFDS counted.
    with telling(f"finding the records in {builder.data_dir}"):
        index = records.read_index(list(counts), Path(builder.data_dir) / "records.npz")
    for path, count in counts.items():
        actual = len(index[path]) - 1
        if actual != count:
            raise RunError(f"{path} has {actual} records instead of {count}: copy it again")
    return index


def _open_all(paths: list[str]) -> list[int]:
    """Open a split's files, once: on a network file system each opening is a request."""
    _raise_file_limit(len(paths))
    descriptors: list[int] = []
    try:
        for path in paths:
            descriptors.append(shared_files.open_file(path))
    except OSError as error:
        _close_all(descriptors)
        raise RunError(f"{path} can't be opened: {error.strerror}") from None
    return descriptors


def _raise_file_limit(more: int) -> None:
    """Let the process have so many more open files, as far as it may.

    ImageNet has 1024 files, as many as the usual soft limit allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    limit = soft + more
    if hard != resource.RLIM_INFINITY:
        limit = min(hard, limit)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _state(descriptor: int, path: str, positions: np.ndarray) -> FileState:
    """Return the state of an open file. Raise RunError unless it ends with its last record."""
    try:
        state = shared_files.read_at(path, descriptor, 0, 0).state
    except OSError as error:
        raise RunError(f"{path} can't be read: {error.strerror}") from None
    if state.size != positions[-1]:
        raise RunError(
            f"{path} has {state.size:,} bytes and had {positions[-1]:,} a moment ago: it is being "
            "written"
        )
    return state


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
