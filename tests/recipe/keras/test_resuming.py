"""BackupAndRestore on real ranks: what is killed and started again ends as if it had not been."""

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
        self.folder = folder
        self.backend = backend
        self.size = size
        self.kind = kind
        self.output = ""
        folder.mkdir()

    def start(self, **plan) -> int:
        program = [PROGRAM, str(self.folder), self.kind, json.dumps(plan)]
        done = launch(
            self.size, program, timeout=200, RESULTS=str(self.folder), KERAS_BACKEND=self.backend
        )
        self.output = done.stdout
        return done.returncode

    def copy(self, folder: Path, size: int) -> "Run":
        copied = Run(folder, self.backend, size, self.kind)
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return copied

    def backups(self) -> list[str]:
        return sorted(p.name for p in (self.folder / "backup").glob("*.npz"))

    def lines(self, rank: int) -> list[dict]:
        """Return what a rank has logged, in the order of the epochs' ends."""
        lines = (self.folder / f"{rank}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def result(self, rank: int) -> dict:
        """Return what a rank has left at its end."""
        return pickle.loads((self.folder / str(rank)).read_bytes())

    def ends_like(self, other: "Run", epochs: list[int]) -> None:
        """Check that state, and logs of all epochs and batches, are the other run's, to the bit.

        The last start ran `epochs`.
        """
        for rank in range(self.size):
            result = self.result(rank)
            assert result["epochs"] == epochs
            for a, b in zip(result["state"], other.result(rank)["state"], strict=True):
                np.testing.assert_array_equal(a, b)

            # The last line of an epoch that was run twice holds.
            own_lines = {line["epoch"]: line for line in self.lines(rank)}
            other_lines = {line["epoch"]: line for line in other.lines(rank)}
            assert own_lines.keys() == other_lines.keys()
            for epoch, line in own_lines.items():
                assert line["logs"] == other_lines[epoch]["logs"]
                # Batches before the backup pass by with other numbers.
                batches = line["batches"]
                assert [number for number, _ in batches] == list(range(6))
                assert batches[-1] in other_lines[epoch]["batches"]
        assert not (self.folder / "backup").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    @functools.cache
    def run(backend, size, kind):
        whole = Run(tmp_path_factory.mktemp("whole") / "run", backend, size, kind)
        assert whole.start() == 0, whole.output[-4000:]
        return whole

    return run


def test_a_run_that_is_killed_in_its_saves_and_within_epochs_ends_the_same(
    tmp_path, uninterrupted, backend, size
):
    """It is backed up after 5, 10, 15 and 20 of 24 batches.

    After 5 and 15 there are sums of gradients since the last step.
    """
    run = Run(tmp_path / "run", backend, size, "batches")
    assert run.start(save=[2, "unnamed"]) != 0
    assert run.backups() == ["latest.npz"]  # after 5
    if size == 2:
        fewer = run.copy(tmp_path / "fewer", 1)
        assert fewer.start() != 0
        assert "passes/0000" in fewer.output and "resume on 2 ranks, not on 1" in fewer.output
        assert fewer.backups() == ["latest.npz"]
    assert run.start(save=[2, "named"]) != 0
    assert run.backups() == ["latest.npz", "next.npz"]  # after 10 and 15
    assert run.start(batch=[2, 4]) != 0
    assert run.backups() == ["latest.npz"]  # after 15
    assert run.start() == 0, run.output[-4000:]
    run.ends_like(uninterrupted(backend, size, "batches"), [2, 3])


def test_a_damaged_backup_gives_way_to_the_one_before_it(tmp_path, uninterrupted, backend, size):
    """The run is killed in epoch 2, whose backup is damaged.

    Then a rank fails in the last callback and leaves the backups.
    """
    run = Run(tmp_path / "run", backend, size, "epochs")
    assert run.start(batch=[2, 1]) != 0
    assert run.backups() == ["latest.npz", "previous.npz"]
    if size == 2:  # moving statistics are then rank 0's
        fewer = run.copy(tmp_path / "fewer", 1)
        assert fewer.start() == 0, fewer.output[-4000:]
        assert [line["epoch"] for line in fewer.lines(0)] == [0, 1, 2, 3]
    latest = run.folder / "backup/latest.npz"
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    assert run.start(last=True) != 0
    assert (
        "latest.npz is damaged" in run.output and "going on from the backup before it" in run.output
    )
    assert "failed in the last callback" in run.output
    assert [line["epoch"] for line in run.lines(0)] == [0, 1, 1, 2, 3]
    assert run.backups() == ["damaged.npz", "latest.npz", "previous.npz"]
    assert run.start() == 0, run.output[-4000:]
    run.ends_like(uninterrupted(backend, size, "epochs"), [])


@pytest.fixture(scope="module")
def in_one_start(tmp_path_factory):
    """Run, once for each backend, what needs no second start; return what each rank has seen."""

    @functools.cache
    def run(backend):
        folder = tmp_path_factory.mktemp("one")
        shared = folder / "shared"
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir()
        program = [PROGRAM, str(shared), "one process", "{}"]
        return results(folder / "results", 2, *program, KERAS_BACKEND=backend)

    return run


def test_what_can_not_be_taken_up_is_refused_in_one_sentence(in_one_start, backend):
    """On all ranks. The key is what the sentence must name."""
    for of_rank in in_one_start(backend):
        for word, sentence in (of_rank["refusals"] | of_rank["arguments"]).items():
            assert word in sentence
            assert len(sentence) < 350 and "\n" not in sentence
        assert len(of_rank["refusals"]) == (9 if backend == "tensorflow" else 8)
        assert len(of_rank["arguments"]) == 4


def test_a_new_model_of_the_process_goes_on_and_the_next_fit_begins_anew(in_one_start, backend):
    for of_rank in in_one_start(backend):
        assert of_rank["in_one_process"] == {
            "same": True,
            "epochs": [1, 2],
            "again": [0],
            "left": ["mine.txt"],
        }


def test_a_backup_that_is_due_at_an_epochs_last_batch_is_of_the_epochs_end(in_one_start, backend):
    for of_rank in in_one_start(backend):
        assert of_rank["due"]["same"]
        assert of_rank["due"]["losses"][0] == of_rank["due"]["losses"][1]


def test_batches_that_pass_by_in_an_elastic_epoch_are_drawn(in_one_start, backend):
    for of_rank in in_one_start(backend):
        for a, b in zip(*of_rank["elastic"]["weights"], strict=True):
            np.testing.assert_array_equal(a, b)
