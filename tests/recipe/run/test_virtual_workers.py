"""A run is a function of (recipe, seed): 1, 2, 3 and 4 ranks play the same k workers, in Keras and
native PyTorch.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.ranks import launch
from tests.recipes import TWELVE_WORKERS
from tests.runs import lines, refused, series, state, succeeded

pytestmark = pytest.mark.ranks

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
    native = backend == "native"
    framework = TWELVE_WORKERS.but(framework="torch" if native else "keras")
    variables = {"TFDS_DATA_DIR": str(folder / "data")}
    if not native:
        variables["KERAS_BACKEND"] = backend

    def run(size: int, **changes: object) -> Path:
        recipe = framework.but(**changes)
        if (size, recipe) not in done:
            done[size, recipe] = run_dir = folder / str(len(done))
            succeeded(launch(size, recipe.train(run_dir), **variables))
        return done[size, recipe]

    return run


def losses(run: Path) -> np.ndarray:
    """Of every step, and of the evaluation after every epoch."""
    return np.array(series(run, "step", "loss") + series(run, "epoch", "eval_loss"))


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
    one, several = state(train(1)), state(train(size))
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
    other = train(2, k=6, n=16)
    assert np.abs(losses(other) / losses(train(2)) - 1).max() > 1000 * BOUND


def test_several_workers_in_one_forward_pass_are_the_same_workers(train):
    full = {"remainder": "drop", "precise_bn": 1}
    apart, together = train(1, **full), train(2, **full, workers_at_once=3)
    np.testing.assert_allclose(losses(together), losses(apart), rtol=BOUND)


def test_precise_statistics_are_others_than_the_moving_ones(train):
    """But only in evaluation: training goes on as without."""
    precise = losses(train(1, remainder="drop", precise_bn=1))
    moving = losses(train(1, remainder="drop"))
    np.testing.assert_array_equal(precise[:6], moving[:6])
    assert np.abs(precise[6:] / moving[6:] - 1).min() > 1e-4


def test_a_rank_count_must_divide_the_workers_of_a_forward_pass(tmp_path):
    recipe = TWELVE_WORKERS.but(remainder="drop", workers_at_once=4)
    done = launch(2, recipe.train(tmp_path / "r"), TFDS_DATA_DIR=str(tmp_path))
    refused(done, 2, "config.run.workers_at_once=4 doesn't divide the 6 workers of each of 2 ranks")
