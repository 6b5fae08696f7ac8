"""The native PyTorch replica on 1, 2 and 4 real ranks: virtual workers, agreement, precision,
precise BN.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.ranks import results

pytestmark = pytest.mark.ranks

PROGRAM = str(Path(__file__).parent / "program.py")
SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    """What each rank reported, by the number of ranks."""
    folder = tmp_path_factory.mktemp("replica")
    return {size: results(folder / str(size), size, PROGRAM) for size in SIZES}


def close(one: dict, other: dict, tolerance: float) -> None:
    """Every array within `tolerance` of its largest value."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert np.abs(value - other[name]).max() <= tolerance * max(1, np.abs(value).max()), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["plain", "at_once", "first"])
def test_the_numbers_depend_on_k_alone(found, size, form):
    """Not on the ranks, nor on how a rank goes through its workers, nor on the layout: four steps
    at η = 0.1, with momentum, whose float32 sums were taken in other orders (2e-6 here).
    """
    reference = found[1][0]["plain"]
    close(reference["arrays"], found[size][0][form]["arrays"], 2e-5)
    np.testing.assert_allclose(found[size][0][form]["losses"], reference["losses"], rtol=1e-5)
    np.testing.assert_allclose(found[size][0][form]["precise"], reference["precise"], atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("form", ["plain", "at_once", "first", "bfloat16", "compressed"])
def test_all_state_is_the_same_bits_on_all_ranks(found, size, form):
    first, *others = (rank[form] for rank in found[size])
    for other in others:
        for name, value in first["arrays"].items():
            np.testing.assert_array_equal(value, other["arrays"][name], name)
        np.testing.assert_array_equal(first["losses"], other["losses"])


@pytest.mark.parametrize("form", ["bfloat16", "compressed"])
def test_less_precision_is_the_same_training(found, form):
    """8 bits of mantissa in the activations, 11 on the wire: the losses agree to three digits."""
    np.testing.assert_allclose(
        found[2][0][form]["losses"], found[1][0]["plain"]["losses"], rtol=1e-2
    )
    assert found[2][0][form]["losses"].tolist() != found[2][0]["plain"]["losses"].tolist()


@pytest.mark.parametrize("size", SIZES)
def test_an_overflow_on_one_rank_is_skipped_by_all(found, size):
    """The scale begins at 2¹⁵ and is halved; the weights stay, and go on in the next step."""
    for rank in found[size]:
        before, skipped, after = rank["overflow"]["arrays"]
        assert [float(s["optimizer/loss_scale"]) for s in (before, skipped, after)] == [
            2**15,
            2**14,
            2**14,
        ]
        assert [int(s["optimizer/finite_steps"]) for s in (before, skipped, after)] == [1, 0, 1]
        kernel = "model/fc/kernel"
        np.testing.assert_array_equal(before[kernel], skipped[kernel])
        assert np.abs(after[kernel] - skipped[kernel]).max() > 0
        np.testing.assert_array_equal(
            after[kernel], found[size][0]["overflow"]["arrays"][2][kernel]
        )


@pytest.mark.parametrize("size", [2, 4])
def test_rank_0s_state_is_everyones_before_the_first_step(found, size):
    """Weights, moving statistics and velocities."""
    for rank in found[size]:
        close(found[1][0]["broadcast"]["arrays"], rank["broadcast"]["arrays"], 0)


@pytest.mark.parametrize("size", [2, 4])
def test_a_replica_that_differs_in_one_bit_stops_all_ranks(found, size):
    for rank in found[size]:
        assert (
            "layer1.0.conv2.weight (8, 8, 3, 3) is the first variable" in rank["poisoned"]["error"]
        )
        assert "after step 7" in rank["poisoned"]["error"]


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_hear_that_one_wants_to_leave(found, size):
    assert all(rank["stopping"]["stop"] for rank in found[size])


def test_a_replica_takes_up_its_own_state_and_no_other(found):
    restored = found[1][0]["restored"]
    close(restored["written"], restored["arrays"], 0)
    lacking, another, shape = restored["sentences"]
    assert "the checkpoint lacks model/fc/bias" in lacking and "recipe.convert" in lacking
    assert "the model lacks another" in another
    assert "model/fc/bias has the shape (1,), the model's (10,)" in shape


@pytest.mark.parametrize("size", [2, 4])
def test_one_round_of_allreduces_begins_inside_the_last_backward_pass(found, size):
    """Not one more for each virtual worker, and not after the pass: all are under way when it
    returns.
    """
    for rank in found[size]:
        *before, last = rank["started"]["counts"]
        assert before == [0] * (4 // size - 1)
        assert last == rank["started"]["parameters"]
