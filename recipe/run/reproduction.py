"""What `recipe.fingerprint` compares: digests of the order, the images and the weights."""

import math
import zlib

import numpy as np

from recipe.data.element import Element
from recipe.ranks import collectives
from recipe.system.arrays import Arrays


class FirstImages:
    """The checksums of the images that this rank's workers see in the run's first step."""

    def __init__(self, workers_at_once: int) -> None:
        self._workers_at_once = workers_at_once
        self._checksums: list[int] = []

    def add(self, element: Element) -> None:
        """Take the checksums of an element's images."""
        for images in np.split(element.images, self._workers_at_once):
            self._checksums.append(zlib.crc32(np.ascontiguousarray(images).data))

    def digest(self) -> str:
        """Return the digest of all workers' images. Collective."""
        per_rank = collectives.gather(self._checksums, "first_images")
        checksums = np.concatenate(per_rank).astype(np.int64)
        return f"{zlib.crc32(checksums.data):08x}"


def order_digest(order: np.ndarray) -> str:
    """Return the digest of an epoch's order."""
    return f"{zlib.crc32(order.data):08x}"


def norm(weights: Arrays) -> float:
    """Return the Euclidean norm of all weights.

    It tells a difference of rounding from a real one, as no digest can.
    """
    squares = (float(np.square(w, dtype=np.float64).sum()) for w in weights.values())
    return math.sqrt(sum(squares))
