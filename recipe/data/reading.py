"""Reads examples by index: their labels, and a box of each image as size² uint8 pixels."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from recipe.data import decode
from recipe.data.decode import Cut, Problem
from recipe.data.images import image_shape
from recipe.data.sources import EncodedSource, Source
from recipe.data.synthetic import SyntheticSource

# (shapes int[b, 2] in pixels, indices int[b]) → how these images are cut.
Cutter = Callable[[np.ndarray, np.ndarray], Cut]


class Reading(NamedTuple):
    """What was read."""

    labels: np.ndarray  # int32[b]
    problems: list[Problem]  # what is wrong with images, in their order


def read(source: Source, indices: np.ndarray, cutter: Cutter, out: np.ndarray) -> Reading:
    """Read these examples, and their images into `out`, uint8[b, size, size, 3].

    The pixels of an image that is wrong are undefined. Raise RunError naming an example that can't
    be read.
    """
    if isinstance(source, SyntheticSource):
        out[:] = source.images(indices, out.shape[1])
        return Reading(source.labels(indices), [])
    return _read_encoded(source, indices, cutter, out)


def _read_encoded(
    source: EncodedSource, indices: np.ndarray, cutter: Cutter, out: np.ndarray
) -> Reading:
    encoded, labels = source.read(indices)

    # The boxes depend on the images' sizes, which their heads say.
    shapes = np.ones((len(encoded), 2), dtype=np.int64)
    problems: dict[int, Problem] = {}
    for place, image in enumerate(encoded):
        try:
            shapes[place] = image_shape(image)
        except ValueError as error:
            problems[place] = Problem(place, f"is not an image: {error}")

    for place, message in decode.decode(encoded, cutter(shapes, indices), out):
        problems.setdefault(place, Problem(place, f"can't be decoded: {message}"))
    return Reading(labels, sorted(problems.values()))
