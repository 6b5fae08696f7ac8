"""Whole runs of recipe.train on real ranks: run directory, launchers, resume, failures, exact
evaluation.
"""

import contextlib
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
import psutil
import pytest

from recipe.run import checkpoint
from recipe.system import checkpoint_file
from recipe.system.arrays import digest
from recipe.system.processor import processor
from tests.ranks import BIN, ROOT, command, environment, launch

pytestmark = pytest.mark.ranks

SMALL = [
    "-m",
    "recipe.train",
    "--config=quick",
    "--config.n=64",
    "--config.epochs=3",
    "--config.optimizer.base_rate=0.1",
    "--config.data.train_examples=448",  # 3.5 minibatches of 128: the last one is short
    "--config.data.eval_examples=131",  # a prime: no number of ranks divides it
    "--config.schedule.warmup_epochs=1.5",
    "--config.schedule.decay_epochs=(2.0,)",
    "--config.model.blocks=(1,1)",
    "--config.model.width=8",
    "--config.run.log_every=2",
    "--config.run.replica_check_every=3",
]


MIXED = [  # imagenet_8gpu, thin, in float16 with loss scaling and on the wire
    "-m",
    "recipe.train",
    "--config=imagenet_8gpu",
    "--config.k=2",
    "--config.n=4",
    "--config.epochs=1",
    "--config.schedule.decay_epochs=()",
    "--config.data.name=synthetic",
    "--config.data.image_size=64",
    "--config.data.train_examples=16",
    "--config.data.eval_examples=5",
    "--config.model.width=4",
    "--config.model.precision=mixed_float16",
    "--config.optimizer.compression=fp16",
]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data_dir) -> tuple[Path, str]:
    """An undisturbed run of two ranks under mpirun: its directory and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    done = launch(2, [*SMALL, f"--run_dir={folder}"], TFDS_DATA_DIR=data_dir)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder, done.stdout


def lines(folder: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return checkpoint_file.load(checkpoint.checkpoints(folder / "checkpoints")[-1])[0]


def refused(done: subprocess.CompletedProcess, status: int, *parts: str) -> None:
    """One sentence, said once, and no traceback."""
    assert done.returncode == status, done.stdout
    (sentence,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in sentence
    assert "Traceback" not in done.stdout


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
    assert [path.name for path in checkpoint.checkpoints(folder / "checkpoints")] == [
        f"step-0000{step:04d}.npz" for step in (4, 8, 12)
    ]
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_the_rates_are_the_schedules(finished):
    """4 steps an epoch, kη = 0.1·128/256 below η = 0.1: no ramp; ÷10 at epoch 2."""
    steps = lines(finished[0], "step")
    assert [line["step"] for line in steps] == [2, 4, 6, 8, 10, 12]
    assert [line["rate"] for line in steps] == pytest.approx([0.05] * 4 + [0.005] * 2)


def test_every_example_is_counted_once(finished):
    """Traps 7 and 11: also when neither minibatches nor ranks divide the data."""
    for line in lines(finished[0], "epoch"):
        assert line["eval_examples"] == 131
        assert (line["error"] * 448) == pytest.approx(round(line["error"] * 448), abs=1e-6)


def test_it_learns(finished):
    losses = [line["loss"] for line in lines(finished[0], "epoch")]
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
    done = launch(2, [*SMALL, f"--run_dir={tmp_path / 'run'}"], launcher, TFDS_DATA_DIR=data_dir)
    assert done.returncode == 0, done.stdout[-4000:]
    for one, other in zip(
        lines(tmp_path / "run", "epoch"), lines(finished[0], "epoch"), strict=True
    ):
        assert one["loss"] == other["loss"]  # a sum of two is the same in any order


def test_the_torch_backend_runs_the_recipe_too(tmp_path, data_dir):
    done = launch(
        2, [*SMALL, f"--run_dir={tmp_path / 'run'}"], TFDS_DATA_DIR=data_dir, KERAS_BACKEND="torch"
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert lines(tmp_path / "run", "epoch")[-1]["loss"] < 2.6


def test_the_imagenet_preset_in_mixed_precision_on_synthetic_data(tmp_path):
    """The 16 layers of stages and the stem of imagenet_8gpu, thin; float16 with loss scaling, and
    on the wire.
    """
    done = launch(2, [*MIXED, f"--run_dir={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stdout[-4000:]
    (epoch,) = lines(tmp_path / "run", "epoch")
    assert epoch["eval_examples"] == 5
    assert 6 < epoch["loss"] < 8  # ln 1000 ≈ 6.9
    assert any(name.endswith("dynamic_scale") for name in weights(tmp_path / "run"))


@pytest.mark.parametrize("size", [1, 3])
def test_evaluation_does_not_depend_on_the_ranks(finished, data_dir, size):
    done = launch(
        size, ["-m", "recipe.evaluate", f"--run_dir={finished[0]}"], TFDS_DATA_DIR=data_dir
    )
    assert done.returncode == 0, done.stdout
    last = lines(finished[0], "epoch")[-1]
    assert f"top-1 error {last['eval_error']:.2%}" in done.stdout
    assert "examples 131" in done.stdout
    printed = float(done.stdout.split("loss ")[1].split()[0])
    assert printed == pytest.approx(
        last["eval_loss"], abs=2e-4
    )  # four decimals, other batch shapes


def killed_after_epoch(
    folder: Path, epoch: int, data_dir: str, launcher: str, *arguments: str
) -> tuple[float, int, str]:
    """Starts a run, kills rank 1 once an epoch has its checkpoint: (seconds to the job's end,
    status, output).
    """
    job = subprocess.Popen(
        command(2, [*SMALL, f"--run_dir={folder}", *arguments], launcher),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(TFDS_DATA_DIR=data_dir),
    )
    try:
        deadline, ranks = time.monotonic() + 120, []
        while len(ranks) < 2 or not (folder / f"checkpoints/step-{4 * epoch:08d}.npz").exists():
            assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
            time.sleep(0.01)
            if (
                len(ranks) < 2
            ):  # looked for before there is haste: then the run is over in half a second
                with contextlib.suppress(psutil.Error):
                    processes = psutil.Process(job.pid).children(recursive=True)
                    ranks = [p for p in processes if "recipe.train" in p.cmdline()[1:3]]
        max(ranks, key=lambda p: p.pid).kill()
        began = time.monotonic()
        printed = job.communicate(timeout=60)[0]
        return time.monotonic() - began, job.returncode, printed
    finally:
        job.kill()


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_a_killed_rank_ends_the_job_and_the_run_resumes(finished, tmp_path, data_dir, launcher):
    folder = tmp_path / "run"
    seconds, status, printed = killed_after_epoch(folder, 1, data_dir, launcher)
    assert status != 0
    assert seconds < 20  # a hang is the bug; the launchers take 0.4 to 3 s here
    assert (
        "signal 9" in printed or "exit code" in printed.lower() or "exit status" in printed.lower()
    )
    done = launch(2, [*SMALL, f"--run_dir={folder}", "--resume"], TFDS_DATA_DIR=data_dir)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "median of the last 3 epochs" in done.stdout  # those before the kill count
    assert [line["epoch"] for line in lines(folder, "epoch")] == [1, 2, 3]
    assert [line["step"] for line in lines(folder, "step")] == [2, 4, 6, 8, 10, 12]
    assert digest(weights(folder)) == digest(weights(finished[0]))


def test_one_rank_without_data_ends_the_run_with_its_message(tmp_path, data_dir):
    """A failed read on one rank is agreed upon: no traceback, no hang, the rank is named."""
    program = [sys.executable, *SMALL, f"--run_dir={tmp_path / 'run'}"]
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
    program = [sys.executable, *SMALL, f"--run_dir={tmp_path / 'run'}"]
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
    program = [sys.executable, *SMALL, "--config.framework=torch", f"--run_dir={tmp_path / 'run'}"]
    program.append("--config.run.step_timeout=5")
    done = two_ranks(program, ["env", f"TFDS_DATA_DIR={silent}", *program], TFDS_DATA_DIR=data_dir)
    assert done.returncode == 1
    told = r"error: rank \d on .*: nothing was heard for .*; the last sign of life was the start"
    assert re.search(told, done.stdout)


def test_a_rank_that_never_starts_horovod_ends_the_run(tmp_path):
    program = [
        sys.executable,
        *MIXED,
        "--config.run.step_timeout=5",
        f"--run_dir={tmp_path / 'run'}",
    ]
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
    done = launch(2, [*SMALL, f"--run_dir={tmp_path / 'run'}"], TFDS_DATA_DIR=str(copy))
    assert time.monotonic() - began < 90
    assert done.returncode == 1
    assert "error: rank" in done.stdout
    assert ": example " in done.stdout and "fashion_photos-train.tfrecord-00000" in done.stdout
    assert "Traceback" not in done.stdout


def test_ranks_must_divide_the_recipes_workers(tmp_path, data_dir):
    done = launch(3, [*SMALL, f"--run_dir={tmp_path / 'run'}"], TFDS_DATA_DIR=data_dir)
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
    done = launch(2, [*SMALL, f"--run_dir={tmp_path / 'run'}"], KERAS_BACKEND="jax")
    refused(done, 2, "'jax'", "KERAS_BACKEND=torch")


def test_a_run_directory_is_not_overwritten(finished, data_dir):
    folder = finished[0]
    done = launch(2, [*SMALL, f"--run_dir={folder}"], TFDS_DATA_DIR=data_dir)
    refused(done, 2, str(folder), "--resume")
    done = launch(
        2,
        [*SMALL, "--config.optimizer.momentum=0.8", f"--run_dir={folder}", "--resume"],
        TFDS_DATA_DIR=data_dir,
    )
    refused(done, 2, "config.optimizer.momentum=0.8 (was 0.9)")
    assert len(lines(folder, "epoch")) == 3


def test_a_finished_run_resumes_to_its_result(finished, data_dir):
    folder, printed = finished
    done = launch(2, [*SMALL, f"--run_dir={folder}", "--resume"], TFDS_DATA_DIR=data_dir)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-2:] == printed.splitlines()[-2:]
    assert len(lines(folder, "epoch")) == 3


def test_a_run_forced_to_fewer_epochs_than_it_has_done_is_finished(finished, tmp_path, data_dir):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    arguments = [*SMALL, "--config.epochs=2", "--config.schedule.decay_epochs=()", "--resume=force"]
    done = launch(2, [*arguments, f"--run_dir={folder}"], TFDS_DATA_DIR=data_dir)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-2].startswith("top-1 error ")


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
    done = launch(2, [*SMALL, f"--run_dir={folder}", "--resume"], TFDS_DATA_DIR=data_dir)
    assert done.returncode == 0, done.stdout
    assert "holds no checkpoint: the run begins at step 0" in done.stdout
    assert [line["epoch"] for line in lines(folder, "epoch")] == [1, 2, 3]


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_unless_told_so(
    finished, tmp_path, data_dir
):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_bytes()
    done = launch(2, [*SMALL, f"--run_dir={folder}", "--resume"], TFDS_DATA_DIR=data_dir)
    refused(done, 2, str(folder), "has 3 finished epochs", "holds no checkpoint", "--resume=force")
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not (folder / ".lock").exists()
    done = launch(2, [*SMALL, f"--run_dir={folder}", "--resume=force"], TFDS_DATA_DIR=data_dir)
    assert done.returncode == 0, done.stdout
    (aside,) = folder.glob("aside-*-metrics.jsonl")
    assert aside.read_bytes() == before
    assert digest(weights(folder)) == digest(weights(finished[0]))


def test_there_must_be_something_to_resume(tmp_path, data_dir):
    done = launch(2, [*SMALL, f"--run_dir={tmp_path / 'run'}", "--resume"], TFDS_DATA_DIR=data_dir)
    refused(done, 2, "holds no run to resume")


def test_divergence_stops_all_ranks(tmp_path, data_dir):
    arguments = [*SMALL, f"--run_dir={tmp_path / 'run'}", "--config.optimizer.base_rate=1e30"]
    refused(
        launch(2, arguments, TFDS_DATA_DIR=data_dir),
        1,
        "the loss is",
        "at step 2",
        "worker",
        "base_rate",
    )


NATIVE = [*SMALL, "--config.framework=torch", "--config.n=32"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_whose_last_update_diverges_is_not_kept(tmp_path, data_dir, epochs):
    """The loss of each step is that before its update: the last one's effect is seen by the
    evaluation only.
    """
    folder = tmp_path / "run"
    options = [
        "--config.data.train_examples=128",
        "--config.k=2",
        "--config.n=64",
        "--config.optimizer.base_rate=1e22",
    ]
    options += [
        f"--config.epochs={epochs}",
        "--config.schedule.warmup=none",
        "--config.schedule.warmup_epochs=0",
    ]
    options += [
        "--config.schedule.decay_epochs=()",
        "--config.framework=torch",
        f"--run_dir={folder}",
    ]
    done = launch(2, [*SMALL, *options], TFDS_DATA_DIR=data_dir)
    assert done.returncode == 1, done.stdout
    (sentence,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert "training has diverged" in sentence and "base_rate" in sentence
    assert not checkpoint.checkpoints(folder / "checkpoints")
    assert not lines(folder, "epoch")
    assert f"--run_dir={folder} --resume" in done.stdout


def test_a_run_that_runs_is_not_started_once_more(tmp_path, data_dir):
    folder = tmp_path / "run"
    long = [
        *NATIVE,
        f"--run_dir={folder}",
        "--config.epochs=400",
        "--config.run.checkpoint_steps=1",
    ]
    first = subprocess.Popen(
        command(1, long),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(TFDS_DATA_DIR=data_dir),
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints/step-00000001.npz").exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        refused(
            launch(1, [*long, "--resume"], TFDS_DATA_DIR=data_dir), 2, "in use by process", "since"
        )
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, data_dir):
    """As SIGUSR1 does: to the rank itself, and to its launcher, which passes it on as SIGTERM."""
    folder = tmp_path / "my runs" / "größe"
    program = [sys.executable, *NATIVE, f"--run_dir={folder}", "--config.epochs=400"]
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
    first = checkpoint.step_of(checkpoint.checkpoints(folder / "checkpoints")[-1])
    assert f"run directory: {folder}" in printed and "Ctrl-C: saving" in printed
    (advice,) = [
        line
        for line in printed.splitlines()
        if line.startswith(f"saved after step {first}; to go on")
    ]
    again = shlex.split(advice.partition("launcher: ")[2])
    assert again[:3] == ["python", "-m", "recipe.train"] and again[-2:] == [
        f"--run_dir={folder}",
        "--resume",
    ]
    status, printed = interrupted([str(BIN / "mpirun"), "-np", "1", *again])
    assert "preempted: told to leave after step" in printed, (status, printed)
    second = checkpoint.step_of(checkpoint.checkpoints(folder / "checkpoints")[-1])
    assert second > first


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path, data_dir):
    folder = tmp_path / "run"
    words = [
        "sh",
        "-c",
        'exec "$@" <&- >&- 2>&-',
        "sh",
        sys.executable,
        *NATIVE,
        f"--run_dir={folder}",
    ]
    done = subprocess.run(words, env=environment(TFDS_DATA_DIR=data_dir), timeout=200, check=False)
    assert done.returncode == 0
    assert [line["epoch"] for line in lines(folder, "epoch")] == [1, 2, 3]


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
        *NATIVE,
        f"--run_dir={folder}",
    ]
    words += ["--config.run.log_every=1", "--config.epochs=12"]
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
        done = launch(2, [*SMALL, f"--run_dir={folder / 'run'}"], TFDS_DATA_DIR=data_dir)
        refused(done, 1, "cannot write the checkpoint", "No space left on device")
        assert not list(folder.rglob("*.partial"))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_reports_are_the_papers(finished, tmp_path):
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        shutil.copytree(finished[0], run)
    done = launch(1, ["-m", "recipe.report", *map(str, runs)])
    assert done.returncode == 0, done.stdout
    errors = [line["eval_error"] for line in lines(finished[0], "epoch")]
    assert f"top-1 error {np.median(errors):.2%}, median of the last 3 of 3 epochs" in done.stdout
    assert f"2 runs: {np.median(errors):.2%} ± 0.00%" in done.stdout
    assert (runs[0] / "report.png").read_bytes().startswith(b"\x89PNG")
    refused(launch(1, ["-m", "recipe.report", str(tmp_path)]), 2, "metrics.jsonl")


def test_a_run_says_how_long_it_waited_for_images(finished, tmp_path, data_dir):
    """The rank that waits longest counts: all others then wait for it, in the allreduce."""
    folder, printed = finished
    assert all(0 < line["data_wait"] < 1 for line in lines(folder, "epoch"))
    assert re.search(
        r"^images: \d+\.\d% of the time of a step was spent waiting for them", printed, re.MULTILINE
    )
    program = str(ROOT / "tests/recipe/run/slow_images_program.py")
    options = [
        *SMALL[2:],
        "--config.framework=torch",
        f"--config.data.data_dir={data_dir}",
        f"--run_dir={tmp_path}/r",
    ]
    done = launch(2, [program, *options])
    (told,) = re.findall(r"^images: (\d+)\.\d% .*: docs/data.md says", done.stdout, re.MULTILINE)
    assert int(told) > 40, "12 steps of far less than 0.3 s"
