"""The scenarios of test_rates.py on real ranks: rates of steps, and what became of velocities."""

import sys

import keras
import numpy as np

import recipe.keras as hvd
from recipe.keras.callbacks import GradualWarmup, ScheduledRate, StepDecay
from tests.ranks import report
from tests.recipe.keras.program import (
    EXAMPLES,
    LABELS,
    MINIBATCH,
    BroadcastState,
    compiled,
    nesterov,
    network,
    share,
)

STEPS = 4  # of an epoch


class Noted(keras.callbacks.Callback):
    """Notes each step's rate, and the velocity at its start over that at the last step's end.

    `ends`: the rate that a checkpoint at the end of each epoch would hold.
    """

    def __init__(self):
        super().__init__()
        self.rates, self.factors, self.ends = [], [], []

    def velocity(self):
        velocities = map(keras.ops.convert_to_numpy, self.model.optimizer.momentums)
        return np.concatenate([np.ravel(v) for v in velocities])

    def rate(self):
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def on_train_begin(self, logs=None):
        self.last = self.velocity()

    def on_train_batch_begin(self, batch, logs=None):
        self.rates.append(self.rate())
        norm = np.linalg.norm(self.last)
        factor = np.dot(self.velocity(), self.last) / norm**2 if norm else 1.0
        self.factors.append(float(factor))

    def on_train_batch_end(self, batch, logs=None):
        self.last = self.velocity()

    def on_epoch_end(self, epoch, logs=None):
        self.ends.append(self.rate())


class SetsAfter(keras.callbacks.Callback):
    """Another callback's wish, after one step of the fit."""

    def __init__(self, step, rate):
        super().__init__()
        self.left, self.wish = step, rate

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            self.model.optimizer.learning_rate = self.wish


def fit(model, epochs, *callbacks, first=0):
    size, rank = hvd.size(), hvd.rank()
    noted = Noted()
    history = model.fit(
        share(EXAMPLES, size, rank),
        share(LABELS, size, rank),
        batch_size=MINIBATCH // size,
        initial_epoch=first,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[BroadcastState(), *callbacks, noted],
    )
    return {
        "rates": noted.rates,
        "factors": noted.factors,
        "ends": noted.ends,
        "logs": history.history,
    }


def fresh():
    return compiled(network(), nesterov())


def plateau():
    """Keras's own: divides η by 10 at the end of each epoch but the first of a fit."""
    return keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.1, patience=1, min_delta=1e9)


def warm(epochs):
    return GradualWarmup(0.1, 4, epochs)


def horovods(epochs, **options):
    return hvd.callbacks.LearningRateWarmupCallback(0.4, epochs, **options)


def resumed_after() -> dict:
    """Do the whole warmup; go on with a lower η, with the same callback and another; begin anew."""
    results = {}
    for name, kind in {"ours": warm, "horovods": horovods}.items():
        model, callback = fresh(), kind(1)
        first = fit(model, 2, callback)
        model.optimizer.learning_rate = 0.01
        results[name] = {
            "first": first,
            "same": fit(model, 3, callback, first=2),
            "other": fit(model, 4, kind(1), first=3),
            "anew": fit(model, 2, callback),
        }
    return results


def resumed_within() -> dict:
    """Interrupt a warmup of two epochs after the first; go on also with a fresh optimizer."""
    results = {}
    for name, kind in {"ours": warm, "horovods": horovods}.items():
        model = fresh()
        results[name] = {
            "first": fit(model, 1, kind(2)),
            "second": fit(model, 3, kind(2), first=1),
            "fresh": fit(fresh(), 3, kind(2), first=1),
        }
    return results


def resumed_at_the_end() -> dict:
    """Go on from a checkpoint that was written before the warmup set its peak."""
    results = {}
    for name, kind in {"ours": warm, "horovods": horovods}.items():
        model = fresh()
        first = fit(model, 1, kind(2))
        results[name] = {"before": first["rates"][-1], "after": fit(model, 3, kind(2), first=2)}
    return results


def with_plateau() -> dict:
    results = {}
    for name, kind in {"ours": warm, "horovods": horovods}.items():
        results[name, "warmup first"] = fit(fresh(), 5, kind(2), plateau())
        results[name, "plateau first"] = fit(fresh(), 5, plateau(), kind(2))
    constant = hvd.callbacks.LearningRateScheduleCallback(0.4, 0.5, start_epoch=1, end_epoch=3)
    results["constant"] = fit(fresh(), 5, constant, plateau())
    results["always"] = fit(fresh(), 3, plateau(), ScheduledRate(lambda epoch: 0.4))
    results["decay"] = fit(fresh(), 4, plateau(), StepDecay(0.4, (2, 3)))
    return results


def fractions() -> dict:
    """Do warmups that end within an epoch and, 1.9, after the last step of one.

    Another callback sets η right after the end.
    """
    results = {}
    for name, kind in {"ours": warm, "horovods": horovods}.items():
        results[name, 1.5] = fit(fresh(), 3, kind(1.5), SetsAfter(7, 0.01))
        results[name, 1.9] = fit(fresh(), 3, kind(1.9), SetsAfter(9, 0.01))
    return results


def decay_resumed() -> dict:
    """Go on past both boundaries, after another callback has lowered η in between."""
    model = fresh()
    fit(model, 2)
    model.optimizer.learning_rate = 0.00025
    return fit(model, 4, StepDecay(0.4, (1, 2)), first=3)


def options() -> dict:
    """Resume Horovod's old numbers within and after their epochs."""
    model = fresh()
    power = hvd.callbacks.LearningRateScheduleCallback(
        0.4, 0.5, start_epoch=1, end_epoch=3, compounding=True
    )
    results = {
        "compounding": fit(model, 3, power, first=2),
        "over": fit(model, 4, power, first=3),
    }
    model = fresh()
    early = horovods(1, one_step_early=True)
    results["early"] = fit(model, 2, early)
    model.optimizer.learning_rate = 0.01
    results["early, over"] = fit(model, 3, early, first=2)
    results["early, anew"] = fit(model, 1, early)
    return results


def main() -> None:
    hvd.init()
    report(hvd.rank(), {name: globals()[name]() for name in sys.argv[1:]})


if __name__ == "__main__":
    main()
