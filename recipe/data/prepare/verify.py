"""Looks at every byte of a data set: checksums, complete decoding, counts; and leaves digests to compare copies by."""

import collections
import functools
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from recipe.data import decode, files, records, work
from recipe.data.images import image_kind, image_shape
from recipe.data.prepare import builders
from recipe.errors import RunError

SUMS = "SHA256SUMS"  # beside the data, as sha256sum writes and checks it
LINE = re.compile(r"([0-9a-f]{64})  (.+)")  # of that file
UNKNOWN = -1  # TFDS's label of an image whose class isn't known
NAMED = 100  # bad images with a line each; all are counted
CLASSES = {
    "train": (1000, 732, 1300),
    "validation": (1000, 50, 50),
}  # ImageNet's: their number, smallest, largest


@dataclass(frozen=True)
class Part:
    """What one thread looks at: a TFRecord file, or the files of a class. look(tally) does it."""

    split: str
    name: str  # relative to the data set's folder
    count: int  # its images
    look: Callable[[work.Tally], "Found"]


@dataclass
class Found:
    """What was seen. Adds up."""

    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 in hexadecimal of each file
    kinds: collections.Counter = field(default_factory=collections.Counter)  # "JPEG RGB": images
    labels: collections.Counter = field(default_factory=collections.Counter)  # label: images
    bad: list[str] = field(default_factory=list)  # a sentence for each bad image that has been seen
    content: int = 0  # sum of the SHA-256s of labels and images: independent of their order and of the files' form
    lost: int = (
        0  # images whose place isn't known any more, because the record before them is damaged
    )

    def add(self, other: "Found") -> None:
        self.digests |= other.digests
        self.kinds += other.kinds
        self.labels += other.labels
        self.bad += other.bad
        self.lost += other.lost
        self.content = (self.content + other.content) % 2**256

    def good(self, encoded: bytes, label: int) -> None:
        """Counts an image, or raises ValueError saying what is wrong with it."""
        self.kinds[kind_of(encoded)] += 1
        self.labels[label] += 1
        self.content += int.from_bytes(
            hashlib.sha256(label.to_bytes(8, "big", signed=True) + encoded).digest(), "big"
        )


def verify(name: str, folder: Path, parts: list[Part]) -> None:
    """Looks at all parts of the data set in `folder`, says what there is, and keeps or compares the digests.

    Raises RunError when an image or a file is bad, a count isn't ImageNet's, or a file isn't what it once was."""
    began, kept, splits = time.monotonic(), _kept(folder), {}
    with work.Tally(f"verifying {name}", sum(part.count for part in parts)) as tally:
        for part, found in work.in_threads(
            lambda part: (part, part.look(tally)), parts, work.cores()
        ):
            splits.setdefault(part.split, Found()).add(found)
    everything = Found()
    for split, found in splits.items():
        everything.add(found)
        print(_summary(split, found), flush=True)
    problems = [
        *everything.bad,
        *_partly_labelled(splits),
        *_wrong_sizes(name, splits),
        *_other_files(folder, kept, everything),
    ]
    for problem in problems[:NAMED]:
        print(f"bad: {problem}", file=sys.stderr, flush=True)
    if problems:
        count = len(everything.bad) + everything.lost
        raise RunError(
            f"{name} in {folder} is not whole: {count:,} bad images or files, {len(problems):,} problems, the first "
            f"{min(NAMED, len(problems))} named above; copy those files again, or delete the folder and prepare it anew"
        )
    print(
        f"every image decodes ({time.monotonic() - began:.0f} s)\n{_keep(folder, everything.digests)}"
    )


def tfds_parts(builder: tfds.core.DatasetBuilder) -> list[Part]:
    """The files of a prepared data set."""
    classes = builder.info.features["label"].num_classes
    return [
        Part(
            name,
            Path(path).name,
            count,
            functools.partial(_look_at_records, str(path), count, classes),
        )
        for name, split in builder.info.splits.items()
        for path, count in zip(split.filepaths, split.shard_lengths, strict=True)
    ]


def verified(folder: Path) -> bool:
    """Whether this data set has been verified, here or where it was copied from."""
    return (folder / SUMS).exists()


def kind_of(encoded: bytes) -> str:
    """ "JPEG RGB" or the like, of an image all of which has been decoded, as in a run. Raises ValueError saying what is
    wrong."""
    box, out = np.array([[0, 0, *image_shape(encoded)]]), np.empty((1, 1, 1, 3), dtype=np.uint8)
    if problem := decode.decode([encoded], box, np.zeros(1, dtype=bool), 1, decode.PLAIN, out):
        raise ValueError(problem[0])
    return image_kind(encoded)


def _look_at_records(path: str, count: int, classes: int, tally: work.Tally) -> Found:
    """A file read once, from its beginning to its end."""
    found, sha = Found(), hashlib.sha256()
    if not Path(path).exists():
        return Found(bad=[f"{path} is missing, with its {count} examples"], lost=count - 1)
    try:
        for number, (start, block) in enumerate(_blocks(path, sha)):
            try:
                _look_at_example(records.content(block), classes, found)
            except (ValueError, IndexError, DecodeError) as error:
                found.bad.append(f"{path}: example {number} (byte {start}): {error}")
            tally.add()
        seen = sum(found.kinds.values()) + len(found.bad)
        if seen != count:
            found.bad.append(f"{path} has {seen} records instead of {count}")
    except OSError as error:
        found.bad.append(f"{path} can't be read: {error.strerror}")
        found.lost = count - 1
    except EOFError as error:
        seen = sum(found.kinds.values()) + len(found.bad)
        found.bad.append(
            f"{path}: {error}; its {count - seen} examples from number {seen} on can't be found"
        )
        found.lost = count - seen - 1
    found.digests[Path(path).name] = sha.hexdigest()
    return found


def _blocks(path: str, sha: "hashlib._Hash") -> Iterator[tuple[int, bytes]]:
    """(position, bytes) of each record. Raises EOFError where the next one can't be found."""
    with files.patiently(path, lambda: Path(path).open("rb", buffering=1 << 20)) as file:
        position = 0
        while head := file.read(records.HEAD):
            try:
                length = records.length(head)
            except (ValueError, IndexError) as error:
                raise EOFError(f"at byte {position} {error}") from None
            block = head + file.read(length + records.TAIL)
            sha.update(block)
            if len(block) < records.HEAD + length + records.TAIL:
                raise EOFError(f"it ends within the record at byte {position}")
            yield position, block
            position += len(block)


def _look_at_example(content: bytes, classes: int, found: Found) -> None:
    features = tf_example_pb2.Example.FromString(content).features.feature
    label = features["label"].int64_list.value[0]
    if label != UNKNOWN and not 0 <= label < classes:
        raise ValueError(f"its label is {label}, and there are {classes} classes")
    found.good(features["image"].bytes_list.value[0], label)


def look_at_files(paths: list[str], root: Path, label: int, tally: work.Tally) -> Found:
    """The images of one class, in files of their own below `root`."""
    found = Found()
    for path in paths:
        try:
            encoded = files.patiently(path, Path(path).read_bytes)
            found.digests[os.fspath(Path(path).relative_to(root))] = hashlib.sha256(
                encoded
            ).hexdigest()
            found.good(encoded, label)
        except OSError as error:
            found.bad.append(f"{path} can't be read: {error.strerror}")
        except ValueError as error:
            found.bad.append(f"{path}: {error}")
        tally.add()
    return found


def _summary(split: str, found: Found) -> str:
    sizes, kinds = (
        found.labels.values(),
        ", ".join(f"{n:,} {kind}" for kind, n in found.kinds.most_common()),
    )
    if found.labels.keys() == {UNKNOWN}:
        return f"{split}: {sum(sizes):,} good images without labels: {kinds}; digest {found.content:064x}"
    classes = f"{len(sizes):,} classes of {min(sizes, default=0):,} to {max(sizes, default=0):,}"
    return f"{split}: {sum(found.kinds.values()):,} good images in {classes}: {kinds}; digest {found.content:064x}"


def _partly_labelled(splits: dict[str, Found]) -> Iterator[str]:
    """A split has labels or has none; one without can't be trained on, nor evaluated."""
    for split, found in splits.items():
        if 0 < found.labels[UNKNOWN] < sum(found.labels.values()):
            yield f"{found.labels[UNKNOWN]:,} of the images of {split} have no label ({UNKNOWN})"


def _wrong_sizes(name: str, splits: dict[str, Found]) -> Iterator[str]:
    """For ImageNet."""
    if not builders.is_imagenet(name):
        return
    for split, count in builders.IMAGENET_EXAMPLES.items():
        found = splits.get(split, Found())
        images, (classes, fewest, most) = sum(found.labels.values()), CLASSES[split]
        if images != count or len(found.labels) != classes:
            yield f"{split} has {images:,} good images in {len(found.labels)} classes instead of {count:,} in {classes}"
        for label, size in sorted(found.labels.items()):
            if not fewest <= size <= most:
                yield f"class {label} of {split} has {size} good images; ImageNet's classes have {fewest} to {most}"


def _kept(folder: Path) -> dict[str, str]:
    """The digests of the last verification, here or where the data came from, by file name; none if there was none."""
    path = folder / SUMS
    if not verified(folder):
        return {}
    try:
        lines = os.fsdecode(path.read_bytes()).removesuffix("\n").split("\n")
    except OSError as error:
        raise RunError(f"{path} can't be read: {error.strerror}") from None
    matches = [LINE.fullmatch(line) for line in lines]
    if None in matches:
        number = matches.index(None) + 1
        raise RunError(
            f"line {number} of {path} is no digest and file name: delete it and verify again"
        )
    return {match[2]: match[1] for match in matches}


def _other_files(folder: Path, kept: dict[str, str], found: Found) -> Iterator[str]:
    """Files that differ from the digests kept at the last verification."""
    for name in sorted(kept.keys() | found.digests.keys()) if kept else ():
        if kept.get(name) != found.digests.get(name):
            yield f"{folder / name} is not the file whose digest is in {SUMS}"


def _keep(folder: Path, digests: dict[str, str]) -> str:
    """A line with the digest of all digests, which are kept where this user may write."""
    text = os.fsencode("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))
    try:
        with work.whole_file(folder / SUMS) as file:
            file.write(text)
        place = f"their digests are in {folder / SUMS}"
    except OSError as error:
        place = f"{folder / SUMS} can't be written: {error.strerror}"
    return f"digest of the files {hashlib.sha256(text).hexdigest()}; {place}"
