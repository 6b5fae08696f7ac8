"""Dropout that is a function of (seed, epoch, example index), the same in every framework."""

from typing import Any

import keras
from keras import ops

from recipe.rules import dropout


@keras.saving.register_keras_serializable("recipe")
class ExampleDropout(keras.layers.Layer):
    """Sets each of an example's features to 0 with probability `rate` in training.

    The others are multiplied by 1/(1 − rate). Inputs: features [b, units] and keys int64[b], the
    bits of `recipe.rules.augment.keys`. `recipe.rules.dropout` decides.
    """

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate

    def call(self, features: Any, keys: Any, training: bool = False) -> Any:
        if not training:
            return features
        counters = ops.convert_to_tensor(dropout.counters(features.shape[-1]))
        kept = dropout.kept(keys, counters, self.rate, ops)
        return ops.where(kept, features / (1 - self.rate), ops.zeros_like(features))

    def get_config(self) -> dict:
        return super().get_config() | {"rate": self.rate}
