"""What Horovod does to gradients and variables under Keras's PyTorch backend."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import horovod.torch as hvd
import keras
import numpy as np
import torch
from horovod.common.process_sets import ProcessSet

from recipe.keras import recording
from recipe.keras.overlap import Overlap, take_over
from recipe.keras.tensors import Gradient, Reduced

if TYPE_CHECKING:
    from recipe.keras.reduction import Reduction

__all__ = ["take_over"]

Compression = hvd.Compression
OVERLAP_GROUPS = 5  # enough to begin early, and few enough calls of Horovod
DEVICES = False  # a tensor is reduced where it lies
WORD_ALONE = False  # an agreement's word is part of a vector that goes with the gradients


class _Started(NamedTuple):
    """An allreduce that has begun."""

    places: list[int]  # of the gradients in it
    handle: int  # Horovod's
    contexts: Sequence[Any]  # what decompression needs, for each gradient


def reduce(
    gradients: list[Gradient],
    variables: list[keras.Variable],
    groups: list[list[int]],
    reduction: "Reduction",
    word: torch.Tensor | None = None,
) -> Reduced:
    """Reduce the gradients at the places in `groups` over the ranks, and keep the others.

    Keras hands the gradients over when backprop is done, so they don't overlap with it, unless the
    option says so. A rank that lacks a gradient sends zeros. The others may have it, where only
    some ranks' examples reach a layer, and would wait for ever. None comes back when no rank has
    it. Collective.
    """
    # Start all before the first is waited for, so that Horovod fuses them.
    places = [i for group in groups for i in group]
    message = torch.tensor([gradients[i] is not None for i in places], dtype=torch.float32)
    if word is not None:
        message = torch.cat([message, word.to(message.device)])
    handle = hvd.allreduce_async_(
        message,
        op=hvd.Sum,
        name=f"{reduction.wire_name}.present",
        process_set=reduction.process_set,
    )
    begun = _begun(gradients, variables, groups, reduction)
    started = [
        of_group or _start(gradients, variables, group, reduction)
        for of_group, group in zip(begun, groups, strict=True)
    ]

    # Find out which gradients some rank has.
    message = hvd.synchronize(handle)
    holders = dict(zip(places, message[: len(places)].tolist(), strict=True))
    summed_word = None if word is None else message[len(places) :]

    # Collect the results.
    reduced = list(gradients)
    for group in started:
        for place, result in zip(group.places, _results(group, reduction), strict=True):
            reduced[place] = result if holders[place] else None
    return Reduced(reduced, summed_word)


def _begun(
    gradients: list[Gradient],
    variables: list[keras.Variable],
    groups: list[list[int]],
    reduction: "Reduction",
) -> list[_Started | None]:
    """Return the reductions of the groups that hooks have begun beside backprop.

    The first step has none. It makes the hooks, when all that they depend on is known.
    """
    if reduction.overlap is None:
        if reduction.options.overlap:

            def start(made: Mapping[int, Gradient], group: list[int]) -> _Started:
                return _start(made, variables, group, reduction)

            reduction.overlap = Overlap(variables, groups, start)
        return [None] * len(groups)
    reduction.overlap.check(variables, groups)
    return [reduction.overlap.take(group, gradients) for group in groups]


def _start(
    gradients: Mapping[int, Gradient] | Sequence[Gradient],
    variables: list[keras.Variable],
    group: list[int],
    reduction: "Reduction",
) -> _Started:
    """Start the allreduce of one group of gradients."""
    # The settings of all its tensors.
    options = reduction.options
    arguments = {
        "name": f"{reduction.wire_name}.{group[0]}",
        "op": options.op,
        "prescale_factor": 1 / options.gradient_predivide_factor,
        "postscale_factor": options.gradient_predivide_factor,
        "process_set": options.process_set,
    }

    # A rank that lacks a gradient takes part with zeros.
    tensors, contexts = [], []
    for i in group:
        gradient = gradients[i]
        filled = torch.zeros_like(variables[i].value) if gradient is None else dense(gradient)
        tensor, context = options.compression.compress(filled.contiguous())
        tensors.append(tensor)
        contexts.append(context)

    # `reduce` waits for it, when all groups have been started.
    if len(tensors) > 1:
        handle = hvd.grouped_allreduce_async_(tensors, **arguments)
    else:
        handle = hvd.allreduce_async_(tensors[0], **arguments)
    return _Started(group, handle, contexts)


def _results(group: _Started, reduction: "Reduction") -> list[torch.Tensor]:
    """Wait for an allreduce, and return its gradients."""
    results = hvd.synchronize(group.handle)
    if not isinstance(results, (list, tuple)):
        results = [results]
    decompress = reduction.options.compression.decompress
    return [decompress(*pair) for pair in zip(results, group.contexts, strict=True)]


def sum_word(
    word: torch.Tensor, reduction: "Reduction", gradients: Sequence[Gradient] = ()
) -> torch.Tensor:
    """Return the sum of all ranks' `word`, which travels alone. Collective."""
    reduction.give_name()
    return hvd.allreduce(word.contiguous(), op=hvd.Sum, name=f"{reduction.wire_name}.word")


def after(tensor: torch.Tensor | None) -> contextlib.AbstractContextManager:
    """Return a context that does nothing: PyTorch's operations run one after another."""
    return contextlib.nullcontext()


def divided(gradients: list[Gradient], by: torch.Tensor) -> list[Gradient]:
    """Return the gradients divided by a number."""
    share = float(by)
    if share == 1.0:
        return gradients
    return [None if gradient is None else gradient / share for gradient in gradients]


def kind(gradient: Gradient) -> str:
    """Return "none", "sparse" or "dense"."""
    if gradient is None:
        return "none"
    return "sparse" if gradient.is_sparse else "dense"


def nothing(variable: keras.Variable, kind: str) -> Gradient:
    """Return the gradient of no examples: a dense one, as a sparse one is reduced so."""
    return None if kind == "none" else torch.zeros_like(variable.value.data)


def zeros(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Return zeros to take part with in another rank's sum."""
    return keras.ops.zeros(shape, dtype)


def dense(gradient: Gradient) -> Gradient:
    """Return a sparse gradient as a dense one, its repeated rows added up, any other as it is."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def divided_by_size(gradient: torch.Tensor, process_set: ProcessSet) -> torch.Tensor:
    """Return the gradient divided by the number of ranks in the set."""
    return gradient / process_set.size()


def total(
    tensor: torch.Tensor, name: str, process_set: ProcessSet = hvd.global_process_set
) -> torch.Tensor:
    """Return the sum of a tensor over all ranks. Collective.

    It is differentiable: its gradient is the sum of all ranks' gradients.
    """
    if tensor.device.type == "meta":  # Keras infers shapes
        return tensor.clone()
    return _Total.apply(tensor, name, process_set)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, name: str, process_set: ProcessSet) -> torch.Tensor:
        ctx.name, ctx.process_set = name, process_set
        return _summed(tensor, name, process_set)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _summed(gradient, f"{ctx.name}.gradient", ctx.process_set), None, None


def _summed(tensor: torch.Tensor, name: str, process_set: ProcessSet) -> torch.Tensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    recording.note(recording.Total(name, tuple(tensor.shape), dtype, process_set))
    return hvd.allreduce(tensor.contiguous(), op=hvd.Sum, name=name, process_set=process_set)


def broadcast(variables: list[keras.Variable], root_rank: int, name: str) -> None:
    """Give floating-point Keras variables rank root_rank's values. Collective."""
    handles = []
    for i, v in enumerate(variables):
        handles.append(hvd.broadcast_async_(v.value.data, root_rank, name=f"{name}.{i}"))
    for handle in handles:
        hvd.synchronize(handle)


def without_gradients() -> contextlib.AbstractContextManager:
    """Return a context for updates outside of a step."""
    return torch.no_grad()


def strategy() -> str:
    """Return what Keras averages gradients with, or nothing.

    From 3.16 on it does so wherever PyTorch has a process group.
    """
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if has_group and hasattr(keras.Model, "_initialize_ddp"):
        return "Keras's DistributedDataParallel (torch.distributed is initialised)"
    return ""


def prepare(train_function: Callable, batch: Any) -> None:
    """Do nothing: with PyTorch Keras builds a model before its first step."""


def gathered_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Return all ranks' bytes, uint8 of one length, one after another. Collective."""
    return hvd.allgather(torch.from_numpy(values.copy()), name=name).numpy()


def compiled(function: Callable, signature: list[tuple[str, tuple]]) -> Callable:
    """Return the function as it is: PyTorch runs eagerly."""
    return function


def array(variable: keras.Variable) -> torch.Tensor:
    """Return a variable's value where it lies, to compare with other ranks'."""
    return variable.value.data


def random_state() -> np.ndarray:
    """Return the states of PyTorch's generators, the CPU's and the GPU's.

    Keras's layers without a seed draw from them.
    """
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states).numpy()


def set_random_state(state: np.ndarray) -> None:
    """Restore what `random_state` returned. A GPU's part needs a GPU."""
    states = torch.from_numpy(state)
    cpu = torch.get_rng_state().numel()
    torch.set_rng_state(states[:cpu])
    if torch.cuda.is_available() and len(states) > cpu:
        torch.cuda.set_rng_state(states[cpu:])
