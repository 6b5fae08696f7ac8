"""Run on real ranks by test_step.py: steps of k = 4 virtual workers, and the same by plain Keras,
one by one.
"""

import dataclasses
import itertools
import sys

import keras
import numpy as np

from recipe.benchmark import contender
from recipe.config import Data, Model, Optimizer, Recipe, Run
from recipe.data.element import Element
from recipe.errors import UsageError
from recipe.frameworks.keras import compute
from recipe.frameworks.keras import replica as fit
from recipe.frameworks.keras.dropout import ExampleDropout
from recipe.frameworks.keras.sgd import DecayedSGD
from recipe.frameworks.keras.step import Step, batch_statistics, moving_statistics
from recipe.keras import state
from recipe.ranks import collectives
from recipe.rules import augment
from recipe.rules.epoch import Share
from tests.ranks import report

K, N = 4, 6
IMAGES = np.random.default_rng(0).integers(0, 256, (K * N, 8, 8, 3)).astype(np.uint8)
LABELS = np.random.default_rng(1).integers(0, 5, K * N).astype(np.int32)


def recipe(together: int = 1, is_compiled: bool = False) -> Recipe:
    return Recipe(
        k=K,
        n=N,
        data=Data(name="synthetic", image_size=8),
        model=Model(blocks=(1,), width=4, stem="small", zero_gamma=False),
        optimizer=Optimizer(weight_decay=0.01),
        run=Run(workers_at_once=together, compile=is_compiled),
    )


def elements(workers: range, together: int) -> list[Element]:
    """As the input pipeline gives them."""
    parts = [slice(w * N, (w + together) * N) for w in workers[::together]]
    return [Element(IMAGES[p], LABELS[p], np.ones(together * N, np.float32)) for p in parts]


def one_step(together: int, is_compiled: bool = False) -> dict:
    """SGD with rate 1 and no momentum, so that the weights move by the gradient."""
    replica = fit.KerasReplica(recipe(together), 5)
    model = replica.model
    optimizer = DecayedSGD(1.0, decay=recipe().optimizer.weight_decay)
    model.compile(optimizer=optimizer, jit_compile=False)
    settings = recipe(together, is_compiled)
    share = Share.of(settings, collectives.rank(), collectives.size())
    step = Step(model, settings, share, fit.signature(settings))
    state.broadcast_state(model)
    last_rank = collectives.size() - 1
    own_elements = elements(share.workers, together)
    losses, hits, stop = step(iter(own_elements), stop=collectives.rank() == last_rank)()
    again = step(iter(own_elements), stop=False)()
    return {
        "weights": state.to_arrays(model),
        "losses": losses,
        "hits": hits,
        "stop": stop,
        "again": again,
    }


def by_hand() -> dict:
    """Two steps by definition: each worker alone, from the same weights; then the mean of what
    became of them. With Keras's own batch normalisation, and with weight decay as penalties.
    """
    model = contender.usual_keras(recipe(), 5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    losses = []
    for _ in range(2):
        before, after = model.get_weights(), []
        for worker in range(K):
            part = slice(worker * N, (worker + 1) * N)
            model.set_weights(before)
            model.compile(optimizer=keras.optimizers.SGD(1.0), loss=loss, jit_compile=False)
            losses.append(N * loss(LABELS[part], model(IMAGES[part], training=True)))
            model.set_weights(before)
            model.train_on_batch(IMAGES[part], LABELS[part])
            after.append(model.get_weights())
        model.set_weights([np.mean(values, axis=0) for values in zip(*after, strict=True)])
    named = {f"model/{v.path}": keras.ops.convert_to_numpy(v) for v in model.variables}
    return {"weights": named, "losses": [float(value) for value in losses]}


def statistics() -> dict:
    """What batch_statistics finds, and the stem's by NumPy, from what the stem's convolution gives."""
    model = fit.KerasReplica(recipe(), 5).model
    element = compute.on_device(elements(range(1), 1)[0])
    vector = batch_statistics(model, 0.9, fit.signature(recipe()))(*element)
    names = [v.path for v in moving_statistics(model)]
    stem = keras.Model(model.inputs, model.get_layer("stem_conv").output)
    x = stem.predict_on_batch(IMAGES[:N])
    return {
        "names": names,
        "vector": keras.ops.convert_to_numpy(vector),
        "mean": x.mean((0, 1, 2)),
        "var": x.var((0, 1, 2)),
    }


def dropout() -> dict:
    """The layer's output for some examples, and which units NumPy's generator drops."""
    layer, indices = ExampleDropout(0.3), np.array([0, 1, 5, 2**40])
    keys = augment.keys(indices, seed=3, epoch=7).view(np.int64)
    features = np.ones((4, 1000), np.float32)
    output = layer(features, keras.ops.convert_to_tensor(keys), training=True)
    drawn = augment.uniforms(indices, 3, 7, 1000, first=augment.DROPOUT)
    plain = layer(features, keras.ops.convert_to_tensor(keys), training=False)
    return {
        "output": keras.ops.convert_to_numpy(output),
        "drawn": drawn,
        "plain": keras.ops.convert_to_numpy(plain),
    }


def decay() -> dict:
    """A step of the recipe's optimizer without any gradient, and without and with a loss scale."""
    found = {}
    for precision in ("float32", "mixed_float16"):
        settings = dataclasses.replace(
            recipe(), model=dataclasses.replace(recipe().model, precision=precision)
        )
        model = fit.compiled(settings, 5)
        model.optimizer.learning_rate = 0.5
        before = [keras.ops.convert_to_numpy(v).copy() for v in model.trainable_variables]
        zeros = [keras.ops.zeros(v.shape) for v in model.trainable_variables]
        model.optimizer.apply(zeros, model.trainable_variables)
        after = [keras.ops.convert_to_numpy(v).copy() for v in model.trainable_variables]
        paths = [v.path for v in model.trainable_variables]
        found[precision] = list(zip(paths, before, after, strict=True))
    return found


def compiled_step() -> dict:
    """A step with run.compile, or the sentence that refuses it."""
    try:
        return {"together 1, compiled": one_step(1, is_compiled=True)}
    except UsageError as error:
        return {"refusal": str(error)}


def main() -> None:
    fit.start(deterministic=True)
    together = [t for t in (1, 2, 4) if K // collectives.size() % t == 0]
    found = {f"together {t}": one_step(t) for t in together}
    found |= compiled_step()
    report(
        collectives.rank(),
        found | {name: globals()[name]() for name in itertools.chain(sys.argv[1:])},
    )


if __name__ == "__main__":
    main()
