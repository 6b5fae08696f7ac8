"""Numbers by which the ranks compare arrays: any changed bit changes them."""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "np.ndarray | torch.Tensor"
Digest: TypeAlias = "int | torch.Tensor"

MULTIPLIER = 2862933555777941757  # odd and large, so that neighbours get unlike factors
PART = 2**22  # words at once, so that little memory is needed beside the tensor


def digest(array: Array) -> Digest:
    """Return an array's digest. That of a tensor of PyTorch is a tensor, and lies where it lies."""
    if isinstance(array, np.ndarray):
        return zlib.crc32(np.ascontiguousarray(array))  # type: ignore[arg-type]  # it is a buffer
    return _digest_of_tensor(array)


def numbers(digests: Sequence[Digest]) -> np.ndarray:
    """Return digests as int64[n]. Of tensors' digests all are fetched from a GPU at once."""
    if all(isinstance(value, int) for value in digests):
        return np.array(digests, dtype=np.int64)
    import torch

    tensors = [torch.as_tensor(value) for value in digests]
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), "cpu")
    return torch.stack([tensor.to(device) for tensor in tensors]).numpy(force=True)


def _digest_of_tensor(tensor: "torch.Tensor") -> "torch.Tensor":
    """Sum a tensor's words, each times an odd number of its own, modulo 2⁶⁴.

    An odd factor keeps the lowest changed bit of a word, so that no change of one word is lost.
    """
    import torch

    memory = tensor.detach().reshape(-1)
    words = memory.view(torch.int32 if memory.element_size() % 4 == 0 else torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for begin in range(0, len(words), PART):
        part = words[begin : begin + PART].long()
        places = torch.arange(begin, begin + len(part), device=words.device)
        total += (part * (places * MULTIPLIER).bitwise_or_(1)).sum()
    return total
