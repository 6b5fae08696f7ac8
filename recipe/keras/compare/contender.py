"""One of two processes of a contender: trains as a row of the comparison says, and leaves what it found in a file.

Run as a program (contender.py CONTENDER ROW FOLDER), so that only our own contender imports recipe.keras.
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

        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.scope = contextlib.nullcontext
        self.first: list = []

    def optimizer(self, optimizer: Any) -> Any:
        return optimizer

    def backup(self) -> Any:
        return keras.callbacks.BackupAndRestore(str(FOLDER / f"backup{self.rank}" / "state"))

    def data(self, x: np.ndarray, y: np.ndarray) -> dict:
        return {"x": x, "y": y, "batch_size": BATCH}


class Mirrored(Keras):
    """tf.distribute.MultiWorkerMirroredStrategy with Keras's fit."""

    def __init__(self) -> None:
        import tensorflow as tf

        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        resolver = self.strategy.cluster_resolver
        self.rank, self.size = resolver.task_id or 0, self.strategy.num_replicas_in_sync
        self.scope = self.strategy.scope
        self.first = []

    def data(self, x: np.ndarray, y: np.ndarray) -> dict:
        """Each rank's own data; the strategy divides a batch by the number of ranks."""
        import tensorflow as tf

        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        return {
            "x": tf.data.Dataset.from_tensor_slices((x, y))
            .batch(BATCH * self.size)
            .with_options(options)
        }


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

    def optimizer(self, optimizer: Any) -> Any:
        return self.hvd.DistributedOptimizer(optimizer)


class Ours(Keras):
    def __init__(self) -> None:
        import recipe.keras as hvd

        hvd.init(step_timeout=10)
        self.hvd, self.rank, self.size = hvd, hvd.rank(), hvd.size()
        self.scope = contextlib.nullcontext
        self.first = [hvd.callbacks.BroadcastState(), hvd.callbacks.MetricSums()]

    def optimizer(self, optimizer: Any) -> Any:
        return self.hvd.DistributedOptimizer(optimizer)

    def backup(self) -> Any:
        return self.hvd.callbacks.BackupAndRestore(FOLDER / "backup")


CONTENDERS: dict[str, type] = {
    "keras": Keras,
    "mirrored": Mirrored,
    "horovod": Horovod,
    "ours": Ours,
}


class OwnStep(keras.Sequential):
    """The training step that Keras's guide shows for the backend."""

    def train_step(self, data: tuple) -> dict:
        x, y = data
        loss = (
            self._torch_step(x, y)
            if keras.backend.backend() == "torch"
            else self._tensorflow_step(x, y)
        )
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
    way: Any, *callbacks: Any, kind: type = keras.Sequential, batches: int = BATCHES, **options: Any
) -> dict:
    """Trains a linear model from zeros on this rank's examples; what became of it."""
    epochs = options.pop("epochs", 1)
    with way.scope():
        model = kind(
            [keras.Input((4,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
        )
        optimizer = way.optimizer(keras.optimizers.SGD(RATE, momentum=MOMENTUM))
        model.compile(optimizer, "mse", jit_compile=False, **options)
    (FOLDER / f"began{way.rank}").touch()
    callbacks = [*way.first, *callbacks, seen := On()]
    data = way.data(*examples(way.rank, batches))
    history = model.fit(
        **data, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks
    ).history
    weights = keras.ops.convert_to_numpy(model.trainable_weights[0].value)
    return {"weights": np.ravel(weights).tolist(), "epochs": seen.epochs, "logs": history}


def own_step(way: Any) -> dict:
    return fit(way, kind=OwnStep)


def early(way: Any) -> dict:
    return fit(way, batches=BATCHES - 2 * way.rank)


def metric(way: Any) -> dict:
    return fit(way, metrics=[Largest()])


def deciding(way: Any) -> dict:
    """A callback on rank 1 stops, as EarlyStopping does by this rank's own numbers."""

    def stop(model: keras.Model, epoch: int) -> None:
        model.stop_training = model.stop_training or (way.rank == 1 and epoch == STOP)

    return fit(way, On(epoch=stop), epochs=EPOCHS)


def resuming(way: Any) -> dict:
    """All ranks end in the third epoch, and are started again in the same processes, with models of their own."""

    def interrupt(model: keras.Model, epoch: int) -> None:
        if epoch == STOP:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        fit(way, way.backup(), On(epoch=interrupt), epochs=EPOCHS)
    return fit(way, way.backup(), epochs=EPOCHS)


def lost(way: Any) -> dict:
    def kill(model: keras.Model, batch: int) -> None:
        if way.rank == 1 and batch == LOSS:
            os.kill(os.getpid(), signal.SIGKILL)

    return fit(way, On(step=kill), epochs=EPOCHS)


def mpirun(way: Any) -> dict:
    return fit(way) | {"size": way.size}


class CountBuckets(keras.callbacks.Callback):
    """Notes when Keras's DistributedDataParallel hands over a bucket of gradients to be reduced; by PyTorch's hook,
    which is called as soon as the bucket's last gradient is ready."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[bool] = []  # of each bucket: is it the one that backprop ends with

    def on_train_begin(self, logs: dict | None = None) -> None:
        import torch
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(
            group: Any, bucket: torch.distributed.GradBucket
        ) -> torch.futures.Future[torch.Tensor]:
            self.last.append(bucket.is_last())
            return allreduce_hook(group, bucket)

        self.model.ddp_model.register_comm_hook(None, hook)


def overlap(way: Any) -> dict:
    """Buckets whose reduction begins before backprop's end: of 12 layers of 1024, in three steps."""
    model = keras.Sequential([keras.Input((1024,)), *[keras.layers.Dense(1024) for _ in range(12)]])
    model.compile(way.optimizer(keras.optimizers.SGD(1e-4)), "mse", jit_compile=False)
    (FOLDER / f"began{way.rank}").touch()
    x = np.ones((3 * BATCH, 1024), np.float32)
    model.fit(x, x, batch_size=BATCH, verbose=0, callbacks=[buckets := CountBuckets()])
    return {"before": buckets.last.count(False), "all": len(buckets.last)}


@contextlib.contextmanager
def reported(rank: int) -> Iterator[None]:
    """An error is what became of it; it goes on, for the other processes' sake."""
    try:
        yield
    except Exception as error:
        words = str(error).strip().splitlines()
        (FOLDER / f"error{rank}").write_text(f"{type(error).__name__}: {words[0] if words else ''}")
        raise


def main() -> None:
    number = int(
        os.environ.get("OMPI_COMM_WORLD_RANK")
        or os.environ.get("RANK")
        or os.environ.get("TASK")
        or 0
    )
    with reported(number):
        way = CONTENDERS[CONTENDER]()
        found = globals()[ROW](way)
    (FOLDER / f"found{number}").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
