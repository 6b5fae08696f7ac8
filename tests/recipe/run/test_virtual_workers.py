"""A run is a function of (recipe, seed): 1, 2, 3 and 4 ranks play the same k workers, in Keras and
native PyTorch.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from recipe.run import checkpoint
from recipe.system import checkpoint_file
from tests.ranks import launch

pytestmark = pytest.mark.ranks

RECIPE = [
    "-m",
    "recipe.train",
    "--config=quick",
    "--config.k=12",
    "--config.n=8",
    "--config.epochs=3",
    "--config.optimizer.base_rate=0.1",
    "--config.data.train_examples=250",  # 2 minibatches of 96 and a short one, whose workers have 5 or 4 examples
    "--config.data.eval_examples=131",
    "--config.schedule.warmup_epochs=1.5",
    "--config.schedule.decay_epochs=(2.0,)",
    "--config.model.blocks=(1,1)",
    "--config.model.width=8",
    "--config.model.dropout=0.2",
    "--config.run.log_every=1",
    "--config.run.replica_check_every=2",
]
# Sums of float32 in another order: 6e-8 of a loss, which the steps amplify. Measured over these 9
# steps: up to 4e-8; other batch-norm groups, which are the smallest mistake there is, make 3e-3.
BOUND = 1e-6


@pytest.fixture(scope="module", params=["tensorflow", "torch", "native"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def train(tmp_path_factory, backend):
    """A function that trains on so many ranks and gives the run's directory; once for each setting."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def run(size: int, *changes: str) -> Path:
        key = (size, changes)
        if key not in done:
            done[key] = folder / str(len(done))
            arguments = [*RECIPE, *changes, f"--run_dir={done[key]}"]
            native = backend == "native"
            extra = {} if native else {"KERAS_BACKEND": backend}
            arguments.append(f"--config.framework={'torch' if native else 'keras'}")
            ended = launch(size, arguments, TFDS_DATA_DIR=str(folder / "data"), **extra)
            assert ended.returncode == 0, ended.stdout[-4000:]
        return done[key]

    return run


def lines(run: Path, kind: str) -> list[dict]:
    return [
        line for line in map(json.loads, (run / "metrics.jsonl").open()) if line["kind"] == kind
    ]


def losses(run: Path) -> np.ndarray:
    """Of every step, and of the evaluation after every epoch."""
    steps, epochs = lines(run, "step"), lines(run, "epoch")
    return np.array([line["loss"] for line in steps] + [line["eval_loss"] for line in epochs])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_number_of_ranks_changes_nothing(train, size):
    one, several = train(1), train(size)
    np.testing.assert_allclose(losses(several), losses(one), rtol=BOUND)
    assert lines(several, "start") == lines(
        one, "start"
    )  # first images and initial weights: the same bits
    for here, there in zip(lines(several, "epoch"), lines(one, "epoch"), strict=True):
        assert (here["order"], here["eval_examples"]) == (there["order"], 131)
        assert here["norm"] == pytest.approx(there["norm"], rel=1e-6)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_moving_statistics_are_those_of_the_workers(train, size):
    one, several = (
        checkpoint_file.load(checkpoint.checkpoints(train(s) / "checkpoints")[-1])[0]
        for s in (1, size)
    )
    moving = [name for name in one if "/moving_" in name]
    assert len(moving) == 2 * 9
    for name in moving:
        np.testing.assert_allclose(
            several[name], one[name], rtol=0, atol=1e-3 * np.abs(one[name]).max(), err_msg=name
        )


def test_other_groups_of_examples_would_be_noticed(train):
    """The same minibatches, in 6 workers of 16 instead of 12 of 8: only batch norm and the short
    step differ.
    """
    other = train(2, "--config.k=6", "--config.n=16")
    assert np.abs(losses(other) / losses(train(2)) - 1).max() > 1000 * BOUND


def test_several_workers_in_one_forward_pass_are_the_same_workers(train):
    full = ["--config.data.remainder=drop", "--config.model.precise_bn=1"]
    apart, together = train(1, *full), train(2, *full, "--config.run.workers_at_once=3")
    np.testing.assert_allclose(losses(together), losses(apart), rtol=BOUND)


def test_precise_statistics_are_others_than_the_moving_ones(train):
    """But only in evaluation: training goes on as without."""
    full = ["--config.data.remainder=drop", "--config.model.precise_bn=1"]
    precise, moving = losses(train(1, *full)), losses(train(1, "--config.data.remainder=drop"))
    np.testing.assert_array_equal(precise[:6], moving[:6])
    assert np.abs(precise[6:] / moving[6:] - 1).min() > 1e-4


def test_a_rank_count_must_divide_the_workers_of_a_forward_pass(tmp_path):
    arguments = [
        *RECIPE,
        "--config.data.remainder=drop",
        "--config.run.workers_at_once=4",
        f"--run_dir={tmp_path / 'r'}",
    ]
    done = launch(2, arguments, TFDS_DATA_DIR=str(tmp_path))
    assert done.returncode == 2
    assert (
        "error: config.run.workers_at_once=4 doesn't divide the 6 workers of each of 2 ranks"
        in done.stdout
    )
