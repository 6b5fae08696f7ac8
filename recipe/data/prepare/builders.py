"""The data sets behind the names: finds, checks and prepares them with TensorFlow Datasets."""

import contextlib
import io
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path

import tensorflow_datasets as tfds

from recipe.config import Data, nearest
from recipe.data import work
from recipe.data.prepare import tars
from recipe.data.prepare.fashion_photos import FashionPhotos  # which registers its name with TFDS
from recipe.errors import RunError, UsageError
from recipe.system import ticking

SYNTHETIC = "synthetic"
FOLDER = "folder"
IMAGENET = "imagenet2012"
IMAGENET_TARS = {
    "ILSVRC2012_img_train.tar": 147_897_477_120,
    "ILSVRC2012_img_val.tar": 6_744_924_160,
}  # bytes
IMAGENET_EXAMPLES = {"train": 1_281_167, "validation": 50_000}
SHARDS = 16  # files of each split of a small data set; TFDS chooses by size for the others


def data_dir(data: Data) -> Path:
    """The folder of the prepared data sets."""
    return Path(
        data.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    ).expanduser()


def manual_dir(data: Data) -> Path:
    """The folder of the original ImageNet tars."""
    return (
        Path(data.manual_dir).expanduser()
        if data.manual_dir
        else data_dir(data) / "downloads" / "manual"
    )


def find_builder(data: Data) -> tfds.core.DatasetBuilder:
    """TFDS's builder of a name, prepared or not. Raises UsageError on an unknown name, configuration or version."""
    try:
        return tfds.builder(data.name, data_dir=data_dir(data))
    except tfds.core.DatasetNotFoundError:
        known = [SYNTHETIC, FOLDER, *tfds.list_builders(with_community_datasets=False)]
        raise UsageError(
            f"config.data.name={data.name!r} is neither a data set of TFDS nor one prepared in {data_dir(data)}; "
            f"did you mean {nearest(data.name, known)!r}?"
        ) from None
    except (ValueError, AssertionError, TypeError) as error:
        reason = (
            str(error).strip().partition("\n")[0].rpartition('}": ')[2]
        )  # without TFDS's own arguments
        reason = reason.partition(" Here are ")[0].rstrip(".")
        raise UsageError(
            f"config.data.name={data.name!r} is not a data set of TFDS: {reason}"
        ) from None


def prepared_builder(data: Data) -> tfds.core.DatasetBuilder:
    """The builder of a prepared and counted data set. Raises UsageError with what to do when it isn't."""
    builder = find_builder(data)
    if not is_prepared(builder):
        raise UsageError(_not_prepared(data))
    if is_imagenet(data.name):
        check_counts(builder, IMAGENET_EXAMPLES)
    return builder


def is_imagenet(name: str) -> bool:
    """Whether a data set is ImageNet, or its re-encoded copy."""
    return name == IMAGENET or name.startswith(f"{IMAGENET}_short")


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """As builder.is_prepared(), without its warning: TFDS renames a folder into place when it is complete."""
    return (Path(builder.data_dir) / "dataset_info.json").exists()


def run_builder(builder: tfds.core.DatasetBuilder, manual_dir: Path) -> None:
    """Downloads (where TFDS does) and writes a data set; TFDS renames the finished folder into place.

    Raises RunError with TFDS's reason."""
    bars = (
        ticking.is_terminal() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    )  # else they'd be empty
    if not bars:
        tfds.disable_progress_bar()
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # ten retries, a line each
    shards = SHARDS if isinstance(builder, FashionPhotos) else None
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, num_shards=shards)
    try:
        if builder.name == IMAGENET:
            tars.prepare(builder, manual_dir)
            return
        # TFDS's own bars are on stderr; its messages go nowhere.
        told = contextlib.nullcontext() if bars else work.telling(f"preparing {builder.name}")
        with contextlib.redirect_stdout(io.StringIO()), told:
            builder.download_and_prepare(download_config=config)
    except (UsageError, RunError):
        raise
    except Exception as error:
        if is_prepared(builder):
            return  # another process was faster
        reason = next(iter(str(error).strip().splitlines()), "")
        raise RunError(
            f"{builder.name} can't be prepared in {builder.data_dir}: {type(error).__name__}: {reason}"
        )
    finished = Path(builder.data_dir)
    for leftover in finished.parent.glob(f"incomplete.*_{finished.name}"):  # of killed preparations
        shutil.rmtree(leftover, ignore_errors=True)


def check_tars(folder: Path) -> None:
    """Raises UsageError unless the two ImageNet tars are in `folder`, whole."""
    problems = [
        p for name, size in IMAGENET_TARS.items() if (p := _tar_problem(folder / name, size))
    ]
    if problems:
        raise UsageError(
            f"{' and '.join(problems)}: download from https://image-net.org/download-images (after registration) into "
            f"{folder}, then run: python -m recipe.data.prepare {IMAGENET} {shlex.quote(f'--manual_dir={folder}')}"
        )


def check_counts(builder: tfds.core.DatasetBuilder, expected: dict[str, int]) -> None:
    """Raises RunError when a prepared data set has other splits or sizes than `expected`."""
    found = {name: split.num_examples for name, split in builder.info.splits.items()}
    for split, count in expected.items():
        if found.get(split) != count:
            raise RunError(
                f"{builder.data_dir} has {found.get(split, 0):,} examples in split {split!r}, and {builder.name} has "
                f"{count:,}: delete that folder and prepare the data set again from complete files"
            )


def _not_prepared(data: Data) -> str:
    place = shlex.quote(f"--data_dir={data_dir(data)}")
    command = f"python -m recipe.data.prepare {shlex.quote(data.name)} {place}"
    if data.name == IMAGENET:
        try:
            check_tars(manual_dir(data))
        except UsageError as error:
            return f"{data.name} is not prepared in {data_dir(data)}: {error} {place}"
        command += f" {shlex.quote(f'--manual_dir={manual_dir(data)}')}"
    return f"config.data.name={data.name!r} is not prepared in {data_dir(data)}; run: {command}"


def _tar_problem(path: Path, size: int) -> str:
    if not path.exists():
        return f"{path} is missing ({size:,} bytes)"
    if (found := path.stat().st_size) != size:
        return f"{path} has {found:,} bytes instead of {size:,}"
    return ""
