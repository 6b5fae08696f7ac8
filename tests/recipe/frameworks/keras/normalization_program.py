"""Run by test_normalization.py in each backend: batch normalisation of one worker and of several,
forward and backward, beside the inputs.
"""

import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from recipe.frameworks.keras import replica as fit
from recipe.frameworks.keras.normalization import WorkerBatchNormalization
from recipe.keras import backend
from recipe.ranks import collectives
from tests.ranks import report

EPSILON, MOMENTUM = 1e-5, 0.9
SHAPES = {"usual": (6, 5, 4, 8), "one value": (3, 1, 1, 8), "two values": (6, 1, 1, 8)}
LARGE = (24, 7, 7, 8)
ROUNDED = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}


def cases() -> dict[str, dict[str, Any]]:
    """Each case's settings by its name."""
    found = {}
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        for workers in (1, 3):
            for layout in ("channels_last", "channels_first"):
                name = f"{policy}, {workers} workers, {layout}"
                found[name] = {"policy": policy, "workers": workers, "layout": layout}
    for shape in ("one value", "two values"):
        for workers in (1, 3):
            found[f"{shape}, {workers} workers"] = {"shape": SHAPES[shape], "workers": workers}
    for workers in (1, 3):
        found[f"large, {workers} workers"] = {"shape": LARGE, "workers": workers}
        found[f"far from zero, {workers} workers"] = {"mean": 3000.0, "workers": workers}
        found[f"constant, {workers} workers"] = {"spread": 0.0, "workers": workers}
    return found


def found_for(
    policy: str = "float32",
    workers: int = 1,
    layout: str = "channels_last",
    shape: tuple[int, ...] = SHAPES["usual"],
    mean: float = 3.0,
    spread: float = 2.0,
) -> dict[str, Any]:
    """Inputs and results of one case, all with the channels last."""
    draw = np.random.default_rng(0)
    x = representable(draw.normal(mean, spread, shape), policy)
    upstream = representable(draw.normal(0, 1, shape), policy)
    gamma, beta = draw.uniform(0.5, 1.5, shape[-1]), draw.normal(0, 1, shape[-1])

    # The layer, with its parameters and an input to take gradients by.
    first = layout == "channels_first"
    layer = WorkerBatchNormalization(
        axis=1 if first else -1,
        workers=workers,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        dtype=policy,
    )
    variable = keras.Variable(to_layout(x, first), dtype="float32")
    layer.build(variable.shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    weights = ops.convert_to_tensor(to_layout(upstream, first))

    # Forward and backward.
    def forward() -> tuple[Any, Any]:
        y = layer(variable, training=True)
        return ops.sum(ops.cast(y, "float32") * weights), y

    def step() -> tuple[Any, Any]:
        return gradients(forward, [variable, layer.gamma, layer.beta])

    (dx, dgamma, dbeta), y = backend.compiled(step, [])()
    moving = (layer.moving_mean, layer.moving_variance)
    values = {
        "inputs": {"x": x, "upstream": upstream, "gamma": gamma, "beta": beta, "workers": workers},
        "dtype": keras.backend.standardize_dtype(y.dtype),
        "y": from_layout(y, first),
        "dx": from_layout(dx, first),
        "dgamma": array(dgamma),
        "dbeta": array(dbeta),
        "moving": [array(v) for v in moving],
    }

    # Evaluation, which leaves the moving statistics alone.
    evaluated = backend.compiled(lambda: layer(variable, training=False), [])()
    values["evaluated"] = from_layout(evaluated, first)
    values["moving after"] = [array(v) for v in moving]
    return values


def gradients(
    forward: Callable[[], tuple[Any, Any]], variables: list[keras.Variable]
) -> tuple[list[Any], Any]:
    """Gradients of the first result of `forward`, and its second result."""
    values = [variable.value for variable in variables]
    if backend.FRAMEWORK == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss, result = forward()
        return tape.gradient(loss, values), result
    import torch

    loss, result = forward()
    return list(torch.autograd.grad(loss, values)), result.detach()


def representable(values: np.ndarray, policy: str) -> np.ndarray:
    """float32 values that the policy's compute dtype holds exactly."""
    rounded = ops.cast(
        ops.convert_to_tensor(values.astype(np.float32)), ROUNDED.get(policy, policy)
    )
    return array(rounded)


def array(tensor: Any) -> np.ndarray:
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def to_layout(x: np.ndarray, first: bool) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if first else x


def from_layout(x: Any, first: bool) -> np.ndarray:
    return array(x).transpose(0, 2, 3, 1) if first else array(x)


def short() -> list[dict[str, Any]]:
    """One function for batches of any size, as with data.remainder="short"; the statistics are a
    batch's own.
    """
    layer = WorkerBatchNormalization(momentum=0.0, epsilon=EPSILON)
    layer.build((None, 5, 4, 8))

    def forward(x: Any) -> tuple[Any, Any, Any]:
        with keras.StatelessScope() as scope:
            y = layer(x, training=True)
        statistics = [
            scope.get_current_value(v) for v in (layer.moving_mean, layer.moving_variance)
        ]
        return y, *statistics

    function = backend.compiled(forward, [("float32", (None, 5, 4, 8))])
    draw, found = np.random.default_rng(1), []
    for examples in (6, 5, 1):
        x = draw.normal(3, 2, (examples, 5, 4, 8)).astype(np.float32)
        results = [array(value) for value in function(ops.convert_to_tensor(x))]
        found.append(dict(zip(("x", "y", "mean", "variance"), [x, *results], strict=True)))
    return found


def untrainable() -> dict[str, Any]:
    """A layer that is not to be trained evaluates, as Keras's own does."""
    layer = WorkerBatchNormalization(workers=3)
    x = ops.ones((6, 2, 2, 8))
    layer.build(x.shape)
    layer.trainable = False
    return {"y": array(layer(x, training=True)), "evaluated": array(layer(x, training=False))}


def refusals() -> dict[str, str]:
    """What is said to settings that the kernels don't have."""
    found = {}
    attempts = {
        "scale": lambda: WorkerBatchNormalization(scale=False),
        "renorm": lambda: WorkerBatchNormalization(renorm=True),
        "vectors": lambda: WorkerBatchNormalization().build((None, 8)),
        "axis": lambda: WorkerBatchNormalization(axis=2).build((None, 5, 4, 8)),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            found[name] = str(error)
    return found


def main() -> None:
    fit.start(deterministic=True)
    report(
        collectives.rank(),
        {
            "cases": {name: found_for(**settings) for name, settings in cases().items()},
            "again": {name: found_for(**settings) for name, settings in cases().items()},
            "short": short(),
            "untrainable": untrainable(),
            "refusals": refusals(),
            "workers kept": WorkerBatchNormalization.from_config(
                WorkerBatchNormalization(workers=3).get_config()
            ).workers,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
