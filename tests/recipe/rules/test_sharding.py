"""The division of what people bring: each example once, and no rank without."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recipe.rules import sharding


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
