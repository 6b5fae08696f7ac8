"""Dropout that is a function of (seed, epoch, example index), whatever the rank, the restart or the framework."""

from typing import Any

import keras
import numpy as np
from keras import ops

from recipe import augment


@keras.saving.register_keras_serializable("recipe")
class ExampleDropout(keras.layers.Layer):
    """Sets each of an example's features to 0 with probability `rate` in training, and scales the others by
    1/(1 − rate).

    Inputs: features [b, units] and keys int64[b], the bits of `recipe.augment.keys`. Unit u is dropped where
    `recipe.augment.uniforms` has a number below `rate` at the counter DROPOUT + u; integers are compared, so that no
    framework rounds otherwise."""

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate

    def call(self, features: Any, keys: Any, training: bool = False) -> Any:
        if not training:
            return features
        counters = np.arange(augment.DROPOUT, augment.DROPOUT + features.shape[-1], dtype=np.int64)
        words = _mixed(ops.bitwise_xor(ops.expand_dims(keys, -1), counters[None]))
        kept = ops.greater_equal(_shifted(words, 11), np.int64(np.ceil(self.rate * 2.0**53)))
        return ops.where(kept, features / (1 - self.rate), ops.zeros_like(features))

    def get_config(self) -> dict:
        return super().get_config() | {"rate": self.rate}


def _mixed(x: Any) -> Any:
    """SplitMix64 as in recipe.augment; signed integers, since not every backend multiplies unsigned ones."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = ops.bitwise_xor(x, _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = ops.bitwise_xor(x, _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return ops.bitwise_xor(x, _shifted(x, 31))


def _shifted(x: Any, bits: int) -> Any:
    """x >> bits of the unsigned number."""
    return ops.bitwise_and(ops.right_shift(x, np.int64(bits)), np.int64(2 ** (64 - bits) - 1))


def _signed(word: int) -> np.int64:
    return np.uint64(word).astype(np.int64)
