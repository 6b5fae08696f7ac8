"""Rate callbacks touch η in their own epochs only: real fits, on 1 and 2 ranks.

The tests' bodies run on the ranks.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

import recipe.keras as hvd
from recipe.keras.callbacks import BroadcastState, GradualWarmup, ScheduledRate, StepDecay
from tests.pools import on_ranks
from tests.recipe.keras.classification import (
    EXAMPLES,
    LABELS,
    MINIBATCH,
    compiled,
    nesterov,
    network,
    share,
)

PEAK = 0.4
START = 0.1  # the optimizer's own rate
STEPS = 4  # of an epoch

# Rates are float32, and so are the velocities. The factor is a quotient of sums of some 200
# products: 1e-6 of it.
ROUNDING = 1e-5

with_both_warmups = pytest.mark.parametrize("name", ["ours", "horovods"])


class Fit(NamedTuple):
    """What a fit's steps were like."""

    rates: list[float]
    factors: list[float]  # each step's velocity at its start over that at the last step's end
    ends: list[float]  # the rates that a checkpoint at the end of each epoch would hold
    logs: dict[str, list[float]]


class Noted(keras.callbacks.Callback):
    """Notes what a Fit holds."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []
        self.factors: list[float] = []
        self.ends: list[float] = []

    def velocity(self) -> np.ndarray:
        velocities = map(keras.ops.convert_to_numpy, self.model.optimizer.momentums)
        return np.concatenate([np.ravel(v) for v in velocities])

    def rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.last = self.velocity()

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self.rates.append(self.rate())
        norm = np.linalg.norm(self.last)
        factor = np.dot(self.velocity(), self.last) / norm**2 if norm else 1.0
        self.factors.append(float(factor))

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.last = self.velocity()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.ends.append(self.rate())


class SetsAfter(keras.callbacks.Callback):
    """Another callback's wish, after one step of the fit."""

    def __init__(self, step: int, rate: float) -> None:
        super().__init__()
        self.left, self.wish = step, rate

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.left -= 1
        if self.left == 0:
            self.model.optimizer.learning_rate = self.wish


def fit(
    model: keras.Model, epochs: int, *callbacks: keras.callbacks.Callback, first: int = 0
) -> Fit:
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
    return Fit(noted.rates, noted.factors, noted.ends, history.history)


def fresh() -> keras.Model:
    return compiled(network(), nesterov())


def plateau() -> keras.callbacks.Callback:
    """Keras's own: divides η by 10 at the end of each epoch but the first of a fit."""
    return keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.1, patience=1, min_delta=1e9)


def horovods(epochs: float, **options: Any) -> keras.callbacks.Callback:
    return hvd.callbacks.LearningRateWarmupCallback(PEAK, epochs, **options)


def warmup(name: str, epochs: float) -> keras.callbacks.Callback:
    """Return our warmup or Horovod's, of so many epochs up to PEAK."""
    return GradualWarmup(START, 4, epochs) if name == "ours" else horovods(epochs)


def near(expected: Any) -> Any:
    return pytest.approx(expected, rel=ROUNDING)


def ramp(name: str, epochs: float) -> list[float]:
    """Return η of a warmup's steps, up to the first that is not before its end."""
    low = START if name == "ours" else PEAK / hvd.size()
    count = math.ceil(epochs * STEPS)
    return [low + (PEAK - low) * t / STEPS / epochs for t in range(count)]


def check(
    fit: Fit, rates: Sequence[float], unscaled: Sequence[int] = (), first: float | None = None
) -> None:
    """Check the rates, and that velocities were rescaled with them except in the steps `unscaled`.

    There another callback has changed η. `first` is the rate that the velocity at the first step
    has as a factor. None: there was no velocity.
    """
    assert fit.rates == near(rates)
    rates_of_velocity = [first or rates[0], *rates[:-1]]
    factors = [new / old for old, new in zip(rates_of_velocity, rates, strict=True)]
    for step in unscaled:
        factors[step] = 1.0
    assert fit.factors == near(factors)


@with_both_warmups
@on_ranks(1, 2)
def test_a_warmup_is_over_when_it_is_over_and_a_run_from_epoch_0_warms_up_again(name):
    rates = [*ramp(name, 1), *[PEAK] * 4]
    model, callback = fresh(), warmup(name, 1)
    check(fit(model, 2, callback), rates)

    # With a lower η, it goes on with the same callback and with another.
    model.optimizer.learning_rate = 0.01
    check(fit(model, 3, callback, first=2), [0.01] * 4, first=0.01)
    check(fit(model, 4, warmup(name, 1), first=3), [0.01] * 4, first=0.01)

    # It begins anew.
    check(fit(model, 2, callback), rates, first=0.01)


@with_both_warmups
@on_ranks(1, 2)
def test_a_warmup_is_taken_up_in_its_middle(name):
    """A warmup of two epochs is interrupted after the first."""
    rates = ramp(name, 2)
    model = fresh()
    check(fit(model, 1, warmup(name, 2)), rates[:4])

    second = fit(model, 3, warmup(name, 2), first=1)
    check(second, [*rates[4:], *[PEAK] * 4], first=rates[3])
    assert second.ends == near([PEAK, PEAK])  # a checkpoint holds it already

    # Also with a fresh optimizer.
    check(fit(fresh(), 3, warmup(name, 2), first=1), [*rates[4:], *[PEAK] * 4])


@with_both_warmups
@on_ranks(1, 2)
def test_a_run_that_is_resumed_at_the_warmups_end_has_the_peak(name):
    """It goes on from a checkpoint that was written before the warmup set its peak."""
    model = fresh()
    before = fit(model, 1, warmup(name, 2)).rates[-1]
    assert before == near(ramp(name, 2)[3])
    check(fit(model, 3, warmup(name, 2), first=2), [PEAK] * 4, first=before)


@with_both_warmups
@pytest.mark.parametrize("order", ["warmup first", "plateau first"])
@on_ranks(1, 2)
def test_a_warmup_ignores_other_callbacks_and_leaves_them_what_follows(name, order):
    """The plateau lowers η at the ends of epochs 1, the warmup's last, 2 and 3.

    Where the warmup overrules it, nothing is rescaled.
    """
    callbacks = [warmup(name, 2), plateau()]
    if order == "plateau first":
        callbacks.reverse()
    rates = [*ramp(name, 2), *[PEAK] * 4, *[PEAK / 10] * 4, *[PEAK / 100] * 4]
    check(fit(fresh(), 5, *callbacks), rates, unscaled=(12, 16))


@on_ranks(1, 2)
def test_constants_and_decays_hold_within_their_epochs_and_nowhere_else():
    """The plateau lowers η at the end of each epoch from 1 on.

    Horovod's constant is for epochs 1 and 2, the decay from 2 on.
    """
    callback = hvd.callbacks.LearningRateScheduleCallback(PEAK, 0.5, start_epoch=1, end_epoch=3)
    constant = fit(fresh(), 5, callback, plateau())
    rates = [START] * 4 + [0.2] * 8 + [0.02] * 4 + [0.002] * 4
    check(constant, rates, unscaled=(12, 16))
    assert constant.logs["lr"] == near([START, 0.2, 0.2, 0.02, 0.002])

    always = fit(fresh(), 3, plateau(), ScheduledRate(lambda epoch: PEAK))
    check(always, [PEAK] * 12)

    decay = fit(fresh(), 4, plateau(), StepDecay(PEAK, (2, 3)))
    check(decay, [START] * 8 + [0.04] * 4 + [0.004] * 4)


@with_both_warmups
@on_ranks(1, 2)
def test_a_warmup_of_a_fraction_lets_go_at_the_first_step_after_it(name):
    """It ends within an epoch and, 1.9, after the last step of one.

    Another callback sets η right after the end.
    """
    half = fit(fresh(), 3, warmup(name, 1.5), SetsAfter(7, 0.01))
    check(half, [*ramp(name, 1.5), PEAK, *[0.01] * 5], unscaled=(7,))

    longer = fit(fresh(), 3, warmup(name, 1.9), SetsAfter(9, 0.01))
    check(longer, [*ramp(name, 1.9), PEAK, *[0.01] * 3], unscaled=(9,))
    assert longer.ends == near([ramp(name, 1.9)[3], PEAK, 0.01])


@on_ranks(1, 2)
def test_a_decay_that_is_resumed_past_its_boundaries_has_its_own_rate():
    """Another callback has lowered η in between."""
    model = fresh()
    fit(model, 2)
    model.optimizer.learning_rate = 0.00025
    check(fit(model, 4, StepDecay(PEAK, (1, 2)), first=3), [0.004] * 4, first=0.00025)


@on_ranks(1, 2)
def test_horovods_old_numbers_keep_to_their_epochs():
    """Runs are resumed within and after the epochs of the callbacks."""
    model = fresh()
    compounding = hvd.callbacks.LearningRateScheduleCallback(
        PEAK, 0.5, start_epoch=1, end_epoch=3, compounding=True
    )
    check(fit(model, 3, compounding, first=2), [PEAK * 0.5] * 4)
    check(fit(model, 4, compounding, first=3), [PEAK * 0.5] * 4, first=PEAK * 0.5)

    low = PEAK / hvd.size()
    rates = [low + (PEAK - low) * t / 4 for t in (1, 2, 3, 4)]
    model = fresh()
    one_step_early = horovods(1, one_step_early=True)
    check(fit(model, 2, one_step_early), [*rates, *[PEAK] * 4])
    model.optimizer.learning_rate = 0.01
    check(fit(model, 3, one_step_early, first=2), [0.01] * 4, first=0.01)
    check(fit(model, 1, one_step_early), rates, first=0.01)
