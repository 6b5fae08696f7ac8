"""The TFDS data set fashion_photos: 10,000 small, grey photographs of clothes.

They are for a first run within minutes.
"""

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from recipe.errors import RunError
from recipe.system import noise

IMAGES = "t10k-images-idx3-ubyte.gz"
IMAGES_MD5 = "f78720b4224f21cce2f2ccf2d7a94c9a"
LABELS = "t10k-labels-idx1-ubyte.gz"
LABELS_MD5 = "0d30e22e447f3c33dab9ed536400ac01"
CLASSES = (
    "top",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
TRAIN_PER_CLASS = 800  # of the 1000; the other 200 are for validation
DESCRIPTION = (
    "The test part of Fashion-MNIST as RGB JPEG images: 10,000 photographs of clothes in 10 "
    "classes, 8,000\nfor training and 2,000 for validation, each class equally often. The images "
    "are small (28×28 pixels) and grey (their\nthree channels are equal): enough to see a recipe "
    "learn within minutes, not to compare networks with."
)
CITATION = (
    "@article{xiao2017fashion, title={Fashion-MNIST: a Novel Image Dataset for Benchmarking "
    "Machine Learning\nAlgorithms}, author={Xiao, Han and Rasul, Kashif and Vollgraf, Roland}, "
    "journal={arXiv:1708.07747}, year={2017}}"
)


class FashionPhotos(tfds.core.GeneratorBasedBuilder):
    """The builder. It writes the embedded images as JPEG records, and TFDS does the rest."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            citation=CITATION,
            license="MIT",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        images, labels = read_images(), read_labels()
        train = in_first(labels, TRAIN_PER_CLASS)
        return {
            "train": self._generate_examples(images, labels, np.flatnonzero(train)),
            "validation": self._generate_examples(images, labels, np.flatnonzero(~train)),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, chosen: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        # Imported here, as those who only read the data need none of it.
        with noise.filtered():
            import tensorflow as tf

        for i in chosen:
            rgb = np.repeat(images[i][:, :, None], 3, axis=2)
            # Quality 100 without chroma subsampling: at 28×28 a file is small anyway.
            jpeg = tf.io.encode_jpeg(rgb, quality=100, chroma_downsampling=False).numpy()
            yield int(i), {"image": jpeg, "label": int(labels[i]), "file_name": f"t10k_{i:05d}.jpg"}


def read_images() -> np.ndarray:
    """Return the embedded photographs, uint8[10000, 28, 28].

    Raise RunError when the file is not the published one.
    """
    return np.frombuffer(_content(IMAGES, IMAGES_MD5), np.uint8, offset=16).reshape(-1, 28, 28)


def read_labels() -> np.ndarray:
    """Return the class of each photograph, uint8[10000].

    Raise RunError when the file is not the published one.
    """
    return np.frombuffer(_content(LABELS, LABELS_MD5), np.uint8, offset=8)


def in_first(labels: np.ndarray, count: int) -> np.ndarray:
    """Return which examples are among the first `count` of their class, bool[b]."""
    first = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        first[np.flatnonzero(labels == label)[:count]] = True
    return first


def _content(name: str, md5: str) -> bytes:
    """Unpack an embedded file. Raise RunError when it is not the published one."""
    path = Path(__file__).parent / name
    packed = path.read_bytes()
    if hashlib.md5(packed, usedforsecurity=False).hexdigest() != md5:
        raise RunError(f"{path} is damaged (its md5 is not {md5}): install this package again")
    return gzip.decompress(packed)
