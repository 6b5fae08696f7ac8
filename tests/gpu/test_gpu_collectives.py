"""Horovod's collectives on a GPU's tensors, on one rank. Built, not run on a GPU."""

import pytest
import torch

from recipe.ranks.digest import digest, numbers
from tests.gpu import tensors
from tests.gpu.process import call

# Whether the GPU waits for NCCL, or the process does.
ASYNC = "HOROVOD_ENABLE_ASYNC_COMPLETION"


@pytest.mark.ranks
@pytest.mark.parametrize("completion", ["0", "1"])
@pytest.mark.parametrize(
    "check", [tensors.check_collectives, tensors.check_scales, tensors.check_order]
)
def test_collectives_are_exact(device, check, completion):
    call(device, check, **{ASYNC: completion, "HOROVOD_CYCLE_TIME": "1"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float16])
def test_a_digest_is_the_same_on_each_device(device, dtype):
    tensor = torch.arange(10_001).to(dtype)
    here, there = numbers([digest(tensor)]), numbers([digest(tensor.to(device))])
    assert here == there
    changed = tensor.to(device)
    changed[5000] += 8
    assert numbers([digest(changed)]) != here
