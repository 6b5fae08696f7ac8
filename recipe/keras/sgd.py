"""SGD whose velocity is free of the learning rate, so that changing the rate needs no momentum correction."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("recipe")
class SGD(keras.optimizers.SGD):
    """u ← mu + g, w ← w − ηu (paper, eq. 9), or w ← w − η(g + mu) with `nesterov`, as in PyTorch.

    The arguments, and at a constant rate the weights, are those of `keras.optimizers.SGD`, which folds η into its
    velocity (eq. 10) and then needs remark 2's correction whenever η changes. Here η may come from a schedule inside
    the traced step."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        rate = ops.cast(learning_rate, variable.dtype)
        update = gradient = ops.cast(gradient, variable.dtype)
        if self.momentum:
            velocity = self.momentums[self._get_variable_index(variable)]
            self.assign(velocity, ops.add(ops.multiply(velocity, self.momentum), gradient))
            update = (
                ops.add(gradient, ops.multiply(velocity, self.momentum))
                if self.nesterov
                else velocity
            )
        self.assign_sub(variable, ops.multiply(rate, update))
