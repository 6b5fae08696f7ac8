"""One row of `python -m recipe.benchmark --gpu`, in a process of its own."""

import importlib.util
import itertools
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from recipe.benchmark import contender, gpu_profile
from recipe.benchmark.gpu_profile import Step
from recipe.benchmark.gpu_rows import CLASSES, SIZES, Row
from recipe.config import Recipe
from recipe.data.batches import aligned
from recipe.data.element import Element
from recipe.data.pipeline import TrainingExamples
from recipe.data.sources import open_source
from recipe.frameworks.replica import load_framework
from recipe.frameworks.torch import device, reduction, resnet
from recipe.frameworks.torch.normalization import WorkerBatchNorm2d
from recipe.frameworks.torch.replica import sgd
from recipe.frameworks.torch.step import AUTOCAST
from recipe.rules.epoch import Share
from recipe.rules.pixels import MEAN, STD
from recipe.system import processor

IN_MEMORY = 3  # elements that take turns


def main(row_file: str, result_file: str) -> None:
    """Measure the row in one file, and write what was found to the other."""
    written = json.loads(Path(row_file).read_text())
    kind, row = written["device"], Row(**written["row"])
    sizes = SIZES[kind]
    recipe = row.recipe(sizes)
    step = CONTENDERS[row.contender](row, recipe)

    for _ in range(sizes.warmup):
        step()()
    times = gpu_profile.step_times(step, sizes.steps)
    lines = gpu_profile.waits(lambda: [step() for _ in range(gpu_profile.STEPS_LOOKED_AT)])
    memory = gpu_profile.peak_memory()  # before the profiler takes its own
    kernels = gpu_profile.kernels(step)
    result = {
        "seconds": times,
        "speeds": [recipe.minibatch / seconds for seconds in times],
        "waits": lines,
        "memory": memory,
        "machine": machine(),
    }
    Path(result_file).write_text(json.dumps(result | kernels._asdict()))


def machine() -> dict[str, str]:
    """Return what was measured on, and the versions of what it runs."""
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": processor.processor(),
        "peer": "torchvision" if has_torchvision() else "this network with nn.BatchNorm2d",
    }
    if torch.cuda.is_available():
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    return facts


def ours(row: Row, recipe: Recipe) -> Step:
    """Return the recipe's step, in native PyTorch or Keras."""
    framework = load_framework(recipe.framework)
    framework.start()
    torch.backends.cudnn.allow_tf32 = row.tf32
    if row.reduces:
        reduce_alone()
    replica = framework.make_replica(recipe, CLASSES)
    replica.begin(10**6)
    replica.begin_epoch(0)
    source, numbers = elements(row, recipe), itertools.count()
    return lambda: replica.step(next(numbers), source, stop=False)


class _OfTwo:
    """Horovod, with two ranks for who asks."""

    def __init__(self, horovod: Any) -> None:
        self._horovod = horovod

    def __getattr__(self, name: str) -> Any:
        return getattr(self._horovod, name)

    def size(self) -> int:
        return 2


def reduce_alone() -> None:
    """Let a rank alone reduce its gradients, in hooks and through Horovod, as several ranks do."""
    reduction.hvd = _OfTwo(reduction.hvd)


def plain_loop(row: Row, recipe: Recipe) -> Step:
    """Return the step of the usual loop in PyTorch, with nothing of Horovod."""
    device.use_local_device(0, processor.cores())
    torch.backends.cudnn.allow_tf32 = row.tf32
    kind, dtype = device.local_device().type, AUTOCAST[recipe.model.precision]
    network = plain_network(recipe).to(kind).train()
    forward = torch.compile(network) if recipe.run.compile else network
    optimizer = sgd(recipe, network)
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    source = elements(row, recipe)

    def step() -> Callable[[], np.ndarray]:
        images, labels, *_ = device.on_device(next(source))
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            loss = functional.cross_entropy(forward(images), labels.long())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return device.when_done(loss.detach())

    return step


def plain_network(recipe: Recipe) -> nn.Module:
    """Return torchvision's ResNet of these blocks; without it ours, with PyTorch's batch norm."""
    layout = torch.channels_last
    if has_torchvision():
        from torchvision.models.resnet import Bottleneck, ResNet

        network = ResNet(Bottleneck, list(recipe.model.blocks), CLASSES)
        return nn.Sequential(Pixels(), network).to(memory_format=layout)  # type: ignore[call-overload]
    network = resnet.build(recipe, CLASSES)
    for module in network.modules():
        if isinstance(module, WorkerBatchNorm2d):
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    return network


def has_torchvision() -> bool:
    """Return whether torchvision is installed."""
    return importlib.util.find_spec("torchvision") is not None


class Pixels(nn.Module):
    """uint8 images [b, s, s, 3], normalised, as a network in channels_last takes them."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN, dtype=torch.float32).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD, dtype=torch.float32).reshape(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std


def keras_fit(row: Row, recipe: Recipe) -> Step:
    """Return the step of `keras.Model.fit` on PyTorch, with Keras's own batch normalisation."""
    import keras

    # As a user writes it.
    device.use_local_device(0, processor.cores())
    torch.backends.cudnn.allow_tf32 = row.tf32
    keras.mixed_precision.set_dtype_policy(recipe.model.precision)
    model = contender.usual_keras(recipe, CLASSES)
    optimizer = keras.optimizers.SGD(recipe.optimizer.base_rate, 0.9, nesterov=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=recipe.run.compile)

    # `fit` calls the train function for each batch. The first step builds it.
    source = elements(row, recipe)
    first = next(source)
    model.train_on_batch(first.images, first.labels)

    def step() -> Callable[[], np.ndarray]:
        images, labels, *_ = device.on_device(next(source))
        logs = model.train_function([(images, labels)])
        return device.when_done(torch.as_tensor(logs["loss"]).detach())

    return step


def elements(row: Row, recipe: Recipe) -> Iterator[Element]:
    """Return the elements of a contender, which has chosen its device."""
    if row.has_pipeline:
        return pipeline(recipe)
    return itertools.cycle([element(recipe, number) for number in range(IN_MEMORY)])


def pipeline(recipe: Recipe) -> Iterator[Element]:
    """Return the elements of a rank alone, as the recipe's own training has them."""
    source = open_source(recipe.data, "train", recipe.seed)
    share = Share.of(recipe, 0, 1)
    return iter(TrainingExamples(source, recipe, share, processor.cores()).elements())


def element(recipe: Recipe, number: int) -> Element:
    """Return an element of random images, in the memory from which the device copies."""
    size, draw = recipe.data.image_size, np.random.default_rng(number)
    images = aligned((recipe.minibatch, size, size, 3))
    images[:] = draw.integers(0, 256, images.shape, dtype=np.uint8)
    labels = draw.integers(0, CLASSES, recipe.minibatch, dtype=np.int32)
    return Element(images, labels, np.ones(recipe.minibatch, np.float32))


CONTENDERS: dict[str, Callable[[Row, Recipe], Step]] = {
    "torch": ours,
    "keras": ours,
    "plain-loop": plain_loop,
    "keras-fit": keras_fit,
}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
