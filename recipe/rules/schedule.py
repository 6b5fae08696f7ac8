"""The learning rate η as a function of the epoch: linear scaling, warmup and step decay."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whoever only needs a rate needs no recipe
    from recipe.config import Recipe


def scaled_rate(base_rate: float, minibatch: int, reference: int = 256) -> float:
    """Return kη: the base rate η, stated for `reference` examples, scaled linearly to `minibatch`.

    (Paper, sec. 2.1.)
    """
    return base_rate * minibatch / reference


@dataclass(frozen=True)
class Rate:
    """η of the epoch (a float: passes over the training set) at the *start* of a step.

    Gradual warmup (paper, sec. 2.2) rises from `start` by a constant amount per iteration. So the
    first step of the run has `start`, and the first step at or after `warmup_epochs` has `peak`.
    A warmup of a fraction of an epoch ends inside that epoch. Nothing is remembered from step to
    step, so a resumed run continues the ramp.
    """

    start: float  # η, rate of the first step when there is a warmup
    peak: float  # kη, rate after the warmup
    warmup: str = "gradual"  # "gradual", "constant" or "none"
    warmup_epochs: float = 5.0
    decay_epochs: Sequence[float] = (30.0, 60.0, 80.0)
    decay_factor: float = 0.1

    def __call__(self, epoch: float) -> float:
        if self.warmup != "none" and epoch < self.warmup_epochs:
            ramp = epoch / self.warmup_epochs if self.warmup == "gradual" else 0.0
            return self.start + (self.peak - self.start) * ramp
        decays_passed = bisect.bisect_right(self.decay_epochs, epoch)
        return self.peak * self.decay_factor**decays_passed


def recipe_rate(recipe: "Recipe") -> Rate:
    """Return the recipe's schedule.

    The paper says nothing of minibatches below 256, where kη < η. The warmup then starts at kη:
    there is nothing to warm up.
    """
    peak = scaled_rate(recipe.optimizer.base_rate, recipe.minibatch)
    return Rate(
        start=min(recipe.optimizer.base_rate, peak),
        peak=peak,
        warmup=recipe.schedule.warmup,
        warmup_epochs=recipe.schedule.warmup_epochs,
        decay_epochs=recipe.schedule.decay_epochs,
        decay_factor=recipe.schedule.decay_factor,
    )
