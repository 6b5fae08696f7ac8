"""What one rank of a Keras `fit` decides, all do: on 2 real ranks, on both backends.

Data that end early are tested on 4 ranks, too. Also tested here: models that are built at their
first batch, the logs of all ranks, and jobs that can't go on.
"""

import functools
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from recipe.keras import rollcall
from tests.ranks import ROOT, environment, launch, results

PROGRAM = str(ROOT / "tests/recipe/keras/together_program.py")
FAILING = str(ROOT / "tests/recipe/keras/failing_program.py")
KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])
SEVERAL = ("uneven", "even_generators", "two_optimizers")
ON_TWO = (
    *SEVERAL,
    "stopping",
    "deciding",
    "refused",
    "quiet",
    "validations",
    "replica_checks",
    "late_models",
    "logs",
)

# A gradient is a float32 sum of 16 to 64 terms in an order that depends on the ranks: 1e-6 of it,
# over 10 steps of η ≤ 0.2 on weights around 1. The smallest mistake, one batch more or less in one
# step, is 1e-2.
ROUNDING = {"rtol": 1e-5, "atol": 5e-6}

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Run the scenarios once for each backend and size; return one scenario's results by rank."""

    @functools.cache
    def ranks(backend: str, size: int) -> list[dict]:
        scenarios = SEVERAL if size == 4 else ON_TWO
        folder: Path = tmp_path_factory.mktemp(f"together-{backend}-{size}")
        return results(folder, size, PROGRAM, *scenarios, KERAS_BACKEND=backend)

    def of_scenario(scenario: str, backend: str, size: int = 2) -> list:
        return [of_rank[scenario] for of_rank in ranks(backend, size)]

    return of_scenario


@pytest.fixture(params=("tensorflow", "torch"))
def backend(request) -> str:
    return request.param


@pytest.fixture(params=(2, 4))
def size(request) -> int:
    return request.param


def assert_close(one: list, other: list) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, **ROUNDING)


def assert_same(one: list, other: list) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_data_that_end_early_are_the_mean_over_those_who_have_some(run, backend, size):
    """Weights and logs are those of one process on the union of the ranks' batches.

    So it is with arrays, data of unknown length, accumulation, sparse gradients, groups,
    synchronised normalisation and loss scaling.
    """
    ranks = run("uneven", backend, size)
    for name, on_rank_0 in ranks[0].items():
        expected = on_rank_0["expected"]
        for of_rank in ranks:
            together = of_rank[name]["together"]
            assert_same(together["weights"], on_rank_0["together"]["weights"])
            assert together["loss"] == on_rank_0["together"]["loss"]
            if expected:
                assert_close(together["weights"], expected["weights"])
                np.testing.assert_allclose(
                    together["loss"], expected["loss"], rtol=1e-5, err_msg=name
                )


def steps_of_two_epochs(batches: int) -> list[tuple[int, int]]:
    """Return the (epoch, batch) that callbacks see."""
    return [(epoch, batch) for epoch in (0, 1) for batch in range(batches)]


def test_callbacks_of_all_ranks_see_all_steps(run, backend, size):
    for cases in run("uneven", backend, size):
        for name, case in cases.items():
            if name != "steps_per_epoch":
                assert case["together"]["steps"] == steps_of_two_epochs(5), name


def test_data_that_end_for_good_are_no_hang(run, backend):
    """steps_per_epoch asks for more than a generator has: rank 0's five batches are used, once."""
    for cases in run("uneven", backend):
        steps = cases["steps_per_epoch"]["together"]["steps"]
        assert steps[:5] == [(0, b) for b in range(5)]
        assert all(epoch == 1 for epoch, _ in steps[5:])


def test_one_warning_has_the_numbers(run, backend, size):
    on_rank_0, *on_others = run("uneven", backend, size)
    for name, case in on_rank_0.items():
        (message,) = case["together"]["warnings"]
        assert "takes part with nothing" in message and "recipe.keras.divide" in message
        knows_steps = name not in ("generators", "steps_per_epoch")
        assert ("5 steps" in message) == knows_steps, name
    for cases in on_others:
        assert not any(case["together"]["warnings"] for case in cases.values())


def test_data_of_unknown_length_that_end_together_are_one_process(run, backend, size):
    for of_rank in run("even_generators", backend, size):
        assert_close(of_rank["weights"], of_rank["expected"]["weights"])
        np.testing.assert_allclose(of_rank["loss"], of_rank["expected"]["loss"], rtol=1e-5)
        assert of_rank["steps"] == steps_of_two_epochs(3)
        assert not of_rank["warnings"]


def test_two_optimizers_and_a_step_of_its_own(run, backend, size):
    """Layers that come to exist in the step, data that end early: as one process."""
    first, *others = run("two_optimizers", backend, size)
    assert_close(first["weights"], first["expected"])
    for of_rank in others:
        assert_same(of_rank["weights"], first["weights"])
        assert of_rank["history"] == first["history"]
    assert set(first["history"]) == {"a_loss", "b_loss"}
    assert first["steps"] == steps_of_two_epochs(4)


def test_what_one_rank_stops_all_stop_in_the_same_step(run, backend):
    """In mid-epoch a step later, in which the others hear of it."""
    first, second = run("stopping", backend)
    last = {"mid-epoch": (1, 2), "last step": (0, 3), "end of epoch": (1, 3), "validation": (0, 3)}
    for name, step in last.items():
        assert first[name]["steps"][-1] == second[name]["steps"][-1] == step, name
        assert first[name]["epochs"] == second[name]["epochs"] == list(range(step[0] + 1))
        assert_same(first[name]["weights"], second[name]["weights"])


def test_rank_0_says_which_rank_stopped_and_why(run, backend):
    first, second = run("stopping", backend)
    for name, case in first.items():
        assert "rank 1 stops the training of all ranks" in case["stderr"], name
        assert "Steps" in case["stderr"], name
    assert "in epoch 1, step 2" in first["mid-epoch"]["stderr"]
    assert not any(case["stderr"] for case in second.values())


def test_callbacks_that_decide_by_their_own_ranks_numbers_are_no_hang(run, backend):
    """EarlyStopping without MetricSums, before and after it; TerminateOnNaN on one rank's data."""
    first, second = run("deciding", backend)
    assert first == second
    assert first["nan"] == 1
    assert first["alone"] == first["before"] < 30


def test_what_cannot_be_agreed_on_is_refused_on_all_ranks(run, backend):
    words = {  # that the error must have
        "rates": (
            "RunError: the ranks' learning rates differ: 0.01 on rank 0, 0.02 on rank 1",
            "MetricSums",
        ),
        "first epochs": (
            "RunError: rank 0 begins with epoch 0 and rank 1 with epoch 1",
            "BackupAndRestore",
        ),
        "no epoch": ("RunError: rank 0 begins with epoch 0 and rank 1 with no epoch at all",),
        "epochs": ("ValueError: fit(epochs=…) is 3 on rank 0 and 4 on rank 1",),
        "callbacks": (
            "ValueError: the ranks meet in these callbacks",
            "rank 0 has BroadcastState, MetricSums; rank 1 has BroadcastState",
        ),
        "Keras's restore": (
            "ValueError: rank 0: keras.callbacks.BackupAndRestore",
            "recipe.keras.callbacks",
        ),
        "scaled outside": (
            "ValueError: the LossScaleOptimizer is outside",
            "use DistributedOptimizer(",
        ),
        "strategy": ("ValueError: MirroredStrategy and a DistributedOptimizer both average",),
        "steps per execution": (
            "ValueError: with steps_per_execution > 1",
            "not 4, 6",
            "steps_per_epoch",
        ),
    }
    for errors in run("refused", backend):
        assert len(errors) == (9 if backend == "tensorflow" else 7)
        for name, sentence in errors.items():
            assert all(word in sentence for word in words[name]), (name, sentence)
            assert len(sentence) < 260 and "\n" not in sentence


def test_the_frameworks_say_nothing(run, backend):
    """TensorFlow may say retraced of Keras's own train function, which each model makes anew."""
    for rank, of_rank in enumerate(run("quiet", backend)):
        lines = of_rank["logged"].splitlines()
        assert not [line for line in lines if "_make_function.<locals>" not in line]
        ours = [w for w in of_rank["warnings"] if "__array__" not in w]
        expected = ["jit_compile=True is left out: PyTorch's compiler can't compile an allreduce"]
        assert ours == (expected if backend == "torch" and rank == 0 else [])


def test_validation_on_one_rank_is_no_hang_and_all_see_its_figures(run, backend):
    first, second = run("validations", backend)
    assert first["on root"] == second["on root"]
    assert len(first["on root"]["val_loss"]) == 3
    assert first["on root"]["val_loss"][-1] == pytest.approx(first["expected"], rel=1e-6)
    assert first["freq"] == second["freq"] and len(first["freq"]["val_loss"]) == 3


def test_accumulators_are_not_compared(run, backend):
    first, second = run("replica_checks", backend)
    assert_same(first["weights"], second["weights"])


def test_models_that_are_built_at_their_first_batch_begin_with_rank_0s_weights(run, backend):
    first, second = run("late_models", backend)
    for name, case in first.items():
        assert_close(case["weights"], case["expected"])
        assert_same(case["weights"], second[name]["weights"])
        assert case["iterations"] == 4


def test_logs_are_what_one_process_would_log(run, backend):
    """Means, areas under curves, one number for each class and a metric of the user's are exact."""
    first, second = run("logs", backend)
    validation = {f"val_{name}" for name in first["expected"]}
    assert first["fit"].keys() == first["expected"].keys() | validation
    for name, whole in first["expected"].items():
        for key in (name, f"val_{name}"):
            np.testing.assert_allclose(first["fit"][key][0], whole, rtol=1e-6, err_msg=key)
            np.testing.assert_array_equal(first["fit"][key][0], second["fit"][key][0])
        np.testing.assert_allclose(first["evaluate"][name], whole, rtol=1e-6, err_msg=name)


def test_logs_of_a_step_of_its_own_keep_their_names(run, backend):
    """A tracker by another name is exact. A plain number is the ranks' last, weighted."""
    ranks = run("logs", backend)
    losses = [of_rank["own losses"] for of_rank in ranks]
    mean = np.mean(np.concatenate(losses))
    lasts = [of_rank[-1] for of_rank in losses]
    last = np.average(lasts, weights=[len(of_rank) for of_rank in losses])
    for of_rank in ranks:
        assert of_rank["named"].keys() == {"loss", "last"}
        assert of_rank["raw"].keys() == {"raw_loss"}
        assert of_rank["named"]["loss"] == pytest.approx([mean], rel=1e-6)
        assert of_rank["named"]["last"] == pytest.approx([last], rel=1e-6)
        assert of_rank["raw"]["raw_loss"] == pytest.approx([last], rel=1e-6)
        assert of_rank["named"] == ranks[0]["named"]


def test_what_callbacks_put_into_the_logs_is_averaged(run, backend):
    """Rank 0 has 3 of 4 examples. A name of one rank is on all. What is no number stays."""
    for of_rank in run("logs", backend):
        weighted, unweighted = of_rank["callbacks"], of_rank["unweighted"]
        assert weighted["everywhere"] == [0.25]
        assert unweighted["everywhere"] == [0.5]
        assert weighted["on one rank"] == unweighted["on one rank"] == [7.5]
        assert weighted["words"] == ["not a number"]


def run_failing(backend: str, way: str, **options: str) -> subprocess.CompletedProcess:
    return launch(2, [FAILING, way], timeout=200, KERAS_BACKEND=backend, **options)


def test_an_error_on_one_rank_ends_the_others_with_its_words(backend):
    """Though the script catches it and goes on, for longer than this test may take."""
    done = run_failing(backend, "error", RECIPE_STEP_TIMEOUT="150")
    assert done.returncode == 1
    assert (
        "error: rank 1 has failed, and the others wait for it: KeyError: 'no such thing'"
        in done.stdout
    )
    assert "rank 0 waits: the end of epoch 0" in done.stdout


@pytest.mark.parametrize(
    ("backend", "way"), [("torch", "absent"), ("tensorflow", "absent"), ("torch", "own loop")]
)
def test_a_wait_without_end_ends_with_where_each_rank_is(backend, way):
    done = run_failing(backend, way, RECIPE_STEP_TIMEOUT="15")
    assert done.returncode == 1
    assert (
        "the ranks wait for each other since" in done.stdout and "(step_timeout=15)" in done.stdout
    )
    absent = 1 if way == "absent" else 0
    assert f"rank {absent}: " in done.stdout and f"rank {1 - absent} waits: " in done.stdout
    assert "failing_program.py:" in done.stdout and "in waits_for_something_else" in done.stdout


def test_a_long_save_and_a_long_validation_on_one_rank_are_no_wait_without_end():
    done = run_failing("torch", "long", RECIPE_STEP_TIMEOUT="15")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "rank 0 has ended" in done.stdout and "rank 1 has ended" in done.stdout


def status(count=0, waits=False, busy="", failure="") -> rollcall.Status:
    return rollcall.Status(count, waits, busy, failure, where="x.py:1")


@pytest.mark.parametrize(
    ("ranks", "stuck"),
    [
        ([{"waits": True}, {}], True),  # one is elsewhere
        ([{"waits": True}, {"waits": True}], True),  # in other collectives
        ([{"waits": True}, {"busy": "ModelCheckpoint.on_epoch_end"}], False),
        ([{"waits": True}, {"busy": "the validation"}], False),
        (
            [{"waits": True}, {"busy": "MetricSums.on_epoch_end", "waits": True}],
            True,
        ),  # in a collective that never ends
        ([{}, {}], False),  # nobody waits for anybody
    ],
)
def test_who_waits_for_ever(monkeypatch, ranks, stuck):
    """The decision, by a clock of the test's own: 99 s are no reason yet, 101 s are."""
    now = [1000.0]
    monkeypatch.setattr(rollcall.time, "monotonic", lambda: now[0])
    thread = rollcall.RollCall(limit=100.0)
    statuses = [status(**options) for options in ranks]
    assert not thread._reason_to_end(statuses)
    now[0] += 99
    assert not thread._reason_to_end(statuses)
    now[0] += 2
    assert bool(thread._reason_to_end(statuses)) == stuck
    progressed = [status(count=1, waits=True), *statuses[1:]]
    assert not thread._reason_to_end(progressed)


def test_a_failed_rank_is_waited_for_for_seconds_only(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(rollcall.time, "monotonic", lambda: now[0])
    thread = rollcall.RollCall(limit=100.0)
    statuses = [status(waits=True), status(failure="KeyError: x")]
    assert not thread._reason_to_end(statuses)
    now[0] += rollcall.PATIENCE + 1
    reason = thread._reason_to_end(statuses)
    assert "rank 1 has failed, and the others wait for it: KeyError: x" in reason
    all_failed = [status(failure="KeyError: x")] * 2
    assert not thread._reason_to_end(all_failed)  # none waits


@pytest.mark.parametrize("value", ["soon", "-1", "inf", "nan"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(value):
    code = "import recipe.keras as hvd; hvd.init()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(KERAS_BACKEND="torch", RECIPE_STEP_TIMEOUT=value),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        f"RECIPE_STEP_TIMEOUT='{value}' must be a number of seconds, 0 for no limit" in done.stderr
    )


@pytest.mark.parametrize("how", ["fit", "broadcast"])
def test_training_before_init_is_one_sentence(backend, how):
    code = f"""
import keras, numpy as np, recipe.keras as hvd
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()) if {how == "fit"} else "sgd", "mse")
callbacks = [hvd.callbacks.BroadcastState()] if {how == "broadcast"} else []
model.fit(np.ones((4, 4)), np.ones((4, 1)), verbose=0, callbacks=callbacks)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(KERAS_BACKEND=backend),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == (
        "ValueError: Horovod is not initialised; call recipe.keras.init() before fit()"
    )


@pytest.mark.skipif(KERAS < (3, 16), reason="Keras 3.16 has it: tests/coming-keras")
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("way", "name"), [("both, set", "DataParallel"), ("both", "Keras's DistributedDataParallel")]
)
def test_keras_own_data_parallelism_beside_ours_is_refused(size, way, name):
    done = launch(size, [FAILING, way], timeout=200, KERAS_BACKEND="torch")
    assert done.returncode == 1
    assert f"ValueError: {name}" in done.stdout
    assert "and a DistributedOptimizer both average the gradients; use one of them" in done.stdout
