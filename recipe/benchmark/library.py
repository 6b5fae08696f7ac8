"""What DistributedOptimizer costs per step, when gradients are reduced, and what comparing the replicas costs:
`python -m recipe.benchmark.library`.

Prints, on one rank, the times of a training step with the wrapped optimizer, with one that makes Horovod's bare calls
and with the plain one, taken in turns. On two ranks: from Horovod's timeline, which part of the allreduces began before
the last gradient was ready; what the ranks' agreement in `fit` adds to a step; and the time of a replica check as a
fraction of a step of the `quick` recipe.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np

import recipe.keras as hvd
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
STEPS, TURNS = 20, 9
PAUSE = 200  # ms between the steps of the timeline, by which they are told apart


def main() -> None:
    if len(sys.argv) > 1:
        hvd.init()
        record_timeline(sys.argv[1])
        compare_agreement()
        compare_replicas()
        return
    hvd.init()
    print(
        f"{keras.backend.backend()}, {LAYERS} dense layers of {WIDTH}, batch {BATCH}, one rank; ms per step"
    )
    times = cost()
    for name, found in times.items():
        print(
            f"{name:8} median {statistics.median(found):6.2f}   from {min(found):6.2f} to {max(found):6.2f}"
        )
    for other in ("bare", "plain"):
        ratios = [w / o for w, o in zip(times["wrapped"], times[other], strict=True)]
        print(
            f"wrapped/{other:6} median {statistics.median(ratios):.3f}   from {min(ratios):.3f} to {max(ratios):.3f}   "
            f"of the fastest turns {min(times['wrapped']) / min(times[other]):.3f}"
        )
    if hvd.is_initialized():
        hvd.shutdown()
    print(overlap())


class Bare(keras.optimizers.SGD):
    """The least that averaging costs: Horovod's own calls, and nothing around them."""

    def apply(self, grads: list, trainable_variables: list | None = None) -> None:
        horovod = backend.horovod
        if backend.FRAMEWORK == "torch":
            started = [horovod.allreduce_async_(g, name=f"bare.{i}") for i, g in enumerate(grads)]
            averaged = [horovod.synchronize(handle) for handle in started]
        else:
            averaged = [horovod.allreduce(g, name=f"bare.{i}") for i, g in enumerate(grads)]
        super().apply(averaged, trainable_variables)


def cost() -> dict[str, list[float]]:
    """Milliseconds per step in TURNS turns of STEPS steps each: plain, with Horovod's bare calls, wrapped."""
    steppers = {
        "plain": stepper(keras.optimizers.SGD(0.01, 0.9)),
        "bare": stepper(Bare(0.01, 0.9)),
        "wrapped": stepper(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, 0.9))),
    }
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for step in steppers.values():
        step()  # traced
    for _ in range(TURNS):
        for name, step in steppers.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            times[name].append((time.perf_counter() - began) / STEPS * 1000)
    return times


def stepper(optimizer: keras.optimizers.Optimizer) -> Callable[[], object]:
    """A function that trains one step of a network on one fixed batch."""
    layers = [keras.layers.Dense(WIDTH, activation="relu") for _ in range(LAYERS)]
    model = keras.Sequential([keras.Input((WIDTH,)), *layers])
    model.compile(optimizer, "mse", jit_compile=False)
    x = np.random.default_rng(0).normal(size=(BATCH, WIDTH)).astype(np.float32)
    return lambda: model.train_on_batch(x, x)


def record_timeline(path: str) -> None:
    """Run on each of two ranks: a few steps on a larger batch, rank 0 writing Horovod's timeline."""
    global BATCH
    BATCH = 2048  # so that backprop takes long enough to see
    step = stepper(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, 0.9)))
    step()
    hvd.start_timeline(path)
    for _ in range(5):
        step()
        time.sleep(PAUSE / 1000)
    hvd.stop_timeline()


def compare_agreement() -> None:
    """Run on each of two ranks: steps whose gradients travel with the agreement's word, and without it, in turns."""
    global BATCH
    BATCH = 32
    agreement = Agreement()
    optimizers = {
        name: hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, 0.9))
        for name in ("alone", "agreed")
    }
    reduction_of(optimizers["agreed"]).agreement = agreement
    steppers = {name: stepper(optimizer) for name, optimizer in optimizers.items()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for step in steppers.values():
        step()  # traced
    for _ in range(2 * TURNS):
        for name, step in steppers.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
                if name == "agreed":
                    agreement.heard()  # as fit does after each step
            times[name].append((time.perf_counter() - began) / STEPS * 1000)
    if hvd.rank() == 0:
        ratios = [a / b for a, b in zip(times["agreed"], times["alone"], strict=True)]
        print(
            f"two ranks, {2 * TURNS} turns: a step takes {statistics.median(times['alone']):.2f} ms, with the ranks' "
            f"agreement {statistics.median(times['agreed']):.2f} ms; ratio median {statistics.median(ratios):.3f}, "
            f"from {min(ratios):.3f} to {max(ratios):.3f}; of the fastest turns "
            f"{min(times['agreed']) / min(times['alone']):.3f}"
        )


def compare_replicas() -> None:
    """Run on each of two ranks: steps of the `quick` recipe and replica checks, in turns."""
    recipe = replace(quick.RECIPE, data=replace(quick.RECIPE.data, name="synthetic"))
    source = open_source(recipe.data, "train")
    replica = fit.KerasReplica(recipe, source.num_classes)
    replica.begin(steps=1)
    share = Share(range(hvd.rank(), hvd.rank() + 1))
    examples = TrainingExamples(source, recipe, share, binding.cores())
    elements = iter(examples.elements())
    replica.step(0, 0, elements, stop=False)()  # traced
    steps, checks = [], []
    for _ in range(TURNS):
        began = time.perf_counter()
        replica.step(0, 0, elements, stop=False)()
        steps.append(time.perf_counter() - began)
        state.check_replicas(replica.model, moving_statistics(replica.model))
        checks.append(time.perf_counter() - began - steps[-1])
    if hvd.rank() == 0:
        shares = [check / step for check, step in zip(checks, steps, strict=True)]
        size = sum(array.nbytes for array in replica.arrays().values()) / 1e6
        every = recipe.run.replica_check_every
        print(
            f"two ranks, {TURNS} turns: a replica check of {size:.1f} MB takes {statistics.median(checks) * 1000:.1f} "
            f"ms, {statistics.median(shares):.3f} of a step (from {min(shares):.3f} to {max(shares):.3f}); every "
            f"{every} steps, as in quick, that is {statistics.median(shares) / every:.3%} of the time"
        )


def overlap() -> str:
    """Two sentences about two ranks: from their timeline, and what they print."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/timeline.json"
        program = [sys.executable, "-m", "recipe.benchmark.library", path]
        mpirun = str(Path(sys.executable).parent / "mpirun")
        command = [mpirun, "-np", "2", "--oversubscribe", "--bind-to", "none", *program]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            env=os.environ | launched.ANYWHERE | {"HOROVOD_TIMELINE": "DYNAMIC"},
            check=False,
        )
        if done.returncode:
            return (
                f"no timeline: two ranks ended with status {done.returncode}: {done.stdout[-2000:]}"
            )
        return f"{described(steps_of(read_events(path)))}\n{done.stdout.strip()}"


def read_events(path: str) -> list[dict]:
    """The events of a Horovod timeline, which lacks its closing bracket when the run is cut."""
    text = Path(path).read_text().rstrip().rstrip(",")
    return [event for event in json.loads(text if text.endswith("]") else text + "]") if event]


def steps_of(events: list[dict]) -> list[dict[str, tuple[float, float, float]]]:
    """For each step and gradient: when it was ready on rank 0, when its allreduce began and ended, in ms."""
    tensors = {e["pid"]: e["args"]["name"] for e in events if e.get("args", {}).get("name")}
    steps: list[dict] = []
    phases: dict[int, list[tuple[str, float]]] = {}  # begun and not ended, by tensor
    ready: dict[int, float] = {}
    for event in events:
        tensor = event.get("pid")
        if "gradient" not in tensors.get(tensor, "") or event["ph"] not in "BE":
            continue
        at = event["ts"] / 1000
        if event["ph"] == "B":
            phases.setdefault(tensor, []).append((event["name"], at))
            if event["name"].startswith("NEGOTIATE"):
                if not ready or at - max(ready.values()) > PAUSE / 2:
                    steps.append({})
                ready[tensor] = at
        elif (ended := phases[tensor].pop())[0] == "ALLREDUCE":
            steps[-1][tensors[tensor]] = (ready[tensor], ended[1], at)
    return [step for step in steps if step]


def described(steps: list[dict[str, tuple[float, float, float]]]) -> str:
    """How many allreduces began, and ended, before the last gradient of their step was ready."""
    began, ended, total, spans = 0, 0, 0, []
    for step in steps:
        ready = max(times[0] for times in step.values())
        began += sum(times[1] < ready for times in step.values())
        ended += sum(times[2] < ready for times in step.values())
        total += len(step)
        spans.append(ready - min(times[0] for times in step.values()))
    return (
        f"two ranks, {len(steps)} steps: {began} of {total} allreduces began and {ended} ended before the last "
        f"gradient of their step was ready (median {statistics.median(spans):.1f} ms after the first)"
    )


if __name__ == "__main__":
    main()
