"""Whole runs of recipe.train on real ranks: run directory, launchers, resume, failures, exact
evaluation.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from recipe.system.processor import processor
from tests import faults
from tests.ranks import BIN, command, environment, launch
from tests.recipes import MIXED, SMALL
from tests.runs import (
    check_printed_evaluation,
    check_same_state,
    lines,
    refused,
    saved,
    saved_steps,
    series,
    state,
    succeeded,
    the_line,
)

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data_dir) -> tuple[Path, str]:
    """An undisturbed run of two ranks under mpirun: its directory and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, succeeded(launch(2, SMALL.train(folder), TFDS_DATA_DIR=data_dir))


def test_the_run_directory_says_what_ran(finished):
    folder, _ = finished
    config = json.loads((folder / "config.json").read_text())
    assert (config["k"], config["n"], config["data"]["eval_examples"]) == (2, 64, 131)
    environment_ = json.loads((folder / "environment.json").read_text())
    assert len(environment_["hosts"]) == 2
    assert environment_["processors"] == [processor()]
    assert environment_["packages"]["horovod"] == "0.28.1"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints"
    }  # fmt: skip
    assert [path.name for path in saved(folder)] == [
        f"step-0000{step:04d}.npz" for step in (4, 8, 12)
    ]
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_the_rates_are_the_schedules(finished):
    """4 steps an epoch, kη = 0.1·128/256 below η = 0.1: no ramp; ÷10 at epoch 2."""
    assert series(finished[0], "step", "step") == [2, 4, 6, 8, 10, 12]
    assert series(finished[0], "step", "rate") == pytest.approx([0.05] * 4 + [0.005] * 2)


def test_every_example_is_counted_once(finished):
    """Traps 7 and 11: also when neither minibatches nor ranks divide the data."""
    epochs = lines(finished[0], "epoch")
    assert len(epochs) == 3
    for line in epochs:
        assert line["eval_examples"] == 131
        assert (line["error"] * 448) == pytest.approx(round(line["error"] * 448), abs=1e-6)


def test_it_learns(finished):
    losses = series(finished[0], "epoch", "loss")
    assert losses[-1] < losses[0] < 2.6  # ln 10 ≈ 2.3 knows nothing


def test_only_rank_0_speaks_and_no_framework_does(finished):
    folder, printed = finished
    assert len([line for line in printed.splitlines() if "epoch 3 of 3" in line]) == 1
    assert printed.splitlines()[-2].startswith("top-1 error ")
    assert str(folder) in printed
    for noise in ("oneDNN", "cpu_feature_guard", "WARNING", "absl::InitializeLog", "Traceback"):
        assert noise not in printed


@pytest.mark.parametrize("launcher", ["gloo", "horovodrun-mpi"])
def test_other_launchers_train_the_same(finished, tmp_path, data_dir, launcher):
    run = tmp_path / "run"
    succeeded(launch(2, SMALL.train(run), launcher, TFDS_DATA_DIR=data_dir))
    # A sum of two is the same in any order.
    assert series(run, "epoch", "loss") == series(finished[0], "epoch", "loss")


def test_the_torch_backend_runs_the_recipe_too(tmp_path, data_dir):
    run = tmp_path / "run"
    succeeded(launch(2, SMALL.train(run), TFDS_DATA_DIR=data_dir, KERAS_BACKEND="torch"))
    assert series(run, "epoch", "loss")[-1] < 2.6


def test_the_imagenet_preset_in_mixed_precision_on_synthetic_data(tmp_path):
    """The 16 layers of stages and the stem of imagenet_8gpu, thin; float16 with loss scaling, and
    on the wire.
    """
    run = tmp_path / "run"
    succeeded(launch(2, MIXED.train(run)))
    (epoch,) = lines(run, "epoch")
    assert epoch["eval_examples"] == 5
    assert 6 < epoch["loss"] < 8  # ln 1000 ≈ 6.9
    assert any(name.endswith("dynamic_scale") for name in state(run))


@pytest.mark.parametrize("size", [1, 3])
def test_evaluation_does_not_depend_on_the_ranks(finished, data_dir, size):
    done = launch(
        size, ["-m", "recipe.evaluate", f"--run_dir={finished[0]}"], TFDS_DATA_DIR=data_dir
    )
    check_printed_evaluation(finished[0], succeeded(done))


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_a_killed_rank_ends_the_job_and_the_run_resumes(finished, tmp_path, data_dir, launcher):
    folder = tmp_path / "run"
    words = command(2, SMALL.train(folder), launcher)
    printed = faults.kill_last_rank(words, folder, after_step=4, TFDS_DATA_DIR=data_dir).lower()
    assert "signal 9" in printed or "exit code" in printed or "exit status" in printed
    printed = succeeded(launch(2, SMALL.train(folder, "--resume"), TFDS_DATA_DIR=data_dir))
    assert "median of the last 3 epochs" in printed  # those before the kill count
    assert series(folder, "epoch", "epoch") == [1, 2, 3]
    assert series(folder, "step", "step") == [2, 4, 6, 8, 10, 12]
    check_same_state(folder, finished[0])


def test_one_rank_without_data_ends_the_run_with_its_message(tmp_path, data_dir):
    """A failed read on one rank is agreed upon: no traceback, no hang, the rank is named."""
    program = [sys.executable, *SMALL.train(tmp_path / "run")]
    empty = tmp_path / "empty"
    empty.mkdir()
    done = two_ranks(program, ["env", f"TFDS_DATA_DIR={empty}", *program], TFDS_DATA_DIR=data_dir)
    refused(done, 2, "rank 1: ", str(empty))


def test_one_rank_that_fails_before_horovod_starts_says_why(finished, tmp_path):
    """The directory isn't on its host: rank 0 waits for it in Horovod's start, and has nothing to
    say.
    """
    program = [sys.executable, "-m", "recipe.evaluate"]
    done = two_ranks([*program, f"--run_dir={finished[0]}"], [*program, f"--run_dir={tmp_path}"])
    refused(done, 2, "rank 1 on ", str(tmp_path), "config.json")


@pytest.mark.parametrize(
    ("name", "value", "other"), [("seed", 1, 0), ("n", 32, 64), ("run.replica_check_every", 4, 3)]
)
def test_a_rank_with_another_recipe_is_named(tmp_path, data_dir, name, value, other):
    """Other examples without a word, or a hang, or both."""
    program = [sys.executable, *SMALL.train(tmp_path / "run")]
    done = two_ranks(program, [*program, f"--config.{name}={value}"], TFDS_DATA_DIR=data_dir)
    refused(
        done, 2, f"rank 1 has another recipe than rank 0: config.{name}={value} instead of {other};"
    )
    assert not (tmp_path / "run").exists()


def test_a_rank_that_hangs_before_the_first_step_ends_the_run(tmp_path, data_dir, finished):
    """Rank 1 opens a file that never answers, as on a hard NFS mount; rank 0 waits for it."""
    silent = tmp_path / "data"
    shutil.copytree(data_dir, silent)
    for index in silent.rglob("*.npz"):
        index.unlink()
        os.mkfifo(index)
    recipe = SMALL.but(framework="torch", step_timeout=5)
    program = [sys.executable, *recipe.train(tmp_path / "run")]
    done = two_ranks(program, ["env", f"TFDS_DATA_DIR={silent}", *program], TFDS_DATA_DIR=data_dir)
    assert done.returncode == 1
    told = r"error: rank \d on .*: nothing was heard for .*; the last sign of life was the start"
    assert re.search(told, done.stdout)


def test_a_rank_that_never_starts_horovod_ends_the_run(tmp_path):
    program = [sys.executable, *MIXED.but(step_timeout=5).train(tmp_path / "run")]
    done = two_ranks(program, ["sleep", "90"])
    assert done.returncode == 1
    assert (
        "error: rank 0 on " in done.stdout and "the last sign of life was the start" in done.stdout
    )


def two_ranks(first: list[str], second: list[str], **extra: str) -> subprocess.CompletedProcess:
    """Two ranks with a command each."""
    mpirun = [str(BIN / "mpirun"), "--oversubscribe", "--bind-to", "none"]
    return subprocess.run(
        [*mpirun, "-np", "1", *first, ":", "-np", "1", *second],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        env=environment(**extra),
        check=False,
    )


def test_a_damaged_image_is_named(tmp_path, data_dir, finished):
    """On the rank that meets it, while the other waits in an allreduce; the job ends all the same."""
    copy = tmp_path / "data"
    shutil.copytree(data_dir, copy)
    for shard in copy.glob("fashion_photos/*/fashion_photos-train.tfrecord-00000-*"):
        content = bytearray(shard.read_bytes())
        for place in range(len(content) - 1):
            if content[place : place + 2] == b"\xff\xda":  # each image's pixels begin here
                content[place + 2 : place + 40] = b"\xff\xd9" * 19  # and end at once
        shard.write_bytes(content)
    began = time.monotonic()
    done = launch(2, SMALL.train(tmp_path / "run"), TFDS_DATA_DIR=str(copy))
    assert time.monotonic() - began < 90
    assert done.returncode == 1
    assert "error: rank" in done.stdout
    assert ": example " in done.stdout and "fashion_photos-train.tfrecord-00000" in done.stdout
    assert "Traceback" not in done.stdout


def test_ranks_must_divide_the_recipes_workers(tmp_path, data_dir):
    done = launch(3, SMALL.train(tmp_path / "run"), TFDS_DATA_DIR=data_dir)
    refused(done, 2, "config.k=2", "by 3 ranks", "(1, 2)")
    assert not (tmp_path / "run").exists()


def test_usage_errors_are_said_once(tmp_path):
    done = launch(2, ["-m", "recipe.train", "--config=quick", "--config.optimizer.base_rat=1"])
    refused(done, 2, "--config.optimizer.base_rat ", "--config.optimizer.base_rate")
    refused(
        launch(1, ["-m", "recipe.train", "--config=quick", "--runs_dir=x"]),
        2,
        "--runs_dir",
        "--run_dir",
    )
    refused(
        launch(1, ["-m", "recipe.evaluate", f"--run_dir={tmp_path}"]),
        2,
        str(tmp_path),
        "config.json",
    )


@pytest.mark.parametrize(
    "program", ["recipe.train", "recipe.evaluate", "recipe.report", "recipe.data.prepare"]
)
def test_programs_explain_themselves(program):
    done = launch(1, ["-m", program, "--help"])
    assert done.returncode == 0
    assert f"python -m {program}" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_backend_without_a_binding_is_refused_before_keras_looks_for_it(tmp_path):
    done = launch(2, SMALL.train(tmp_path / "run"), KERAS_BACKEND="jax")
    refused(done, 2, "'jax'", "KERAS_BACKEND=torch")


def test_a_run_directory_is_not_overwritten(finished, data_dir):
    folder = finished[0]
    done = launch(2, SMALL.train(folder), TFDS_DATA_DIR=data_dir)
    refused(done, 2, str(folder), "--resume")
    other = SMALL.but(momentum=0.8)
    done = launch(2, other.train(folder, "--resume"), TFDS_DATA_DIR=data_dir)
    refused(done, 2, "config.optimizer.momentum=0.8 (was 0.9)")
    assert len(lines(folder, "epoch")) == 3


def test_a_finished_run_resumes_to_its_result(finished, data_dir):
    folder, printed = finished
    again = succeeded(launch(2, SMALL.train(folder, "--resume"), TFDS_DATA_DIR=data_dir))
    assert again.splitlines()[-2:] == printed.splitlines()[-2:]
    assert len(lines(folder, "epoch")) == 3


def test_a_run_forced_to_fewer_epochs_than_it_has_done_is_finished(finished, tmp_path, data_dir):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    fewer = SMALL.but(epochs=2, decay_epochs=())
    printed = succeeded(launch(2, fewer.train(folder, "--resume=force"), TFDS_DATA_DIR=data_dir))
    assert printed.splitlines()[-2].startswith("top-1 error ")


def test_a_run_that_ended_before_its_first_checkpoint_resumes_from_the_start(
    finished, tmp_path, data_dir
):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints")
    metrics = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(
        "".join(metrics[:2])
    )  # the start and step 2 of 4 an epoch
    printed = succeeded(launch(2, SMALL.train(folder, "--resume"), TFDS_DATA_DIR=data_dir))
    assert "holds no checkpoint: the run begins at step 0" in printed
    assert series(folder, "epoch", "epoch") == [1, 2, 3]


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_unless_told_so(
    finished, tmp_path, data_dir
):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_bytes()
    done = launch(2, SMALL.train(folder, "--resume"), TFDS_DATA_DIR=data_dir)
    refused(done, 2, str(folder), "has 3 finished epochs", "holds no checkpoint", "--resume=force")
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not (folder / ".lock").exists()
    succeeded(launch(2, SMALL.train(folder, "--resume=force"), TFDS_DATA_DIR=data_dir))
    (aside,) = folder.glob("aside-*-metrics.jsonl")
    assert aside.read_bytes() == before
    check_same_state(folder, finished[0])


def test_there_must_be_something_to_resume(tmp_path, data_dir):
    done = launch(2, SMALL.train(tmp_path / "run", "--resume"), TFDS_DATA_DIR=data_dir)
    refused(done, 2, "holds no run to resume")


def test_divergence_stops_all_ranks(tmp_path, data_dir):
    done = launch(2, SMALL.but(base_rate=1e30).train(tmp_path / "run"), TFDS_DATA_DIR=data_dir)
    refused(done, 1, "the loss is", "at step 2", "worker", "base_rate")


NATIVE = SMALL.but(framework="torch", n=32)


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_whose_last_update_diverges_is_not_kept(tmp_path, data_dir, epochs):
    """The loss of each step is that before its update: the last one's effect is seen by the
    evaluation only.
    """
    folder = tmp_path / "run"
    recipe = SMALL.but(
        framework="torch",
        epochs=epochs,
        train_examples=128,
        base_rate=1e22,
        warmup="none",
        warmup_epochs=0,
        decay_epochs=(),
    )
    done = launch(2, recipe.train(folder), TFDS_DATA_DIR=data_dir)
    refused(done, 1, "training has diverged", "base_rate")
    assert not saved(folder)
    assert not lines(folder, "epoch")
    assert f"--run_dir={folder} --resume" in done.stdout


def test_a_run_that_runs_is_not_started_once_more(tmp_path, data_dir):
    folder = tmp_path / "run"
    long = NATIVE.but(epochs=400, checkpoint_steps=1)
    first = subprocess.Popen(
        command(1, long.train(folder)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(TFDS_DATA_DIR=data_dir),
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints/step-00000001.npz").exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        second = launch(1, long.train(folder, "--resume"), TFDS_DATA_DIR=data_dir)
        refused(second, 2, "in use by process", "since")
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, data_dir):
    """As SIGUSR1 does: to the rank itself, and to its launcher, which passes it on as SIGTERM."""
    folder = tmp_path / "my runs" / "größe"
    program = [sys.executable, *NATIVE.but(epochs=400).train(folder)]
    values = environment(TFDS_DATA_DIR=data_dir, OMPI_MCA_odls_base_sigkill_timeout="5")

    def interrupted(words: list[str]) -> tuple[int, str]:
        job = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=values
        )
        seen = [""]
        while not any(sign in seen[-1] for sign in ("step 4 of", "going on after step")):
            seen.append(job.stdout.readline())
            assert seen[-1], seen
        job.send_signal(signal.SIGINT)
        printed = "".join(seen) + job.stdout.read()
        return job.wait(60), printed

    status, printed = interrupted(program)
    assert status == 75, printed
    first = saved_steps(folder)[-1]
    assert f"run directory: {folder}" in printed and "Ctrl-C: saving" in printed
    advice = the_line(printed, f"saved after step {first}; to go on")
    assert advice.startswith("saved after")
    again = shlex.split(advice.partition("launcher: ")[2])
    assert again[:3] == ["python", "-m", "recipe.train"] and again[-2:] == [
        f"--run_dir={folder}",
        "--resume",
    ]
    status, printed = interrupted([str(BIN / "mpirun"), "-np", "1", *again])
    assert "preempted: told to leave after step" in printed, (status, printed)
    assert saved_steps(folder)[-1] > first


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path, data_dir):
    folder = tmp_path / "run"
    words = [
        "sh",
        "-c",
        'exec "$@" <&- >&- 2>&-',
        "sh",
        sys.executable,
        *NATIVE.train(folder),
    ]
    done = subprocess.run(words, env=environment(TFDS_DATA_DIR=data_dir), timeout=200, check=False)
    assert done.returncode == 0
    assert series(folder, "epoch", "epoch") == [1, 2, 3]


@pytest.mark.skipif(os.getuid() != 0, reason="mounts file systems of its own, which needs root")
@pytest.mark.parametrize("where", ["tensorboard", "/dev/shm"])
def test_without_room_for_tensorboard_or_shared_memory_it_trains(tmp_path, data_dir, where):
    """A full disk where TensorBoard's events meet it first, and a /dev/shm that can't be written."""
    folder = tmp_path / "run"
    place = where if where.startswith("/") else str(folder / where)
    script = f"mkdir -p {place} && mount -t tmpfs -o {'ro,' if where == '/dev/shm' else ''}size=4k none {place} && "
    words = [
        "unshare",
        "-m",
        "sh",
        "-c",
        script + 'exec "$@"',
        "sh",
        sys.executable,
        *NATIVE.but(epochs=12, log_every=1).train(folder),
    ]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(TFDS_DATA_DIR=data_dir),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(lines(folder, "epoch")) == 12
    assert done.stderr.count("TensorBoard will lack figures") == (where == "tensorboard")


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small file system, which needs root")
def test_a_full_disk_is_one_sentence(tmp_path, data_dir):
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)
    try:
        done = launch(2, SMALL.train(folder / "run"), TFDS_DATA_DIR=data_dir)
        refused(done, 1, "cannot write the checkpoint", "No space left on device")
        assert not list(folder.rglob("*.partial"))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_reports_are_the_papers(finished, tmp_path):
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        shutil.copytree(finished[0], run)
    printed = succeeded(launch(1, ["-m", "recipe.report", *map(str, runs)]))
    error = np.median(series(finished[0], "epoch", "eval_error"))
    assert f"top-1 error {error:.2%}, median of the last 3 of 3 epochs" in printed
    assert f"2 runs: {error:.2%} ± 0.00%" in printed
    assert (runs[0] / "report.png").read_bytes().startswith(b"\x89PNG")
    refused(launch(1, ["-m", "recipe.report", str(tmp_path)]), 2, "metrics.jsonl")


def test_a_run_says_how_long_it_waited_for_images(finished, tmp_path, data_dir):
    """The rank that waits longest counts: all others then wait for it, in the allreduce."""
    folder, printed = finished
    assert all(0 < wait < 1 for wait in series(folder, "epoch", "data_wait"))
    assert re.search(
        r"^images: \d+\.\d% of the time of a step was spent waiting for them", printed, re.MULTILINE
    )
    fault = faults.late_images(rank=1, seconds=0.3)
    recipe = SMALL.but(framework="torch")
    words = recipe.train(tmp_path / "run", program=fault.program)
    printed = succeeded(launch(2, words, TFDS_DATA_DIR=data_dir))
    (told,) = re.findall(r"^images: (\d+)\.\d% .*: docs/data.md says", printed, re.MULTILINE)
    assert int(told) > 40, "12 steps of far less than 0.3 s"
