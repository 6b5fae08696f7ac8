"""Checkpoints are whole or not there at all, and never unpickled."""

import errno
import hashlib
import os
import re
import stat
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.errors import RunError
from recipe.run import checkpoint
from recipe.system import checkpoint_file
from recipe.system.arrays import digest

ARRAYS = {"model/a/b": np.arange(1000, dtype=np.float32), "optimizer/step": np.int64(3)}


def save(folder, step, keep=3, keep_every=0):
    return checkpoint.save(folder, step, ARRAYS, {"step": step}, keep, keep_every)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    arrays, meta = checkpoint_file.load(save(tmp_path, 7))
    assert meta == {"step": 7}
    assert arrays.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], value)
        assert arrays[name].dtype == value.dtype


def test_the_newest_are_kept_and_those_of_every_so_many_steps(tmp_path):
    for step in range(1, 12):
        save(tmp_path, step, keep=2, keep_every=4)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [4, 8, 10, 11]
    save(tmp_path, 12, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012.npz"]


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=300)
def test_any_bit_that_flips_is_noticed(where, bit, whole):
    content = bytearray(whole.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    damaged = whole.with_name("damaged.npz")
    damaged.write_bytes(content)
    with pytest.raises(RunError, match=r"damaged\.npz is damaged"):
        checkpoint_file.load(damaged)


@given(length=st.floats(0, 1, exclude_max=True))
@settings(max_examples=100)
def test_any_truncation_is_noticed(length, whole):
    content = whole.read_bytes()
    damaged = whole.with_name("damaged.npz")
    damaged.write_bytes(content[: int(length * len(content))])
    with pytest.raises(RunError, match=r"damaged\.npz is damaged"):
        checkpoint_file.load(damaged)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(tmp_path_factory.mktemp("whole"), 1)


def test_the_newest_whole_one_is_taken_and_the_damaged_are_told(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"step-0000000{step}.npz").write_bytes(b"hello")
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append)[1] == {"step": 1}
    assert [re.search(r"step-0+(\d)", warning)[1] for warning in warnings] == ["3", "2"]


def test_all_damaged_is_an_error_and_none_at_all_is_not(tmp_path):
    assert checkpoint.newest(tmp_path, warn=print) is None
    save(tmp_path, 1).write_bytes(b"")
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole"):
        checkpoint.newest(tmp_path, warn=print)
    assert len(checkpoint.checkpoints(tmp_path)) == 1


def test_a_pickle_is_not_loaded(tmp_path):
    """An array of objects would run code when it is unpickled."""
    path = tmp_path / "step-00000001.npz"
    np.savez(path, evil=np.array([print], dtype=object))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"0" * 64
    content = path.read_bytes()[:-64]
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    with pytest.raises(RunError, match="not a checkpoint"):
        checkpoint_file.load(path)


def test_a_failed_write_leaves_the_older_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"step-00000002\.npz: No space left on device"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.npz"]


def test_what_a_killed_save_left_goes_with_the_next(tmp_path):
    (tmp_path / ".step-00000001.npz.partial").write_bytes(b"half")
    save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.npz"]


def test_a_digest_is_of_names_types_shapes_and_values():
    one = digest({"a": np.zeros(4, np.float32), "b": np.ones(2)})
    assert one == digest({"b": np.ones(2), "a": np.zeros(4, np.float32)})
    others = [
        {"a": np.zeros(4), "b": np.ones(2)},
        {"a": np.zeros((2, 2), np.float32), "b": np.ones(2)},
    ]
    others += [
        {"a": np.zeros(4, np.float32), "c": np.ones(2)},
        {"a": np.float32([0, 0, 0, 1e-45]), "b": np.ones(2)},
    ]
    assert len({one, *map(digest, others)}) == 5


OTHERS = (
    *(
        "step-best.npz",
        "step-00000001.copy.npz",
        "step-1.npz",
        "step-000000001.npz",
        "step-00000002.npz.bak",
    ),
    *(
        ".step-mine.partial",
        "step-\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668.npz",
        "aside-step-00000003.npz",
    ),
)


def test_others_files_are_neither_read_nor_counted_nor_removed(tmp_path):
    for name in OTHERS:
        (tmp_path / name).write_bytes(b"somebody's")
    (tmp_path / "step-00000099.npz").mkdir()
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000003.npz"]
    assert checkpoint.newest(tmp_path, warn=pytest.fail)[1] == {"step": 3}
    checkpoint.set_aside(checkpoint.checkpoints(tmp_path))
    assert all((tmp_path / name).read_bytes() == b"somebody's" for name in OTHERS)
    assert (tmp_path / "aside-2-step-00000003.npz").stat().st_size > 1000


def test_steps_of_nine_digits_are_later_than_those_of_eight(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert checkpoint.newest(tmp_path, warn=print)[1] == {"step": 100_000_000}


@pytest.mark.parametrize("which", ["folders", "files and folders"])
def test_a_file_system_without_fsync_is_one_warning(tmp_path, monkeypatch, capsys, which):
    """CIFS and FUSE file systems say EINVAL, for folders or for all."""
    fsync = os.fsync

    def unable(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or which != "folders":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", unable)
    monkeypatch.setattr(checkpoint_file, "_warned", set())
    for step in (1, 2, 3):
        checkpoint_file.load(save(tmp_path, step))
    assert capsys.readouterr().err.count("the run goes on without") == (
        1 if which == "folders" else 2
    )


def test_an_old_checkpoint_that_cannot_be_removed_is_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_file, "_warned", set())
    monkeypatch.setattr(type(tmp_path), "unlink", lambda path, missing_ok=False: os.rmdir(path))  # noqa: PTH106
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1)
    assert len(checkpoint.checkpoints(tmp_path)) == 3
    (warning,) = capsys.readouterr().err.splitlines()
    assert (
        "step-00000001.npz can't be removed: Not a directory; the run goes on beside it" in warning
    )
