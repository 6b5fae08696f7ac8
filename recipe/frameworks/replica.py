"""What a framework brings to the training loop: a rank's copy of the network and its optimizer."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, cast

import numpy as np

from recipe.config import Recipe
from recipe.data.element import Element
from recipe.frameworks.vector import StepResult
from recipe.system.arrays import Arrays

# Bytes of gradients that are reduced together when the order of their sum must not vary.
GROUP = 2**24


class Replica(Protocol):
    """A rank's network, optimizer and schedule."""

    def begin(self, steps: int) -> None:
        """Bring rank 0's state to all ranks. An epoch has so many steps. Collective."""

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for an epoch, counted from 0. Its first steps may be done already."""

    def step(self, step: int, elements: Iterator[Element], stop: bool) -> Callable[[], StepResult]:
        """Draw this rank's elements for a step of the epoch, and update. Collective.

        `stop` is this rank's wish to leave. The function that comes back waits for the step and
        returns its result.
        """

    def end(self) -> None:
        """Compare the replicas of all ranks, after the last step. Collective."""

    def rate(self) -> float:
        """Return η of the last step."""

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return logits [b, classes] of uint8 images [b, s, s, 3]."""

    def statistics_of(self, elements: Iterator[Element]) -> AbstractContextManager[None]:
        """Return a context in which `predict` uses the elements' mean statistics. Collective."""

    def arrays(self) -> Arrays:
        """Return all state, the same on all ranks, by unique names."""

    def weights(self) -> Arrays:
        """Return the trained weights among the state."""

    def restore(self, arrays: Arrays) -> None:
        """Take over the state that `arrays` returned, on this rank.

        Raise RunError when it is another network's.
        """


class Framework(Protocol):
    """The module of a framework that runs recipes."""

    def start(self, deterministic: bool = False) -> None:
        """Start Horovod, and take this rank's share of its host."""

    def make_replica(self, recipe: Recipe, num_classes: int) -> Replica:
        """Return this rank's replica, with its initial weights."""


def load_framework(name: str) -> Framework:
    """Return the framework that config.framework names; this loads Keras or PyTorch."""
    return cast(Framework, importlib.import_module(f"recipe.frameworks.{name}.replica"))


def first_loss_scale(recipe: Recipe) -> float | None:
    """Return the loss scale that a run begins with; None when it has none.

    A scaled loss keeps small gradients above zero where they are float16: in the arithmetic, or on
    the wire alone. There 2¹⁰ suits, as gradients are summed in float16 over all ranks.
    """
    if recipe.model.precision == "mixed_float16":
        return 2.0**15
    if recipe.optimizer.compression == "fp16":
        return 2.0**10
    return None


def gradient_groups(recipe: Recipe, parameters: int) -> int | None:
    """Return into how many fixed groups a deterministic run fuses its gradients."""
    return max(1, 4 * parameters // GROUP) if recipe.run.deterministic else None
