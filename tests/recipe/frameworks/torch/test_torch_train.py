"""Whole runs in native PyTorch: the curves of Keras, kills and resumption, conversion, evaluation."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from recipe import convert
from recipe.frameworks.keras import replica as fit
from recipe.run.runlog import read_recipe
from recipe.system import checkpoint_file
from tests import faults
from tests.ranks import command, launch
from tests.recipes import MIXED, SMALL, RecipeFlags
from tests.runs import (
    check_printed_evaluation,
    check_same_state,
    lines,
    refused,
    saved,
    series,
    state,
    succeeded,
)

pytestmark = pytest.mark.ranks

# Four workers, a warmup (kn = 288 > 256), a decay, and a short last minibatch in each epoch: nine
# steps.
CURVES = SMALL.but(k=4, n=72, train_examples=800, log_every=1)
TORCH = SMALL.but(framework="torch")
RUNS = {  # ranks, framework, Keras's backend
    "tensorflow": (1, "keras", "tensorflow"),
    "keras-torch": (1, "keras", "torch"),
    "torch": (1, "torch", ""),
    "torch-2": (2, "torch", ""),
    "torch-4": (4, "torch", ""),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def curves(tmp_path_factory, data_dir) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("curves")
    for name, (size, framework, backend) in RUNS.items():
        arguments = CURVES.but(framework=framework).train(folder / name)
        extra = {"KERAS_BACKEND": backend} if backend else {}
        succeeded(launch(size, arguments, TFDS_DATA_DIR=data_dir, **extra))
    return {name: folder / name for name in RUNS}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir) -> Path:
    """An undisturbed run of two ranks."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    printed = succeeded(launch(2, TORCH.train(folder), TFDS_DATA_DIR=data_dir))
    assert printed.splitlines()[-2].startswith("top-1 error ")
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if name != "tensorflow"])
def test_the_curves_are_one_step_by_step(curves, name):
    """Nine steps of different float32 kernels and orders of summation: 2e-6 relative after twelve
    steps here.
    """
    one, other = curves[name], curves["tensorflow"]

    def check(kind: str, figure: str, **tolerance: float) -> None:
        expected = pytest.approx(series(other, kind, figure), **tolerance)
        assert series(one, kind, figure) == expected, figure

    assert len(lines(one, "step")) == len(lines(other, "step")) == 9
    check("step", "loss", rel=3e-5)
    check("step", "rate", rel=1e-6)
    check("step", "error", abs=1.5 / 224)
    check("epoch", "eval_loss", rel=1e-4)
    check("epoch", "norm", rel=1e-6)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "tensorflow"])
def test_images_order_and_initial_weights_are_the_same_to_the_bit(curves, name):
    one, other = curves[name], curves["tensorflow"]
    assert len(lines(one, "start")) == 1
    assert lines(one, "start") == lines(other, "start")
    assert series(one, "epoch", "order") == series(other, "epoch", "order")


def test_a_killed_rank_ends_the_job_and_the_run_resumes_to_the_same_bits(
    finished, tmp_path, data_dir
):
    folder = tmp_path / "run"
    words = command(2, TORCH.train(folder))
    faults.kill_last_rank(words, folder, after_step=4, TFDS_DATA_DIR=data_dir)
    succeeded(launch(2, TORCH.train(folder, "--resume"), TFDS_DATA_DIR=data_dir))
    check_same_state(folder, finished)


@pytest.mark.parametrize("size", [1, 3])
def test_evaluation_does_not_depend_on_the_ranks(finished, data_dir, size):
    done = launch(size, ["-m", "recipe.evaluate", f"--run_dir={finished}"], TFDS_DATA_DIR=data_dir)
    check_printed_evaluation(finished, succeeded(done))


@pytest.mark.parametrize("name", ["tensorflow", "torch"])
def test_a_run_goes_on_in_the_other_framework(curves, tmp_path, data_dir, name):
    """From the end of the first epoch, in the middle of the warmup, with velocities at work."""
    started, converted = tmp_path / "started", tmp_path / "converted"
    shutil.copytree(curves[name], started)
    for path in saved(started)[1:]:
        path.unlink()
    succeeded(launch(1, ["-m", "recipe.convert", f"--run_dir={started}", f"--to={converted}"]))
    again = RecipeFlags(f"{converted}/config.json").train(converted, "--resume")
    succeeded(launch(2, again, TFDS_DATA_DIR=data_dir))
    expected = pytest.approx(series(curves[name], "step", "loss"), rel=3e-5)
    assert series(converted, "step", "loss") == expected
    norms = [series(run, "epoch", "norm")[-1] for run in (converted, curves[name])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_another_frameworks_run_is_refused(finished, data_dir):
    done = launch(2, SMALL.train(finished, "--resume"), TFDS_DATA_DIR=data_dir)
    refused(done, 2, "config.framework=keras (was torch)")
    done = launch(2, SMALL.train(finished, "--resume=force"), TFDS_DATA_DIR=data_dir)
    refused(done, 1, "python -m recipe.convert")


def test_conversion_wants_a_run_and_a_new_directory(finished, tmp_path):
    refused(launch(1, ["-m", "recipe.convert", f"--run_dir={finished}"]), 2, "--to")
    refused(
        launch(1, ["-m", "recipe.convert", f"--run_dir={finished}", f"--to={finished}"]),
        2,
        "exists",
    )
    nowhere = finished / "config.json" / "new"
    refused(
        launch(1, ["-m", "recipe.convert", f"--run_dir={finished}", f"--to={nowhere}"]),
        2,
        "can't be written",
    )
    refused(
        launch(1, ["-m", "recipe.convert", f"--run_dir={tmp_path}", f"--to={tmp_path / 'new'}"]),
        2,
        "config.json",
    )


def test_the_imagenet_preset_in_mixed_precision_on_synthetic_data(tmp_path):
    """The 16 blocks and the stem, thin; float16 with loss scaling and on the wire; dropout; and
    precise BN.
    """
    run = tmp_path / "run"
    recipe = MIXED.but(framework="torch", precise_bn=1, dropout=0.2)
    succeeded(launch(2, recipe.train(run)))
    (epoch,) = lines(run, "epoch")
    assert epoch["eval_examples"] == 5
    assert 6 < epoch["loss"] < 8  # ln 1000 ≈ 6.9
    assert state(run)["optimizer/loss_scale"] == 2**15


@pytest.mark.slow
def test_a_compiled_run_has_the_same_curve(curves, tmp_path, data_dir):
    """torch.compile with the C++ compiler of this machine; another kernel of batch normalisation."""
    folder = tmp_path / "run"
    recipe = CURVES.but(framework="torch", compile=True, epochs=2, decay_epochs=())
    succeeded(launch(2, recipe.train(folder), TFDS_DATA_DIR=data_dir))
    expected = pytest.approx(series(curves["torch"], "step", "loss")[:6], rel=3e-5)
    assert series(folder, "step", "loss") == expected


def test_a_checkpoint_survives_both_conversions(curves):
    """Keras → PyTorch → Keras: −(−v/η)·η rounds twice, by half of 2⁻²³ each."""
    found, meta = checkpoint_file.load(saved(curves["tensorflow"])[0])
    recipe = read_recipe(curves["tensorflow"])
    back = convert.to_keras(convert.to_torch(found), fit.compiled(recipe, 10), meta["step"])
    assert list(back) == list(found)
    for name, value in found.items():
        assert back[name].dtype == value.dtype, name
        np.testing.assert_allclose(back[name], value, rtol=2**-22, err_msg=name)
