"""Which learning rate an optimizer's velocities hold: that of the last step, whatever was set for the next since."""

import weakref

import keras

from recipe.keras.sgd import SGD

_held: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # optimizer → (its iterations, η of its velocities)


def hold(optimizer: keras.optimizers.Optimizer, rate: float) -> None:
    """Remembers until the next step that the velocities hold this rate."""
    inner = innermost(optimizer)
    _held[inner] = _iterations(inner), rate


def held(optimizer: keras.optimizers.Optimizer) -> float | None:
    """The rate that the velocities hold; None when nobody said so since the last step."""
    inner = innermost(optimizer)
    if inner not in _held:
        return None
    iterations, rate = _held[inner]
    return rate if iterations == _iterations(inner) else None


def forget(optimizer: keras.optimizers.Optimizer) -> None:
    """For an optimizer whose state was replaced: its velocities hold the rate that came with them."""
    _held.pop(innermost(optimizer), None)


def innermost(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer inside a LossScaleOptimizer; any other as it is."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def with_rate(optimizer: keras.optimizers.Optimizer) -> list:
    """The velocities that have η as a factor: those of `keras.optimizers.SGD` and of RMSprop with momentum."""
    inner = innermost(optimizer)
    if isinstance(inner, keras.optimizers.SGD) and not isinstance(inner, SGD):
        return inner.momentums if inner.momentum else []
    if isinstance(inner, keras.optimizers.RMSprop):
        return inner._momentums if inner.momentum > 0 else []
    return []


def _iterations(optimizer: keras.optimizers.Optimizer) -> int:
    return int(keras.ops.convert_to_numpy(optimizer.iterations))
