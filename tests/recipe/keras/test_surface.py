"""Horovod's Keras surface on 2 and 4 real ranks, on both Keras backends.

What Horovod 0.28.1's own tests for Keras check, and the test here that covers it:

| upstream test | what it checks | here |
|---|---|---|
| train_model_lr_schedule | warmup, schedules, losses | test_learning_rates_…, test_metrics_… |
| sparse_as_dense, …_with_grad_aggregation | an embedding trains | test_embeddings_… |
| legacy_optimizer | keras.optimizers.legacy | refused: test_everything_that_is_refused_… |
| grad_aggregation_with_inf_grad | an overflow ends | test_an_overflow_in_one_pass_… |
| from_config | the configuration makes the round trip | test_configurations_… |
| elastic_state | sync, restore, commit | test_elastic_state_… |
| gradient_aggregation, …_with_local_vars | passes, local variables, sparse | test_passes_… |
| partial_distributed_optimizer | 0, 1, 2 local layers | test_local_layers_… |
| broadcast_…_callback_with_local_vars | the local ones stay | test_local_variables_… |
| load_model, …_custom_optimizers, …_custom_objects | saved and loaded | test_saved_models_… |
| load_model_broadcast | rank 0 loads, the others don't | test_rank_0_may_load_… |
| process sets | reduction within a set | test_process_sets_… |
"""

import functools
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import ROOT, results

PROGRAM = str(ROOT / "tests/recipe/keras/surface_program.py")
EVERYWHERE = (
    "reductions",
    "process_sets",
    "passes",
    "overflowing_passes",
    "local_overflow",
    "missing_gradients",
    "on_the_averaged_gradient",
    "embeddings",
    "local_layers",
    "local_variables",
    "synchronised_normalisation",
    "operations",
)
ON_TWO = (
    "every_optimizer",
    "uneven_creation",
    "saving",
    "loaded_on_root",
    "configurations",
    "refusals",
    "learning_rates",
    "metric_averages",
    "best_checkpoint",
    "schedules",
    "elastic_state",
    "elastic_callbacks",
    "fifteen_lines",
)
ALONE = ("every_optimizer", "on_the_averaged_gradient", "embeddings", "synchronised_normalisation")

# A gradient is a float32 sum of about 400 terms whose order depends on the ranks: 1e-6 of it.
# After 4 to 6 steps of η = 0.01 to 0.1 the weights differ by 5e-7 at most, as was seen for every
# optimizer, both backends, 2 and 4 ranks.
ROUNDING = {"rtol": 1e-5, "atol": 5e-6}

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Runs a program's scenarios once for each backend and size.

    Gives one scenario's findings on every rank.
    """

    @functools.cache
    def ranks(backend: str, size: int) -> list[dict]:
        scenarios = {1: ALONE, 2: EVERYWHERE + ON_TWO, 4: EVERYWHERE}[size]
        folder: Path = tmp_path_factory.mktemp(f"surface-{backend}-{size}")
        return results(folder, size, PROGRAM, *scenarios, timeout=400, KERAS_BACKEND=backend)

    return lambda scenario, backend, size: [found[scenario] for found in ranks(backend, size)]


@pytest.fixture(params=("tensorflow", "torch"))
def backend(request) -> str:
    return request.param


@pytest.fixture(params=(2, 4))
def size(request) -> int:
    return request.param


def assert_same(one: list, other: list, **bound: float) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, **bound) if bound else np.testing.assert_array_equal(a, b)


def test_reductions(run, backend, size):
    """Average, Sum, predivided, in groups.

    Powers of two and small integers, so that nothing is rounded but 3/4.
    """
    mean, total = (size + 1) / 2, size * (size + 1) / 2
    for found in run("reductions", backend, size):
        for name, added in found.items():
            expected = [(total if name == "sum" else mean) * 10**i for i in range(3)]
            assert added == pytest.approx(expected, rel=1e-6), name


def test_process_sets_reduce_among_themselves(run, backend, size):
    members = [0, 2] if size > 2 else [0]
    mean = np.mean([rank + 1 for rank in members])
    for rank, found in enumerate(run("process_sets", backend, size)):
        assert found["value"] == (mean if rank in members else rank + 1)
        assert found["allreduce"] == (mean if rank in members else None)
        assert "unknown to Horovod" in found["unknown"]


def test_passes_are_reduced_once_and_count_as_one_step(run, backend, size):
    """Sums, or means, of 4 passes; the last two variables are local, and weigh 1/size.

    All numbers are exact.
    """
    mean = (size + 1) / 2
    for rank, found in enumerate(run("passes", backend, size)):
        for average, (path, waiting) in found.items():
            assert waiting == 2  # of ten passes
            for n, (x, y, local_x, local_y, iterations) in enumerate(path, 1):
                steps = n // 4
                factor = steps * (1 if average else 4)
                assert iterations == steps
                np.testing.assert_allclose(x, [factor * mean], rtol=1e-6)
                np.testing.assert_allclose(y, [0, -2 * factor * mean], rtol=1e-6)
                np.testing.assert_allclose(local_x, [factor * (rank + 1) / size], rtol=1e-6)
                np.testing.assert_allclose(local_y, [0, -2 * factor * (rank + 1) / size], rtol=1e-6)


def test_an_overflow_in_one_pass_skips_the_step_everywhere_and_is_forgotten(run, backend, size):
    for found in run("overflowing_passes", backend, size):
        assert found["path"] == [0, 0, 0, -2]  # two passes of gradient 1, summed
        assert (found["scale"], found["iterations"]) == (2, 1)


def test_an_overflow_of_a_local_gradient_skips_the_step_everywhere(run, backend, size):
    for found in run("local_overflow", backend, size):
        assert found["skipped"] == [0, 0]
        assert found["after"] == [-1, -1 / size]


def test_a_gradient_that_some_ranks_lack_is_no_hang(run, backend, size):
    for found in run("missing_gradients", backend, size):
        assert found["values"] == [1, 0, 4 if backend == "tensorflow" else 4 / size]


def test_settings_of_the_optimizer_act_on_the_averaged_gradient(run, backend, size):
    """Clipping, moving averages, weight decay, accumulation.

    They act as on one rank with the whole minibatch. All ranks' weights and slots are bitwise
    equal.
    """
    (alone,) = run("on_the_averaged_gradient", backend, 1)
    first, *others = run("on_the_averaged_gradient", backend, size)
    for name, weights in first.items():
        assert_same(weights[:4], alone[name][:4], **ROUNDING)
        for found in others:
            assert_same(found[name], weights)


def test_every_optimizer_on_two_ranks_is_one_rank_with_the_whole_minibatch(run, backend):
    (alone,) = run("every_optimizer", backend, 1)
    first, second = run("every_optimizer", backend, 2)
    assert len(first) > 12
    for name, weights in first.items():
        assert_same(weights, second[name])
        for a, b in zip(weights, alone[name], strict=True):
            np.testing.assert_allclose(a, b, **ROUNDING, err_msg=name)


def test_embeddings_get_the_averaged_gradient_sparse_and_dense(run, backend, size):
    (alone,) = run("embeddings", backend, 1)
    for found in run("embeddings", backend, size):
        for name in ("sparse", "dense", "predivided"):
            np.testing.assert_allclose(
                found[name], alone["dense"], rtol=1e-4, atol=1e-5, err_msg=name
            )
        np.testing.assert_allclose(found["passes"], alone["passes"], rtol=1e-4, atol=1e-5)


def test_local_layers_keep_their_gradients_and_are_scaled(run, backend, size):
    """And ReplicaCheck lets them differ, with their slots."""
    for rank, found in enumerate(run("local_layers", backend, size)):
        mean = (size + 1) / 2
        for count in range(3):
            for scaled in (True, False):
                own = (rank + 1) / (size if scaled else 1)
                assert found[count, scaled] == pytest.approx(
                    [own] * 2 * count + [mean] * 2 * (2 - count)
                )
        assert "'unbuilt' has no variables yet" in found["unbuilt"]
        assert "must be Keras layers" in found["no layer"]


def test_local_variables_and_their_slots_are_not_broadcast(run, backend, size):
    for rank, found in enumerate(run("local_variables", backend, size)):
        assert found["weights"] == [rank] + [size - 1] * 3
        assert found["slots"] == [rank] + [size - 1] * 3


def test_ranks_that_made_other_optimizers_before_do_not_hang(run, backend):
    first, second = run("uneven_creation", backend, 2)
    assert_same(first["weights"], second["weights"])


def test_saved_models_load_with_and_without_the_wrapper(run, backend):
    for found in run("saving", backend, 2):
        assert "Keras 3 has no legacy optimizers" in found.pop("legacy")
        for kind, outcome in found.items():
            assert outcome["plain"] and all(outcome["distributed"]), kind
            assert outcome["compression"] and outcome["same"] and outcome["trains"], kind


def test_rank_0_may_load_what_the_others_make_anew(run, backend):
    first, second = run("loaded_on_root", backend, 2)
    assert (first["before"], second["before"]) == (6, 2)  # the counter and η; four velocities
    for found in (first, second):
        assert (found["slots"], found["iterations"]) == (6, 1 + 4)
    assert_same(first["weights"], second["weights"])


def test_configurations_make_the_round_trip(run, backend):
    for found in run("configurations", backend, 2):
        assert found["same"] == [True, True]
        assert found["op"] == [True, True]


def test_everything_that_is_refused_says_why(run, backend):
    """The key is what the sentence must name."""
    for found in run("refusals", backend, 2):
        for word, sentence in found.items():
            assert word in sentence
            assert len(sentence) < 250 and "\n" not in sentence


def test_learning_rates_are_those_that_the_documentation_promises(run, backend):
    """The rate of each step.

    It is a warmup from η/size to η at epoch 3 exactly, constants that stay constant, functions.
    """
    lr, steps = 0.2, 4
    warm = [lr / 2 * (1 + t / 12) for t in range(12)]
    expected = warm + [lr * 0.1] * 12 + [lr * 0.01] * 12 + [lr * 0.9] * 4 + [lr * 1.0] * 4
    expected += [lr * (11 + t / steps) / 10 for t in range(4)]
    for rank, found in enumerate(run("learning_rates", backend, 2)):
        assert found["ours"] == pytest.approx(expected, rel=1e-6)
        assert found["logged"] == pytest.approx(expected[steps - 1 :: steps], rel=1e-6)
        assert ("warmed up to 0.2" in found["said"]) == (rank == 0)


def test_a_warmup_of_a_fraction_ends_inside_its_epoch(run, backend):
    ramp = [0.1 * (1 + t / 6) for t in range(6)] + [0.2] * 6
    for found in run("learning_rates", backend, 2):
        assert found["fractional"] == pytest.approx(ramp, rel=1e-6)


def test_gradual_warmup_and_step_decay_go_together(run, backend):
    expected = [0.1 + 0.3 * t / 4 for t in range(4)] + [0.4] * 2 + [0.04] * 2 + [0.004] * 4
    for found in run("learning_rates", backend, 2):
        assert found["decayed"] == pytest.approx(expected, rel=1e-6)


def test_options_restore_horovods_old_learning_rates(run, backend):
    """Compounding constants, and a warmup that is one step ahead."""
    lr = 0.2
    warm = [lr / 2 * (1 + (t + 1) / 12) for t in range(12)]
    constants = [lr * 0.1 ** (e - 3) for e in (3, 4, 5)] + [lr * 0.01 ** (e - 6) for e in (6, 7, 8)]
    expected = warm + [rate for rate in constants for _ in range(4)]
    for found in run("learning_rates", backend, 2):
        assert found["old"][: len(expected)] == pytest.approx(expected, rel=1e-6)


def test_metrics_are_those_of_all_examples_and_the_old_ones_on_request(run, backend):
    ranks = run("metric_averages", backend, 2)
    for found in ranks:
        for metric, whole in found["whole"].items():
            means = np.mean([other["mine"][metric] for other in ranks])
            for name, expected in {"weighted": whole, "unweighted": means}.items():
                assert found[name][metric] == pytest.approx(expected, rel=1e-5)
                assert found[name][f"val_{metric}"] == pytest.approx(expected, rel=1e-5)
    assert ranks[0]["weighted"]["loss"] != pytest.approx(ranks[0]["unweighted"]["loss"], rel=1e-3)


def test_the_best_model_is_written_by_rank_0_alone(run, backend):
    first, second = run("best_checkpoint", backend, 2)
    assert first["written"] and first["loads"] and not second["written"]
    assert first["best"] == pytest.approx(min(first["loss"]))


def test_schedule_and_callback_are_the_same_rate_and_the_same_training(run, backend):
    """The rates are bitwise equal.

    The weights are equal to the rounding of velocities that hold η and of those that don't.
    """
    for found in run("schedules", backend, 2):
        assert found["schedule"] == found["callback"]
        for nesterov in (False, True):
            for steps in (1, 4) if backend == "tensorflow" else (1,):
                scheduled = found["weights"]["schedule", nesterov, steps]
                assert_same(scheduled, found["weights"]["callback", nesterov], rtol=1e-4, atol=1e-5)


def test_synchronised_normalisation_is_that_of_the_whole_batch(run, backend, size):
    """Unequal shares, two steps: weights, moving statistics and outputs as on one rank.

    Masked steps don't count.
    """
    (alone,) = run("synchronised_normalisation", backend, 1)
    mean = np.average(np.arange(1, size + 1))
    for found in run("synchronised_normalisation", backend, size):
        assert_same(found["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["outputs"], alone["outputs"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["masked mean"], np.full(4, mean), rtol=1e-6)
        np.testing.assert_allclose(
            found["masked variance"], np.full(4, np.var(np.arange(size))), rtol=1e-5
        )


def test_operations_on_values(run, backend, size):
    ranks, last = np.arange(size), size - 1
    for rank, found in enumerate(run("operations", backend, size)):
        mean, total = (size + 1) / 2, size * (size + 1) / 2
        for name, expected in {
            "allreduce": mean,
            "fp16": mean,
            "sum": total,
            "scaled": 6 * total,
        }.items():
            assert found[name] == pytest.approx(expected, rel=1e-6), name
        assert (found["min"], found["max"], found["product"]) == (1, size, np.prod(ranks + 1))
        assert found["grouped"] == [1, last / 2]
        np.testing.assert_array_equal(found["allgather"][:, 0], np.repeat(ranks, ranks + 1))
        np.testing.assert_array_equal(found["broadcast"], [last, last])
        np.testing.assert_array_equal(found["reducescatter"], [rank * size])
        np.testing.assert_array_equal(found["alltoall"], ranks)
        np.testing.assert_array_equal(found["splits"][0], ranks)
        np.testing.assert_array_equal(found["splits"][1], [1] * size)
        assert found["object"] == {"rank": last} and found["objects"] == list(ranks)
        assert found["variables"] == [last, last]
        assert found["enabled"] == 1 and any(found["built"])
        assert found["places"] == [rank, size, 0, 1]


def test_elastic_state_synchronises_restores_and_commits(run, backend):
    for found in run("elastic_state", backend, 2):
        assert found["synchronised"] == [1, 20, 10, 0]
        assert found["restored"] == [1, 20, 10, 0]
        assert found["committed"] == [7, 21, 11, 5]


def test_elastic_callbacks_take_up_an_epoch_where_it_was_left(run, backend):
    """Two of four batches of epoch 1 are done: two pass by without a step, two are trained.

    Then another epoch.
    """
    for found in run("elastic_callbacks", backend, 2):
        for taken_up in found.values():
            batches, done, epochs, iterations = zip(*taken_up["seen"], strict=True)
            assert batches == (0, 1, 2, 3) * 2
            assert done == (2, 2, 3, 4, 1, 2, 3, 4)
            assert epochs == (1,) * 4 + (2,) * 4
            assert iterations == (0, 0, 1, 2, 3, 4, 5, 6)
            assert (taken_up["epoch"], taken_up["batch"]) == (3, 0)


def test_the_fifteen_lines_of_the_page_train(run, backend):
    """Two epochs of 4 steps, the last of which is 7/20 into the warmup from 0.01 to 0.02."""
    first, second = run("fifteen_lines", backend, 2)
    assert_same(first["weights"], second["weights"])
    assert first["rate"] == pytest.approx(0.01 * (1 + 7 / 20))
