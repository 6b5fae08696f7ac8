"""Keras's SGD with the paper's weight decay, a part of the gradient (remark 1)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import keras

from recipe.frameworks.keras import compute

if TYPE_CHECKING:
    from keras.optimizers import SGD as _SGD
else:
    # On PyTorch, Keras makes another class of it, which updates all variables at once.
    _SGD = type(keras.optimizers.SGD.__new__(keras.optimizers.SGD))


@keras.saving.register_keras_serializable("recipe")
class DecayedSGD(_SGD):
    """`keras.optimizers.SGD` that adds λw to the gradient of every kernel w.

    So λw takes part in momentum, as the gradient of the penalty λ/2·‖w‖² does. Keras's own
    `weight_decay` doesn't. Kernels are the variables with more than one axis. The gradients that
    come in are those of the cross-entropy, already averaged over the ranks and free of a loss
    scale.
    """

    def __init__(self, *args: Any, decay: float = 0.0, **kwargs: Any) -> None:
        """Take Keras's arguments, and λ as `decay`."""
        super().__init__(*args, **kwargs)
        self.decay = decay

    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> None:
        """Add λw and update."""
        gradients = list(grads)
        variables = list(trainable_variables or self._trainable_variables)
        if self.decay:
            places = [i for i, variable in enumerate(variables) if is_decayed(variable)]
            kernels = [variables[i] for i in places]
            decayed = compute.decayed([gradients[i] for i in places], kernels, self.decay)
            for i, gradient in zip(places, decayed, strict=True):
                gradients[i] = gradient
        super().apply(gradients, variables)

    def get_config(self) -> dict:
        return super().get_config() | {"decay": self.decay}


def is_decayed(variable: keras.Variable) -> bool:
    """Return whether a variable is the kernel of a convolution or of the FC layer."""
    return len(variable.shape) > 1
