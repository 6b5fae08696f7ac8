"""ImageNet from its tars into TFDS's files, one finished file after another, so that a killed preparation goes on.

TFDS's own writer first copies all images into a thousand temporary files, and nothing of that outlives a kill. But the
order of its examples is that of hashes of their names, known as soon as the heads in the tars are read. So each file
is written at once, from random reads, with its examples made by TFDS's builder: half the disk traffic, the same
examples at the same places, and, unlike TFDS's, the same bytes each time."""

import contextlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, hashing
from tensorflow_datasets.core.utils import shard_utils

from recipe.data import records, work
from recipe.errors import RunError, UsageError
from recipe.system import owner

LOCK = "lock"
FILE = r".+\.tfrecord-[0-9]{5,}-of-[0-9]{5,}"  # names of TFDS's files,
HEADS = r".+\.heads\.npy"  # and of the kept heads
THREADS = 8  # files in the making; more of them hide a slow disk's latency
PROTO = 60  # bytes of an example besides its image: its file name, label and the names of the three
END = bytes(1024)  # of a tar


@dataclass
class Split:
    """One tar, as what becomes of it."""

    name: str
    tar: Path
    examples: Callable[[Iterable], Iterator]  # the builder's, from an archive's (name, file) pairs
    images: np.ndarray  # (archive, name, start, size) of each image, in TFDS's order

    @property
    def boundaries(self) -> list[int]:
        """Where TFDS ends each file, as a number of examples."""
        heads = (self.images["archive"] != b"") * tarfile.BLOCKSIZE
        total = int((self.images["size"] - heads + PROTO).sum())
        count = shard_utils.ShardConfig().get_number_shards(total, len(self.images))
        return list(shard_utils.get_shard_boundaries(len(self.images), count))


IMAGE = np.dtype([("archive", "S64"), ("name", "S64"), ("start", "i8"), ("size", "i8")])


def prepare(builder: tfds.core.GeneratorBasedBuilder, manual_dir: Path) -> None:
    """Writes a data set of tars into its folder, or what a killed preparation has left to write.

    Raises UsageError when the disk is too small or another process is at it, RunError on a damaged tar."""
    finished = Path(builder.data_dir)
    unfinished = finished.parent / f"unfinished.{finished.name}"
    check_disk(unfinished, manual_dir)
    unfinished.mkdir(parents=True, exist_ok=True)
    with alone(unfinished):
        infos = [
            _write(builder, split, unfinished) for split in _splits(builder, manual_dir, unfinished)
        ]
        builder.info.set_splits(tfds.core.splits.SplitDict(infos))
        builder.info.download_size = 0
        builder.info.write_to_directory(unfinished)
        for own in _heads_of(r".+", unfinished):
            own.unlink()
        unfinished.replace(finished)
        (finished / LOCK).unlink()


def check_disk(unfinished: Path, manual_dir: Path) -> None:
    """Raises UsageError unless what is left to write fits: at most the tars' size, less what is written."""
    paths = [manual_dir / f"ILSVRC2012_img_{kind}.tar" for kind in ("train", "val", "test")]
    tars = sum(path.stat().st_size for path in paths if path.exists())
    written = sum(
        path.stat().st_size
        for path in unfinished.glob("*.tfrecord-*")
        if re.fullmatch(FILE, path.name)
    )
    existing = next(folder for folder in (unfinished, *unfinished.parents) if folder.exists())
    room(existing, max(0, tars - written))


def room(folder: Path, needed: int) -> None:
    """Says what is needed and free. Raises UsageError unless it fits."""
    free = shutil.disk_usage(folder).free
    text = f"{needed / 1e9:,.1f} GB are needed in {folder}, and {free / 1e9:,.1f} GB are free"
    if needed > free:
        raise UsageError(f"{text}: make room, or name another disk's folder with --data_dir")
    print(f"at most {text}", flush=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other preparations out of a folder while this one lives, and removes what killed ones were writing.

    Raises UsageError when one is in it, saying which."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(
                owner.only(folder / LOCK, f"{folder}, where a data set is prepared,")
            )
        except FileNotFoundError:
            raise UsageError(
                f"{folder} was just finished by another process: give the command again"
            ) from None
        for leftover in work.leftovers(folder, f"({FILE}|{HEADS})"):
            leftover.unlink(missing_ok=True)
        yield


def _splits(
    builder: tfds.core.GeneratorBasedBuilder, manual_dir: Path, folder: Path
) -> Iterator[Split]:
    """The splits of TFDS's builder, which finds out which tars there are and what the labels are."""
    manager = builder._make_download_manager(
        None, tfds.download.DownloadConfig(manual_dir=manual_dir)
    )
    for generator in builder._split_generators(manager):
        kind = "val" if generator.name == "validation" else generator.name
        tar = manual_dir / f"ILSVRC2012_img_{kind}.tar"
        others = {name: value for name, value in generator.gen_kwargs.items() if name != "archive"}

        def examples(archive: Iterable, others: dict = others) -> Iterator:
            return builder._generate_examples(archive=archive, **others)

        yield Split(str(generator.name), tar, examples, _images(str(generator.name), tar, folder))


def _images(split: str, tar: Path, folder: Path) -> np.ndarray:
    """IMAGE[images] of a tar in the order of TFDS, kept for the case of a kill while the tar stays the same."""
    stat = tar.stat()
    kept = folder / f"{split}.{stat.st_size}.{stat.st_mtime_ns}.heads.npy"
    with contextlib.suppress(OSError, ValueError):
        return np.load(kept)
    for heads in _heads_of(
        re.escape(split), folder
    ):  # of a tar that was here before: what was made of it goes
        for path in (*folder.glob(f"*-{split}.tfrecord-*"), heads):
            if path == heads or re.fullmatch(FILE, path.name):
                path.unlink()
    print(f"reading the heads in {tar} ...", flush=True)
    try:
        images = _all_heads(tar, stat.st_size)
    except tarfile.TarError as error:
        raise RunError(f"{tar} is damaged ({error}): download it again") from None
    hasher = hashing.Hasher(split)
    keys = [hasher.hash_key(name.decode()) for name in images["name"]]
    if len(set(keys)) < len(keys) or not keys:
        raise RunError(
            f"{tar} has {len(keys)} images of {len(set(keys))} different names: download it again"
        )
    images = images[sorted(range(len(keys)), key=keys.__getitem__)]
    with work.whole_file(kept) as file:
        np.save(file, images)
    return images


def _heads_of(split: str, folder: Path) -> list[Path]:
    """The kept heads of a split, of any tar; `split`: a regular expression."""
    return [
        path
        for path in folder.iterdir()
        if re.fullmatch(rf"{split}\.[0-9]+\.[0-9]+\.heads\.npy", path.name)
    ]


def _all_heads(tar: Path, size: int) -> np.ndarray:
    """IMAGE[images] in the tar's order; says how far it is, for on a slow disk it takes minutes."""
    found: list[tuple] = []

    def far() -> str:
        done = found[-1][2] / size if found else 0
        return f"reading the heads in {tar}: {len(found):,} images, {done:.0%} of the tar"

    with work.telling(far):
        for head in _heads(tar):
            found.append(head)
    return np.array(found, dtype=IMAGE)


def _heads(path: Path) -> Iterator[tuple]:
    """(archive, name, start, size): of an image in a tar in the tar, its own head included; else of its bytes only."""
    with tarfile.open(path, "r:") as outer:
        for member in _members(outer, path.name):
            if not member.name.endswith(".tar"):
                if member.isfile():
                    yield "", member.name, member.offset_data, member.size
                continue
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                for image in _members(inner, member.name):
                    head = image.offset_data - image.offset
                    yield (
                        member.name,
                        image.name,
                        member.offset_data + image.offset,
                        head + image.size,
                    )


def _members(tar: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    """All of them. tarfile takes a damaged head for the end, which is a block of zeros."""
    yield from tar
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"neither a head nor the end at byte {tar.offset} of {name}")


def _write(
    builder: tfds.core.GeneratorBasedBuilder, split: Split, folder: Path
) -> tfds.core.SplitInfo:
    template = builder._get_filename_template(split.name).replace(data_dir=folder)
    ends = split.boundaries
    lengths = np.diff([0, *ends]).tolist()
    paths = [
        Path(template.sharded_filepath(shard_index=i, num_shards=len(ends)))
        for i in range(len(ends))
    ]
    parts = zip(paths, np.split(split.images, ends[:-1]), strict=True)
    missing = [(path, images) for path, images in parts if not path.exists()]
    if len(missing) < len(paths):
        print(
            f"{split.name}: {len(paths) - len(missing)} of {len(paths)} files are there already",
            flush=True,
        )
    fd = os.open(split.tar, os.O_RDONLY)
    try:
        with work.Tally(
            f"writing {split.name}", sum(len(images) for _, images in missing)
        ) as tally:
            for _ in work.in_threads(
                lambda part: _write_file(builder, split, fd, *part, tally), missing, THREADS
            ):
                pass
    finally:
        os.close(fd)
    # As TFDS counts: without the records' heads and checksums.
    size = sum(path.stat().st_size for path in paths) - (records.HEAD + records.TAIL) * ends[-1]
    final = template.replace(data_dir=builder.data_path)
    return tfds.core.SplitInfo(
        name=split.name, shard_lengths=lengths, num_bytes=size, filename_template=final
    )


def _write_file(
    builder: tfds.core.GeneratorBasedBuilder,
    split: Split,
    fd: int,
    path: Path,
    images: np.ndarray,
    tally: work.Tally,
) -> None:
    features = builder.info.features
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    with work.whole_file(path) as file:
        examples = split.examples(_archive(fd, images, split.tar))
        for image, (key, example) in zip(images, examples, strict=True):
            if key != image["name"].decode():
                raise RunError(
                    f"TFDS's builder calls {image['name'].decode()} of {split.tar} {key}"
                )
            made = serializer.get_tf_example(features.encode_example(example))
            # TFDS leaves the order of the features to the process: each of its preparations has other bytes.
            file.write(records.record(made.SerializeToString(deterministic=True)))
            tally.add()


def _archive(fd: int, images: np.ndarray, tar: Path) -> Iterator[tuple[str, io.BytesIO]]:
    """Of each image what TFDS reads from an archive: (name, file); an image in an inner tar is a tar of one image."""
    for archive, name, start, size in images.tolist():
        block = os.pread(fd, size, start)
        if len(block) < size:
            raise RunError(f"{tar} ends within {name.decode()}: it has changed, download it again")
        if archive:
            yield archive.decode(), io.BytesIO(block + bytes(-size % tarfile.BLOCKSIZE) + END)
        else:
            yield name.decode(), io.BytesIO(block)
