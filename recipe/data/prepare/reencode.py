"""Copies a prepared data set with smaller images, under a name of its own.

The copy is faster to read and to decode, and its pixels are not the same.
"""

import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from recipe.data import records, shared_files
from recipe.data.prepare import tars, verify
from recipe.errors import RunError
from recipe.system import processor
from recipe.system.files import whole_file
from recipe.system.progress import Tally
from recipe.system.threads import in_threads

SAMPLE = 200  # images from which the copy's size is estimated
SAMPLE_FILES = 8  # files, about, from which they are taken
MARGIN = 1.2  # of that estimate


@dataclass(frozen=True)
class Form:
    """The form of a copy's images."""

    shorter_side: int  # pixels, at most
    quality: int  # of the JPEGs

    def copy_name(self, name: str) -> str:
        """Return the name of a data set's copy, under which the recipe finds it."""
        return f"{name.replace('/', '_')}_short{self.shorter_side}_q{self.quality}"

    def __str__(self) -> str:
        return f"shorter side at most {self.shorter_side}, JPEG quality {self.quality}"


class Reencoded(NamedTuple):
    """An example of the copy."""

    content: bytes  # payload of its record
    bytes_before: int  # of the original's payload


def smaller(encoded: bytes, form: Form) -> bytes:
    """Return an image as an RGB JPEG of this form, resized bicubically with a low-pass filter.

    An image that isn't larger keeps its bytes. Raise ValueError when it can't be decoded.
    """
    # Pillow silently fills missing pixels with grey: reject truncated files first.
    verify.kind_of(encoded)
    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
            if min(image.size) <= form.shorter_side:
                return encoded
            scale = form.shorter_side / min(image.size)
            width, height = (max(form.shorter_side, round(scale * side)) for side in image.size)
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            out = io.BytesIO()
            resized.save(out, "JPEG", quality=form.quality)
            return out.getvalue()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None


def prepare(builder: tfds.core.DatasetBuilder, name: str, form: Form) -> None:
    """Write the copy `name` file by file, in the original's order: killed, it goes on.

    Raise UsageError when the disk is too small, RunError on a bad image.
    """
    # The folder gets its name when all is in it.
    source = Path(builder.data_dir)
    finished = Path(builder.data_dir_root) / name / source.name
    if finished.exists():
        return
    unfinished = finished.parent / f"unfinished.{source.name}"
    unfinished.mkdir(parents=True, exist_ok=True)

    # One process writes; another may have finished while this one waited.
    with tars.alone(unfinished):
        if finished.exists():  # another process was faster
            shutil.rmtree(unfinished, ignore_errors=True)
            return
        _write_files(builder, name, unfinished, form)
        _describe(builder, name, unfinished, form)
        unfinished.replace(finished)
        (finished / tars.LOCK).unlink()


def _write_files(builder: tfds.core.DatasetBuilder, name: str, folder: Path, form: Form) -> None:
    """Write the files that aren't there yet, on all cores."""
    # What is missing.
    counts: dict[Path, int] = {}  # examples of each original
    for split in builder.info.splits.values():
        counts.update(zip(map(Path, split.filepaths), split.shard_lengths, strict=True))
    targets = {path: folder / path.name.replace(builder.name, name, 1) for path in counts}
    missing = [path for path, target in targets.items() if not _is_copy(path, target)]
    if not missing:
        return

    # Room for it, by the share of a few images.
    share = _estimate_share(missing, form)
    tars.check_room(folder, int(share * sum(path.stat().st_size for path in missing)))

    # Write it, a file for each core at a time.
    with Tally(f"writing {name}", sum(counts[path] for path in missing)) as tally:

        def write(path: Path) -> None:
            _write_file(path, targets[path], form, tally)

        for _ in in_threads(write, missing, processor.cores()):
            pass


def _is_copy(path: Path, target: Path) -> bool:
    """Say whether a file is the copy of this original, by its time.

    Its time is that of the original: another one may have come since.
    """
    return target.exists() and target.stat().st_mtime_ns == path.stat().st_mtime_ns


def _write_file(path: Path, target: Path, form: Form, tally: Tally) -> None:
    try:
        with whole_file(target) as out:
            for example in _reencoded(path, None, form):
                out.write(records.record(example.content))
                tally.add()
        time = path.stat().st_mtime_ns
        os.utime(target, ns=(time, time))
    except OSError as error:
        raise RunError(f"{target} can't be written: {error.strerror}") from None


def _reencoded(path: Path, count: int | None, form: Form) -> Iterator[Reencoded]:
    """Yield the smaller examples of the first `count` records of a file, or of all."""
    positions = records.scan(str(path)).tolist()
    start = 0
    try:
        with path.open("rb") as file:
            for start, end in itertools.islice(itertools.pairwise(positions), count):
                block = shared_files.read_at(str(path), file.fileno(), start, end - start)
                content = records.content(block.content)
                yield Reencoded(_smaller_example(content, form), len(content))
    except OSError as error:
        raise RunError(records.unreadable(str(path), error)) from None
    except (ValueError, IndexError, DecodeError) as error:
        raise RunError(f"byte {start} of {path} can't be re-encoded: {error}") from None


def _smaller_example(content: bytes, form: Form) -> bytes:
    example = tf_example_pb2.Example.FromString(content)
    image = example.features.feature["image"].bytes_list
    image.value[0] = smaller(image.value[0], form)
    return example.SerializeToString(deterministic=True)


def _estimate_share(paths: list[Path], form: Form) -> float:
    """Return the copy's bytes for one of the original, at most, from images of a few files."""
    before = after = 0
    for path in paths[:: max(1, len(paths) // SAMPLE_FILES)]:
        for example in _reencoded(path, SAMPLE // SAMPLE_FILES, form):
            before += example.bytes_before
            after += len(example.content)
    return MARGIN * after / max(before, 1)


def _describe(builder: tfds.core.DatasetBuilder, name: str, folder: Path, form: Form) -> None:
    """Write what TFDS keeps beside the files, with the copy's name, sizes and history."""
    # The texts are the original's.
    source = Path(builder.data_dir)
    for path in source.iterdir():
        if path.suffix in (".json", ".txt"):
            shutil.copyfile(path, folder / path.name)

    # The description tells what was done.
    info = json.loads((source / "dataset_info.json").read_text())
    info["name"] = name
    history = f"{builder.name}, its images re-encoded: {form}."
    info["description"] = f"{history} {info.get('description', '')}"

    # TFDS counts the bytes without the records' heads and checksums.
    for split in info["splits"]:
        paths = folder.glob(f"{name}-{split['name']}.tfrecord-*")
        file_bytes = sum(path.stat().st_size for path in paths)
        examples = sum(int(length) for length in split["shardLengths"])
        split["numBytes"] = str(file_bytes - (records.HEAD + records.TAIL) * examples)
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
