"""Prepares a data set: `python -m recipe.data.prepare fashion_photos`, or `imagenet2012` from the original tars."""

import time

from absl import flags

from recipe import cli, noise
from recipe.config import Data
from recipe.errors import UsageError

VALUES = flags.FlagValues()
flags.DEFINE_string("data_dir", "", "folder of the prepared data; $TFDS_DATA_DIR when empty", flag_values=VALUES)
flags.DEFINE_string(
    "manual_dir", "", "folder of the ImageNet tars; DATA_DIR/downloads/manual when empty", flag_values=VALUES
)


def main(argv: list[str]) -> None:
    try:
        names = VALUES(["", *argv])[1:]
    except flags.Error as error:
        raise UsageError(str(error)) from None
    if len(names) != 1:
        raise UsageError("give one data set: python -m recipe.data.prepare fashion_photos")
    prepare_now(Data(name=names[0], data_dir=VALUES.data_dir, manual_dir=VALUES.manual_dir))


def prepare_now(data: Data) -> None:
    """Prepares a data set unless it is, checks it and says what there is. Raises UsageError or RunError."""
    with noise.filtered():
        from recipe.data import builders, sources
    builder, began = builders.find_builder(data), time.monotonic()
    if builders.is_prepared(builder):
        print(f"{data.name} is prepared already")
    else:
        if data.name == builders.IMAGENET:
            builders.check_tars(builders.manual_dir(data))
        print(f"preparing {data.name} in {builder.data_dir} ...", flush=True)
        builders.run_builder(builder, builders.manual_dir(data))
    sources.prepare(data)
    splits = builders.find_builder(data).info.splits.values()
    counts = " and ".join(f"{split.num_examples:,} in {split.name}" for split in splits)
    megabytes = sum(split.num_bytes for split in splits) / 1e6
    print(f"{counts}: {megabytes:,.1f} MB in {builder.data_dir} ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    cli.run(main, VALUES)
