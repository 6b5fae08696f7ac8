"""One step of virtual workers against its definition by plain Keras, on 1, 2 and 4 ranks and
several at once.
"""

import numpy as np
import pytest

from tests.ranks import ROOT, results

pytestmark = pytest.mark.ranks

PROGRAM = str(ROOT / "tests/recipe/frameworks/keras/step_program.py")


@pytest.fixture(scope="module", params=["tensorflow", "torch"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory, backend):
    scenarios = ["by_hand", "statistics", "dropout", "decay"]
    return results(
        tmp_path_factory.mktemp("step") / "1", 1, PROGRAM, *scenarios, KERAS_BACKEND=backend
    )[0]


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request, tmp_path_factory, backend, by_hand):
    if request.param == 1:
        return [by_hand]
    return results(
        tmp_path_factory.mktemp("step") / "several", request.param, PROGRAM, KERAS_BACKEND=backend
    )


def test_two_steps_are_the_mean_of_the_workers(ranks, by_hand):
    """Weights and moving statistics; float32 sums of 24 examples in another order: 1e-5 of the
    largest value.
    """
    expected = by_hand["by_hand"]["weights"]
    for found in ranks:
        for name in [name for name in found if name.startswith("together")]:
            for path, value in expected.items():
                bound = 1e-5 * max(1.0, np.abs(value).max())
                np.testing.assert_allclose(
                    found[name]["weights"][path], value, rtol=0, atol=bound, err_msg=path
                )


def test_keras_is_compiled_on_tensorflow_and_refused_on_pytorch(ranks, backend):
    """What is compiled is among the steps of the tests around."""
    for found in ranks:
        if backend == "tensorflow":
            assert "together 1, compiled" in found
        else:
            assert "set config.framework='torch' or KERAS_BACKEND=tensorflow" in found["refusal"]


def test_every_rank_knows_every_workers_loss(ranks, by_hand):
    losses = by_hand["by_hand"]["losses"]
    for found in ranks:
        for name in [name for name in found if name.startswith("together")]:
            np.testing.assert_allclose(found[name]["losses"], losses[:4], rtol=1e-5)
            np.testing.assert_allclose(found[name]["again"][0], losses[4:], rtol=1e-5)
            assert 0 <= found[name]["hits"].sum() <= 24


def test_one_ranks_wish_to_stop_is_every_ranks_and_is_forgotten(ranks):
    for found in ranks:
        assert found["together 1"]["stop"] is True
        assert found["together 1"]["again"][2] is False


def test_all_ranks_end_with_the_same_bits(ranks):
    for found in ranks:
        for path, value in ranks[0]["together 1"]["weights"].items():
            np.testing.assert_array_equal(found["together 1"]["weights"][path], value, err_msg=path)


def test_statistics_of_a_batch_are_its_mean_and_variance(by_hand):
    found = by_hand["statistics"]
    assert found["names"][:2] == ["stem_bn/moving_mean", "stem_bn/moving_variance"]
    np.testing.assert_allclose(found["vector"][:4], found["mean"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["vector"][4:8], found["var"], rtol=1e-5)


def test_weight_decay_is_part_of_the_gradient(by_hand):
    """With Nesterov momentum 0.9 the first step of −η·λw is −1.9·η·λw; η = 0.5, λ = 0.01. A float32
    weight is rounded once, its step by a few roundings of its own.
    """
    for found in by_hand["decay"].values():
        assert sum("kernel" in path for path, *_ in found) == 6  # stem, shortcut, 3, and the FC
        for path, before, after in found:
            decayed = before * (1 - 1.9 * 0.5 * 0.01) if "kernel" in path else before
            np.testing.assert_allclose(after, decayed, rtol=2.0**-23, atol=0, err_msg=path)


def test_dropout_is_a_function_of_seed_epoch_and_example(by_hand):
    """The same bits as NumPy's, in both frameworks; about 30 % of 4000, ± 5 standard deviations."""
    found = by_hand["dropout"]
    np.testing.assert_array_equal(found["output"] == 0, found["drawn"] < 0.3)
    np.testing.assert_allclose(found["output"][found["drawn"] >= 0.3], 1 / 0.7, rtol=1e-6)
    assert abs((found["output"] == 0).mean() - 0.3) < 5 * np.sqrt(0.21 / 4000)
    assert (found["plain"] == 1).all()
