"""Run on real ranks by test_surface.py.

Each scenario's findings on this rank go back to the test.
"""

import contextlib
import io
import os
import sys
from pathlib import Path

import keras
import numpy as np

import recipe.keras as hvd
from recipe.keras import state
from recipe.keras.callbacks import BroadcastState, ReplicaCheck, ScheduledRate
from recipe.keras.distributed import is_distributed, reduction_of
from recipe.rules.schedule import Rate
from tests.ranks import ROOT, report
from tests.recipe.keras.program import (
    EXAMPLES,
    LABELS,
    MINIBATCH,
    compiled,
    fit,
    nesterov,
    network,
    share,
)

TENSORFLOW = keras.backend.backend() == "tensorflow"
SIZE = int(os.environ["OMPI_COMM_WORLD_SIZE"])
PAIR = hvd.ProcessSet([0, 2] if SIZE > 2 else [0])
SETS = [PAIR] if SIZE > 1 else None  # Horovod refuses a set of all ranks


def value(v) -> np.ndarray:
    return keras.ops.convert_to_numpy(v).copy()


def variable(*shape: int) -> keras.Variable:
    return keras.Variable(np.zeros(shape, np.float32))


def tensor(numbers) -> object:
    return keras.ops.convert_to_tensor(np.asarray(numbers, np.float32))


def refused(action) -> str:
    """The sentence of the ValueError that `action` must raise."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing"


def sums_up() -> keras.optimizers.Optimizer:
    """w ← w + g: what an update did is easily read."""

    class SumsUp(keras.optimizers.Optimizer):
        def __init__(self, learning_rate=0.1, **kwargs):
            super().__init__(learning_rate, **kwargs)

        def update_step(self, gradient, variable, learning_rate):
            self.assign_add(variable, gradient)

    return SumsUp()


def reductions() -> dict:
    """What an update adds to three variables.

    The gradients of rank r are r + 1, 10(r + 1) and 100(r + 1).
    """
    found = {}
    options = {
        "average": {},
        "sum": {"op": hvd.Sum},
        "predivided": {"gradient_predivide_factor": 4.0},
        "one group": {"groups": 1},
        "two groups": {"groups": 2},
        "named": {"name": "mine"},
    }
    variables = [variable(2), variable(3), variable(1)]
    for name, chosen in (options | {"lists": {"groups": [[variables[0], variables[2]]]}}).items():
        optimizer = hvd.DistributedOptimizer(sums_up(), **chosen)
        for v in variables:
            v.assign(0 * v)
        gradients = [
            tensor(np.full(v.shape, 10.0**i * (hvd.rank() + 1))) for i, v in enumerate(variables)
        ]
        optimizer.apply(gradients, variables)
        found[name] = [value(v)[0] for v in variables]
    return found


def process_sets() -> dict:
    """Two ranks reduce among themselves, the others keep what they have."""
    optimizer = hvd.DistributedOptimizer(sums_up(), process_set=PAIR)
    v = variable(1)
    optimizer.apply([tensor([hvd.rank() + 1.0])], [v])
    unknown = hvd.DistributedOptimizer(sums_up(), process_set=hvd.ProcessSet([0, 1, 5]))
    return {
        "value": value(v)[0],
        "allreduce": float(hvd.allreduce(hvd.rank() + 1.0, process_set=PAIR))
        if PAIR.included()
        else None,
        "unknown": refused(lambda: unknown.apply([tensor([1.0])], [variable(1)])),
    }


def passes() -> dict:
    """Ten backward passes, four to a step, in a traced step where there is one.

    The last two variables are local, and TensorFlow's gradients of y are IndexedSlices.
    """
    found = {}
    for average in (False, True):
        optimizer = hvd.DistributedOptimizer(
            sums_up(), backward_passes_per_step=4, average_aggregated_gradients=average
        )
        variables = [variable(1), variable(2), variable(1), variable(2)]
        for v in variables[2:]:
            optimizer.register_local_var(v)
        step = stepper(optimizer, variables, float(hvd.rank() + 1))
        path = []
        for _ in range(10):
            step()
            path.append([value(v) for v in variables] + [int(optimizer.iterations)])
        found[average] = path, int(reduction_of(optimizer).accumulator.count)
    return found


def stepper(optimizer, variables: list, number: float):
    def step():
        optimizer.apply(
            [tensor([number]), sparse(number), tensor([number]), sparse(number)], variables
        )

    if TENSORFLOW:
        import tensorflow as tf

        return tf.function(step)
    return step


def sparse(number: float) -> object:
    """The gradient [0, -2·number], its one row given twice where there is a sparse type for it."""
    if TENSORFLOW:
        import tensorflow as tf

        return tf.IndexedSlices(
            tf.constant([-number, -number]), tf.constant([1, 1]), tf.constant([2])
        )
    import torch

    return torch.sparse_coo_tensor([[1, 1]], [-number, -number], [2])


def overflowing_passes() -> dict:
    """The last rank's first pass of the first step is infinite.

    That step is skipped everywhere, the next is not.
    """
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    optimizer = hvd.DistributedOptimizer(scaled, backward_passes_per_step=2)
    v, path = variable(1), []
    for n in range(4):
        bad = n == 0 and hvd.rank() == hvd.size() - 1
        scale = value(optimizer.dynamic_scale) if optimizer.built else 4.0
        optimizer.apply([tensor([np.inf if bad else scale])], [v])
        path.append(float(value(v)[0]))
    return {
        "path": path,
        "scale": float(value(optimizer.dynamic_scale)),
        "iterations": int(optimizer.iterations),
    }


def local_overflow() -> dict:
    """Only the last rank's gradient of a local variable overflows: all ranks must skip the step."""
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    optimizer = hvd.DistributedOptimizer(scaled)
    shared, local = variable(1), variable(1)
    optimizer.register_local_var(local.value)
    bad = np.inf if hvd.rank() == hvd.size() - 1 else 4.0
    optimizer.apply([tensor([4.0]), tensor([bad])], [shared, local])
    skipped = [float(value(v)[0]) for v in (shared, local)]
    optimizer.apply([tensor([2.0]), tensor([2.0])], [shared, local])
    return {"skipped": skipped, "after": [float(value(v)[0]) for v in (shared, local)]}


def missing_gradients() -> dict:
    """Nobody has the second gradient; with PyTorch only rank 0 has the third."""
    optimizer = hvd.DistributedOptimizer(sums_up())
    variables = [variable(1), variable(1), variable(1)]
    third = tensor([4.0]) if TENSORFLOW or hvd.rank() == 0 else None
    optimizer.apply([tensor([1.0]), None, third], variables)
    return {"values": [float(value(v)[0]) for v in variables]}


def train(make, steps: int = 6, **options) -> list[np.ndarray]:
    """Weights after steps on one minibatch each, divided among the ranks.

    Or on the whole of it with no options.
    """
    model = compiled(network(), hvd.DistributedOptimizer(make(), **options))
    state.broadcast_state(model)
    x, y = (share(a, hvd.size(), hvd.rank()) for a in (EXAMPLES, LABELS))
    n = MINIBATCH // hvd.size()
    for t in range(steps):
        part = slice((t % 4) * n, (t % 4 + 1) * n)
        model.train_on_batch(x[part], y[part])
    return [value(v) for v in model.trainable_variables + model.optimizer.variables]


def every_optimizer() -> dict:
    """All optimizers of Keras, four steps; on one rank the whole minibatch."""
    return {name: train(make, 4)[:4] for name, make in optimizers().items()}


def optimizers() -> dict:
    """Every optimizer class of keras.optimizers, by name."""
    kinds = {
        n: k
        for n, k in vars(keras.optimizers).items()
        if isinstance(k, type) and not n.startswith("_")
    }
    kinds = {n: k for n, k in kinds.items() if issubclass(k, keras.optimizers.Optimizer)}
    for abstract in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer"):
        kinds.pop(abstract, None)
    made = {name: (lambda kind=kind: kind(learning_rate=0.01)) for name, kind in kinds.items()}
    made["LossScaleOptimizer"] = lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01)
    )
    if hasattr(keras.optimizers, "MultiOptimizer"):
        made["MultiOptimizer"] = lambda: keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                keras.optimizers.Adam(0.01), {".*bias": keras.optimizers.SGD(0.01)}
            )
        )
    return made


def on_the_averaged_gradient() -> dict:
    """Settings of the wrapped optimizer that are wrong if they see one rank's gradient only."""
    sgd = keras.optimizers.SGD
    return {
        "clipnorm": train(lambda: sgd(0.1, 0.9, clipnorm=0.1)),
        "clipvalue": train(lambda: sgd(0.1, 0.9, clipvalue=0.01)),
        "global_clipnorm": train(lambda: sgd(0.1, 0.9, global_clipnorm=0.1)),
        "ema": train(
            lambda: sgd(0.1, 0.9, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
        ),
        "weight_decay": train(lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1)),
        "keras accumulation": train(
            lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)
        ),
        "scaled accumulation": train(
            lambda: keras.optimizers.LossScaleOptimizer(
                keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)
            )
        ),
        "horovod accumulation": train(
            lambda: keras.optimizers.Adam(0.01),
            backward_passes_per_step=3,
            average_aggregated_gradients=True,
        ),
    }


def embeddings() -> dict:
    """Adam on an embedding whose rows repeat within a rank and over ranks."""
    words = np.random.default_rng(5).integers(0, 6, (4, 24, 5))
    targets = np.random.default_rng(6).normal(size=(4, 24, 5, 3)).astype(np.float32)
    found = {}
    options = {
        "sparse": {},
        "dense": {"sparse_as_dense": True},
        "predivided": {"gradient_predivide_factor": 2.0},
        "passes": {"backward_passes_per_step": 2, "average_aggregated_gradients": True},
    }
    n = MINIBATCH // hvd.size()
    mine = slice(hvd.rank() * n, (hvd.rank() + 1) * n)
    for name, chosen in options.items():
        model = keras.Sequential([keras.Input((5,), dtype="int32"), keras.layers.Embedding(7, 3)])
        keras.utils.set_random_seed(hvd.rank())
        model.compile(
            hvd.DistributedOptimizer(keras.optimizers.Adam(0.05), **chosen),
            "mse",
            jit_compile=False,
        )
        state.broadcast_state(model)
        model.layers[-1].embeddings.assign(np.linspace(-1, 1, 21).reshape(7, 3))
        for x, y in zip(words, targets, strict=True):
            model.train_on_batch(x[mine], y[mine])
        found[name] = value(model.layers[-1].embeddings)
    return found


def local_layers() -> dict:
    """None, one and two of the layers are local: what a step adds, and what ReplicaCheck says."""
    found = {}
    for count in range(3):
        for scaled in (True, False):
            model = keras.Sequential(
                [keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(3)]
            )
            local = model.layers[:count] if count != 1 else model.layers[0]
            optimizer = hvd.PartialDistributedOptimizer(
                keras.optimizers.SGD(1.0, momentum=0.9),
                local_layers=local,
                scale_local_gradients=scaled,
            )
            model.compile(optimizer, "mse", jit_compile=False)
            model.set_weights([np.zeros(w.shape) for w in model.get_weights()])
            rank = float(hvd.rank() + 1)
            gradients = [tensor(np.full(v.shape, rank)) for v in model.trainable_variables]
            optimizer.apply(gradients, model.trainable_variables)
            state.check_replicas(model)
            found[count, scaled] = [-float(w.flat[0]) for w in model.get_weights()]
    unbuilt = keras.layers.Dense(2, name="unbuilt")
    return found | {
        "unbuilt": refused(
            lambda: hvd.PartialDistributedOptimizer(keras.optimizers.SGD(), local_layers=[unbuilt])
        ),
        "no layer": refused(
            lambda: hvd.PartialDistributedOptimizer(keras.optimizers.SGD(), local_layers=["a"])
        ),
    }


def local_variables() -> dict:
    """Broadcast from the last rank of all but the first layer, and its slots."""
    model = compiled(network(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.0, momentum=0.9)))
    model.optimizer.build(model.trainable_variables)
    for v in model.trainable_variables + model.optimizer.momentums:
        v.assign(keras.ops.full(v.shape, float(hvd.rank())))
    local = model.layers[0].variables[0]
    model.train_on_batch(EXAMPLES[:4] * 0, LABELS[:4])  # traced before the callback
    for v in model.trainable_variables + model.optimizer.momentums:
        v.assign(keras.ops.full(v.shape, float(hvd.rank())))
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(hvd.size() - 1, local_variables=local)
    callback.set_model(model)
    callback.on_train_begin()
    return {
        "weights": [float(value(v).flat[0]) for v in model.trainable_variables],
        "slots": [float(value(v).flat[0]) for v in model.optimizer.momentums],
    }


def uneven_creation() -> dict:
    """Rank 0 has made optimizers and a synchronised layer that the others have not."""
    if hvd.rank() == 0:
        for _ in range(3):
            hvd.DistributedOptimizer(keras.optimizers.SGD())
            hvd.SyncBatchNormalization()
    model = keras.Sequential(
        [keras.Input((8, 8, 2)), hvd.SyncBatchNormalization(), keras.layers.Flatten()]
    )
    model.add(keras.layers.Dense(3))
    fit(compiled(model, nesterov()), 1, ReplicaCheck())
    return {"weights": [value(v) for v in model.trainable_variables]}


@keras.saving.register_keras_serializable("tests")
class Registered(keras.optimizers.RMSprop):
    pass


class Unregistered(keras.optimizers.RMSprop):
    pass


def saving() -> dict:
    """Models saved with wrapped optimizers, and loaded in each way.

    The optimizers are Keras's, registered ones and others.
    """
    found = {}
    folder = Path(os.environ["RESULTS"])
    for kind in (keras.optimizers.RMSprop, hvd.SGD, Registered, Unregistered):
        model = compiled(network(), hvd.DistributedOptimizer(kind(0.01, momentum=0.9)))
        model.train_on_batch(EXAMPLES[:4], LABELS[:4])
        path = folder / f"{kind.__name__}{hvd.rank()}.keras"
        model.save(path)
        names = {"custom_optimizers": [kind]} if kind is Unregistered else {}
        plain = keras.models.load_model(
            path, custom_objects={kind.__name__: kind} if names else None
        )
        loaded = hvd.load_model(path, compression=hvd.Compression.fp16, **names)
        options = reduction_of(loaded.optimizer).options
        by_objects = hvd.load_model(path, custom_objects={kind.__name__: kind})
        found[kind.__name__] = {
            "plain": isinstance(plain.optimizer, kind) and not is_distributed(plain.optimizer),
            "distributed": [
                is_distributed(m.optimizer) and isinstance(m.optimizer, kind)
                for m in (loaded, by_objects)
            ],
            "compression": options.compression is hvd.Compression.fp16,
            "same": all(
                np.array_equal(value(a), value(b))
                for m in (plain, loaded, by_objects)
                for a, b in zip(state.everything(model), state.everything(m), strict=True)
            ),
            "trains": np.isfinite(loaded.train_on_batch(EXAMPLES[:4], LABELS[:4])[0]),
        }
    model.optimizer = None
    return found | {"legacy": refused(lambda: hvd.load_model(path, legacy_opts=True))}


def loaded_on_root() -> dict:
    """Rank 0 loads a trained model, the others make a new one; they go on together."""
    model = compiled(network(), nesterov())
    model.train_on_batch(EXAMPLES[:4], LABELS[:4])
    path = Path(os.environ["RESULTS"]) / f"root{hvd.rank()}.keras"
    model.save(path)
    again = hvd.load_model(path) if hvd.rank() == 0 else compiled(network(), nesterov())
    before = len(again.optimizer.variables)
    fit(again, 1, ReplicaCheck())
    return {
        "before": before,
        "slots": len(again.optimizer.variables),
        "iterations": int(again.optimizer.iterations),
        "weights": again.get_weights(),
    }


def configurations() -> dict:
    """from_config of the object and of its class gives the same configuration.

    It is reduced in the same way.
    """
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.3, clipnorm=2.0), op=hvd.Sum)
    config = optimizer.get_config()
    copies = [optimizer.from_config(dict(config)), optimizer.__class__.from_config(dict(config))]
    return {
        "same": [copy.get_config() == config for copy in copies],
        "op": [reduction_of(copy).options.op == hvd.Sum for copy in copies],
    }


def refusals() -> dict:
    """Everything that DistributedOptimizer and its surroundings must refuse, with what they say."""
    sgd, wrap = keras.optimizers.SGD, hvd.DistributedOptimizer
    callbacks = hvd.callbacks
    return {
        "Adasum": refused(lambda: wrap(sgd(), op=hvd.Adasum)),
        "op=": refused(lambda: wrap(sgd(), op=hvd.Max)),
        "gradient_predivide_factor=": refused(
            lambda: wrap(sgd(), op=hvd.Sum, gradient_predivide_factor=2.0)
        ),
        "gradient_predivide_factor=-1": refused(
            lambda: wrap(sgd(), gradient_predivide_factor=-1.0)
        ),
        "backward_passes_per_step=0": refused(lambda: wrap(sgd(), backward_passes_per_step=0)),
        "groups=0": refused(lambda: wrap(sgd(), groups=0)),
        "groups=[1": refused(lambda: wrap(sgd(), groups=[1, 2])),
        "keras.optimizers.Optimizer": refused(lambda: wrap("sgd")),
        "already": refused(lambda: wrap(wrap(sgd()))),
        "legacy_opts=True": refused(lambda: hvd.load_model("x.keras", legacy_opts=True)),
        "broadcast_variables": refused(lambda: hvd.broadcast_global_variables(0)),
        "average=True": refused(lambda: hvd.allreduce(1.0, average=True, op=hvd.Sum)),
        "fused=True": refused(lambda: hvd.SyncBatchNormalization(fused=True)),
        "initial_lr=None": refused(lambda: callbacks.LearningRateScheduleCallback(None, 1.0)),
        "device='/gpu:0'": refused(
            lambda: callbacks.BroadcastGlobalVariablesCallback(0, device="/gpu:0")
        ),
        "device='/cpu:0'": refused(lambda: callbacks.MetricAverageCallback("/cpu:0")),
        "local_variables": refused(
            lambda: callbacks.BroadcastGlobalVariablesCallback(0, local_variables=["w"])
        ),
        "no filepath": refused(lambda: callbacks.BestModelCheckpoint().on_train_begin()),
        "steps_per_epoch=0": refused(lambda: hvd.RateSchedule(Rate(0.1, 0.1), 0)),
        "steps_per_execution=2": refused(several_steps_per_execution),
        "model(x[:1])": refused(
            lambda: hvd.elastic.KerasState(keras.Sequential([keras.layers.Dense(1)]), sgd())
        ),
        "device_dense='/cpu:0'": refused(lambda: wrap(sgd(), device_dense="/cpu:0"))
        if not TENSORFLOW
        else "TensorFlow takes device_dense='/cpu:0'",
    }


def several_steps_per_execution() -> None:
    model = network()
    model.compile(nesterov(), "mse", steps_per_execution=2, jit_compile=False)
    callback = ScheduledRate(Rate(0.1, 0.1))
    callback.set_model(model)
    callback.on_train_begin()


class Rates(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(value(self.model.optimizer.learning_rate)))


def usual_rates(compatible: bool = False) -> list[float]:
    """Rates of each step of 12 epochs of 4, by the upstream test's schedule.

    That is a warmup, two constants and a function.
    """
    lr, names = 0.1 * hvd.size(), hvd.callbacks
    constant = {"compounding": compatible}
    callbacks = [
        names.LearningRateScheduleCallback(lr, 1e-1, start_epoch=3, end_epoch=6, **constant),
        names.LearningRateScheduleCallback(lr, 1e-2, start_epoch=6, end_epoch=9, **constant),
        names.LearningRateScheduleCallback(
            lr, lambda epoch: epoch / 10, start_epoch=9, end_epoch=11
        ),
        names.LearningRateScheduleCallback(
            lr, lambda epoch: epoch / 10, start_epoch=11, staircase=False
        ),
        names.LearningRateWarmupCallback(
            initial_lr=lr, warmup_epochs=3, one_step_early=compatible, verbose=1
        ),
        rates := Rates(),
    ]
    history = fit(compiled(network(), nesterov()), 12, *callbacks)
    return rates.rates, history.history["lr"]


def learning_rates() -> dict:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ours, logged = usual_rates()
    fractional = Rates()
    half = hvd.callbacks.LearningRateWarmupCallback(0.1 * hvd.size(), warmup_epochs=1.5)
    fit(compiled(network(), nesterov()), 3, half, fractional)
    decayed = Rates()
    warm, decay = hvd.callbacks.GradualWarmup(0.1, 4, 1.0), hvd.callbacks.StepDecay(0.4, (1.5, 2.0))
    fit(compiled(network(), nesterov()), 3, warm, decay, decayed)
    with contextlib.redirect_stdout(io.StringIO()):
        old = usual_rates(compatible=True)[0]
    return {
        "ours": ours,
        "logged": logged,
        "said": said.getvalue(),
        "fractional": fractional.rates,
        "decayed": decayed.rates,
        "old": old,
    }


def metric_averages() -> dict:
    """Rank r holds r + 1 times 8 examples.

    Sums divided once, and Horovod's unweighted mean of means.
    """
    sizes = 8 * np.arange(1, hvd.size() + 1)
    end = np.cumsum(sizes)[hvd.rank()]
    mine = slice(end - sizes[hvd.rank()], end)
    model = compiled(network(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)))
    state.broadcast_state(model)
    found = {
        "whole": model.evaluate(
            EXAMPLES[: sizes.sum()], LABELS[: sizes.sum()], verbose=0, return_dict=True
        )
    }
    found["mine"] = model.evaluate(EXAMPLES[mine], LABELS[mine], verbose=0, return_dict=True)
    for name, options in {"weighted": {}, "unweighted": {"unweighted": True}}.items():
        history = model.fit(
            EXAMPLES[mine],
            LABELS[mine],
            batch_size=8 * (hvd.rank() + 1),
            validation_data=(EXAMPLES[mine], LABELS[mine]),
            verbose=0,
            callbacks=[hvd.callbacks.MetricAverageCallback(**options)],
        )
        found[name] = {metric: values[0] for metric, values in history.history.items()}
    return found


def best_checkpoint() -> dict:
    """Rank 0 alone writes the model with the lowest loss."""
    path = Path(os.environ["RESULTS"]) / f"best{hvd.rank()}.keras"
    best = hvd.callbacks.BestModelCheckpoint(monitor="loss")
    best.filepath = str(path)
    history = fit(compiled(network(), nesterov()), 3, hvd.callbacks.MetricAverageCallback(), best)
    loaded = keras.models.load_model(path) if path.exists() else None
    return {
        "written": path.exists(),
        "loads": loaded is not None,
        "best": best.best,
        "loss": history.history["loss"],
    }


RATE = Rate(0.02, 0.1, warmup_epochs=1.1, decay_epochs=(2.0, 2.3))


def schedules() -> dict:
    """Callback with Keras's SGD and its correction.

    Schedule with recipe.keras.SGD, also several steps at a time.
    """
    found = {}
    for nesterov_ in (False, True):
        model = compiled(
            network(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, 0.9, nesterov_))
        )
        fit(model, 3, ScheduledRate(RATE), rates := Rates())
        found["callback", nesterov_] = model.get_weights()
        for steps in (1, 4) if TENSORFLOW else (1,):  # Keras has no others with PyTorch
            schedule = hvd.RateSchedule(RATE, 4)
            model = network()
            model.compile(
                hvd.DistributedOptimizer(hvd.SGD(schedule, 0.9, nesterov_)),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                steps_per_execution=steps,
                jit_compile=False,
            )
            fit(model, 3)
            found["schedule", nesterov_, steps] = model.get_weights()
    return {
        "weights": found,
        "callback": rates.rates,
        "schedule": [float(value(schedule(t))) for t in range(12)],
    }


def synchronised_normalisation() -> dict:
    """Two steps of a network with SyncBatchNormalization.

    Unequal shares need the sums to be weighted.
    """
    keras.utils.set_random_seed(100 + hvd.rank())
    layers = [
        keras.layers.Conv2D(4, 3, activation="relu"),
        hvd.SyncBatchNormalization(momentum=0.5),
    ]
    model = keras.Sequential(
        [keras.Input((8, 8, 2)), *layers, keras.layers.Flatten(), keras.layers.Dense(3)]
    )
    # The sum over examples, so that ranks with unequal numbers of them weigh right.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.003), op=hvd.Sum), loss, jit_compile=False
    )
    state.broadcast_state(model)
    ends = np.cumsum(np.arange(1, hvd.size() + 1) * 24 // (hvd.size() * (hvd.size() + 1) // 2))
    ends[-1] = 24
    begin = 0 if hvd.rank() == 0 else ends[hvd.rank() - 1]
    mine = slice(begin, ends[hvd.rank()])
    for _ in range(2):
        model.train_on_batch(EXAMPLES[mine], LABELS[mine])
    outputs = value(model(EXAMPLES[24:32], training=False))
    x = np.ones((3, 2, 4), np.float32) * (hvd.rank() + 1)
    masked = keras.layers.Masking()(tensor(np.concatenate([x, 0 * x], axis=1)))
    layer = hvd.SyncBatchNormalization(momentum=0.0)
    layer(masked, training=True, mask=tensor([[1, 1, 0, 0]] * 3))
    return {
        "weights": [value(v) for v in model.variables if v.dtype == "float32"],
        "outputs": outputs,
        "masked mean": value(layer.moving_mean),
        "masked variance": value(layer.moving_variance),
    }


def operations() -> dict:
    """The collectives on plain values."""
    rank, size = hvd.rank(), hvd.size()
    v, counter = variable(2), keras.Variable(rank, dtype="int32", trainable=False)
    v.assign(v + rank)
    hvd.broadcast_variables([v, counter], root_rank=size - 1)
    return {
        "allreduce": float(hvd.allreduce(np.float32(rank + 1))),
        "sum": float(hvd.allreduce(np.float32(rank + 1), average=False)),
        "scaled": float(
            hvd.allreduce(
                np.float32(rank + 1), op=hvd.Sum, prescale_factor=2.0, postscale_factor=3.0
            )
        ),
        "min": float(hvd.allreduce(np.float32(rank + 1), op=hvd.Min)),
        "max": float(hvd.allreduce(np.float32(rank + 1), op=hvd.Max)),
        "product": float(hvd.allreduce(np.float32(rank + 1), op=hvd.Product)),
        "fp16": float(hvd.allreduce(np.float32(rank + 1), compression=hvd.Compression.fp16)),
        "grouped": [
            float(value(g)[0])
            for g in hvd.grouped_allreduce([np.ones(1, "f"), np.full(2, rank, "f")])
        ],
        "allgather": value(hvd.allgather(np.full((rank + 1, 2), rank, "f"))),
        "broadcast": value(hvd.broadcast(np.full(2, rank, "f"), root_rank=size - 1)),
        "reducescatter": value(hvd.reducescatter(np.arange(size, dtype="f"), op=hvd.Sum)),
        "alltoall": value(hvd.alltoall(np.full(size, rank, "f"))),
        "splits": [value(t) for t in hvd.alltoall(np.full(size, rank, "f"), splits=[1] * size)],
        "object": hvd.broadcast_object({"rank": rank}, root_rank=size - 1),
        "objects": hvd.allgather_object(rank),
        "variables": [float(value(v)[0]), int(value(counter))],
        "built": [
            bool(getattr(hvd, f"{library}_built")())
            for library in ("mpi", "gloo", "nccl", "ddl", "ccl")
        ],
        "enabled": hvd.mpi_enabled() + hvd.gloo_enabled(),
        "places": [hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()],
    }


def elastic_state() -> dict:
    """The upstream test: sync, change, restore, change, commit, restore."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.set_weights([np.full((2, 2), 1.0 + hvd.rank()), np.full(2, 1.0 + hvd.rank())])
    optimizer = keras.optimizers.Adam(0.001 * hvd.size())
    held = hvd.elastic.KerasState(model, optimizer, batch=20 + hvd.rank(), epoch=10 + hvd.rank())
    found = {}

    def note(name):
        found[name] = [
            float(model.get_weights()[0].flat[0]),
            held.batch,
            held.epoch,
            int(optimizer.iterations),
        ]

    def change():
        model.set_weights([np.full((2, 2), 7.0), np.full(2, 7.0)])
        optimizer.iterations.assign(5)
        held.batch, held.epoch = 21, 11

    held.sync()
    note("synchronised")
    change()
    held.restore()
    note("restored")
    change()
    held.commit()
    model.set_weights([np.zeros((2, 2)), np.zeros(2)])
    held.batch = 99
    held.restore()
    note("committed")
    return found


def elastic_callbacks() -> dict:
    """A run that is resumed after 2 of 4 batches of its second epoch.

    It is by both conventions for fit().
    """
    found = {}
    for name, epochs in {
        "from zero": {"epochs": 2},
        "initial_epoch": {"initial_epoch": 1, "epochs": 3},
    }.items():
        model = compiled(network(), nesterov())
        held = hvd.elastic.KerasState(model, batch=2, epoch=1)
        seen, commits = [], []
        held.on_commit = commits

        class Seen(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None, held=held, seen=seen, model=model):
                seen.append((batch, held.batch, held.epoch, int(value(model.optimizer.iterations))))

        size, rank = hvd.size(), hvd.rank()
        model.fit(
            share(EXAMPLES, size, rank),
            share(LABELS, size, rank),
            batch_size=MINIBATCH // size,
            verbose=0,
            callbacks=[
                BroadcastState(),
                hvd.elastic.UpdateBatchStateCallback(held),
                hvd.elastic.UpdateEpochStateCallback(held),
                hvd.elastic.CommitStateCallback(held, batches_per_commit=3),
                Seen(),
            ],
            **epochs,
        )
        found[name] = {"seen": seen, "epoch": held.epoch, "batch": held.batch}
    return found


def fifteen_lines() -> dict:
    """The page's own script, for two epochs."""
    code = (
        (ROOT / "docs/keras.md")
        .read_text()
        .split("```python\n")[1]
        .split("```")[0]
        .replace("epochs=90", "epochs=2")
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    given = {
        "x": EXAMPLES,
        "y": LABELS,
        "model": network(),
        "loss": loss,
        "metrics": ["accuracy"],
        "batch": 12,
    }
    os.chdir(os.environ["RESULTS"])
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "docs/keras.md", "exec"), given)
    return {
        "weights": given["model"].get_weights(),
        "rate": float(value(given["optimizer"].learning_rate)),
    }


def main() -> None:
    hvd.init(process_sets=SETS)
    report(hvd.rank(), {name: globals()[name]() for name in sys.argv[1:]})


if __name__ == "__main__":
    main()
