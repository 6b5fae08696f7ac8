"""Initial weights as a function of (seed, name), the same in every framework."""

import math
import zlib

import numpy as np

FC_STD = 0.01  # of the fully connected layer (paper, sec. 5.1)


def normal(shape: tuple[int, ...], std: float | None, seed: int, name: str) -> np.ndarray:
    """float32 draws from N(0, std²) for the weight of the Keras layer `name`, in Keras's shape.

    With std None: He's initialisation as the paper's reference has it, std = √(2 / (kernel area · outputs))."""
    std = math.sqrt(2 / (math.prod(shape[:-2]) * shape[-1])) if std is None else std
    key = np.array([seed, zlib.crc32(name.encode())], dtype=np.uint64)
    return (std * np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)).astype(
        np.float32
    )
