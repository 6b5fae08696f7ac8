"""BackupAndRestore on real ranks: trainings that are killed and started again end as if nothing had happened."""

import functools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import ROOT, launch, results

PROGRAM = str(ROOT / "tests/recipe/keras/resuming_program.py")

pytestmark = pytest.mark.ranks


@pytest.fixture(params=["tensorflow", "torch"])
def backend(request):
    return request.param


@pytest.fixture(params=[1, 2])
def size(request):
    return request.param


class Run:
    """One training, started as often as need be."""

    def __init__(self, folder: Path, backend: str, size: int, kind: str) -> None:
        self.folder, self.backend, self.size, self.kind = folder, backend, size, kind
        self.said = ""
        folder.mkdir()

    def start(self, **plan) -> int:
        program = [PROGRAM, str(self.folder), self.kind, json.dumps(plan)]
        done = launch(
            self.size, program, timeout=200, RESULTS=str(self.folder), KERAS_BACKEND=self.backend
        )
        self.said = done.stdout
        return done.returncode

    def copy(self, folder: Path, size: int) -> "Run":
        copied = Run(folder, self.backend, size, self.kind)
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return copied

    def backups(self) -> list[str]:
        return sorted(p.name for p in (self.folder / "backup").glob("*.npz"))

    def lines(self) -> list:
        """Of each rank, in the order of the epochs' ends."""
        files = [self.folder / f"{rank}.jsonl" for rank in range(self.size)]
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    def ends_like(self, other: "Run", epochs: list[int]) -> None:
        """State of all ranks, and the logs of all epochs and batches, to the bit; the last start ran `epochs`."""
        for rank in range(self.size):
            mine, theirs = (
                pickle.loads((run.folder / str(rank)).read_bytes()) for run in (self, other)
            )
            assert mine["epochs"] == epochs
            for a, b in zip(mine["state"], theirs["state"], strict=True):
                np.testing.assert_array_equal(a, b)
            mine, theirs = (
                {epoch: rest for epoch, *rest in run.lines()[rank]} for run in (self, other)
            )
            assert {e: logs for e, (logs, _) in mine.items()} == {
                e: logs for e, (logs, _) in theirs.items()
            }
            for epoch, (_, batches) in mine.items():
                assert [n for n, _ in batches] == list(range(6))
                trained = [(n, loss) for n, loss in batches if [n, loss] in theirs[epoch][1]]
                assert batches[-1] in theirs[epoch][1] and len(trained) >= 1
        assert not (self.folder / "backup").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    @functools.cache
    def run(backend, size, kind):
        whole = Run(tmp_path_factory.mktemp("whole") / "run", backend, size, kind)
        assert whole.start() == 0, whole.said[-4000:]
        return whole

    return run


def test_a_run_that_is_killed_in_its_saves_and_within_epochs_ends_the_same(
    tmp_path, uninterrupted, backend, size
):
    """Backed up after 5, 10, 15 and 20 of 24 batches, with sums of gradients since the last step after 5 and 15."""
    run = Run(tmp_path / "run", backend, size, "batches")
    assert run.start(save=[2, "unnamed"]) != 0
    assert run.backups() == ["latest.npz"]  # after 5
    if size == 2:
        fewer = run.copy(tmp_path / "fewer", 1)
        assert fewer.start() != 0
        assert "passes/0000" in fewer.said and "resume on 2 ranks, not on 1" in fewer.said
        assert fewer.backups() == ["latest.npz"]
    assert run.start(save=[2, "named"]) != 0
    assert run.backups() == ["latest.npz", "next.npz"]  # after 10 and 15
    assert run.start(batch=[2, 4]) != 0
    assert run.backups() == ["latest.npz"]  # after 15
    assert run.start() == 0, run.said[-4000:]
    run.ends_like(uninterrupted(backend, size, "batches"), [2, 3])


def test_a_damaged_backup_gives_way_to_the_one_before_it(tmp_path, uninterrupted, backend, size):
    """Killed in epoch 2, whose backup is damaged; then a rank fails in the last callback and leaves the backups."""
    run = Run(tmp_path / "run", backend, size, "epochs")
    assert run.start(batch=[2, 1]) != 0
    assert run.backups() == ["latest.npz", "previous.npz"]
    if size == 2:  # moving statistics are then rank 0's
        fewer = run.copy(tmp_path / "fewer", 1)
        assert fewer.start() == 0, fewer.said[-4000:]
        assert [epoch for epoch, *_ in fewer.lines()[0]] == [0, 1, 2, 3]
    latest = run.folder / "backup/latest.npz"
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    assert run.start(last=True) != 0
    assert "latest.npz is damaged" in run.said and "going on from the backup before it" in run.said
    assert "failed in the last callback" in run.said
    assert [epoch for epoch, *_ in run.lines()[0]] == [0, 1, 1, 2, 3]
    assert run.backups() == ["damaged.npz", "latest.npz", "previous.npz"]
    assert run.start() == 0, run.said[-4000:]
    run.ends_like(uninterrupted(backend, size, "epochs"), [])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    @functools.cache
    def run(backend):
        folder = tmp_path_factory.mktemp("one")
        shared = folder / "shared"
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir()
        return results(
            folder / "found", 2, PROGRAM, str(shared), "one process", "{}", KERAS_BACKEND=backend
        )

    return run


def test_what_can_not_be_taken_up_is_refused_in_one_sentence(found, backend):
    """On all ranks. The key is what the sentence must name."""
    for rank in found(backend):
        for word, sentence in (rank["refusals"] | rank["arguments"]).items():
            assert word in sentence
            assert len(sentence) < 350 and "\n" not in sentence
        assert (
            len(rank["refusals"]) == (9 if backend == "tensorflow" else 8)
            and len(rank["arguments"]) == 4
        )


def test_a_new_model_of_the_process_goes_on_and_the_next_fit_begins_anew(found, backend):
    for rank in found(backend):
        assert rank["in_one_process"] == {
            "same": True,
            "epochs": [1, 2],
            "again": [0],
            "left": ["mine.txt"],
        }


def test_a_backup_that_is_due_at_an_epochs_last_batch_is_of_the_epochs_end(found, backend):
    for rank in found(backend):
        assert rank["due"]["same"]
        assert rank["due"]["losses"][0] == rank["due"]["losses"][1]


def test_batches_that_pass_by_in_an_elastic_epoch_are_drawn(found, backend):
    for rank in found(backend):
        for a, b in zip(*rank["elastic"]["weights"], strict=True):
            np.testing.assert_array_equal(a, b)
