"""What batch normalisation makes of a batch, in any framework."""

from typing import Any, NamedTuple


class Normalised(NamedTuple):
    """A batch, each worker's part of it normalised, and the mean of the workers' statistics.

    The statistics are float32[channels]. The variance is the biased one, as in Keras and in the
    paper's normalisation.
    """

    output: Any
    mean: Any
    variance: Any
