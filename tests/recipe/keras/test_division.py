"""Data divided among 1 and 2 real ranks, and each rank's own random layers, on both backends."""

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import ROOT, results

PROGRAM = str(ROOT / "tests/recipe/keras/division_program.py")
ON_TWO = ("division", "halves_of_an_epoch", "hooks", "refusals", "randomness")
COUNT = 43
KINDS = (
    "arrays",
    "weighted",
    "tensors",
    "stream",
    "uncounted",
    "batches",
    "PyDataset",
    "threads",
    "loader",
)
BY_EXAMPLE = ("arrays", "weighted", "tensors", "stream", "uncounted", "loader")

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module", params=["tensorflow", "torch"])
def run(request, tmp_path_factory):
    """One scenario's findings on every rank, of one launch for each number of ranks."""

    @functools.cache
    def ranks(size: int) -> list[dict]:
        folder: Path = tmp_path_factory.mktemp(f"division-{request.param}-{size}")
        scenarios = {1: ("division",), 2: ON_TWO}[size]
        return results(folder, size, PROGRAM, *scenarios, timeout=400, KERAS_BACKEND=request.param)

    return lambda scenario, size: [found[scenario] for found in ranks(size)]


def flat(lists: Iterable[list]) -> list:
    return list(itertools.chain.from_iterable(lists))


def minibatches(ranks: list[list]) -> list[list[list[int]]]:
    """[epoch][step] → the minibatch: all ranks' examples, one rank's after another's."""
    epochs = zip(*ranks, strict=True)  # strict: as many epochs and steps on all ranks
    return [[flat(parts) for parts in zip(*epoch, strict=True)] for epoch in epochs]


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_is_used_once_an_epoch_in_as_many_steps(run, kind):
    epochs = minibatches([found[kind]["seen"] for found in run("division", 2)])
    assert len(epochs) == 3
    for epoch in epochs:
        assert sorted(flat(epoch)) == list(range(COUNT))
    assert epochs[0] != epochs[1] != epochs[2]
    for found in run("division", 2):
        assert all(step for epoch in found[kind]["seen"] for step in epoch)
        assert found[kind]["evaluated"] == 2  # the loss and a metric


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_the_same_after_a_restart(run, kind):
    for size in (1, 2):
        for found in run("division", size):
            assert found[kind]["resumed"] == found[kind]["seen"][1:]


@pytest.mark.parametrize("kind", BY_EXAMPLE)
def test_minibatches_are_those_of_one_rank(run, kind):
    """43 examples by 8: four minibatches, and two for the last 11."""
    (alone,) = run("division", 1)
    for order in ("seen", "in order"):
        together = minibatches([found[kind][order] for found in run("division", 2)])
        assert together == alone[kind][order]
        assert [len(step) for step in together[0]] == [8, 8, 8, 8, 6, 5]
    assert flat(alone[kind]["in order"][0]) == list(range(COUNT))


@pytest.mark.parametrize("kind", ("batches", "PyDataset", "threads"))
def test_batches_are_dealt_out_and_the_last_shared(run, kind):
    """Eleven batches of four, the last of three.

    Five to a rank, of which the fifth goes with half of the last.
    """
    first, second = (found[kind]["in order"][0] for found in run("division", 2))
    assert first == [
        [0, 1, 2, 3],
        [8, 9, 10, 11],
        [16, 17, 18, 19],
        [24, 25, 26, 27],
        [32, 33],
        [34, 35, 40],
    ]
    assert second == [
        [4, 5, 6, 7],
        [12, 13, 14, 15],
        [20, 21, 22, 23],
        [28, 29, 30, 31],
        [36, 37, 38],
        [39, 41, 42],
    ]
    (alone,) = run("division", 1)
    order = [batch[0] for batch in alone[kind]["seen"][0]]
    ours = minibatches([found[kind]["seen"] for found in run("division", 2)])[0]
    assert flat(ours[:4])[::4] == order[:8]


def test_arrays_tensors_and_loaders_have_the_same_order(run):
    for found in run("division", 2):
        assert found["arrays"]["seen"] == found["tensors"]["seen"] == found["loader"]["seen"]


def test_a_pass_over_the_data_may_take_several_epochs(run):
    epochs = minibatches([found["seen"] for found in run("halves_of_an_epoch", 2)])
    for first, second in (epochs[:2], epochs[2:]):
        assert sorted(flat(first + second)) == list(range(COUNT))
    assert epochs[0] != epochs[2]


def test_settings_and_hooks_are_kept(run):
    for found in run("hooks", 2):
        assert found["PyDataset"] == (3, True, 7, 1)
        assert found["loader"] == []


def test_what_cannot_be_divided_is_refused_in_a_sentence(run):
    """The key is what the sentence must name."""
    first, second = run("refusals", 2)
    assert second.pop("one example") == "nothing"  # it has half of the batch left over as well
    for found in (first, second):
        for word, sentence in found.items():
            assert word.removeprefix("list of numbers: ") in sentence, word


def test_ranks_draw_their_own_masks_reproducibly(run):
    first, second = run("randomness", 2)
    for mine, theirs in zip(first["first"], second["first"], strict=True):
        for layer in range(5):  # each of them random
            assert not np.array_equal(mine[..., layer], theirs[..., layer])
    assert not np.array_equal(first["first"][0], first["first"][1])
    for found in (first, second):
        for again in ("second", "again", "elastic"):
            np.testing.assert_array_equal(found[again], found["first"])


def test_rank_0_keeps_its_seeds_and_counters_are_common(run):
    first, second = run("randomness", 2)
    assert len(first["states"]) == 6
    np.testing.assert_array_equal(first["states"], first["unbroadcast"])
    for mine, theirs in zip(first["states"], second["states"], strict=True):
        assert mine[0] != theirs[0] and mine[1] == theirs[1]
        assert 0 <= theirs[0] < 2**31


def test_masks_go_on_from_rank_0s_checkpoint(run):
    for found in run("randomness", 2):
        np.testing.assert_array_equal(found["resumed"], found["going on"])
        assert found["in the checkpoint"] == 6


def test_same_seeds_gives_all_ranks_the_roots_masks(run):
    first, second = run("randomness", 2)
    for found in (first, second):
        np.testing.assert_array_equal(found["same"], first["first"])
        np.testing.assert_array_equal(found["same, Horovod's"], first["first"])
    assert not np.array_equal(first["last is root"], second["last is root"])


def test_the_recipes_network_has_no_seeds(run):
    """Its dropout is a function of the example: nothing for ranks to draw."""
    for found in run("randomness", 2):
        assert found["recipe's"] == []
