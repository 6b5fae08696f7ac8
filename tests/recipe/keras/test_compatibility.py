"""Saved models, overridden methods and the advice of errors, on real ranks and both backends."""

import functools
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import ROOT, results

PROGRAM = str(ROOT / "tests/recipe/keras/compatibility_program.py")
SCENARIOS = (
    "going_on",
    "kinds_of_files",
    "functions",
    "not_loaded",
    "loaded_on_root",
    "overriding",
    "replaced",
    "advice",
)

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Runs the program's scenarios once for each backend and size.

    Gives one scenario's findings on every rank.
    """

    @functools.cache
    def ranks(backend: str, size: int) -> list[dict]:
        scenarios = SCENARIOS if size > 1 else ("going_on",)
        folder: Path = tmp_path_factory.mktemp(f"compatibility-{backend}-{size}")
        return results(folder, size, PROGRAM, *scenarios, timeout=400, KERAS_BACKEND=backend)

    return lambda scenario, backend, size=2: [found[scenario] for found in ranks(backend, size)]


@pytest.fixture(params=("tensorflow", "torch"))
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("size", [1, 2])
def test_training_goes_on_from_either_file_as_if_it_had_not_stopped(run, backend, size):
    """The loaded state is bitwise the saved one: weights, slots, counters, rates.

    Three steps later the paths differ by less than a float32 rounding or two (2^-23 of a weight),
    as a retraced step may fuse its sums otherwise.
    """
    for found in run("going_on", backend, size):
        assert len(found) == 20
        for case, outcome in found.items():
            assert (
                all(outcome["distributed"]) and outcome["compression"] == ["FP16Compressor"] * 2
            ), case
            for extension, loaded in outcome["loaded"].items():
                assert len(loaded) == len(outcome["before"]), (case, extension)
                for a, b in zip(outcome["before"], loaded, strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"{case} {extension}")
            whole, *others = outcome["after"]
            assert any(
                not np.array_equal(a, b) for a, b in zip(whole, outcome["before"], strict=True)
            )
            for other in others:
                for a, b in zip(whole, other, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=str(case))


def test_losses_and_metrics_of_every_kind_and_files_of_every_name_load(run, backend):
    for found in run("kinds_of_files", backend):
        for name in ("names", "objects", "own", "registered", "by output"):
            keras_file, hdf5 = found[name]
            assert [key for key, _ in keras_file] == [key for key, _ in hdf5], name
            assert [v for _, v in keras_file] == pytest.approx([v for _, v in hdf5], rel=1e-6)
        assert (found["open"], found["path"], found["saved again"]) == (1, 1, 1)
        for extension in ("keras", "h5"):
            assert found["uncompiled", extension] is None
            assert found["untrained", extension] == 0.25


def test_functions_for_optimizers_are_taken_and_keep_the_saved_state(run, backend):
    for found in run("functions", backend):
        for (name, extension), outcome in found.items():
            assert outcome["same"] and outcome["trains"] and outcome["kept"], (name, extension)
            assert outcome["op"] == (
                name in ("wrapped", "compressed", "schedule", "Adam", "adam")
            ), (name, extension)
            assert outcome["half"] == (name in ("plain", "compressed", "custom_optimizers")), (
                name,
                extension,
            )


def test_what_cannot_be_loaded_whole_is_refused_in_a_sentence(run, backend):
    """The key is what the sentence must name, beside the file. The code in a file is not run."""
    for found in run("not_loaded", backend):
        for (words, extension), sentence in found.items():
            if words == "run":
                assert sentence is False
                continue
            assert words in sentence
            assert words == "has no name" or f".{extension}" in sentence
            assert "\n" not in sentence and len(sentence) < 450


def test_rank_0_may_load_an_h5_file_that_the_others_lack(run, backend):
    first, second = run("loaded_on_root", backend)
    assert first["iterations"] == second["iterations"] == 1 + 4
    for a, b in zip(first["weights"], second["weights"], strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_overridden_method_is_called(run, backend):
    """2 epochs of 4 batches.

    Commits after batches 3 (of each epoch's count of 3 in 8: 3 and 6) and both epochs.
    """
    once, epochs, batches = 1, 2, 8
    expected = {
        "on_train_begin": once,
        "on_train_end": once,
        "on_epoch_begin": epochs,
        "on_epoch_end": epochs,
        "on_batch_begin": batches,
        "on_batch_end": batches,
        "on_train_batch_begin": batches,
        "on_train_batch_end": batches,
    }
    for rank, found in enumerate(run("overriding", backend)):
        for name, calls in found["calls"].items():
            assert {hook: calls[hook] for hook in expected} == expected, name
        assert found["calls"]["broadcast"]["register_local_var"] == 2
        assert found["calls"]["commit"]["commit"] == 2 + 2
        assert found["state"] == {"commit": 2 + 2, "save": 2 + 2}
        assert found["local"] == [True, True] + [rank == 0] * 2
        read = {
            "batches_remaining": 1,
            "steps_per_epoch": 4,
            "initial_epoch": 0,
            "current_epoch": 1,
        }
        assert found["read"] == read and found["held"] == [0, 2]


def test_an_override_replaces_what_the_class_does(run, backend):
    for found in run("replaced", backend):
        assert found["commits"] == {}
        assert found["rate"][0] == found["rate"][1]


def test_the_advice_for_a_model_without_variables_works(run, backend):
    for found in run("advice", backend):
        for name, outcome in found.items():
            assert "call it once on a batch first: model(x[:1])" in outcome["said"], name
            assert outcome["variables"] == 6 and outcome["trained"] and outcome["restored"], name
