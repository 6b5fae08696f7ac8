"""How a DistributedOptimizer's gradients travel, and what it remembers between backward passes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from recipe.keras import backend, names, recording


@dataclass
class Reduction:
    """Held beside the optimizer's variables, not among them: saved models load without it."""

    prefix: str  # of its name
    compression: type
    op: int
    predivide: float
    sparse_as_dense: bool
    device_dense: str
    device_sparse: str
    process_set: Any
    groups: int | Sequence[Sequence] | None
    passes: int  # backward passes per step
    average_passes: bool
    scale_local: bool
    loss_scaled: bool
    local: dict[int, Any] = field(
        default_factory=dict
    )  # variables whose gradients stay on their rank, by id
    sums: list = field(default_factory=list)  # of the gradients since the last step
    count: Any = None  # backward passes since the last step
    wire_name: str | None = (
        None  # prefix of the names of its collectives; given at its first reduction
    )
    seen: set[int] = field(
        default_factory=set
    )  # places of the sums that have had a gradient since the last step
    agreement: Any = None  # the Agreement of the `fit` that trains with it; None outside of one

    def __call__(self, gradients: list, variables: list, word: Any = None) -> tuple[list, Any]:
        """Returns the gradients reduced over the ranks, those of local variables as they are, and the sum of all ranks'
        `word`, an Agreement's, which travels with them."""
        if self.process_set.process_set_id is None:
            raise ValueError(
                f"process_set={self.process_set} is unknown to Horovod; pass it to init(process_sets=[…]) or "
                "add_process_set()"
            )
        if not self.process_set.included():
            return gradients, None
        self.give_name()
        shared = [i for i, v in enumerate(variables) if not self.is_local(v)]
        local = [
            i for i, v in enumerate(variables) if self.is_local(v) and gradients[i] is not None
        ]
        reduced, heard = backend.reduce(
            gradients, variables, self._grouped(shared, variables), self, word
        )
        if self.loss_scaled and local:
            self._share_overflow([gradients[i] for i in local], reduced, local)
        if self.scale_local:
            for i in local:
                reduced[i] = backend.divided_by_size(reduced[i], self.process_set)
        return reduced, heard

    def give_name(self) -> None:
        """Names its collectives, at its first: all ranks use the same optimizers in the same order."""
        self.wire_name = self.wire_name or names.give(self.prefix, self.process_set.process_set_id)

    def weighted(self, gradients: list, share: Any) -> list:
        """Returns the gradients divided by the share of ranks that have examples: a mean over all becomes one over
        those; sums stay sums."""
        if self.op != backend.horovod.Average:
            return gradients
        return backend.divided(gradients, share)

    def note(self, optimizer: keras.optimizers.Optimizer, gradients: list, variables: list) -> None:
        """Records a call of the optimizer's `apply`, when a step is being recorded."""
        recording.note(
            recording.Update(optimizer, list(variables), [backend.kind(g) for g in gradients])
        )

    def add_local(self, variable: Any) -> None:
        self.local[id(framework_variable(variable))] = framework_variable(variable)

    def is_local(self, variable: Any) -> bool:
        return id(framework_variable(variable)) in self.local

    def build(self, variables: list) -> None:
        """The sums of several passes, outside the optimizer's tracked variables."""
        if self.passes > 1 and not self.sums:
            self.sums = [
                _zeros(v.shape, keras.backend.standardize_dtype(v.dtype)) for v in variables
            ]
            self.count = _zeros((), "int32")

    def accumulate(self, gradients: list, places: list[int]) -> None:
        """Adds one pass's gradients to the sums at `places`."""
        for i, gradient in zip(places, gradients, strict=True):
            if gradient is not None:
                self.seen.add(i)
                self.sums[i].assign(
                    self.sums[i] + keras.ops.cast(backend.dense(gradient), self.sums[i].dtype)
                )
        self.count.assign(self.count + 1)

    def take(self, places: list[int]) -> list:
        """The sums, or means, of the passes; begins anew. Assigns zeros: 0 times an overflow would not be 0."""
        share = 1 / self.passes if self.average_passes else 1
        totals = [self.sums[i] * share if i in self.seen else None for i in places]
        self.forget()
        return totals

    def forget(self) -> None:
        """Drops what was accumulated since the last step."""
        for v in [*self.sums, *([self.count] if self.count is not None else [])]:
            v.assign(keras.ops.zeros(v.shape, dtype=v.dtype))
        self.seen.clear()

    def _share_overflow(self, kept: list, reduced: list, local: list[int]) -> None:
        """An overflow in one rank's local gradients must make all ranks skip the step: 0·∞ is NaN, and so is any sum
        with it."""
        zero = sum(keras.ops.sum(keras.ops.cast(backend.dense(g), "float32") * 0.0) for g in kept)
        shared = backend.total(zero, f"{self.wire_name}.overflow", self.process_set)
        first = next(i for i, g in enumerate(reduced) if g is not None)
        reduced[first] = backend.dense(reduced[first]) + keras.ops.cast(
            shared, reduced[first].dtype
        )

    def _grouped(self, shared: list[int], variables: list) -> list[list[int]]:
        """Places of gradients that are reduced together: of one type, as a collective carries one."""
        keyed: dict[Any, list[int]] = {}
        for place, key in zip(shared, self._keys(shared, variables), strict=True):
            dtype = keras.backend.standardize_dtype(variables[place].dtype)
            keyed.setdefault((key, dtype), []).append(place)
        return list(keyed.values())

    def _keys(self, shared: list[int], variables: list) -> list:
        if isinstance(self.groups, int):
            return [("group", n * self.groups // len(shared)) for n in range(len(shared))]
        group = {
            id(framework_variable(v)): g
            for g, members in enumerate(self.groups or ())
            for v in members
        }
        keys = [id(framework_variable(variables[i])) for i in shared]
        return [
            ("group", group[k]) if k in group else ("alone", i)
            for i, k in zip(shared, keys, strict=True)
        ]


def framework_variable(variable: Any) -> Any:
    """The framework's variable in a Keras variable: users may name either."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _zeros(shape: tuple, dtype: str) -> keras.Variable:
    return keras.Variable(initializer="zeros", shape=tuple(shape), dtype=dtype, trainable=False)
