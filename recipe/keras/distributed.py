"""`DistributedOptimizer` for Keras 3: any Keras optimizer, applied to the gradient averaged over all ranks."""

import functools
import itertools
from typing import Any

import keras

from recipe.keras.backend import Compression, average

_instances = itertools.count()  # gradient names must differ between the optimizers of a process, and agree over ranks


class _Distributed:
    """Mixed into the class of a wrapped optimizer; `apply` is the one method that every trainer of Keras 3 calls."""

    _hvd_name: str
    _hvd_compression: type

    def apply(self, grads: list, trainable_variables: list | None = None) -> None:
        super().apply(average(list(grads), self._hvd_name, self._hvd_compression), trainable_variables)


def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer, *, compression: type = Compression.none
) -> keras.optimizers.Optimizer:
    """Makes `optimizer` average each gradient over all ranks before it uses it, and returns it.

    The same object comes back, with its state: only its class gains a method. So clipping, weight decay and moving
    averages of the optimizer act on the averaged gradient, and a model saved with it loads without this package.

    Under the global policy "mixed_float16" a LossScaleOptimizer is put around the optimizer first, as
    `Model.compile` would do: ranks must average the scaled gradients *before* they are tested for overflow, or they
    would disagree about skipping the step and wait for each other for ever.

    `compression` is `Compression.none` or `Compression.fp16`: how gradients travel.
    Raises ValueError for anything that is not a Keras optimizer or already is distributed.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(f"DistributedOptimizer wraps a keras.optimizers.Optimizer, not {optimizer!r}")
    if is_distributed(optimizer) or is_distributed(getattr(optimizer, "inner_optimizer", None)):
        raise ValueError(f"{optimizer.name} is a DistributedOptimizer already; wrap it once, outermost")
    loss_scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if keras.config.dtype_policy().name == "mixed_float16" and not loss_scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer._hvd_name = f"gradient.{next(_instances)}"
    optimizer._hvd_compression = compression
    optimizer.__class__ = _distributed_class(type(optimizer))
    return optimizer


def is_distributed(optimizer: Any) -> bool:
    """Whether `optimizer` came out of DistributedOptimizer."""
    return isinstance(optimizer, _Distributed)


@functools.cache
def _distributed_class(wrapped: type) -> type:
    """A subclass that goes by the wrapped class's name, since Keras writes that name into saved models."""
    names = {
        "__module__": wrapped.__module__,
        "__qualname__": wrapped.__qualname__,
        "__doc__": wrapped.__doc__,
    }
    return type(wrapped.__name__, (_Distributed, wrapped), names)
