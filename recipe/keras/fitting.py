"""The wrapping of `keras.Model.fit`: a model with a DistributedOptimizer trains on all ranks.

Keras's loop knows one process only. It keeps its form, and this rank's callbacks go into one,
`Together`, which tells the other ranks what this one does and does what they have agreed on.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

from recipe.keras import backend, facts, recording, rollcall
from recipe.keras.agreement import Agreement, check_started
from recipe.keras.distributed import is_distributed, optimizers_of, reduction_of
from recipe.keras.together import Together
from recipe.ranks import collectives, elastic

# Keras looks for these in the list that `fit` is given. They speak of this rank alone.
_KERAS_OWN = (keras.callbacks.History, keras.callbacks.ProgbarLogger)

Fit = Callable[..., keras.callbacks.History]


def install() -> None:
    """Make `keras.Model.fit` keep the ranks together when a DistributedOptimizer trains a model."""
    keras_fit = keras.Model.fit
    if hasattr(keras_fit, "of_keras"):
        return

    @functools.wraps(keras_fit)
    def fit(model: keras.Model, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        if not _is_trained_together(model):
            return keras_fit(model, *args, **kwargs)
        return _fit_together(keras_fit, model, *args, **kwargs)

    fit.of_keras = keras_fit  # type: ignore[attr-defined]  # marks that `fit` is wrapped
    keras.Model.fit = fit


def _is_trained_together(model: keras.Model) -> bool:
    """Return whether an optimizer of the model, or one inside it, is a DistributedOptimizer."""
    optimizers = optimizers_of(model)
    inner = [getattr(o, "inner_optimizer", None) for o in optimizers]
    return any(is_distributed(o) for o in [*optimizers, *inner])


def _fit_together(
    keras_fit: Fit, model: keras.Model, *args: Any, **kwargs: Any
) -> keras.callbacks.History:
    """Train a model that has a DistributedOptimizer."""
    # Refuse what can't work on several ranks.
    check_started()
    if refusal := _refusal_of_model(model):
        raise ValueError(refusal)
    _switch_off_compiler(model)

    # Keras's own `fit` does where there is nobody to agree with, and where ranks come and go.
    if collectives.size() == 1 or elastic.wanted():
        return keras_fit(model, *args, **kwargs)
    agreement = _agreement_of(model)
    if agreement is None:
        return keras_fit(model, *args, **kwargs)

    # One callback takes the place of the user's.
    call = inspect.signature(keras_fit).bind(model, *args, **kwargs)
    callbacks = _listed(call.arguments.get("callbacks"))
    keras_callbacks = [c for c in callbacks if isinstance(c, _KERAS_OWN)]
    user_callbacks = [c for c in callbacks if not isinstance(c, _KERAS_OWN)]
    together = Together(user_callbacks, agreement, facts.refusal_of_callbacks(user_callbacks))
    call.arguments["callbacks"] = [together, *keras_callbacks]

    # Record the calls of each step: a rank without data repeats them.
    with _recorded_steps(model), rollcall.failure_announced():
        return keras_fit(*call.args, **call.kwargs)


def _refusal_of_model(model: keras.Model) -> str:
    """Return why a model can't be trained, on any number of ranks. Empty: it can."""
    if any(is_distributed(getattr(o, "inner_optimizer", None)) for o in optimizers_of(model)):
        return (
            "the LossScaleOptimizer is outside the DistributedOptimizer, so that ranks would "
            "disagree about overflows and hang; use "
            "DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer))"
        )
    distribution = keras.distribution.distribution()
    strategy = type(distribution).__name__ if distribution is not None else backend.strategy()
    if strategy:
        return f"{strategy} and a DistributedOptimizer both average the gradients; use one of them"
    return ""


def _switch_off_compiler(model: keras.Model) -> None:
    """Switch off XLA and PyTorch's compiler, which can't compile Horovod's operations."""
    if not model.jit_compile:
        return
    if backend.FRAMEWORK == "torch" and collectives.rank() == 0:
        warnings.warn(
            "jit_compile=True is left out: PyTorch's compiler can't compile an allreduce",
            stacklevel=4,
        )
    model.jit_compile = False
    model.make_train_function(force=True)


def _agreement_of(model: keras.Model) -> Agreement | None:
    """Return the agreement of the model's optimizers, made at their first `fit`.

    None where they reduce over a part of the ranks: the others know nothing of it.
    """
    # The optimizers that reduce over all ranks.
    reductions = [r for r in map(reduction_of, optimizers_of(model)) if r is not None]
    if any(r.process_set.process_set_id for r in reductions):
        return None

    # An agreement of another size is of the job before a shutdown.
    agreements = [r.agreement for r in reductions if r.agreement is not None]
    of_this_size = [a for a in agreements if a.size == collectives.size()]
    agreement = of_this_size[0] if of_this_size else Agreement()
    for reduction in reductions:
        reduction.agreement = agreement

    # The step must be traced with the word in it.
    if model not in agreement.calls:
        agreement.calls[model] = None
        if model.train_function is not None:  # traced without the agreement's word
            model.make_train_function(force=True)
    return agreement


def _listed(callbacks: Any) -> list[keras.callbacks.Callback]:
    """Return what `fit(callbacks=…)` was given, in any of the forms that Keras takes, as a list."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks.callbacks
    return keras.tree.flatten(callbacks or [])


@contextlib.contextmanager
def _recorded_steps(model: keras.Model) -> Iterator[None]:
    """Make the model's step begin a new record each time that it runs or is traced."""
    # The step as it is, the user's or the model's.
    users_own = vars(model).get("train_step")  # set on the model, not in its class
    train_step = model.train_step

    @functools.wraps(train_step)
    def recorded_step(*args: Any, **kwargs: Any) -> Any:
        recording.start()
        return train_step(*args, **kwargs)

    # Put it back when the training is over.
    model.train_step = recorded_step
    try:
        yield
    finally:
        del model.train_step
        if users_own is not None:
            model.train_step = users_own
