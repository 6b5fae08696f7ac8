"""Verifies a data set: checksums, complete decoding, counts, and digests to compare copies by."""

import functools
import hashlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from recipe.data import datasets, records, shared_files
from recipe.data.decode import Cut, Filter, decode
from recipe.data.folders import FolderSource
from recipe.data.images import image_kind, image_shape
from recipe.errors import RunError
from recipe.system import processor
from recipe.system.files import whole_file
from recipe.system.progress import Tally
from recipe.system.threads import in_threads

SUMS = "SHA256SUMS"  # beside the data, as sha256sum writes and checks it
LINE = re.compile(r"([0-9a-f]{64})  (.+)")  # of that file: digest and file name
UNKNOWN = -1  # TFDS's label of an image whose class isn't known
NAMED = 100  # bad images with a line each; all are counted


@dataclass(frozen=True)
class Classes:
    """ImageNet's classes in a split."""

    count: int
    fewest: int  # images of the smallest class
    most: int  # images of the largest class


CLASSES = {"train": Classes(1000, 732, 1300), "validation": Classes(1000, 50, 50)}


@dataclass(frozen=True)
class Part:
    """What one thread looks at: a TFRecord file, or the files of a class."""

    split: str
    name: str  # relative to the data set's folder
    count: int  # its images
    look: Callable[[Tally], "Findings"]  # looks at them, and counts them as done


@dataclass
class Findings:
    """What is in a part of a data set, in a split, or in all of it."""

    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 in hexadecimal of each file
    kinds: Counter[str] = field(default_factory=Counter)  # images of each kind, as "JPEG RGB"
    labels: Counter[int] = field(default_factory=Counter)  # images of each label
    bad: list[str] = field(default_factory=list)  # a sentence for each bad image that was seen
    lost: int = 0  # images that can't be found, because the record before them is damaged
    # Sum of the SHA-256s of labels and images. It does not depend on their order, nor on the form
    # of the files.
    content: int = 0

    @property
    def images(self) -> int:
        """The number of good images."""
        return sum(self.labels.values())

    def add(self, other: "Findings") -> None:
        """Add what is in another part."""
        self.digests |= other.digests
        self.kinds += other.kinds
        self.labels += other.labels
        self.bad += other.bad
        self.lost += other.lost
        self.content = (self.content + other.content) % 2**256

    def add_image(self, encoded: bytes, label: int) -> None:
        """Count a good image. Raise ValueError saying what is wrong with a bad one."""
        self.kinds[kind_of(encoded)] += 1
        self.labels[label] += 1
        labelled = label.to_bytes(8, "big", signed=True) + encoded
        self.content += int.from_bytes(hashlib.sha256(labelled).digest(), "big")


def verify(name: str, folder: Path, parts: list[Part]) -> None:
    """Look at all parts of the data set in `folder`, say what there is, and keep its digests.

    Raise RunError when an image or a file is bad, a count isn't ImageNet's, or a file isn't what it
    once was.
    """
    # The digests of last time, read before new ones are written.
    began = time.monotonic()
    expected_digests = _read_digests(folder)

    # Look at everything, and say what is in each split.
    splits = _look_at_all(name, parts)
    everything = Findings()
    for split, findings in splits.items():
        everything.add(findings)
        print(_summary(split, findings), flush=True)

    # Name what is wrong.
    problems = [
        *everything.bad,
        *_partly_labelled(splits),
        *_wrong_counts(name, splits),
        *_changed_files(folder, expected_digests, everything.digests),
    ]
    for problem in problems[:NAMED]:
        print(f"bad: {problem}", file=sys.stderr, flush=True)
    if problems:
        count = len(everything.bad) + everything.lost
        raise RunError(
            f"{name} in {folder} is not whole: {count:,} bad images or files, {len(problems):,} "
            f"problems, the first {min(NAMED, len(problems))} named above; copy those files again, "
            "or delete the folder and prepare it anew"
        )

    # Keep the digests for next time.
    print(f"every image decodes ({time.monotonic() - began:.0f} s)")
    print(_write_digests(folder, everything.digests))


def tfds_parts(builder: tfds.core.DatasetBuilder) -> list[Part]:
    """Return the files of a prepared data set, to be verified."""
    classes = builder.info.features["label"].num_classes
    parts = []
    for name, split in builder.info.splits.items():
        for path, count in zip(split.filepaths, split.shard_lengths, strict=True):
            look = functools.partial(_look_at_records, str(path), count, classes)
            parts.append(Part(name, Path(path).name, count, look))
    return parts


def folder_parts(source: FolderSource) -> list[Part]:
    """Return the classes of a tree's split, to be verified."""
    parts = []
    for label, name in enumerate(source.classes):
        paths = source.paths_of(label)
        look = functools.partial(_look_at_files, paths, source.folder.parent, label)
        parts.append(Part(source.folder.name, name, len(paths), look))
    return parts


def verified(folder: Path) -> bool:
    """Say whether this data set has been verified, here or where it was copied from."""
    return (folder / SUMS).exists()


def kind_of(encoded: bytes) -> str:
    """Decode all of an image, as in a run, and return its format and mode, as "JPEG RGB".

    Raise ValueError saying what is wrong.
    """
    box = np.array([[0, 0, *image_shape(encoded)]])
    cut = Cut(box, np.zeros(1, dtype=bool), 1, Filter.PLAIN)
    problems = decode([encoded], cut, np.empty((1, 1, 1, 3), dtype=np.uint8))
    if problems:
        raise ValueError(problems[0].message)
    return image_kind(encoded)


def _look_at_all(name: str, parts: list[Part]) -> dict[str, Findings]:
    """Look at all parts, on all cores; return what is in each split."""
    splits: dict[str, Findings] = {}
    with Tally(f"verifying {name}", sum(part.count for part in parts)) as tally:
        results = in_threads(lambda part: part.look(tally), parts, processor.cores())
        for part, findings in zip(parts, results, strict=True):
            splits.setdefault(part.split, Findings()).add(findings)
    return splits


def _look_at_records(path: str, count: int, classes: int, tally: Tally) -> Findings:
    """Read a file of so many examples once, from its beginning to its end."""
    # A missing file counts as one bad file, and its other examples as lost.
    if not Path(path).exists():
        return Findings(bad=[f"{path} is missing, with its {count} examples"], lost=count - 1)

    # Go on after a bad example, as long as the next record can be found.
    findings, digest = Findings(), hashlib.sha256()
    seen = 0  # records
    try:
        for start, block in _blocks(path, digest):
            try:
                _look_at_example(records.content(block), classes, findings)
            except (ValueError, IndexError, DecodeError) as error:
                findings.bad.append(f"{path}: example {seen} (byte {start}): {error}")
            seen += 1
            tally.add()
        if seen != count:
            findings.bad.append(f"{path} has {seen} records instead of {count}")
    except OSError as error:
        findings.bad.append(f"{path} can't be read: {error.strerror}")
        findings.lost = count - 1
    except EOFError as error:
        findings.bad.append(
            f"{path}: {error}; its {count - seen} examples from number {seen} on can't be found"
        )
        findings.lost = count - seen - 1

    # The digest of all that was read.
    findings.digests[Path(path).name] = digest.hexdigest()
    return findings


def _blocks(path: str, digest: "hashlib._Hash") -> Iterator[tuple[int, bytes]]:
    """Yield (position, bytes) of each record, and add them to the digest.

    Raise EOFError where the next one can't be found.
    """
    with shared_files.patiently(path, lambda: Path(path).open("rb", buffering=1 << 20)) as file:
        position = 0
        while head := file.read(records.HEAD):
            try:
                length = records.length(head)
            except (ValueError, IndexError) as error:
                raise EOFError(f"at byte {position} {error}") from None
            block = head + file.read(length + records.TAIL)
            digest.update(block)
            if len(block) < records.HEAD + length + records.TAIL:
                raise EOFError(f"it ends within the record at byte {position}")
            yield position, block
            position += len(block)


def _look_at_example(content: bytes, classes: int, findings: Findings) -> None:
    features = tf_example_pb2.Example.FromString(content).features.feature
    label = features["label"].int64_list.value[0]
    if label != UNKNOWN and not 0 <= label < classes:
        raise ValueError(f"its label is {label}, and there are {classes} classes")
    findings.add_image(features["image"].bytes_list.value[0], label)


def _look_at_files(paths: list[str], root: Path, label: int, tally: Tally) -> Findings:
    """Look at the images of one class, in files of their own below `root`."""
    findings = Findings()
    for path in paths:
        try:
            encoded = shared_files.patiently(path, Path(path).read_bytes)
            name = os.fspath(Path(path).relative_to(root))
            findings.digests[name] = hashlib.sha256(encoded).hexdigest()
            findings.add_image(encoded, label)
        except OSError as error:
            findings.bad.append(f"{path} can't be read: {error.strerror}")
        except ValueError as error:
            findings.bad.append(f"{path}: {error}")
        tally.add()
    return findings


def _summary(split: str, findings: Findings) -> str:
    """Say in one line what is in a split."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in findings.kinds.most_common())
    end = f"{kinds}; digest {findings.content:064x}"
    if findings.labels.keys() == {UNKNOWN}:
        return f"{split}: {findings.images:,} good images without labels: {end}"
    sizes = findings.labels.values()
    classes = f"{len(sizes):,} classes of {min(sizes, default=0):,} to {max(sizes, default=0):,}"
    return f"{split}: {findings.images:,} good images in {classes}: {end}"


def _partly_labelled(splits: dict[str, Findings]) -> Iterator[str]:
    """Yield the splits in which some images have no label.

    A split has labels or has none. One without can't be trained on, nor evaluated.
    """
    for split, findings in splits.items():
        unknown = findings.labels[UNKNOWN]
        if 0 < unknown < findings.images:
            yield f"{unknown:,} of the images of {split} have no label ({UNKNOWN})"


def _wrong_counts(name: str, splits: dict[str, Findings]) -> Iterator[str]:
    """Yield what is not as in ImageNet, for ImageNet."""
    if not datasets.is_imagenet(name):
        return
    for split, count in datasets.IMAGENET_EXAMPLES.items():
        # The split as a whole.
        findings, classes = splits.get(split, Findings()), CLASSES[split]
        if findings.images != count or len(findings.labels) != classes.count:
            yield (
                f"{split} has {findings.images:,} good images in {len(findings.labels)} classes "
                f"instead of {count:,} in {classes.count}"
            )

        # Each class.
        for label, size in sorted(findings.labels.items()):
            if not classes.fewest <= size <= classes.most:
                yield (
                    f"class {label} of {split} has {size} good images; ImageNet's classes have "
                    f"{classes.fewest} to {classes.most}"
                )


def _changed_files(
    folder: Path, expected_digests: dict[str, str], digests: dict[str, str]
) -> Iterator[str]:
    """Yield the files that differ from the digests of the last verification, if there was one."""
    if not expected_digests:
        return
    for name in sorted(expected_digests.keys() | digests.keys()):
        if expected_digests.get(name) != digests.get(name):
            yield f"{folder / name} is not the file whose digest is in {SUMS}"


def _read_digests(folder: Path) -> dict[str, str]:
    """Return the digests of the last verification by file name, or nothing if there was none.

    It was here or where the data came from. Raise RunError when they can't be read.
    """
    # Read the file.
    path = folder / SUMS
    if not verified(folder):
        return {}
    try:
        lines = os.fsdecode(path.read_bytes()).removesuffix("\n").split("\n")
    except OSError as error:
        raise RunError(f"{path} can't be read: {error.strerror}") from None

    # Take it apart: a line is a digest and a name.
    digests = {}
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if match is None:
            raise RunError(
                f"line {number} of {path} is no digest and file name: delete it and verify again"
            )
        digest, name = match.groups()
        digests[name] = digest
    return digests


def _write_digests(folder: Path, digests: dict[str, str]) -> str:
    """Keep the digests where this user may write; return a line with the digest of them all."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    text = os.fsencode("".join(lines))
    try:
        with whole_file(folder / SUMS) as file:
            file.write(text)
        place = f"their digests are in {folder / SUMS}"
    except OSError as error:
        place = f"{folder / SUMS} can't be written: {error.strerror}"
    return f"digest of the files {hashlib.sha256(text).hexdigest()}; {place}"
