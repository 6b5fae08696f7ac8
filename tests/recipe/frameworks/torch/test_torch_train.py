"""Whole runs in native PyTorch: the curves of Keras, kills and resumption, conversion, evaluation."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from recipe import convert
from recipe.frameworks.keras import replica as fit
from recipe.run import checkpoint
from recipe.run.runlog import read_recipe
from recipe.system import checkpoint_file
from recipe.system.arrays import digest
from tests.ranks import launch
from tests.recipe.test_train import MIXED, SMALL, killed_after_epoch, lines, refused, weights

pytestmark = pytest.mark.ranks

# Four workers, a warmup (kn = 288 > 256), a decay, and a short last minibatch in each epoch: nine
# steps.
CURVES = [
    *SMALL,
    "--config.k=4",
    "--config.n=72",
    "--config.data.train_examples=800",
    "--config.run.log_every=1",
]
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
        arguments = [*CURVES, f"--config.framework={framework}", f"--run_dir={folder / name}"]
        extra = {"KERAS_BACKEND": backend} if backend else {}
        done = launch(size, arguments, TFDS_DATA_DIR=data_dir, **extra)
        assert done.returncode == 0, done.stdout[-4000:]
    return {name: folder / name for name in RUNS}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir) -> Path:
    """An undisturbed run of two ranks."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = launch(
        2, [*SMALL, "--config.framework=torch", f"--run_dir={folder}"], TFDS_DATA_DIR=data_dir
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.splitlines()[-2].startswith("top-1 error ")
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if name != "tensorflow"])
def test_the_curves_are_one_step_by_step(curves, name):
    """Nine steps of different float32 kernels and orders of summation: 2e-6 relative after twelve
    steps here.
    """
    one, other = lines(curves[name], "step"), lines(curves["tensorflow"], "step")
    assert len(one) == len(other) == 9
    assert [line["loss"] for line in one] == pytest.approx(
        [line["loss"] for line in other], rel=3e-5
    )
    assert [line["rate"] for line in one] == pytest.approx(
        [line["rate"] for line in other], rel=1e-6
    )
    assert [line["error"] for line in one] == pytest.approx(
        [line["error"] for line in other], abs=1.5 / 224
    )
    ours, theirs = lines(curves[name], "epoch"), lines(curves["tensorflow"], "epoch")
    assert [e["eval_loss"] for e in ours] == pytest.approx(
        [e["eval_loss"] for e in theirs], rel=1e-4
    )
    assert [e["norm"] for e in ours] == pytest.approx([e["norm"] for e in theirs], rel=1e-6)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "tensorflow"])
def test_images_order_and_initial_weights_are_the_same_to_the_bit(curves, name):
    (one,), (other,) = lines(curves[name], "start"), lines(curves["tensorflow"], "start")
    assert one == other
    orders = [[line["order"] for line in lines(curves[n], "epoch")] for n in (name, "tensorflow")]
    assert orders[0] == orders[1]


def test_a_killed_rank_ends_the_job_and_the_run_resumes_to_the_same_bits(
    finished, tmp_path, data_dir
):
    folder = tmp_path / "run"
    seconds, status, _ = killed_after_epoch(
        folder, 1, data_dir, "mpirun", "--config.framework=torch"
    )
    assert status != 0
    assert seconds < 20  # a hang is the bug
    done = launch(
        2,
        [*SMALL, "--config.framework=torch", f"--run_dir={folder}", "--resume"],
        TFDS_DATA_DIR=data_dir,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert digest(weights(folder)) == digest(weights(finished))


@pytest.mark.parametrize("size", [1, 3])
def test_evaluation_does_not_depend_on_the_ranks(finished, data_dir, size):
    done = launch(size, ["-m", "recipe.evaluate", f"--run_dir={finished}"], TFDS_DATA_DIR=data_dir)
    assert done.returncode == 0, done.stdout
    last = lines(finished, "epoch")[-1]
    assert f"top-1 error {last['eval_error']:.2%}" in done.stdout
    printed = float(done.stdout.split("loss ")[1].split()[0])
    assert printed == pytest.approx(
        last["eval_loss"], abs=2e-4
    )  # four decimals, other batch shapes


@pytest.mark.parametrize("name", ["tensorflow", "torch"])
def test_a_run_goes_on_in_the_other_framework(curves, tmp_path, data_dir, name):
    """From the end of the first epoch, in the middle of the warmup, with velocities at work."""
    started, converted = tmp_path / "started", tmp_path / "converted"
    shutil.copytree(curves[name], started)
    for path in checkpoint.checkpoints(started / "checkpoints")[1:]:
        path.unlink()
    done = launch(1, ["-m", "recipe.convert", f"--run_dir={started}", f"--to={converted}"])
    assert done.returncode == 0, done.stdout
    again = [
        "-m",
        "recipe.train",
        f"--config={converted}/config.json",
        f"--run_dir={converted}",
        "--resume",
    ]
    done = launch(2, again, TFDS_DATA_DIR=data_dir)
    assert done.returncode == 0, done.stdout[-4000:]
    one, other = lines(converted, "step"), lines(curves[name], "step")
    assert [line["loss"] for line in one] == pytest.approx(
        [line["loss"] for line in other], rel=3e-5
    )
    assert lines(converted, "epoch")[-1]["norm"] == pytest.approx(
        lines(curves[name], "epoch")[-1]["norm"], rel=1e-6
    )


def test_another_frameworks_run_is_refused(finished, data_dir):
    done = launch(2, [*SMALL, f"--run_dir={finished}", "--resume"], TFDS_DATA_DIR=data_dir)
    refused(done, 2, "config.framework=keras (was torch)")
    done = launch(2, [*SMALL, f"--run_dir={finished}", "--resume=force"], TFDS_DATA_DIR=data_dir)
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
    more = ["--config.framework=torch", "--config.model.precise_bn=1", "--config.model.dropout=0.2"]
    done = launch(2, [*MIXED, *more, f"--run_dir={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stdout[-4000:]
    (epoch,) = lines(tmp_path / "run", "epoch")
    assert epoch["eval_examples"] == 5
    assert 6 < epoch["loss"] < 8  # ln 1000 ≈ 6.9
    assert weights(tmp_path / "run")["optimizer/loss_scale"] == 2**15


@pytest.mark.slow
def test_a_compiled_run_has_the_same_curve(curves, tmp_path, data_dir):
    """torch.compile with the C++ compiler of this machine; another kernel of batch normalisation."""
    folder = tmp_path / "run"
    arguments = [*CURVES, "--config.framework=torch", "--config.run.compile=true", "--config.epochs=2",
                 "--config.schedule.decay_epochs=()", f"--run_dir={folder}"]  # fmt: skip
    done = launch(2, arguments, TFDS_DATA_DIR=data_dir)
    assert done.returncode == 0, done.stdout[-4000:]
    expected = [line["loss"] for line in lines(curves["torch"], "step")[:6]]
    assert [line["loss"] for line in lines(folder, "step")] == pytest.approx(expected, rel=3e-5)


def test_a_checkpoint_survives_both_conversions(curves):
    """Keras → PyTorch → Keras: −(−v/η)·η rounds twice, by half of 2⁻²³ each."""
    found, meta = checkpoint_file.load(
        checkpoint.checkpoints(curves["tensorflow"] / "checkpoints")[0]
    )
    recipe = read_recipe(curves["tensorflow"])
    back = convert.to_keras(convert.to_torch(found), fit.compiled(recipe, 10), meta["step"])
    assert list(back) == list(found)
    for name, value in found.items():
        assert back[name].dtype == value.dtype, name
        np.testing.assert_allclose(back[name], value, rtol=2**-22, err_msg=name)
