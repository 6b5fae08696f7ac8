"""Which features an example drops: a function of (seed, epoch, example index), whatever the framework."""

import math
from types import ModuleType
from typing import Any

import numpy as np

from recipe.rules import augment


def kept(keys: Any, counters: Any, rate: float, ops: ModuleType) -> Any:
    """bool[b, units]: the features that stay.

    `keys`: int64[b], the bits of `recipe.rules.augment.keys`. `counters`: int64[units] from `counters()`, as a tensor. `ops`:
    `keras.ops` or `torch`. A feature is dropped where `recipe.rules.augment.uniforms` has a number below `rate`; integers are
    compared, so that no framework rounds otherwise."""
    words = _mixed(ops.bitwise_xor(keys[:, None], counters[None]), ops)
    return ops.greater_equal(_shifted(words, 11, ops), _signed(math.ceil(rate * 2.0**53)))


def counters(units: int) -> np.ndarray:
    """int64[units]: the counters of the units' random numbers."""
    return np.arange(augment.DROPOUT, augment.DROPOUT + units, dtype=np.int64)


def _mixed(x: Any, ops: ModuleType) -> Any:
    """SplitMix64 as in recipe.rules.augment; signed integers, since not every framework multiplies unsigned ones."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = ops.bitwise_xor(x, _shifted(x, 30, ops)) * _signed(0xBF58476D1CE4E5B9)
    x = ops.bitwise_xor(x, _shifted(x, 27, ops)) * _signed(0x94D049BB133111EB)
    return ops.bitwise_xor(x, _shifted(x, 31, ops))


def _shifted(x: Any, bits: int, ops: ModuleType) -> Any:
    """x >> bits of the unsigned number."""
    return ops.bitwise_and(
        ops.bitwise_right_shift(x, np.int64(bits)), np.int64(2 ** (64 - bits) - 1)
    )


def _signed(word: int) -> np.int64:
    """The int64 with the bits of this word, by Python's numbers: torch.compile can't follow a cast of NumPy's."""
    return np.int64(word - 2**64 if word >= 2**63 else word)
