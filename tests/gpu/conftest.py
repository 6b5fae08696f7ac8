"""The devices of the tests that want a GPU. What needs none of it runs on the CPU, too."""

import pytest
import torch

GPU = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here"),
)


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> str:
    """Where the test computes."""
    return request.param


@pytest.fixture(params=["cpu", GPU])
def second_device(request: pytest.FixtureRequest) -> str:
    """Where the test goes on."""
    return request.param
