"""Prepares a data set and verifies it: `python -m recipe.data.prepare fashion_photos`, or `imagenet2012` from the
original tars, or `folder` for a tree of images. Killed, it goes on where it was when it is started again.

With --verify it only verifies: every checksum, every image decoded, all counts; and prints a digest that is the same
for the same data anywhere. With --shorter_side a prepared data set is written again, with smaller images, under
another name."""

import dataclasses
import shlex
from pathlib import Path

from absl import flags

from recipe import cli
from recipe.config import Data
from recipe.errors import UsageError
from recipe.system import noise

VALUES = flags.FlagValues()
flags.DEFINE_string(
    "data_dir", "", "folder of the prepared data; $TFDS_DATA_DIR when empty", flag_values=VALUES
)
flags.DEFINE_string(
    "manual_dir",
    "",
    "folder of the ImageNet tars; DATA_DIR/downloads/manual when empty",
    flag_values=VALUES,
)
flags.DEFINE_bool("verify", False, "only verify what is there", flag_values=VALUES)
flags.DEFINE_integer(
    "shorter_side",
    None,
    "write a copy whose images' shorter sides have at most so many pixels",
    16,
    flag_values=VALUES,
)
flags.DEFINE_integer("quality", 90, "JPEG quality of the copy's images", 1, 100, flag_values=VALUES)


def main(argv: list[str]) -> None:
    try:
        names = VALUES(["", *argv])[1:]
    except flags.Error as error:
        raise UsageError(str(error)) from None
    if len(names) != 1:
        raise UsageError("give one data set: python -m recipe.data.prepare fashion_photos")
    if VALUES.shorter_side and (names[0] == "folder" or VALUES.verify):
        raise UsageError(
            "--shorter_side writes a copy of a prepared data set: not of a folder, and without --verify"
        )
    if VALUES["quality"].present and not VALUES.shorter_side:
        raise UsageError("--quality is a copy's: give --shorter_side with it, or leave it out")
    data = Data(name=names[0], data_dir=VALUES.data_dir, manual_dir=VALUES.manual_dir)
    if data.name == "synthetic":
        raise UsageError("synthetic data needs no preparation")
    if data.name == "folder":
        prepare_folder(data)
    elif VALUES.verify:
        verify_now(data)
    elif VALUES.shorter_side:
        reencode_now(data)
    else:
        prepare_now(data)


def prepare_now(data: Data) -> None:
    """Prepares a data set unless it is, verifies it and says what there is. Raises UsageError or RunError."""
    with noise.filtered():
        import tensorflow  # noqa: F401  # its chatter, when TFDS comes to need it

        from recipe.data.prepare import builders
    builder = builders.find_builder(data)
    if builders.is_prepared(builder):
        print(f"{data.name} is prepared already")
    else:
        if data.name == builders.IMAGENET:
            builders.check_tars(builders.manual_dir(data))
        print(f"preparing {data.name} in {builder.data_dir} ...", flush=True)
        builders.run_builder(builder, builders.manual_dir(data))
    look(data)


def look(data: Data) -> None:
    """Says what there is of a prepared data set, and verifies it unless it was. Raises UsageError or RunError."""
    with noise.filtered():
        from recipe.data import sources
        from recipe.data.prepare import builders, verify
    sources.prepare(data)
    builder = builders.find_builder(data)
    splits = builder.info.splits.values()
    counts = " and ".join(f"{split.num_examples:,} in {split.name}" for split in splits)
    print(
        f"{counts}: {sum(split.num_bytes for split in splits) / 1e6:,.1f} MB in {builder.data_dir}",
        flush=True,
    )
    if not verify.verified(Path(builder.data_dir)):
        verify_now(data)


def verify_now(data: Data) -> None:
    """Verifies a prepared data set. Raises UsageError when it isn't prepared, RunError when it is damaged."""
    with noise.filtered():
        from recipe.data import sources
        from recipe.data.prepare import builders, verify
    builder = builders.prepared_builder(data)
    sources.class_count(builder)
    verify.verify(data.name, Path(builder.data_dir), verify.tfds_parts(builder))


def reencode_now(data: Data) -> None:
    """Writes a copy with smaller images, and verifies it. Raises UsageError or RunError."""
    with noise.filtered():
        from recipe.data import sources
        from recipe.data.prepare import builders, reencode
    name = reencode.copy_name(data.name, VALUES.shorter_side, VALUES.quality)
    builder = builders.prepared_builder(data)
    sources.class_count(builder)
    reencode.prepare(builder, name, VALUES.shorter_side, VALUES.quality)
    look(dataclasses.replace(data, name=name))
    place = shlex.quote(f"--config.data.data_dir={builders.data_dir(data)}")
    print(f"train on it with {shlex.quote(f'--config.data.name={name}')} {place}")


def prepare_folder(data: Data) -> None:
    """Indexes a tree of images; with --verify, looks at every image. Raises UsageError or RunError."""
    with noise.filtered():
        from recipe.data import folders, sources
        from recipe.data.prepare import verify
    sources.prepare(data)
    opened = {split: sources.open_source(data, split) for split in ("train", "eval")}
    for source in opened.values():
        print(
            f"{len(source):,} images in {source.num_classes:,} classes in {source.folder}",
            flush=True,
        )
    if VALUES.verify:
        parts = [part for source in opened.values() for part in source.parts()]
        verify.verify(data.name, folders.root(data), parts)


if __name__ == "__main__":
    cli.run(main, VALUES)
