"""Examples from a plain tree, SPLIT/CLASS/*.JPEG, where it lies: nothing is copied."""

import contextlib
import os
import stat
import unicodedata
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recipe.config import Data
from recipe.data import records, shared_files
from recipe.data.shared_files import FileState
from recipe.errors import RunError, UsageError
from recipe.system import output, watchdog
from recipe.system.files import whole_file
from recipe.system.progress import telling
from recipe.system.threads import in_threads

SUFFIXES = (".jpeg", ".jpg", ".png")
# Folders that tools and file systems make beside those of the classes and inside of them. Hidden
# ones are left out, too.
TOOLS = frozenset(
    {
        "#recycle",
        "#snapshot",
        "$RECYCLE.BIN",
        "@Recently-Snapshot",
        "@Recycle",
        "@__thumb",
        "@eaDir",
        "System Volume Information",
        "__MACOSX",
        "__pycache__",
        "lost+found",
    }
)
THREADS = 16  # class folders listed at once, for file systems that answer slowly


class ImageFile(NamedTuple):
    """A file of a class folder."""

    name: str
    size: int  # bytes
    changed: int  # time of the last change, ns


class ClassFiles(NamedTuple):
    """What a class folder holds."""

    images: list[ImageFile]  # sorted by name
    others: list[str]  # paths of all else


class SplitFolders(NamedTuple):
    """What a split's folder holds."""

    classes: list[str]  # names of the class folders, sorted
    others: list[str]  # paths of all else, sorted


class Index(NamedTuple):
    """The files of a split, in the order of its classes and their names."""

    counts: np.ndarray  # int64[classes]: the files of each class
    names: np.ndarray  # bytes[examples]
    sizes: np.ndarray  # int64[examples], bytes
    times: np.ndarray  # int64[examples]: last changes, ns


class FolderSource:
    """The files of a split, numbered by their sorted classes and names.

    A class's label is its place in that order, as in torchvision's ImageFolder. Raise UsageError
    when the tree isn't one of classes, or the classes aren't those of training. Raise RunError when
    it can't be listed.
    """

    def __init__(self, data: Data, split: str) -> None:
        # The classes must be those of training: their places in the order are the labels.
        try:
            self.folder = split_folder(data, split)
            self.classes = _class_names(self.folder)
            _check_classes(self.folder, self.classes, split_folder(data, data.train_split))
            self._index = _read_index(self.folder, self.classes)
        except OSError as error:
            raise RunError(records.unreadable(error.filename, error)) from None

        # The files come class by class.
        self.num_classes = len(self.classes)
        numbers = np.arange(self.num_classes, dtype=np.int32)
        self._labels = np.repeat(numbers, self._index.counts)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Return (encoded images, labels int32[b]) of these examples.

        Raise RunError naming an unreadable file.
        """
        return [self._image(int(i)) for i in indices], self._labels[indices]

    def where(self, index: int) -> str:
        """Name an example for messages: its index and path."""
        return f"example {index} ({self._path(index)})"

    def keep_first(self, count: int) -> None:
        """Forget all but the first `count` examples, which are of the first classes."""
        self._labels = self._labels[:count]

    def paths_of(self, label: int) -> list[str]:
        """Return the paths of a class's examples."""
        begin, end = np.searchsorted(self._labels, [label, label + 1])
        return [self._path(i) for i in range(begin, end)]

    def _path(self, i: int) -> str:
        name = os.fsdecode(self._index.names[i])
        return os.path.join(self.folder, self.classes[self._labels[i]], name)  # noqa: PTH118

    def _image(self, i: int) -> bytes:
        try:
            image, state = shared_files.read_whole(self._path(i))
        except OSError as error:
            raise RunError(f"{self.where(i)} can't be read: {error.strerror}") from None
        listed = FileState(int(self._index.sizes[i]), int(self._index.times[i]))
        if state != listed or len(image) != state.size:
            raise RunError(
                f"{self.where(i)} is another file than when its folder was listed: put back what "
                f"was there, or delete {_cache(self.folder)} and start anew"
            )
        return image


def root(data: Data) -> Path:
    """Return the folder of the splits. Raise UsageError when none is configured."""
    if not data.data_dir:
        raise UsageError(
            "config.data.name='folder' needs the folder of train/ and val/ in config.data.data_dir "
            "(--data_dir)"
        )
    return Path(data.data_dir).expanduser()


def split_folder(data: Data, split: str) -> Path:
    """Return the folder of a split; "validation" may be called val.

    Raise UsageError when there is none.
    """
    names = [split, "val"] if split == "validation" else [split]
    for name in names:
        if (root(data) / name).is_dir():
            return root(data) / name
    raise UsageError(
        f"{root(data)} has no folder {' or '.join(names)} with a folder of images for each class: "
        "give the folder that has train/ and val/, or their names in config.data.train_split and "
        "config.data.eval_split"
    )


def _class_names(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted. Raise UsageError when there are none."""
    classes, others = _list_split(folder)
    if not classes:
        raise UsageError(
            f"{folder} has {len(others):,} files and no folders: move each image into a folder of "
            "its class's name, those of the training images"
        )
    return classes


def _list_split(folder: Path) -> SplitFolders:
    """List a split's folder.

    Raise UsageError for a dead link: where it stands for a class, all labels after it would be
    wrong.
    """
    # Nothing is left out silently: what is no class is named in a warning.
    classes, others = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _left_out(entry.name):
                others.append(entry.path)
            elif entry.is_dir():
                classes.append(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
                raise UsageError(
                    f"{entry.path} is a link that leads nowhere: mend it or delete it, in all "
                    "splits"
                )
            else:
                others.append(entry.path)
    return SplitFolders(sorted(classes), sorted(others))


def _list_class(folder: Path) -> ClassFiles:
    """List a class's folder. Raise UsageError for what can't be in one."""
    images, others = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            image = _image_file(entry)
            if image is None:
                others.append(entry.path)
            else:
                images.append(image)
    watchdog.beat()
    return ClassFiles(sorted(images), sorted(others))


def _image_file(entry: os.DirEntry) -> ImageFile | None:
    """Return an image of a class's folder, None for what is left out.

    Raise UsageError for a folder and for a name with a line break.
    """
    # Refuse what would change the examples unnoticed.
    if _left_out(entry.name):
        return None
    if entry.is_dir():
        raise UsageError(
            f"{entry.path} is a folder within a class's: move its images one folder up, or delete "
            "it if they are not the class's"
        )
    if "\n" in entry.name:
        raise UsageError(f"{entry.path!r} has a line break in its name: rename it")

    # Leave out what is no image.
    if not entry.name.lower().endswith(SUFFIXES):
        return None
    status = entry.stat()
    if not stat.S_ISREG(status.st_mode):
        return None  # a pipe, say, which nobody writes to
    return ImageFile(entry.name, status.st_size, status.st_mtime_ns)


def _left_out(name: str) -> bool:
    """Say whether this is no file or folder of the user's."""
    return name.startswith(".") or name in TOOLS


def _check_classes(folder: Path, classes: list[str], training: Path) -> None:
    """Raise UsageError unless a split has the classes of training."""
    if folder != training:
        training_classes = _class_names(training)
        _check_no_more(folder, classes, training, training_classes)
        _check_no_more(training, training_classes, folder, classes)


def _check_no_more(folder: Path, classes: list[str], other: Path, other_classes: list[str]) -> None:
    """Raise UsageError when a split has classes that the other lacks."""
    # A class that one split lacks would shift the labels after it.
    missing = sorted(set(classes) - set(other_classes))
    if not missing:
        return

    # Two names that look alike are the likely cause.
    example, hint = missing[0], ""
    for name in other_classes:
        if _appearance(name) == _appearance(missing[0]):
            example = ascii(missing[0])
            hint = f", which has {name!a}: rename one of the two"
            break
    raise UsageError(
        f"{folder} has {len(missing)} classes that {other} lacks, such as {example}{hint}: both "
        "must have the same folders, because their places in the sorted order are the labels"
    )


def _appearance(name: str) -> str:
    """Return the same for names that look alike.

    They differ in cases, in spaces, or have accents in one sign or in two.
    """
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _cache(folder: Path) -> Path:
    """Return where the index of a split is kept: beside its folder."""
    return folder.parent / f"{folder.name}.index.npz"


def _read_index(folder: Path, classes: list[str]) -> Index:
    """Return names, sizes and times of all files.

    They are kept in a file beside the split's folder as long as no class folder changes, because a
    network file system can take minutes to list a million files.
    """
    # The cache counts as long as each folder has the time at which it was listed.
    folders = [folder / name for name in classes]
    changed = [path.stat().st_mtime_ns for path in folders]
    index = _load(_cache(folder), classes, changed)

    # List anew, and keep the list where the folder can be written.
    if index is None:
        index = _list_files(folder, folders)
        with contextlib.suppress(OSError), whole_file(_cache(folder)) as file:
            np.savez(
                file,
                classes=_encoded(classes),
                changed=np.array(changed),
                counts=index.counts,
                names=index.names,
                sizes=index.sizes,
                times=index.times,
            )
    return index


def _load(cache: Path, classes: list[str], changed: list[int]) -> Index | None:
    """Return the kept index, None when there is none or a class folder has changed since."""
    try:
        with np.load(cache) as stored:
            if stored["classes"].tolist() != _encoded(classes).tolist():
                return None
            if stored["changed"].tolist() != changed:
                return None
            return Index(*[stored[name] for name in Index._fields])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _list_files(folder: Path, class_folders: list[Path]) -> Index:
    """List the files of all classes, and warn of what is odd or left out."""
    # A network file system answers many requests at once.
    with telling(f"listing {folder}"):
        classes = list(in_threads(_list_class, class_folders, THREADS))

    # What the user should know.
    _warn_of_likeness(folder, [path.name for path in class_folders])
    others = list(_list_split(folder).others)
    for files in classes:
        others += files.others
    _warn_of_others(folder, others)
    for path, files in zip(class_folders, classes, strict=True):
        if not files.images:
            raise UsageError(f"{path} has no images: delete that folder in all splits, or fill it")

    # One array of each column, in the order of the classes.
    images = [image for files in classes for image in files.images]
    return Index(
        counts=np.array([len(files.images) for files in classes]),
        names=_encoded([image.name for image in images]),
        sizes=np.array([image.size for image in images]),
        times=np.array([image.changed for image in images]),
    )


def _warn_of_likeness(folder: Path, classes: list[str]) -> None:
    """Warn of classes whose names look alike."""
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(_appearance(name), name)
        if other != name:
            output.warn(
                f"{folder} has the classes {other!a} and {name!a}, which look alike: they are two"
            )


def _warn_of_others(folder: Path, others: list[str]) -> None:
    """Warn of what is left out, in one sentence.

    An image among them is the example, for it may be missed.
    """
    if not others:
        return
    images = [path for path in others if _looks_like_an_image(path[len(str(folder)) :])]
    example = (images or others)[0]
    output.warn(
        f"{len(others):,} files or folders in {folder} are no images ({', '.join(SUFFIXES)}) in a "
        f"class's folder, or hidden, or a tool's, and are left out, such as {example}"
    )


def _looks_like_an_image(path: str) -> bool:
    """Say so of a path within the split that isn't hidden."""
    return path.lower().endswith(SUFFIXES) and "/." not in path


def _encoded(names: list[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names])
