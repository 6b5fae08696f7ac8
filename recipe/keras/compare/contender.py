"""One of two processes of a contender: it trains as a row says and leaves a report in a file.

Run as a program (contender.py CONTENDER ROW FOLDER), so that only our own contender imports
recipe.keras.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from expected import BATCH, MOMENTUM, RATE, examples  # beside this program

CONTENDER, ROW, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "RANK", "TASK")  # mpirun's, torchrun's, ours
BATCHES = 8
EPOCHS = 4
STOP, LOSS = 1, 2  # the epoch after which one rank stops; the step in which one is lost


class Keras:
    """Keras's own data parallelism, on PyTorch."""

    def __init__(self) -> None:
        keras.distribution.initialize()
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(auto_shard_dataset=False)
        )
        import torch.distributed

        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        self.scope = contextlib.nullcontext
        self.first: list[keras.callbacks.Callback] = []

    def optimizer(self, optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
        return optimizer

    def backup(self) -> keras.callbacks.Callback:
        return keras.callbacks.BackupAndRestore(str(FOLDER / f"backup{self.rank}" / "state"))

    def data(self, x: np.ndarray, y: np.ndarray) -> dict:
        return {"x": x, "y": y, "batch_size": BATCH}


class Mirrored(Keras):
    """tf.distribute.MultiWorkerMirroredStrategy with Keras's fit."""

    def __init__(self) -> None:
        import tensorflow as tf

        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        resolver = self.strategy.cluster_resolver
        self.rank = resolver.task_id or 0
        self.size = self.strategy.num_replicas_in_sync
        self.scope = self.strategy.scope
        self.first = []

    def data(self, x: np.ndarray, y: np.ndarray) -> dict:
        """Return each rank's own data. The strategy divides a batch by the number of ranks."""
        import tensorflow as tf

        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH * self.size)
        return {"x": batches.with_options(options)}


class Horovod(Keras):
    """Horovod's own layer for Keras."""

    def __init__(self) -> None:
        import horovod.tensorflow.keras as hvd

        hvd.init()
        self.hvd, self.rank, self.size = hvd, hvd.rank(), hvd.size()
        self.scope = contextlib.nullcontext
        self.first = [
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.MetricAverageCallback(),
        ]

    def optimizer(self, optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
        return self.hvd.DistributedOptimizer(optimizer)


class Ours(Keras):
    """recipe.keras."""

    def __init__(self) -> None:
        import recipe.keras as hvd

        hvd.init(step_timeout=10)
        self.hvd, self.rank, self.size = hvd, hvd.rank(), hvd.size()
        self.scope = contextlib.nullcontext
        self.first = [hvd.callbacks.BroadcastState(), hvd.callbacks.MetricSums()]

    def optimizer(self, optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
        return self.hvd.DistributedOptimizer(optimizer)

    def backup(self) -> keras.callbacks.Callback:
        return self.hvd.callbacks.BackupAndRestore(FOLDER / "backup")


CONTENDERS: dict[str, type[Keras]] = {
    "keras": Keras,
    "mirrored": Mirrored,
    "horovod": Horovod,
    "ours": Ours,
}


class OwnStep(keras.Sequential):
    """The training step that Keras's guide shows for the backend."""

    def train_step(self, data: tuple) -> dict:
        x, y = data
        with_torch = keras.backend.backend() == "torch"
        loss = self._torch_step(x, y) if with_torch else self._tensorflow_step(x, y)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
        return {metric.name: metric.result() for metric in self.metrics}

    def _tensorflow_step(self, x: Any, y: Any) -> Any:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        return loss

    def _torch_step(self, x: Any, y: Any) -> Any:
        import torch

        predicted = self(x, training=True)
        self.zero_grad()
        loss = self.compute_loss(y=y, y_pred=predicted)
        loss.backward()
        gradients = [v.value.grad for v in self.trainable_weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_weights)
        return loss.detach()


class Largest(keras.metrics.Metric):
    """The largest target: a metric whose state is no sum."""

    def __init__(self, name: str = "largest") -> None:
        super().__init__(name=name)
        self.seen = self.add_variable((), "zeros", name="seen")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.seen.assign(keras.ops.maximum(self.seen, keras.ops.max(y_true)))

    def result(self) -> Any:
        return keras.ops.convert_to_tensor(self.seen)


class On(keras.callbacks.Callback):
    """Calls a function after each step, or each epoch."""

    def __init__(self, step: Callable | None = None, epoch: Callable | None = None) -> None:
        super().__init__()
        self._step, self._epoch = step, epoch
        self.epochs: list[int] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if self._step:
            self._step(self.model, batch)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.epochs.append(epoch)
        if self._epoch:
            self._epoch(self.model, epoch)


def fit(
    way: Keras,
    *callbacks: keras.callbacks.Callback,
    kind: type = keras.Sequential,
    batches: int = BATCHES,
    **options: Any,
) -> dict:
    """Train a linear model from zeros on this rank's examples, and return the report."""
    # The model starts at zero, so that its weights can be calculated.
    epochs = options.pop("epochs", 1)
    with way.scope():
        linear = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        model = kind([keras.Input((4,)), linear])
        optimizer = way.optimizer(keras.optimizers.SGD(RATE, momentum=MOMENTUM))
        model.compile(optimizer, "mse", jit_compile=False, **options)
    (FOLDER / f"began{way.rank}").touch()

    # Without shuffling, so that each rank's examples are known.
    counter = On()
    history = model.fit(
        **way.data(*examples(way.rank, batches)),
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[*way.first, *callbacks, counter],
    )

    # What the judges read.
    weights = np.ravel(keras.ops.convert_to_numpy(model.trainable_weights[0].value))
    return {"weights": weights.tolist(), "epochs": counter.epochs, "logs": history.history}


def own_step(way: Keras) -> dict:
    return fit(way, kind=OwnStep)


def early(way: Keras) -> dict:
    return fit(way, batches=BATCHES - 2 * way.rank)


def metric(way: Keras) -> dict:
    return fit(way, metrics=[Largest()])


def deciding(way: Keras) -> dict:
    """Stop by a callback on rank 1, as EarlyStopping does by this rank's own numbers."""

    def stop(model: keras.Model, epoch: int) -> None:
        model.stop_training = model.stop_training or (way.rank == 1 and epoch == STOP)

    return fit(way, On(epoch=stop), epochs=EPOCHS)


def resuming(way: Keras) -> dict:
    """End on all ranks after two epochs, and start again in the same processes with new models."""

    def interrupt(model: keras.Model, epoch: int) -> None:
        if epoch == STOP:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        fit(way, way.backup(), On(epoch=interrupt), epochs=EPOCHS)
    return fit(way, way.backup(), epochs=EPOCHS)


def lost(way: Keras) -> dict:
    def kill(model: keras.Model, batch: int) -> None:
        if way.rank == 1 and batch == LOSS:
            os.kill(os.getpid(), signal.SIGKILL)

    return fit(way, On(step=kill), epochs=EPOCHS)


def mpirun(way: Keras) -> dict:
    return fit(way) | {"size": way.size}


class CountBuckets(keras.callbacks.Callback):
    """Notes when Keras's DistributedDataParallel hands over a bucket of gradients to be reduced.

    PyTorch calls its hook as soon as the bucket's last gradient is ready.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_last: list[bool] = []  # of each bucket: backprop ends with it

    def on_train_begin(self, logs: dict | None = None) -> None:
        import torch
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(
            group: Any, bucket: torch.distributed.GradBucket
        ) -> torch.futures.Future[torch.Tensor]:
            self.is_last.append(bucket.is_last())
            return allreduce_hook(group, bucket)

        self.model.ddp_model.register_comm_hook(None, hook)


def overlap(way: Keras) -> dict:
    """Count buckets whose reduction begins before backprop's end, in three steps of 12 layers."""
    layers = [keras.layers.Dense(1024) for _ in range(12)]
    model = keras.Sequential([keras.Input((1024,)), *layers])
    model.compile(way.optimizer(keras.optimizers.SGD(1e-4)), "mse", jit_compile=False)
    (FOLDER / f"began{way.rank}").touch()
    x = np.ones((3 * BATCH, 1024), np.float32)
    counter = CountBuckets()
    model.fit(x, x, batch_size=BATCH, verbose=0, callbacks=[counter])
    return {"before": counter.is_last.count(False), "buckets": len(counter.is_last)}


@contextlib.contextmanager
def error_reported(rank: int) -> Iterator[None]:
    """Leave an error in a file and raise it again, so that the process ends."""
    try:
        yield
    except Exception as error:
        words = str(error).strip().splitlines()
        (FOLDER / f"error{rank}").write_text(f"{type(error).__name__}: {words[0] if words else ''}")
        raise


ROWS: dict[str, Callable[[Keras], dict]] = {
    "own_step": own_step,
    "early": early,
    "metric": metric,
    "deciding": deciding,
    "resuming": resuming,
    "lost": lost,
    "mpirun": mpirun,
    "overlap": overlap,
}


def main() -> None:
    numbers = [os.environ[name] for name in RANK_VARIABLES if os.environ.get(name)]
    number = int(numbers[0]) if numbers else 0
    with error_reported(number):
        way = CONTENDERS[CONTENDER]()
        report = ROWS[ROW](way)
    (FOLDER / f"report{number}").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
