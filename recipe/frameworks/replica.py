"""What a framework brings to the training loop: a rank's copy of the network and its optimizer."""

import importlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from recipe.errors import RunError
from recipe.ranks import collectives

Figures = tuple[np.ndarray, np.ndarray, bool]


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


def check_equal(named: Iterable[tuple[str, np.ndarray]], step: int) -> None:
    """Compares the bytes of named arrays over all ranks, which have the same names in the same order. Collective.

    Raises RunError on every rank, naming the first array that differs."""
    found = [(name, array.shape, zlib.crc32(np.ascontiguousarray(array))) for name, array in named]
    digests = np.array([digest for *_, digest in found], dtype=np.int64)
    least, largest = collectives.extremes(digests, "replica_check")
    for (name, shape, _), same in zip(found, least == largest, strict=True):
        if not same:
            raise RunError(
                f"the ranks' replicas differ: {name} {shape} is the first variable that is not equal on all ranks, "
                f"after step {step}; training can't go on",
                everywhere=True,
            )


def check_structure(ours: dict[str, tuple], arrays: dict[str, np.ndarray]) -> None:
    """Raises RunError when a checkpoint doesn't hold exactly the arrays of a replica, whose shapes are `ours`."""
    for name in arrays.keys() ^ ours.keys():
        where = "the model lacks" if name in arrays else "the checkpoint lacks"
        raise RunError(
            f"{where} {name}: since the checkpoint config.model, its precision, config.optimizer.momentum or a library "
            "has changed, or the framework, for which there is `python -m recipe.convert`"
        )
    for name, shape in ours.items():
        if arrays[name].shape != shape:
            raise RunError(
                f"the checkpoint's {name} has the shape {arrays[name].shape}, the model's {shape}; the checkpoint is "
                "of another model"
            )
