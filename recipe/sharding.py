"""(seed, epoch) → order of the examples; (step, worker) → example indices. Pure functions of their arguments, NumPy only."""

import numpy as np

from recipe.errors import UsageError


def permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    """int64[examples]: one random order of the whole training set for one epoch (paper, remark 4).

    Ranks the raw 64-bit words of Philox with key (seed, epoch). NumPy promises that stream for ever;
    it does not promise that Generator.permutation stays as it is."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(examples)
    return np.argsort(words, kind="stable").astype(np.int64)


def steps_per_epoch(examples: int, minibatch: int, workers: int, remainder: str) -> int:
    """Steps in an epoch of `examples` with a minibatch of kn = `minibatch` examples over k = `workers`.

    "drop" is the paper's floor(N/kn): the N mod kn examples that an epoch's order puts last wait for another epoch.
    "short" gives them a last, short minibatch, unless they are fewer than k, so that each worker has at least one.
    Raises UsageError when no step remains."""
    steps, rest = divmod(examples, minibatch)
    if remainder == "short" and rest >= workers:
        steps += 1
    if steps == 0:
        short = f"config.k={workers} workers" if remainder == "short" else f"one minibatch of kn={minibatch}"
        raise UsageError(
            f"{examples} training examples are not enough for {short}: "
            "lower config.n or config.k, or set config.data.remainder='short'"
            if remainder == "drop"
            else f"{examples} training examples are not enough for {short}: lower config.k"
        )
    return steps
