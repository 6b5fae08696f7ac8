"""Prepares a data set and verifies it: `python -m recipe.data.prepare fashion_photos`.

Or `imagenet2012` from the original tars, or `folder` for a tree of images. Killed, it goes on where
it was when it is started again.

With --verify it only verifies: every checksum, every image decoded, all counts. It prints a digest
that is the same for the same data anywhere. With --shorter_side a prepared data set is written
again, with smaller images, under another name.
"""

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
    """Run the command. Raise UsageError or RunError."""
    name = parse(argv)
    data = Data(name=name, data_dir=VALUES.data_dir, manual_dir=VALUES.manual_dir)
    if data.name == "synthetic":
        raise UsageError("synthetic data needs no preparation")
    if data.name == "folder":
        prepare_folder(data)
    elif VALUES.verify:
        verify_prepared(data)
    elif VALUES.shorter_side:
        write_smaller_copy(data)
    else:
        prepare(data)


def parse(argv: list[str]) -> str:
    """Set VALUES, and return the name of the data set. Raise UsageError."""
    # The one word that is no flag is the data set.
    try:
        names = VALUES(["", *argv])[1:]
    except flags.Error as error:
        raise UsageError(str(error)) from None
    if len(names) != 1:
        raise UsageError("give one data set: python -m recipe.data.prepare fashion_photos")

    # Flags that would have no effect are refused.
    if VALUES.shorter_side and (names[0] == "folder" or VALUES.verify):
        raise UsageError(
            "--shorter_side writes a copy of a prepared data set: not of a folder, and without "
            "--verify"
        )
    if VALUES["quality"].present and not VALUES.shorter_side:
        raise UsageError("--quality is a copy's: give --shorter_side with it, or leave it out")
    return names[0]


def prepare(data: Data) -> None:
    """Prepare a data set unless it is, verify it and say what there is."""
    with noise.filtered():
        # TFDS may import it later, with its chatter.
        import tensorflow  # noqa: F401

        from recipe.data import datasets
        from recipe.data.prepare import builders

    # Prepare it unless it is there; the tars are checked before hours of work.
    builder = datasets.find_builder(data)
    if datasets.is_prepared(builder):
        print(f"{data.name} is prepared already")
    else:
        if data.name == datasets.IMAGENET:
            datasets.check_tars(datasets.manual_dir(data))
        print(f"preparing {data.name} in {builder.data_dir} ...", flush=True)
        builders.run_builder(builder, datasets.manual_dir(data))
    describe(data)


def describe(data: Data) -> None:
    """Say what there is of a prepared data set, and verify it unless it was."""
    with noise.filtered():
        from recipe.data import datasets
        from recipe.data.prepare import builders, verify
    builders.prepare(data)
    builder = datasets.find_builder(data)
    splits = builder.info.splits.values()
    counts = " and ".join(f"{split.num_examples:,} in {split.name}" for split in splits)
    megabytes = sum(split.num_bytes for split in splits) / 1e6
    print(f"{counts}: {megabytes:,.1f} MB in {builder.data_dir}", flush=True)
    if not verify.verified(Path(builder.data_dir)):
        verify_prepared(data)


def verify_prepared(data: Data) -> None:
    """Verify a prepared data set.

    Raise UsageError when it isn't prepared, RunError when it is damaged.
    """
    with noise.filtered():
        from recipe.data import datasets
        from recipe.data.prepare import verify
    builder = datasets.prepared_builder(data)
    datasets.class_count(builder)
    verify.verify(data.name, Path(builder.data_dir), verify.tfds_parts(builder))


def write_smaller_copy(data: Data) -> None:
    """Write a copy with smaller images, and verify it."""
    with noise.filtered():
        from recipe.data import datasets
        from recipe.data.prepare import reencode
    form = reencode.Form(VALUES.shorter_side, VALUES.quality)
    name = form.copy_name(data.name)
    builder = datasets.prepared_builder(data)
    datasets.class_count(builder)
    reencode.prepare(builder, name, form)
    describe(dataclasses.replace(data, name=name))
    place = shlex.quote(f"--config.data.data_dir={datasets.data_dir(data)}")
    print(f"train on it with {shlex.quote(f'--config.data.name={name}')} {place}")


def prepare_folder(data: Data) -> None:
    """Index a tree of images, and with --verify look at every image."""
    with noise.filtered():
        from recipe.data import folders
        from recipe.data.folders import FolderSource
        from recipe.data.prepare import builders, verify
    builders.prepare(data)
    sources = [FolderSource(data, split) for split in (data.train_split, data.eval_split)]
    for source in sources:
        images = f"{len(source):,} images in {source.num_classes:,} classes"
        print(f"{images} in {source.folder}", flush=True)
    if VALUES.verify:
        parts = [part for source in sources for part in verify.folder_parts(source)]
        verify.verify(data.name, folders.root(data), parts)


if __name__ == "__main__":
    cli.run(main, VALUES)
