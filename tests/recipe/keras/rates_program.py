"""Run on real ranks by test_rates.py: the rates that steps really had, and what became of the velocities."""

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
    """Of each step: its rate, and the velocity at its start over that at the end of the step before.

    `ends`: the rate that a checkpoint at the end of each epoch would hold."""

    def __init__(self):
        super().__init__()
        self.rates, self.factors, self.ends = [], [], []

    def velocity(self):
        return np.concatenate(
            [np.ravel(keras.ops.convert_to_numpy(v)) for v in self.model.optimizer.momentums]
        )

    def rate(self):
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def on_train_begin(self, logs=None):
        self.last = self.velocity()

    def on_train_batch_begin(self, batch, logs=None):
        self.rates.append(self.rate())
        moved = np.linalg.norm(self.last)
        self.factors.append(float(np.dot(self.velocity(), self.last) / moved**2) if moved else 1.0)

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
    """The whole warmup; then, η lowered, on after it, with the same callback object and with another; then anew."""
    found = {}
    for name, kind in {"ours": warm, "horovods": horovods}.items():
        model, callback = fresh(), kind(1)
        first = fit(model, 2, callback)
        model.optimizer.learning_rate = 0.01
        same, other = fit(model, 3, callback, first=2), fit(model, 4, kind(1), first=3)
        found[name] = {
            "first": first,
            "same": same,
            "other": other,
            "anew": fit(model, 2, callback),
        }
    return found


def resumed_within() -> dict:
    """A warmup of two epochs, interrupted after the first; and one taken up by a fresh optimizer."""
    found = {}
    for name, kind in {"ours": warm, "horovods": horovods}.items():
        model = fresh()
        first = fit(model, 1, kind(2))
        found[name] = {"first": first, "second": fit(model, 3, kind(2), first=1)}
        found[name]["fresh"] = fit(fresh(), 3, kind(2), first=1)
    return found


def resumed_at_the_end() -> dict:
    """The checkpoint was written before the warmup set its peak."""
    found = {}
    for name, kind in {"ours": warm, "horovods": horovods}.items():
        model = fresh()
        first = fit(model, 1, kind(2))
        found[name] = {"before": first["rates"][-1], "after": fit(model, 3, kind(2), first=2)}
    return found


def with_plateau() -> dict:
    found = {}
    for name, kind in {"ours": warm, "horovods": horovods}.items():
        found[name, "warmup first"] = fit(fresh(), 5, kind(2), plateau())
        found[name, "plateau first"] = fit(fresh(), 5, plateau(), kind(2))
    constant = hvd.callbacks.LearningRateScheduleCallback(0.4, 0.5, start_epoch=1, end_epoch=3)
    found["constant"] = fit(fresh(), 5, constant, plateau())
    found["always"] = fit(fresh(), 3, plateau(), ScheduledRate(lambda epoch: 0.4))
    found["decay"] = fit(fresh(), 4, plateau(), StepDecay(0.4, (2, 3)))
    return found


def fractions() -> dict:
    """Warmups that end within an epoch and, 1.9, after the last step of one; another's wish right after the end."""
    found = {}
    for name, kind in {"ours": warm, "horovods": horovods}.items():
        found[name, 1.5] = fit(fresh(), 3, kind(1.5), SetsAfter(7, 0.01))
        found[name, 1.9] = fit(fresh(), 3, kind(1.9), SetsAfter(9, 0.01))
    return found


def decay_resumed() -> dict:
    """Past both boundaries, another callback having lowered η in between."""
    model = fresh()
    fit(model, 2)
    model.optimizer.learning_rate = 0.00025
    return fit(model, 4, StepDecay(0.4, (1, 2)), first=3)


def options() -> dict:
    """Horovod's old numbers, resumed within and after their epochs."""
    model = fresh()
    power = hvd.callbacks.LearningRateScheduleCallback(
        0.4, 0.5, start_epoch=1, end_epoch=3, compounding=True
    )
    found = {"compounding": fit(model, 3, power, first=2), "over": fit(model, 4, power, first=3)}
    model = fresh()
    early = horovods(1, one_step_early=True)
    found["early"] = fit(model, 2, early)
    model.optimizer.learning_rate = 0.01
    found["early, over"], found["early, anew"] = fit(model, 3, early, first=2), fit(model, 1, early)
    return found


def main() -> None:
    hvd.init()
    report(hvd.rank(), {name: globals()[name]() for name in sys.argv[1:]})


if __name__ == "__main__":
    main()
