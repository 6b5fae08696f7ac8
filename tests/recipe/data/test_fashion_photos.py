"""The built-in data set: its images, damage to them, and a preparation that fails."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipe.config import Data
from recipe.data import datasets, fashion_photos, sources
from recipe.data.prepare import builders
from recipe.errors import RunError


def test_splits_have_every_class_equally_often(fashion: Data) -> None:
    for split, count in (("train", 800), ("eval", 200)):
        source = sources.open_source(fashion, split)
        labels = source.read(np.arange(len(source)))[1]
        assert np.bincount(labels).tolist() == [count] * 10


def test_images_are_the_embedded_ones(fashion: Data) -> None:
    """Each original is in one split, once.

    JPEG at quality 100 leaves a mean error below one grey level.
    """
    originals, labels = fashion_photos.read_images(), fashion_photos.read_labels()
    assert originals.shape == (10_000, 28, 28)
    of_class = [np.flatnonzero(labels == label) for label in range(10)]
    found = np.zeros(10_000, dtype=int)
    for split in ("train", "eval"):
        source = sources.open_source(fashion, split)
        for jpeg, label in zip(*source.read(np.arange(0, len(source), 20)), strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(jpeg)), dtype=int)
            assert pixels.shape == (28, 28, 3)
            differences = np.abs(originals[of_class[label]] - pixels[:, :, 1]).mean(axis=(1, 2))
            assert differences.min() < 1
            found[of_class[label][differences.argmin()]] += 1
    assert found.max() == 1


def test_it_says_what_it_is(fashion: Data) -> None:
    info = datasets.find_builder(fashion).info
    assert "small" in info.description
    assert "grey" in info.description
    assert info.splits["train"].num_shards >= 16
    license_text = Path(fashion_photos.__file__).parent / "LICENSE.txt"
    assert license_text.read_text().startswith("The MIT License")


def test_a_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_photos, "LABELS_MD5", "0" * 32)
    with pytest.raises(RunError, match=r"t10k-labels-idx1-ubyte\.gz is damaged"):
        fashion_photos.read_labels()


def test_a_failed_preparation_leaves_nothing_that_looks_finished(
    fashion: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataclasses.replace(fashion, data_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(fashion_photos, "IMAGES_MD5", "0" * 32)
        with pytest.raises(RunError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
            builders.prepare(data)
    assert not list((tmp_path / "fashion_photos").rglob("*"))
    (tmp_path / "fashion_photos" / "incomplete.ABCDEF_1.0.0").mkdir()  # as a killed one leaves it
    builders.prepare(data)
    assert [folder.name for folder in (tmp_path / "fashion_photos").iterdir()] == ["1.0.0"]
    assert len(sources.open_source(data, "train")) == 8000


def test_preparing_again_does_nothing(fashion: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "run_builder", lambda *_: pytest.fail("it was prepared"))
    builders.prepare(fashion)
