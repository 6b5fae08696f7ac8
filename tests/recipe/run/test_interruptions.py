"""Runs on real ranks that are killed, preempted, damaged or changed: what they say, and that
nothing is lost.
"""

import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from recipe.errors import RunError, UsageError
from recipe.rules.epoch import Epoch, permutation
from recipe.run import checkpoint, runlog
from recipe.run.resume import Mode, check_directory
from recipe.system import checkpoint_file
from recipe.system.arrays import digest
from tests import faults
from tests.faults import Fault
from tests.ranks import command, environment
from tests.recipes import TINY, TRAIN, RecipeFlags
from tests.runs import (
    check_same_run,
    figures,
    has_line,
    refused,
    saved,
    saved_steps,
    series,
    state,
    succeeded,
    the_line,
)

pytestmark = pytest.mark.ranks

STEPS, EPOCHS = TINY.steps, TINY.value.epochs  # steps of an epoch, epochs
EVERY_STEP = TINY.but(checkpoint_steps=1)  # a checkpoint of every step
FOUR = TINY.but(k=4, n=8)  # the same minibatch by four workers
NATIVE = FOUR.but(framework="torch")
NATIVE_EVERY_STEP = NATIVE.but(checkpoint_steps=1)
SEED = 1706  # of the moments at which the run is killed

# Ranks of another number add the same float32 numbers in another order. Measured after the 16 steps
# here, relative to a tensor's largest value: two undisturbed runs of Keras on 1 and 2 ranks were not
# apart at all while each rank has one thread, and 2.5e-4 when a single rank has two, in β's, whose
# terms cancel; two of native PyTorch not at all on 2 and 4 ranks, 1.7e-4 on 1 and 2 with two threads.
# The losses: 5e-8 in both. Resumed runs were no further apart. The bounds leave room for other
# processors. A lost step, the last and smallest of all, is 0.24; an epoch is 3e-4 of the
# evaluation's loss.
WEIGHTS_BOUND, NATIVE_WEIGHTS_BOUND = 1e-4, 3e-3
LOSSES_BOUND = 1e-6

needs_root = pytest.mark.skipif(
    os.getuid() != 0, reason="mounts a small file system, which needs root"
)


class Job:
    """A run of recipe.train on `size` ranks. None of its processes outlives its `with` block.

    A single rank gets half of the cores: as many threads as each of two ranks, since threads add up
    in another order.
    """

    def __init__(
        self, data: str, size: int, folder: Path, recipe: RecipeFlags, *options: str,
        launcher: str = "mpirun", backend: str = "tensorflow", fault: Fault | None = None,
    ) -> None:  # fmt: skip
        program = fault.program if fault else TRAIN
        self.folder, self._size, self._tag = folder, size, uuid.uuid4().hex
        self._kept = contextlib.ExitStack()
        self._output = self._kept.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        cores = sorted(os.sched_getaffinity(0))
        if size == 1:
            cores = cores[: max(1, len(cores) // 2)]
        self.process = subprocess.Popen(
            command(size, recipe.train(folder, *options, program=program), launcher),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment(
                TFDS_DATA_DIR=data,
                KERAS_BACKEND=backend,
                OMPI_MCA_mpi_yield_when_idle="1",  # waiting ranks leave the two cores to the others
                INTERRUPTION_TEST=self._tag,
            ),
            preexec_fn=functools.partial(os.sched_setaffinity, 0, cores),
        )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in [self.process, *self._processes()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self._kept.close()

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("INTERRUPTION_TEST") == self._tag:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """Those started so far: Python itself, not the shell that gloo's launcher puts around it."""
        found = {}
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                names = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")
                rank = next((process.environ()[n] for n in names if n in process.environ()), None)
                if rank is not None and f"--run_dir={self.folder}" in process.cmdline():
                    found[int(rank)] = process
        return found

    def wait_until(self, what: Callable[[], Any]) -> Any:
        """What `what` gives as soon as that is true."""
        deadline = time.monotonic() + 300
        while not (result := what()):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.0005)
        return result

    def wait_for_ranks(self) -> dict[int, psutil.Process]:
        return self.wait_until(lambda: len(found := self.ranks()) == self._size and found)

    def wait_for_line(self, kind: str, step: int) -> None:
        """Until the run has written this line of figures."""
        self.wait_until(lambda: has_line(self.folder, kind, step))

    def end(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """How it ended, and its output; fails when the job takes longer."""
        status = self.process.wait(timeout)
        return subprocess.CompletedProcess(self.process.args, status, self.text())

    def text(self) -> str:
        self._output.seek(0)
        return self._output.read()


def cut(reference: Path, folder: Path, step: int) -> Path:
    """A copy of a run as a kill after so many steps would have left it, but that figures have gone
    on.
    """
    shutil.copytree(reference, folder)
    for path in saved(folder):
        if checkpoint.step_of(path) > step:
            path.unlink()
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, data) -> Path:
    """Two ranks, a worker each, TensorFlow; a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    with Job(data, 2, folder, EVERY_STEP) as job:
        succeeded(job.end())
    return folder


@pytest.fixture(scope="session")
def undisturbed_four(tmp_path_factory, data) -> Path:
    """Two ranks, two virtual workers each, native PyTorch; a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed_four"
    with Job(data, 2, folder, NATIVE_EVERY_STEP) as job:
        succeeded(job.end())
    return folder


@pytest.fixture(scope="session")
def alone(tmp_path_factory, data, undisturbed) -> Path:
    """The recipe of `undisturbed` on one rank, which keeps few of its checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    recipe = TINY.but(checkpoint_steps=2, keep_checkpoints=1, keep_every=2)
    with Job(data, 1, folder, recipe) as job:
        succeeded(job.end())
    return folder


def test_the_last_checkpoints_and_those_of_every_second_epoch_are_kept(alone):
    """checkpoint_steps=2, keep_checkpoints=1, keep_every=2: of 2, 4, … 16 steps the ends of epochs
    2 and 4.
    """
    assert saved_steps(alone) == [2 * STEPS, 4 * STEPS]


# Kills


def killed(job: Job, chance: random.Random, first: int, moment: str) -> bool:
    """Kills one rank or the whole job at once; whether that left half a checkpoint. `first`: where
    the job began.
    """
    victims = chance.choice(
        ["rank 0", "everything"] if moment == "save" else ["rank 0", "rank 1", "everything"]
    )
    ranks = job.wait_for_ranks()
    step, last = (
        job.folder / f"checkpoints/step-{n:08d}.npz"
        for n in (first + chance.randint(1, 2), STEPS * EPOCHS - 2)
    )
    if moment != "start":
        job.wait_until(lambda: step.exists() or last.exists())
    end = time.monotonic() + chance.uniform(0, {"start": 8, "step": 0.1, "save": 0}[moment])
    job.wait_until(
        lambda: time.monotonic() >= end or last.exists()
    )  # on a fast machine the run would be over
    if moment == "save":
        job.wait_until(lambda: stopped_in_a_save(job, ranks[0]))
    for rank, process in ranks.items():
        if victims in ("everything", f"rank {rank}"):
            with contextlib.suppress(
                psutil.NoSuchProcess
            ):  # the launcher ends a rank as soon as another has died
                process.kill()
    if victims == "everything":
        job.process.kill()
    began = time.monotonic()
    done = job.end(60)
    assert done.returncode != 0, done.stdout
    assert time.monotonic() - began < 20  # a hang is the bug; the launchers take 0.4 to 3 s here
    return bool(list(job.folder.glob("checkpoints/.*.partial")))


def stopped_in_a_save(job: Job, root: psutil.Process) -> bool:
    """Looks whether rank 0 is saving; if so, it is stopped before it can finish, else it goes on."""
    partial = (job.folder / "checkpoints").glob(".*.partial")
    if not list(partial):
        return False
    root.send_signal(signal.SIGSTOP)
    time.sleep(0.01)  # it has come to a halt
    if list((job.folder / "checkpoints").glob(".*.partial")):
        return True
    root.send_signal(signal.SIGCONT)
    return False


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_run_bit_for_bit(
    data, undisturbed, tmp_path
):
    """kill -9 of a rank or of everything: while the job starts, at random moments between steps,
    and inside saves.
    """
    folder, chance, halves = tmp_path / "run", random.Random(SEED), 0
    moments = ["save", "save", "start", "step", "step", "step"]
    chance.shuffle(moments)
    for moment in moments:
        first = max(saved_steps(folder), default=0)
        resume = ["--resume"] if (folder / "config.json").exists() else []
        with Job(data, 2, folder, EVERY_STEP, *resume) as job:
            half = killed(job, chance, first, moment)
        assert half or moment != "save"
        halves += half
        for path in saved(folder):
            checkpoint_file.load(path)  # what has its name is whole
    with Job(data, 2, folder, EVERY_STEP, "--resume") as job:
        succeeded(job.end())
    assert halves >= 2
    assert len(saved(folder)) == STEPS * EPOCHS
    check_same_run(folder, undisturbed)


# Preemption


def preempted(
    data: str,
    size: int,
    folder: Path,
    recipe: RecipeFlags,
    fault: Fault,
    *options: str,
    launcher: str = "mpirun",
) -> int:
    """A rank, or the LAUNCHER, gets a signal once a step's line is written: the step after which
    the run left.

    mpirun leaves with the ranks' 75; horovodrun --gloo with 1 and an error of its own that names
    the 75.
    """
    with Job(data, size, folder, recipe, *options, fault=fault, launcher=launcher) as job:
        job.wait_for_line("step", int(fault.when))
        began = time.monotonic()
        done = job.end(60)
    text = done.stdout
    assert done.returncode == (1 if launcher == "gloo" else 75), text
    assert (
        time.monotonic() - began < 20
    )  # it takes one or two steps, a save and the launcher's 1 to 3 s
    sentence, step = the_line(text, "preempted: "), saved_steps(folder)[-1]
    assert f"after step {step}:" in sentence
    assert str(saved(folder)[-1]) in sentence
    assert "--resume" in sentence
    assert "error: " not in text
    assert text.count("Traceback") == (1 if launcher == "gloo" else 0), text
    assert launcher != "gloo" or "Exit code: 75" in text, text
    return step


def test_a_run_told_to_leave_all_the_time_leaves_all_the_same(data, tmp_path):
    """Schedulers signal more than once, launchers pass on what the ranks got too, and not all ranks
    get it at once.
    """
    with Job(data, 2, tmp_path / "run", TINY) as job:
        ranks = job.wait_for_ranks()
        job.wait_for_line("step", 3)
        end = time.monotonic() + 60
        while job.process.poll() is None and time.monotonic() < end:
            for process in ranks.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        done = job.end(0)
    assert done.returncode == 75, done.stdout
    assert "preempted: told to leave after step" in done.stdout


@pytest.fixture(scope="session")
def thrice_preempted(tmp_path_factory, data, undisturbed) -> Path:
    """Left after 11 steps, in the middle of an epoch; saved only at epochs' ends and when told to
    leave.

    The wish goes with the next step and is heard with the step after that, or at the epoch's end.
    """
    folder = tmp_path_factory.mktemp("runs") / "preempted"
    told = faults.told_to_leave(signal.SIGTERM, rank=0, step=3)
    assert preempted(data, 2, folder, TINY, told) == 4
    told = faults.told_to_leave(signal.SIGTERM, rank=1, step=6)
    assert preempted(data, 2, folder, TINY, told, "--resume", launcher="gloo") == 8
    told = faults.told_to_leave(signal.SIGUSR1, rank=1, step=9)
    assert preempted(data, 2, folder, TINY, told, "--resume") == 11
    return folder


@pytest.mark.slow
def test_a_preempted_run_is_the_undisturbed_run_bit_for_bit(
    data, undisturbed, thrice_preempted, tmp_path
):
    """SIGTERM and SIGUSR1 to one rank, or to mpirun, which forwards the latter; in mid-epoch and,
    once more here, during an evaluation: the line of step 12 is written before it, and the run
    leaves only after it.
    """
    folder = shutil.copytree(thrice_preempted, tmp_path / "run")
    told = faults.told_to_leave(signal.SIGUSR1, faults.LAUNCHER, step=3 * STEPS)
    assert preempted(data, 2, folder, TINY, told, "--resume") == 3 * STEPS + 2
    assert series(folder, "epoch", "epoch") == [1, 2, 3]
    with Job(data, 2, folder, TINY, "--resume") as job:
        succeeded(job.end())
    check_same_run(folder, undisturbed)


def test_a_signal_while_the_job_starts_is_heeded_after_the_first_steps(data, tmp_path):
    """As soon as the program can hear it at all: while TensorFlow is still being imported, say."""
    folder = tmp_path / "run"
    with Job(data, 2, folder, TINY) as job:
        rank = job.wait_for_ranks()[1]
        job.wait_until(lambda: hears(rank, signal.SIGUSR1))
        rank.send_signal(signal.SIGUSR1)
        done = job.end()
    assert done.returncode == 75, done.stdout
    assert saved_steps(folder) == [2]


def hears(process: psutil.Process, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


# Another number of ranks


def deviation(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of two states, relative to the largest value of its tensor, or to
    1e-6: velocities whose terms cancel are smaller and nothing but roundings.
    """
    assert one.keys() == other.keys()
    sizes = {
        name: max(np.abs(value).max(), 1e-6)
        for name, value in one.items()
        if value.dtype.kind == "f"
    }
    return max(float(np.abs(one[name] - other[name]).max() / size) for name, size in sizes.items())


def loss_deviation(one: Path, other: Path) -> float:
    """The largest relative difference of two runs' losses; they have the same lines."""
    mine, theirs = figures(one), figures(other)
    assert [(a["kind"], a["step"]) for a in mine] == [(b["kind"], b["step"]) for b in theirs]
    pairs = [
        (a[name], b[name])
        for a, b in zip(mine, theirs, strict=True)
        for name in ("loss", "eval_loss")
        if name in a
    ]
    return max(abs(a / b - 1) for a, b in pairs)


def lost_epoch(folder: Path) -> float:
    """The relative difference of the last two evaluations' losses."""
    *_, before, last = series(folder, "epoch", "eval_loss")
    return abs(before / last - 1)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_ranks(data, undisturbed, alone, thrice_preempted, tmp_path):
    """2 → 1 in mid-epoch: as near to the run on two ranks as the run on one is; a lost step is not
    that near.
    """
    folder = shutil.copytree(thrice_preempted, tmp_path / "run")
    with Job(data, 1, folder, TINY, "--resume") as job:
        succeeded(job.end())
    found = {
        "alone": deviation(state(undisturbed), state(alone)),
        "resumed": deviation(state(undisturbed), state(folder)),
        "lost step": deviation(state(undisturbed), state(undisturbed, back=2)),
        "alone, losses": loss_deviation(undisturbed, alone),
        "resumed, losses": loss_deviation(undisturbed, folder),
        "lost epoch, losses": lost_epoch(undisturbed),
    }
    assert (
        found["alone"] < WEIGHTS_BOUND and found["resumed"] < WEIGHTS_BOUND < found["lost step"]
    ), found
    assert (
        max(found["alone, losses"], found["resumed, losses"])
        < LOSSES_BOUND
        < found["lost epoch, losses"]
    ), found


@pytest.mark.slow
def test_a_run_goes_on_with_one_rank_and_then_with_two(data, undisturbed_four, tmp_path):
    """4 → 1 → 2, the four workers' places in the middle of an epoch; a lost step is not that near."""
    folder = tmp_path / "run"
    told = faults.told_to_leave(signal.SIGUSR1, rank=3, step=3)
    assert preempted(data, 4, folder, NATIVE, told) == 4
    told = faults.told_to_leave(signal.SIGTERM, rank=0, step=9)
    assert preempted(data, 1, folder, NATIVE, told, "--resume") == 11
    with Job(data, 2, folder, NATIVE, "--resume") as job:
        succeeded(job.end())
    found = {
        "resumed": deviation(state(undisturbed_four), state(folder)),
        "lost step": deviation(state(undisturbed_four), state(undisturbed_four, back=2)),
        "losses": loss_deviation(undisturbed_four, folder),
        "lost epoch, losses": lost_epoch(undisturbed_four),
    }
    assert found["resumed"] < NATIVE_WEIGHTS_BOUND < found["lost step"], found
    assert found["losses"] < LOSSES_BOUND < found["lost epoch, losses"], found


# Agreement


NANS = {  # recipe, where
    "tensorflow": (FOUR, {"launcher": "mpirun"}),
    "keras-torch": (FOUR, {"launcher": "gloo", "backend": "torch"}),
    "native": (NATIVE, {"launcher": "mpirun"}),
}


@pytest.mark.parametrize("framework", NANS)
def test_a_loss_that_is_nan_on_one_worker_stops_all_ranks_with_its_examples(
    data, tmp_path, framework
):
    worker, step = 3, 6  # the second worker of rank 1, in the second epoch
    recipe, where = NANS[framework]
    fault = faults.nan_loss(worker, step)
    with Job(data, 2, tmp_path / "run", recipe, fault=fault, **where) as job:
        done = job.end()
    assert done.returncode == 1, done.stdout
    order = permutation(112, seed=0, epoch=1)
    examples = (
        Epoch(112, k=4, n=8, remainder="short").indices(order, step - 1 - STEPS, worker).tolist()
    )
    sentence = the_line(done.stdout, "error: the loss")
    assert f"the loss is nan at step {step}, in epoch 1, on worker {worker}:" in sentence
    assert sentence.endswith(f"the training examples {', '.join(map(str, examples))}")
    assert "Traceback" not in sentence


FAILURES = {
    "error": (faults.error, "error: rank 1 of 2: ValueError: made to fail"),
    "unreadable": (faults.unreadable_example, "can't be read: Bad file descriptor"),
}


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_rank_that_fails_at_a_step_ends_the_job_with_its_message(
    data, tmp_path, failure, launcher
):
    """No hang, though the other rank waits for it in an allreduce."""
    folder = tmp_path / "run"
    fails, says = FAILURES[failure]
    fault = fails(rank=1, step=3)
    with Job(data, 2, folder, EVERY_STEP, fault=fault, launcher=launcher, backend="torch") as job:
        job.wait_until((folder / "checkpoints/step-00000002.npz").exists)
        began = time.monotonic()
        done = job.end(60)
        assert time.monotonic() - began < 20
    assert done.returncode == 1, done.stdout
    assert "error: rank 1" in the_line(done.stdout, says)
    assert saved_steps(folder) == [1, 2]


# Damage


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def test_every_bit_and_every_length_of_a_checkpoint_counts(tmp_path):
    whole = checkpoint.save(tmp_path, 1, {"a": np.float32(0.5)}, {}, 1).read_bytes()
    path = tmp_path / "step-00000002.npz"
    path.write_bytes(whole)
    assert checkpoint_file.load(path)[0] == {"a": 0.5}
    flipped = (
        whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :]
        for i in range(len(whole))
        for bit in range(8)
    )
    lengths = [whole[:length] for length in range(len(whole))]
    for content in [*lengths, whole + b"\0", *flipped]:
        path.write_bytes(content)
        with pytest.raises(RunError, match="is damaged"):
            checkpoint_file.load(path)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(
    data, undisturbed, tmp_path
):
    folder = cut(undisturbed, tmp_path / "run", 7)
    newest = saved(folder)[-1]
    flip_a_bit(newest)
    with Job(data, 2, folder, EVERY_STEP, "--resume") as job:
        warning = the_line(succeeded(job.end()), "warning: ")
    assert warning.startswith("warning: ")
    assert str(newest) in warning and "falling back" in warning
    check_same_run(folder, undisturbed)


def test_a_run_of_which_all_checkpoints_are_damaged_is_not_begun_anew(
    data, undisturbed_four, tmp_path
):
    folder = cut(undisturbed_four, tmp_path / "run", 3)
    for path in saved(folder):
        flip_a_bit(path)
    before = {path: path.read_bytes() for path in [*saved(folder), folder / runlog.METRICS]}
    with Job(data, 2, folder, NATIVE, "--resume") as job:
        refused(job.end(), 1, str(folder / "checkpoints"), "is whole")
    assert {path: path.read_bytes() for path in before} == before


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@needs_root
def test_a_disk_that_fills_up_in_mid_run_ends_it_with_a_sentence_and_whole_checkpoints(
    data, undisturbed_four, tmp_path
):
    """Room for about four checkpoints of sixteen."""
    room = 4 * saved(undisturbed_four)[0].stat().st_size + 40_000
    with mounted(tmp_path / "disk", room) as disk:
        folder = disk / "run"
        with Job(data, 2, folder, NATIVE_EVERY_STEP) as job:
            refused(job.end(), 1, "cannot write", "No space left on device")
        assert not list(folder.rglob("*.partial"))
        assert 2 <= len(saved(folder)) <= 5
        for path in saved(folder):
            expected = checkpoint_file.load(undisturbed_four / "checkpoints" / path.name)
            assert digest(checkpoint_file.load(path)[0]) == digest(expected[0])


@needs_root
def test_a_full_disk_costs_a_resumed_run_none_of_its_files(undisturbed, tmp_path):
    recipe = runlog.read_recipe(undisturbed)
    with mounted(tmp_path / "disk", 1_000_000) as disk:
        folder = cut(undisturbed, disk / "run", 3)
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        with contextlib.suppress(OSError), (disk / "others").open("wb") as file:
            file.write(bytes(2_000_000))
        with pytest.raises(UsageError, match="No space left on device"):
            runlog.begin_run(folder, recipe, [])
        assert {
            path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()
        } == before


@needs_root
def test_a_run_directory_on_a_read_only_disk_is_one_sentence(data, undisturbed_four, tmp_path):
    with mounted(tmp_path / "disk", 8_000_000) as disk:
        folder = cut(undisturbed_four, disk / "run", 3)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with Job(data, 2, folder, NATIVE, "--resume") as job:
            refused(job.end(), 2, str(folder), "Read-only file system")


# Another recipe


def test_a_changed_recipe_is_refused_with_its_fields(undisturbed_four):
    changed = FOUR.but(momentum=0.8, seed=5, log_every=7).value
    with pytest.raises(UsageError) as raised:
        check_directory(undisturbed_four, changed, Mode.YES)
    assert "config.optimizer.momentum=0.8 (was 0.9)" in str(raised.value)
    assert "config.seed=5 (was 0)" in str(raised.value)
    assert "--resume=force" in str(raised.value)
    assert "log_every" not in str(raised.value)


def test_another_momentum_goes_on_by_force(data, undisturbed_four, tmp_path):
    folder = cut(undisturbed_four, tmp_path / "run", 6)
    with Job(data, 1, folder, NATIVE.but(momentum=0.8), "--resume=force") as job:
        succeeded(job.end())
    assert series(folder, "step", "step") == list(range(3, STEPS * EPOCHS + 1, 3))
    assert runlog.read_recipe(folder).optimizer.momentum == 0.8
    assert deviation(state(undisturbed_four), state(folder)) > NATIVE_WEIGHTS_BOUND


WIDER = TINY.but(k=2, n=32, framework="torch")  # a minibatch of 64: two steps an epoch


def test_another_minibatch_is_refused_within_an_epoch_and_the_run_can_go_on(
    data, undisturbed_four, tmp_path
):
    """Also by force: the epoch's examples that are left can't be divided as they were."""
    folder = cut(undisturbed_four, tmp_path / "run", 2 * STEPS + 2)
    with Job(data, 2, folder, WIDER, "--resume=force") as job:
        refused(job.end(), 2, "2 steps into an epoch of 4 steps", "2:", "an epoch's end")
    check_directory(folder, NATIVE.value, Mode.YES)  # the old recipe is still the run's


def test_another_minibatch_goes_on_by_force_at_an_epochs_end(data, undisturbed_four, tmp_path):
    """Three epochs of four steps and one of two: the old checkpoint of 12 steps isn't the newest
    for that.
    """
    folder = cut(undisturbed_four, tmp_path / "run", 3 * STEPS)
    with Job(data, 1, folder, WIDER.but(checkpoint_steps=1), "--resume=force") as job:
        succeeded(job.end())
    assert series(folder, "epoch", "epoch") == [1, 2, 3, 4]
    found = checkpoint_file.load(saved(folder)[-1])[1]
    assert (found["epochs"], found["steps_per_epoch"]) == (4, 2)
