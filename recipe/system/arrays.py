"""Named arrays, the state of a model: their structure and their digest."""

import hashlib

import numpy as np

from recipe.errors import RunError

Arrays = dict[str, np.ndarray]


def check_structure(shapes: dict[str, tuple], arrays: Arrays) -> None:
    """Compare a checkpoint's arrays with a replica's, which have these names and shapes.

    Raise RunError when an array is missing, unknown or of another shape.
    """
    # The same names.
    for name in arrays.keys() ^ shapes.keys():
        where = "the model lacks" if name in arrays else "the checkpoint lacks"
        raise RunError(
            f"{where} {name}: since the checkpoint config.model, its precision, "
            "config.optimizer.momentum, config.optimizer.compression or a library has changed, "
            "or the framework, for which there is `python -m recipe.convert`"
        )

    # The same shapes.
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise RunError(
                f"the checkpoint's {name} has the shape {arrays[name].shape}, "
                f"the model's {shape}; the checkpoint is of another model"
            )


def digest(arrays: Arrays) -> str:
    """Return the SHA-256 of names, types, shapes and values, in hexadecimal."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()
