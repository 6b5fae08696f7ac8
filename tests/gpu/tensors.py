"""Collectives of one rank on tensors of its device, by NCCL where it has a GPU."""

import horovod.torch as hvd
import torch

from recipe.frameworks.torch import replica
from recipe.frameworks.torch.device import local_device

TYPES = (torch.float32, torch.float16, torch.int64)
COUNT = 200  # tensors that Horovod fuses


def check_collectives() -> None:
    """Check that the sum over one rank is what went in, to the bit, and where it was."""
    replica.start()
    assert local_device().type == "cpu" or hvd.nccl_built()
    for dtype in TYPES:
        tensor = numbers(1000, dtype)
        check(hvd.allreduce(tensor, op=hvd.Sum), tensor)
        check(hvd.broadcast(tensor, root_rank=0), tensor)
        many = [numbers(n, dtype) for n in range(1, COUNT + 1)]
        for ours, theirs in zip(many, hvd.grouped_allreduce(many, op=hvd.Sum), strict=True):
            check(theirs, ours)
        handles = [hvd.allreduce_async(each, op=hvd.Sum) for each in many]
        for ours, handle in zip(many, handles, strict=True):
            check(hvd.synchronize(handle), ours)


def check_scales() -> None:
    """Check averages and factors. Powers of two are exact."""
    replica.start()
    for dtype in (torch.float32, torch.float16):
        tensor = numbers(1000, dtype)
        check(hvd.allreduce(tensor, op=hvd.Average), tensor)
        scaled = hvd.allreduce(tensor, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0)
        check(scaled, tensor * 2)


def check_order() -> None:
    """Check that a sum waits for what makes the tensor, and what reads it for the sum."""
    replica.start()
    for n in range(10):
        large = torch.full((2000, 2000), 1.0, device=local_device())
        made = (large @ large) / 2000 + n
        hvd.allreduce_(made, op=hvd.Sum)
        check(made * 2, torch.full_like(made, 2 * (n + 1)))


def numbers(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return whole numbers that float16 has."""
    return (torch.arange(count, device=local_device()) % 251 - 100).to(dtype)


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.device == expected.device
    assert torch.equal(found, expected)
