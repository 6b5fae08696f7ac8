"""Order and division of an epoch's examples: against a plain-Python model, and golden values."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.config import Recipe
from recipe.errors import UsageError
from recipe.rules.epoch import Epoch, Share, eval_indices, permutation

examples = st.integers(0, 400)
workers = st.integers(1, 9)
batch = st.integers(1, 12)
remainder = st.sampled_from(["drop", "short"])

Step = list[list[int]]  # [worker] → the indices of its examples


def divided(count: int, k: int, n: int, rest: str) -> list[Step]:
    """Divide an epoch by the functions under test."""
    epoch = Epoch(count, k, n, rest)
    order = permutation(count, 3, 1)
    return [
        [epoch.indices(order, step, worker).tolist() for worker in range(k)]
        for step in range(epoch.steps)
    ]


def model(order: list[int], k: int, n: int, rest: str) -> list[Step]:
    """Divide an epoch by dealing the examples out card by card."""
    steps = []
    while len(order) >= k * n:
        minibatch, order = order[: k * n], order[k * n :]
        steps.append([minibatch[j * n : (j + 1) * n] for j in range(k)])
    if rest == "short" and len(order) >= k:
        sizes = [0] * k
        for card in range(len(order)):
            sizes[card % k] += 1
        hands = []
        for size in sizes:
            hands.append(order[:size])
            order = order[size:]
        steps.append(hands)
    return steps


def test_permutation_is_golden() -> None:
    assert permutation(1000, 0, 0)[:8].tolist() == [998, 162, 670, 664, 185, 322, 431, 318]


@given(examples, st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(1, 500))
def test_permutation_has_each_example_once(count: int, seed: int, epoch: int, block: int) -> None:
    order = permutation(count, seed, epoch, block)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


def test_a_block_stays_together_but_begins_elsewhere_in_each_epoch() -> None:
    """1000 examples in blocks of 8 have 125 jumps at most, or 126 where the ends are short.

    Without blocks there would be 999.
    """
    orders = [permutation(1000, 0, epoch, 8) for epoch in range(20)]
    beginnings = set()
    for order in orders:
        jumps = np.diff(order) != 1
        assert 80 < np.count_nonzero(jumps) <= 125
        # The blocks of an epoch begin at one remainder, only the first one at 0.
        remainders = set(order[1:][jumps] % 8)
        assert len(remainders - {0}) <= 1
        beginnings |= remainders
    assert len(beginnings) > 4
    first_examples = {int(order[0]) for order in orders}
    assert len(first_examples) > 15, "the blocks are shuffled"


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """Neither another epoch nor seed + 1 repeats an order."""
    orders = set()
    for seed in range(10):
        orders |= {tuple(permutation(50, seed, epoch)) for epoch in range(10)}
    assert len(orders) == 100


@given(examples, workers, batch, remainder)
def test_division_follows_the_model(count: int, k: int, n: int, rest: str) -> None:
    expected = model(permutation(count, 3, 1).tolist(), k, n, rest)
    if expected:
        assert divided(count, k, n, rest) == expected
        return
    message = rf"{count} training examples .*config\.k={k}.*config\.n={n}"
    with pytest.raises(UsageError, match=message):
        Epoch(count, k, n, rest)


@given(examples, workers, batch, remainder)
def test_each_example_at_most_once_an_epoch(count: int, k: int, n: int, rest: str) -> None:
    if count < k * n:
        return
    dealt = []
    for step in divided(count, k, n, rest):
        for own_batch in step:
            dealt += own_batch
    left = count % (k * n)
    missing = left if rest == "drop" or left < k else 0
    assert len(dealt) == len(set(dealt)) == count - missing


@given(examples, workers, batch, remainder)
def test_no_worker_is_ever_without_examples(count: int, k: int, n: int, rest: str) -> None:
    """A worker without a batch, or with an empty one, would leave the others in an allreduce."""
    if count < k * n:
        return
    for step in divided(count, k, n, rest):
        sizes = [len(own_batch) for own_batch in step]
        assert len(sizes) == k
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@given(examples, workers, batch)
def test_weighted_means_are_the_mean_over_the_minibatch(count: int, k: int, n: int) -> None:
    """The paper's remark 3; k·n_j/M is not rounded to whole numbers."""
    if count < k:
        return
    epoch = Epoch(count, k, n, "short")
    losses = np.random.default_rng(0).normal(size=count)
    for step, batches in enumerate(divided(count, k, n, "short")):
        weights = [epoch.weight(step, worker) for worker in range(k)]
        batch_means = np.array([losses[own_batch].mean() for own_batch in batches])
        minibatch = np.concatenate(batches)
        expected = losses[minibatch].mean()
        assert np.mean(weights * batch_means) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert len(minibatch) == epoch.minibatch(step)
        if len(minibatch) == k * n:
            assert weights == [1.0] * k


def test_outside_of_the_epoch_there_is_nothing() -> None:
    epoch = Epoch(10, 2, 2)
    for step, worker in ((3, 0), (0, 2), (0, -1), (-1, 0)):
        with pytest.raises(IndexError, match=f"worker {worker} of 2"):
            epoch.indices(np.arange(10), step, worker)


@given(st.integers(1, 16), st.integers(1, 300))
def test_ranks_share_the_workers_in_order(size: int, each: int) -> None:
    recipe = replace(Recipe(), k=size * each)
    shares = [Share.of(recipe, rank, size).workers for rank in range(size)]
    assert [worker for share in shares for worker in share] == list(range(size * each))
    assert {len(share) for share in shares} == {each}


@given(examples, st.integers(1, 50))
def test_evaluation_counts_every_example_once(count: int, size: int) -> None:
    """No remainder is dropped or counted twice, whatever divides what."""
    blocks = [eval_indices(count, rank, size) for rank in range(size)]
    assert np.concatenate(blocks).tolist() == list(range(count))
    sizes = [len(block) for block in blocks]
    assert max(sizes) - min(sizes) <= 1


def test_paper_counts() -> None:
    assert Epoch(1_281_167, 256, 32, "drop").steps == 156
    assert Epoch(1_281_167, 256, 32, "short").steps == 157
    assert Epoch(1_281_167, 8, 32, "drop").steps == 5004
