"""Run on real ranks by test_compatibility.py.

Saved models, and what users override or are told to do.
"""

import functools
import os
import sys
import warnings
from pathlib import Path

import h5py
import keras
import numpy as np

import recipe.keras as hvd
from recipe.keras import state
from recipe.keras.callbacks import ReplicaCheck
from recipe.keras.distributed import is_distributed, reduction_of, use_compression
from recipe.rules.schedule import Rate
from tests.ranks import report
from tests.recipe.keras.classification import EXAMPLES, LABELS, compiled, fit, nesterov, network

optimizers = keras.optimizers
EXTENSIONS = ("keras", "h5")
X = np.random.default_rng(3).normal(size=(16, 3)).astype(np.float32)
Y = X.sum(axis=1, keepdims=True)
TOUCHED = Path(os.environ["RESULTS"]) / "touched"


class Mine(optimizers.SGD):
    pass


def own_loss(true, predicted):
    return keras.ops.mean(keras.ops.square(keras.ops.subtract(true, predicted)))


@keras.saving.register_keras_serializable("tests")
class OwnLoss(keras.losses.Loss):
    def call(self, true, predicted):
        return own_loss(true, predicted)


def path(name: str) -> str:
    return str(Path(os.environ["RESULTS"]) / f"{hvd.rank()}-{name}")


def values(variables) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(v).copy() for v in variables]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def small(optimizer=None, *layers, **settings) -> keras.Model:
    """A trained model of two layers, and others."""
    inputs = keras.Input((3,))
    outputs = inputs
    for layer in (*layers, keras.layers.Dense(4), keras.layers.Dense(1, name="last")):
        outputs = layer(outputs)
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer or optimizers.SGD(0.1, 0.9), **({"loss": "mse", "jit_compile": False} | settings)
    )
    model.train_on_batch(X, Y)
    return model


def saved(name: str, optimizer=None, *layers, **settings) -> str:
    small(optimizer, *layers, **settings).save(path(name))
    return path(name)


def refused(action) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing"


def multi(for_biases: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    return optimizers.MultiOptimizer(
        optimizers.OptimizerMap(optimizers.Adam(0.01), {".*bias": for_biases})
    )


def every_kind() -> dict:
    rate = Rate(0.02, 0.1, warmup_epochs=1.1, decay_epochs=(2.0,))
    return {
        "SGD": lambda: optimizers.SGD(0.05, 0.9, nesterov=True),
        "Adam": lambda: optimizers.Adam(0.01, amsgrad=True, use_ema=True),
        "RMSprop": lambda: optimizers.RMSprop(0.01, momentum=0.9, centered=True),
        "Nadam": lambda: optimizers.Nadam(0.01),
        "Lamb": lambda: optimizers.Lamb(0.01),
        "accumulating": lambda: optimizers.Adam(0.01, gradient_accumulation_steps=2),
        "scheduled": lambda: optimizers.SGD(optimizers.schedules.CosineDecay(0.1, 50), 0.9),
        "LossScaleOptimizer": lambda: optimizers.LossScaleOptimizer(
            optimizers.Adam(0.01), dynamic_growth_steps=2
        ),
        "MultiOptimizer": lambda: optimizers.MultiOptimizer(
            optimizers.OptimizerMap(optimizers.Adam(0.01), {".*bias": optimizers.SGD(0.01, 0.9)})
        ),
        "ours": lambda: hvd.SGD(hvd.RateSchedule(rate, 4), 0.9),
    }


def going_on() -> dict:
    """Three steps, saved and loaded, three more; the same without saving.

    Distributed when saved, and not.
    """
    found = {}
    for name, make in every_kind().items():
        for distributed in (True, False):
            model = small(hvd.DistributedOptimizer(make()) if distributed else make())
            if distributed:
                state.broadcast_state(model)
            for _ in range(2):
                model.train_on_batch(X, Y)
            loaded = {}
            for extension in EXTENSIONS:
                model.save(path(f"model.{extension}"))
                loaded[extension] = hvd.load_model(
                    path(f"model.{extension}"), compression=hvd.Compression.fp16
                )
                assert loaded[extension].jit_compile is False
            options = [reduction_of(m.optimizer).options for m in loaded.values()]
            outcome = {
                "before": values(state.everything(model)),
                "loaded": {e: values(state.everything(m)) for e, m in loaded.items()},
                "distributed": [is_distributed(m.optimizer) for m in loaded.values()],
                "compression": [o.compression.__name__ for o in options],
            }

            # All go on.
            for m in loaded.values():
                use_compression(m.optimizer, hvd.Compression.none)
                for _ in range(3):
                    m.train_on_batch(X, Y)
            if not distributed:
                model.optimizer = hvd.DistributedOptimizer(model.optimizer)
                model.train_function = None
            for _ in range(3):
                model.train_on_batch(X, Y)
            outcome["after"] = [values(state.everything(m)) for m in (model, *loaded.values())]
            found[name, distributed] = outcome
    return found


def kinds_of_files() -> dict:
    """Losses and metrics by name, as objects, as functions, by output; names and objects of files.

    All train on.
    """
    found = {}
    metrics = keras.metrics
    settings = {
        "names": {"loss": "mse", "metrics": ["mae", "accuracy"], "weighted_metrics": ["mse"]},
        "objects": {
            "loss": keras.losses.Huber(0.5),
            "metrics": [metrics.RootMeanSquaredError(name="root")],
        },
        "own": {"loss": own_loss, "metrics": [own_loss]},
        "registered": {"loss": OwnLoss()},
        "by output": {
            "loss": {"last": "mae"},
            "metrics": {"last": ["mse"]},
            "loss_weights": {"last": 0.5},
        },
    }
    for name, chosen in settings.items():
        model, losses = small(**chosen), []
        for extension in EXTENSIONS:
            model.save(path(f"kinds.{extension}"))
            if extension == "keras":
                compile_config = model._compile_config.config.copy()
        model._compile_config.config |= compile_config
        for extension in EXTENSIONS:
            loaded = hvd.load_model(
                path(f"kinds.{extension}"), custom_objects={"own_loss": own_loss}
            )
            result = loaded.train_on_batch(X, Y, return_dict=True)
            losses.append(sorted((k, float(v)) for k, v in result.items()))
        found[name] = losses
    small().save(path("kinds.hdf5"))
    with h5py.File(path("kinds.hdf5")) as file:
        found["open"] = int(hvd.load_model(file).optimizer.iterations)
    found["path"] = int(hvd.load_model(Path(path("kinds.hdf5"))).optimizer.iterations)
    for extension in EXTENSIONS:
        plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        plain.save(path(f"plain.{extension}"))
        found["uncompiled", extension] = getattr(
            hvd.load_model(path(f"plain.{extension}")), "optimizer", None
        )
        plain.compile(optimizers.Adam(0.25), "mse", jit_compile=False)
        plain.save(path(f"new.{extension}"))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            new = hvd.load_model(path(f"new.{extension}"))
        found["untrained", extension] = float(new.optimizer.learning_rate)
        new.train_on_batch(X, Y)
    again = hvd.load_model(saved("again.h5", optimizers.SGD(0.1, 0.9)))
    again.save(path("again.keras"))
    found["saved again"] = int(hvd.load_model(path("again.keras")).optimizer.iterations)
    return found


def functions() -> dict:
    """What a function makes for the optimizer's name is taken, with the saved state.

    It may be distributed already.
    """

    def plain(**settings):
        return Mine(**settings)

    def wrapped(**settings):
        return hvd.DistributedOptimizer(Mine(**settings), op=hvd.Sum)

    def adam(**settings):
        return hvd.DistributedOptimizer(optimizers.Adam(**settings), op=hvd.Sum)

    plain.__name__ = "Mine"
    half = {"compression": hvd.Compression.fp16}
    cases = {
        "class": (Mine(0.1, 0.9), {"custom_objects": {"Mine": Mine}}),
        "plain": (Mine(0.1, 0.9), {"custom_objects": {"Mine": plain}} | half),
        "wrapped": (Mine(0.1, 0.9), {"custom_objects": {"Mine": wrapped}}),
        "compressed": (Mine(0.1, 0.9), {"custom_objects": {"Mine": wrapped}} | half),
        "partial": (Mine(0.1, 0.9), {"custom_objects": {"Mine": functools.partial(Mine)}}),
        "custom_optimizers": (Mine(0.1, 0.9), {"custom_optimizers": [plain]} | half),
        "schedule": (
            Mine(optimizers.schedules.CosineDecay(0.1, 50), 0.9),
            {"custom_objects": {"Mine": wrapped}},
        ),
        "inside": (
            optimizers.LossScaleOptimizer(Mine(0.1, 0.9)),
            {"custom_objects": {"Mine": plain}},
        ),
        "among": (multi(Mine(0.01, 0.9)), {"custom_objects": {"Mine": plain}}),
        "Adam": (optimizers.Adam(0.1), {"custom_objects": {"Adam": adam}}),
        "adam": (optimizers.Adam(0.1), {"custom_objects": {"adam": adam}}),
    }
    found = {}
    for name, (optimizer, arguments) in cases.items():
        model = small(optimizer)
        for extension in EXTENSIONS:
            model.save(path(f"functions.{extension}"))
            loaded = hvd.load_model(path(f"functions.{extension}"), **arguments)
            options = reduction_of(loaded.optimizer).options
            kept = True
            if name == "compressed":
                copy = loaded.optimizer.from_config(loaded.optimizer.get_config())
                kept = reduction_of(copy).options.compression is options.compression
            saved_values, loaded_values = (values(state.everything(m)) for m in (model, loaded))
            found[name, extension] = {
                "op": options.op == hvd.Sum,
                "half": options.compression is hvd.Compression.fp16,
                "kept": kept,
                "same": same(saved_values, loaded_values),
                "trains": bool(np.isfinite(loaded.train_on_batch(X, Y))),
            }
    return found


def touch(x):
    TOUCHED.touch()
    return x


def not_loaded() -> dict:
    """What must be refused, by what the sentence must name."""
    found = {}
    load = hvd.load_model
    for extension in EXTENSIONS:
        whole = Path(saved(f"whole.{extension}")).read_bytes()
        for name, content in {"empty": b"", "text": b"hello", "cut": whole[:3000]}.items():
            Path(path(f"{name}.{extension}")).write_bytes(content)
            found[name, extension] = refused(
                lambda name=name, e=extension: load(path(f"{name}.{e}"))
            )
        found["missing.", extension] = refused(lambda e=extension: load(path(f"missing.{e}")))

        # Optimizers and functions for them
        mine, scaled = (
            saved(f"mine.{extension}", Mine(0.1, 0.9)),
            optimizers.LossScaleOptimizer(Mine(0.1, 0.9)),
        )
        inner = saved(f"inner.{extension}", scaled)
        objects = {
            "returned None": lambda **_: None,
            "'Mine' failed with the saved configuration": lambda rate: rate,
            "doesn't fit Adam": lambda **_: optimizers.Adam(),
            "doesn't fit SGD": lambda **_: optimizers.SGD(),
        }
        for words, function in objects.items():
            found[words, extension] = refused(
                lambda f=function, p=mine: load(p, custom_objects={"Mine": f})
            )
        outer = {"Mine": lambda **settings: hvd.DistributedOptimizer(Mine(**settings))}
        found["must be outermost", extension] = refused(
            lambda p=inner, o=outer: load(p, custom_objects=o)
        )
        found["'Mine'; give it to load_model", extension] = refused(lambda p=mine: load(p))
        found["has no name", extension] = refused(
            lambda p=mine: load(p, custom_optimizers=[lambda **_: None])
        )
        own = saved(f"own.{extension}", loss=own_loss)
        found["'own_loss'; give it to load_model", extension] = refused(lambda p=own: load(p))

        # Python code in a file is not run.
        layer = saved(
            f"lambda.{extension}", None, keras.layers.Lambda(lambda x: touch(x), output_shape=(3,))
        )
        TOUCHED.unlink(missing_ok=True)
        found["lambda, which may do anything", extension] = refused(lambda p=layer: load(p))
        found["run", extension] = TOUCHED.exists()

    # Files of other kinds
    small().save_weights(path("w.weights.h5"))
    found["holds weights and no model", "h5"] = refused(lambda: load(path("w.weights.h5")))
    Path(path("h5.keras")).write_bytes(Path(path("w.weights.h5")).read_bytes())
    found["rename it", "keras"] = refused(lambda: load(path("h5.keras")))
    with h5py.File(path("whole.h5"), "a") as file:
        file.attrs["keras_version"] = "2.2.4-tf"
    found["Keras 2.2.4-tf wrote", "h5"] = refused(lambda: load(path("whole.h5")))
    model = small()
    model.save(path("both.h5"))
    model.save(path("both.keras"))
    found["names no optimizer", "keras"] = refused(lambda: load(path("both.keras")))
    return found


def loaded_on_root() -> dict:
    """Rank 0 loads a trained .h5 model, the others make a new one; they go on together."""
    model = compiled(network(), nesterov())
    model.train_on_batch(EXAMPLES[:4], LABELS[:4])
    model.save(path("root.h5"))
    again = hvd.load_model(path("root.h5")) if hvd.rank() == 0 else compiled(network(), nesterov())
    fit(again, 1, ReplicaCheck())
    return {"weights": again.get_weights(), "iterations": int(again.optimizer.iterations)}


HOOKS = [
    f"on_{when}"
    for when in ("train_begin", "epoch_begin", "batch_begin", "batch_end", "epoch_end", "train_end")
]


def counting(kind: type, *methods: str) -> type:
    """A subclass that overrides these methods: counts their calls, then calls the class's own."""

    def overridden(method: str):
        def called(self, *args, **kwargs):
            calls = self.__dict__.setdefault("calls", dict.fromkeys(methods, 0))
            calls[method] += 1
            return getattr(super(cls, self), method)(*args, **kwargs)

        return called

    cls = type(
        f"Counting{kind.__name__}", (kind,), {method: overridden(method) for method in methods}
    )
    return cls


def overriding() -> dict:
    """Two epochs of four batches.

    All public methods of the callbacks and of the state are overridden.
    """
    model = compiled(network(), nesterov())
    held = counting(hvd.elastic.KerasState, "commit", "save")(model, batch=0, epoch=0)
    first, second, *others = model.trainable_variables
    callbacks = overriding_callbacks(held, first)

    # The local variables, of which one is registered afterwards, keep what they have.
    broadcast = callbacks["broadcast"]
    broadcast.register_local_var(second.value)
    for v in (first, second, *others):
        v.assign(keras.ops.full(v.shape, float(hvd.rank())))
    broadcast.set_model(model)
    before = values(model.trainable_variables)
    hvd.callbacks.BroadcastGlobalVariablesCallback.on_train_begin(broadcast)
    after = values(model.trainable_variables)

    # All hooks of a training are called.
    state.broadcast_state(model)
    history = fit(model, 2, *callbacks.values())
    return {
        "calls": {name: callback.calls for name, callback in callbacks.items()},
        "state": held.calls,
        "local": [np.array_equal(a, b) for a, b in zip(before, after, strict=True)],
        "read": {
            "batches_remaining": callbacks["commit"].batches_remaining,
            "steps_per_epoch": callbacks["batch"].steps_per_epoch,
            "initial_epoch": callbacks["epoch"].initial_epoch,
            "current_epoch": callbacks["warmup"].current_epoch,
        },
        "held": [held.batch, held.epoch],
        "epochs": len(history.epoch),
    }


def overriding_callbacks(
    held: hvd.elastic.KerasState, local: keras.Variable
) -> dict[str, keras.callbacks.Callback]:
    """Callbacks of all kinds, each of a subclass that overrides all hooks."""
    hooks = [*HOOKS, "on_train_batch_begin", "on_train_batch_end"]
    callbacks, elastic = hvd.callbacks, hvd.elastic
    broadcast = counting(callbacks.BroadcastGlobalVariablesCallback, "register_local_var", *hooks)
    average = counting(callbacks.MetricAverageCallback, *hooks)
    schedule = counting(callbacks.LearningRateScheduleCallback, *hooks)
    warmup = counting(callbacks.LearningRateWarmupCallback, *hooks)
    batch = counting(elastic.UpdateBatchStateCallback, *hooks)
    epoch = counting(elastic.UpdateEpochStateCallback, *hooks)
    commit = counting(elastic.CommitStateCallback, "commit", *hooks)
    return {
        "broadcast": broadcast(0, local_variables=local),
        "average": average(),
        "schedule": schedule(0.1, 1.0, staircase=False),
        "warmup": warmup(0.1, 1),
        "batch": batch(held),
        "epoch": epoch(held),
        "commit": commit(held, batches_per_commit=3),
    }


def replaced() -> dict:
    """Overrides that don't call the class's own: what the class does is not done."""

    class Never(hvd.elastic.CommitStateCallback):
        def commit(self):
            pass

    class Constant(hvd.callbacks.LearningRateScheduleCallback):
        def on_batch_begin(self, batch, logs=None):
            pass

    model = compiled(network(), nesterov())
    rate = float(model.optimizer.learning_rate)
    held = counting(hvd.elastic.KerasState, "commit")(model, batch=0, epoch=0)
    fit(model, 1, Never(held), Constant(rate, 0.5))
    return {
        "commits": getattr(held, "calls", {}),
        "rate": [rate, float(model.optimizer.learning_rate)],
    }


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.last = keras.layers.Dense(1)

    def call(self, x):
        return self.last(x)


class Built(Net):
    def build(self, input_shape):
        self.built = True


def advice() -> dict:
    """Models without variables: KerasState says what to do, and that works."""
    made = {
        "subclass": Net,
        "built": Built,
        "sequential": lambda: keras.Sequential([keras.layers.Dense(1)]),
    }
    found = {}
    for name, make in made.items():
        model = make()
        model.compile(hvd.DistributedOptimizer(optimizers.SGD(0.1, 0.9)), "mse", jit_compile=False)
        if name == "built":
            model.build((None, 3))
        said = refused(lambda model=model: hvd.elastic.KerasState(model))
        advised = said.rsplit(": ", 1)[-1]
        eval(advised, {"model": model, "x": X})
        held = hvd.elastic.KerasState(model, batch=0)
        held.sync()
        before = values(state.everything(model))
        model.fit(
            X, Y, batch_size=4, verbose=0, callbacks=[hvd.elastic.UpdateBatchStateCallback(held)]
        )
        changed = not same(before, values(state.everything(model)))
        held.restore()
        restored = same(before, values(state.everything(model)))
        found[name] = {
            "said": said,
            "variables": len(before),
            "trained": changed,
            "restored": restored,
        }
    return found


def main() -> None:
    hvd.init()
    report(hvd.rank(), {name: globals()[name]() for name in sys.argv[1:]})


if __name__ == "__main__":
    main()
