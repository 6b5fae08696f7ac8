"""Initial weights as a function of (seed, name), the same in every framework."""

import math
import zlib

import numpy as np

FC_STD = 0.01  # of the fully connected layer (paper, sec. 5.1)


def normal(shape: tuple[int, ...], std: float | None, seed: int, name: str) -> np.ndarray:
    """Return float32 draws from N(0, std²) for the weight of the Keras layer `name`.

    `shape` is Keras's. With std None it is He's initialisation as the paper's reference has it:
    std = √(2 / (kernel area · outputs)).
    """
    if std is None:
        kernel_area = math.prod(shape[:-2])
        outputs = shape[-1]
        std = math.sqrt(2 / (kernel_area * outputs))
    key = np.array([seed, zlib.crc32(name.encode())], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    return (std * generator.standard_normal(shape)).astype(np.float32)
