"""How a rank computes in Keras's PyTorch backend: with native PyTorch's device and kernels."""

from collections.abc import Callable, Sequence

import keras
import torch

from recipe.config import Recipe
from recipe.errors import UsageError
from recipe.frameworks.keras.passes import Forward, LastPass
from recipe.frameworks.normalised import Normalised
from recipe.frameworks.torch import normalization
from recipe.frameworks.torch.device import on_device, use_local_device
from recipe.frameworks.torch.input import Input
from recipe.frameworks.torch.reduction import Reduction

__all__ = ["Gradients", "Input", "decayed", "normalised", "on_device", "use_local_device"]


class Gradients:
    """The gradients of a step: sums over its passes, then the mean over the ranks.

    They add up in the parameters. The hooks of native PyTorch reduce them beside the last backward
    pass. A DistributedOptimizer would get them when that is over.
    """

    def __init__(self, recipe: Recipe, model: keras.Model, passes: int) -> None:
        """Hang the hooks on the model's parameters. Raise UsageError for run.compile."""
        if recipe.run.compile:
            raise UsageError(
                "config.run.compile=true: PyTorch's compiler can't take Keras's layers as a whole; "
                "set config.framework='torch' or KERAS_BACKEND=tensorflow, or leave it false"
            )
        self._parameters = [v.value for v in model.trainable_variables]
        half = recipe.optimizer.compression == "fp16"
        self._reduction = Reduction(self._parameters, half)

    def add(self, forward: Callable[[], Forward]) -> torch.Tensor:
        """Run one of several passes, and return its vector."""
        loss, vector = forward()
        loss.backward()
        return vector.detach()

    def last(self, forward: Callable[[], Forward]) -> LastPass:
        """Run the last pass, and begin the reductions. Collective."""
        self._reduction.expect()
        return LastPass(self.add(forward), self._take)

    def _take(self) -> list[torch.Tensor | None]:
        """Wait for the mean gradients, and return them. The sums begin anew."""
        self._reduction.finish()
        gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return gradients


@torch.no_grad()
def decayed(
    gradients: Sequence[torch.Tensor], variables: Sequence[keras.Variable], decay: float
) -> list[torch.Tensor]:
    """Return the gradients, each with `decay` times its variable added."""
    weights = [variable.value for variable in variables]
    return list(torch._foreach_add(list(gradients), weights, alpha=decay))


def normalised(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    epsilon: float,
    workers: int,
    channels_first: bool,
) -> Normalised:
    """Normalise each of the workers' equal parts of a batch of images, in order."""
    if channels_first:
        return normalization.normalised(x, gamma, beta, epsilon, workers)
    # Keras's layout is a view of PyTorch's channels_last, and so is what comes back.
    result = normalization.normalised(x.permute(0, 3, 1, 2), gamma, beta, epsilon, workers)
    return result._replace(output=result.output.permute(0, 2, 3, 1))
