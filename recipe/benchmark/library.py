"""What recipe.keras costs a training step: `python -m recipe.benchmark.library`.

On one rank: a step with the wrapped optimizer, with one that makes Horovod's bare calls and with
the plain one. On two ranks: which part of the allreduces began before the last gradient was ready,
from Horovod's timeline; what the ranks' agreement in `fit` adds to a step; the time of a replica
check as a fraction of a step of the `quick` recipe. What is compared takes turns.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

import recipe.keras as hvd
from recipe.benchmark import timeline
from recipe.configs import quick
from recipe.data.pipeline import TrainingExamples
from recipe.data.sources import open_source
from recipe.frameworks.keras import replica as fit
from recipe.frameworks.keras.step import moving_statistics
from recipe.keras import backend, state
from recipe.keras.agreement import Agreement
from recipe.keras.distributed import reduction_of
from recipe.ranks import binding, launched
from recipe.rules.epoch import Share

BATCH, WIDTH, LAYERS = 32, 256, 12
LARGE_BATCH = 2048  # so that backprop takes long enough to see
STEPS, TURNS = 20, 9

Stepper = Callable[[], object]  # trains one step
Times = dict[str, list[float]]  # milliseconds a step in each turn, by what was measured


class Spread(NamedTuple):
    """What is printed of the values of several turns."""

    median: float
    least: float
    most: float


def main() -> None:
    hvd.init()
    if len(sys.argv) > 1:  # one of two ranks, started by `overlap`
        record_timeline(sys.argv[1])
        compare_agreement()
        compare_replicas()
        return
    compare_optimizers()
    if hvd.is_initialized():
        hvd.shutdown()
    print(overlap())


class Bare(keras.optimizers.SGD):
    """The least that averaging costs: Horovod's own calls, and nothing around them."""

    def apply(self, grads: list, trainable_variables: list | None = None) -> None:
        horovod = backend.horovod
        named = [(gradient, f"bare.{i}") for i, gradient in enumerate(grads)]
        if backend.FRAMEWORK == "torch":
            handles = [horovod.allreduce_async_(gradient, name=name) for gradient, name in named]
            averaged = [horovod.synchronize(handle) for handle in handles]
        else:
            averaged = [horovod.allreduce(gradient, name=name) for gradient, name in named]
        super().apply(averaged, trainable_variables)


def compare_optimizers() -> None:
    """Print the times of a step with each optimizer, on one rank."""
    print(
        f"{keras.backend.backend()}, {LAYERS} dense layers of {WIDTH}, batch {BATCH}, one rank; "
        "ms per step"
    )
    # Measure in turns: what disturbs the machine disturbs all.
    steppers = {
        "plain": stepper(keras.optimizers.SGD(0.01, 0.9)),
        "bare": stepper(Bare(0.01, 0.9)),
        "wrapped": stepper(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, 0.9))),
    }
    times = times_in_turns(steppers, TURNS)

    # Times, then their ratios of the same turn.
    for name, of_turns in times.items():
        ms = spread_of(of_turns)
        print(f"{name:8} median {ms.median:6.2f}   from {ms.least:6.2f} to {ms.most:6.2f}")
    for other in ("bare", "plain"):
        ratio = spread_of(ratios_of(times, "wrapped", other))
        fastest = min(times["wrapped"]) / min(times[other])
        print(
            f"wrapped/{other:6} median {ratio.median:.3f}   "
            f"from {ratio.least:.3f} to {ratio.most:.3f}   "
            f"of the fastest turns {fastest:.3f}"
        )


def times_in_turns(steppers: dict[str, Stepper], turns: int) -> Times:
    """Time STEPS steps of each in every turn."""
    times: Times = {name: [] for name in steppers}
    for step in steppers.values():
        step()  # traced
    for _ in range(turns):
        for name, step in steppers.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            seconds = time.perf_counter() - began
            times[name].append(seconds / STEPS * 1000)
    return times


def spread_of(values: list[float]) -> Spread:
    """Return the median and the range of values."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios_of(times: Times, one: str, other: str) -> list[float]:
    """Return the ratio of two times in each turn."""
    return [a / b for a, b in zip(times[one], times[other], strict=True)]


def stepper(optimizer: keras.optimizers.Optimizer, batch: int = BATCH) -> Stepper:
    """Return a function that trains one step of a network on one fixed batch."""
    layers = [keras.layers.Dense(WIDTH, activation="relu") for _ in range(LAYERS)]
    model = keras.Sequential([keras.Input((WIDTH,)), *layers])
    model.compile(optimizer, "mse", jit_compile=False)
    x = np.random.default_rng(0).normal(size=(batch, WIDTH)).astype(np.float32)
    return lambda: model.train_on_batch(x, x)


def record_timeline(path: str) -> None:
    """Do a few steps on a larger batch, while rank 0 writes Horovod's timeline. On two ranks."""
    step = stepper(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, 0.9)), LARGE_BATCH)
    step()
    hvd.start_timeline(path)
    for _ in range(5):
        step()
        time.sleep(timeline.PAUSE / 1000)
    hvd.stop_timeline()


def compare_agreement() -> None:
    """Print what it costs that the agreement's word travels with the gradients. On two ranks."""
    # Two equal optimizers, one of which sends the word.
    agreement = Agreement()
    alone = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, 0.9))
    agreed = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, 0.9))
    reduction = reduction_of(agreed)
    assert reduction is not None
    reduction.agreement = agreement
    train_agreed = stepper(agreed)

    def step_agreed() -> None:
        train_agreed()
        agreement.words()  # as fit does after each step

    # Both in turns, on both ranks.
    times = times_in_turns({"alone": stepper(alone), "agreed": step_agreed}, 2 * TURNS)
    if hvd.rank() != 0:
        return

    # Rank 0 prints.
    ms_alone = statistics.median(times["alone"])
    ms_agreed = statistics.median(times["agreed"])
    ratio = spread_of(ratios_of(times, "agreed", "alone"))
    fastest = min(times["agreed"]) / min(times["alone"])
    print(
        f"two ranks, {2 * TURNS} turns: a step takes {ms_alone:.2f} ms, "
        f"with the ranks' agreement {ms_agreed:.2f} ms; "
        f"ratio median {ratio.median:.3f}, from {ratio.least:.3f} to {ratio.most:.3f}; "
        f"of the fastest turns {fastest:.3f}"
    )


def compare_replicas() -> None:
    """Print the time of a replica check as a fraction of a step of `quick`. On two ranks."""
    # A replica of `quick` on made-up images, traced before anything is timed.
    recipe = replace(quick.RECIPE, data=replace(quick.RECIPE.data, name="synthetic"))
    source = open_source(recipe.data, "train")
    replica = fit.KerasReplica(recipe, source.num_classes)
    replica.begin(steps=1)
    replica.begin_epoch(0)
    own_worker = Share(range(hvd.rank(), hvd.rank() + 1))
    examples = TrainingExamples(source, recipe, own_worker, binding.cores())
    elements = iter(examples.elements())
    replica.step(0, elements, stop=False)()  # traced

    # A step and a check in each turn.
    checks, shares = [], []
    for _ in range(TURNS):
        began = time.perf_counter()
        replica.step(0, elements, stop=False)()
        stepped = time.perf_counter()
        state.check_replicas(replica.model, moving_statistics(replica.model))
        checked = time.perf_counter()
        checks.append(checked - stepped)
        shares.append((checked - stepped) / (stepped - began))
    if hvd.rank() != 0:
        return

    # Rank 0 says what a check costs of a step, and of a run.
    megabytes = sum(array.nbytes for array in replica.arrays().values()) / 1e6
    ms = statistics.median(checks) * 1000
    share = spread_of(shares)
    every = recipe.run.replica_check_every
    print(
        f"two ranks, {TURNS} turns: a replica check of {megabytes:.1f} MB takes {ms:.1f} ms, "
        f"{share.median:.3f} of a step (from {share.least:.3f} to {share.most:.3f}); "
        f"every {every} steps, as in quick, that is {share.median / every:.3%} of the time"
    )


def overlap() -> str:
    """Run two ranks and return what their timeline says and what they print."""
    with tempfile.TemporaryDirectory() as folder:
        # Two ranks write a timeline while they print their own times.
        path = f"{folder}/timeline.json"
        program = [sys.executable, "-m", "recipe.benchmark.library", path]
        mpirun = str(Path(sys.executable).parent / "mpirun")
        ranks = subprocess.run(
            [mpirun, "-np", "2", "--oversubscribe", "--bind-to", "none", *program],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            env=os.environ | launched.ANYWHERE | {"HOROVOD_TIMELINE": "DYNAMIC"},
            check=False,
        )

        # Read what they left.
        if ranks.returncode:
            return (
                f"no timeline: two ranks ended with status {ranks.returncode}: "
                f"{ranks.stdout[-2000:]}"
            )
        steps = timeline.steps_of(timeline.read_events(path))
        return f"{timeline.described(steps)}\n{ranks.stdout.strip()}"


if __name__ == "__main__":
    main()
