"""Examples from a plain tree, SPLIT/CLASS/*.JPEG, where it lies: nothing is copied."""

import contextlib
import functools
import os
import stat
import unicodedata
import zipfile
from pathlib import Path

import numpy as np

from recipe.config import Data
from recipe.data import files, records, work
from recipe.data.prepare import verify
from recipe.errors import RunError, UsageError
from recipe.system import output, watchdog

SUFFIXES = (".jpeg", ".jpg", ".png")
# Folders that tools and file systems make beside and inside of those of the classes; hidden ones are left out, too.
TOOLS = frozenset(
    (
        *(
            "@eaDir",
            "#recycle",
            "#snapshot",
            "@Recycle",
            "@Recently-Snapshot",
            "@__thumb",
            "$RECYCLE.BIN",
        ),
        *("lost+found", "System Volume Information", "__MACOSX", "__pycache__"),
    )
)
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
        for label, (name, end, start) in enumerate(
            zip(self.classes, ends, [0, *ends[:-1]], strict=True)
        ):
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
    """The names of the class folders, sorted."""
    classes, others = _listed(folder)
    if not classes:
        raise UsageError(
            f"{folder} has {len(others):,} files and no folders: move each image into a folder of its class's name, "
            "those of the training images"
        )
    return classes


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """(names of the class folders, sorted; paths of what else is there). Raises UsageError for a dead link: where it
    stands for a class, all labels after it would be others."""
    classes, others = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _left_out(entry.name):
                others.append(entry.path)
            elif entry.is_dir():
                classes.append(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
                raise UsageError(
                    f"{entry.path} is a link that leads nowhere: mend it or delete it, in all splits"
                )
            else:
                others.append(entry.path)
    return sorted(classes), sorted(others)


def _left_out(name: str) -> bool:
    """Whether this is no user's file or folder."""
    return name.startswith(".") or name in TOOLS


def _check_classes(folder: Path, classes: list[str], training: Path) -> None:
    if folder == training:
        return
    theirs = _classes(training)
    for one, names, other, others in (
        (folder, classes, training, theirs),
        (training, theirs, folder, classes),
    ):
        if alone := sorted(set(names) - set(others)):
            alike = next((name for name in others if _looks(name) == _looks(alone[0])), None)
            hint = f", which has {alike!a}: rename one of the two" if alike else ""
            raise UsageError(
                f"{one} has {len(alone)} classes that {other} lacks, such as "
                f"{ascii(alone[0]) if alike else alone[0]}{hint}: both must have the same folders, because their "
                "places in the sorted order are the labels"
            )


def _looks(name: str) -> str:
    """Equal for names that look alike: other cases, other spaces, accents in one sign or in two."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _say_alike(folder: Path, classes: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in classes:
        if (other := seen.setdefault(_looks(name), name)) != name:
            output.warn(
                f"{folder} has the classes {other!a} and {name!a}, which look alike: they are two"
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
        if (
            kept["classes"].tolist() == _encoded(classes).tolist()
            and kept["changed"].tolist() == changed
        ):
            return {name: kept[name] for name in ("counts", "names", "sizes", "times")}
    with work.telling(f"listing {folder}"):
        lists = list(work.in_threads(_files, [folder / name for name in classes], THREADS))
    _say_alike(folder, classes)
    _say_left_out(folder, [*_listed(folder)[1], *(path for _, others in lists for path in others)])
    if empty := [name for name, (images, _) in zip(classes, lists, strict=True) if not images]:
        raise UsageError(
            f"{folder / empty[0]} has no images: delete that folder in all splits, or fill it"
        )
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
            if _left_out(entry.name):
                others.append(entry.path)
                continue
            if entry.is_dir():
                raise UsageError(
                    f"{entry.path} is a folder within a class's: move its images one folder up, or delete it if they "
                    "are not the class's"
                )
            if "\n" in entry.name:
                raise UsageError(f"{entry.path!r} has a line break in its name: rename it")
            if not entry.name.lower().endswith(SUFFIXES):
                others.append(entry.path)
                continue
            found = entry.stat()
            if stat.S_ISREG(found.st_mode):
                images.append((entry.name, found.st_size, found.st_mtime_ns))
            else:  # a pipe, say, which nobody writes to
                others.append(entry.path)
    watchdog.beat()
    return sorted(images), sorted(others)


def _say_left_out(folder: Path, others: list[str]) -> None:
    """One sentence; an image among them is the example, for it may be missed."""
    if others:
        images = [
            path
            for path in others
            if path.lower().endswith(SUFFIXES) and "/." not in path[len(str(folder)) :]
        ]
        output.warn(
            f"{len(others):,} files or folders in {folder} are no images ({', '.join(SUFFIXES)}) in a class's folder, "
            f"or hidden, or a tool's, and are left out, such as {(images or others)[0]}"
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
