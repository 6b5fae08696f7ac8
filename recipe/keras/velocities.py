"""Which learning rate an optimizer's velocities hold.

It is that of the last step, whatever rate was set for the next one since.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import keras

from recipe.keras.sgd import SGD


class _Held(NamedTuple):
    iterations: int  # of the optimizer when the rate was noted
    rate: float  # η of the velocities


_held: WeakKeyDictionary[keras.optimizers.Optimizer, _Held] = WeakKeyDictionary()


def hold(optimizer: keras.optimizers.Optimizer, rate: float) -> None:
    """Remember until the next step that the velocities hold this rate."""
    inner = innermost(optimizer)
    _held[inner] = _Held(_iterations(inner), rate)


def held(optimizer: keras.optimizers.Optimizer) -> float | None:
    """Return the rate that the velocities hold, None if it was not noted since the last step."""
    inner = innermost(optimizer)
    if inner not in _held:
        return None
    iterations, rate = _held[inner]
    return rate if iterations == _iterations(inner) else None


def forget(optimizer: keras.optimizers.Optimizer) -> None:
    """Forget the rate of an optimizer whose state was replaced.

    Its velocities hold the rate that came with them.
    """
    _held.pop(innermost(optimizer), None)


def innermost(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return the optimizer inside a LossScaleOptimizer, any other as it is."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def with_rate(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Return the velocities that have η as a factor.

    They are those of `keras.optimizers.SGD` and of RMSprop with momentum.
    """
    inner = innermost(optimizer)
    if isinstance(inner, keras.optimizers.SGD) and not isinstance(inner, SGD):
        return inner.momentums if inner.momentum else []
    if isinstance(inner, keras.optimizers.RMSprop):
        return inner._momentums if inner.momentum > 0 else []
    return []


def _iterations(optimizer: keras.optimizers.Optimizer) -> int:
    return int(keras.ops.convert_to_numpy(optimizer.iterations))
