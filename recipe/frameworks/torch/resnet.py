"""The paper's ResNet in PyTorch (sec. 5.1), under torchvision's names: its ResNet-50 state dicts load as they are."""

from typing import Any

import numpy as np
import torch
from torch import nn

from recipe.config import Recipe
from recipe.frameworks.torch import weights as names
from recipe.frameworks.torch.normalization import WorkerBatchNorm2d
from recipe.rules import dropout, initial
from recipe.rules.pixels import MEAN, STD


def build(recipe: Recipe, num_classes: int) -> "ResNet":
    """The recipe's network with its initial weights, the same as in Keras (recipe.frameworks.keras.resnet)."""
    network = ResNet(recipe, num_classes)
    _initialise(network, recipe)
    return network.to(memory_format=network.layout)


class ResNet(nn.Module):
    """uint8 images [b, s, s, 3] in, to train with dropout also keys int64[b]; float32 logits [b, num_classes] out.

    ResNet-50 has 25,557,032 parameters at 1000 classes. Under autocast the FC layer stays in float32, as the logits and
    the softmax after them need the range."""

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        super().__init__()
        model, self._workers, self._eps = (
            recipe.model,
            recipe.run.workers_at_once,
            recipe.model.bn_epsilon,
        )
        small = model.stem == "small"
        self.conv1 = _conv(3, model.width, 3 if small else 7, 1 if small else 2)
        self.bn1 = self.norm(model.width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        inputs = model.width
        for stage, blocks in enumerate(model.blocks):
            width, stride = model.width * 2**stage, 1 if stage == 0 else 2
            rest = [Bottleneck(self.norm, 4 * width, width, 1) for _ in range(blocks - 1)]
            first = Bottleneck(self.norm, inputs, width, stride)
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            inputs = 4 * width
        self.stages = len(model.blocks)
        self.layout = (
            torch.channels_last if model.data_format == "channels_last" else torch.contiguous_format
        )
        self.fc = nn.Linear(inputs, num_classes)
        mean, std = (torch.tensor(v, dtype=torch.float32).reshape(3, 1, 1) for v in (MEAN, STD))
        self.dropout = model.dropout
        self.register_buffer(
            "counters", torch.from_numpy(dropout.counters(inputs)), persistent=False
        )
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("offset", -mean / std, persistent=False)

    def norm(self, channels: int) -> WorkerBatchNorm2d:
        return WorkerBatchNorm2d(channels, self._workers, self._eps)

    def forward(self, images: torch.Tensor, *keys: torch.Tensor) -> torch.Tensor:
        x = (
            images.permute(0, 3, 1, 2).float() * self.scale + self.offset
        )  # on the device (sec. 5.1)
        x = self.maxpool(self.bn1(self.conv1(x.contiguous(memory_format=self.layout))).relu_())
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        pooled = x.mean((2, 3), dtype=torch.float32)
        if self.training and self.dropout:
            pooled = (
                pooled
                / (1 - self.dropout)
                * dropout.kept(*keys, self.counters, self.dropout, torch)
            )
        with torch.autocast(x.device.type, enabled=False):
            return self.fc(pooled)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with a shortcut; stride 2 is on the 3×3, not on the 1×1 as in the first ResNet paper (sec. 5.1)."""

    def __init__(self, norm: Any, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 1, 1), norm(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), norm(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1, 1), norm(4 * width)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(_conv(inputs, 4 * width, 1, stride), norm(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(
            self.conv1(x)
        ).relu_()  # in place: backprop needs what goes into batch norm, not what comes out
        y = self.bn2(self.conv2(y)).relu_()
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return y.relu_()


def _conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


@torch.no_grad()
def _initialise(network: ResNet, recipe: Recipe) -> None:
    """He for convolutions, 0.01 for the FC layer; γ = 0 in the last BN of each block. Drawn in Keras's shapes under
    Keras's names."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            std = initial.FC_STD if isinstance(module, nn.Linear) else None
            shape = names.to_keras(module.weight.numpy()).shape
            drawn = initial.normal(shape, std, recipe.seed, names.keras_layer(name))
            module.weight.copy_(torch.from_numpy(np.ascontiguousarray(names.from_keras(drawn))))
        if isinstance(module, nn.Linear):
            module.bias.zero_()
        if isinstance(module, Bottleneck) and recipe.model.zero_gamma:
            module.bn3.weight.zero_()
