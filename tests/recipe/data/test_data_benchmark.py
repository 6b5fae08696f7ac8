"""The benchmark's own contenders on a few of its photos.

The peers need packages that the project doesn't need.
"""

from pathlib import Path

import pytest

from recipe.data.benchmark import __main__ as benchmark
from recipe.data.benchmark import contender, photos, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "COUNT", 8)
        folder = tmp_path_factory.mktemp("photos")
        sizes = photos.make(folder)
    assert all(95_000 < size < 130_000 for size in sizes), "as large as ImageNet's"
    return folder


@pytest.mark.parametrize("name", ["ours", "floor", "tf.data-float32", "torch-pillow"])
def test_it_measures(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "BATCH", 8)
    monkeypatch.setattr(settings, "WARMUP", 16)
    monkeypatch.setattr(settings, "IMAGES", 64)
    measurement = contender.measure(contender.CONTENDERS[name](folder))
    if name == "ours":
        # Some are read ahead, before and while those are counted.
        assert 50_000 < measurement.read < 200_000
    assert "images/cpu s" in benchmark.line([measurement])


def test_what_is_not_installed_is_left_out() -> None:
    missing = benchmark.Missing("nvidia")
    assert benchmark.missing_line(missing) == "left out: nvidia is not installed"
