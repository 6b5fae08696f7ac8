"""Prepares data sets by TFDS's builders: downloads, converts and writes them."""

import contextlib
import io
import logging
import os
import shutil
import sys
from pathlib import Path

import tensorflow_datasets as tfds

from recipe.config import Data
from recipe.data import datasets, sources
from recipe.data.fashion_photos import FashionPhotos
from recipe.data.prepare import tars
from recipe.errors import RunError, UsageError
from recipe.system import ticking
from recipe.system.progress import telling

SHARDS = 16  # files of each split of fashion_photos; TFDS chooses by size for the others


def prepare(data: Data) -> None:
    """Make a run's data ready, on one rank before the others open it. Do nothing when it is.

    Small data sets are written or downloaded here. ImageNet is not: hours don't belong into a run
    on many GPUs, and `python -m recipe.data.prepare imagenet2012` shows its progress. Raise
    UsageError or RunError.
    """
    if data.name not in (datasets.SYNTHETIC, datasets.FOLDER, datasets.IMAGENET):
        builder = datasets.find_builder(data)
        if not datasets.is_prepared(builder):
            run_builder(builder, datasets.manual_dir(data))
    # This keeps the index beside the data, so that not every rank has to scan.
    for split in ("train", "eval"):
        sources.open_source(data, split)


def run_builder(builder: tfds.core.DatasetBuilder, manual_dir: Path) -> None:
    """Download a data set (where TFDS does) and write it. TFDS renames the finished folder.

    Raise RunError with TFDS's reason.
    """
    try:
        if builder.name == datasets.IMAGENET:
            tars.prepare(builder, manual_dir)
            return
        _download_and_prepare(builder, manual_dir)
    except (UsageError, RunError):
        raise
    except Exception as error:
        if datasets.is_prepared(builder):
            return  # another process was faster
        reason = next(iter(str(error).strip().splitlines()), "")
        raise RunError(
            f"{builder.name} can't be prepared in {builder.data_dir}: "
            f"{type(error).__name__}: {reason}"
        )
    _remove_leftovers(Path(builder.data_dir))


def _download_and_prepare(builder: tfds.core.DatasetBuilder, manual_dir: Path) -> None:
    """Let TFDS do it. Its bars are on stderr, and its messages go nowhere."""
    # On a terminal that says it has no columns the bars would be empty.
    bars = ticking.is_terminal() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    if not bars:
        tfds.disable_progress_bar()
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # ten retries, a line each
    shards = SHARDS if isinstance(builder, FashionPhotos) else None
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, num_shards=shards)
    progress = contextlib.nullcontext() if bars else telling(f"preparing {builder.name}")
    with contextlib.redirect_stdout(io.StringIO()), progress:
        builder.download_and_prepare(download_config=config)


def _remove_leftovers(finished: Path) -> None:
    """Remove what killed preparations of this data set have left."""
    for leftover in finished.parent.glob(f"incomplete.*_{finished.name}"):
        shutil.rmtree(leftover, ignore_errors=True)
