"""Which features an example drops: a function of (seed, epoch, example index) in any framework."""

import math
from types import ModuleType
from typing import Any

import numpy as np

from recipe.rules import augment


def kept(keys: Any, counters: Any, rate: float, ops: ModuleType) -> Any:
    """Return bool[b, units]: the features that are not dropped.

    `keys`: int64[b], the bits of `augment.keys`. `counters`: int64[units] from `counters()`, as a
    tensor. `ops`: `keras.ops` or `torch`. A feature is dropped where `augment.uniforms` has a
    number below `rate`. Integers are compared, so that no framework rounds in its own way.
    """
    words = _mix(ops.bitwise_xor(keys[:, None], counters[None]), ops)
    return ops.greater_equal(_shift_right(words, 11, ops), _signed(math.ceil(rate * 2.0**53)))


def counters(units: int) -> np.ndarray:
    """Return int64[units]: the counters of the units' random numbers."""
    return np.arange(augment.DROPOUT, augment.DROPOUT + units, dtype=np.int64)


def _mix(x: Any, ops: ModuleType) -> Any:
    """Return SplitMix64's step as augment does, in signed integers.

    Not every framework multiplies unsigned ones.
    """
    x = x + _signed(0x9E3779B97F4A7C15)
    x = ops.bitwise_xor(x, _shift_right(x, 30, ops)) * _signed(0xBF58476D1CE4E5B9)
    x = ops.bitwise_xor(x, _shift_right(x, 27, ops)) * _signed(0x94D049BB133111EB)
    return ops.bitwise_xor(x, _shift_right(x, 31, ops))


def _shift_right(x: Any, bits: int, ops: ModuleType) -> Any:
    """Return x >> bits of the unsigned number."""
    shifted = ops.bitwise_right_shift(x, np.int64(bits))
    return ops.bitwise_and(shifted, np.int64(2 ** (64 - bits) - 1))


def _signed(word: int) -> np.int64:
    """Return the int64 with the bits of this word.

    It uses Python's numbers, because torch.compile can't follow a cast of NumPy's.
    """
    return np.int64(word - 2**64 if word >= 2**63 else word)
