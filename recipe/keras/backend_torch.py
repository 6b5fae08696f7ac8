"""What Horovod does to gradients and variables under Keras's PyTorch backend."""

import itertools
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from recipe.torch import device

Compression = hvd.Compression
DEVICES = False  # a tensor is reduced where it lies
on_device = device.on_device
use_local_device = device.use_local_device


def reduce(gradients: list, variables: list, groups: list[list[int]], how: Any) -> list:
    """The gradients (tensors or None) at the places in `groups`, reduced over the ranks as `how`, a Reduction, says;
    the others as they are.

    All start before the first is waited for, so that Horovod fuses them. Keras hands the gradients over when backprop
    is done, so here they don't overlap with it. A rank that lacks a gradient sends zeros, since the others may have
    it (a layer that only some ranks' examples reach) and would wait for ever; None comes back when no rank has it."""
    places = list(itertools.chain(*groups))
    have = torch.tensor([gradients[i] is not None for i in places], dtype=torch.int32)
    have = hvd.allreduce_async_(have, op=hvd.Max, name=f"{how.wire_name}.present", process_set=how.process_set)
    started = []
    for group in groups:
        filled = [torch.zeros_like(variables[i].value) if gradients[i] is None else gradients[i] for i in group]
        started.append(_start([dense(g) for g in filled], f"{how.wire_name}.{group[0]}", how))
    present = dict(zip(places, hvd.synchronize(have).tolist(), strict=True))
    reduced = list(gradients)
    for group, (handle, contexts) in zip(groups, started, strict=True):
        results = hvd.synchronize(handle)
        results = results if isinstance(results, (list, tuple)) else [results]
        for i, result, context in zip(group, results, contexts, strict=True):
            reduced[i] = how.compression.decompress(result, context) if present[i] else None
    return reduced


def _start(tensors: list[torch.Tensor], name: str, how: Any) -> tuple:
    wires, contexts = zip(*(how.compression.compress(t.contiguous()) for t in tensors), strict=True)
    options = {
        "name": name,
        "op": how.op,
        "prescale_factor": 1 / how.predivide,
        "postscale_factor": how.predivide,
        "process_set": how.process_set,
    }
    if len(wires) > 1:
        return hvd.grouped_allreduce_async_(list(wires), **options), contexts
    return hvd.allreduce_async_(wires[0], **options), contexts


def dense(gradient: Any) -> Any:
    """A sparse gradient as a dense one, its repeated rows added up; anything else as it is."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def divided_by_size(gradient: torch.Tensor, process_set: Any) -> torch.Tensor:
    """The gradient divided by the number of ranks in the set."""
    return gradient / process_set.size()


def total(tensor: torch.Tensor, name: str, process_set: Any = hvd.global_process_set) -> torch.Tensor:
    """The sum of a tensor over all ranks; differentiable: its gradient is the sum of all ranks' gradients."""
    if tensor.device.type == "meta":  # Keras infers shapes
        return tensor.clone()
    return _Total.apply(tensor, name, process_set)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, name: str, process_set: Any) -> torch.Tensor:
        ctx.name, ctx.process_set = name, process_set
        return hvd.allreduce(tensor.contiguous(), op=hvd.Sum, name=name, process_set=process_set)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        name = f"{ctx.name}.gradient"
        return (
            hvd.allreduce(gradient.contiguous(), op=hvd.Sum, name=name, process_set=ctx.process_set),
            None,
            None,
        )


def broadcast(variables: list, root_rank: int, name: str) -> None:
    """Rank root_rank's values in floating-point Keras variables, on all ranks."""
    handles = [hvd.broadcast_async_(v.value.data, root_rank, name=f"{name}.{i}") for i, v in enumerate(variables)]
    for handle in handles:
        hvd.synchronize(handle)


def compiled(function: Callable, signature: list[tuple]) -> Callable:
    """The function as it is: PyTorch runs eagerly."""
    return function


def gradients(forward: Callable[[], tuple], variables: list) -> tuple[list, tuple]:
    """forward() gives (loss, anything else): (the loss's gradients, what else there was, detached)."""
    loss, *found = forward()
    taken = torch.autograd.grad(loss, [v.value for v in variables], allow_unused=True)
    return list(taken), [f.detach() for f in found]


def random_state() -> np.ndarray:
    """The states of PyTorch's generators, the CPU's and the GPU's: Keras's layers without a seed draw from them."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    return torch.cat(states).numpy()


def set_random_state(state: np.ndarray) -> None:
    """The inverse of `random_state`; a GPU's part needs a GPU."""
    states, cpu = torch.from_numpy(state), torch.get_rng_state().numel()
    torch.set_rng_state(states[:cpu])
    if torch.cuda.is_available() and len(states) > cpu:
        torch.cuda.set_rng_state(states[cpu:])
