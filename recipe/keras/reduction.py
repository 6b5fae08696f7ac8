"""How a DistributedOptimizer's gradients travel, and what it adds up between updates."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import keras
from horovod.common.process_sets import ProcessSet

from recipe.keras import backend, names
from recipe.keras.options import Options
from recipe.keras.tensors import Gradient, Reduced, Tensor, Variable

if TYPE_CHECKING:
    from recipe.keras.agreement import Agreement
    from recipe.keras.overlap import Overlap


class Accumulator:
    """Sums of the gradients of several backward passes, on this rank.

    Its variables are not among the optimizer's, so that saved models load without this package.
    """

    def __init__(self, variables: list[keras.Variable]) -> None:
        self.sums = [_zeros(v.shape, _dtype(v)) for v in variables]
        self.count = _zeros((), "int32")  # backward passes since the last update
        self.seen: set[int] = set()  # places of the sums that have had a gradient since then

    def add(self, gradients: list[Gradient], places: list[int]) -> None:
        """Add one pass's gradients to the sums at `places`."""
        for place, gradient in zip(places, gradients, strict=True):
            if gradient is not None:
                self.seen.add(place)
                total = self.sums[place]
                total.assign(total + keras.ops.cast(backend.dense(gradient), total.dtype))
        self.count.assign(self.count + 1)

    def take(self, places: list[int], factor: float) -> list[Gradient]:
        """Return the sums at `places` times `factor`, None where there was no gradient.

        The sums begin anew.
        """
        totals = [self.sums[place] * factor if place in self.seen else None for place in places]
        self.forget()
        return totals

    def forget(self) -> None:
        """Drop what was added up since the last update."""
        # Assign zeros: 0 times an overflow would not be 0.
        for v in [*self.sums, self.count]:
            v.assign(keras.ops.zeros(v.shape, dtype=v.dtype))
        self.seen.clear()


@dataclass
class Reduction:
    """One optimizer's reduction: its options, and its state beside the optimizer's variables."""

    options: Options
    loss_scaled: bool  # the optimizer is a LossScaleOptimizer
    accumulator: Accumulator | None = None  # with several backward passes per step, once built
    agreement: "Agreement | None" = None  # of the `fit` that trains with it; None outside of one
    wire_name: str | None = None  # prefix of its collectives' names; given at its first reduction
    overlap: "Overlap | None" = None  # with that option, on PyTorch, from the first step on
    local: dict[int, Variable] = field(default_factory=dict)  # local variables, by their id

    @property
    def process_set(self) -> ProcessSet:
        """The ranks over which the gradients are reduced."""
        return self.options.process_set

    def forget(self) -> None:
        """Drop what was begun since the last update."""
        if self.accumulator is not None:
            self.accumulator.forget()
        if self.overlap is not None:
            self.overlap.forget()

    @property
    def accumulates(self) -> bool:
        """Whether several backward passes make one update."""
        return self.options.backward_passes_per_step > 1

    def build(self, variables: list[keras.Variable]) -> None:
        """Make the sums of several backward passes, and take these variables over."""
        backend.take_over(variables)
        if self.accumulates and self.accumulator is None:
            self.accumulator = Accumulator(variables)

    def give_name(self) -> None:
        """Name its collectives, if they have no name yet.

        All ranks use the same optimizers in the same order.
        """
        if self.wire_name is None:
            prefix = self.options.name or "gradient"
            self.wire_name = names.give(prefix, self.process_set.process_set_id)

    def add_local(self, variable: Variable) -> None:
        """Leave the gradient of `variable` on its rank."""
        variable = framework_variable(variable)
        self.local[id(variable)] = variable

    def is_local(self, variable: Variable) -> bool:
        """Return whether the gradient of `variable` stays on its rank."""
        return id(framework_variable(variable)) in self.local

    def reduce(
        self,
        gradients: list[Gradient],
        variables: list[keras.Variable],
        word: Tensor | None = None,
    ) -> Reduced:
        """Reduce the gradients over the ranks, but for those of local variables.

        An agreement's `word` travels with them. Raise ValueError for a process set that Horovod
        doesn't know. Collective.
        """
        # A rank outside of the process set keeps its gradients.
        if self.process_set.process_set_id is None:
            raise ValueError(
                f"process_set={self.process_set} is unknown to Horovod; pass it to "
                "init(process_sets=[…]) or add_process_set()"
            )
        if not self.process_set.included():
            return Reduced(gradients, None)
        self.give_name()

        # Reduce what is shared.
        shared = [i for i, v in enumerate(variables) if not self.is_local(v)]
        groups = self._grouped(shared, variables)
        reduced, summed_word = backend.reduce(gradients, variables, groups, self, word)

        # Weigh what is local.
        local = [i for i, v in enumerate(variables) if self.is_local(v)]
        local = [i for i in local if gradients[i] is not None]
        if self.loss_scaled and local:
            self._share_overflow([gradients[i] for i in local], reduced)
        if self.options.scale_local_gradients:
            for i in local:
                reduced[i] = backend.divided_by_size(reduced[i], self.process_set)
        return Reduced(reduced, summed_word)

    def weighted(self, gradients: list[Gradient], share: Tensor) -> list[Gradient]:
        """Return the gradients divided by the share of ranks that have examples.

        So a mean over all ranks becomes one over those with examples. Sums stay sums.
        """
        if self.options.op != backend.horovod.Average:
            return gradients
        return backend.divided(gradients, share)

    def _share_overflow(self, local: list[Gradient], reduced: list[Gradient]) -> None:
        """Make all ranks skip the step when local gradients overflow on one of them. Collective.

        0·∞ is NaN, and so is any sum with it.
        """
        zero = sum(keras.ops.sum(keras.ops.cast(backend.dense(g), "float32") * 0.0) for g in local)
        total = backend.total(zero, f"{self.wire_name}.overflow", self.process_set)
        first = next(i for i, g in enumerate(reduced) if g is not None)
        gradient = backend.dense(reduced[first])
        reduced[first] = gradient + keras.ops.cast(total, gradient.dtype)

    def _grouped(self, shared: list[int], variables: list[keras.Variable]) -> list[list[int]]:
        """Return the places of gradients that are reduced together.

        They are of one type, as a collective carries one.
        """
        groups: dict[Hashable, list[int]] = {}
        for place, key in zip(shared, self._group_keys(shared, variables), strict=True):
            dtype = _dtype(variables[place])
            groups.setdefault((key, dtype), []).append(place)
        return list(groups.values())

    def _group_keys(self, shared: list[int], variables: list[keras.Variable]) -> list[Hashable]:
        """Return a key for each place of `shared`: equal keys are reduced together."""
        groups = self.options.groups
        if groups is None and self.options.overlap:
            groups = backend.OVERLAP_GROUPS
        if isinstance(groups, int):
            return [("group", n * groups // len(shared)) for n in range(len(shared))]
        group_of = {}
        for number, members in enumerate(groups or ()):
            for variable in members:
                group_of[id(framework_variable(variable))] = number
        keys: list[Hashable] = []
        for place in shared:
            group = group_of.get(id(framework_variable(variables[place])))
            keys.append(("alone", place) if group is None else ("group", group))
        return keys


def framework_variable(variable: Variable) -> Variable:
    """Return the framework's variable in a Keras variable: users may name either."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _dtype(variable: keras.Variable) -> str:
    return keras.backend.standardize_dtype(variable.dtype)


def _zeros(shape: tuple, dtype: str) -> keras.Variable:
    return keras.Variable(initializer="zeros", shape=tuple(shape), dtype=dtype, trainable=False)
