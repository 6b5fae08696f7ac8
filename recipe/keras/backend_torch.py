"""What Horovod does to gradients and variables under Keras's PyTorch backend."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import keras
import numpy as np
import torch

from recipe.keras import recording

Compression = hvd.Compression
DEVICES = False  # a tensor is reduced where it lies
WORD_ALONE = False  # an agreement's word is part of a vector that goes with the gradients


def reduce(
    gradients: list,
    variables: list,
    groups: list[list[int]],
    how: Any,
    word: torch.Tensor | None = None,
) -> tuple[list, torch.Tensor | None]:
    """Returns the gradients (tensors or None) at the places in `groups`, reduced over the ranks as `how`, a Reduction,
    says, the others as they are; and the sum of all ranks' `word`, a vector that goes with them.

    All start before the first is waited for, so that Horovod fuses them. Keras hands the gradients over when backprop
    is done, so here they don't overlap with it. A rank that lacks a gradient sends zeros, since the others may have
    it (a layer that only some ranks' examples reach) and would wait for ever; None comes back when no rank has it."""
    places = list(itertools.chain(*groups))
    have = torch.tensor([gradients[i] is not None for i in places], dtype=torch.float32)
    told = have if word is None else torch.cat([have, word.to(have.device)])
    told = hvd.allreduce_async_(
        told, op=hvd.Sum, name=f"{how.wire_name}.present", process_set=how.process_set
    )
    started = []
    for group in groups:
        filled = [
            torch.zeros_like(variables[i].value) if gradients[i] is None else gradients[i]
            for i in group
        ]
        started.append(_start([dense(g) for g in filled], f"{how.wire_name}.{group[0]}", how))
    told = hvd.synchronize(told)
    present = dict(zip(places, told[: len(places)].tolist(), strict=True))
    reduced = list(gradients)
    for group, (handle, contexts) in zip(groups, started, strict=True):
        results = hvd.synchronize(handle)
        results = results if isinstance(results, (list, tuple)) else [results]
        for i, result, context in zip(group, results, contexts, strict=True):
            reduced[i] = how.compression.decompress(result, context) if present[i] else None
    return reduced, None if word is None else told[len(places) :]


def spoken(word: torch.Tensor, how: Any, gradients: Sequence = ()) -> torch.Tensor:
    """The sum of all ranks' `word`, alone. `how`, a Reduction, names it."""
    how.give_name()
    return hvd.allreduce(word.contiguous(), op=hvd.Sum, name=f"{how.wire_name}.word")


def after(tensor: torch.Tensor | None) -> contextlib.AbstractContextManager:
    """Nothing: PyTorch's operations run one after another."""
    return contextlib.nullcontext()


def divided(gradients: list, by: torch.Tensor) -> list:
    """The gradients (tensors or None) divided by a number."""
    share = float(by)
    return gradients if share == 1.0 else [None if g is None else g / share for g in gradients]


def kind(gradient: Any) -> str:
    """ "none", "sparse" or "dense"."""
    if gradient is None:
        return "none"
    return "sparse" if gradient.is_sparse else "dense"


def nothing(variable: Any, kind: str) -> torch.Tensor | None:
    """The gradient of no examples, dense: so a sparse one is reduced."""
    return None if kind == "none" else torch.zeros_like(variable.value.data)


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


def zeros(shape: tuple, dtype: str) -> torch.Tensor:
    """Zeros to take part with in another rank's sum."""
    return keras.ops.zeros(shape, dtype)


def dense(gradient: Any) -> Any:
    """A sparse gradient as a dense one, its repeated rows added up; anything else as it is."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def divided_by_size(gradient: torch.Tensor, process_set: Any) -> torch.Tensor:
    """The gradient divided by the number of ranks in the set."""
    return gradient / process_set.size()


def total(
    tensor: torch.Tensor, name: str, process_set: Any = hvd.global_process_set
) -> torch.Tensor:
    """The sum of a tensor over all ranks; differentiable: its gradient is the sum of all ranks' gradients."""
    if tensor.device.type == "meta":  # Keras infers shapes
        return tensor.clone()
    return _Total.apply(tensor, name, process_set)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, name: str, process_set: Any) -> torch.Tensor:
        ctx.name, ctx.process_set = name, process_set
        return _summed(tensor, name, process_set)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return _summed(gradient, f"{ctx.name}.gradient", ctx.process_set), None, None


def _summed(tensor: torch.Tensor, name: str, process_set: Any) -> torch.Tensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    recording.note(recording.Total(name, tuple(tensor.shape), dtype, process_set))
    return hvd.allreduce(tensor.contiguous(), op=hvd.Sum, name=name, process_set=process_set)


def broadcast(variables: list, root_rank: int, name: str) -> None:
    """Rank root_rank's values in floating-point Keras variables, on all ranks."""
    handles = [
        hvd.broadcast_async_(v.value.data, root_rank, name=f"{name}.{i}")
        for i, v in enumerate(variables)
    ]
    for handle in handles:
        hvd.synchronize(handle)


def without_gradients() -> contextlib.AbstractContextManager:
    """A context for updates outside of a step."""
    return torch.no_grad()


def strategy() -> str:
    """What Keras averages gradients with, from 3.16 on wherever PyTorch has a process group; empty: nothing."""
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if has_group and hasattr(keras.Model, "_initialize_ddp"):
        return "Keras's DistributedDataParallel (torch.distributed is initialised)"
    return ""


def prepare(train_function: Callable, batch: Any) -> None:
    """Nothing: with PyTorch Keras builds a model before its first step."""


def gathered_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """All ranks' bytes, uint8 of one length, one after another. Collective."""
    return hvd.allgather(torch.from_numpy(values.copy()), name=name).numpy()


def compiled(function: Callable, signature: list[tuple]) -> Callable:
    """The function as it is: PyTorch runs eagerly."""
    return function


def random_state() -> np.ndarray:
    """The states of PyTorch's generators, the CPU's and the GPU's: Keras's layers without a seed draw from them."""
    states = [
        torch.get_rng_state(),
        *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else []),
    ]
    return torch.cat(states).numpy()


def set_random_state(state: np.ndarray) -> None:
    """The inverse of `random_state`; a GPU's part needs a GPU."""
    states, cpu = torch.from_numpy(state), torch.get_rng_state().numel()
    torch.set_rng_state(states[:cpu])
    if torch.cuda.is_available() and len(states) > cpu:
        torch.cuda.set_rng_state(states[cpu:])
