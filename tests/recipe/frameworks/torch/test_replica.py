"""The native PyTorch replica on 1, 2 and 4 real ranks.

Tested are virtual workers, agreement, precision and precise BN. The body of a test with `@on_ranks`
runs on the ranks, and so do the functions that the others give to `run_on_ranks`.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from recipe.config import Data, Model, Optimizer, Recipe, Run, Schedule
from recipe.data.element import Element
from recipe.errors import RunError
from recipe.frameworks.replica import Replica, load_framework
from recipe.frameworks.torch.wire import packed
from recipe.ranks import collectives
from recipe.rules.epoch import Share
from recipe.system.arrays import Arrays
from tests.pools import on_ranks, run_on_ranks

pytestmark = pytest.mark.ranks

SIZES = (1, 2, 4)
K, N, IMAGE = 4, 8, 16


def recipe(run: dict | None = None, compression: str = "none", **model: Any) -> Recipe:
    return Recipe(
        framework="torch",
        k=K,
        n=N,
        data=Data(image_size=IMAGE),
        model=Model(**{"blocks": (1, 1), "width": 8, "stem": "small"} | model),
        optimizer=Optimizer(base_rate=0.8, compression=compression),
        schedule=Schedule(warmup="none"),
        run=Run(**run or {}),
    )


def replica(settings: Recipe) -> Replica:
    """Make a replica whose training has begun."""
    begun = load_framework("torch").make_replica(settings, 10)
    begun.begin(100)
    begun.begin_epoch(0)
    return begun


def own_workers(settings: Recipe) -> range:
    return Share.of(settings, collectives.rank(), collectives.size()).workers


def elements(settings: Recipe, steps: int = 1) -> list[Element]:
    """Return this rank's share of the same minibatches, whatever the number of ranks."""
    share, at_once = [], settings.run.workers_at_once
    for step in range(steps):
        draw = np.random.default_rng(step)
        images = draw.integers(0, 256, (K, N, IMAGE, IMAGE, 3), dtype=np.uint8)
        labels = draw.integers(0, 10, (K, N), dtype=np.int32)
        for first in own_workers(settings)[::at_once]:
            part = slice(first, first + at_once)
            flat = images[part].reshape(-1, IMAGE, IMAGE, 3)
            share.append(Element(flat, labels[part].ravel(), np.ones(N * at_once, np.float32)))
    return share


class Trained(NamedTuple):
    """What a rank has after four steps."""

    losses: np.ndarray  # [step, worker]
    arrays: Arrays  # all state
    logits: np.ndarray  # with precise statistics


FORMS = {
    "plain": lambda: recipe(),
    "at_once": lambda: recipe(run={"workers_at_once": K // collectives.size()}),
    "first": lambda: recipe(data_format="channels_first"),
    "bfloat16": lambda: recipe(precision="mixed_bfloat16"),
    "compressed": lambda: recipe(compression="fp16"),
}


def train(form: str) -> Trained:
    settings = FORMS[form]()
    trained, source = replica(settings), iter(elements(settings, 4))
    losses = [trained.step(step, source, False)()[0] for step in range(4)]
    images = torch.arange(2 * IMAGE * IMAGE * 3).reshape(2, IMAGE, IMAGE, 3).to(torch.uint8)
    with trained.statistics_of(iter(elements(settings, 2))):
        logits = trained.predict(images)
    return Trained(np.array(losses), trained.arrays(), logits)


@functools.cache
def trained_on(backend: str, size: int, form: str) -> list[Trained]:
    """Return what every rank has after one training for all tests."""
    return run_on_ranks(backend, size, train, form=form)


def assert_close(one: Arrays, other: Arrays, tolerance: float) -> None:
    """Check that every array is within `tolerance` of its largest value."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert np.abs(value - other[name]).max() <= tolerance * max(1, np.abs(value).max()), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ("plain", "at_once", "first"))
def test_the_numbers_depend_on_k_alone(backend, size, form):
    """Not on the ranks, nor on how a rank goes through its workers, nor on the layout.

    Four steps at η = 0.1, with momentum, whose float32 sums were taken in other orders (2e-6 here).
    """
    (reference,) = trained_on(backend, 1, "plain")
    trained = trained_on(backend, size, form)[0]
    assert_close(reference.arrays, trained.arrays, 2e-5)
    np.testing.assert_allclose(trained.losses, reference.losses, rtol=1e-5)
    np.testing.assert_allclose(trained.logits, reference.logits, atol=1e-5)


@pytest.mark.parametrize("size", (2, 4))
@pytest.mark.parametrize("form", FORMS)
def test_all_state_is_the_same_bits_on_all_ranks(backend, size, form):
    first, *others = trained_on(backend, size, form)
    for other in others:
        for name, array in first.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[name], name)
        np.testing.assert_array_equal(first.losses, other.losses)


@pytest.mark.parametrize("form", ("bfloat16", "compressed"))
def test_less_precision_is_the_same_training(backend, form):
    """8 bits of mantissa in the activations, 11 on the wire: the losses agree to three digits."""
    losses = trained_on(backend, 2, form)[0].losses
    np.testing.assert_allclose(losses, trained_on(backend, 1, "plain")[0].losses, rtol=1e-2)
    assert losses.tolist() != trained_on(backend, 2, "plain")[0].losses.tolist()


@on_ranks(1, 2, 4)
def test_an_overflow_on_one_rank_is_skipped_by_all():
    """The last rank's gradients overflow in the second of three steps.

    The scale begins at 2¹⁵ and is halved; the weights stay, and go on in the next step.
    """
    settings = recipe(precision="mixed_float16")
    trained, states = replica(settings), []
    for step in range(3):
        share = elements(settings, step + 1)[-K // collectives.size() :]
        if step == 1 and collectives.rank() == collectives.size() - 1:
            share = [element._replace(weights=element.weights * 1e30) for element in share]
        trained.step(step, iter(share), False)()
        states.append(trained.arrays())

    assert [float(s["optimizer/loss_scale"]) for s in states] == [2**15, 2**14, 2**14]
    assert [int(s["optimizer/finite_steps"]) for s in states] == [1, 0, 1]
    before, skipped, after = (s["model/fc/kernel"] for s in states)
    np.testing.assert_array_equal(before, skipped)
    assert np.abs(after - skipped).max() > 0
    np.testing.assert_array_equal(after, collectives.broadcast(after, "kernel"))


def begin_from_own_state() -> Arrays:
    """Return the state of a replica that begins with another on each rank."""
    begun = load_framework("torch").make_replica(recipe(), 10)
    with torch.no_grad():
        for entry in begun._state():
            entry.tensor.add_(collectives.rank())
    begun.begin(100)
    return begun.arrays()


@pytest.mark.parametrize("size", (2, 4))
def test_rank_0s_state_is_everyones_before_the_first_step(backend, size):
    """Weights, moving statistics and velocities."""
    (alone,) = run_on_ranks(backend, 1, begin_from_own_state)
    for arrays in run_on_ranks(backend, size, begin_from_own_state):
        assert_close(alone, arrays, 0)


@on_ranks(2, 4)
def test_a_replica_that_differs_in_one_bit_stops_all_ranks():
    trained = replica(recipe(run={"replica_check_every": 1}))
    if collectives.rank() == 1:
        packed(trained.network.layer1[0].conv2.weight).view(torch.int32)[5] ^= 1 << 10
    with pytest.raises(RunError) as error:
        trained.step(6, iter(elements(recipe())), False)
    assert "layer1.0.conv2.weight (8, 8, 3, 3) is the first variable" in str(error.value)
    assert "after step 7" in str(error.value)


@on_ranks(1, 2, 4)
def test_all_ranks_hear_that_one_wants_to_leave():
    wants_to_leave = collectives.rank() == collectives.size() - 1
    wait = replica(recipe()).step(0, iter(elements(recipe())), wants_to_leave)
    assert wait().stop


@on_ranks(1)
def test_a_replica_takes_up_its_own_state_and_no_other():
    resumed = replica(recipe(precision="mixed_float16"))
    written = {name: array + 1 for name, array in resumed.arrays().items()}
    resumed.restore(written)
    assert_close(written, resumed.arrays(), 0)

    bias = "model/fc/bias"
    lacking = {name: array for name, array in written.items() if name != bias}
    with pytest.raises(RunError, match=r"the checkpoint lacks model/fc/bias.*recipe\.convert"):
        resumed.restore(lacking)
    with pytest.raises(RunError, match="the model lacks another"):
        resumed.restore(written | {"another": written[bias]})
    with pytest.raises(RunError, match=r"model/fc/bias has the shape \(1,\), the model's \(10,\)"):
        resumed.restore(written | {bias: np.zeros(1)})


@on_ranks(2, 4)
def test_one_round_of_allreduces_begins_inside_the_last_backward_pass():
    """Not one more for each virtual worker, and not after the pass.

    All are under way when it returns.
    """
    trained, counts = replica(recipe()), []
    step, backward = trained._step, trained._step.backward

    def count_after(*arguments: object) -> None:
        backward(*arguments)
        begun = [bucket for bucket in step.reduction.buckets if bucket.handle is not None]
        counts.append(sum(len(bucket.parameters) for bucket in begun))

    step.backward = count_after
    trained.step(0, iter(elements(recipe())), False)()
    *before, last = counts
    assert before == [0] * (K // collectives.size() - 1)
    assert last == len(list(trained.network.parameters()))


@on_ranks(2)
def test_reductions_begin_between_compiled_blocks():
    """When the stem gets its gradients, the last, the first bucket is under way."""
    trained, begun = replica(recipe(run={"compile": True})), []
    buckets = trained._step.reduction.buckets
    stem = trained.network.conv1.weight
    stem.register_post_accumulate_grad_hook(lambda _: begun.append(buckets[0].handle is not None))
    losses = trained.step(0, iter(elements(recipe())), False)().losses
    assert begun == [False] * (K // collectives.size() - 1) + [True]

    # The compiler's kernels round otherwise: float32's 2^-24, over sums of a few hundred.
    usual = replica(recipe()).step(0, iter(elements(recipe())), False)().losses
    np.testing.assert_allclose(losses, usual, rtol=3e-5)
