"""The usual training patterns of Keras on 2 real ranks, beside one process on the whole minibatch, on both backends.

Not compared with one process as it is: a pattern that draws noise does so on each rank by rank 0's seeds, and one that
contrasts examples with each other contrasts those of its rank. There one process does it with each half of its batch.
"""

import functools
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import ROOT, results

PROGRAM = str(ROOT / "tests/recipe/keras/patterns_program.py")
PATTERNS = (
    "own_step",
    "custom_loss",
    "vae",
    "gan",
    "wgan_gp",
    "simclr",
    "distillation",
    "transfer",
    "subclassed",
    "sequential_without_input",
    "two_inputs_and_outputs",
    "mixed_float16",
    "loop_apply",
    "loop_apply_gradients",
)

# A gradient is a float32 sum of 16 terms, added in another order on 2 ranks: 1e-6 of it, over 4 to 12 updates of
# η ≤ 0.05 on weights around 1. The smallest mistake, a gradient of half the minibatch, is 1e-3.
ROUNDING = {"rtol": 1e-5, "atol": 5e-6}
# Gradients and activations in float16 have 11 bits, and a half's gradient is rounded before the halves are averaged:
# 2^-11 of it, over 4 updates of η = 0.05.
HALF_PRECISION = {"rtol": 1e-3, "atol": 1e-4}

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Trains all patterns once for each backend and size; gives one pattern's findings on every rank."""

    @functools.cache
    def ranks(backend: str, size: int) -> list[dict]:
        folder: Path = tmp_path_factory.mktemp(f"patterns-{backend}-{size}")
        return results(folder, size, PROGRAM, KERAS_BACKEND=backend)

    return lambda pattern, backend, size: [found[pattern] for found in ranks(backend, size)]


@pytest.fixture(params=("tensorflow", "torch"))
def backend(request) -> str:
    return request.param


@pytest.fixture(params=PATTERNS)
def pattern(request) -> str:
    return request.param


@pytest.fixture(params=(1, 2))
def size(request) -> int:
    return request.param


def tolerance(pattern: str) -> dict[str, float]:
    return HALF_PRECISION if pattern == "mixed_float16" else ROUNDING


def test_the_weights_are_those_of_one_process(run, pattern, backend, size):
    """All of them: those of a frozen teacher or base and moving statistics too, which begin as rank 0's."""
    plain = run(pattern, backend, 1)[0]["plain"]
    for found in run(pattern, backend, size):
        for mine, expected in zip(found["wrapped"]["weights"], plain["weights"], strict=True):
            np.testing.assert_allclose(mine, expected, **tolerance(pattern))


def test_the_logs_are_those_of_one_process(run, pattern, backend, size):
    plain = run(pattern, backend, 1)[0]["plain"]
    for found in run(pattern, backend, size):
        logs = found["wrapped"]["logs"]
        assert logs.keys() == plain["logs"].keys()
        for name, expected in plain["logs"].items():
            np.testing.assert_allclose(logs[name], expected, **tolerance(pattern), err_msg=name)


def test_the_replicas_and_their_logs_are_equal_to_the_bit(run, pattern, backend):
    first, second = (found["wrapped"] for found in run(pattern, backend, 2))
    for one, other in zip(first["weights"], second["weights"], strict=True):
        np.testing.assert_array_equal(one, other)
    assert first["logs"] == second["logs"]


def test_nothing_is_said(run, pattern, backend, size):
    """Neither by this project nor, because of it, by Keras: no more than plain Keras says, but for NumPy's words on
    Keras's variables."""
    plain = run(pattern, backend, 1)[0]["plain"]["warnings"]
    for found in run(pattern, backend, size):
        assert not [
            w for w in found["wrapped"]["warnings"] if w not in plain and "__array__" not in w
        ]


def test_what_is_compared_has_been_trained(run, pattern, backend):
    """By far more than the tolerance: the logs go on."""
    for name, numbers in run(pattern, backend, 1)[0]["plain"]["logs"].items():
        assert abs(numbers[-1] - numbers[0]) > 20 * tolerance(pattern)["rtol"] * abs(numbers[0]), (
            name
        )
