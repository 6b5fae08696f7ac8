"""Compiles a network in parts, between which the hooks of its parameters run."""

import os
import shutil

import torch

from recipe.errors import UsageError
from recipe.frameworks.torch.resnet import Bottleneck, ResNet

# All blocks share their code. Each shape and mode of it is compiled, of ResNet-50 some thirty:
# eight blocks that differ, in training and evaluation, for precise batch normalisation, for a short
# last minibatch. Past PyTorch's own limit of eight, the rest would run uncompiled.
VARIANTS = 64


def compile_regions(network: ResNet) -> None:
    """Compile the stem and each block by itself. Raise UsageError without a C++ compiler.

    The backward pass of a network that is compiled as a whole hands over all gradients at its end.
    """
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise UsageError(
            f"config.run.compile=true needs a C++ compiler, and there is no {name} on PATH: "
            "install g++, or leave it false"
        )
    torch._dynamo.config.cache_size_limit = VARIANTS
    network.stem = torch.compile(network.stem, dynamic=False)  # type: ignore[method-assign]
    for module in network.modules():
        if isinstance(module, Bottleneck):
            module.compile(dynamic=False)
