"""The recipe's replica in Keras 3: the network, the step, the state."""

# Before Keras is: it refuses a backend for which Horovod has no binding.
import recipe.keras.backend  # noqa: F401
