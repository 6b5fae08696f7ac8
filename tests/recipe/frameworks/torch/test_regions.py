"""Compilation by regions, with a compiler that leaves the operations as they are."""

import functools

import pytest
import torch

from recipe.config import Data, Model, Recipe, Run
from recipe.errors import UsageError
from recipe.frameworks.torch import regions, resnet

STAGES = 5  # in training and evaluation more than the eight variants of PyTorch's own limit


def network() -> resnet.ResNet:
    recipe = Recipe(
        framework="torch",
        k=1,
        data=Data(image_size=32),
        model=Model(blocks=(1,) * STAGES, width=4, stem="small"),
        run=Run(compile=True),
    )
    return resnet.build(recipe, 10)


def test_no_block_runs_uncompiled(monkeypatch):
    """Training, evaluation, precise statistics and a short batch. One graph each, and no more."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = network()
    regions.compile_regions(compiled)
    images = torch.zeros((4, 32, 32, 3), dtype=torch.uint8)
    for _ in range(2):
        compiled.train()
        compiled(images).sum().backward()
        compiled(images[:3]).sum().backward()
        with torch.no_grad():
            compiled(images)
            compiled.eval()
            compiled(images)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 4 * (STAGES + 1)
    assert not counters["graph_break"]


def test_without_a_c_compiler_there_is_a_sentence(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"run\.compile=true needs a C\+\+ compiler.*no-such"):
        regions.compile_regions(network())
