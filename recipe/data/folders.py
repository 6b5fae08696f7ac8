"""Examples from a plain tree, SPLIT/CLASS/*.JPEG, where it lies: nothing is copied."""

import contextlib
import functools
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

from recipe import watchdog
from recipe.config import Data
from recipe.data import files, records, verify, work
from recipe.errors import RunError, UsageError

SUFFIXES = (".jpeg", ".jpg", ".png")
THREADS = 16  # class folders listed at once, for file systems that answer slowly
Index = dict[str, np.ndarray]


class FolderSource:
    """The files of a split, numbered by their sorted classes and names; a class's label is its place in that order,
    as torchvision's ImageFolder has it.

    Raises UsageError when the tree isn't one of classes, or the classes aren't those of training; RunError when it
    can't be listed."""

    def __init__(self, data: Data, split: str) -> None:
        try:
            self.folder = split_folder(data, split)
            self.classes = _classes(self.folder)
            _check_classes(self.folder, self.classes, split_folder(data, data.train_split))
            index = _read_index(self.folder, self.classes)
        except OSError as error:
            raise RunError(records.unreadable(error.filename, error)) from None
        self.num_classes = len(self.classes)
        self._labels = np.repeat(np.arange(self.num_classes, dtype=np.int32), index["counts"])
        self._names, self._sizes, self._times = index["names"], index["sizes"], index["times"]

    def __len__(self) -> int:
        return len(self._names)

    def read(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """(encoded images, labels int32[b]) of these examples. Raises RunError naming an unreadable file."""
        return [self._image(int(i)) for i in indices], self._labels[indices]

    def where(self, index: int) -> str:
        """An example's name for messages: its index and path."""
        return f"example {index} ({self._path(index)})"

    def take(self, count: int) -> "FolderSource":
        """Keeps only the first `count` examples, those of the first classes; returns itself."""
        self._names, self._labels = self._names[:count], self._labels[:count]
        return self

    def parts(self) -> list[verify.Part]:
        """The classes, to be verified."""
        ends = np.cumsum(np.bincount(self._labels, minlength=self.num_classes))
        parts = []
        for label, (name, end, start) in enumerate(zip(self.classes, ends, [0, *ends[:-1]], strict=True)):
            paths = [self._path(i) for i in range(start, end)]
            look = functools.partial(verify.look_at_files, paths, self.folder.parent, label)
            parts.append(verify.Part(self.folder.name, name, len(paths), look))
        return parts

    def _path(self, i: int) -> str:
        return os.path.join(self.folder, self.classes[self._labels[i]], os.fsdecode(self._names[i]))  # noqa: PTH118

    def _image(self, i: int) -> bytes:
        path = self._path(i)
        try:
            image, state = files.patiently(path, lambda: _read(path))
        except OSError as error:
            raise RunError(f"{self.where(i)} can't be read: {error.strerror}") from None
        if state != (self._sizes[i], self._times[i]) or len(image) != self._sizes[i]:
            raise RunError(
                f"{self.where(i)} is another file than when its folder was listed: put back what was there, or delete "
                f"{_cache(self.folder)} and start anew"
            )
        return image


def root(data: Data) -> Path:
    """The folder of the splits. Raises UsageError when none is given."""
    if not data.data_dir:
        raise UsageError(
            "config.data.name='folder' needs the folder of train/ and val/ in config.data.data_dir (--data_dir)"
        )
    return Path(data.data_dir).expanduser()


def split_folder(data: Data, split: str) -> Path:
    """The folder of a split; "validation" may be called val. Raises UsageError when there is none."""
    names = [split, "val"] if split == "validation" else [split]
    for name in names:
        if (root(data) / name).is_dir():
            return root(data) / name
    raise UsageError(
        f"{root(data)} has no folder {' or '.join(names)} with a folder of images for each class: give the folder that "
        "has train/ and val/, or their names in config.data.train_split and config.data.eval_split"
    )


def _classes(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        found = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    classes = [name for name, is_dir in found if is_dir]
    others = [name for name, is_dir in found if not is_dir]
    if not classes:
        raise UsageError(
            f"{folder} has {len(others):,} files and no folders: move each image into a folder of its class's name, "
            "those of the training images"
        )
    return classes


def _check_classes(folder: Path, classes: list[str], training: Path) -> None:
    if folder == training:
        return
    theirs = _classes(training)
    for one, names, other, others in ((folder, classes, training, theirs), (training, theirs, folder, classes)):
        if alone := sorted(set(names) - set(others)):
            raise UsageError(
                f"{one} has {len(alone)} classes that {other} lacks, such as {alone[0]}: both must have the same "
                "folders, because their places in the sorted order are the labels"
            )


def _cache(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.index.npz"


def _read_index(folder: Path, classes: list[str]) -> Index:
    """Names, sizes and times of all files. Kept in a file beside the split's folder as long as no class folder changes,
    because a network file system can take minutes to list a million files."""
    changed = [(folder / name).stat().st_mtime_ns for name in classes]
    with (
        contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
        np.load(_cache(folder)) as kept,
    ):
        if kept["classes"].tolist() == _encoded(classes).tolist() and kept["changed"].tolist() == changed:
            return {name: kept[name] for name in ("counts", "names", "sizes", "times")}
    lists = list(work.in_threads(_files, [folder / name for name in classes], THREADS))
    _say_left_out(folder, [path for _, others in lists for path in others])
    if empty := [name for name, (images, _) in zip(classes, lists, strict=True) if not images]:
        raise UsageError(f"{folder / empty[0]} has no images: delete that folder in all splits, or fill it")
    images = [image for found, _ in lists for image in found]
    index = {
        "counts": np.array([len(found) for found, _ in lists]),
        "names": _encoded([name for name, _, _ in images]),
        "sizes": np.array([size for _, size, _ in images]),
        "times": np.array([changed for _, _, changed in images]),
    }
    with contextlib.suppress(OSError), work.whole_file(_cache(folder)) as file:
        np.savez(file, classes=_encoded(classes), changed=np.array(changed), **index)
    return index


def _files(folder: Path) -> tuple[list[tuple[str, int, int]], list[str]]:
    """((name, bytes, time of change) of the images in a class's folder, sorted; paths of what else is there)."""
    images, others = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                raise UsageError(f"{entry.path} is a folder within a class's: move its images one folder up")
            if "\n" in entry.name:
                raise UsageError(f"{entry.path!r} has a line break in its name: rename it")
            if entry.name.startswith(".") or not entry.name.lower().endswith(SUFFIXES):
                others.append(entry.path)
                continue
            stat = entry.stat()
            images.append((entry.name, stat.st_size, stat.st_mtime_ns))
    watchdog.beat()
    return sorted(images), sorted(others)


def _say_left_out(folder: Path, others: list[str]) -> None:
    if others:
        print(
            f"warning: {len(others):,} files in {folder} are no images ({', '.join(SUFFIXES)}) or hidden, and are left "
            f"out, such as {others[0]}",
            file=sys.stderr,
            flush=True,
        )


def _encoded(names: list[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names])


def _read(path: str) -> tuple[bytes, tuple[int, int]]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        state = files.state(fd)
        return os.pread(fd, state[0], 0), state
    finally:
        os.close(fd)
