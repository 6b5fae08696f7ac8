"""Initial weights as a function of (seed, name), the same in every framework."""

import zlib

import numpy as np


def normal(shape: tuple[int, ...], std: float, seed: int, name: str) -> np.ndarray:
    """float32 draws from N(0, std²) for the weight called `name`."""
    key = np.array([seed, zlib.crc32(name.encode())], dtype=np.uint64)
    return (std * np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)).astype(np.float32)
