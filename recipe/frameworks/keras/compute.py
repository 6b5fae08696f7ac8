"""Chooses how a rank computes: by the Keras backend in use."""

from recipe.keras import backend

__all__ = ["decayed", "gradients", "normalised", "on_device", "use_local_device"]

if backend.FRAMEWORK == "tensorflow":
    from recipe.frameworks.keras.compute_tensorflow import (
        decayed,
        gradients,
        normalised,
        on_device,
        use_local_device,
    )
else:
    from recipe.frameworks.keras.compute_torch import (
        decayed,
        gradients,
        normalised,
        on_device,
        use_local_device,
    )
