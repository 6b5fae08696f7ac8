"""Run on real ranks by test_together.py: each scenario's findings on this rank go back to the test."""

import contextlib
import io
import logging
import sys
import warnings

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
    """The model that rank 0 makes, with rank 0's weights, on any rank."""
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
    """What one process would train on: each step's batches of the ranks that have one."""
    parts = [
        data(count, seed).reshape(count, BATCH, 4)
        for count, seed in zip(counts, seeds, strict=True)
    ]
    return [np.concatenate([p[i] for p in parts if i < len(p)]) for i in range(max(counts))]


def fit_uneven(
    make, optimizer, counts, as_generator=False, steps_per_epoch=None, **options
) -> dict:
    """Two epochs of data that end early on some ranks, beside one process with all of them."""
    mine = data(counts[hvd.rank()], hvd.rank())
    model = make()
    model.compile(hvd.DistributedOptimizer(optimizer(), **options), "mse", jit_compile=False)
    callbacks = [BroadcastState(), MetricSums(), steps := Steps(), ReplicaCheck(every=3)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = model.fit(
            generated(mine, 2) if as_generator else mine,
            None if as_generator else target(mine),
            batch_size=None if as_generator else BATCH,
            steps_per_epoch=steps_per_epoch,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
    return {
        "weights": [value(v) for v in model.trainable_variables],
        "loss": history.history["loss"],
        "steps": steps.seen,
        "warnings": [str(w.message) for w in said if "takes part with nothing" in str(w.message)],
    }


def generated(x: np.ndarray, outputs: int):
    """A data set whose length Keras doesn't know, as of a tf.data generator or an iterable DataLoader."""
    if TENSORFLOW:
        import tensorflow as tf

        def batches():
            for i in range(0, len(x), BATCH):
                yield (x[i : i + BATCH], target(x[i : i + BATCH]))[:outputs]

        spec = (tf.TensorSpec((None, 4), tf.float32), tf.TensorSpec((None, 1), tf.float32))[
            :outputs
        ]
        return tf.data.Dataset.from_generator(batches, output_signature=spec)
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
        found = []
        for x in batches:
            model.reset_metrics()
            found.append(float(model.train_on_batch(x, target(x))))
        losses.append(float(np.average(found, weights=[len(x) for x in batches])))
    return {"weights": [value(v) for v in model.trainable_variables], "loss": losses}


def uneven() -> dict:
    """Ranks with other numbers of batches, each kind beside one process."""
    counts = [5, 3, 4, 2][: hvd.size()]
    few = [3, 5, 2, 4][: hvd.size()]  # rank 0 has fewer

    def accumulating():
        return keras.optimizers.Adam(0.02, gradient_accumulation_steps=2)

    def plain():
        return keras.optimizers.Adam(0.02)

    def sparse():
        """Word numbers from signs; TensorFlow's gradient is sparse."""
        keras.utils.set_random_seed(100 + hvd.rank())
        inputs = keras.Input((4,))
        words = keras.layers.Lambda(lambda x: keras.ops.cast(x > 0, "int32"), output_shape=(4,))(
            inputs
        )
        embedded = keras.layers.Flatten()(keras.layers.Embedding(2, 3)(words))
        return keras.Model(inputs, keras.layers.Dense(1)(embedded))

    def synchronised():
        return network(hvd.SyncBatchNormalization(momentum=0.5))

    def normalised():
        return network(keras.layers.BatchNormalization(momentum=0.5))

    def scaled():
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.02), initial_scale=4.0)

    passes = {"backward_passes_per_step": 2, "average_aggregated_gradients": True}
    cases = {
        "arrays": (network, momentum, counts, {}, None),
        "first rank has fewer": (network, momentum, few, {}, None),
        "generators": (network, momentum, counts, {"as_generator": True}, None),
        "steps_per_epoch": (
            network,
            momentum,
            counts,
            {"as_generator": True, "steps_per_epoch": 5},
            None,
        ),
        "accumulation": (network, accumulating, counts, {}, accumulating),
        "passes": (network, plain, counts, passes, accumulating),
        "sparse": (sparse, momentum, counts, {}, None),
        "grouped": (network, momentum, counts, {"groups": 1}, None),
        "synchronised": (synchronised, momentum, counts, {}, momentum),
        "scaled": (network, scaled, counts, {}, None),
    }
    found = {}
    if hvd.size() > 2:
        cases = {name: cases[name] for name in ("arrays", "generators", "passes")}
    for name, (make, optimizer, numbers, options, other) in cases.items():
        expected = reference(
            normalised if make is synchronised else make, other or optimizer, numbers
        )
        if name == "steps_per_epoch":  # the data are not repeated: the second epoch has none
            expected = None
        found[name] = {
            "together": fit_uneven(make, optimizer, numbers, **options),
            "expected": expected,
        }
    return found


def even_generators() -> dict:
    """Data of a length that nobody knows beforehand, as long on all ranks: nothing but the steps may happen."""
    counts = [3] * hvd.size()
    found = fit_uneven(network, momentum, counts, as_generator=True)
    return found | {"expected": reference(network, momentum, counts)}


def two_optimizers() -> dict:
    """A train_step of its own with two optimizers and layers that come to exist in it; uneven data."""
    counts = [4, 2, 3, 1][: hvd.size()]
    mine = data(counts[hvd.rank()], hvd.rank())
    keras.utils.set_random_seed(100 + hvd.rank())
    model = Pair(
        hvd.DistributedOptimizer(keras.optimizers.Adam(0.02)), hvd.DistributedOptimizer(momentum())
    )
    steps = Steps()
    history = model.fit(
        mine,
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
        losses = {}
        for name, layer, optimizer in (
            ("a_loss", self.a, self.first),
            ("b_loss", self.b, self.second),
        ):
            losses[name] = descend(
                lambda layer=layer: keras.ops.mean((layer(x) - x[:, :2]) ** 2), layer, optimizer
            )
        return losses

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
    """One rank stops, in each place where a callback can."""
    last, x = hvd.size() - 1, data(1, 5)
    validation = {"validation_data": (x, target(x))}
    cases = {
        "mid-epoch": ({"stop_at": (1, 1)}, {}),
        "last step": ({"stop_at": (0, 3)}, {}),
        "end of epoch": ({"stop_at": 1, "stop_in": "on_epoch_end"}, {}),
        "validation": ({"stop_at": 0, "stop_in": "on_test_end"}, validation),
    }
    found = {}
    for name, (when, options) in cases.items():
        steps = Steps(stop_rank=last, **when)
        model = compiled(network())
        with contextlib.redirect_stderr(io.StringIO()) as said:
            history = fit_steps(steps, model=model, **options)
        weights = [value(v) for v in model.trainable_variables]
        found[name] = {
            "steps": steps.seen,
            "epochs": history.epoch,
            "weights": weights,
            "said": said.getvalue(),
        }
    return found


def deciding() -> dict:
    """Keras's own callbacks that decide, on numbers of this rank's, or of all."""
    found = {}
    x = data(4, hvd.rank())
    y = target(x) * hvd.rank() + np.random.default_rng(9).normal(size=(len(x), 1)).astype(
        np.float32
    )
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
        found[order] = len(history.epoch)
    y = target(x)
    if hvd.rank() == hvd.size() - 1:
        y[BATCH + 3] = np.nan
    with contextlib.redirect_stdout(io.StringIO()):
        nan = compiled(network()).fit(
            x,
            y,
            batch_size=BATCH,
            epochs=3,
            shuffle=False,
            verbose=0,
            callbacks=[keras.callbacks.TerminateOnNaN()],
        )
    return found | {"nan epochs": len(nan.epoch)}


class OwnRate(keras.callbacks.Callback):
    """Sets another rate on each rank, in the second step."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 1:
            self.model.optimizer.learning_rate = 0.01 * (1 + hvd.rank())


def refused() -> dict:
    """What can't be agreed on: the error, on every rank."""
    rank = hvd.rank()
    found = {
        "rates": caught(lambda: fit_steps(OwnRate())),
        "first epochs": caught(lambda: fit_steps(initial_epoch=rank)),
        "no epoch": caught(lambda: fit_steps(initial_epoch=3 * (rank == 1))),
        "epochs": caught(lambda: fit_steps(epochs=3 + rank)),
        "callbacks": caught(lambda: fit_steps(*[MetricSums()] if rank == 0 else [])),
        "Keras's restore": caught(
            lambda: fit_steps(*[keras.callbacks.BackupAndRestore("unused")] if rank == 0 else [])
        ),
        "scaled outside": caught(lambda: outside().fit(data(1, 0), target(data(1, 0)), verbose=0)),
    }
    if TENSORFLOW:
        import tensorflow as tf

        with tf.distribute.MirroredStrategy(["/cpu:0"]).scope():
            model = compiled(network())
            found["strategy"] = caught(lambda: model.fit(data(1, 0), target(data(1, 0)), verbose=0))
        several = compiled(network(), steps_per_execution=2)
        found["steps per execution"] = caught(
            lambda: fit_steps(model=several, batches=4 + 2 * rank)
        )
    return found


def outside() -> keras.Model:
    model = network()
    scaled = keras.optimizers.LossScaleOptimizer(hvd.DistributedOptimizer(momentum()))
    model.compile(scaled, "mse", jit_compile=False)
    return model


def quiet() -> dict:
    """Ten fits of new models, with jit_compile=True as users write: what the frameworks say on the way."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    loggers = [
        logging.getLogger(name) for name in ("tensorflow", "torch._dynamo", "torch._logging")
    ]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(7):
            fit_steps(epochs=1, batches=1)
        fit_steps(epochs=1, batches=1, model=compiled(network(), jit_compile=True))
    for logger in loggers:
        logger.removeHandler(handler)
    return {"logged": heard.getvalue(), "warnings": [str(w.message) for w in said]}


def validations() -> dict:
    """Validation on one rank, and in other epochs on each; EarlyStopping by it on all."""
    x = data(2, 77)
    given = (x, target(x))
    rank = hvd.rank()
    model = compiled(network())
    stop = keras.callbacks.EarlyStopping(monitor="val_loss", patience=30)
    on_root = fit_steps(
        MetricSums(), stop, model=model, validation_data=given if rank == 0 else None
    )
    expected = model.evaluate(*given, verbose=0) if rank == 0 else None
    now_and_then = fit_steps(MetricSums(), validation_data=given, validation_freq=1 + rank)
    return {
        "on root": on_root.history,
        "expected": hvd.broadcast_object(expected, 0),
        "freq": now_and_then.history,
    }


def replica_checks() -> dict:
    """ReplicaCheck beside accumulators that hold each rank's own gradients, when training ends between updates."""
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
    """Models that Keras builds at the first batch, beside one process that begins with rank 0's weights."""
    makers = {
        "sequential": lambda: keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(1)]),
        "subclass": Subclass,
        "late layers": Late,
    }
    callbacks = {
        "own": BroadcastState,
        "Horovod's": lambda: hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    }
    counts = [2] * hvd.size()
    found = {}
    for name, make in makers.items():
        for whose, callback in callbacks.items():
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
                callbacks=[callback()],
            )
            keras.utils.set_random_seed(100)
            alone = make()
            alone.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=False)
            for minibatch in minibatches(counts, list(range(hvd.size()))) * 2:
                alone.train_on_batch(minibatch, target(minibatch))
            found[name, whose] = {
                "weights": [value(v) for v in model.trainable_variables],
                "expected": [value(v) for v in alone.trainable_variables],
                "iterations": int(model.optimizer.iterations),
            }
    return found


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
        self.positive.assign_add(keras.ops.sum(keras.ops.cast(y_true > 0, "float32")))
        self.all.assign_add(keras.ops.cast(keras.ops.size(y_true), "float32"))

    def result(self):
        return self.positive / self.all


class Named(keras.Sequential):
    """A train_step whose logs have names of their own: trackers by other names, and numbers that no metric keeps."""

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
        return {"mine": loss}


class Score(keras.callbacks.Callback):
    def __init__(self, ranks):
        super().__init__()
        self.ranks = ranks

    def on_epoch_end(self, epoch, logs=None):
        logs["everywhere"] = float(hvd.rank())
        if hvd.rank() in self.ranks:
            logs["on one rank"] = 7.5
        logs["words"] = "not a number"


def logs() -> dict:
    """The epoch's logs, beside what one process logs over all examples; the weights stay what they are."""
    sizes = [3, 1, 2, 1][: hvd.size()]
    mine = data(sizes[hvd.rank()], hvd.rank())
    whole = np.concatenate([data(n, r) for r, n in enumerate(sizes)])

    def labels(x):
        return (target(x) > 0).astype(np.float32)

    def fit(model, x, y, *callbacks):
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, "validation_data": (x, y)}
        return model.fit(x, y, callbacks=[BroadcastState(), *callbacks], **options).history

    def classifier():
        keras.utils.set_random_seed(3)
        layers = [keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid")]
        model = keras.Sequential(layers)
        metrics = [
            "accuracy",
            keras.metrics.AUC(name="auc"),
            keras.metrics.F1Score(threshold=0.5),
            Counted(),
        ]
        model.compile(
            hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)),
            "mse",
            metrics=[*metrics, Largest()],
        )
        return model

    named = Named(
        [keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")], trackers=True
    )
    named.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), jit_compile=False)
    raw = Named(
        [keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")], trackers=False
    )
    raw.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), jit_compile=False)
    alone = classifier()
    alone.compile(keras.optimizers.SGD(0.0), "mse", metrics=["accuracy", keras.metrics.AUC(name="auc"),
                  keras.metrics.F1Score(threshold=0.5), Counted(), Largest()])  # fmt: skip
    expected = alone.evaluate(whole, labels(whole), batch_size=BATCH, verbose=0, return_dict=True)
    together = classifier()
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    return {
        "fit": fit(together, mine, labels(mine), MetricSums()),
        "evaluate": together.evaluate(
            mine,
            labels(mine),
            batch_size=BATCH,
            verbose=0,
            return_dict=True,
            callbacks=[MetricSums()],
        ),
        "expected": expected,
        "share": float(labels(mine).mean()),
        "named": named.fit(mine, target(mine), callbacks=[MetricSums()], **options).history,
        "raw": raw.fit(mine, target(mine), callbacks=[MetricSums()], **options).history,
        "own": [
            float(np.mean(target(b) ** 2)) for b in mine.reshape(-1, BATCH, 4)
        ],  # losses; the weights are 0
        "callbacks": fit(classifier(), mine, labels(mine), Score([0]), MetricSums()),
        "old": fit(
            classifier(),
            mine,
            labels(mine),
            Score([0]),
            hvd.callbacks.MetricAverageCallback(unweighted=True),
        ),
    }


def main() -> None:
    hvd.init()
    report(hvd.rank(), {name: globals()[name]() for name in sys.argv[1:]})


if __name__ == "__main__":
    main()
