"""What a framework brings to the training loop: a rank's copy of the network and its optimizer."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

Figures = tuple[np.ndarray, np.ndarray, bool]


class Replica(Protocol):
    """An element is what `recipe.data.pipeline.train_batches` yields: the input of one forward pass."""

    def begin(self, steps: int) -> None:
        """Before the first step: rank 0's state on all ranks. `steps`: of an epoch. Collective."""

    def step(self, epoch: int, step: int, elements: Iterator[tuple], stop: bool) -> Callable[[], Figures]:
        """Step `step` of an epoch: draws this rank's elements and updates. Collective.

        Returns a function that waits for it and gives (the k workers' sums of cross-entropies, float32[k]; their hits,
        float32[k]; whether any rank passed `stop`), the same on all ranks."""

    def end(self) -> None:
        """After the last step: the replicas are compared. Collective."""

    def rate(self) -> float:
        """η of the last step."""

    def predict(self, images: Any) -> np.ndarray:
        """Logits [b, classes] of uint8 images [b, s, s, 3]."""

    def statistics_of(self, elements: Iterator[tuple]) -> AbstractContextManager:
        """A context in which `predict` normalises by the mean statistics of all ranks' elements. Collective."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All state, the same on all ranks, by unique names."""

    def weights(self) -> dict[str, np.ndarray]:
        """The trained weights among it."""

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `arrays`, on this rank. Raises RunError when they are another network's."""
