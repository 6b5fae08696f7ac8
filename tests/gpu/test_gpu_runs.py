"""Whole runs that begin on one device and go on on another. Built, not run on a GPU."""

import shutil
from pathlib import Path

import pytest

from tests.gpu.process import run
from tests.recipes import SYNTHETIC
from tests.runs import saved, series, state, succeeded

pytestmark = pytest.mark.ranks

# Two epochs of four steps. Its replica is compared, and its statistics for evaluation are precise.
RECIPE = SYNTHETIC.but(log_every=1, replica_check_every=3, precise_bn=2, keep_checkpoints=100)
# Float32 sums in another order: between frameworks it was 2e-6 after 12 steps.
ROUNDING = 3e-5


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the CPU alone."""
    folder = tmp_path_factory.mktemp("cpu") / "run"
    succeeded(run("cpu", RECIPE.train(folder)))
    return folder


def test_a_run_goes_on_on_another_device(device, second_device, on_cpu, tmp_path):
    """From the checkpoint of its first epoch. Evaluation and its loss are the CPU's."""
    folder = tmp_path / "run"
    if device == "cpu":
        shutil.copytree(on_cpu, folder)
    else:
        succeeded(run(device, RECIPE.train(folder)))
    for path in saved(folder)[1:]:
        path.unlink()
    succeeded(run(second_device, RECIPE.train(folder, "--resume")))

    # All steps, whichever device they ran on.
    expected = pytest.approx(series(on_cpu, "step", "loss"), rel=ROUNDING)
    assert series(folder, "step", "loss") == expected
    expected = pytest.approx(series(on_cpu, "epoch", "eval_loss"), rel=1e-4)
    assert series(folder, "epoch", "eval_loss") == expected
    assert state(folder).keys() == state(on_cpu).keys()


def test_a_run_is_evaluated_on_another_device(device, on_cpu):
    """The error counts examples: 20 of 1000 classes, which a few steps hardly learn."""
    program = ["-m", "recipe.evaluate", f"--run_dir={on_cpu}"]
    printed = succeeded(run(device, program))
    (error, *_) = series(on_cpu, "epoch", "eval_error")[-1:]
    assert f"{error:.2%}" in printed
