"""The trainings of test_resuming.py, on real ranks: they kill themselves and are started again."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

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
    """Return this rank's own examples."""
    generator = np.random.default_rng(10 * seed + hvd.rank())
    x = generator.normal(size=(BATCH * STEPS, 5)).astype(np.float32)
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


class Kind(NamedTuple):
    """A kind of training that is backed up."""

    optimizer_options: dict
    backup_options: dict


KINDS = {
    # Backed up in the middle of its two passes, too.
    "batches": Kind({"backward_passes_per_step": 2}, {"save_freq": 5}),
    "epochs": Kind({}, {"double_checkpoint": True}),
}


class Logged(keras.callbacks.Callback):
    """Leaves epochs' batches and logs in a file. Lowers η after epochs 1 (warmup) and 2."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_epoch_begin(self, epoch, logs=None):
        self.batches = []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append([batch, float(logs["loss"])])

    def on_epoch_end(self, epoch, logs=None):
        numbers = {name: float(value) for name, value in logs.items()}
        line = {"epoch": epoch, "logs": numbers, "batches": self.batches}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
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
    """Kill rank 0 in its save of this number: before the file has a name or is the latest."""
    rename = Path.replace
    target_name = {"unnamed": "next.npz", "named": "latest.npz"}[place]
    saves = 0

    def replace(path: Path, target: Path) -> Path:
        nonlocal saves
        if Path(target).name == target_name:
            saves += 1
            if saves == number:
                kill()
        return rename(path, target)

    Path.replace = replace


def train(folder: Path, kind: str, plan: dict) -> None:
    optimizer_options, backup_options = KINDS[kind]
    model = compiled(network(), sgd(), **optimizer_options)
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
            BackupAndRestore(folder / "backup", **backup_options),
        ],
    )
    variables = model.variables + model.optimizer.variables
    state = [keras.ops.convert_to_numpy(v) for v in variables]
    report(hvd.rank(), {"state": state, "epochs": history.epoch})


def refusal(
    folder: Path,
    model: keras.Model | None = None,
    optimizer: keras.optimizers.Optimizer | None = None,
    **options: object,
) -> str:
    """Train with the backups in the folder, and return the error."""
    model = network() if model is None else model
    model = compiled(model, sgd() if optimizer is None else optimizer)
    defaults = {"batch_size": BATCH, "epochs": 2, "steps_per_epoch": STEPS}
    options = defaults | options
    callbacks = [BackupAndRestore(folder)]
    try:
        model.fit(*examples(), shuffle=False, verbose=0, callbacks=callbacks, **options)
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
    """Return a model whose training was interrupted on all ranks in this epoch and batch."""
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
    built = {}
    if keras.backend.backend() == "tensorflow":  # with PyTorch, fit() builds the model before
        unbuilt = keras.Sequential([keras.layers.Dense(3)])
        built["no variables yet"] = refusal(folder / "unbuilt", unbuilt)
    other_width = "(5, 8) float32 where this one has model/0000/sequential/dense/kernel (5, 9)"
    return built | {
        "keras/latest.weights.h5 is a backup of keras.callbacks": refusal(folder / "keras"),
        "is damaged": refusal(folder / "damaged"),
        "is no backup": refusal(folder / "foreign"),
        other_width: refusal(folder / "epoch", network(9)),
        "this one has optimizer/0000/adam/iteration": refusal(
            folder / "epoch", optimizer=keras.optimizers.Adam()
        ),
        "after batch 2 of 6, but an epoch now has 3": refusal(
            folder / "batch", steps_per_epoch=STEPS // 2
        ),
        "fit() in epoch 1; leave initial_epoch out": refusal(folder / "first", initial_epoch=1),
        "cannot write the backup": refusal(folder / "file"),
    }


def arguments() -> dict:
    """Return the errors of wrong arguments, by the words that each must have."""
    wrong = {
        "backup_dir=''": {"backup_dir": ""},
        "save_freq=0": {"save_freq": 0},
        "save_freq=False": {"save_freq": False},
        "save_freq='batch'": {"save_freq": "batch"},
    }
    errors = {}
    for words, options in wrong.items():
        try:
            BackupAndRestore(**({"backup_dir": "somewhere"} | options))
        except ValueError as error:
            errors[words] = str(error)
    return errors


def in_one_process(folder: Path) -> dict:
    """Interrupt, go on with another model of the same kind, then fit again from epoch 0."""
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
    same = same_arrays(model.get_weights(), whole.get_weights())
    again = model.fit(**fit, epochs=1, callbacks=callbacks)
    left = sorted(p.name for p in (folder / "again").iterdir())
    return {"same": same, "epochs": history.epoch, "again": again.epoch, "left": left}


def due(folder: Path) -> dict:
    """Make a backup due after an epoch's last batch.

    It must not hold metrics that MetricSums has summed already.
    """
    losses, weights = {}, {}
    for start in ("whole", "resumed"):
        if start == "resumed":
            backed_up(folder / "due", (1, 0), save_freq=3)
        callbacks = [BroadcastState(), MetricSums(), BackupAndRestore(folder / "due", save_freq=3)]
        model = compiled(network(), sgd())
        history = model.fit(
            *examples(),
            batch_size=BATCH,
            shuffle=False,
            verbose=0,
            epochs=3,
            callbacks=callbacks,
        )
        losses[start] = history.history["loss"]
        weights[start] = model.get_weights()
    same = same_arrays(weights["whole"], weights["resumed"])
    return {"same": same, "losses": [losses["whole"][1:], losses["resumed"]]}


def same_arrays(some: list, others: list) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def elastic(folder: Path) -> dict:
    """Take up an epoch after two batches, by fit and by a loop over the others."""
    weights = []
    x, y = examples()
    for fit in (True, False):
        model = compiled(network(dropped=0.0), sgd())
        state = hvd.elastic.KerasState(model, batch=2, epoch=0)
        state.sync()
        if fit:
            update = hvd.elastic.UpdateBatchStateCallback(state)
            model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[update])
        else:
            for i in range(2 * BATCH, len(x), BATCH):
                model.train_on_batch(x[i : i + BATCH], y[i : i + BATCH])
        weights.append(model.get_weights())
    return {"weights": weights}


def main() -> None:
    hvd.init()
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    folder, kind, plan = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    if kind in KINDS:
        train(folder, kind, plan)
    else:
        parts = {f.__name__: f(folder) for f in (refusals, in_one_process, due, elastic)}
        report(hvd.rank(), parts | {"arguments": arguments()})


if __name__ == "__main__":
    main()
