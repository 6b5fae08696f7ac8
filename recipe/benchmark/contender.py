"""One rank of one contender of `python -m recipe.benchmark`: it notes when its steps end.

Every rank has one core, also where it is alone, so that two ranks have twice the machine of one.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recipe import cli
from recipe.config import Recipe
from recipe.data.element import Element
from recipe.system import noise, processor

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

BATCH = 64  # examples per rank and step
STEPS = 45
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "RANK", "BENCHMARK_RANK")  # mpirun's, torchrun's, ours

Tick = Callable[[], None]


def main(name: str, size: int, result: str) -> None:
    """Train STEPS steps. Rank 0 writes what it measured to the file `result`."""
    ranks = [os.environ[name] for name in RANK_VARIABLES if os.environ.get(name)]
    rank = int(ranks[0]) if ranks else 0
    core = rank + int(os.environ["BENCHMARK_CORE"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    os.environ["OMP_NUM_THREADS"] = "1"
    times: list[float] = []
    if name in TENSORFLOW:
        with noise.filtered():
            import tensorflow  # noqa: F401  # its chatter
    CONTENDERS[name](settings(size), rank, lambda: times.append(time.time()))
    if rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(result).write_text(json.dumps({"ends": times, "memory": peak}))


def settings(size: int) -> Recipe:
    """Return `quick` with `size` workers, each with BATCH examples: weak scaling."""
    recipe = cli.load_recipe("quick")
    run = replace(recipe.run, deterministic=False, replica_check_every=0)
    return replace(recipe, k=size, n=BATCH, data=replace(recipe.data, remainder="drop"), run=run)


def batches(recipe: Recipe, workers: range) -> Iterable[Element]:
    """Return the elements of these workers, as the recipe's own training has them."""
    from recipe.data.pipeline import TrainingExamples
    from recipe.data.sources import open_source
    from recipe.rules.epoch import Share

    source = open_source(recipe.data, "train", recipe.seed)
    return TrainingExamples(source, recipe, Share(workers), processor.cores()).elements()


def ours(framework: str) -> Callable[[Recipe, int, Tick], None]:
    """Return the training by the recipe's replica, as recipe.run.loop does it."""

    def run(recipe: Recipe, rank: int, tick: Tick) -> None:
        from recipe.frameworks.replica import load_framework

        module = load_framework(framework)
        module.start()
        replica = module.make_replica(replace(recipe, framework=framework), 10)
        elements = iter(batches(recipe, range(rank, rank + 1)))
        replica.begin(STEPS)
        replica.begin_epoch(0)
        for step in range(STEPS):
            replica.step(step, elements, stop=False)()
            tick()

    return run


def ddp(recipe: Recipe, rank: int, tick: Tick) -> None:
    """Train with PyTorch's DistributedDataParallel over Gloo and its own batch normalisation."""
    import torch
    from torch import distributed, nn
    from torch.nn.functional import cross_entropy

    from recipe.frameworks.torch import device, normalization, resnet
    from recipe.frameworks.torch import replica as fit

    # The same network, but for the batch normalisation.
    device.use_local_device(rank, threads=1)
    distributed.init_process_group("gloo")
    network = resnet.build(recipe, 10).train()
    for module in network.modules():
        if isinstance(module, normalization.WorkerBatchNorm2d):
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    model = nn.parallel.DistributedDataParallel(network)
    optimizer = fit.sgd(recipe, network)

    # The usual loop.
    elements = iter(batches(recipe, range(rank, rank + 1)))
    for _ in range(STEPS):
        images, labels, *_ = device.on_device(next(elements))
        loss: torch.Tensor = cross_entropy(model(images), labels.long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        tick()
    _leave_together()


def _leave_together() -> None:
    """Leave PyTorch's process group. A process that ends without would abort the other."""
    from torch import distributed

    distributed.barrier()
    distributed.destroy_process_group()


def usual_keras(recipe: Recipe, num_classes: int) -> "keras.Model":
    """Return the network as Keras's users have it.

    That is with Keras's own batch normalisation, and with L2 penalties for the weight decay.
    """
    import keras

    from recipe.frameworks.keras import normalization, resnet, sgd

    model = resnet.build(recipe, num_classes)
    for layer in model.layers:
        if isinstance(layer, normalization.WorkerBatchNormalization):
            layer.__class__ = keras.layers.BatchNormalization
    for variable in filter(sgd.is_decayed, model.trainable_variables):
        # L2(c) adds c·‖w‖², whose gradient is 2cw.
        variable.regularizer = keras.regularizers.L2(recipe.optimizer.weight_decay / 2)
    return model


def keras_fit(recipe: Recipe, rank: int, tick: Tick) -> None:
    """Train with `keras.Model.fit` on one process, with nothing of Horovod."""
    import keras

    _fit(recipe, rank, tick, keras.optimizers.SGD(recipe.optimizer.base_rate, 0.9, nesterov=True))


def keras_wrapped(overlap: bool) -> Callable[[Recipe, int, Tick], None]:
    """Return the training with `keras.Model.fit` and recipe.keras, as its users do it."""

    def run(recipe: Recipe, rank: int, tick: Tick) -> None:
        import keras

        import recipe.keras as hvd

        hvd.init()
        sgd = keras.optimizers.SGD(recipe.optimizer.base_rate, 0.9, nesterov=True)
        optimizer = hvd.DistributedOptimizer(sgd, overlap=overlap)
        _fit(recipe, rank, tick, optimizer, [hvd.callbacks.BroadcastState()])

    return run


def keras_data_parallel(recipe: Recipe, rank: int, tick: Tick) -> None:
    """Train with `keras.Model.fit` and Keras's own DataParallel, of Keras 3.16 on PyTorch."""
    import keras

    keras.distribution.initialize()
    strategy = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(strategy)
    keras_fit(recipe, rank, tick)
    _leave_together()


def _fit(
    recipe: Recipe,
    rank: int,
    tick: Tick,
    optimizer: "keras.optimizers.Optimizer",
    callbacks: Sequence["keras.callbacks.Callback"] = (),
) -> None:
    """Train with `keras.Model.fit` on this rank's examples."""
    import keras

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            tick()

    model = usual_keras(recipe, 10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    elements = batches(recipe, range(rank, rank + 1))
    pairs = (((element.images,), element.labels) for element in elements)
    model.fit(pairs, steps_per_epoch=STEPS, epochs=1, callbacks=[*callbacks, Clock()], verbose=0)


def mirrored(recipe: Recipe, rank: int, tick: Tick) -> None:
    """Train with MultiWorkerMirroredStrategy, in a loop: Keras 3's `fit` can't read its batches."""
    import keras
    import tensorflow as tf

    from recipe.frameworks.keras import replica as fit

    # Each worker reads its own examples.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    images, labels, weights = (tf.TensorSpec(shape, kind) for kind, shape in fit.signature(recipe))

    def dataset(context: object) -> tf.data.Dataset:
        elements = batches(recipe, range(rank, rank + 1))
        arrays = ((element.images, element.labels, element.weights) for element in elements)
        signature = (images, labels, weights)
        dataset = tf.data.Dataset.from_generator(lambda: arrays, output_signature=signature)
        return dataset.prefetch(2)

    # The model's variables are mirrored.
    distributed = strategy.distribute_datasets_from_function(dataset)
    with strategy.scope():
        model = usual_keras(recipe, 10)
        optimizer = keras.optimizers.SGD(recipe.optimizer.base_rate, 0.9, nesterov=True)
        optimizer.build(model.trainable_variables)

    # The usual loop. `float` waits for the step's end.
    step = _mirrored_step(strategy, model, optimizer, recipe.k)
    elements = iter(distributed)
    for _ in range(STEPS):
        float(step(next(elements)))
        tick()


def _mirrored_step(
    strategy: "tf.distribute.Strategy",
    model: "keras.Model",
    optimizer: "keras.optimizers.Optimizer",
    k: int,
) -> Callable[[tuple], "tf.Tensor"]:
    """Return a step on each of k workers, whose gradients the optimizer adds up."""
    import keras
    import tensorflow as tf

    def worker(images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = model([images], training=True)
            losses = keras.ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            loss = (tf.reduce_mean(losses) + sum(model.losses)) / k
        variables = model.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in variables])
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss

    @tf.function
    def step(element: tuple) -> tf.Tensor:
        return strategy.reduce("SUM", strategy.run(worker, element), None)

    return step


CONTENDERS: dict[str, Callable[[Recipe, int, Tick], None]] = {
    "torch-here": ours("torch"),
    "torch-ddp": ddp,
    "keras-here": ours("keras"),
    "keras-fit": keras_fit,
    "keras-torch-here": ours("keras"),
    "keras-torch-fit": keras_fit,
    "keras-wrapped": keras_wrapped(overlap=False),
    "keras-overlap": keras_wrapped(overlap=True),
    "keras-parallel": keras_data_parallel,
    "tf-mirrored": mirrored,
}
TENSORFLOW = ("keras-here", "keras-fit", "tf-mirrored")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
