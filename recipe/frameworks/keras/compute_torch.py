"""How a rank computes in Keras's PyTorch backend: as in native PyTorch, and gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch

from recipe.frameworks.torch.device import on_device, use_local_device

__all__ = ["gradients", "on_device", "use_local_device"]


def gradients(
    forward: Callable[[], tuple[Any, Any]], variables: Sequence[keras.Variable]
) -> tuple[list[Any], Any]:
    """Return the gradients of the loss, and the vector: `forward` gives both, (loss, vector)."""
    loss, vector = forward()
    results = torch.autograd.grad(loss, [v.value for v in variables], allow_unused=True)
    return list(results), vector.detach()
