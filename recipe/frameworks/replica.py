"""What a framework brings to the training loop: a rank's copy of the network and its optimizer."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from recipe.config import Recipe

Figures = tuple[np.ndarray, np.ndarray, bool]

# Bytes of gradients that are reduced together when the order of their sum must not vary.
GROUP = 2**24


class Replica(Protocol):
    """An element is what `recipe.data.pipeline.train_batches` yields: the input of one forward pass."""

    def begin(self, steps: int) -> None:
        """Before the first step: rank 0's state on all ranks. `steps`: of an epoch. Collective."""

    def step(
        self, epoch: int, step: int, elements: Iterator[tuple], stop: bool
    ) -> Callable[[], Figures]:
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


def of(framework: str) -> ModuleType:
    """The module that runs recipes of `config.framework`: its `start(deterministic)` begins, its `make_replica` gives a
    Replica of a recipe and the number of classes."""
    return importlib.import_module(f"recipe.frameworks.{framework}.replica")


def figures(values: np.ndarray, k: int) -> Figures:
    """The figures in a step's vector float32[2k + 1]: losses, hits, stop."""
    return values[:k], values[k:-1], bool(values[-1])


def groups(recipe: Recipe, parameters: int) -> int | None:
    """Into how many groups, fixed ones, a deterministic run fuses the gradients of so many parameters."""
    return max(1, 4 * parameters // GROUP) if recipe.run.deterministic else None
