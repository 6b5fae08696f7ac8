"""`DistributedOptimizer` for Keras 3: any Keras optimizer, applied to the gradient reduced over all ranks."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras

from recipe.keras import backend, rollcall
from recipe.keras.reduction import Reduction

Average, Sum, Adasum = backend.horovod.Average, backend.horovod.Sum, backend.horovod.Adasum
Compression = backend.Compression
global_process_set = backend.horovod.global_process_set


class _Distributed:
    """Mixed into the class of a wrapped optimizer; `apply` is the one method that every trainer of Keras 3 calls."""

    _hvd: Reduction
    _hvd_wrapped: type
    _hvd_options: dict[str, Any]

    @classmethod
    def from_config(
        cls, config: dict, custom_objects: dict | None = None
    ) -> keras.optimizers.Optimizer:
        """An optimizer of this configuration, distributed in the same way."""
        return DistributedOptimizer(
            cls._hvd_wrapped.from_config(config, custom_objects), **cls._hvd_options
        )

    @property
    def variables(self) -> list:
        """The optimizer's variables; `variables()`, as Horovod has it, is the same."""
        return _CallableList(super().variables)

    @property
    def process_set(self) -> Any:
        """The ranks over which the gradients are reduced."""
        return self._hvd.process_set

    @property
    def scale_local_gradients(self) -> bool:
        """Whether local variables' gradients are divided by the number of ranks."""
        return self._hvd.scale_local

    def register_local_var(self, var: Any) -> None:
        """The gradient of `var`, a Keras or a framework variable, stays on its rank: it is not reduced.

        It is divided by the number of ranks when `scale_local_gradients` is set, so that it weighs what it would in
        the average."""
        self._hvd.add_local(var)

    def build(self, variables: list) -> None:
        super().build(variables)
        self._hvd.build(variables)

    def apply(self, grads: Iterable, trainable_variables: Iterable | None = None) -> None:
        gradients = list(grads)
        variables = (
            self._trainable_variables if trainable_variables is None else list(trainable_variables)
        )
        if len(variables) != len(gradients):
            super().apply(gradients, trainable_variables)  # which says what is wrong
            return
        self._hvd.note(self, gradients, variables)
        if (
            self._hvd.agreement and not self.built
        ):  # variables can't be made where operations wait for others
            self.build(variables)
            self.built = True
        if self._hvd.passes > 1 or self.gradient_accumulation_steps:
            self._apply_pass(gradients, variables)
            return
        agreement = self._hvd.agreement
        reduced, heard = self._hvd(gradients, variables, agreement and agreement.word(self))
        if agreement:
            share = agreement.hear(heard)
            if not backend.WORD_ALONE and agreement.nobody():
                return
            reduced = self._hvd.weighted(reduced, share)
        with backend.after(heard):
            super().apply(reduced, variables)

    def _apply_pass(self, gradients: list, variables: list) -> None:
        """One of several backward passes of a step. The agreement's word travels alone: most passes reduce nothing."""
        if not self.built:
            self.build(variables)
            self.built = True
        heard = None
        if agreement := self._hvd.agreement:
            word = agreement.word(self)
            heard = None if word is None else backend.spoken(word, self._hvd, gradients)
            gradients = self._hvd.weighted(gradients, agreement.hear(heard))
        step = self._apply_after_passes if self._hvd.passes > 1 else self._apply_accumulating
        with backend.after(heard):
            step(gradients, variables)

    def take_part(self, variables: list, kinds: list[str]) -> Iterator[Callable]:
        """Yields what this rank does, one after another, in an `apply` of the other ranks for which it has no
        examples: tells its word, then reduces nothing and updates. Collective.

        Whoever runs them stops after the first when no rank has examples."""
        agreement = self._hvd.agreement
        alone = backend.WORD_ALONE or self._hvd.passes > 1 or self.gradient_accumulation_steps

        def tell() -> None:
            agreement.hear(backend.spoken(agreement.word(self), self._hvd))

        def update() -> None:
            with agreement.told() if alone else contextlib.nullcontext():
                self.apply(
                    [backend.nothing(v, kind) for v, kind in zip(variables, kinds, strict=True)],
                    variables,
                )

        if alone:
            yield tell
        yield update

    def _apply_after_passes(self, gradients: list, variables: list) -> None:
        """Adds up on this rank; every `passes` passes reduces the sums and updates. `iterations` counts updates."""
        how, update = self._hvd, super().apply
        places = [self._get_variable_index(v) for v in variables]
        how.accumulate(gradients, places)

        def last() -> None:
            update(how(how.take(places), variables)[0], variables)

        keras.ops.cond(keras.ops.equal(how.count, how.passes), last, lambda: None)

    def _apply_accumulating(self, gradients: list, variables: list) -> None:
        """The optimizer accumulates by itself: on its updating pass the accumulators become the reduced sums, and
        zeros take the gradients' place (subtracting what was accumulated would round differently on each rank)."""
        update = super().apply
        present = [i for i, g in enumerate(gradients) if g is not None]
        mine = [backend.dense(gradients[i]) for i in present]
        variables = [variables[i] for i in present]
        accumulators = [self._accumulated_gradients[self._get_variable_index(v)] for v in variables]

        def last() -> list:
            sums = [g + keras.ops.cast(a, g.dtype) for g, a in zip(mine, accumulators, strict=True)]
            for accumulator, total in zip(accumulators, self._hvd(sums, variables)[0], strict=True):
                accumulator.assign(total)
            return [keras.ops.zeros_like(g) for g in mine]

        due = keras.ops.equal((self._iterations + 1) % self.gradient_accumulation_steps, 0)
        update(keras.ops.cond(due, last, lambda: mine), variables)


class _CallableList(list):
    def __call__(self) -> list:
        return self


class _NotInKeras3:
    """What Horovod's optimizer has and Keras 3's have not; a wrapped class's own methods by these names come first."""

    def compute_gradients(self, loss: Any, var_list: Any, tape: Any = None) -> None:
        """Raises ValueError: who trains takes the gradients."""
        raise ValueError(_no_gradients("compute_gradients"))

    def get_gradients(self, loss: Any, params: Any) -> None:
        """Raises ValueError: who trains takes the gradients."""
        raise ValueError(_no_gradients("get_gradients"))


def _no_gradients(name: str) -> str:
    return (
        f"{name}: optimizers of Keras 3 compute no gradients; take them with the framework (tape.gradient or "
        "loss.backward) and give them to apply_gradients, which reduces them"
    )


def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: type = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: int = Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | Sequence[Sequence] | None = None,
    process_set: Any = global_process_set,
    scale_local_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """Makes `optimizer` reduce each gradient over all ranks before it uses it, and returns it.

    The same object comes back, with its state: only its class gains methods. So clipping, weight decay and moving
    averages of the optimizer act on the reduced gradient, and a model saved with it loads without this package.

    Under the global policy "mixed_float16" a LossScaleOptimizer is put around the optimizer first, as
    `Model.compile` would do: ranks must reduce the scaled gradients *before* they are tested for overflow, or they
    would disagree about skipping the step and wait for each other for ever.

    - `name`: prefix of the collectives' names; must be the same on all ranks.
    - `device_dense`, `device_sparse`: TensorFlow device of the reductions; with PyTorch they must be empty.
    - `compression`: `Compression.none` or `Compression.fp16`: how dense gradients travel.
    - `sparse_as_dense`: sparse gradients are made dense and summed, instead of gathered with their indices.
    - `gradient_predivide_factor` f: divides by f before the sum and multiplies by f/size after it.
    - `op`: `Average` or `Sum`.
    - `backward_passes_per_step` m: gradients of m calls are added up before they are reduced and used once; the sum
      is divided by m with `average_aggregated_gradients`. Sparse gradients become dense.
    - `groups`: the number of groups, or lists of variables, that are reduced together (`num_groups`: its old name).
    - `process_set`: the ranks over which to reduce; ranks outside it keep their own gradients.
    - `scale_local_gradients`: gradients of local variables (`register_local_var`) are divided by the size.

    The arguments are Horovod's, in its order. Raises ValueError for what can't be done, and for anything that is not
    a Keras optimizer or already is distributed.
    """
    options = {k: v for k, v in locals().items() if k != "optimizer"}
    _check_optimizer(optimizer)
    _check_reduction(
        op, gradient_predivide_factor, backward_passes_per_step, device_dense, device_sparse
    )
    if num_groups:
        warnings.warn("num_groups is an old name; use groups", DeprecationWarning, stacklevel=2)
    groups = (num_groups or None) if groups is None else groups
    _check_groups(groups)
    loss_scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if keras.config.dtype_policy().name == "mixed_float16" and not loss_scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer._hvd = Reduction(
        prefix=name or "gradient",
        compression=compression,
        op=op,
        predivide=gradient_predivide_factor,
        sparse_as_dense=sparse_as_dense,
        device_dense=device_dense,
        device_sparse=device_sparse,
        process_set=process_set,
        groups=groups,
        passes=backward_passes_per_step,
        average_passes=average_aggregated_gradients,
        scale_local=scale_local_gradients,
        loss_scaled=isinstance(optimizer, keras.optimizers.LossScaleOptimizer),
    )
    if optimizer.built:
        optimizer._hvd.build(optimizer._trainable_variables)
    optimizer.__class__ = _distributed_class(type(optimizer), options)
    rollcall.optimizers.add(optimizer)
    return optimizer


def PartialDistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: type = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: int = Average,
    groups: int | Sequence[Sequence] | None = None,
    process_set: Any = global_process_set,
    local_layers: keras.layers.Layer | Iterable[keras.layers.Layer] | None = None,
    scale_local_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """A DistributedOptimizer that leaves the gradients of `local_layers`, which must be built, on their ranks.

    The other arguments are those of DistributedOptimizer. Raises ValueError also for what is not a built layer."""
    options = {k: v for k, v in locals().items() if k not in ("optimizer", "local_layers")}
    layers = (
        [local_layers] if isinstance(local_layers, keras.layers.Layer) else list(local_layers or [])
    )
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(f"local_layers must be Keras layers, not {layer!r}")
        if not layer.built:
            raise ValueError(
                f"local_layers: {layer.name!r} has no variables yet; build the model first"
            )
    optimizer = DistributedOptimizer(optimizer, **options)
    for layer in layers:
        for variable in layer.trainable_weights:
            optimizer.register_local_var(variable)
    return optimizer


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """Returns the optimizers that train a model: the compiled one first, then those in its attributes, as a GAN has,
    or in lists and dictionaries there."""
    held = [
        model.optimizer,
        *(member for value in vars(model).values() for member in _members(value)),
    ]
    found = {id(o): o for o in held if isinstance(o, keras.optimizers.Optimizer)}
    return list(found.values())


def _members(value: Any) -> Iterable:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, (list, tuple)) else [value]


def is_distributed(optimizer: Any) -> bool:
    """Whether `optimizer` came out of DistributedOptimizer."""
    return isinstance(optimizer, _Distributed)


def reduction_of(optimizer: Any) -> Reduction | None:
    """How a DistributedOptimizer reduces; None for any other."""
    return optimizer._hvd if is_distributed(optimizer) else None


def use_compression(optimizer: keras.optimizers.Optimizer, compression: type) -> None:
    """Changes how a DistributedOptimizer's gradients travel."""
    optimizer._hvd.compression = optimizer._hvd_options["compression"] = compression


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            f"DistributedOptimizer wraps a keras.optimizers.Optimizer, not {optimizer!r}"
        )
    if is_distributed(optimizer) or is_distributed(getattr(optimizer, "inner_optimizer", None)):
        raise ValueError(
            f"{optimizer.name} is a DistributedOptimizer already; wrap it once, outermost"
        )


def _check_reduction(
    op: int, predivide: float, passes: int, device_dense: str, device_sparse: str
) -> None:
    if op == Adasum:
        raise ValueError(
            "op=Adasum is not supported for Keras, by Horovod neither; use Average or Sum"
        )
    if op not in (Average, Sum):
        raise ValueError(f"op={op!r} is not a reduction of gradients; use Average or Sum")
    if predivide != 1.0 and op != Average:
        raise ValueError(
            f"gradient_predivide_factor={predivide} splits an average; it needs op=Average"
        )
    if predivide != 1.0 and backend.horovod.rocm_built():
        raise ValueError(
            f"gradient_predivide_factor={predivide} is not supported by Horovod built for ROCm; leave 1.0"
        )
    if predivide <= 0:
        raise ValueError(f"gradient_predivide_factor={predivide} must be positive")
    if not isinstance(passes, int) or passes < 1:
        raise ValueError(f"backward_passes_per_step={passes!r} must be an integer of at least 1")
    for argument, device in (("device_dense", device_dense), ("device_sparse", device_sparse)):
        if device and not backend.DEVICES:
            raise ValueError(
                f"{argument}={device!r}: with PyTorch a gradient is reduced where it lies; leave it empty"
            )


def _check_groups(groups: Any) -> None:
    if isinstance(groups, int) and not isinstance(groups, bool) and groups > 0:
        return
    if groups is not None and not (
        isinstance(groups, (list, tuple)) and all(isinstance(g, list | tuple) for g in groups)
    ):
        raise ValueError(
            f"groups={groups!r} must be a positive number of groups or a list of lists of variables"
        )


def _distributed_class(wrapped: type, options: dict[str, Any]) -> type:
    """A subclass that goes by the wrapped class's names, since Keras writes these into saved models."""
    names = {
        "__module__": wrapped.__module__,
        "__qualname__": wrapped.__qualname__,
        "__doc__": wrapped.__doc__,
        "_hvd_wrapped": wrapped,
        "_hvd_options": options,
    }
    distributed = type(wrapped.__name__, (_Distributed, wrapped, _NotInKeras3), names)
    registered = keras.saving.get_registered_name(wrapped)
    if ">" in registered:  # the name must lead from both classes, but only to the wrapped one
        register = keras.saving.register_keras_serializable(*registered.split(">", 1))
        register(distributed)
        register(wrapped)
    return distributed
