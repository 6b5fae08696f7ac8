"""Seeds of random layers: a rank's own, a function of the root rank's seed and the rank."""

import keras
import numpy as np


def states(model: keras.Model) -> list[keras.Variable]:
    """Return the states (seed, counter) of all SeedGenerators in the model's layers.

    Nested layers are included.
    """
    return [generator.state for generator in _generators(model)]


def draw_by_state(model: keras.Model) -> None:
    """Make all random layers draw by their states.

    With PyTorch, a layer that was made without a seed drops out by PyTorch's global generator.
    Neither a broadcast nor a checkpoint would then determine its masks.
    """
    for generator in _generators(model):
        if generator._initial_seed is None:
            generator._initial_seed = int(keras.ops.convert_to_numpy(generator.state)[0])


def of_rank(state: np.ndarray, rank: int, root_rank: int = 0) -> np.ndarray:
    """Return the root's (seed, counter) as this rank has it: another seed, the same counter.

    The root keeps its own. The seed is the first word of Philox with the key (seed, rank), 31 bits
    of it, as a state may be an int32.
    """
    if rank == root_rank:
        return state
    place = rank + 1 if rank < root_rank else rank  # 1, 2, …: 0 is the root's
    key = np.array([int(state[0]) % 2**64, place], dtype=np.uint64)
    seed = int(np.random.Philox(key=key).random_raw() >> np.uint64(33))
    return np.array([seed, state[1]], dtype=state.dtype)


def _generators(model: keras.Model) -> list[keras.random.SeedGenerator]:
    return [generator for layer in model._flatten_layers() for generator in layer._seed_generators]
