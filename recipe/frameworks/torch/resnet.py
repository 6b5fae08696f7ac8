"""The paper's ResNet in PyTorch (sec. 5.1), under torchvision's names, whose state dicts load."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from recipe.config import Recipe
from recipe.frameworks.torch.normalization import WorkerBatchNorm2d
from recipe.frameworks.torch.weights import from_keras, keras_layer, to_keras
from recipe.rules import dropout, initial
from recipe.rules.pixels import MEAN, STD

Norm = Callable[[int], WorkerBatchNorm2d]  # of the number of channels


def build(recipe: Recipe, num_classes: int) -> "ResNet":
    """Return the recipe's network with its initial weights, the same as in Keras."""
    network = ResNet(recipe, num_classes)
    _initialise(network, recipe)
    return network.to(memory_format=network.layout)  # type: ignore[call-overload]


class ResNet(nn.Module):
    """The network.

    uint8 images [b, s, s, 3] go in, to train with dropout also keys int64[b]. float32 logits [b,
    num_classes] come out. ResNet-50 has 25,557,032 parameters at 1000 classes. Under autocast the
    FC layer stays in float32, as the logits and the softmax after them need the range.
    """

    counters: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        super().__init__()

        # What the layers below need to know.
        model = recipe.model
        self._workers = recipe.run.workers_at_once
        self._eps = model.bn_epsilon
        self.dropout = model.dropout
        self.layout = torch.contiguous_format
        if model.data_format == "channels_last":
            self.layout = torch.channels_last

        # The stem.
        if model.stem == "small":
            self.conv1 = _conv(3, model.width, size=3, stride=1)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = _conv(3, model.width, size=7, stride=2)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.bn1 = self.norm(model.width)

        # The stages, each of which but the first halves the image at its first block.
        channels = model.width
        self.stages = len(model.blocks)
        for stage, blocks in enumerate(model.blocks):
            width, stride = model.width * 2**stage, 1 if stage == 0 else 2
            rest = [Bottleneck(self.norm, 4 * width, width, 1) for _ in range(blocks - 1)]
            first = Bottleneck(self.norm, channels, width, stride)
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            channels = 4 * width
        self.fc = nn.Linear(channels, num_classes)

        # What is no weight: the pixels' statistics and the dropout's counters.
        mean = torch.tensor(MEAN, dtype=torch.float32).reshape(3, 1, 1)
        std = torch.tensor(STD, dtype=torch.float32).reshape(3, 1, 1)
        counters = torch.from_numpy(dropout.counters(channels))
        self.register_buffer("counters", counters, persistent=False)
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("offset", -mean / std, persistent=False)

    def norm(self, channels: int) -> WorkerBatchNorm2d:
        """Return batch normalisation over each worker's n examples."""
        return WorkerBatchNorm2d(channels, self._workers, self._eps)

    def forward(self, images: torch.Tensor, *keys: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.stem(images)
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        pooled = x.mean((2, 3), dtype=torch.float32)
        if self.training and self.dropout:
            (example_keys,) = keys
            kept = dropout.kept(example_keys, self.counters, self.dropout, torch)
            pooled = pooled / (1 - self.dropout) * kept
        with torch.autocast(x.device.type, enabled=False):
            return self.fc(pooled)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        """Return features of uint8 images, whose pixels are normalised on the device (sec. 5.1)."""
        x = images.permute(0, 3, 1, 2).float() * self.scale + self.offset
        x = x.contiguous(memory_format=self.layout)
        return self.maxpool(self.bn1(self.conv1(x)).relu_())


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with a shortcut (sec. 5.1).

    Stride 2 is on the 3×3, not on the 1×1 as in the first ResNet paper.
    """

    def __init__(self, norm: Norm, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 1, 1), norm(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), norm(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1, 1), norm(4 * width)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(_conv(inputs, 4 * width, 1, stride), norm(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # ReLU works in place: backprop needs what goes into batch norm, not what comes out.
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return y.relu_()


def _conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


@torch.no_grad()
def _initialise(network: ResNet, recipe: Recipe) -> None:
    """Draw the weights, and set γ = 0 in the last BN of each block.

    Convolutions have He's, the FC layer has a standard deviation of 0.01. They are drawn in Keras's
    shapes under Keras's names.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            std = initial.FC_STD if isinstance(module, nn.Linear) else None
            shape = to_keras(module.weight.numpy()).shape
            weights = initial.normal(shape, std, recipe.seed, keras_layer(name))
            module.weight.copy_(torch.from_numpy(np.ascontiguousarray(from_keras(weights))))
        if isinstance(module, nn.Linear):
            module.bias.zero_()
        if isinstance(module, Bottleneck) and recipe.model.zero_gamma:
            module.bn3.weight.zero_()
