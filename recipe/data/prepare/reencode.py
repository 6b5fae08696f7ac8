"""A copy of a prepared data set with smaller images, under a name of its own: faster to read and to decode, and not the
same pixels."""

import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from recipe.data import files, records, work
from recipe.data.prepare import tars, verify
from recipe.errors import RunError

SAMPLE = 200  # images from which the copy's size is estimated
MARGIN = 1.2  # of that estimate


def copy_name(name: str, shorter_side: int, quality: int) -> str:
    """The copy's name, under which the recipe finds it."""
    return f"{name.replace('/', '_')}_short{shorter_side}_q{quality}"


def smaller(encoded: bytes, shorter_side: int, quality: int) -> bytes:
    """An image as an RGB JPEG of that shorter side; bicubic, with a low-pass filter. An image that isn't larger keeps
    its bytes. Raises ValueError when it can't be decoded."""
    verify.kind_of(encoded)  # for Pillow makes missing pixels grey
    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
            if min(image.size) <= shorter_side:
                return encoded
            scale = shorter_side / min(image.size)
            size = tuple(max(shorter_side, round(scale * side)) for side in image.size)
            out = io.BytesIO()
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(
                out, "JPEG", quality=quality
            )
            return out.getvalue()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None


def prepare(builder: tfds.core.DatasetBuilder, name: str, shorter_side: int, quality: int) -> None:
    """Writes the copy file by file, in the original's order, so that a killed preparation goes on.

    Raises UsageError when the disk is too small, RunError on a bad image."""
    source = Path(builder.data_dir)
    finished = Path(builder.data_dir_root) / name / source.name
    if finished.exists():
        return
    unfinished = finished.parent / f"unfinished.{source.name}"
    unfinished.mkdir(parents=True, exist_ok=True)
    with tars.alone(unfinished):
        if finished.exists():  # another process was faster
            shutil.rmtree(unfinished, ignore_errors=True)
            return
        _write_files(builder, name, unfinished, shorter_side, quality)
        how = f"shorter side at most {shorter_side}, JPEG quality {quality}"
        _describe(source, unfinished, builder.name, name, how)
        unfinished.replace(finished)
        (finished / tars.LOCK).unlink()


def _write_files(
    builder: tfds.core.DatasetBuilder, name: str, folder: Path, shorter_side: int, quality: int
) -> None:
    """Those that aren't there yet, by all cores."""
    splits = builder.info.splits.values()
    counts = {
        Path(path): n
        for split in splits
        for path, n in zip(split.filepaths, split.shard_lengths, strict=True)
    }
    targets = {path: folder / path.name.replace(builder.name, name, 1) for path in counts}
    missing = [path for path, target in targets.items() if not _made_of(path, target)]
    if not missing:
        return
    share = _estimate(missing, shorter_side, quality)
    tars.room(folder, int(share * sum(path.stat().st_size for path in missing)))
    with work.Tally(f"writing {name}", sum(counts[path] for path in missing)) as tally:

        def write(path: Path) -> None:
            _write(path, targets[path], shorter_side, quality, tally)

        for _ in work.in_threads(write, missing, work.cores()):
            pass


def _made_of(path: Path, target: Path) -> bool:
    """By its time, which is that of the file it was made of: another source may have come since."""
    return target.exists() and target.stat().st_mtime_ns == path.stat().st_mtime_ns


def _write(path: Path, target: Path, shorter_side: int, quality: int, tally: work.Tally) -> None:
    try:
        with work.whole_file(target) as out:
            for _, example in _smaller_examples(path, None, shorter_side, quality):
                out.write(records.record(example))
                tally.add()
        time = path.stat().st_mtime_ns
        os.utime(target, ns=(time, time))
    except OSError as error:
        raise RunError(f"{target} can't be written: {error.strerror}") from None


def _smaller_examples(
    path: Path, count: int | None, shorter_side: int, quality: int
) -> Iterator[tuple[int, bytes]]:
    """(bytes before, the smaller example) of the first `count` records of a file, or of all."""
    ends, start = records.scan(str(path)).tolist(), 0
    try:
        with path.open("rb") as file:
            for start, end in itertools.islice(itertools.pairwise(ends), count):
                block, _ = files.read_at(str(path), file.fileno(), start, end - start)
                content = records.content(block)
                yield len(content), _smaller_example(content, shorter_side, quality)
    except OSError as error:
        raise RunError(records.unreadable(str(path), error)) from None
    except (ValueError, IndexError, DecodeError) as error:
        raise RunError(f"byte {start} of {path} can't be re-encoded: {error}") from None


def _smaller_example(content: bytes, shorter_side: int, quality: int) -> bytes:
    example = tf_example_pb2.Example.FromString(content)
    image = example.features.feature["image"].bytes_list
    image.value[0] = smaller(image.value[0], shorter_side, quality)
    return example.SerializeToString(deterministic=True)


def _estimate(paths: list[Path], shorter_side: int, quality: int) -> float:
    """The copy's bytes for one of the original, at most, from images of a few files."""
    before = after = 0
    for path in paths[:: max(1, len(paths) // 8)]:
        for size, example in _smaller_examples(path, SAMPLE // 8, shorter_side, quality):
            before += size
            after += len(example)
    return MARGIN * after / max(before, 1)


def _describe(source: Path, target: Path, old: str, new: str, how: str) -> None:
    """What TFDS keeps beside the files, with the copy's name, sizes and history."""
    for path in source.iterdir():
        if path.suffix in (".json", ".txt"):
            shutil.copyfile(path, target / path.name)
    info = json.loads((source / "dataset_info.json").read_text())
    info["name"] = new
    info["description"] = f"{old}, its images re-encoded: {how}. {info.get('description', '')}"
    for split in info["splits"]:
        paths = list(target.glob(f"{new}-{split['name']}.tfrecord-*"))
        examples = int(np.sum([int(length) for length in split["shardLengths"]]))
        size = sum(path.stat().st_size for path in paths) - (records.HEAD + records.TAIL) * examples
        split["numBytes"] = str(size)
    (target / "dataset_info.json").write_text(json.dumps(info, indent=2))
