"""How a rank computes in Keras's PyTorch backend: with native PyTorch's device and kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch

from recipe.frameworks.normalised import Normalised
from recipe.frameworks.torch import normalization
from recipe.frameworks.torch.device import on_device, use_local_device

__all__ = ["decayed", "gradients", "normalised", "on_device", "use_local_device"]


def gradients(
    forward: Callable[[], tuple[Any, Any]], variables: Sequence[keras.Variable]
) -> tuple[list[Any], Any]:
    """Return the gradients of the loss, and the vector: `forward` gives both, (loss, vector)."""
    loss, vector = forward()
    results = torch.autograd.grad(loss, [v.value for v in variables], allow_unused=True)
    return list(results), vector.detach()


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
