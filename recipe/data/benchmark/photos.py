"""The benchmark's images: of the size, weight and spectrum of ImageNet's photographs."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from recipe.data.benchmark import settings
from recipe.data.prepare import builders

COUNT = 256
SHAPES = ((375, 500), (500, 375), (333, 500), (375, 500))  # (height, width), the frequent ones
CONTRAST = np.array([44, 14, 14])  # standard deviations of light, blue and red


def photo(height: int, width: int, seed: int) -> bytes:
    """Return a JPEG of coloured noise with the amplitudes of natural scenes, 1/f.

    It has about 115 KB, and ImageNet's mean is 110.
    """
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    real, imaginary = draw.normal(size=(2, 3, *frequency.shape))
    noise = np.fft.irfft2((real + 1j * imaginary) / frequency, s=(height, width))
    deviations = noise.std(axis=(1, 2), keepdims=True)
    channels = noise / deviations * CONTRAST[:, None, None] + 115
    pixels = np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels, "YCbCr").save(out, "JPEG", quality=settings.QUALITY)
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
    """Return TFDS's builder of the photos in `folder`."""
    return BenchmarkPhotos(data_dir=folder)


def make(folder: Path) -> list[int]:
    """Write the photos as TFRecords and as files 000.jpg, …; return their sizes in bytes."""
    builders.run_builder(builder(folder), folder)
    images = [photo(*SHAPES[i % len(SHAPES)], i) for i in range(COUNT)]
    for i, image in enumerate(images):
        (folder / f"{i:03d}.jpg").write_bytes(image)
    os.sync()
    return [len(image) for image in images]
