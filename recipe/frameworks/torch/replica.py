"""The recipe's replica in native PyTorch: network, optimizer and the state of both."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from recipe.config import Recipe
from recipe.data.element import Element
from recipe.frameworks.replica import Replica
from recipe.frameworks.torch import device, resnet
from recipe.frameworks.torch.normalization import batch_statistics
from recipe.frameworks.torch.step import Step
from recipe.frameworks.torch.weights import from_keras, keras_path, to_keras
from recipe.frameworks.torch.wire import packed
from recipe.frameworks.vector import StepResult
from recipe.ranks import binding, collectives
from recipe.rules.epoch import Share
from recipe.rules.schedule import recipe_rate
from recipe.system.arrays import Arrays, check_structure

# Names in a checkpoint: of η, and of entries in the scaler's state dict.
RATE = "optimizer/rate"
LOSS_SCALE = {"optimizer/loss_scale": "scale", "optimizer/finite_steps": "_growth_tracker"}


@dataclass(frozen=True)
class StateTensor:
    """A tensor that training changes, and its names."""

    name: str  # PyTorch's: of the state dict, or with .velocity
    checkpoint_name: str  # in Keras's layout, as in a Keras checkpoint
    tensor: torch.Tensor


def start(deterministic: bool = False) -> None:
    """Start Horovod, and take this rank's share of its host: one GPU, or some CPU cores."""
    host_share = binding.start("torch", deterministic)
    device.use_local_device(host_share.local_rank, host_share.threads, deterministic)


def make_replica(recipe: Recipe, num_classes: int) -> Replica:
    """Return this rank's replica, with its initial weights."""
    return TorchReplica(recipe, num_classes)


class TorchReplica:
    """`recipe.frameworks.replica.Replica` in native PyTorch."""

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self.recipe = recipe
        self.network = resnet.build(recipe, num_classes).to(device.local_device())
        share = Share.of(recipe, collectives.rank(), collectives.size())
        self.optimizer = _optimizer(recipe, self.network)
        self._step = Step(self.network, self.optimizer, recipe, share)
        self._schedule = recipe_rate(recipe)
        self._epoch = self._steps_done = 0

    def begin(self, steps: int) -> None:
        self._steps_per_epoch = steps
        tensors = [(entry.name, packed(entry.tensor)) for entry in self._state()]
        hvd.broadcast_parameters(tensors, root_rank=0)
        scalars = self._step.scaler.state_dict(), self.rate()
        scaler, rate = collectives.broadcast(scalars, "scalars")
        self._step.scaler.load_state_dict(scaler)
        self._set_rate(rate)

    def begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def step(self, step: int, elements: Iterator[Element], stop: bool) -> Callable[[], StepResult]:
        self._set_rate(self._schedule(self._epoch + step / self._steps_per_epoch))
        result = self._step(elements, stop)
        self._steps_done = self._epoch * self._steps_per_epoch + step + 1
        every = self.recipe.run.replica_check_every
        if every and self._steps_done % every == 0:
            self._check()
        return result

    def end(self) -> None:
        if self.recipe.run.replica_check_every:
            self._check()

    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @torch.no_grad()
    def predict(self, images: np.ndarray) -> np.ndarray:
        self.network.eval()
        with self._step.autocast():
            return self.network(*device.on_device((images,))).numpy(force=True)

    @contextlib.contextmanager
    def statistics_of(self, elements: Iterator[Element]) -> Iterator[None]:
        moving = self._step.moving
        own_values = moving.clone()
        vectors = (self._statistics(*device.on_device(element)) for element in elements)
        mean = collectives.mean(vectors, len(moving), "precise_bn")
        moving.copy_(torch.from_numpy(mean))
        try:
            yield
        finally:
            moving.copy_(own_values)

    def arrays(self) -> Arrays:
        """Return "model/PATH" in Keras's layout, velocities free of η, η, and the loss scale."""
        arrays = {entry.checkpoint_name: _to_keras(entry.tensor) for entry in self._state()}
        if scaler := self._step.scaler.state_dict():
            arrays |= {name: np.array(scaler[key]) for name, key in LOSS_SCALE.items()}
        return arrays | {RATE: np.array(self.rate())}

    def weights(self) -> Arrays:
        return {
            _keras_name(name): _to_keras(p.detach()) for name, p in self.network.named_parameters()
        }

    def restore(self, arrays: Arrays) -> None:
        check_structure({name: array.shape for name, array in self.arrays().items()}, arrays)
        for entry in self._state():
            array = from_keras(arrays[entry.checkpoint_name])
            entry.tensor.copy_(torch.from_numpy(array.copy()))
        scaler = self._step.scaler.state_dict()
        scaler |= {key: arrays[name].item() for name, key in LOSS_SCALE.items() if name in arrays}
        self._step.scaler.load_state_dict(scaler)
        self._set_rate(arrays[RATE].item())

    @torch.no_grad()
    def _statistics(
        self, images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, *keys: torch.Tensor
    ) -> np.ndarray:
        """Return what batch normalisation sees in one element."""
        self.network.train()
        with self._step.autocast():
            self.network(images, *keys)
        return batch_statistics(self.network).numpy(force=True)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _check(self) -> None:
        named = ((entry.name, entry.tensor) for entry in self._state())
        collectives.check_equal(named, self._steps_done)

    def _state(self) -> list[StateTensor]:
        """Return all that training changes, but for η and the loss scale."""
        entries = []
        for name, tensor in self.network.state_dict().items():
            if path := keras_path(name):
                entries.append(StateTensor(name, f"model/{path}", tensor))
        for name, parameter in self.network.named_parameters():
            if parameter in self.optimizer.state:
                velocity = self.optimizer.state[parameter]["momentum_buffer"]
                checkpoint_name = f"optimizer/velocity/{keras_path(name)}"
                entries.append(StateTensor(f"{name}.velocity", checkpoint_name, velocity))
        return entries


def sgd(recipe: Recipe, network: torch.nn.Module) -> torch.optim.SGD:
    """Return SGD with weight decay λw, part of the gradient, on the kernels only (remark 1).

    Its velocity u ← mu + g is free of η (paper, eq. 9), so that no change of η needs a correction
    (remark 2).
    """
    settings = recipe.optimizer
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    decayed: dict[str, Any] = {"params": kernels, "weight_decay": settings.weight_decay}
    groups = [decayed, {"params": others}]
    return torch.optim.SGD(
        groups,
        lr=settings.base_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        fused=True,  # one kernel for all parameters, or few
    )


def _optimizer(recipe: Recipe, network: torch.nn.Module) -> torch.optim.SGD:
    """Return `sgd` with velocities of zero, so that they can be broadcast and restored."""
    optimizer = sgd(recipe, network)
    if recipe.optimizer.momentum:
        for p in network.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _keras_name(name: str) -> str:
    """Return the Keras path of a parameter, which always has one."""
    path = keras_path(name)
    assert path is not None
    return path


def _to_keras(tensor: torch.Tensor) -> np.ndarray:
    return to_keras(tensor.numpy(force=True)).copy()
