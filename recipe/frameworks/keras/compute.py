"""Chooses how a rank computes: by the Keras backend in use."""

from recipe.keras import backend

if backend.FRAMEWORK == "tensorflow":
    from recipe.frameworks.keras import compute_tensorflow as _module
else:
    from recipe.frameworks.keras import compute_torch as _module

gradients = _module.gradients
on_device = _module.on_device
use_local_device = _module.use_local_device
