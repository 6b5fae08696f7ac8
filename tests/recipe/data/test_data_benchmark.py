"""The benchmark's own contenders on a few of its photos; the peers need packages that the project doesn't."""

from pathlib import Path

import pytest

from recipe.data.benchmark import __main__ as benchmark
from recipe.data.benchmark import contender, photos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "COUNT", 8)
        made = tmp_path_factory.mktemp("photos")
        sizes = photos.make(made)
    assert all(95_000 < size < 130_000 for size in sizes), "as large as ImageNet's"
    return made


@pytest.mark.parametrize("name", ["ours", "floor", "tf.data-float32", "torch-pillow"])
def test_it_measures(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contender, "BATCH", 8)
    monkeypatch.setattr(contender, "WARMUP", 16)
    monkeypatch.setattr(contender, "IMAGES", 64)
    found = contender.measured(contender.CONTENDERS[name](folder))
    assert found.keys() == {"first", "wall", "cpu", "read", "memory"}
    if name == "ours":
        # Some are read ahead, before and while those are counted.
        assert 50_000 < found["read"] < 200_000
    assert "images/cpu s" in benchmark.line([found])


def test_what_is_not_installed_is_left_out() -> None:
    assert benchmark.line([{"missing": "nvidia"}]) == "left out: nvidia is not installed"
