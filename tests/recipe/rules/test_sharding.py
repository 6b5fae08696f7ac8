"""Order and division of the examples: against a plain-Python model, and golden values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.errors import UsageError
from recipe.rules import sharding

examples = st.integers(0, 400)
workers = st.integers(1, 9)
batch = st.integers(1, 12)
remainder = st.sampled_from(["drop", "short"])


def epoch_slices(count: int, k: int, n: int, rest: str) -> list[list[list[int]]]:
    """[step][worker] → indices, by the functions under test."""
    order = sharding.permutation(count, 3, 1)
    return [
        [sharding.worker_indices(order, step, worker, k, n).tolist() for worker in range(k)]
        for step in range(sharding.steps_per_epoch(count, k, n, rest))
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
    assert sharding.permutation(1000, 0, 0)[:8].tolist() == [998, 162, 670, 664, 185, 322, 431, 318]


@given(examples, st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(1, 500))
def test_permutation_has_each_example_once(count: int, seed: int, epoch: int, block: int) -> None:
    order = sharding.permutation(count, seed, epoch, block)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


def test_a_block_stays_together_but_begins_elsewhere_in_each_epoch() -> None:
    """1000 examples in blocks of 8: 125 places of a jump at most, or 126 where the ends are short; 999 without."""
    orders = [sharding.permutation(1000, 0, epoch, 8) for epoch in range(20)]
    jumps = [set(order[1:][np.diff(order) != 1] % 8) for order in orders]
    for order in orders:
        assert 80 < np.count_nonzero(np.diff(order) != 1) <= 125
    assert all(len(found - {0}) <= 1 for found in jumps), (
        "blocks begin at one remainder, the first one at 0"
    )
    assert len(set().union(*jumps)) > 4
    firsts = {int(order[0]) for order in orders}
    assert len(firsts) > 15, "the blocks are shuffled"


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """Trap 10: neither another epoch nor seed + 1 repeats an order."""
    orders = {
        tuple(sharding.permutation(50, seed, epoch)) for seed in range(10) for epoch in range(10)
    }
    assert len(orders) == 100


@given(examples, workers, batch, remainder)
def test_division_follows_the_model(count: int, k: int, n: int, rest: str) -> None:
    expected = model(sharding.permutation(count, 3, 1).tolist(), k, n, rest)
    if not expected:
        with pytest.raises(
            UsageError, match=rf"{count} training examples .*config\.k={k}.*config\.n={n}"
        ):
            sharding.steps_per_epoch(count, k, n, rest)
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
    """Trap 11: a worker with fewer batches, or an empty one, would leave the others waiting in an allreduce."""
    if count < k * n:
        return
    for shares in epoch_slices(count, k, n, rest):
        sizes = [len(share) for share in shares]
        assert len(sizes) == k
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@given(examples, workers, batch)
def test_weighted_means_are_the_mean_over_the_minibatch(count: int, k: int, n: int) -> None:
    """Remark 3, and trap 9: k·n_j/M is not rounded to whole numbers."""
    if count < k:
        return
    losses = np.random.default_rng(0).normal(size=count)
    for step, shares in enumerate(epoch_slices(count, k, n, "short")):
        weights = [sharding.worker_weight(count, step, worker, k, n) for worker in range(k)]
        means = [w * losses[share].mean() for w, share in zip(weights, shares, strict=True)]
        everyone = losses[[i for share in shares for i in share]].mean()
        assert np.mean(means) == pytest.approx(everyone, rel=1e-12, abs=1e-12)
        if sum(len(share) for share in shares) == k * n:
            assert weights == [1.0] * k


def test_outside_of_the_epoch_there_is_nothing() -> None:
    order = np.arange(10)
    for step, worker in ((3, 0), (0, 2), (0, -1), (-1, 0)):
        with pytest.raises(IndexError, match=f"worker {worker} of 2"):
            sharding.worker_indices(order, step, worker, 2, 2)


@given(st.integers(1, 16), st.integers(1, 300))
def test_ranks_share_the_workers_in_order(size: int, each: int) -> None:
    shares = [sharding.own_workers(size * each, rank, size) for rank in range(size)]
    assert [worker for share in shares for worker in share] == list(range(size * each))
    assert {len(share) for share in shares} == {each}


@given(examples, st.integers(1, 50))
def test_evaluation_counts_every_example_once(count: int, size: int) -> None:
    """Trap 7: no remainder is dropped or counted twice, whatever divides what."""
    blocks = [sharding.eval_indices(count, rank, size) for rank in range(size)]
    assert np.concatenate(blocks).tolist() == list(range(count))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_paper_counts() -> None:
    assert sharding.steps_per_epoch(1_281_167, 256, 32, "drop") == 156
    assert sharding.steps_per_epoch(1_281_167, 256, 32, "short") == 157
    assert sharding.steps_per_epoch(1_281_167, 8, 32, "drop") == 5004


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 300))
def test_cuts_use_each_example_once_and_leave_no_rank_without(
    ranks: int, n: int, more: int
) -> None:
    count = ranks + more
    cuts = sharding.cuts(count, ranks * n, ranks)
    sizes = np.diff(cuts)
    begins, ends = zip(*(sharding.parts(cuts, rank, ranks) for rank in range(ranks)), strict=True)
    dealt = [
        i
        for step in range(len(sizes))
        for b, e in zip(begins, ends, strict=True)
        for i in range(b[step], e[step])
    ]
    assert dealt == list(range(count))
    counts = np.array(ends) - np.array(begins)
    assert counts.min() >= 1 and counts.max() <= n + (n == 1)
    assert np.all(np.ptp(counts, axis=0) <= 1)
    assert np.all(sizes[:-2] == ranks * n)


@given(st.integers(1, 300), st.sampled_from([2, 3, 4]))
def test_cuts_are_the_same_for_all_numbers_of_ranks(more: int, n: int) -> None:
    """A minibatch of 12n on 1 to 12 ranks, with two examples or more a rank."""
    cuts = [sharding.cuts(12 + more, 12 * n, ranks).tolist() for ranks in (1, 2, 3, 4, 6, 12)]
    assert all(c == cuts[0] for c in cuts)


@given(st.integers(1, 12), st.data(), st.integers(1, 40))
def test_shares_are_all_of_the_batches_left(size: int, data: st.DataObject, n: int) -> None:
    left = data.draw(st.integers(0, size - 1))
    shares = [sharding.shares(left, rank, size) for rank in range(size)]
    dealt = [
        (j, i) for share in shares for j, a, b in share for i in range(a * n // size, b * n // size)
    ]
    assert dealt == [(j, i) for j in range(left) for i in range(n)]
    assert all(len(share) <= 2 for share in shares)
    counts = [sum(b * n // size - a * n // size for _, a, b in share) for share in shares]
    assert max(counts) - min(counts) <= 3  # three cuts, each rounded down
