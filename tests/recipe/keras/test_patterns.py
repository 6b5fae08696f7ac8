"""The usual training patterns of Keras on 2 real ranks, beside one process on the whole minibatch.

Two kinds are not compared with one process as it is. A pattern that draws noise does so on each
rank by rank 0's seeds. One that contrasts examples with each other contrasts those of its rank.
There one process does it with each half of its batch.
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

# A gradient is a float32 sum of 16 terms, added in another order on 2 ranks: 1e-6 of it, over 4 to
# 12 updates of η ≤ 0.05 on weights around 1. The smallest mistake, a gradient of half the
# minibatch, is 1e-3.
ROUNDING = {"rtol": 1e-5, "atol": 5e-6}
# Gradients and activations in float16 have 11 bits, and a half's gradient is rounded before the
# halves are averaged: 2^-11 of it, over 4 updates of η = 0.05.
HALF_PRECISION = {"rtol": 1e-3, "atol": 1e-4}

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Train all patterns once for each backend and size; return one pattern's results by rank."""

    @functools.cache
    def ranks(backend: str, size: int) -> list[dict]:
        folder: Path = tmp_path_factory.mktemp(f"patterns-{backend}-{size}")
        return results(folder, size, PROGRAM, KERAS_BACKEND=backend)

    def of_pattern(pattern: str, backend: str, size: int) -> list[dict]:
        return [of_rank[pattern] for of_rank in ranks(backend, size)]

    return of_pattern


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
    """So are those of a frozen teacher or base, and moving statistics, which begin as rank 0's."""
    plain = run(pattern, backend, 1)[0]["plain"]
    for of_rank in run(pattern, backend, size):
        for weight, expected in zip(of_rank["wrapped"]["weights"], plain["weights"], strict=True):
            np.testing.assert_allclose(weight, expected, **tolerance(pattern))


def test_the_logs_are_those_of_one_process(run, pattern, backend, size):
    plain = run(pattern, backend, 1)[0]["plain"]
    for of_rank in run(pattern, backend, size):
        logs = of_rank["wrapped"]["logs"]
        assert logs.keys() == plain["logs"].keys()
        for name, expected in plain["logs"].items():
            np.testing.assert_allclose(logs[name], expected, **tolerance(pattern), err_msg=name)


def test_the_replicas_and_their_logs_are_equal_to_the_bit(run, pattern, backend):
    first, second = (of_rank["wrapped"] for of_rank in run(pattern, backend, 2))
    for one, other in zip(first["weights"], second["weights"], strict=True):
        np.testing.assert_array_equal(one, other)
    assert first["logs"] == second["logs"]


def test_nothing_is_said(run, pattern, backend, size):
    """There is no warning that plain Keras doesn't give, but for NumPy's on Keras's variables."""
    plain = run(pattern, backend, 1)[0]["plain"]["warnings"]
    for of_rank in run(pattern, backend, size):
        more = [w for w in of_rank["wrapped"]["warnings"] if w not in plain]
        assert not [w for w in more if "__array__" not in w]


def test_what_is_compared_has_been_trained(run, pattern, backend):
    """By far more than the tolerance: the logs go on."""
    logs = run(pattern, backend, 1)[0]["plain"]["logs"]
    for name, numbers in logs.items():
        progress = abs(numbers[-1] - numbers[0])
        assert progress > 20 * tolerance(pattern)["rtol"] * abs(numbers[0]), name
