"""The data sets behind the names: which there are, where they lie, and whether they are whole."""

import os
import shlex
from pathlib import Path

import tensorflow_datasets as tfds

from recipe.config import Data, nearest
from recipe.data.fashion_photos import FashionPhotos  # noqa: F401  # registers its name with TFDS
from recipe.errors import RunError, UsageError

SYNTHETIC = "synthetic"
FOLDER = "folder"
IMAGENET = "imagenet2012"
IMAGENET_TARS = {  # bytes
    "ILSVRC2012_img_train.tar": 147_897_477_120,
    "ILSVRC2012_img_val.tar": 6_744_924_160,
}
IMAGENET_EXAMPLES = {"train": 1_281_167, "validation": 50_000}


def data_dir(data: Data) -> Path:
    """Return the folder of the prepared data sets."""
    folder = data.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(folder).expanduser()


def manual_dir(data: Data) -> Path:
    """Return the folder of the original ImageNet tars."""
    if data.manual_dir:
        return Path(data.manual_dir).expanduser()
    return data_dir(data) / "downloads" / "manual"


def find_builder(data: Data) -> tfds.core.DatasetBuilder:
    """Return TFDS's builder of a data set, prepared or not.

    Raise UsageError on an unknown name, configuration or version.
    """
    try:
        return tfds.builder(data.name, data_dir=data_dir(data))
    except tfds.core.DatasetNotFoundError:
        known = [SYNTHETIC, FOLDER, *tfds.list_builders(with_community_datasets=False)]
        raise UsageError(
            f"config.data.name={data.name!r} is neither a data set of TFDS nor one prepared in "
            f"{data_dir(data)}; did you mean {nearest(data.name, known)!r}?"
        ) from None
    except (ValueError, AssertionError, TypeError) as error:
        # TFDS's first line has its own arguments before the reason, and advice after it.
        first_line = str(error).strip().partition("\n")[0]
        reason = first_line.rpartition('}": ')[2].partition(" Here are ")[0].rstrip(".")
        raise UsageError(
            f"config.data.name={data.name!r} is not a data set of TFDS: {reason}"
        ) from None


def prepared_builder(data: Data) -> tfds.core.DatasetBuilder:
    """Return the builder of a prepared data set whose examples were counted.

    Raise UsageError with the command to give when it isn't prepared, and RunError when it is
    incomplete.
    """
    builder = find_builder(data)
    if not is_prepared(builder):
        raise UsageError(_not_prepared(data))
    if is_imagenet(data.name):
        check_counts(builder, IMAGENET_EXAMPLES)
    return builder


def is_imagenet(name: str) -> bool:
    """Say whether a data set is ImageNet, or its re-encoded copy."""
    return name == IMAGENET or name.startswith(f"{IMAGENET}_short")


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Say whether TFDS has renamed the complete folder into place.

    Unlike builder.is_prepared(), do it without a warning.
    """
    return (Path(builder.data_dir) / "dataset_info.json").exists()


def class_count(builder: tfds.core.DatasetBuilder) -> int:
    """Return the number of classes. Raise UsageError unless there are an image and a label."""
    # The features are found by name and kind.
    features = builder.info.features
    image, label = tfds.features.Image, tfds.features.ClassLabel
    has_image = "image" in features and isinstance(features["image"], image)
    has_label = "label" in features and isinstance(features["label"], label)
    if not (has_image and has_label):
        raise UsageError(
            f"config.data.name={builder.name!r} has the features {', '.join(features)}: the recipe "
            "needs an image and a label of that name"
        )

    # The network's last layer needs the number of classes.
    if not features["label"].num_classes:
        raise UsageError(
            f"config.data.name={builder.name!r} doesn't say how many classes its label has"
        )
    return features["label"].num_classes


def check_counts(builder: tfds.core.DatasetBuilder, expected: dict[str, int]) -> None:
    """Raise RunError when a prepared data set has other splits or sizes than `expected`."""
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    for split, count in expected.items():
        if counts.get(split) != count:
            raise RunError(
                f"{builder.data_dir} has {counts.get(split, 0):,} examples in split {split!r}, and "
                f"{builder.name} has {count:,}: delete that folder and prepare the data set again "
                "from complete files"
            )


def check_tars(folder: Path) -> None:
    """Raise UsageError unless the two ImageNet tars are in `folder`, whole."""
    problems = [_tar_problem(folder / name, size) for name, size in IMAGENET_TARS.items()]
    problems = [problem for problem in problems if problem]
    if problems:
        option = shlex.quote(f"--manual_dir={folder}")
        raise UsageError(
            f"{' and '.join(problems)}: download from https://image-net.org/download-images (after "
            f"registration) into {folder}, then run: python -m recipe.data.prepare {IMAGENET} "
            f"{option}"
        )


def _tar_problem(path: Path, size: int) -> str:
    """Say what is wrong with a tar of `size` bytes, "" when nothing is."""
    if not path.exists():
        return f"{path} is missing ({size:,} bytes)"
    actual = path.stat().st_size
    if actual != size:
        return f"{path} has {actual:,} bytes instead of {size:,}"
    return ""


def _not_prepared(data: Data) -> str:
    """Say that a data set isn't prepared, and by which command it will be."""
    place = shlex.quote(f"--data_dir={data_dir(data)}")
    command = f"python -m recipe.data.prepare {shlex.quote(data.name)} {place}"
    if data.name == IMAGENET:
        try:
            check_tars(manual_dir(data))
        except UsageError as error:
            return f"{data.name} is not prepared in {data_dir(data)}: {error} {place}"
        option = shlex.quote(f"--manual_dir={manual_dir(data)}")
        command = f"{command} {option}"
    return f"config.data.name={data.name!r} is not prepared in {data_dir(data)}; run: {command}"
