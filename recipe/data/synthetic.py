"""Synthetic examples, which need no disk: for measurements."""

import functools

import numpy as np

from recipe.rules import augment

SPLITS = ("train", "eval")
MOVES = 64  # places, a pixel apart, at which a class's pattern may begin


class SyntheticSource:
    """Images of uint8 noise that depends on (seed, index), in ImageNet's 1000 classes.

    All images of a class are one pattern, moved sideways by up to 63 pixels: so they can be
    learned, and they cost a copy each. Evaluation examples are other moves of the same patterns.
    They aren't augmented.
    """

    num_classes = 1000

    def __init__(self, examples: int, seed: int, split: str) -> None:
        self._examples = examples
        self._seed = seed
        self._split_number = SPLITS.index(split)

    def __len__(self) -> int:
        return self._examples

    def where(self, index: int) -> str:
        """Name an example for messages."""
        return f"example {index}"

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Return the labels of these examples, int32[b]."""
        draws = self._draw(indices)
        return (draws[:, 0] * self.num_classes).astype(np.int32)

    def images(self, indices: np.ndarray, size: int) -> np.ndarray:
        """Return the images of these examples, uint8[b, size, size, 3]."""
        moves = (self._draw(indices)[:, 1] * MOVES).astype(np.int32)
        starts = 3 * (MOVES * self.labels(indices) + moves)
        length = 3 * size * size
        noise = _noise(self._seed, 3 * MOVES * self.num_classes + length)
        return np.stack([noise[start : start + length].reshape(size, size, 3) for start in starts])

    def _draw(self, indices: np.ndarray) -> np.ndarray:
        """Return two random numbers for each example: for its class and for its move."""
        return augment.uniforms(indices, self._seed, self._split_number, 2)


@functools.lru_cache(maxsize=2)
def _noise(seed: int, length: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(length // 8 + 1)
    return words.view(np.uint8)[:length]
