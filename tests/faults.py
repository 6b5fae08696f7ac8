"""Faults in a run: what happens, where and when. Tests name them by what happens.

A fault inside a rank is described by a `Fault`, whose `program` trains like recipe.train:

    SMALL.train(run_dir, program=faults.nan_loss(worker=3, step=6).program)

All of them enter where a framework's replica enters the run, `load_framework`. They act in what
every `Replica` does; the two that concern images act in what reads these. Steps count from 1.
"""

import abc
import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from recipe import cli, train
from recipe.config import Recipe
from recipe.data import shared_files
from recipe.data.element import Element
from recipe.data.pipeline import TrainingExamples
from recipe.data.shared_files import Block
from recipe.data.sources import open_source
from recipe.frameworks import replica as frameworks
from recipe.frameworks.replica import Framework, Replica
from recipe.frameworks.vector import StepResult
from recipe.ranks import collectives
from recipe.rules.epoch import Epoch, Share, permutation
from recipe.run import checkpoint
from tests.ranks import environment

Result = Callable[[], StepResult]  # waits for a step, as `Replica.step` says

LAUNCHER = -1  # in the place of a rank: what has started the ranks of rank 0's host


@dataclass(frozen=True)
class Fault:
    """Something that happens once in a run, inside one of its ranks."""

    what: str  # a key of KINDS
    place: int  # a rank, LAUNCHER, or a worker
    when: float  # a step, or seconds

    @property
    def program(self) -> tuple[str, ...]:
        """Python's arguments, before those of recipe.train, that train with this fault."""
        return "-m", "tests.faults", self.what, str(self.place), str(self.when)


def nan_loss(worker: int, step: int) -> Fault:
    """Make the loss of a worker NaN at a step."""
    return Fault("nan-loss", worker, step)


def error(rank: int, step: int) -> Fault:
    """Make a rank raise an exception that nobody expects, at a step."""
    return Fault("error", rank, step)


def unreadable_example(rank: int, step: int) -> Fault:
    """Make a rank fail to read the first example of its first worker in a step."""
    return Fault("unreadable-example", rank, step)


def told_to_leave(number: signal.Signals, rank: int, step: int) -> Fault:
    """Send a rank, or the LAUNCHER, a signal when a step is done, before the next one begins."""
    return Fault(number.name, rank, step)


def late_images(rank: int, seconds: float) -> Fault:
    """Make each of a rank's elements come so late."""
    return Fault("late-images", rank, seconds)


# Faults from outside of the ranks


def kill_last_rank(words: list[str], run: Path, after_step: int, **variables: str) -> str:
    """Start a job of two ranks, kill the last when a checkpoint is there, and return the output.

    Check that the job then fails, and soon.
    """
    job = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**variables),
    )
    try:
        ranks = _two_ranks(job, run / f"checkpoints/{checkpoint.name_of(after_step)}")
        max(ranks, key=lambda process: process.pid).kill()
        began = time.monotonic()
        printed = job.communicate(timeout=60)[0]
        # A hang is the bug. The launchers take 0.4 to 3 s here.
        assert time.monotonic() - began < 20
        assert job.returncode != 0
        return printed
    finally:
        job.kill()


def _two_ranks(job: subprocess.Popen, saved: Path) -> list[psutil.Process]:
    """Return a job's two ranks as soon as there is this checkpoint.

    They are looked for before there is haste: when it is there the run ends in half a second.
    """
    deadline = time.monotonic() + 120
    ranks: list[psutil.Process] = []
    while len(ranks) < 2 or not saved.exists():
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
        time.sleep(0.01)
        if len(ranks) < 2:
            with contextlib.suppress(psutil.Error):
                processes = psutil.Process(job.pid).children(recursive=True)
                ranks = [
                    process for process in processes if "recipe.train" in process.cmdline()[1:3]
                ]
    return ranks


# Faults inside a rank


class FaultyReplica(abc.ABC):
    """A replica to which something happens at one step. In all else it is the one it is given."""

    def __init__(self, replica: Replica, fault: Fault) -> None:
        self.replica, self.fault = replica, fault
        self._epoch = self._steps_per_epoch = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replica, name)

    def begin(self, steps: int) -> None:
        self._steps_per_epoch = steps
        self.replica.begin(steps)

    def begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self.replica.begin_epoch(epoch)

    def step(self, step: int, elements: Iterator[Element], stop: bool) -> Result:
        number = self._epoch * self._steps_per_epoch + step + 1
        if number == self.fault.when:
            return self.faulty_step(step, elements, stop)
        return self.replica.step(step, elements, stop)

    @abc.abstractmethod
    def faulty_step(self, step: int, elements: Iterator[Element], stop: bool) -> Result:
        """Do the step at which it happens."""


class FailingReplica(FaultyReplica):
    """It raises an error at a step."""

    def faulty_step(self, step: int, elements: Iterator[Element], stop: bool) -> Result:
        raise ValueError("made to fail")


class SignalledReplica(FaultyReplica):
    """Its process, or the one that has started it, gets a signal when a step's result is read."""

    def faulty_step(self, step: int, elements: Iterator[Element], stop: bool) -> Result:
        result = self.replica.step(step, elements, stop)

        def result_and_signal() -> StepResult:
            process = os.getppid() if self.fault.place == LAUNCHER else os.getpid()
            send(signal.Signals[self.fault.what], process)
            return result()

        return result_and_signal


def send(number: signal.Signals, process: int) -> None:
    """Send a signal to a process, and return when this one has received it."""
    received, written = socket.socketpair()
    with received, written:
        written.setblocking(False)
        old = signal.set_wakeup_fd(written.fileno())
        os.kill(process, number)
        while number not in received.recv(1):
            pass
        signal.set_wakeup_fd(old)


class NanReplica(FaultyReplica):
    """The logits of one of its passes are NaN at a step."""

    def __init__(self, replica: Replica, fault: Fault, recipe: Recipe, share: Share) -> None:
        super().__init__(replica, fault)
        self._pass = share.workers.index(fault.place) // share.workers_at_once
        self._set_addend = added_to_logits(replica, recipe.framework)

    def faulty_step(self, step: int, elements: Iterator[Element], stop: bool) -> Result:
        result = self.replica.step(step, self._spoilt(elements), stop)
        self._set_addend(0.0)
        return result

    def _spoilt(self, elements: Iterator[Element]) -> Iterator[Element]:
        """Yield the elements. A pass begins when its element is drawn."""
        for forward_pass, element in enumerate(elements):
            self._set_addend(np.nan if forward_pass == self._pass else 0.0)
            yield element


def added_to_logits(replica: Any, framework: str) -> Callable[[float], object]:
    """Add a number to all logits of a replica's network, and return what sets it. It is 0 first."""
    if framework == "torch":
        import torch

        addend = torch.zeros(())
        replica.network.register_forward_hook(lambda module, inputs, logits: logits + addend)
        return addend.fill_

    import keras

    variable = keras.Variable(0.0, trainable=False)
    replica.model.get_layer("fc").activation = lambda logits: logits + variable
    return variable.assign


def with_nan_loss(fault: Fault, replica: Replica, recipe: Recipe) -> Replica:
    share = Share.of(recipe, collectives.rank(), collectives.size())
    is_here = fault.place in share.workers
    return NanReplica(replica, fault, recipe, share) if is_here else replica


def with_error(fault: Fault, replica: Replica, recipe: Recipe) -> Replica:
    return FailingReplica(replica, fault) if collectives.rank() == fault.place else replica


def with_signal(fault: Fault, replica: Replica, recipe: Recipe) -> Replica:
    is_here = collectives.rank() == max(fault.place, 0)
    return SignalledReplica(replica, fault) if is_here else replica


def with_unreadable_example(fault: Fault, replica: Replica, recipe: Recipe) -> Replica:
    """Let the read of an example's bytes fail, as of a file that is no longer open."""
    unreadable, read_at = _first_place(recipe, int(fault.when)), shared_files.read_at

    def read_or_fail(path: str, descriptor: int, start: int, count: int) -> Block:
        if (path, start) == unreadable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return read_at(path, descriptor, start, count)

    if collectives.rank() == fault.place:
        shared_files.read_at = read_or_fail
    return replica


def _first_place(recipe: Recipe, step: int) -> tuple[str, int]:
    """Return the file and the byte of the first example that this rank reads for a step."""
    source = open_source(recipe.data, "train", recipe.seed)
    epoch = Epoch.of(recipe, len(source))
    epoch_number, step_in_epoch = divmod(step - 1, epoch.steps)
    order = permutation(len(source), recipe.seed, epoch_number, recipe.data.shuffle_block)
    worker = Share.of(recipe, collectives.rank(), collectives.size()).workers[0]
    name = source.where(int(epoch.indices(order, step_in_epoch, worker)[0]))
    place = re.search(r"\(byte (\d+) of (.*)\)$", name)
    assert place, name
    return place[2], int(place[1])


def with_late_images(fault: Fault, replica: Replica, recipe: Recipe) -> Replica:
    elements = TrainingExamples.elements

    def late(examples: TrainingExamples, first_step: int = 0) -> Iterator[Element]:
        for element in elements(examples, first_step):
            time.sleep(fault.when)
            yield element

    if collectives.rank() == fault.place:
        TrainingExamples.elements = late
    return replica


KINDS: dict[str, Callable[[Fault, Replica, Recipe], Replica]] = {
    "nan-loss": with_nan_loss,
    "error": with_error,
    "unreadable-example": with_unreadable_example,
    "late-images": with_late_images,
    "SIGTERM": with_signal,
    "SIGUSR1": with_signal,
}


@dataclass(frozen=True)
class FaultyFramework:
    """A framework to whose replicas a fault happens."""

    framework: Framework
    fault: Fault

    def start(self, deterministic: bool = False) -> None:
        self.framework.start(deterministic)

    def make_replica(self, recipe: Recipe, num_classes: int) -> Replica:
        replica = self.framework.make_replica(recipe, num_classes)
        return KINDS[self.fault.what](self.fault, replica, recipe)


def install(fault: Fault) -> None:
    """Let the fault happen to the run of this process."""
    load_framework = frameworks.load_framework
    frameworks.load_framework = lambda name: FaultyFramework(load_framework(name), fault)


def main(argv: list[str]) -> None:
    what, place, when, *arguments = argv
    install(Fault(what, int(place), float(when)))
    train.main(arguments)


if __name__ == "__main__":
    cli.run(main, train.VALUES)
