"""SGD whose velocity is free of the learning rate: changing it needs no momentum correction."""

import keras
from keras import ops

from recipe.keras.tensors import Tensor


@keras.saving.register_keras_serializable("recipe")
class SGD(keras.optimizers.SGD):
    """u ← mu + g, w ← w − ηu (paper, eq. 9), or w ← w − η(g + mu) with `nesterov`, as in PyTorch.

    The arguments are those of `keras.optimizers.SGD`, and at a constant rate so are the weights.
    That one folds η into its velocity (eq. 10), and needs the correction of remark 2 whenever η
    changes. Here η may come from a schedule inside the traced step.
    """

    def update_step(
        self, gradient: Tensor, variable: keras.Variable, learning_rate: Tensor
    ) -> None:
        """Update one variable and its velocity."""
        rate = ops.cast(learning_rate, variable.dtype)
        gradient = ops.cast(gradient, variable.dtype)
        update = gradient
        if self.momentum:
            velocity = self.momentums[self._get_variable_index(variable)]
            self.assign(velocity, ops.add(ops.multiply(velocity, self.momentum), gradient))
            update = velocity
            if self.nesterov:
                update = ops.add(gradient, ops.multiply(velocity, self.momentum))
        self.assign_sub(variable, ops.multiply(rate, update))
