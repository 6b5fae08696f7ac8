"""The mean of all ranks' gradients in PyTorch: groups, reduced while backprop makes the next."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import horovod.torch as hvd
import torch

from recipe.frameworks.torch.wire import packed

BUCKETS = 5  # enough to begin early, and few enough calls of Horovod
LARGEST = 2**25  # bytes


@dataclass
class Bucket:
    """Parameters whose gradients are reduced together, in one collective."""

    name: str
    parameters: list[torch.nn.Parameter]
    half: bool  # the gradients travel as float16
    missing: int = 0  # gradients of the last pass that are still to come; 0: none is awaited
    handle: int | None = None  # of the reduction that is under way

    def expect(self) -> None:
        """Wait for all gradients of the pass that comes."""
        self.missing = len(self.parameters)

    def count(self, parameter: torch.nn.Parameter) -> None:
        """Take note of a gradient, and start the reduction when it is the last."""
        if not self.missing:
            return
        self.missing -= 1
        if not self.missing:
            wires = [gradient.half() if self.half else gradient for gradient in self._gradients()]
            self.handle = hvd.grouped_allreduce_async_(wires, op=hvd.Average, name=self.name)

    def finish(self) -> None:
        """Wait for the reduction. The parameters then have the mean gradients."""
        wires = hvd.synchronize(self.handle)
        self.handle = None
        if self.half:
            for gradient, wire in zip(self._gradients(), wires, strict=True):
                gradient.copy_(wire)

    def _gradients(self) -> list[torch.Tensor]:
        return [packed(p.grad) for p in self.parameters if p.grad is not None]


class Reduction:
    """The reduction of parameters' gradients over the ranks, by hooks.

    Horovod's own optimizer calls a collective for each parameter, and its Python takes longer.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], half: bool) -> None:
        """Hang hooks on the parameters; on one rank none, as there is nothing to reduce."""
        self.buckets: list[Bucket] = []
        if hvd.size() == 1:
            return
        in_backprop = list(parameters)[::-1]  # about its order
        for number, members in enumerate(divided(in_backprop)):
            bucket = Bucket(f"gradients.{number}", members, half)
            self.buckets.append(bucket)
            for parameter in members:
                parameter.register_post_accumulate_grad_hook(partial(Bucket.count, bucket))

    def expect(self) -> None:
        """Reduce in the backward pass that comes: it is the last of this step."""
        for bucket in self.buckets:
            bucket.expect()

    def finish(self) -> None:
        """Wait until all parameters have the mean gradients. Collective."""
        for bucket in self.buckets:
            bucket.finish()


def divided(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Divide parameters into buckets of about the same size, in their order."""
    total = sum(p.nbytes for p in parameters)
    limit = min(total / BUCKETS, LARGEST)
    buckets: list[list[torch.nn.Parameter]] = [[]]
    for parameter in parameters:
        if buckets[-1] and sum(p.nbytes for p in buckets[-1]) + parameter.nbytes / 2 > limit:
            buckets.append([])
        buckets[-1].append(parameter)
    return buckets
