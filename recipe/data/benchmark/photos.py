"""The benchmark's images: made here, of the size, weight and spectrum of ImageNet's photographs."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from recipe.data.benchmark.contender import QUALITY
from recipe.data.prepare import builders

COUNT = 256
SHAPES = ((375, 500), (500, 375), (333, 500), (375, 500))  # (height, width), the frequent ones


def photo(height: int, width: int, seed: int) -> bytes:
    """A JPEG of coloured noise with the amplitudes of natural scenes, 1/f; of about 115 KB, ImageNet's mean is 110."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    parts = draw.normal(size=(2, 3, *frequency.shape))
    noise = np.fft.irfft2((parts[0] + 1j * parts[1]) / frequency, s=(height, width))
    light, blue, red = (
        noise / noise.std(axis=(1, 2), keepdims=True) * np.array([44, 14, 14])[:, None, None] + 115
    )
    pixels = np.clip(np.stack([light, blue, red], axis=-1), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels, "YCbCr").save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


class BenchmarkPhotos(tfds.core.GeneratorBasedBuilder):
    """COUNT photos as TFRecords."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples(), "validation": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for i in range(COUNT):
            yield i, {"image": photo(*SHAPES[i % len(SHAPES)], i), "label": i % 10}


def builder(folder: Path) -> tfds.core.DatasetBuilder:
    return BenchmarkPhotos(data_dir=folder)


def make(folder: Path) -> list[int]:
    """Writes the photos as TFRecords and as files 000.jpg, …; gives their sizes in bytes."""
    builders.run_builder(builder(folder), folder)
    images = [photo(*SHAPES[i % len(SHAPES)], i) for i in range(COUNT)]
    for i, image in enumerate(images):
        (folder / f"{i:03d}.jpg").write_bytes(image)
    os.sync()
    return [len(image) for image in images]
