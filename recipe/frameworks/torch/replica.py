"""The recipe's replica in native PyTorch: the network, Horovod's optimizer and the state of both."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from recipe.config import Recipe
from recipe.frameworks.replica import Figures
from recipe.frameworks.torch import device, resnet
from recipe.frameworks.torch import weights as names
from recipe.frameworks.torch.normalization import batch_statistics
from recipe.frameworks.torch.step import Step
from recipe.frameworks.torch.wire import PackedCompression, packed
from recipe.ranks import binding, collectives
from recipe.rules import sharding
from recipe.rules.schedule import recipe_rate
from recipe.system.arrays import check_structure, groups

# Names in a checkpoint: of η, and of entries in the scaler's state dict.
RATE = "optimizer/rate"
LOSS_SCALE = {"optimizer/loss_scale": "scale", "optimizer/finite_steps": "_growth_tracker"}


def start(deterministic: bool = False) -> None:
    """Horovod, and this rank's share of the machine: one GPU, or its part of the CPU's cores."""
    device.use_local_device(*binding.start("torch", deterministic), deterministic)


class TorchReplica:
    """`recipe.frameworks.replica.Replica` in native PyTorch."""

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self.recipe = recipe
        self.network = resnet.build(recipe, num_classes).to(device.local_device())
        workers = sharding.own_workers(recipe.k, collectives.rank(), collectives.size())
        passes = max(
            1, len(workers) // recipe.run.workers_at_once
        )  # an evaluation may have ranks without workers
        self.optimizer = _optimizer(recipe, self.network, passes)
        self._step = Step(self.network, self.optimizer, recipe, workers)
        self._schedule = recipe_rate(recipe)
        self._done = 0  # steps, for messages

    def begin(self, steps: int) -> None:
        self._steps = steps
        hvd.broadcast_parameters(
            [(name, packed(v)) for name, v in self._state().items()], root_rank=0
        )
        scale, rate = collectives.broadcast(
            (self._step.scaler.state_dict(), self.rate()), "scalars"
        )
        self._step.scaler.load_state_dict(scale)
        self._set_rate(rate)

    def step(
        self, epoch: int, step: int, elements: Iterator[tuple], stop: bool
    ) -> Callable[[], Figures]:
        self._set_rate(self._schedule(epoch + step / self._steps))
        figures = self._step(elements, stop)
        self._done, every = epoch * self._steps + step + 1, self.recipe.run.replica_check_every
        if every and self._done % every == 0:
            self._check()
        return figures

    def end(self) -> None:
        if self.recipe.run.replica_check_every:
            self._check()

    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @torch.no_grad()
    def predict(self, images: Any) -> np.ndarray:
        self.network.eval()
        with self._step.autocast():
            return self.network(*device.on_device((images,))).numpy(force=True)

    @contextlib.contextmanager
    def statistics_of(self, elements: Iterator[tuple]) -> Iterator[None]:
        moving = self._step.moving
        kept = moving.clone()
        found = (self._statistics(*device.on_device(e)) for e in elements)
        moving.copy_(torch.from_numpy(collectives.mean(found, len(moving), "precise_bn")))
        try:
            yield
        finally:
            moving.copy_(kept)

    def arrays(self) -> dict[str, np.ndarray]:
        """ "model/PATH" in Keras's layout, as in a Keras checkpoint; velocities free of η; η; the loss scale."""
        scaler = self._step.scaler.state_dict()
        scalars = {name: np.array(scaler[key]) for name, key in LOSS_SCALE.items() if scaler}
        return (
            {name: _to_keras(v) for name, v in self._named().items()}
            | scalars
            | {RATE: np.array(self.rate())}
        )

    def weights(self) -> dict[str, np.ndarray]:
        return {
            names.keras_path(name): _to_keras(p.detach())
            for name, p in self.network.named_parameters()
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        check_structure({name: array.shape for name, array in self.arrays().items()}, arrays)
        for name, tensor in self._named().items():
            tensor.copy_(torch.from_numpy(names.from_keras(arrays[name]).copy()))
        scaler = self._step.scaler
        found = {key: arrays[name].item() for name, key in LOSS_SCALE.items() if name in arrays}
        scaler.load_state_dict(scaler.state_dict() | found)
        self._set_rate(arrays[RATE].item())

    @torch.no_grad()
    def _statistics(
        self, images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, *keys: torch.Tensor
    ) -> np.ndarray:
        """What batch normalisation sees in one element."""
        self.network.train()
        with self._step.autocast():
            self.network(images, *keys)
        return batch_statistics(self.network).numpy(force=True)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _check(self) -> None:
        collectives.check_equal(
            ((name, v.numpy(force=True)) for name, v in self._state().items()), self._done
        )

    def _state(self) -> dict[str, torch.Tensor]:
        """All that training changes, but for the loss scale: the state dict and the velocities."""
        kept = {name: v for name, v in self.network.state_dict().items() if names.keras_path(name)}
        return kept | {f"{name}.velocity": v for name, v in self._velocities().items()}

    def _named(self) -> dict[str, torch.Tensor]:
        """The same by the checkpoint's names."""
        kept = {
            f"model/{path}": v
            for name, v in self.network.state_dict().items()
            if (path := names.keras_path(name))
        }
        slots = {
            f"optimizer/velocity/{names.keras_path(name)}": v
            for name, v in self._velocities().items()
        }
        return kept | slots

    def _velocities(self) -> dict[str, torch.Tensor]:
        slots = self.optimizer.state
        return {
            name: slots[p]["momentum_buffer"]
            for name, p in self.network.named_parameters()
            if p in slots
        }


make_replica = TorchReplica


def sgd(recipe: Recipe, network: torch.nn.Module) -> torch.optim.SGD:
    """SGD with weight decay λw, part of the gradient, on the kernels only (remark 1).

    Its velocity u ← mu + g is free of η (paper, eq. 9), so that no change of η needs a correction (remark 2)."""
    settings = recipe.optimizer
    kernels, others = [], []
    for p in network.parameters():
        (kernels if p.ndim > 1 else others).append(p)
    groups = [{"params": kernels, "weight_decay": settings.weight_decay}, {"params": others}]
    return torch.optim.SGD(
        groups, lr=settings.base_rate, momentum=settings.momentum, nesterov=settings.nesterov
    )


def _optimizer(recipe: Recipe, network: resnet.ResNet, passes: int) -> torch.optim.Optimizer:
    """Horovod's optimizer around `sgd`, for so many backward passes per step; its velocities are there already."""
    optimizer = hvd.DistributedOptimizer(
        sgd(recipe, network),
        named_parameters=network.named_parameters(),
        compression=PackedCompression(getattr(hvd.Compression, recipe.optimizer.compression)),
        backward_passes_per_step=passes,
        groups=groups(recipe, sum(p.numel() for p in network.parameters())),
    )
    if recipe.optimizer.momentum:
        for p in (
            network.parameters()
        ):  # before the first step, so that it can be broadcast and restored
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _to_keras(tensor: torch.Tensor) -> np.ndarray:
    return names.to_keras(tensor.numpy(force=True)).copy()
