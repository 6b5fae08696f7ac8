"""How the library's ranks share examples: all of them, each once, and the same on any ranks."""

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
    minibatches = np.diff(cuts)
    parts = [sharding.parts(cuts, rank, ranks) for rank in range(ranks)]

    # Dealt out step by step, rank by rank, the examples come in their order.
    dealt: list[int] = []
    for step in range(len(minibatches)):
        for part in parts:
            dealt += range(part.begins[step], part.ends[step])
    assert dealt == list(range(count))

    counts = np.array([part.ends - part.begins for part in parts])  # [rank, step]
    assert counts.min() >= 1
    assert counts.max() <= n + (n == 1)
    assert np.all(np.ptp(counts, axis=0) <= 1)
    assert np.all(minibatches[:-2] == ranks * n)


@given(st.integers(1, 300), st.sampled_from([2, 3, 4]))
def test_cuts_are_the_same_for_all_numbers_of_ranks(more: int, n: int) -> None:
    """A minibatch of 12n on 1 to 12 ranks, with two examples or more a rank."""
    expected = sharding.cuts(12 + more, 12 * n, 1).tolist()
    for ranks in (2, 3, 4, 6, 12):
        assert sharding.cuts(12 + more, 12 * n, ranks).tolist() == expected


@given(st.integers(1, 12), st.data(), st.integers(1, 40))
def test_shares_are_all_of_the_batches_left(size: int, data: st.DataObject, n: int) -> None:
    left = data.draw(st.integers(0, size - 1))
    shares = [sharding.shares(left, rank, size) for rank in range(size)]
    dealt: list[tuple[int, int]] = []  # (batch, example in it)
    counts = []
    for share in shares:
        assert len(share) <= 2
        own_examples = []
        for cut in share:
            own_range = range(cut.start * n // size, cut.stop * n // size)
            own_examples += [(cut.batch, example) for example in own_range]
        dealt += own_examples
        counts.append(len(own_examples))
    assert dealt == [(batch, example) for batch in range(left) for example in range(n)]
    assert max(counts) - min(counts) <= 3  # three cuts, each rounded down
