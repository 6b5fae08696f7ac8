"""One step of one rank in PyTorch: forward and backward, one round of allreduces, one update."""

from collections.abc import Callable, Iterator

import horovod.torch as hvd
import torch
from torch.nn import functional

from recipe.config import Recipe
from recipe.data.element import Element
from recipe.frameworks.replica import first_loss_scale
from recipe.frameworks.torch.device import when_done
from recipe.frameworks.torch.input import Input
from recipe.frameworks.torch.normalization import batch_statistics, moving_statistics
from recipe.frameworks.torch.reduction import Reduction
from recipe.frameworks.torch.regions import compile_regions
from recipe.frameworks.torch.resnet import ResNet
from recipe.frameworks.vector import StepResult, StepVector
from recipe.rules.epoch import Share

AUTOCAST = {"float32": None, "mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}


class Step:
    """The step of a rank.

    Gradients add up over its forward passes, and are reduced while the last one's backward pass is
    still running. Then the optimizer updates.

    A StepVector goes with the gradients. Its statistics are the batches' own, summed over the
    workers. The moving ones move by their mean over all k, so that they are equal on all ranks at
    any time.
    """

    def __init__(
        self, network: ResNet, optimizer: torch.optim.Optimizer, recipe: Recipe, share: Share
    ) -> None:
        """Take the network and its optimizer, and this rank's share of the k workers."""
        self.network, self.optimizer = network, optimizer
        self.k, self.share = recipe.k, share
        self.moving, self._momentum = moving_statistics(network), recipe.model.bn_momentum
        self._device, self._dtype = self.moving.device, AUTOCAST[recipe.model.precision]
        self._input = Input()
        # The scale grows as Keras's does. A disabled scaler does nothing.
        scale = first_loss_scale(recipe)
        enabled = scale is not None
        self.scaler = torch.amp.GradScaler(self._device.type, scale or 1.0, enabled=enabled)
        if recipe.run.compile:
            compile_regions(network)
        # What all ranks' gradients are divided by: their passes, where every rank has as many.
        self._mean_passes = self.k / (hvd.size() * share.workers_at_once)
        half = recipe.optimizer.compression == "fp16"
        self.reduction = Reduction(network.parameters(), half)
        self.layout = StepVector(len(self.moving), self.k)
        self.vector = torch.zeros(self.layout.length, device=self._device)

    def __call__(self, elements: Iterator[Element], stop: bool) -> Callable[[], StepResult]:
        """Draw this rank's elements and update. Collective.

        The function that comes back waits for the step and returns its result.
        """
        # Forward and backward. The last pass reduces the gradients meanwhile.
        self.network.train()
        self.vector.zero_()
        for i in range(self.share.passes):
            if i == self.share.passes - 1:
                self.reduction.expect()
            self.backward(self.share.workers_of(i)[0], *self._input.take(elements))
            if i < self.share.passes - 1:
                self._input.look_ahead(elements)

        # Reduce the vector while the optimizer waits for the gradients and applies them.
        self.vector[self.layout.stop] = stop
        reduced_vector = self._start_reduction()
        self._update()

        # All ranks have the same statistics from here on.
        vector = reduced_vector()
        statistics = vector[self.layout.statistics]
        self.moving.lerp_(statistics / self.k, 1 - self._momentum)
        values = when_done(vector[self.layout.result])
        self._input.look_ahead(elements)
        return lambda: self.layout.read(values())

    def autocast(self) -> torch.autocast:
        """Return a context of the recipe's precision."""
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)

    def _start_reduction(self) -> Callable[[], torch.Tensor]:
        """Begin the vector's sum over the ranks, and return a function that waits for it."""
        if hvd.size() == 1:  # else it would wait for Horovod's next cycle
            return lambda: self.vector
        handle = hvd.allreduce_async_(self.vector, op=hvd.Sum, name="workers")
        return lambda: hvd.synchronize(handle)

    def backward(
        self,
        first_worker: int,
        images: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        *keys: torch.Tensor,
    ) -> None:
        """Add the gradients of one pass's workers, and their part of the vector."""
        with self.autocast():
            logits = self.network(images, *keys)
        losses = functional.cross_entropy(logits, labels.long(), reduction="none")
        # The paper's remark 3: the mean is over all kn examples. Weight decay (remark 1) is the
        # optimizer's.
        self.scaler.scale((losses * weights).mean() / self._mean_passes).backward()

        with torch.no_grad():
            together = self.share.workers_at_once
            self.vector[self.layout.statistics] += batch_statistics(self.network) * together
            hits = logits.argmax(1) == labels
            losses_of_pass = self.layout.losses_of(first_worker, together)
            hits_of_pass = self.layout.hits_of(first_worker, together)
            self.vector[losses_of_pass] = losses.reshape(together, -1).sum(1)
            self.vector[hits_of_pass] = hits.reshape(together, -1).sum(1)

    def _update(self) -> None:
        """Wait for the mean gradients and apply them, or skip those that overflow, on all ranks.

        Ranks that test before they reduce would disagree, and wait for each other.
        """
        self.reduction.finish()
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
