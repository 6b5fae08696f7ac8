"""`DistributedOptimizer`: any Keras 3 optimizer, applied to gradients reduced over all ranks."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
from horovod.common.process_sets import ProcessSet

from recipe.keras import backend, recording, rollcall
from recipe.keras.options import Groups, Options
from recipe.keras.reduction import Accumulator, Reduction
from recipe.keras.tensors import Gradient, Tensor, Variable

Average, Sum = backend.horovod.Average, backend.horovod.Sum
Compression = backend.Compression
global_process_set = backend.horovod.global_process_set

if TYPE_CHECKING:
    from keras.optimizers import Optimizer as _Optimizer

    from recipe.keras.agreement import Agreement
else:
    _Optimizer = object


class _Distributed(_Optimizer):
    """Mixed into the class of a wrapped optimizer.

    `apply` is the one method that every trainer of Keras 3 calls.
    """

    _hvd_reduction: Reduction
    _hvd_options: Options
    _hvd_wrapped: type[keras.optimizers.Optimizer]
    built: bool

    @classmethod
    def from_config(
        cls, config: dict, custom_objects: dict | None = None
    ) -> keras.optimizers.Optimizer:
        """Return an optimizer of this configuration, distributed in the same way."""
        optimizer = cls._hvd_wrapped.from_config(config, custom_objects)
        _check_optimizer(optimizer)
        return _distribute(optimizer, cls._hvd_options)

    @property
    def variables(self) -> "_CallableList":
        """The optimizer's variables. `variables()`, as Horovod has it, is the same."""
        return _CallableList(super().variables)

    @property
    def process_set(self) -> ProcessSet:
        """The ranks over which the gradients are reduced."""
        return self._hvd_reduction.process_set

    @property
    def scale_local_gradients(self) -> bool:
        """Whether local variables' gradients are divided by the number of ranks."""
        return self._hvd_reduction.options.scale_local_gradients

    def register_local_var(self, var: Variable) -> None:
        """Leave the gradient of `var`, a Keras or a framework variable, on its rank.

        With `scale_local_gradients` it is divided by the number of ranks, so that it weighs what
        it would in the average.
        """
        self._hvd_reduction.add_local(var)

    def build(self, variables: list) -> None:
        """Make the optimizer's variables and the sums of several backward passes."""
        super().build(variables)
        self._hvd_reduction.build(variables)

    def apply(
        self, grads: Iterable[Gradient], trainable_variables: Iterable[Variable] | None = None
    ) -> None:
        """Reduce the gradients over the ranks and update the variables. Collective."""
        gradients = list(grads)
        if trainable_variables is None:
            variables = self._trainable_variables
        else:
            variables = list(trainable_variables)
        if len(variables) != len(gradients):
            super().apply(gradients, trainable_variables)  # raises Keras's own error
            return

        kinds = [backend.kind(gradient) for gradient in gradients]
        recording.note(recording.Update(self, list(variables), kinds))
        agreement = self._hvd_reduction.agreement
        # Variables can't be made where operations wait for those of other ranks.
        if not self.built:
            self.build(variables)
            self.built = True
        if self._has_several_passes():
            self._apply_pass(gradients, variables)
        elif agreement is not None:
            self._apply_agreed(agreement, gradients, variables)
        else:
            reduced = self._hvd_reduction.reduce(gradients, variables)
            super().apply(reduced.gradients, variables)

    def take_part(self, variables: list, kinds: list[str]) -> Iterator[Callable[[], None]]:
        """Yield what this rank does in an `apply` of the others for which it has no examples.

        It tells its word, then reduces nothing and updates. Whoever calls these stops after the
        first when no rank has examples. Collective.
        """
        agreement = self._hvd_reduction.agreement
        assert agreement is not None  # it is what asks this rank to take part
        word_alone = backend.WORD_ALONE or self._has_several_passes()

        def tell() -> None:
            word = agreement.word(self)
            agreement.hear(backend.sum_word(word, self._hvd_reduction))

        def update() -> None:
            nothing = [backend.nothing(v, kind) for v, kind in zip(variables, kinds, strict=True)]
            with agreement.told() if word_alone else contextlib.nullcontext():
                self.apply(nothing, variables)

        if word_alone:
            yield tell
        yield update

    def _has_several_passes(self) -> bool:
        """Whether several calls of `apply` make one update, by Horovod's option or by Keras's."""
        return self._hvd_reduction.accumulates or bool(self.gradient_accumulation_steps)

    def _apply_agreed(
        self, agreement: "Agreement", gradients: list[Gradient], variables: list
    ) -> None:
        """Reduce and update. The agreement's word travels with the gradients."""
        reduced = self._hvd_reduction.reduce(gradients, variables, agreement.word(self))
        share = agreement.hear(reduced.word)
        if not backend.WORD_ALONE and agreement.nobody():
            return
        weighted = self._hvd_reduction.weighted(reduced.gradients, share)
        with backend.after(reduced.word):
            super().apply(weighted, variables)

    def _apply_pass(self, gradients: list[Gradient], variables: list) -> None:
        """Do one of several backward passes of a step.

        The agreement's word travels alone, as most passes reduce nothing.
        """
        summed_word = None
        agreement = self._hvd_reduction.agreement
        if agreement is not None:
            word = agreement.word(self)
            if word is not None:
                summed_word = backend.sum_word(word, self._hvd_reduction, gradients)
            share = agreement.hear(summed_word)
            gradients = self._hvd_reduction.weighted(gradients, share)
        accumulator = self._hvd_reduction.accumulator
        with backend.after(summed_word):
            if accumulator is not None:
                self._apply_after_passes(accumulator, gradients, variables)
            else:
                self._apply_accumulating(gradients, variables)

    def _apply_after_passes(
        self, accumulator: Accumulator, gradients: list[Gradient], variables: list
    ) -> None:
        """Add up on this rank, then reduce and update after `backward_passes_per_step` passes.

        `iterations` counts updates.
        """
        update = super().apply
        reduction = self._hvd_reduction
        options = reduction.options
        passes = options.backward_passes_per_step
        factor = 1 / passes if options.average_aggregated_gradients else 1
        places = [self._get_variable_index(v) for v in variables]
        accumulator.add(gradients, places)

        def reduce_and_update() -> None:
            totals = accumulator.take(places, factor)
            update(reduction.reduce(totals, variables).gradients, variables)

        is_last = keras.ops.equal(accumulator.count, passes)
        keras.ops.cond(is_last, reduce_and_update, lambda: None)

    def _apply_accumulating(self, gradients: list[Gradient], variables: list) -> None:
        """Reduce the sums of an optimizer with `gradient_accumulation_steps`, when it updates.

        On that pass the optimizer's accumulators become the reduced sums, and zeros take the
        gradients' place. To subtract what was accumulated would round differently on each rank.
        """
        update = super().apply
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        own = [backend.dense(gradients[i]) for i in present]
        variables = [variables[i] for i in present]
        places = [self._get_variable_index(v) for v in variables]
        accumulators = [self._accumulated_gradients[place] for place in places]

        def reduce_sums() -> list[Tensor]:
            sums = []
            for gradient, accumulator in zip(own, accumulators, strict=True):
                sums.append(gradient + keras.ops.cast(accumulator, gradient.dtype))
            totals = self._hvd_reduction.reduce(sums, variables).gradients
            for accumulator, total in zip(accumulators, totals, strict=True):
                accumulator.assign(total)
            return [keras.ops.zeros_like(gradient) for gradient in own]

        passes_done = (self._iterations + 1) % self.gradient_accumulation_steps
        is_last = keras.ops.equal(passes_done, 0)
        update(keras.ops.cond(is_last, reduce_sums, lambda: own), variables)


class _CallableList(list):
    def __call__(self) -> "_CallableList":
        return self


class _NotInKeras3:
    """What Horovod's optimizer has and Keras 3's have not.

    A wrapped class's own methods by these names come first.
    """

    def compute_gradients(self, loss: Any, var_list: Any, tape: Any = None) -> None:
        """Raise ValueError: who trains takes the gradients."""
        raise ValueError(_no_gradients("compute_gradients"))

    def get_gradients(self, loss: Any, params: Any) -> None:
        """Raise ValueError: who trains takes the gradients."""
        raise ValueError(_no_gradients("get_gradients"))


def _no_gradients(name: str) -> str:
    return (
        f"{name}: optimizers of Keras 3 compute no gradients; take them with the framework "
        "(tape.gradient or loss.backward) and give them to apply_gradients, which reduces them"
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
    groups: Groups = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
    overlap: bool = False,
) -> keras.optimizers.Optimizer:
    """Make `optimizer` reduce each gradient over all ranks before it uses it, and return it.

    The arguments are Horovod's, in its order, and `overlap`: see `Options`. `num_groups` is an old
    `groups`.
    The same object comes back, with its state. So clipping, weight decay and moving averages act
    on the reduced gradient, and a model saved with it loads without this package.

    Under the global policy "mixed_float16" a LossScaleOptimizer is put around it first.
    Raise ValueError for what can't be done, and for anything that is not a Keras optimizer or
    already is distributed.
    """
    _check_optimizer(optimizer)
    options = Options(
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        op=op,
        backward_passes_per_step=backward_passes_per_step,
        average_aggregated_gradients=average_aggregated_gradients,
        groups=_either(groups, num_groups),
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
        overlap=overlap,
    )
    return _distribute(optimizer, options)


def PartialDistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: type = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: int = Average,
    groups: Groups = None,
    process_set: ProcessSet = global_process_set,
    local_layers: keras.layers.Layer | Iterable[keras.layers.Layer] | None = None,
    scale_local_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """Make `optimizer` a DistributedOptimizer that leaves the gradients of `local_layers` alone.

    The other arguments are those of DistributedOptimizer. Raise ValueError also for what is not a
    built layer.
    """
    layers = _built_layers(local_layers)
    _check_optimizer(optimizer)
    options = Options(
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        op=op,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    optimizer = _distribute(optimizer, options)
    for layer in layers:
        for variable in layer.trainable_weights:
            optimizer.register_local_var(variable)
    return optimizer


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """Return the optimizers that train a model.

    The compiled one comes first, then those in its attributes, as a GAN has, or in lists and
    dictionaries there.
    """
    candidates = [model.optimizer]
    for attribute in vars(model).values():
        if isinstance(attribute, dict):
            candidates.extend(attribute.values())
        elif isinstance(attribute, (list, tuple)):
            candidates.extend(attribute)
        else:
            candidates.append(attribute)
    optimizers = [c for c in candidates if isinstance(c, keras.optimizers.Optimizer)]
    return list({id(optimizer): optimizer for optimizer in optimizers}.values())


def is_distributed(optimizer: object) -> bool:
    """Return whether `optimizer` came out of DistributedOptimizer."""
    return isinstance(optimizer, _Distributed)


def reduction_of(optimizer: object) -> Reduction | None:
    """Return how a DistributedOptimizer reduces, None for any other."""
    return optimizer._hvd_reduction if isinstance(optimizer, _Distributed) else None


def use_compression(optimizer: keras.optimizers.Optimizer, compression: type) -> None:
    """Change how a DistributedOptimizer's gradients travel."""
    options = dataclasses.replace(optimizer._hvd_options, compression=compression)
    optimizer._hvd_reduction.options = options
    type(optimizer)._hvd_options = options


def _check_optimizer(optimizer: object) -> None:
    """Raise ValueError for what can't be wrapped."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            f"DistributedOptimizer wraps a keras.optimizers.Optimizer, not {optimizer!r}"
        )
    if is_distributed(optimizer) or is_distributed(getattr(optimizer, "inner_optimizer", None)):
        raise ValueError(
            f"{optimizer.name} is a DistributedOptimizer already; wrap it once, outermost"
        )


def _either(groups: Groups, num_groups: int) -> Groups:
    """Return `groups`, or `num_groups`, its old name, with a warning to the caller's caller."""
    if not num_groups:
        return groups
    warnings.warn("num_groups is an old name; use groups", DeprecationWarning, stacklevel=3)
    return num_groups if groups is None else groups


def _built_layers(
    layers: keras.layers.Layer | Iterable[keras.layers.Layer] | None,
) -> Sequence[keras.layers.Layer]:
    """Return the layers as a list. Raise ValueError for what is not a built layer."""
    layers = [layers] if isinstance(layers, keras.layers.Layer) else list(layers or [])
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(f"local_layers must be Keras layers, not {layer!r}")
        if not layer.built:
            raise ValueError(
                f"local_layers: {layer.name!r} has no variables yet; build the model first"
            )
    return layers


def _distribute(
    optimizer: keras.optimizers.Optimizer, options: Options
) -> keras.optimizers.Optimizer:
    """Make the optimizer reduce its gradients as the options say, and return it."""
    # Ranks must reduce the scaled gradients before they are tested for overflow. Else they would
    # disagree about skipping the step and wait for each other for ever. Model.compile would put
    # this optimizer around the distributed one.
    is_mixed = keras.config.dtype_policy().name == "mixed_float16"
    if is_mixed and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)

    if options.overlap and optimizer.gradient_accumulation_steps:
        raise ValueError(
            "overlap=True reduces each backward pass, and gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps} adds up several first; use one of the two"
        )
    loss_scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    optimizer._hvd_reduction = Reduction(options, loss_scaled)
    if optimizer.built:
        optimizer._hvd_reduction.build(optimizer._trainable_variables)

    # Change the class of this very object instead of making another around it: so its state,
    # settings and variables stay, models and callbacks that hold it hold the distributed one, and
    # Keras saves it as what it was.
    optimizer.__class__ = _distributed_class(type(optimizer), options)
    rollcall.optimizers.add(optimizer)
    return optimizer


def _distributed_class(wrapped: type[keras.optimizers.Optimizer], options: Options) -> type:
    """Return a subclass that goes by the wrapped class's names: Keras saves these in models."""
    attributes = {
        "__module__": wrapped.__module__,
        "__qualname__": wrapped.__qualname__,
        "__doc__": wrapped.__doc__,
        "_hvd_wrapped": wrapped,
        "_hvd_options": options,
    }
    distributed = type(wrapped.__name__, (_Distributed, wrapped, _NotInKeras3), attributes)

    # A registered name must lead from both classes, but only to the wrapped one.
    registered = keras.saving.get_registered_name(wrapped)
    if ">" in registered:
        package, name = registered.split(">", 1)
        register = keras.saving.register_keras_serializable(package, name)
        register(distributed)
        register(wrapped)
    return distributed
