"""Tensors on Horovod's wire: it takes contiguous ones only, so others go as their memory lies."""

from typing import Any

import torch


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a dense tensor as a vector, without a copy."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


class PackedCompression:
    """Compresses gradients in any layout, by one of `horovod.torch.Compression`."""

    def __init__(self, compression: Any) -> None:
        self._compression = compression

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        wire, context = self._compression.compress(packed(tensor))
        return wire, (context, tensor.shape, tensor.stride())

    def decompress(self, wire: torch.Tensor, context: tuple) -> torch.Tensor:
        inner, shape, stride = context
        return self._compression.decompress(wire, inner).as_strided(shape, stride)
