"""Order and division of an epoch: against a plain-Python model, and golden values."""

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


def epoch_slices(count: int, k: int, n: int, rest: str) -> list[list[list[int]]]:
    """[step][worker] → indices, by the functions under test."""
    order, epoch = permutation(count, 3, 1), Epoch(count, k, n, rest)
    return [
        [epoch.indices(order, step, worker).tolist() for worker in range(k)]
        for step in range(epoch.steps)
    ]


def model(order: list[int], k: int, n: int, rest: str) -> list[list[list[int]]]:
    """The same, dealt out card by card."""
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
    """1000 examples in blocks of 8: 125 places of a jump at most, or 126 where the ends are short; 999 without."""
    orders = [permutation(1000, 0, epoch, 8) for epoch in range(20)]
    jumps = [set(order[1:][np.diff(order) != 1] % 8) for order in orders]
    for order in orders:
        assert 80 < np.count_nonzero(np.diff(order) != 1) <= 125
    assert all(len(jump - {0}) <= 1 for jump in jumps), (
        "blocks begin at one remainder, the first one at 0"
    )
    assert len(set().union(*jumps)) > 4
    firsts = {int(order[0]) for order in orders}
    assert len(firsts) > 15, "the blocks are shuffled"


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """Neither another epoch nor seed + 1 repeats an order."""
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@given(examples, workers, batch, remainder)
def test_division_follows_the_model(count: int, k: int, n: int, rest: str) -> None:
    expected = model(permutation(count, 3, 1).tolist(), k, n, rest)
    if not expected:
        with pytest.raises(
            UsageError, match=rf"{count} training examples .*config\.k={k}.*config\.n={n}"
        ):
            Epoch(count, k, n, rest)
        return
    assert epoch_slices(count, k, n, rest) == expected


@given(examples, workers, batch, remainder)
def test_each_example_at_most_once_an_epoch(count: int, k: int, n: int, rest: str) -> None:
    if count < k * n:
        return
    seen = [i for step in epoch_slices(count, k, n, rest) for share in step for i in share]
    left = count % (k * n)
    missing = left if rest == "drop" or left < k else 0
    assert len(seen) == len(set(seen)) == count - missing


@given(examples, workers, batch, remainder)
def test_no_worker_is_ever_without_examples(count: int, k: int, n: int, rest: str) -> None:
    """A worker with fewer batches, or an empty one, would leave the others waiting in an allreduce."""
    if count < k * n:
        return
    for shares in epoch_slices(count, k, n, rest):
        sizes = [len(share) for share in shares]
        assert len(sizes) == k
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@given(examples, workers, batch)
def test_weighted_means_are_the_mean_over_the_minibatch(count: int, k: int, n: int) -> None:
    """Remark 3: k·n_j/M is not rounded to whole numbers."""
    if count < k:
        return
    losses, epoch = np.random.default_rng(0).normal(size=count), Epoch(count, k, n, "short")
    for step, shares in enumerate(epoch_slices(count, k, n, "short")):
        weights = [epoch.weight(step, worker) for worker in range(k)]
        means = [w * losses[share].mean() for w, share in zip(weights, shares, strict=True)]
        everyone = losses[[i for share in shares for i in share]].mean()
        assert np.mean(means) == pytest.approx(everyone, rel=1e-12, abs=1e-12)
        if sum(len(share) for share in shares) == k * n:
            assert weights == [1.0] * k


def test_outside_of_the_epoch_there_is_nothing() -> None:
    order, epoch = np.arange(10), Epoch(10, k=2, n=2)
    for step, worker in ((3, 0), (0, 2), (0, -1), (-1, 0)):
        with pytest.raises(IndexError, match=f"worker {worker} of 2"):
            epoch.indices(order, step, worker)


@given(st.integers(1, 16), st.integers(1, 300))
def test_ranks_share_the_workers_in_order(size: int, each: int) -> None:
    recipe = Recipe(k=size * each)
    shares = [Share.of(recipe, rank, size).workers for rank in range(size)]
    assert [worker for share in shares for worker in share] == list(range(size * each))
    assert {len(share) for share in shares} == {each}


@given(examples, st.integers(1, 50))
def test_evaluation_counts_every_example_once(count: int, size: int) -> None:
    """No remainder is dropped or counted twice, whatever divides what."""
    blocks = [eval_indices(count, rank, size) for rank in range(size)]
    assert np.concatenate(blocks).tolist() == list(range(count))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_paper_counts() -> None:
    assert Epoch(1_281_167, 256, 32, "drop").steps == 156
    assert Epoch(1_281_167, 256, 32, "short").steps == 157
    assert Epoch(1_281_167, 8, 32, "drop").steps == 5004
