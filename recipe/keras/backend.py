"""Chooses Horovod's side of the Keras backend in use."""

import os
from typing import Any

# Refuse another backend before Keras looks for it.
if os.environ.get("KERAS_BACKEND", "tensorflow") not in ("tensorflow", "torch"):
    raise ImportError(
        f"Horovod has no binding for Keras's {os.environ['KERAS_BACKEND']!r} backend; "
        "set KERAS_BACKEND=tensorflow or KERAS_BACKEND=torch"
    )

import keras

FRAMEWORK = keras.backend.backend()

_module: Any
if FRAMEWORK == "tensorflow":
    from recipe.keras import backend_tensorflow as _module
elif FRAMEWORK == "torch":
    from recipe.keras import backend_torch as _module
else:
    raise ImportError(
        f"Horovod has no binding for Keras's {FRAMEWORK!r} backend; "
        "set KERAS_BACKEND=tensorflow or KERAS_BACKEND=torch"
    )

DEVICES = _module.DEVICES
OVERLAP_GROUPS = _module.OVERLAP_GROUPS
WORD_ALONE = _module.WORD_ALONE
Compression = _module.Compression
horovod = _module.hvd
after = _module.after
array = _module.array
broadcast = _module.broadcast
compiled = _module.compiled
dense = _module.dense
divided = _module.divided
divided_by_size = _module.divided_by_size
gathered_bytes = _module.gathered_bytes
kind = _module.kind
nothing = _module.nothing
prepare = _module.prepare
random_state = _module.random_state
reduce = _module.reduce
set_random_state = _module.set_random_state
strategy = _module.strategy
sum_word = _module.sum_word
take_over = _module.take_over
total = _module.total
without_gradients = _module.without_gradients
zeros = _module.zeros
