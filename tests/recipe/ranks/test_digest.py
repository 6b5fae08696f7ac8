"""Digests of arrays and tensors: equal for equal bits, another for any changed bit."""

import numpy as np
import pytest
import torch

from recipe.ranks import digest as module
from recipe.ranks.digest import digest, numbers

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")


def number(array) -> int:
    return int(numbers([digest(array)])[0])


def tensor_of(dtype: str) -> torch.Tensor:
    return torch.arange(37).remainder(2 if dtype == "bool" else 37).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_a_tensors_digest(dtype, monkeypatch):
    """Also where the tensor is digested in parts."""
    monkeypatch.setattr(module, "PART", 8)
    tensor = tensor_of(dtype)
    before, bits = number(tensor), tensor.view(torch.uint8)
    for place in range(len(bits)):
        for bit in range(1 if dtype == "bool" else 8):
            bits[place] ^= 1 << bit
            assert number(tensor) != before
            bits[place] ^= 1 << bit
    assert number(tensor) == before


def test_parts_give_what_the_whole_gives(monkeypatch):
    tensor = torch.randn(1000)
    whole = number(tensor)
    monkeypatch.setattr(module, "PART", 7)
    assert number(tensor) == whole


def test_exchanged_values_change_the_digest():
    tensor = torch.arange(100.0)
    exchanged = tensor.clone()
    exchanged[[3, 57]] = exchanged[[57, 3]]
    assert number(exchanged) != number(tensor)


def test_the_order_in_memory_does_not_matter():
    images = torch.randn(4, 3, 2, 5)
    assert number(images) == number(images.to(memory_format=torch.channels_last))
    assert number(torch.tensor(3.0)) == number(torch.tensor([3.0]))


def test_arrays_of_numpy_have_digests_too():
    array = np.arange(10.0)
    before = number(array)
    array.view(np.uint8)[33] ^= 4
    assert number(array) != before
    assert numbers([digest(array), digest(array)]).dtype == np.int64
