"""Chooses how a rank computes: by the Keras backend in use."""

from typing import Any

from recipe.keras import backend

_module: Any
if backend.FRAMEWORK == "tensorflow":
    from recipe.frameworks.keras import compute_tensorflow as _module
else:
    from recipe.frameworks.keras import compute_torch as _module

Gradients = _module.Gradients
Input = _module.Input
decayed = _module.decayed
normalised = _module.normalised
on_device = _module.on_device
use_local_device = _module.use_local_device
