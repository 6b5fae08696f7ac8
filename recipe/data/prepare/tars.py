"""ImageNet from its tars into TFDS's files, one finished file after another.

So a killed preparation goes on where it was. TFDS's own writer first copies all images into a
thousand temporary files, and nothing of that outlives a kill. But the order of its examples is that
of hashes of their names, known as soon as the heads in the tars are read. So each file is written
at once, from random reads, with its examples made by TFDS's builder. That is half the disk traffic,
and the same examples at the same places. Unlike TFDS's, the bytes are the same each time.
"""

import contextlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, hashing
from tensorflow_datasets.core.utils import shard_utils

from recipe.data import records
from recipe.errors import RunError, UsageError
from recipe.system import owner
from recipe.system.files import leftovers, whole_file
from recipe.system.progress import Tally, telling
from recipe.system.threads import in_threads

LOCK = "lock"
SHARD_FILE = r".+\.tfrecord-[0-9]{5,}-of-[0-9]{5,}"  # names of TFDS's files
HEADS_FILE = r".+\.heads\.npy"  # names of the kept heads
THREADS = 8  # files in the making; more of them hide a slow disk's latency
PROTO = 60  # bytes of an example besides its image: its file name, label and the names of the three
TAR_END = bytes(1024)


class Head(NamedTuple):
    """Where an image is in a tar: the range of bytes to read.

    For an image in an inner tar the range includes the tar header.
    """

    archive: str  # name of the inner tar, "" for an image outside of one
    name: str
    start: int
    size: int


# The same, in an array.
HEAD_TYPE = np.dtype([("archive", "S64"), ("name", "S64"), ("start", "i8"), ("size", "i8")])


@dataclass(frozen=True)
class Split:
    """One tar, and what becomes of it."""

    name: str
    tar: Path
    examples: Callable[[Iterable], Iterator]  # the builder's, from an archive's (name, file) pairs
    heads: np.ndarray  # HEAD_TYPE[images], in TFDS's order

    @property
    def ends(self) -> list[int]:
        """Where TFDS ends each file, as a number of examples."""
        in_inner_tar = self.heads["archive"] != b""
        image_sizes = self.heads["size"] - in_inner_tar * tarfile.BLOCKSIZE
        total = int((image_sizes + PROTO).sum())
        count = shard_utils.ShardConfig().get_number_shards(total, len(self.heads))
        return list(shard_utils.get_shard_boundaries(len(self.heads), count))


class Shard(NamedTuple):
    """One of TFDS's files, and the images that belong into it."""

    path: Path
    heads: np.ndarray  # HEAD_TYPE[images]


def prepare(builder: tfds.core.GeneratorBasedBuilder, manual_dir: Path) -> None:
    """Write a data set of tars into its folder, or what a killed preparation has left to write.

    Raise UsageError when the disk is too small or another process is at it. Raise RunError on a
    damaged tar.
    """
    # Refuse a disk that is too small before anything is written.
    finished = Path(builder.data_dir)
    unfinished = finished.parent / f"unfinished.{finished.name}"
    check_disk(unfinished, manual_dir)
    unfinished.mkdir(parents=True, exist_ok=True)
    with alone(unfinished):
        # The examples.
        infos = []
        for split in _splits(builder, manual_dir, unfinished):
            infos.append(_write_split(builder, split, unfinished))

        # TFDS's description of them, last of all.
        builder.info.set_splits(tfds.core.splits.SplitDict(infos))
        builder.info.download_size = 0
        builder.info.write_to_directory(unfinished)

        # The folder gets its name when it holds nothing but the data set.
        for path in _kept_heads(r".+", unfinished):
            path.unlink()
        unfinished.replace(finished)
        (finished / LOCK).unlink()


def check_disk(unfinished: Path, manual_dir: Path) -> None:
    """Raise UsageError unless what is left to write fits: the tars less what is written."""
    tars = [manual_dir / f"ILSVRC2012_img_{kind}.tar" for kind in ("train", "val", "test")]
    tar_bytes = sum(path.stat().st_size for path in tars if path.exists())
    written = [
        path for path in unfinished.glob("*.tfrecord-*") if re.fullmatch(SHARD_FILE, path.name)
    ]
    written_bytes = sum(path.stat().st_size for path in written)
    existing = next(folder for folder in (unfinished, *unfinished.parents) if folder.exists())
    check_room(existing, max(0, tar_bytes - written_bytes))


def check_room(folder: Path, needed: int) -> None:
    """Say how many bytes are needed and free. Raise UsageError unless they fit."""
    free = shutil.disk_usage(folder).free
    text = f"{needed / 1e9:,.1f} GB are needed in {folder}, and {free / 1e9:,.1f} GB are free"
    if needed > free:
        raise UsageError(f"{text}: make room, or name another disk's folder with --data_dir")
    print(f"at most {text}", flush=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other preparations out of a folder, and remove what killed ones were writing.

    Raise UsageError when one is in it, saying which.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = owner.only(folder / LOCK, f"{folder}, where a data set is prepared,")
            stack.enter_context(lock)
        except FileNotFoundError:
            raise UsageError(
                f"{folder} was just finished by another process: give the command again"
            ) from None
        for leftover in leftovers(folder, f"({SHARD_FILE}|{HEADS_FILE})"):
            leftover.unlink(missing_ok=True)
        yield


def _splits(
    builder: tfds.core.GeneratorBasedBuilder, manual_dir: Path, folder: Path
) -> Iterator[Split]:
    """Yield the splits. TFDS's builder finds out which tars there are, and what the labels are."""
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    manager = builder._make_download_manager(None, config)
    for generator in builder._split_generators(manager):
        name = str(generator.name)
        kind = "val" if name == "validation" else name
        tar = manual_dir / f"ILSVRC2012_img_{kind}.tar"
        others = {key: value for key, value in generator.gen_kwargs.items() if key != "archive"}

        def examples(archive: Iterable, others: dict = others) -> Iterator:
            return builder._generate_examples(archive=archive, **others)

        yield Split(name, tar, examples, _heads_in_order(name, tar, folder))


def _heads_in_order(split: str, tar: Path, folder: Path) -> np.ndarray:
    """Return HEAD_TYPE[images] of a tar in the order of TFDS.

    They are kept for the case of a kill, as long as the tar stays the same.
    """
    # An earlier preparation may have kept the heads of this very tar.
    status = tar.stat()
    cache = folder / f"{split}.{status.st_size}.{status.st_mtime_ns}.heads.npy"
    with contextlib.suppress(OSError, ValueError):
        return np.load(cache)

    # Otherwise read them; what belongs to another tar is worthless.
    _remove_files_of_other_tars(split, folder)
    print(f"reading the heads in {tar} ...", flush=True)
    try:
        heads = _read_heads(tar, status.st_size)
    except tarfile.TarError as error:
        raise RunError(f"{tar} is damaged ({error}): download it again") from None

    # TFDS's order is that of hashes of the images' names.
    hasher = hashing.Hasher(split)
    keys = [hasher.hash_key(name.decode()) for name in heads["name"]]
    if len(set(keys)) < len(keys) or not keys:
        raise RunError(
            f"{tar} has {len(keys)} images of {len(set(keys))} different names: download it again"
        )

    # Keep them for next time.
    heads = heads[sorted(range(len(keys)), key=keys.__getitem__)]
    with whole_file(cache) as file:
        np.save(file, heads)
    return heads


def _remove_files_of_other_tars(split: str, folder: Path) -> None:
    """Remove what was made of a split's tar that was here before, and its heads."""
    for heads in _kept_heads(re.escape(split), folder):
        for path in folder.glob(f"*-{split}.tfrecord-*"):
            if re.fullmatch(SHARD_FILE, path.name):
                path.unlink()
        heads.unlink()


def _kept_heads(split: str, folder: Path) -> list[Path]:
    """Return the files of kept heads of a split, of any tar. `split` is a regular expression."""
    pattern = re.compile(rf"{split}\.[0-9]+\.[0-9]+\.heads\.npy")
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]


def _read_heads(tar: Path, size: int) -> np.ndarray:
    """Return HEAD_TYPE[images] in the tar's order.

    Say now and then how far it is, for a slow disk takes minutes.
    """
    heads: list[Head] = []

    def progress() -> str:
        share = heads[-1].start / size if heads else 0
        return f"reading the heads in {tar}: {len(heads):,} images, {share:.0%} of the tar"

    with telling(progress):
        for head in _heads(tar):
            heads.append(head)
    return np.array(heads, dtype=HEAD_TYPE)


def _heads(path: Path) -> Iterator[Head]:
    """Yield the place of each image, in the tar's order."""
    with tarfile.open(path, "r:") as outer:
        for member in _members(outer, path.name):
            if not member.name.endswith(".tar"):
                if member.isfile():
                    yield Head("", member.name, member.offset_data, member.size)
                continue
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                for image in _members(inner, member.name):
                    header = image.offset_data - image.offset
                    start = member.offset_data + image.offset
                    yield Head(member.name, image.name, start, header + image.size)


def _members(tar: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    """Yield all members.

    Raise tarfile.ReadError on a damaged head. tarfile takes it for the end, which is a block of
    zeros.
    """
    yield from tar
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"neither a head nor the end at byte {tar.offset} of {name}")


def _write_split(
    builder: tfds.core.GeneratorBasedBuilder, split: Split, folder: Path
) -> tfds.core.SplitInfo:
    """Write the files of a split that aren't there yet; return TFDS's description of it."""
    # Which examples are in which file.
    template = builder._get_filename_template(split.name).replace(data_dir=folder)
    ends = split.ends
    shards = []
    for number, heads in enumerate(np.split(split.heads, ends[:-1])):
        path = template.sharded_filepath(shard_index=number, num_shards=len(ends))
        shards.append(Shard(Path(path), heads))

    # Write only what is missing.
    missing = [shard for shard in shards if not shard.path.exists()]
    if len(missing) < len(shards):
        there = len(shards) - len(missing)
        print(f"{split.name}: {there} of {len(shards)} files are there already", flush=True)
    _write_shards(builder, split, missing)

    # TFDS counts the bytes without the records' heads and checksums.
    file_bytes = sum(shard.path.stat().st_size for shard in shards)
    return tfds.core.SplitInfo(
        name=split.name,
        shard_lengths=np.diff([0, *ends]).tolist(),
        num_bytes=file_bytes - (records.HEAD + records.TAIL) * ends[-1],
        filename_template=template.replace(data_dir=builder.data_path),
    )


def _write_shards(
    builder: tfds.core.GeneratorBasedBuilder, split: Split, shards: list[Shard]
) -> None:
    """Write these files, several at a time."""
    descriptor = os.open(split.tar, os.O_RDONLY)
    try:
        with Tally(f"writing {split.name}", sum(len(shard.heads) for shard in shards)) as tally:

            def write(shard: Shard) -> None:
                _write_shard(builder, split, descriptor, shard, tally)

            for _ in in_threads(write, shards, THREADS):
                pass
    finally:
        os.close(descriptor)


def _write_shard(
    builder: tfds.core.GeneratorBasedBuilder,
    split: Split,
    descriptor: int,
    shard: Shard,
    tally: Tally,
) -> None:
    """Write one file, from the open tar."""
    features = builder.info.features
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    with whole_file(shard.path) as file:
        examples = split.examples(_archive(descriptor, shard.heads, split.tar))
        for head, (key, example) in zip(shard.heads, examples, strict=True):
            name = head["name"].decode()
            if key != name:
                raise RunError(f"TFDS's builder calls {name} of {split.tar} {key}")
            encoded = serializer.get_tf_example(features.encode_example(example))
            # TFDS leaves the order of the features to the process: each of its preparations has
            # other bytes.
            file.write(records.record(encoded.SerializeToString(deterministic=True)))
            tally.add()


def _archive(descriptor: int, heads: np.ndarray, tar: Path) -> Iterator[tuple[str, io.BytesIO]]:
    """Yield what TFDS reads from an archive, (name, file) of each image.

    An image in an inner tar is a tar of one image.
    """
    for archive, name, start, size in heads.tolist():
        block = os.pread(descriptor, size, start)
        if len(block) < size:
            raise RunError(f"{tar} ends within {name.decode()}: it has changed, download it again")
        if archive:
            padding = bytes(-size % tarfile.BLOCKSIZE)
            yield archive.decode(), io.BytesIO(block + padding + TAR_END)
        else:
            yield name.decode(), io.BytesIO(block)
