"""recipe.train with one fault: interruption_program.py FAULT PLACE STEP, then recipe.train's own arguments.

FAULT at step STEP, counted from 1: "nan", in Keras, or "native nan": the loss of worker PLACE is NaN; "error": rank
PLACE raises an ordinary exception; "unreadable": rank PLACE can't read an example of its first worker; "SIGTERM" or
"SIGUSR1": rank PLACE, or for -1 rank 0's launcher, gets the signal when the line of the step is written."""

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
from recipe.rules import sharding
from recipe.run import loop
from recipe.system import watchdog


def make_nan(worker: int, step: int) -> None:
    from recipe.frameworks.keras.step import Step  # a process has one of Horovod's bindings only

    placed = Step._placed

    def place(self: Step, first: Any, values: Any) -> Any:
        """In the traced step the condition is a tensor."""
        now = ops.equal(ops.cast(self.model.optimizer.iterations, "int32"), step - 1)
        here = ops.equal(ops.convert_to_tensor(first, "int32"), worker)
        return placed(self, first, ops.where(ops.logical_and(now, here), np.float32("nan"), values))

    Step._placed = place


def make_native_nan(worker: int, step: int) -> None:
    from recipe.frameworks.torch.step import Step

    backward, calls = Step._backward, []

    def placed(self: Step, first: int, *element: Any) -> None:
        backward(self, first, *element)
        calls.extend([first] * (first == worker))
        if first == worker and len(calls) == step:
            self._vector[len(self.moving) + worker] = np.nan

    Step._backward = placed


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
    run, write, notices = loop.Loop.run, loop.Loop._write_line, []

    def run_or_leave(self: loop.Loop, notice: Notice) -> list[float]:
        notices.append(notice)
        return run(self, notice)

    def write_and_tell(self: loop.Loop) -> None:
        write(self)
        if self.stands.step == step and collectives.rank() == max(place, 0):
            os.kill(os.getpid() if place >= 0 else os.getppid(), number)
            while not notices[0].received:
                time.sleep(0.001)

    loop.Loop.run, loop.Loop._write_line = run_or_leave, write_and_tell


def first_example(argv: list[str], rank: int, size: int, step: int) -> int:
    """That a rank reads for a step of the first epoch."""
    recipe = cli.parse_recipe(argv)[0]
    order = sharding.permutation(recipe.data.train_examples, recipe.seed, 0)
    worker = sharding.own_workers(recipe.k, rank, size)[0]
    return int(sharding.worker_indices(order, step - 1, worker, recipe.k, recipe.n)[0])


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
