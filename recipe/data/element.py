"""What the input pipeline yields: an element of training, or a batch of evaluation examples."""

from typing import NamedTuple

import numpy as np


class Element(NamedTuple):
    """The input of a forward pass: examples of one worker, or of run.workers_at_once of them."""

    images: np.ndarray  # uint8[b, s, s, 3]
    labels: np.ndarray  # int32[b]
    weights: np.ndarray  # float32[b], k·n_j/M of the example's worker (recipe.rules.epoch)
    keys: np.ndarray | None = None  # int64[b], only with model.dropout (recipe.rules.augment.keys)


class Examples(NamedTuple):
    """A batch of evaluation examples."""

    images: np.ndarray  # uint8[b, s, s, 3]
    labels: np.ndarray  # int32[b]
