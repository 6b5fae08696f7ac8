"""recipe.train with one fault: interruption_program.py FAULT PLACE STEP, then recipe.train's own
arguments.

FAULT at step STEP, counted from 1: "nan", in Keras, or "native nan": the loss of worker PLACE is
NaN; "error": rank PLACE raises an ordinary exception; "unreadable": rank PLACE can't read an
example of its first worker; "SIGTERM" or "SIGUSR1": rank PLACE, or for -1 rank 0's launcher, gets
the signal when the line of the step is written.
"""

import os
import signal
import time
from typing import Any

import numpy as np
from keras import ops

from recipe import cli, train
from recipe.data.sources import TFDSSource
from recipe.ranks import collectives
from recipe.ranks.preemption import Notice
from recipe.rules.epoch import Epoch, Share, permutation
from recipe.run.loop import Loop
from recipe.run.record import Record
from recipe.system import watchdog


def make_nan(worker: int, step: int) -> None:
    from recipe.frameworks.keras.step import Step  # a process has one of Horovod's bindings only

    sums_of_workers = Step.sums_of_workers

    def sums_or_nan(self: Step, first_worker: Any, values: Any) -> Any:
        """In the traced step the condition is a tensor."""
        now = ops.equal(ops.cast(self.model.optimizer.iterations, "int32"), step - 1)
        here = ops.equal(ops.convert_to_tensor(first_worker, "int32"), worker)
        values = ops.where(ops.logical_and(now, here), np.float32("nan"), values)
        return sums_of_workers(self, first_worker, values)

    Step.sums_of_workers = sums_or_nan


def make_native_nan(worker: int, step: int) -> None:
    from recipe.frameworks.torch.step import Step

    backward, calls = Step.backward, []

    def backward_or_nan(self: Step, first_worker: int, *element: Any) -> None:
        backward(self, first_worker, *element)
        if first_worker == worker:
            calls.append(None)
            if len(calls) == step:
                self.vector[self.layout.losses_of(worker, 1)] = np.nan

    Step.backward = backward_or_nan


def fail(step: int) -> None:
    from recipe.frameworks.keras.step import Step

    call, calls = Step.__call__, []

    def step_or_fail(self: Step, *arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == step:
            raise ValueError("made to fail")
        return call(self, *arguments)

    Step.__call__ = step_or_fail


def make_unreadable(example: int) -> None:
    """The file of this example is no longer open when it is read."""
    whole = TFDSSource._record

    def read(self: TFDSSource, i: int) -> bytes:
        return os.pread(-1, 1, 0) if i == example else whole(self, i)

    TFDSSource._record = read


def tell(number: signal.Signals, place: int, step: int) -> None:
    """A signal from inside comes at the same moment every time."""
    run, write_line, notices = Loop.run, Record.write_line, []

    def run_with_known_notice(self: Loop, notice: Notice) -> list[float]:
        notices.append(notice)
        return run(self, notice)

    def write_line_and_signal(self: Record, rate: float) -> None:
        write_line(self, rate)
        if self.state.step == step and collectives.rank() == max(place, 0):
            os.kill(os.getpid() if place >= 0 else os.getppid(), number)
            while not notices[0].received:
                time.sleep(0.001)

    Loop.run, Record.write_line = run_with_known_notice, write_line_and_signal


def first_example(argv: list[str], rank: int, size: int, step: int) -> int:
    """Return the first example that a rank reads for a step of the first epoch."""
    recipe = cli.parse_recipe(argv)[0]
    examples = recipe.data.train_examples
    order = permutation(examples, recipe.seed, 0)
    worker = Share.of(recipe, rank, size).workers[0]
    return int(Epoch.of(recipe, examples).indices(order, step - 1, worker)[0])


def main(argv: list[str]) -> None:
    fault, place, step = argv[0], int(argv[1]), int(argv[2])
    rank = int(watchdog.launched_rank())
    size = next(
        int(os.environ[name])
        for name in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE")
        if name in os.environ
    )
    if fault == "nan":
        make_nan(place, step)
    elif fault == "native nan":
        make_native_nan(place, step)
    elif fault == "error" and rank == place:
        fail(step)
    elif fault == "unreadable" and rank == place:
        make_unreadable(first_example(argv[3:], rank, size, step))
    elif fault.startswith("SIG"):
        tell(signal.Signals[fault], place, step)
    train.main(argv[3:])


if __name__ == "__main__":
    cli.run(main, train.VALUES)
