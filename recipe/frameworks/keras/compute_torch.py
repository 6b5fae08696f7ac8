"""How a rank computes in Keras's PyTorch backend: as in native PyTorch, and gradients."""

from collections.abc import Callable

import torch

from recipe.frameworks.torch.device import on_device, use_local_device

__all__ = ["gradients", "on_device", "use_local_device"]


def gradients(forward: Callable[[], tuple], variables: list) -> tuple[list, tuple]:
    """forward() gives (loss, anything else): (the loss's gradients, what else there was, detached)."""
    loss, *found = forward()
    taken = torch.autograd.grad(loss, [v.value for v in variables], allow_unused=True)
    return list(taken), [f.detach() for f in found]
