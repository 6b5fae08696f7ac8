"""The usual training patterns of Keras on 2 real ranks, beside one process on the whole minibatch.

Two kinds are not compared with one process as it is. A pattern that draws noise does so on each
rank by rank 0's seeds. One that contrasts examples with each other contrasts those of its rank.
There one process does it with each half of its batch.
"""

import functools
import warnings
from typing import NamedTuple

import keras
import numpy as np
import pytest

import recipe.keras as hvd
from recipe.keras.callbacks import BroadcastState, MetricSums, ReplicaCheck
from tests.pools import run_on_ranks
from tests.recipe.keras.comparing import Weights, assert_same, values
from tests.recipe.keras.patterns import PATTERNS, Logs, MakeCallbacks, Wrap

# A gradient is a float32 sum of 16 terms, added in another order on 2 ranks: 1e-6 of it, over 4 to
# 12 updates of η ≤ 0.05 on weights around 1. The smallest mistake, a gradient of half the
# minibatch, is 1e-3.
ROUNDING = {"rtol": 1e-5, "atol": 5e-6}
# Gradients and activations in float16 have 11 bits, and a half's gradient is rounded before the
# halves are averaged: 2^-11 of it, over 4 updates of η = 0.05.
HALF_PRECISION = {"rtol": 1e-3, "atol": 1e-4}

on_1_and_2_ranks = pytest.mark.parametrize("size", (1, 2))
of_each_pattern = pytest.mark.parametrize("pattern", PATTERNS)
pytestmark = pytest.mark.ranks


class Trained(NamedTuple):
    """What a rank has after the training of a pattern."""

    weights: Weights
    logs: Logs
    warnings: set[str]


def train(pattern: str, wrap: Wrap, make_callbacks: MakeCallbacks) -> Trained:
    """Train each rank from other weights on, rank 0 from those of the seed 100."""
    keras.utils.set_random_seed(100 + hvd.rank())
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        training = PATTERNS[pattern](wrap, make_callbacks)
    messages = {str(w.message) for w in caught_warnings}
    return Trained(values(training.variables), training.logs, messages)


def train_with_horovod(pattern: str) -> Trained:
    return train(
        pattern,
        wrap=hvd.DistributedOptimizer,
        make_callbacks=lambda: [
            BroadcastState(same_seeds=True),
            MetricSums(),
            ReplicaCheck(every=1),
        ],
    )


def train_by_keras_alone(pattern: str) -> Trained:
    return train(pattern, wrap=lambda optimizer: optimizer, make_callbacks=list)


@functools.cache
def trained_on(backend: str, size: int, pattern: str) -> list[Trained]:
    """Return what every rank has after one training with Horovod for all tests."""
    return run_on_ranks(backend, size, train_with_horovod, pattern=pattern)


@functools.cache
def trained_alone(backend: str, pattern: str) -> Trained:
    """Return what plain Keras has trained in one process, once for all tests."""
    (trained,) = run_on_ranks(backend, 1, train_by_keras_alone, pattern=pattern)
    return trained


def tolerance(pattern: str) -> dict[str, float]:
    return HALF_PRECISION if pattern == "mixed_float16" else ROUNDING


@on_1_and_2_ranks
@of_each_pattern
def test_the_weights_are_those_of_one_process(backend, pattern, size):
    """So are those of a frozen teacher or base, and moving statistics, which begin as rank 0's."""
    alone = trained_alone(backend, pattern)
    for trained in trained_on(backend, size, pattern):
        assert_same(trained.weights, alone.weights, **tolerance(pattern))


@on_1_and_2_ranks
@of_each_pattern
def test_the_logs_are_those_of_one_process(backend, pattern, size):
    alone = trained_alone(backend, pattern)
    for trained in trained_on(backend, size, pattern):
        assert trained.logs.keys() == alone.logs.keys()
        for name, expected in alone.logs.items():
            numbers = trained.logs[name]
            np.testing.assert_allclose(numbers, expected, **tolerance(pattern), err_msg=name)


@of_each_pattern
def test_the_replicas_and_their_logs_are_equal_to_the_bit(backend, pattern):
    first, second = trained_on(backend, 2, pattern)
    assert_same(second.weights, first.weights)
    assert second.logs == first.logs


@on_1_and_2_ranks
@of_each_pattern
def test_nothing_is_said(backend, pattern, size):
    """There is no warning that plain Keras doesn't give, but for NumPy's on Keras's variables."""
    alone = trained_alone(backend, pattern)
    for trained in trained_on(backend, size, pattern):
        more = trained.warnings - alone.warnings
        assert not [message for message in more if "__array__" not in message]


@of_each_pattern
def test_what_is_compared_has_been_trained(backend, pattern):
    """By far more than the tolerance: the logs go on."""
    for name, numbers in trained_alone(backend, pattern).logs.items():
        progress = abs(numbers[-1] - numbers[0])
        assert progress > 20 * tolerance(pattern)["rtol"] * abs(numbers[0]), name
