"""Chooses Horovod's side of the Keras backend in use."""

import os

if os.environ.get("KERAS_BACKEND", "tensorflow") not in ("tensorflow", "torch"):  # Keras would look for it first
    raise ImportError(
        f"Horovod has no binding for Keras's {os.environ['KERAS_BACKEND']!r} backend; "
        "set KERAS_BACKEND=tensorflow or KERAS_BACKEND=torch"
    )

import keras

if keras.backend.backend() == "tensorflow":
    from recipe.keras import backend_tensorflow as _module
elif keras.backend.backend() == "torch":
    from recipe.keras import backend_torch as _module
else:
    raise ImportError(
        f"Horovod has no binding for Keras's {keras.backend.backend()!r} backend; "
        "set KERAS_BACKEND=tensorflow or KERAS_BACKEND=torch"
    )

FRAMEWORK = keras.backend.backend()
DEVICES = _module.DEVICES
Compression = _module.Compression
horovod = _module.hvd
broadcast = _module.broadcast
compiled = _module.compiled
dense = _module.dense
divided_by_size = _module.divided_by_size
gradients = _module.gradients
on_device = _module.on_device
random_state = _module.random_state
reduce = _module.reduce
set_random_state = _module.set_random_state
total = _module.total
use_local_device = _module.use_local_device
