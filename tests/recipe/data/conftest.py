"""Data sets for the tests: fashion_photos, and ImageNet's real builder on a handful of images."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from recipe.config import Data
from recipe.data.prepare import builders

SYNSETS = ("n01440764", "n01443537")  # classes 0 and 1
SHAPES = ((375, 500), (500, 333), (224, 224), (100, 640), (31, 17))  # (height, width)


def photo(height: int, width: int, seed: int) -> bytes:
    """A JPEG with gradients, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    gradients = np.stack(
        [255 * x / width, 255 * y / height, 255 * (x + y) / (height + width)], axis=-1
    )
    patches = np.kron(rng.normal(0, 40, (height // 8 + 1, width // 8 + 1, 3)), np.ones((8, 8, 1)))
    pixels = gradients + patches[:height, :width] + rng.normal(0, 10, (height, width, 3))
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Data:
    data = Data(name="fashion_photos", data_dir=str(tmp_path_factory.mktemp("data")), image_size=28)
    builders.prepare(data)
    return data


@pytest.fixture(scope="session")
def photos() -> dict[str, bytes]:
    """The training images of the small ImageNet, by file name."""
    return {
        f"{synset}_{i}.JPEG": photo(*shape, seed=100 * c + i)
        for c, synset in enumerate(SYNSETS)
        for i, shape in enumerate(SHAPES)
    }


@pytest.fixture(scope="session")
def small_imagenet(
    tmp_path_factory: pytest.TempPathFactory, photos: dict[str, bytes]
) -> tfds.core.DatasetBuilder:
    """ImageNet's own builder, run on two tars with ten training and four validation images."""
    folder = tmp_path_factory.mktemp("imagenet")
    inner = {
        f"{synset}.tar": tar_of(
            {name: jpeg for name, jpeg in photos.items() if name.startswith(synset)}
        )
        for synset in SYNSETS
    }
    Path(folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    validation = {
        f"ILSVRC2012_val_{i:08d}.JPEG": photo(375, 500, seed=1000 + i) for i in range(1, 5)
    }
    Path(folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(validation))
    builder = tfds.builder("imagenet2012", data_dir=folder / "data")
    builders.run_builder(builder, folder)
    return builder
