"""Run on real ranks by test_resuming.py: trainings that kill themselves and are started again; refusals."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np

import recipe.keras as hvd
from recipe.errors import RunError
from recipe.keras.callbacks import BackupAndRestore, BroadcastState, GradualWarmup, MetricSums
from recipe.system import checkpoint_file
from tests.ranks import report

BATCH, STEPS, EPOCHS = 4, 6, 4
RATE = 0.05


def examples(seed: int = 0) -> tuple:
    """This rank's own."""
    x = (
        np.random.default_rng(10 * seed + hvd.rank())
        .normal(size=(BATCH * STEPS, 5))
        .astype(np.float32)
    )
    return x, np.abs(x.sum(axis=1)).astype(np.int64) % 3


def network(width: int = 8, dropped: float = 0.3) -> keras.Model:
    """Every rank draws other weights, and has other moving statistics."""
    keras.utils.set_random_seed(100 + hvd.rank())
    hidden = [
        keras.layers.Dense(width),
        keras.layers.BatchNormalization(momentum=0.8),
        keras.layers.Dropout(dropped),
    ]
    return keras.Sequential([keras.Input((5,)), *hidden, keras.layers.Dense(3)])


def compiled(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, **options: object
) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        hvd.DistributedOptimizer(optimizer, **options),
        loss,
        metrics=["accuracy"],
        jit_compile=False,
    )
    return model


def sgd() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(RATE, momentum=0.9, nesterov=True)


def models() -> dict:
    """(a model, the arguments of BackupAndRestore). The first is backed up in the middle of its two passes, too."""
    return {
        "batches": lambda: (
            compiled(network(), sgd(), backward_passes_per_step=2),
            {"save_freq": 5},
        ),
        "epochs": lambda: (compiled(network(), sgd()), {"double_checkpoint": True}),
    }


class Logged(keras.callbacks.Callback):
    """Leaves the batches' numbers and the logs of each epoch; lowers η after 1, the warmup's last, and 2."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_epoch_begin(self, epoch, logs=None):
        self.batches = []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append([batch, float(logs["loss"])])

    def on_epoch_end(self, epoch, logs=None):
        with self.path.open("a") as file:
            file.write(
                json.dumps([epoch, {k: float(v) for k, v in logs.items()}, self.batches]) + "\n"
            )
        if epoch in (1, 2):
            self.model.optimizer.learning_rate = 0.01


class Interrupted(keras.callbacks.Callback):
    """Kills this process, or raises, where the plan says."""

    def __init__(self, plan: dict) -> None:
        super().__init__()
        self.plan = plan

    def on_train_batch_end(self, batch, logs=None):
        if hvd.rank() == hvd.size() - 1 and [self.epoch, batch] == self.plan.get("batch"):
            kill()

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_end(self, logs=None):
        if self.plan.get("last") and hvd.rank() == hvd.size() - 1:
            raise RuntimeError("failed in the last callback")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(number: int, place: str) -> None:
    """Rank 0 dies in its save of this number: before the file has a name, or before it is the latest."""
    rename, seen = Path.replace, []

    def replace(path: Path, target: Path) -> Path:
        at = {"next.npz": "unnamed", "latest.npz": "named"}.get(Path(target).name)
        seen.append(at)
        if at == place and seen.count(place) == number:
            kill()
        return rename(path, target)

    Path.replace = replace


def train(folder: Path, kind: str, plan: dict) -> None:
    model, arguments = models()[kind]()
    if "save" in plan and hvd.rank() == 0:
        kill_in_save(*plan["save"])
    history = model.fit(
        *examples(),
        validation_data=examples(1),
        batch_size=BATCH,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[
            BroadcastState(),
            GradualWarmup(RATE / 2, 2, 2),
            MetricSums(),
            Logged(folder / f"{hvd.rank()}.jsonl"),
            Interrupted(plan),
            BackupAndRestore(folder / "backup", **arguments),
        ],
    )
    variables = model.variables + model.optimizer.variables
    report(
        hvd.rank(),
        {"state": [keras.ops.convert_to_numpy(v) for v in variables], "epochs": history.epoch},
    )


def refused(model: keras.Model, folder: Path, **options: object) -> str:
    given = {
        "batch_size": BATCH,
        "shuffle": False,
        "verbose": 0,
        "epochs": 2,
        "steps_per_epoch": STEPS,
    } | options
    try:
        model.fit(*examples(), callbacks=[BackupAndRestore(folder)], **given)
    except (ValueError, RunError) as error:
        return str(error)
    return "nothing"


class Stop(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.place = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.place:
            raise KeyboardInterrupt


def backed_up(folder: Path, place: tuple = (1, 4), **options: object) -> keras.Model:
    """A model whose training was interrupted on all ranks in this epoch and batch."""
    model = compiled(network(), sgd())
    with contextlib.suppress(KeyboardInterrupt):
        callbacks = [
            BroadcastState(),
            MetricSums(),
            Stop(*place),
            BackupAndRestore(folder, **options),
        ]
        model.fit(
            *examples(), batch_size=BATCH, epochs=3, shuffle=False, verbose=0, callbacks=callbacks
        )
    return model


def refusals(folder: Path) -> dict:
    backed_up(folder / "epoch", save_freq="epoch")
    backed_up(folder / "batch", save_freq=4)
    backed_up(folder / "first", (0, 5), save_freq=4)
    if hvd.rank() == 0:
        (folder / "keras").mkdir()
        (folder / "keras/latest.weights.h5").touch()
        (folder / "damaged").mkdir()
        content = bytearray((folder / "epoch/latest.npz").read_bytes())
        content[1000] ^= 1
        (folder / "damaged/latest.npz").write_bytes(content)
        (folder / "foreign").mkdir()
        checkpoint_file.write(folder / "foreign/latest.npz", {"a": np.zeros(3)}, {})
        (folder / "file").touch()
    hvd.broadcast_object(None)
    half = {"steps_per_epoch": STEPS // 2}
    built = {}
    if keras.backend.backend() == "tensorflow":  # with PyTorch, fit() builds the model before
        unbuilt = keras.Sequential([keras.layers.Dense(3)])
        built["no variables yet"] = refused(compiled(unbuilt, sgd()), folder / "unbuilt")
    return built | {
        "keras/latest.weights.h5 is a backup of keras.callbacks": refused(
            compiled(network(), sgd()), folder / "keras"
        ),
        "is damaged": refused(compiled(network(), sgd()), folder / "damaged"),
        "is no backup": refused(compiled(network(), sgd()), folder / "foreign"),
        "(5, 8) float32 where this one has model/0000/sequential/dense/kernel (5, 9)": refused(
            compiled(network(9), sgd()), folder / "epoch"
        ),
        "this one has optimizer/0000/adam/iteration": refused(
            compiled(network(), keras.optimizers.Adam()), folder / "epoch"
        ),
        "after batch 2 of 6, but an epoch now has 3": refused(
            compiled(network(), sgd()), folder / "batch", **half
        ),
        "fit() in epoch 1; leave initial_epoch out": refused(
            compiled(network(), sgd()), folder / "first", initial_epoch=1
        ),
        "cannot write the backup": refused(compiled(network(), sgd()), folder / "file"),
    }


def arguments() -> dict:
    found = {}
    for word, given in {
        "backup_dir=''": {"backup_dir": ""},
        "save_freq=0": {"save_freq": 0},
        "save_freq=False": {"save_freq": False},
        "save_freq='batch'": {"save_freq": "batch"},
    }.items():
        try:
            BackupAndRestore(**({"backup_dir": "somewhere"} | given))
        except ValueError as error:
            found[word] = str(error)
    return found


def in_one_process(folder: Path) -> dict:
    """Interrupted, and gone on with another model of the same kind; then fitted again, from epoch 0."""
    whole = compiled(network(), sgd())
    x, y = examples()
    fit = {"x": x, "y": y, "batch_size": BATCH, "shuffle": False, "verbose": 0}
    whole.fit(**fit, epochs=3, callbacks=[BroadcastState()])
    backed_up(folder / "again", save_freq=4)
    if hvd.rank() == 0:
        (folder / "again/mine.txt").touch()
    model = compiled(network(), sgd())
    # Not in the order that the page asks for: the moving statistics must still be each rank's own.
    callbacks = [BackupAndRestore(folder / "again", save_freq=4), BroadcastState()]
    history = model.fit(**fit, epochs=3, callbacks=callbacks)
    same = all(
        np.array_equal(a, b) for a, b in zip(model.get_weights(), whole.get_weights(), strict=True)
    )
    again = model.fit(**fit, epochs=1, callbacks=callbacks)
    left = sorted(p.name for p in (folder / "again").iterdir())
    return {"same": same, "epochs": history.epoch, "again": again.epoch, "left": left}


def due(folder: Path) -> dict:
    """A backup is due after an epoch's last batch: it must not hold metrics that MetricSums has summed already."""
    found = []
    for interrupted in (False, True):
        if interrupted:
            backed_up(folder / "due", (1, 0), save_freq=3)
        callbacks = [BroadcastState(), MetricSums(), BackupAndRestore(folder / "due", save_freq=3)]
        fit = {
            "batch_size": BATCH,
            "shuffle": False,
            "verbose": 0,
            "epochs": 3,
            "callbacks": callbacks,
        }
        model = compiled(network(), sgd())
        found.append([model.fit(*examples(), **fit).history["loss"], model.get_weights()])
    (whole, weights), (resumed, others) = found
    same = all(np.array_equal(a, b) for a, b in zip(weights, others, strict=True))
    return {"same": same, "losses": [whole[1:], resumed]}


def elastic(folder: Path) -> dict:
    """An epoch that is taken up after two batches trains on the others."""
    found = []
    x, y = examples()
    for fit in (True, False):
        model = compiled(network(dropped=0.0), sgd())
        held = hvd.elastic.KerasState(model, batch=2, epoch=0)
        held.sync()
        if fit:
            update = hvd.elastic.UpdateBatchStateCallback(held)
            model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[update])
        else:
            for i in range(2 * BATCH, len(x), BATCH):
                model.train_on_batch(x[i : i + BATCH], y[i : i + BATCH])
        found.append(model.get_weights())
    return {"weights": found}


def main() -> None:
    hvd.init()
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    folder, kind, plan = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    if kind in models():
        train(folder, kind, plan)
    else:
        parts = {f.__name__: f(folder) for f in (refusals, in_one_process, due, elastic)}
        report(hvd.rank(), parts | {"arguments": arguments()})


if __name__ == "__main__":
    main()
