"""One step of one rank: forward and backward of each of its workers, one round of allreduces, one update."""

from collections.abc import Callable, Iterator

import horovod.torch as hvd
import torch
from torch.nn import functional

from recipe.config import Recipe
from recipe.frameworks.replica import Figures, figures
from recipe.frameworks.torch.device import on_device
from recipe.frameworks.torch.normalization import batch_statistics, moving_statistics
from recipe.frameworks.torch.resnet import ResNet

AUTOCAST = {"float32": None, "mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}


class Step:
    """Gradients add up over this rank's workers, `run.workers_at_once` of them in one forward pass; Horovod's hooks
    reduce them while the last backward pass is still running. Then the optimizer updates.

    With the gradients goes one vector: the workers' batch statistics, by whose mean over all k the moving ones move, so
    that they are equal on all ranks at any time; and the workers' losses and hits, one place each, which so are the
    same numbers whatever the number of ranks."""

    def __init__(
        self, network: ResNet, optimizer: torch.optim.Optimizer, recipe: Recipe, workers: range
    ) -> None:
        """`workers`: the numbers of this rank's. `optimizer`: Horovod's, for as many backward passes as there are."""
        self.network, self.optimizer, self.k, self.together = (
            network,
            optimizer,
            recipe.k,
            recipe.run.workers_at_once,
        )
        self.moving, self._momentum = moving_statistics(network), recipe.model.bn_momentum
        self._device, self._dtype = self.moving.device, AUTOCAST[recipe.model.precision]
        # The scale begins and grows as Keras's does; without float16 the scaler does nothing.
        enabled = self._dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self._device.type, init_scale=2.0**15, enabled=enabled)
        self._forward = torch.compile(network) if recipe.run.compile else network
        self._firsts = workers[:: self.together]
        self._share = self.k / (hvd.size() * self.together)  # passes, where all ranks have as many
        self._vector = torch.zeros(len(self.moving) + 2 * self.k + 1, device=self._device)

    def __call__(self, elements: Iterator[tuple], stop: bool) -> Callable[[], Figures]:
        """Draws this rank's elements and updates. Collective. Returns what `recipe.frameworks.replica.Replica.step` does."""
        self.network.train()
        self._vector.zero_()
        for first in self._firsts:
            self._backward(first, *on_device(next(elements)))
        self._vector[-1] = stop
        reduced = self._reduced()
        self._update()
        moved, found = reduced().split([len(self.moving), 2 * self.k + 1])
        self.moving.lerp_(moved / self.k, 1 - self._momentum)
        found = found.clone()  # the vector is the next step's
        return lambda: figures(found.numpy(force=True), self.k)

    def _reduced(self) -> Callable[[], torch.Tensor]:
        """Begins the vector's sum over the ranks; what it returns waits for it."""
        if hvd.size() == 1:  # else it would wait for Horovod's next cycle
            return lambda: self._vector
        handle = hvd.allreduce_async_(self._vector, op=hvd.Sum, name="workers")
        return lambda: hvd.synchronize(handle)

    def autocast(self) -> torch.autocast:
        """A context of the recipe's precision."""
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)

    def _backward(
        self,
        first: int,
        images: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        *keys: torch.Tensor,
    ) -> None:
        """Adds the gradients of `together` workers, of which `first` is the first, and their part of the vector."""
        with self.autocast():
            logits = self._forward(images, *keys)
        losses = functional.cross_entropy(logits, labels.long(), reduction="none")
        # The paper's remark 3: the mean is over all kn examples. Weight decay (remark 1) is the optimizer's.
        self.scaler.scale((losses * weights).mean() / self._share).backward()
        with torch.no_grad():
            self._vector[: len(self.moving)] += batch_statistics(self.network) * self.together
            for values, place in ((losses, first), (logits.argmax(1) == labels, self.k + first)):
                place += len(self.moving)
                self._vector[place : place + self.together] = values.reshape(self.together, -1).sum(
                    1
                )

    def _update(self) -> None:
        """Waits for the mean gradients and applies them, or on all ranks skips those that overflow: ranks that test
        before they reduce would disagree, and wait for each other."""
        self.optimizer.synchronize()
        self.scaler.unscale_(self.optimizer)
        with self.optimizer.skip_synchronize():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
