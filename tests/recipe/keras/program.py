"""Run on real ranks by test_distributed.py.

Each scenario's findings on this rank go back to the test.
"""

import itertools
import os
import sys
from pathlib import Path

import keras
import numpy as np

import recipe.keras as hvd
from recipe.errors import RunError
from recipe.keras import state
from recipe.keras.callbacks import (
    BroadcastState,
    GradualWarmup,
    MetricSums,
    ReplicaCheck,
    ScheduledRate,
    set_rate,
)
from recipe.keras.distributed import is_distributed
from recipe.rules.schedule import Rate
from tests.ranks import report

EXAMPLES = np.random.default_rng(0).normal(size=(96, 8, 8, 2)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, 96)
MINIBATCH = 24  # kn, divided among the ranks
RATE = Rate(0.05, 0.4, warmup_epochs=1.5, decay_epochs=(2.0,))


def network(normalised: bool = False) -> keras.Model:
    """A small convolutional network; every rank draws other weights."""
    keras.utils.set_random_seed(100 + hvd.rank())
    layers = [keras.layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")]
    if normalised:
        layers.append(keras.layers.BatchNormalization(momentum=0.9))
    layers += [
        keras.layers.Flatten(),
        keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.01)),
    ]
    return keras.Sequential([keras.Input((8, 8, 2)), *layers])


def compiled(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], jit_compile=False)
    return model


def nesterov() -> keras.optimizers.Optimizer:
    return hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True))


def share(array: np.ndarray, size: int, rank: int) -> np.ndarray:
    """This rank's part of every minibatch, in order."""
    parts = array.reshape(-1, size, MINIBATCH // size, *array.shape[1:])
    return parts[:, rank].reshape(-1, *array.shape[1:])


def fit(
    model: keras.Model, epochs: int, *callbacks: keras.callbacks.Callback
) -> keras.callbacks.History:
    size, rank = hvd.size(), hvd.rank()
    return model.fit(
        share(EXAMPLES, size, rank),
        share(LABELS, size, rank),
        batch_size=MINIBATCH // size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[BroadcastState(), *callbacks],
    )


class AtFirstStep(keras.callbacks.Callback):
    """All state as it is when step 1 begins."""

    found = None

    def on_train_batch_begin(self, batch, logs=None):
        if self.found is None:
            self.found = state.to_arrays(self.model)


def equality() -> dict:
    """Three epochs of Nesterov SGD, warmup, decay and weight decay on kn examples a step.

    These are divided among the ranks.
    """
    model = compiled(network(), nesterov())
    history = fit(model, 3, ScheduledRate(RATE), MetricSums(), ReplicaCheck(every=2))
    return {"weights": model.get_weights(), "history": history.history}


def initial_state() -> dict:
    """Ranks seeded apart, with statistics and slots of their own, before step 1."""
    model = compiled(network(normalised=True), nesterov())
    model.optimizer.build(model.trainable_variables)
    for v in state.everything(model):
        if keras.backend.is_float_dtype(v.dtype):
            v.assign(v + 0.1 * hvd.rank())
    model.optimizer.iterations.assign(5 + hvd.rank())
    before = state.to_arrays(model)
    first = AtFirstStep()
    fit(model, 1, first)
    return {"before": before, "at step 1": first.found}


def worker_statistics() -> dict:
    """One step with BN.

    The gradient is the mean of the workers', each with the statistics of its own examples.
    """
    size, rank = hvd.size(), hvd.rank()
    model = compiled(network(normalised=True), hvd.DistributedOptimizer(keras.optimizers.SGD(1.0)))
    state.broadcast_state(model)
    start = model.get_weights()
    model.train_on_batch(
        share(EXAMPLES, size, rank)[: MINIBATCH // size],
        share(LABELS, size, rank)[: MINIBATCH // size],
    )
    together = model.get_weights()

    alone = []
    for worker in range(size):
        single = compiled(network(normalised=True), keras.optimizers.SGD(1.0))
        single.set_weights(start)
        part = slice(worker * MINIBATCH // size, (worker + 1) * MINIBATCH // size)
        single.train_on_batch(EXAMPLES[part], LABELS[part])
        alone.append(single.get_weights())
    return {"together": together, "alone": alone}


def unequal_shards() -> dict:
    """Rank r holds r + 1 times 8 examples.

    The whole set's loss and accuracy must come out, in fit and evaluate.
    """
    sizes = 8 * np.arange(1, hvd.size() + 1)
    end = np.cumsum(sizes)[hvd.rank()]
    mine = slice(end - sizes[hvd.rank()], end)
    model = compiled(network(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)))
    state.broadcast_state(model)
    whole = model.evaluate(
        EXAMPLES[: sizes.sum()], LABELS[: sizes.sum()], verbose=0, return_dict=True
    )
    part = model.evaluate(
        EXAMPLES[mine], LABELS[mine], verbose=0, return_dict=True, callbacks=[MetricSums()]
    )
    validation = (EXAMPLES[mine], LABELS[mine])
    history = model.fit(
        EXAMPLES[mine],
        LABELS[mine],
        batch_size=8 * (hvd.rank() + 1),
        validation_data=validation,
        verbose=0,
        callbacks=[MetricSums()],
    )
    return {"whole": whole, "part": part, "history": history.history}


class Poison(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2 and hvd.rank() == hvd.size() - 1:
            kernel = self.model.layers[-1].kernel
            changed = keras.ops.convert_to_numpy(kernel).copy()
            changed[0, 0] = np.nextafter(
                changed[0, 0], np.float32(np.inf)
            )  # the smallest change there is
            kernel.assign(changed)


def poisoned_replica() -> dict:
    """One bit of one weight of the last rank changes after the third step."""
    model = compiled(network(), nesterov())
    try:
        fit(model, 3, Poison(), ReplicaCheck(every=1))
    except RunError as error:
        return {"error": str(error), "name": model.layers[-1].kernel.path}
    return {"error": None}


def different_models() -> dict:
    """Rank 0 has one unit more than the others.

    Waiting for each other for ever would be the wrong answer.
    """
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2 + (hvd.rank() == 0))])
    model.compile(nesterov(), "mse")
    try:
        state.broadcast_state(model)
    except RunError as error:
        return {"error": str(error)}
    return {"error": None}


def overflow() -> dict:
    """The last rank's gradient overflows in the first step.

    Every rank skips it, and the next one counts.
    """
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1, momentum=0.9), initial_scale=1024.0
    )
    model = compiled(network(), hvd.DistributedOptimizer(optimizer))
    state.broadcast_state(model)
    x, y = share(EXAMPLES, hvd.size(), hvd.rank()), share(LABELS, hvd.size(), hvd.rank())
    start = model.get_weights()
    poisoned = x.copy()
    if hvd.rank() == hvd.size() - 1:
        poisoned[0, 0, 0, 0] = np.inf
    model.train_on_batch(poisoned, y)
    skipped = model.get_weights()
    model.train_on_batch(x, y)
    return {
        "start": start,
        "skipped": skipped,
        "after": model.get_weights(),
        "scale": float(optimizer.dynamic_scale),
    }


def mixed_policy() -> dict:
    """Under the global policy the wrapper brings the loss scaling.

    compile() would put it around the wrapper.
    """
    keras.config.set_dtype_policy("mixed_float16")
    try:
        wrapped = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
        model = network()
        model.compile(optimizer=wrapped, loss="mse")
        kept = model.optimizer is wrapped and isinstance(
            wrapped, keras.optimizers.LossScaleOptimizer
        )
    finally:
        keras.config.set_dtype_policy("float32")
    return {"kept": kept}


def compression() -> dict:
    """The mean of 1/7, 2/7, … with and without fp16 on the wire."""
    found = {}
    for name in ("none", "fp16"):
        optimizer = hvd.DistributedOptimizer(
            keras.optimizers.SGD(1.0), compression=getattr(hvd.Compression, name)
        )
        v = keras.Variable(np.zeros(3, np.float32))
        gradient = np.full(3, (hvd.rank() + 1) / 7, np.float32)
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [v])
        found[name] = -keras.ops.convert_to_numpy(v)
    return found


def saved_models() -> dict:
    """A model saved with the wrapped optimizer loads as if it had never been wrapped.

    So do the optimizer's slots.
    """
    model = compiled(network(), nesterov())
    fit(model, 1)
    path = Path(os.environ["RESULTS"]) / f"saved{hvd.rank()}.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    slots = [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables]
    return {
        "plain": isinstance(loaded.optimizer, keras.optimizers.SGD)
        and not is_distributed(loaded.optimizer),
        "weights": [model.get_weights(), loaded.get_weights()],
        "slots": [slots, [keras.ops.convert_to_numpy(v) for v in loaded.optimizer.variables]],
    }


def gradual_warmup() -> dict:
    """The rates that the steps of three epochs really had."""
    rates = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            rates.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))
            if len(rates) == 8:
                self.model.optimizer.learning_rate = (
                    0.01  # another callback's wish, after the warmup
                )

    fit(compiled(network(), nesterov()), 3, GradualWarmup(base_rate=0.1, k=4, epochs=1.5), Rates())
    return {"rates": rates}


def momentum() -> dict:
    """The weight's path under given gradients and a rate that changes at every step."""
    found = {}
    gradients = np.random.default_rng(2).normal(size=(12, 5)).astype(np.float32)
    rates = [0.1 * (t + 1) for t in range(6)] + [0.06] * 3 + [0.006] * 3
    for nesterov_, corrected, scaled in itertools.product(
        (False, True), (True, False), (False, True)
    ):
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=nesterov_)
        scale = 8.0 if scaled else 1.0
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=scale)
        optimizer = hvd.DistributedOptimizer(optimizer)
        v, path = keras.Variable(np.zeros(5, np.float32)), []
        for gradient, rate in zip(gradients, rates, strict=True):
            set_rate(optimizer, rate, corrected)
            optimizer.apply([keras.ops.convert_to_tensor(gradient * scale)], [v])
            path.append(keras.ops.convert_to_numpy(v).copy())
        found[nesterov_, corrected, scaled] = path
    return {"paths": found, "gradients": gradients, "rates": rates}


def main() -> None:
    hvd.init()
    report(
        hvd.rank(),
        {name: globals()[name]() for name in sys.argv[1:]}
        | {"rank": hvd.rank(), "size": hvd.size()},
    )


if __name__ == "__main__":
    main()
