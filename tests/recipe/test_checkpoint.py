"""Checkpoints are whole or not there at all, and never unpickled."""

import os

import numpy as np
import pytest

from recipe import checkpoint
from recipe.errors import RunError


def save(folder, epoch, keep=3):
    arrays = {"model/a/b": np.arange(1000, dtype=np.float32) + epoch, "optimizer/step": np.int64(epoch)}
    return checkpoint.save(folder, epoch, arrays, {"epoch": epoch}, keep)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    arrays, meta = checkpoint.load(save(tmp_path, 7))
    assert meta == {"epoch": 7}
    np.testing.assert_array_equal(arrays["model/a/b"], np.arange(1000, dtype=np.float32) + 7)
    assert arrays["optimizer/step"] == 7


def test_only_the_newest_are_kept(tmp_path):
    for epoch in range(1, 12):
        save(tmp_path, epoch, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0010.npz", "epoch-0011.npz"]
    assert checkpoint.latest(tmp_path).name == "epoch-0011.npz"


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = save(tmp_path, 1)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes({"truncate": whole[:-100], "flip": whole, "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(RunError, match=r"epoch-0001\.npz is not a whole checkpoint"):
        checkpoint.load(path)


def test_a_pickle_is_not_loaded(tmp_path):
    """An array of objects would run code when it is unpickled."""
    path = tmp_path / "epoch-0001.npz"
    np.savez(path, evil=np.array([print], dtype=object))
    with pytest.raises(RunError, match="not a whole checkpoint"):
        checkpoint.load(path)


def test_a_failed_write_leaves_the_older_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"epoch-0002\.npz: No space left on device"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001.npz"]


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no checkpoint"):
        checkpoint.latest(tmp_path)
