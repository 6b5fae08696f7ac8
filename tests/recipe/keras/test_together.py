"""What one rank of a Keras `fit` decides, all do: on 2 real ranks, on both backends.

The body of a test with `@on_ranks` runs on the ranks. Also tested here: models that are built at
their first batch, and jobs that can't go on.
"""

import contextlib
import io
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

import recipe.keras as hvd
from recipe.errors import RunError
from recipe.keras import rollcall
from recipe.keras.callbacks import BroadcastState, MetricSums, ReplicaCheck
from tests.pools import on_ranks, run_on_ranks, stop_pools
from tests.ranks import ROOT, environment, launch
from tests.recipe.keras.comparing import assert_same, assert_same_on_all_ranks, values
from tests.recipe.keras.regression import (
    BATCH,
    Steps,
    compiled,
    data,
    fit,
    minibatches,
    momentum,
    network,
    target,
)

FAILING = str(ROOT / "tests/recipe/keras/failing_program.py")
KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])
TENSORFLOW = keras.backend.backend() == "tensorflow"

# A gradient is a float32 sum of 32 terms in an order that depends on the ranks: 1e-6 of it, over 4
# steps of Adam, η = 0.02, on weights around 1. The smallest mistake, one batch more or less in one
# step, is 1e-2.
ROUNDING = {"rtol": 1e-5, "atol": 5e-6}

pytestmark = pytest.mark.ranks


class Stop(NamedTuple):
    """Where a callback of rank 1 stops the training, and what is then the last step of all."""

    event: str
    epoch: int
    batch: int | None  # None: at the event of the epoch
    last_step: tuple[int, int]


STOPS = {
    "mid-epoch": Stop("on_train_batch_end", 1, 1, last_step=(1, 2)),
    "last step": Stop("on_train_batch_end", 0, 3, last_step=(0, 3)),
    "end of epoch": Stop("on_epoch_end", 1, None, last_step=(1, 3)),
    "validation": Stop("on_test_end", 0, None, last_step=(0, 3)),
}
at_each_place = pytest.mark.parametrize("place", STOPS)


class Stopper(Steps):
    """Stops the training of rank 1."""

    def __init__(self, stop: Stop) -> None:
        super().__init__()
        self.stop = stop

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        super().on_train_batch_end(batch, logs)
        self._perhaps_stop("on_train_batch_end", batch)

    def on_test_end(self, logs: dict | None = None) -> None:
        self._perhaps_stop("on_test_end")

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._perhaps_stop("on_epoch_end")

    def _perhaps_stop(self, event: str, batch: int | None = None) -> None:
        here = (event, self.epoch, batch)
        if hvd.rank() == 1 and here == self.stop[:3]:
            self.model.stop_training = True


def validation(stop: Stop) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the data of a validation, if the training is to be stopped there."""
    x = data(1, 5)
    return (x, target(x)) if stop.event == "on_test_end" else None


@at_each_place
@on_ranks(2)
def test_what_one_rank_stops_all_stop_in_the_same_step(place):
    """In mid-epoch a step later, in which the others hear of it."""
    stop = STOPS[place]
    model, stopper = compiled(network()), Stopper(stop)
    epochs = fit(stopper, model=model, validation_data=validation(stop)).epoch
    assert stopper.seen[-1] == stop.last_step
    assert epochs == list(range(stop.epoch + 1))
    assert_same_on_all_ranks(values(model.trainable_variables))


@at_each_place
@on_ranks(2)
def test_rank_0_says_which_rank_stopped_and_why(place):
    stop = STOPS[place]
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        fit(Stopper(stop), validation_data=validation(stop))
    printed = stderr.getvalue()
    if hvd.rank() == 0:
        assert "rank 1 stops the training of all ranks" in printed
        assert "Stopper" in printed
        assert place != "mid-epoch" or "in epoch 1, step 2" in printed
    else:
        assert not printed


def epochs_until_stop(*callbacks: keras.callbacks.Callback) -> int:
    """Count the epochs of a training in which rank 0's targets are only noise."""
    x = data(4, hvd.rank())
    noise = np.random.default_rng(9).normal(size=(len(x), 1)).astype(np.float32)
    y = target(x) * hvd.rank() + noise
    model = compiled(network(), keras.optimizers.SGD(0.2))
    callbacks = [BroadcastState(), *callbacks]
    return len(model.fit(x, y, BATCH, epochs=30, verbose=0, callbacks=callbacks).epoch)


@on_ranks(2)
def test_callbacks_that_decide_by_their_own_ranks_numbers_are_no_hang():
    """EarlyStopping without MetricSums, before and after it."""
    stop = {"monitor": "loss", "patience": 1}
    alone = epochs_until_stop(keras.callbacks.EarlyStopping(**stop))
    before = epochs_until_stop(keras.callbacks.EarlyStopping(**stop), MetricSums())
    after = epochs_until_stop(MetricSums(), keras.callbacks.EarlyStopping(**stop))
    assert_same_on_all_ranks([alone, before, after])
    assert alone == before < 30


@on_ranks(2)
def test_a_nan_in_one_ranks_data_terminates_all_ranks():
    """Rank 1 has it in its second batch."""
    x = data(4, hvd.rank())
    y = target(x)
    if hvd.rank() == 1:
        y[BATCH + 3] = np.nan
    options = {"epochs": 3, "shuffle": False, "verbose": 0}
    terminate = keras.callbacks.TerminateOnNaN()
    with contextlib.redirect_stdout(io.StringIO()):
        history = compiled(network()).fit(x, y, BATCH, callbacks=[terminate], **options)
    assert len(history.epoch) == 1


class OwnRate(keras.callbacks.Callback):
    """Sets another rate on each rank, in the second step."""

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if batch == 1:
            self.model.optimizer.learning_rate = 0.01 * (1 + hvd.rank())


def assert_refused(
    error: type, pattern: str, action: Callable, *arguments: Any, **options: Any
) -> None:
    """Check that an action is refused in one sentence, whose beginning the pattern matches."""
    with pytest.raises(error) as refusal:
        action(*arguments, **options)
    sentence = str(refusal.value)
    assert type(refusal.value) is error
    assert re.match(pattern, sentence), sentence
    assert len(sentence) < 248 and "\n" not in sentence


@on_ranks(2)
def test_what_cannot_be_agreed_on_is_refused_on_all_ranks():
    rank = hvd.rank()
    rates = "the ranks' learning rates differ: 0.01 on rank 0, 0.02 on rank 1.*MetricSums"
    assert_refused(RunError, rates, fit, OwnRate())

    # The epochs.
    first = "rank 0 begins with epoch 0 and rank 1 with epoch 1.*BackupAndRestore"
    assert_refused(RunError, first, fit, initial_epoch=rank)
    none = "rank 0 begins with epoch 0 and rank 1 with no epoch at all"
    assert_refused(RunError, none, fit, initial_epoch=3 if rank == 1 else 0)
    last = r"fit\(epochs=…\) is 3 on rank 0 and 4 on rank 1"
    assert_refused(ValueError, last, fit, epochs=3 + rank)

    # The callbacks.
    sums = [MetricSums()] if rank == 0 else []
    both = "rank 0 has BroadcastState, MetricSums; rank 1 has BroadcastState"
    assert_refused(ValueError, f"the ranks meet in these callbacks.*{both}", fit, *sums)
    restore = [keras.callbacks.BackupAndRestore("unused")] if rank == 0 else []
    ours = "rank 0: keras.callbacks.BackupAndRestore.*recipe.keras.callbacks"
    assert_refused(ValueError, ours, fit, *restore)


@on_ranks(2)
def test_optimizers_that_would_average_wrongly_are_refused_on_all_ranks():
    """Loss scaling outside, and TensorFlow's own ways to go on several devices or many steps."""
    x = data(1, 0)
    outside = r"the LossScaleOptimizer is outside.*use DistributedOptimizer\("
    assert_refused(ValueError, outside, scaled_outside().fit, x, target(x), verbose=0)
    if not TENSORFLOW:
        return

    import tensorflow as tf

    strategy = "MirroredStrategy and a DistributedOptimizer both average"
    with tf.distribute.MirroredStrategy(["/cpu:0"]).scope():
        model = compiled(network())
        assert_refused(ValueError, strategy, model.fit, x, target(x), verbose=0)

    several = compiled(network(), steps_per_execution=2)
    batches = 4 + 2 * hvd.rank()
    uneven = "with steps_per_execution > 1.*not 4, 6.*steps_per_epoch"
    assert_refused(ValueError, uneven, fit, model=several, batches=batches)


def scaled_outside() -> keras.Model:
    """Make a model whose loss scaling is around the distributed optimizer."""
    model = network()
    distributed = hvd.DistributedOptimizer(momentum())
    scaled = keras.optimizers.LossScaleOptimizer(distributed)
    model.compile(scaled, "mse", jit_compile=False)
    return model


class Said(NamedTuple):
    """What the frameworks have said."""

    lines: list[str]  # in their logs
    warnings: list[str]


def listen_to_fits() -> Said:
    """Return what is said in fits of new models, one with jit_compile=True."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    names = ("tensorflow", "torch._dynamo", "torch._logging")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        for _ in range(7):
            fit(epochs=1, batches=1)
        fit(epochs=1, batches=1, model=compiled(network(), jit_compile=True))
    for name in names:
        logging.getLogger(name).removeHandler(handler)
    return Said(log.getvalue().splitlines(), [str(w.message) for w in caught_warnings])


def test_the_frameworks_say_nothing(backend):
    """TensorFlow may say retraced of Keras's own train function, which each model makes anew."""
    stop_pools()  # fresh ranks: other tests may have heard what is said a few times only
    for rank, said in enumerate(run_on_ranks(backend, 2, listen_to_fits)):
        assert not [line for line in said.lines if "_make_function.<locals>" not in line]
        ours = [message for message in said.warnings if "__array__" not in message]
        expected = ["jit_compile=True is left out: PyTorch's compiler can't compile an allreduce"]
        assert ours == (expected if backend == "torch" and rank == 0 else [])


@on_ranks(2)
def test_validation_on_one_rank_is_no_hang_and_all_see_its_figures():
    """Rank 0 validates, and EarlyStopping looks at it on both ranks."""
    x = data(2, 77)
    examples = (x, target(x))
    model = compiled(network())
    stop = keras.callbacks.EarlyStopping(monitor="val_loss", patience=30)
    on_rank_0 = examples if hvd.rank() == 0 else None
    logs = fit(MetricSums(), stop, model=model, validation_data=on_rank_0).history
    assert_same_on_all_ranks(logs)
    assert len(logs["val_loss"]) == 3
    assert logs["val_loss"][-1] == pytest.approx(model.evaluate(*examples, verbose=0), rel=1e-6)


@on_ranks(2)
def test_validations_in_other_epochs_on_each_rank_are_no_hang():
    x = data(2, 77)
    every = 1 + hvd.rank()
    logs = fit(MetricSums(), validation_data=(x, target(x)), validation_freq=every).history
    assert_same_on_all_ranks(logs)
    assert len(logs["val_loss"]) == 3


@on_ranks(2)
def test_accumulators_are_not_compared():
    """They hold each rank's own gradients between two updates."""
    adam = {"learning_rate": 0.01, "gradient_accumulation_steps": 3}
    model = compiled(network(), keras.optimizers.Adam(**adam))
    fit(ReplicaCheck(every=2), model=model, epochs=1)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(**adam))
    fit(ReplicaCheck(every=500), model=compiled(network(), scaled), epochs=1)
    assert_same_on_all_ranks(values(model.trainable_variables))


class Late(keras.Model):
    """Makes its layers when it is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.late = None

    def build(self, shape: tuple) -> None:
        self.late = keras.layers.Dense(3)
        self.late.build(shape)
        self.head = keras.layers.Dense(1)
        self.built = True

    def call(self, x: Any) -> Any:
        return self.head(self.late(x))

    def train_step(self, data: Any) -> dict:
        return super().train_step(data)


class Subclass(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = keras.layers.Dense(3), keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.b(self.a(x))


BUILT_LATE = {
    "sequential": lambda: keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(1)]),
    "subclass": Subclass,
    "late layers": Late,
}


@pytest.mark.parametrize("kind", BUILT_LATE)
@pytest.mark.parametrize("whose", ("ours", "Horovod's"))
@on_ranks(2)
def test_models_that_are_built_at_their_first_batch_begin_with_rank_0s_weights(kind, whose):
    """So does one process, whose seed is rank 0's."""
    make = BUILT_LATE[kind]
    horovods = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    callbacks = [BroadcastState() if whose == "ours" else horovods]
    keras.utils.set_random_seed(100 + hvd.rank())
    model = compiled(make(), keras.optimizers.Adam(0.02))
    x = data(2, hvd.rank())
    options = {"epochs": 2, "shuffle": False, "verbose": 0}
    model.fit(x, target(x), BATCH, callbacks=callbacks, **options)
    weights = values(model.trainable_variables)

    keras.utils.set_random_seed(100)
    alone = make()
    alone.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=False)
    for minibatch in minibatches([2, 2]) * 2:
        alone.train_on_batch(minibatch, target(minibatch))

    assert_same(weights, values(alone.trainable_variables), **ROUNDING)
    assert_same_on_all_ranks(weights)
    assert int(model.optimizer.iterations) == 4


def run_failing(backend: str, way: str, **options: str) -> subprocess.CompletedProcess:
    return launch(2, [FAILING, way], timeout=200, KERAS_BACKEND=backend, **options)


def test_an_error_on_one_rank_ends_the_others_with_its_words(backend):
    """Though the script catches it and goes on, for longer than this test may take."""
    done = run_failing(backend, "error", RECIPE_STEP_TIMEOUT="150")
    assert done.returncode == 1
    assert (
        "error: rank 1 has failed, and the others wait for it: KeyError: 'no such thing'"
        in done.stdout
    )
    assert "rank 0 waits: the end of epoch 0" in done.stdout


def test_a_gradient_that_one_rank_changes_ends_the_job():
    """With overlap=True its reduction had begun. The others wait for nothing."""
    done = run_failing("torch", "changed gradient", RECIPE_STEP_TIMEOUT="150")
    assert done.returncode == 1
    assert "kernel was changed after backward(), when its reduction had begun" in done.stdout


@pytest.mark.parametrize(
    ("backend", "way"), [("torch", "absent"), ("tensorflow", "absent"), ("torch", "own loop")]
)
def test_a_wait_without_end_ends_with_where_each_rank_is(backend, way):
    done = run_failing(backend, way, RECIPE_STEP_TIMEOUT="15")
    assert done.returncode == 1
    assert (
        "the ranks wait for each other since" in done.stdout and "(step_timeout=15)" in done.stdout
    )
    absent = 1 if way == "absent" else 0
    assert f"rank {absent}: " in done.stdout and f"rank {1 - absent} waits: " in done.stdout
    assert "failing_program.py:" in done.stdout and "in waits_for_something_else" in done.stdout


def test_a_long_save_and_a_long_validation_on_one_rank_are_no_wait_without_end():
    done = run_failing("torch", "long", RECIPE_STEP_TIMEOUT="15")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "rank 0 has ended" in done.stdout and "rank 1 has ended" in done.stdout


def status(count=0, waits=False, busy="", failure="") -> rollcall.Status:
    return rollcall.Status(count, waits, busy, failure, where="x.py:1")


@pytest.mark.parametrize(
    ("ranks", "stuck"),
    [
        ([{"waits": True}, {}], True),  # one is elsewhere
        ([{"waits": True}, {"waits": True}], True),  # in other collectives
        ([{"waits": True}, {"busy": "ModelCheckpoint.on_epoch_end"}], False),
        ([{"waits": True}, {"busy": "the validation"}], False),
        (
            [{"waits": True}, {"busy": "MetricSums.on_epoch_end", "waits": True}],
            True,
        ),  # in a collective that never ends
        ([{}, {}], False),  # nobody waits for anybody
    ],
)
def test_who_waits_for_ever(monkeypatch, ranks, stuck):
    """The decision, by a clock of the test's own: 99 s are no reason yet, 101 s are."""
    now = [1000.0]
    monkeypatch.setattr(rollcall.time, "monotonic", lambda: now[0])
    thread = rollcall.RollCall(limit=100.0)
    statuses = [status(**options) for options in ranks]
    assert not thread._reason_to_end(statuses)
    now[0] += 99
    assert not thread._reason_to_end(statuses)
    now[0] += 2
    assert bool(thread._reason_to_end(statuses)) == stuck
    progressed = [status(count=1, waits=True), *statuses[1:]]
    assert not thread._reason_to_end(progressed)


def test_a_failed_rank_is_waited_for_for_seconds_only(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(rollcall.time, "monotonic", lambda: now[0])
    thread = rollcall.RollCall(limit=100.0)
    statuses = [status(waits=True), status(failure="KeyError: x")]
    assert not thread._reason_to_end(statuses)
    now[0] += rollcall.PATIENCE + 1
    reason = thread._reason_to_end(statuses)
    assert "rank 1 has failed, and the others wait for it: KeyError: x" in reason
    all_failed = [status(failure="KeyError: x")] * 2
    assert not thread._reason_to_end(all_failed)  # none waits


@pytest.mark.parametrize("value", ["soon", "-1", "inf", "nan"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(value):
    code = "import recipe.keras as hvd; hvd.init()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(KERAS_BACKEND="torch", RECIPE_STEP_TIMEOUT=value),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        f"RECIPE_STEP_TIMEOUT='{value}' must be a number of seconds, 0 for no limit" in done.stderr
    )


@pytest.mark.parametrize("how", ["fit", "broadcast"])
def test_training_before_init_is_one_sentence(backend, how):
    code = f"""
import keras, numpy as np, recipe.keras as hvd
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()) if {how == "fit"} else "sgd", "mse")
callbacks = [hvd.callbacks.BroadcastState()] if {how == "broadcast"} else []
model.fit(np.ones((4, 4)), np.ones((4, 1)), verbose=0, callbacks=callbacks)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(KERAS_BACKEND=backend),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == (
        "ValueError: Horovod is not initialised; call recipe.keras.init() before fit()"
    )


@pytest.mark.skipif(KERAS < (3, 16), reason="Keras 3.16 has it: tests/coming-keras")
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("way", "name"), [("both, set", "DataParallel"), ("both", "Keras's DistributedDataParallel")]
)
def test_keras_own_data_parallelism_beside_ours_is_refused(size, way, name):
    done = launch(size, [FAILING, way], timeout=200, KERAS_BACKEND="torch")
    assert done.returncode == 1
    assert f"ValueError: {name}" in done.stdout
    assert "and a DistributedOptimizer both average the gradients; use one of them" in done.stdout
