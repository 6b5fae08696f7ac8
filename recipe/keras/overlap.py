"""Gradients that are reduced while backprop makes the next, with PyTorch: `overlap=True`."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import keras
import torch

from recipe.errors import RunError
from recipe.keras.tensors import Gradient

S = TypeVar("S")  # a reduction that has begun

Start = Callable[[Mapping[int, Gradient], list[int]], S]  # begins that of a group of places


class _Made(NamedTuple):
    """A gradient as backprop left it."""

    gradient: torch.Tensor
    version: int  # PyTorch counts the changes of a tensor


@dataclass
class _Bucket(Generic[S]):
    """What is known of a group in this step."""

    made: dict[int, _Made] = field(default_factory=dict)  # by place
    started: S | None = None


class Overlap(Generic[S]):
    """Hooks of an optimizer's variables: a group's last gradient begins the group's reduction.

    Raise RunError where that would lose gradients. A variable has hooks of one optimizer at most.
    """

    def __init__(
        self, variables: Sequence[keras.Variable], groups: list[list[int]], start: Start[S]
    ) -> None:
        """Hang hooks on the variables at the places in `groups`."""
        self.variables, self.groups, self._start = list(variables), groups, start
        self.forget()
        self._hooks = [
            _parameter(variables[place]).register_post_accumulate_grad_hook(
                partial(self._note, group, place)
            )
            for group in groups
            for place in group
        ]
        _live.add(self)

    def forget(self) -> None:
        """Drop what was begun since the last step."""
        self._buckets: dict[int, _Bucket[S]] = {group[0]: _Bucket() for group in self.groups}

    def release(self) -> None:
        """Remove the hooks: another optimizer trains these variables.

        Raise RunError when they have begun to reduce its gradients.
        """
        if any(bucket.started is not None for bucket in self._buckets.values()):
            raise RunError(
                f"overlap=True: the former optimizer of {self.variables[0].path} has begun to "
                "reduce gradients; call build(model.trainable_variables) of the new one before "
                "backward()"
            )
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.forget()

    def check(self, variables: Sequence[keras.Variable], groups: list[list[int]]) -> None:
        """Raise RunError when these are not the variables and groups of the hooks."""
        same = len(variables) == len(self.variables) and all(map(_is, variables, self.variables))
        if not same or groups != self.groups:
            raise RunError(
                "overlap=True: the optimizer got other variables than at its first step, or some "
                "became local since; make a new DistributedOptimizer after freezing layers"
            )

    def take(self, group: list[int], gradients: Sequence[Gradient]) -> S | None:
        """Return a group's reduction, None when it was not begun, to update with `gradients`."""
        bucket = self._buckets[group[0]]
        self._buckets[group[0]] = _Bucket()
        if bucket.started is None:
            return None
        for place in group:
            made = bucket.made[place]
            if gradients[place] is not made.gradient or made.gradient._version != made.version:
                raise RunError(
                    f"overlap=True: the gradient of {self.variables[place].path} was changed after "
                    "backward(), when its reduction had begun; clip by the optimizer's own "
                    "clipnorm, global_clipnorm or clipvalue, or leave overlap out"
                )
        return bucket.started

    def _note(self, group: list[int], place: int, parameter: torch.nn.Parameter) -> None:
        """Take note of a gradient, and begin the group's reduction when it is the last."""
        bucket, gradient = self._buckets[group[0]], parameter.grad
        assert gradient is not None
        if place in bucket.made:
            raise RunError(
                f"overlap=True: backward() ran again for {self.variables[place].path} before the "
                "optimizer's step, which is to get the mean of one backward pass; add up losses "
                "instead, give each optimizer a loss of its own variables, or leave overlap out"
            )
        bucket.made[place] = _Made(gradient, gradient._version)
        if len(bucket.made) == len(group):
            bucket.started = self._start(
                {i: made.gradient for i, made in bucket.made.items()}, group
            )


_live: weakref.WeakSet[Overlap] = weakref.WeakSet()


def take_over(variables: Sequence[keras.Variable]) -> None:
    """Remove other optimizers' hooks from the variables that an optimizer is built for."""
    for overlap in list(_live):
        if any(_is(one, other) for one in overlap.variables for other in variables):
            overlap.release()


def _parameter(variable: keras.Variable) -> Any:
    return variable.value


def _is(one: object, other: object) -> bool:
    return one is other
