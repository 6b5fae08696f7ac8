"""Types of what the backends take and hand back: TensorFlow and PyTorch share no class."""

from typing import Any, NamedTuple

Tensor = Any  # of the backend in use
Gradient = Any  # a tensor, a sparse one (TensorFlow: IndexedSlices), or None
Compressor = type[Any]  # a member of Compression, the framework's own
Variable = Any  # keras.Variable or the framework's own


class Reduced(NamedTuple):
    """What a reduction gives back."""

    gradients: list[Gradient]
    word: Tensor | None  # the sum of all ranks' words (see `agreement`); None if none was sent
