"""The scenarios of test_together.py, run on real ranks; each returns what this rank has seen."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np

import recipe.keras as hvd
from recipe.errors import RunError
from recipe.keras.callbacks import BroadcastState, MetricSums, ReplicaCheck
from tests.ranks import report

TENSORFLOW = keras.backend.backend() == "tensorflow"
BATCH = 16


def value(v) -> np.ndarray:
    return keras.ops.convert_to_numpy(v).copy()


def data(batches: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batches * BATCH, 4)).astype(np.float32)


def target(x: np.ndarray) -> np.ndarray:
    return x.sum(1, keepdims=True)


def network(*layers: keras.layers.Layer) -> keras.Model:
    """Other weights on each rank; rank 0's are those of the seed 100."""
    keras.utils.set_random_seed(100 + hvd.rank())
    return keras.Sequential(
        [keras.Input((4,)), *layers, keras.layers.Dense(3), keras.layers.Dense(1)]
    )


def reference_weights(make) -> keras.Model:
    """Return the model that rank 0 makes, with rank 0's weights, on any rank."""
    model = make()
    model.set_weights(hvd.broadcast_object(model.get_weights(), 0))
    return model


def momentum() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.02, momentum=0.9)


def caught(action) -> str:
    try:
        action()
    except (ValueError, RunError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Steps(keras.callbacks.Callback):
    """Counts what callbacks see, and may stop one rank's training."""

    def __init__(self, stop_rank=None, stop_at=None, stop_in="on_train_batch_end"):
        super().__init__()
        self.seen, self.stop_rank, self.stop_at, self.stop_in = [], stop_rank, stop_at, stop_in

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((self.epoch, batch))
        self._perhaps_stop("on_train_batch_end", batch)

    def on_test_end(self, logs=None):
        self._perhaps_stop("on_test_end")

    def on_epoch_end(self, epoch, logs=None):
        self._perhaps_stop("on_epoch_end")

    def _perhaps_stop(self, event, batch=None):
        here = self.epoch if batch is None else (self.epoch, batch)
        if event == self.stop_in and hvd.rank() == self.stop_rank and here == self.stop_at:
            self.model.stop_training = True


def minibatches(counts: list[int], seeds: list[int]) -> list[np.ndarray]:
    """Return what one process would train on: each step's batches of the ranks that have one."""
    ranks = []
    for count, seed in zip(counts, seeds, strict=True):
        ranks.append(data(count, seed).reshape(count, BATCH, 4))
    steps = []
    for i in range(max(counts)):
        batches = [of_rank[i] for of_rank in ranks if i < len(of_rank)]
        steps.append(np.concatenate(batches))
    return steps


def fit_uneven(
    make, optimizer, counts, as_generator=False, steps_per_epoch=None, **options
) -> dict:
    """Train two epochs on data that end early on some ranks."""
    x = data(counts[hvd.rank()], hvd.rank())
    model = make()
    model.compile(hvd.DistributedOptimizer(optimizer(), **options), "mse", jit_compile=False)
    if as_generator:
        own_data = {"x": generated(x, 2)}
    else:
        own_data = {"x": x, "y": target(x), "batch_size": BATCH}
    steps = Steps()
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        history = model.fit(
            **own_data,
            steps_per_epoch=steps_per_epoch,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[BroadcastState(), MetricSums(), steps, ReplicaCheck(every=3)],
        )
    messages = [str(w.message) for w in caught_warnings]
    return {
        "weights": [value(v) for v in model.trainable_variables],
        "loss": history.history["loss"],
        "steps": steps.seen,
        "warnings": [m for m in messages if "takes part with nothing" in m],
    }


def generated(x: np.ndarray, outputs: int):
    """Return a data set whose length Keras doesn't know: a tf.data generator or a DataLoader."""
    if TENSORFLOW:
        import tensorflow as tf

        def batches():
            for i in range(0, len(x), BATCH):
                yield (x[i : i + BATCH], target(x[i : i + BATCH]))[:outputs]

        spec = (tf.TensorSpec((None, 4), tf.float32), tf.TensorSpec((None, 1), tf.float32))
        return tf.data.Dataset.from_generator(batches, output_signature=spec[:outputs])
    import torch

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            for i in range(0, len(x), BATCH):
                yield tuple(torch.from_numpy(a[i : i + BATCH]) for a in (x, target(x)))[:outputs]

    return torch.utils.data.DataLoader(Batches(), batch_size=None)


def reference(make, optimizer, counts) -> dict:
    """One process: the same epochs on the union of the ranks' batches."""
    model = reference_weights(make)
    model.compile(optimizer(), "mse", jit_compile=False)
    losses = []
    for _ in range(2):
        batches = minibatches(counts, list(range(len(counts))))
        of_batches = []
        for x in batches:
            model.reset_metrics()
            of_batches.append(float(model.train_on_batch(x, target(x))))
        sizes = [len(x) for x in batches]
        losses.append(float(np.average(of_batches, weights=sizes)))
    return {"weights": [value(v) for v in model.trainable_variables], "loss": losses}


@dataclass(frozen=True)
class Case:
    """A training on data that end early, and how one process does the same."""

    make: Callable[[], keras.Model]
    optimizer: Callable[[], keras.optimizers.Optimizer]
    counts: list[int]  # batches of each rank
    options: dict = field(default_factory=dict)  # of fit_uneven
    make_alone: Callable[[], keras.Model] | None = None  # where one process has another model
    optimizer_alone: Callable[[], keras.optimizers.Optimizer] | None = None

    def expected(self) -> dict:
        """Train one process on the union of the ranks' batches."""
        make = self.make_alone or self.make
        optimizer = self.optimizer_alone or self.optimizer
        return reference(make, optimizer, self.counts)


def accumulating():
    return keras.optimizers.Adam(0.02, gradient_accumulation_steps=2)


def adam():
    return keras.optimizers.Adam(0.02)


def scaled():
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.02), initial_scale=4.0)


def synchronised():
    return network(hvd.SyncBatchNormalization(momentum=0.5))


def normalised():
    return network(keras.layers.BatchNormalization(momentum=0.5))


def sparse():
    """Make word numbers from signs. TensorFlow's gradient of the embedding is sparse."""
    keras.utils.set_random_seed(100 + hvd.rank())
    inputs = keras.Input((4,))
    signs = keras.layers.Lambda(lambda x: keras.ops.cast(x > 0, "int32"), output_shape=(4,))
    words = keras.layers.Embedding(2, 3)(signs(inputs))
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(words)))


def uneven() -> dict:
    """Train ranks with other numbers of batches, in each kind of training, and one process."""
    counts = [5, 3, 4, 2][: hvd.size()]
    few_on_rank_0 = [3, 5, 2, 4][: hvd.size()]
    generators = {"as_generator": True}
    passes = {"backward_passes_per_step": 2, "average_aggregated_gradients": True}
    cases = {
        "arrays": Case(network, momentum, counts),
        "first rank has fewer": Case(network, momentum, few_on_rank_0),
        "generators": Case(network, momentum, counts, generators),
        "steps_per_epoch": Case(network, momentum, counts, generators | {"steps_per_epoch": 5}),
        "accumulation": Case(network, accumulating, counts),
        "passes": Case(network, adam, counts, passes, optimizer_alone=accumulating),
        "sparse": Case(sparse, momentum, counts),
        "grouped": Case(network, momentum, counts, {"groups": 1}),
        "synchronised": Case(synchronised, momentum, counts, make_alone=normalised),
        "scaled": Case(network, scaled, counts),
    }
    if hvd.size() > 2:
        cases = {name: cases[name] for name in ("arrays", "generators", "passes")}
    results = {}
    for name, case in cases.items():
        expected = case.expected()
        if name == "steps_per_epoch":  # the data are not repeated: the second epoch has none
            expected = None
        together = fit_uneven(case.make, case.optimizer, case.counts, **case.options)
        results[name] = {"together": together, "expected": expected}
    return results


def even_generators() -> dict:
    """Train on data of unknown length, the same on all ranks: nothing but the steps may happen."""
    counts = [3] * hvd.size()
    together = fit_uneven(network, momentum, counts, as_generator=True)
    return together | {"expected": reference(network, momentum, counts)}


def two_optimizers() -> dict:
    """Train with an own train_step, two optimizers and layers made in the step, on uneven data."""
    counts = [4, 2, 3, 1][: hvd.size()]
    own_data = data(counts[hvd.rank()], hvd.rank())
    keras.utils.set_random_seed(100 + hvd.rank())
    first = hvd.DistributedOptimizer(keras.optimizers.Adam(0.02))
    second = hvd.DistributedOptimizer(momentum())
    model = Pair(first, second)
    steps = Steps()
    history = model.fit(
        own_data,
        batch_size=BATCH,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[BroadcastState(), MetricSums(), steps],
    )
    keras.utils.set_random_seed(100)
    alone = Pair(keras.optimizers.Adam(0.02), momentum())
    for x in minibatches(counts, list(range(hvd.size()))) * 2:
        alone.train_on_batch(x)
    return {
        "weights": [value(v) for v in model.trainable_variables],
        "expected": [value(v) for v in alone.trainable_variables],
        "steps": steps.seen,
        "history": history.history,
    }


class Pair(keras.Model):
    """Two layers, each with an optimizer and a loss of its own; as a GAN, in small."""

    def __init__(self, first, second):
        super().__init__()
        self.a, self.b = keras.layers.Dense(2), keras.layers.Dense(2)
        if not TENSORFLOW:  # Keras builds a model with PyTorch only through its call
            self.a.build((None, 4))
            self.b.build((None, 4))
        self.compile(jit_compile=False)
        self.first, self.second = first, second

    def train_step(self, x):
        x = keras.ops.convert_to_tensor(x[0] if isinstance(x, (tuple, list)) else x)
        return {
            "a_loss": descend(lambda: self.loss_of(self.a, x), self.a, self.first),
            "b_loss": descend(lambda: self.loss_of(self.b, x), self.b, self.second),
        }

    def loss_of(self, layer, x):
        return keras.ops.mean((layer(x) - x[:, :2]) ** 2)

    def call(self, x):
        return self.a(x) + self.b(x)


def descend(loss_of, layer, optimizer):
    """One step of the layer's weights, in the words of the backend."""
    if TENSORFLOW:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = loss_of()
        gradients = tape.gradient(loss, layer.trainable_weights)
        optimizer.apply(gradients, layer.trainable_weights)
        return loss
    import torch

    layer.zero_grad()
    loss = loss_of()
    loss.backward()
    with torch.no_grad():
        optimizer.apply([v.value.grad for v in layer.trainable_weights], layer.trainable_weights)
    return loss.detach()


def fit_steps(*callbacks, model=None, epochs=3, batches=4, **options) -> keras.callbacks.History:
    """Epochs of four steps, on data of each rank's own."""
    x = data(batches, 10 + hvd.rank())
    model = model or compiled(network())
    return model.fit(
        x,
        target(x),
        batch_size=BATCH,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=[BroadcastState(), *callbacks],
        **options,
    )


def compiled(model: keras.Model, optimizer=None, **options) -> keras.Model:
    options = {"jit_compile": False} | options
    model.compile(hvd.DistributedOptimizer(optimizer or momentum()), "mse", **options)
    return model


def stopping() -> dict:
    """Stop on one rank, in each place where a callback can."""
    last = hvd.size() - 1
    x = data(1, 5)
    validation = {"validation_data": (x, target(x))}
    cases = {
        "mid-epoch": ({"stop_at": (1, 1)}, {}),
        "last step": ({"stop_at": (0, 3)}, {}),
        "end of epoch": ({"stop_at": 1, "stop_in": "on_epoch_end"}, {}),
        "validation": ({"stop_at": 0, "stop_in": "on_test_end"}, validation),
    }
    results = {}
    for name, (when, options) in cases.items():
        steps = Steps(stop_rank=last, **when)
        model = compiled(network())
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            history = fit_steps(steps, model=model, **options)
        results[name] = {
            "steps": steps.seen,
            "epochs": history.epoch,
            "weights": [value(v) for v in model.trainable_variables],
            "stderr": stderr.getvalue(),
        }
    return results


def deciding() -> dict:
    """Count the epochs where Keras's own callbacks decide, by numbers of this rank's or of all."""
    x = data(4, hvd.rank())
    noise = np.random.default_rng(9).normal(size=(len(x), 1)).astype(np.float32)
    y = target(x) * hvd.rank() + noise
    epochs = {}
    for order in ("alone", "before", "after"):
        stop = keras.callbacks.EarlyStopping(monitor="loss", patience=1)
        callbacks = {
            "alone": [stop],
            "before": [stop, MetricSums()],
            "after": [MetricSums(), stop],
        }[order]
        model = compiled(network(), keras.optimizers.SGD(0.2))
        history = model.fit(
            x, y, batch_size=BATCH, epochs=30, verbose=0, callbacks=[BroadcastState(), *callbacks]
        )
        epochs[order] = len(history.epoch)

    # One rank has a NaN in its second batch.
    y = target(x)
    if hvd.rank() == hvd.size() - 1:
        y[BATCH + 3] = np.nan
    with contextlib.redirect_stdout(io.StringIO()):
        history = compiled(network()).fit(
            x,
            y,
            batch_size=BATCH,
            epochs=3,
            shuffle=False,
            verbose=0,
            callbacks=[keras.callbacks.TerminateOnNaN()],
        )
    return epochs | {"nan": len(history.epoch)}


class OwnRate(keras.callbacks.Callback):
    """Sets another rate on each rank, in the second step."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 1:
            self.model.optimizer.learning_rate = 0.01 * (1 + hvd.rank())


def refused() -> dict:
    """Return the error of what can't be agreed on, on every rank."""
    rank = hvd.rank()
    x = data(1, 0)
    y = target(x)
    last_of_rank_1 = 3 if rank == 1 else 0
    sums_on_0 = [MetricSums()] if rank == 0 else []
    restore_on_0 = [keras.callbacks.BackupAndRestore("unused")] if rank == 0 else []
    errors = {
        "rates": caught(lambda: fit_steps(OwnRate())),
        "first epochs": caught(lambda: fit_steps(initial_epoch=rank)),
        "no epoch": caught(lambda: fit_steps(initial_epoch=last_of_rank_1)),
        "epochs": caught(lambda: fit_steps(epochs=3 + rank)),
        "callbacks": caught(lambda: fit_steps(*sums_on_0)),
        "Keras's restore": caught(lambda: fit_steps(*restore_on_0)),
        "scaled outside": caught(lambda: outside().fit(x, y, verbose=0)),
    }
    if TENSORFLOW:
        import tensorflow as tf

        with tf.distribute.MirroredStrategy(["/cpu:0"]).scope():
            model = compiled(network())
            errors["strategy"] = caught(lambda: model.fit(x, y, verbose=0))
        several = compiled(network(), steps_per_execution=2)
        batches = 4 + 2 * rank
        errors["steps per execution"] = caught(lambda: fit_steps(model=several, batches=batches))
    return errors


def outside() -> keras.Model:
    model = network()
    scaled = keras.optimizers.LossScaleOptimizer(hvd.DistributedOptimizer(momentum()))
    model.compile(scaled, "mse", jit_compile=False)
    return model


def quiet() -> dict:
    """Return what the frameworks say in fits of new models, one with jit_compile=True."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    names = ("tensorflow", "torch._dynamo", "torch._logging")
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        for _ in range(7):
            fit_steps(epochs=1, batches=1)
        fit_steps(epochs=1, batches=1, model=compiled(network(), jit_compile=True))
    for logger in loggers:
        logger.removeHandler(handler)
    messages = [str(w.message) for w in caught_warnings]
    return {"logged": log.getvalue(), "warnings": messages}


def validations() -> dict:
    """Validate on one rank, and in other epochs on each; EarlyStopping by it on all."""
    x = data(2, 77)
    examples = (x, target(x))
    rank = hvd.rank()
    model = compiled(network())
    stop = keras.callbacks.EarlyStopping(monitor="val_loss", patience=30)
    examples_on_root = examples if rank == 0 else None
    on_root = fit_steps(MetricSums(), stop, model=model, validation_data=examples_on_root)
    expected = model.evaluate(*examples, verbose=0) if rank == 0 else None
    now_and_then = fit_steps(MetricSums(), validation_data=examples, validation_freq=1 + rank)
    return {
        "on root": on_root.history,
        "expected": hvd.broadcast_object(expected, 0),
        "freq": now_and_then.history,
    }


def replica_checks() -> dict:
    """Check replicas beside accumulators of each rank's own gradients, between two updates."""
    model = compiled(network(), keras.optimizers.Adam(0.01, gradient_accumulation_steps=3))
    fit_steps(ReplicaCheck(every=2), model=model, epochs=1)
    scaled = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)
    )
    fit_steps(ReplicaCheck(every=500), model=compiled(network(), scaled), epochs=1)
    return {"weights": [value(v) for v in model.trainable_variables]}


class Late(keras.Model):
    """Makes its layers when it is first called."""

    def __init__(self, own_step: bool = False):
        super().__init__()
        self.late = None
        self.own_step = own_step

    def build(self, shape):
        self.late = keras.layers.Dense(3)
        self.late.build(shape)
        self.head = keras.layers.Dense(1)
        self.built = True

    def call(self, x):
        return self.head(self.late(x))

    def train_step(self, data):
        return super().train_step(data)


class Subclass(keras.Model):
    def __init__(self):
        super().__init__()
        self.a, self.b = keras.layers.Dense(3), keras.layers.Dense(1)

    def call(self, x):
        return self.b(self.a(x))


def late_models() -> dict:
    """Train models that Keras builds at the first batch, and one process with rank 0's weights."""
    makers = {
        "sequential": lambda: keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(1)]),
        "subclass": Subclass,
        "late layers": Late,
    }
    callbacks = {
        "own": BroadcastState,
        "Horovod's": lambda: hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    }
    results = {}
    for name, make in makers.items():
        for whose, callback in callbacks.items():
            results[name, whose] = fit_late(make, callback())
    return results


def fit_late(make, broadcast) -> dict:
    """Train a model that is built at its first batch, and one process in the same way."""
    keras.utils.set_random_seed(100 + hvd.rank())
    model = compiled(make(), keras.optimizers.Adam(0.02))
    x = data(2, hvd.rank())
    model.fit(
        x,
        target(x),
        batch_size=BATCH,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[broadcast],
    )
    keras.utils.set_random_seed(100)
    alone = make()
    alone.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=False)
    counts = [2] * hvd.size()
    for minibatch in minibatches(counts, list(range(hvd.size()))) * 2:
        alone.train_on_batch(minibatch, target(minibatch))
    return {
        "weights": [value(v) for v in model.trainable_variables],
        "expected": [value(v) for v in alone.trainable_variables],
        "iterations": int(model.optimizer.iterations),
    }


class Largest(keras.metrics.Metric):
    """A metric whose state is no sum."""

    def __init__(self, name="largest"):
        super().__init__(name=name)
        self.seen = self.add_variable((), "zeros", name="seen")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.seen.assign(keras.ops.maximum(self.seen, keras.ops.max(y_true)))

    def result(self):
        return self.seen


class Counted(keras.metrics.Metric):
    """A metric of a user's whose state is a sum: the share of positive targets."""

    def __init__(self, name="counted"):
        super().__init__(name=name)
        self.positive = self.add_variable((), "zeros", name="positive")
        self.all = self.add_variable((), "zeros", name="all")

    def update_state(self, y_true, y_pred, sample_weight=None):
        is_positive = keras.ops.cast(y_true > 0, "float32")
        self.positive.assign_add(keras.ops.sum(is_positive))
        self.all.assign_add(keras.ops.cast(keras.ops.size(y_true), "float32"))

    def result(self):
        return self.positive / self.all


class Named(keras.Sequential):
    """A train_step whose logs have own names: of trackers by other names, and of plain numbers."""

    def __init__(self, layers, trackers):
        super().__init__(layers)
        self.total = keras.metrics.Mean(name="total_loss") if trackers else None

    @property
    def metrics(self):
        return [self.total] if self.total is not None else []

    def train_step(self, data):
        x, y = data
        loss = keras.ops.mean((self(x) - y) ** 2)
        if self.total is not None:
            self.total.update_state(loss)
            return {"loss": self.total.result(), "last": loss}
        return {"raw_loss": loss}


class Score(keras.callbacks.Callback):
    def __init__(self, ranks):
        super().__init__()
        self.ranks = ranks

    def on_epoch_end(self, epoch, logs=None):
        logs["everywhere"] = float(hvd.rank())
        if hvd.rank() in self.ranks:
            logs["on one rank"] = 7.5
        logs["words"] = "not a number"


def labels(x: np.ndarray) -> np.ndarray:
    return (target(x) > 0).astype(np.float32)


def classifier(optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """Make a model with metrics of each kind; all ranks have the same."""
    keras.utils.set_random_seed(3)
    layers = [keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid")]
    model = keras.Sequential(layers)
    metrics = [
        "accuracy",
        keras.metrics.AUC(name="auc"),
        keras.metrics.F1Score(threshold=0.5),
        Counted(),
        Largest(),
    ]
    model.compile(optimizer, "mse", metrics=metrics)
    return model


def frozen() -> keras.optimizers.Optimizer:
    """Make an optimizer that leaves the weights what they are."""
    return hvd.DistributedOptimizer(keras.optimizers.SGD(0.0))


def named(trackers: bool) -> keras.Model:
    layers = [keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")]
    model = Named(layers, trackers)
    model.compile(frozen(), jit_compile=False)
    return model


def logs() -> dict:
    """Return the epoch's logs, and what one process logs over all examples."""
    sizes = [3, 1, 2, 1][: hvd.size()]
    x = data(sizes[hvd.rank()], hvd.rank())
    all_x = np.concatenate([data(n, r) for r, n in enumerate(sizes)])
    quiet = {"batch_size": BATCH, "verbose": 0}

    def classify(model, *callbacks):
        validation = (x, labels(x))
        callbacks = [BroadcastState(), *callbacks]
        history = model.fit(
            x,
            labels(x),
            shuffle=False,
            validation_data=validation,
            callbacks=callbacks,
            **quiet,
        )
        return history.history

    def regress(model):
        history = model.fit(x, target(x), shuffle=False, callbacks=[MetricSums()], **quiet)
        return history.history

    alone = classifier(keras.optimizers.SGD(0.0))
    expected = alone.evaluate(all_x, labels(all_x), return_dict=True, **quiet)
    model = classifier(frozen())
    fit_logs = classify(model, MetricSums())
    evaluate_logs = model.evaluate(
        x, labels(x), return_dict=True, callbacks=[MetricSums()], **quiet
    )
    score = Score(ranks=[0])
    unweighted = hvd.callbacks.MetricAverageCallback(unweighted=True)
    losses = [float(np.mean(target(b) ** 2)) for b in x.reshape(-1, BATCH, 4)]  # weights are 0
    return {
        "fit": fit_logs,
        "evaluate": evaluate_logs,
        "expected": expected,
        "named": regress(named(trackers=True)),
        "raw": regress(named(trackers=False)),
        "own losses": losses,
        "callbacks": classify(classifier(frozen()), score, MetricSums()),
        "unweighted": classify(classifier(frozen()), score, unweighted),
    }


def main() -> None:
    hvd.init()
    report(hvd.rank(), {name: globals()[name]() for name in sys.argv[1:]})


if __name__ == "__main__":
    main()
