"""DistributedOptimizer and callbacks on 1, 2 and 4 real ranks.

They run on both Keras backends, through MPI and Gloo.
"""

import functools
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import ROOT, results

PROGRAM = str(ROOT / "tests/recipe/keras/program.py")
SCENARIOS = (
    "equality",
    "initial_state",
    "worker_statistics",
    "unequal_shards",
    "poisoned_replica",
    "different_models",
    "overflow",
    "mixed_policy",
    "compression",
    "saved_models",
    "gradual_warmup",
    "momentum",
)
BACKENDS = ("tensorflow", "torch")
SEVERAL = ((2, "mpirun"), (4, "mpirun"), (2, "gloo"))

# float32 carries 2^-24 ≈ 6e-8 of a number. A gradient is a sum over 24·16 terms in an order that
# depends on the ranks: about √(24·16)·6e-8 ≈ 1e-6 of it, times the effective rate η/(1-m) = 4 over
# 12 steps, on weights around 1.
ROUNDING = {"rtol": 5e-5, "atol": 5e-5}

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Run all scenarios once for each way to start them; return one's findings on every rank."""

    @functools.cache
    def ranks(backend: str, size: int, launcher: str) -> list[dict]:
        folder: Path = tmp_path_factory.mktemp(f"{backend}-{size}-{launcher}")
        return results(folder, size, PROGRAM, *SCENARIOS, launcher=launcher, KERAS_BACKEND=backend)

    def scenario(name: str, backend: str, size: int, launcher: str = "mpirun") -> list[dict]:
        return [found[name] for found in ranks(backend, size, launcher)]

    return scenario


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(params=SEVERAL, ids=lambda way: f"{way[0]}-{way[1]}")
def several(request) -> tuple[int, str]:
    return request.param


def assert_same(one: list, other: list, **bound: float) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, **bound) if bound else np.testing.assert_array_equal(a, b)


def test_k_ranks_of_n_are_one_rank_of_kn(run, backend, several):
    """The paper promises it (sec. 3).

    The weights are the same after 12 steps of Nesterov, warmup, decay and weight decay.
    """
    (alone,) = run("equality", backend, 1)
    for found in run("equality", backend, *several):
        assert_same(found["weights"], alone["weights"], **ROUNDING)


def test_replicas_are_bitwise_equal(run, backend, several):
    """Horovod's own wrapper trains replicas that drift apart without a word."""
    first, *others = run("equality", backend, *several)
    for found in others:
        assert_same(found["weights"], first["weights"])


def test_epoch_metrics_are_those_of_the_whole_minibatch(run, backend, several):
    (alone,) = run("equality", backend, 1)
    for found in run("equality", backend, *several):
        assert found["history"]["loss"] == pytest.approx(alone["history"]["loss"], rel=1e-5)
        assert found["history"]["accuracy"] == pytest.approx(
            alone["history"]["accuracy"], abs=1.01 / 96
        )


def test_all_state_is_rank_0s_before_step_1(run, backend, several):
    """Weights, moving statistics, optimizer slots, iteration counter, learning rate."""
    ranks = run("initial_state", backend, *several)
    root = ranks[0]["before"]
    counters = [name for name in root if name.endswith("iteration")]
    before = {found["before"][name].tobytes() for found in ranks for name in counters}
    assert len(before) > 1
    for found in ranks:
        assert found["at step 1"].keys() == root.keys()
        for name, value in root.items():
            np.testing.assert_array_equal(found["at step 1"][name], value, err_msg=name)


def test_batch_norm_statistics_are_per_worker(run, backend, several):
    """The step is the mean of the workers' steps, each normalised by its own n examples.

    Paper, sec. 2.3.
    """
    ranks = run("worker_statistics", backend, *several)
    mean = [np.mean(weights, axis=0) for weights in zip(*ranks[0]["alone"], strict=True)]
    for found in ranks:
        trained = [i for i in range(len(mean)) if i not in (4, 5)]
        assert_same(
            [found["together"][i] for i in trained],
            [mean[i] for i in trained],
            rtol=1e-4,
            atol=1e-6,
        )


def test_metrics_of_unequal_shards_are_those_of_the_whole(run, backend, several):
    """An average of the ranks' averages would weigh unequal shards alike."""
    for found in run("unequal_shards", backend, *several):
        for name, value in found["whole"].items():
            assert found["part"][name] == pytest.approx(value, rel=1e-5)
            assert found["history"][name][0] == pytest.approx(value, rel=1e-5)
            assert found["history"][f"val_{name}"][0] == pytest.approx(value, rel=1e-5)


def test_a_poisoned_replica_stops_every_rank_and_is_named(run, backend, several):
    for found in run("poisoned_replica", backend, *several):
        assert found["error"] is not None
        assert found["name"] in found["error"]
        assert "after step 3" in found["error"]


def test_different_models_are_an_error_and_not_a_hang(run, backend, several):
    for found in run("different_models", backend, *several):
        assert "built another model" in found["error"]


def test_all_ranks_skip_when_one_overflows(run, backend, several):
    """To check a rank's own gradient, before the allreduce, would let ranks disagree."""
    ranks = run("overflow", backend, *several)
    for found in ranks:
        assert_same(found["skipped"], found["start"])
        assert found["scale"] == 512.0
        assert_same(found["after"], ranks[0]["after"])
        assert any((a != b).any() for a, b in zip(found["after"], found["start"], strict=True))


def test_the_wrapper_stays_outermost_under_the_mixed_float16_policy(run, backend):
    assert run("mixed_policy", backend, 1)[0]["kept"]


def test_compression_rounds_to_half_precision_and_no_more(run, backend, several):
    size = several[0]
    mean = (size + 1) / 14
    for found in run("compression", backend, *several):
        np.testing.assert_allclose(found["none"], mean, rtol=1e-6)
        np.testing.assert_allclose(found["fp16"], mean, rtol=2 * 2**-11)  # two roundings to 11 bits
        assert (found["fp16"] != found["none"]).all()


def test_saved_models_load_without_the_wrapper(run, backend):
    found = run("saved_models", backend, 2)[0]
    assert found["plain"]
    for saved, loaded in (found["weights"], found["slots"]):
        assert_same(saved, loaded)


def test_gradual_warmup_reaches_k_times_the_base_rate_and_lets_go(run, backend):
    """1.5 epochs of 4 steps are six equal increments, with kη at the seventh step.

    Then η is another callback's.
    """
    expected = [0.1 + 0.3 * t / 6 for t in range(6)] + [0.4, 0.4] + [0.01] * 4
    assert run("gradual_warmup", backend, 2)[0]["rates"] == pytest.approx(expected, rel=1e-6)


def reference_path(
    gradients: np.ndarray, rates: list[float], nesterov: bool, corrected: bool
) -> list[np.ndarray]:
    """Follow the paper's equation (9), whose velocity knows no η.

    Uncorrected, follow equation (10), whose velocity holds η.
    """
    w, u, path = np.zeros(5), np.zeros(5), []
    for gradient, rate in zip(gradients.astype(np.float64), rates, strict=True):
        g = gradient if corrected else rate * gradient
        u = 0.9 * u + g
        update = g + 0.9 * u if nesterov else u
        w = w - (rate * update if corrected else update)
        path.append(w)
    return path


def test_momentum_correction_is_the_papers(run, backend):
    """Remark 2. To assign optimizer.momentum does nothing in a traced step."""
    (found,) = run("momentum", backend, 1)
    for (nesterov, corrected, _scaled), path in found["paths"].items():
        expected = reference_path(found["gradients"], found["rates"], nesterov, corrected)
        # float32 sums of 12 steps of size ≈ 1
        np.testing.assert_allclose(path, expected, rtol=1e-4, atol=1e-5)
    corrected, uncorrected = (found["paths"][True, c, False] for c in (True, False))
    assert not np.allclose(corrected, uncorrected, rtol=1e-2)
