"""Trains a recipe with Keras: `model.fit` with the recipe's callbacks, the same on every rank."""

import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import keras
import numpy as np

from recipe import checkpoint, collectives, runlog, sharding
from recipe.config import Recipe
from recipe.data.pipeline import eval_batches, train_batches
from recipe.data.sources import open_source, prepare
from recipe.errors import RunError, UsageError
from recipe.keras import backend, resnet, state
from recipe.keras.callbacks import BroadcastState, ReplicaCheck, ScheduledRate
from recipe.keras.distributed import DistributedOptimizer
from recipe.metrics import Sums
from recipe.progress import Progress
from recipe.schedule import recipe_rate

EVAL_BATCH = 256  # examples at a time in evaluation; without effect on the result


def start() -> None:
    """Horovod, and this rank's share of the machine: one GPU, or its part of the CPU's cores."""
    binding = collectives.init(backend.FRAMEWORK)
    cores = (os.cpu_count() or 1) // binding.local_size()
    threads = max(1, min(cores, len(os.sched_getaffinity(0))))
    backend.use_local_device(binding.local_rank(), threads)


def train(recipe: Recipe, run_dir: Path, resume: bool) -> list[float]:
    """Runs the recipe on all ranks; collective. Returns the top-1 error of each evaluated epoch, oldest first.

    Raises UsageError or RunError on every rank."""
    _check_size(recipe)
    source, evaluation = open_data(recipe)
    steps = sharding.steps_per_epoch(len(source), recipe.k, recipe.n, recipe.data.remainder)
    model = compiled_model(recipe, source.num_classes)
    hosts = collectives.gather(socket.gethostname(), "hosts")
    collectives.on_root(lambda: runlog.open_run(run_dir, recipe, hosts, resume), "open_run")
    epoch, errors = collectives.on_root(lambda: _restore(model, run_dir) if resume else (0, []), "restore")
    if epoch == recipe.epochs:
        return errors
    recorder = Recorder(recipe, run_dir, steps, epoch) if collectives.rank() == 0 else None
    model.fit(
        train_batches(source, recipe, [collectives.rank()], first_step=epoch * steps),
        epochs=recipe.epochs,
        initial_epoch=epoch,
        steps_per_epoch=steps,
        shuffle=False,  # the order is the recipe's
        verbose=0,
        callbacks=[
            BroadcastState(),
            ScheduledRate(recipe_rate(recipe)),
            *([ReplicaCheck(recipe.run.replica_check_every)] if recipe.run.replica_check_every else []),
            StepFigures(recipe, recorder),
            EpochEnd(recipe, run_dir, evaluation, recorder, errors),
        ],
    )
    return errors


def open_data(recipe: Recipe) -> tuple:
    """The training and the evaluation examples; rank 0 prepares them first where they are not. Collective."""
    collectives.on_root(lambda: prepare(recipe.data), "prepare")
    return collectives.agreed(
        lambda: (
            open_source(recipe.data, "train", recipe.seed),
            open_source(recipe.data, "eval", recipe.seed),
        ),
        "open_data",
    )


def compiled_model(recipe: Recipe, num_classes: int) -> keras.Model:
    """The network with its loss, its metrics and its distributed optimizer."""
    model = resnet.build(recipe, num_classes)
    settings = recipe.optimizer
    optimizer = keras.optimizers.SGD(settings.base_rate, settings.momentum, settings.nesterov)
    if recipe.model.precision == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(
        optimizer=DistributedOptimizer(optimizer, compression=getattr(backend.Compression, settings.compression)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="cross_entropy"),
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        ],
        weighted_metrics=[],  # the weights of short minibatches are for the gradient only
        jit_compile=False,  # Horovod's operations can't be part of an XLA cluster
        auto_scale_loss=False,
    )
    return model


def evaluate(model: keras.Model, recipe: Recipe, source: object) -> Sums:
    """Cross-entropy and top-1 error over the whole evaluation set, every example exactly once. Collective.

    `model` must have moving statistics that are averaged over ranks."""
    mine = sharding.eval_indices(len(source), collectives.rank(), collectives.size())
    sums = Sums()
    for images, labels in eval_batches(source, recipe, mine, EVAL_BATCH):
        sums.add(model.predict_on_batch(images), np.asarray(labels))
    return sums.over_ranks("evaluate")


def evaluate_run(recipe: Recipe, run_dir: Path) -> Sums:
    """Evaluates the newest checkpoint of a run, on as many ranks as there are. Collective."""
    evaluation = open_data(recipe)[1]
    model = compiled_model(recipe, evaluation.num_classes)
    collectives.on_root(lambda: _load(model, checkpoint.latest(run_dir / "checkpoints")), "restore")
    state.broadcast_state(model)
    return evaluate(model, recipe, evaluation)


class Recorder:
    """What rank 0 tells: progress on the terminal, figures in the run directory."""

    def __init__(self, recipe: Recipe, run_dir: Path, steps: int, epoch: int) -> None:
        self.log = runlog.RunLog(run_dir, epoch * steps)
        self.progress = Progress(recipe.epochs * steps, steps, epoch * steps)


class StepFigures(keras.callbacks.Callback):
    """Every log_every steps: loss, error and images/s of all ranks since the last line. Stops the run on NaN."""

    def __init__(self, recipe: Recipe, recorder: Recorder | None) -> None:
        super().__init__()
        self.recipe, self.recorder = recipe, recorder
        self._epoch = 0
        self._sums, self._time = Sums(), time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch = epoch
        self._sums, self._time = Sums(), time.monotonic()  # Keras has just reset its metrics

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        step = self._epoch * self.params["steps"] + batch + 1
        if self.recorder:
            self.recorder.progress.step(step)
        if step % self.recipe.run.log_every == 0:
            self._line(step)

    def _line(self, step: int) -> None:
        sums, now = training_sums(self.model), time.monotonic()
        since = sums - self._sums
        figures = {
            "epoch": step / self.params["steps"],
            "loss": since.mean_loss,
            "error": since.error,
            "rate": rate_of(self.model),
            "images_per_second": since.count / (now - self._time),
        }
        self._sums, self._time = sums, now
        check_finite(figures["loss"], step)
        if self.recorder:
            self.recorder.log.write("step", step, figures)
            self.recorder.progress.line(step, figures)


class EpochEnd(keras.callbacks.Callback):
    """After each epoch: average the moving statistics, evaluate, write the figures and the checkpoint.

    Appends the top-1 error of each evaluation to `errors`."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, evaluation: object, recorder: Recorder | None, errors: list[float]
    ) -> None:
        super().__init__()
        self.recipe, self.run_dir, self.evaluation, self.recorder = recipe, run_dir, evaluation, recorder
        self.errors = errors
        self._began = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._began = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        finished, seconds = epoch + 1, time.monotonic() - self._began
        step = finished * self.params["steps"]
        training = training_sums(self.model)
        check_finite(training.mean_loss, step)
        state.average_moving_statistics(self.model)
        figures = {
            "epoch": finished,
            "loss": training.mean_loss,
            "error": training.error,
            "rate": rate_of(self.model),
            "images_per_second": training.count / seconds,
            **(self._evaluate() if self._due(finished) else {}),
        }
        # Rank 0's disk is full: all ranks hear of it, and stop.
        collectives.on_root(lambda: self._write(finished, step, figures), "epoch_end")

    def on_train_end(self, logs: dict | None = None) -> None:
        if self.recorder:
            self.recorder.log.close()
            self.recorder.progress.close()

    def _evaluate(self) -> dict[str, float]:
        sums = evaluate(self.model, self.recipe, self.evaluation)
        self.errors.append(sums.error)
        return {"eval_loss": sums.mean_loss, "eval_error": sums.error, "eval_examples": int(sums.count)}

    def _due(self, finished: int) -> bool:
        """The result is the median of the last five epochs, so that these always count."""
        return finished % self.recipe.run.eval_every == 0 or finished > self.recipe.epochs - 5

    def _write(self, finished: int, step: int, figures: dict[str, float]) -> None:
        run, last = self.recipe.run, finished == self.recipe.epochs
        self.recorder.log.write("epoch", step, figures)
        evaluated = f"  evaluation error {figures['eval_error']:.2%}" if "eval_error" in figures else ""
        self.recorder.progress.say(
            f"epoch {finished} of {self.recipe.epochs}: training error {figures['error']:.2%}{evaluated}  "
            f"{figures['images_per_second']:,.0f} images/s"
        )
        if last or finished % run.checkpoint_every == 0:
            checkpoint.save(
                self.run_dir / "checkpoints",
                finished,
                state.to_arrays(self.model),
                {"epoch": finished, "step": step, "errors": self.errors},
                run.keep_checkpoints,
            )


def training_sums(model: keras.Model) -> Sums:
    """Cross-entropy and hits of all ranks since the epoch began. Collective."""
    metrics = {m.name: m for m in _leaves(model.metrics)}
    loss, accuracy = metrics["cross_entropy"], metrics["accuracy"]
    values = [loss.total, accuracy.total, accuracy.count]
    return Sums(*(float(keras.ops.convert_to_numpy(v)) for v in values)).over_ranks("training_sums")


def rate_of(model: keras.Model) -> float:
    """η of the step just done."""
    return float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))


def check_finite(loss: float, step: int) -> None:
    """Raises RunError when the loss of all ranks is not a number, which all ranks see in the same step."""
    if not np.isfinite(loss):
        raise RunError(
            f"the loss is {loss} at step {step}: training has diverged; lower config.optimizer.base_rate or lengthen "
            "config.schedule.warmup_epochs",
            everywhere=True,
        )


def _leaves(metrics: Iterable) -> Iterable:
    """Keras wraps the metrics given to compile() in one of its own."""
    for metric in metrics:
        yield from _leaves(metric.metrics) if getattr(metric, "metrics", None) else (metric,)


def _restore(model: keras.Model, run_dir: Path) -> tuple[int, list[float]]:
    """(finished epochs, their errors) of a run, its newest checkpoint loaded on this rank; BroadcastState brings it to
    the others. A run that ended before its first checkpoint begins anew."""
    if not checkpoint.checkpoints(run_dir / "checkpoints"):
        return 0, []
    meta = _load(model, checkpoint.latest(run_dir / "checkpoints"))
    return meta["epoch"], meta["errors"]


def _load(model: keras.Model, path: Path) -> dict:
    arrays, meta = checkpoint.load(path)
    state.from_arrays(model, arrays)
    return meta


def _check_size(recipe: Recipe) -> None:
    if recipe.k != collectives.size():
        raise UsageError(
            f"config.k={recipe.k} workers need {recipe.k} ranks, and this run has {collectives.size()}: start it with "
            f"-np {recipe.k}, or set --config.k={collectives.size()}, which changes the minibatch and with it kη",
            everywhere=True,
        )
