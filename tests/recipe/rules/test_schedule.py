"""η of the presets, at every boundary of their schedules, written from the paper's formula."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cli import load_recipe
from recipe.config import Recipe, Schedule
from recipe.rules.schedule import Rate, recipe_rate, scaled_rate


def at(preset: str, steps_per_epoch: int, step: int) -> float:
    return recipe_rate(load_recipe(preset))(step / steps_per_epoch)


# 1,281,167 // 8192 = 156 steps an epoch.
# 0.1 → 3.2 in 5·156 = 780 equal increments (paper, sec. 2.2, 5.1).
IMAGENET_1HR = {
    0: 0.1,
    1: 0.1 + 3.1 / 780,
    390: 1.65,
    779: 3.2 - 3.1 / 780,
    780: 3.2,
    30 * 156 - 1: 3.2,
    30 * 156: 0.32,
    60 * 156 - 1: 0.32,
    60 * 156: 0.032,
    80 * 156 - 1: 0.032,
    80 * 156: 0.0032,
    90 * 156 - 1: 0.0032,
}

# 1,281,167 // 256 = 5004 steps an epoch; kη is η.
IMAGENET_8GPU = {
    0: 0.1,
    5 * 5004: 0.1,
    30 * 5004 - 1: 0.1,
    30 * 5004: 0.01,
    60 * 5004 - 1: 0.01,
    60 * 5004: 0.001,
    80 * 5004 - 1: 0.001,
    80 * 5004: 0.0001,
    90 * 5004 - 1: 0.0001,
}


@pytest.mark.parametrize(("step", "rate"), IMAGENET_1HR.items())
def test_imagenet_1hr(step, rate):
    assert at("imagenet_1hr", 156, step) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("step", "rate"), IMAGENET_8GPU.items())
def test_imagenet_8gpu(step, rate):
    assert at("imagenet_8gpu", 5004, step) == pytest.approx(rate, rel=1e-12)


def test_scaling_is_not_integer_division():
    """The rate is not 0.1·(kn // 256)."""
    assert scaled_rate(0.1, 384) == pytest.approx(0.15)
    assert scaled_rate(0.1, 128) == pytest.approx(0.05)


def test_step_decay_is_a_power_of_the_number_of_decays_passed():
    """No multiplier is applied again each epoch, or reset at the next boundary."""
    rate = Rate(3.2, 3.2, warmup="none")
    assert [rate(e) for e in (29, 31, 35, 59)] == pytest.approx([3.2, 0.32, 0.32, 0.32])
    assert [rate(e) for e in (61, 79, 81, 89)] == pytest.approx([0.032, 0.032, 0.0032, 0.0032])


@given(st.integers(2, 400), st.floats(0.05, 8), st.integers(1, 64))
def test_warmup_rises_by_a_constant_amount_and_ends_exactly_at_the_peak(steps, warmup_epochs, k):
    """No overshoot, no increment left out, also in a warmup of a fraction of an epoch."""
    rate = Rate(0.1, 0.1 * k, warmup_epochs=warmup_epochs)
    ramp = [rate(t / steps) for t in range(math.ceil(warmup_epochs * steps) + 2)]
    assert ramp[0] == 0.1
    assert ramp[-1] == ramp[-2] == 0.1 * k
    increments = [b - a for a, b in itertools.pairwise(ramp[:-2])]
    expected = (0.1 * k - 0.1) / (warmup_epochs * steps)
    # 1e-12: float64 rounding of rates below 8.
    assert increments == pytest.approx([expected] * len(increments), abs=1e-12)


def test_warmup_ends_exactly_at_its_last_iteration_when_it_is_a_fraction_of_an_epoch():
    rate = Rate(0.1, 0.8, warmup_epochs=0.3)
    assert rate(2 / 10) == pytest.approx(0.1 + 0.7 * 2 / 3)
    assert rate(3 / 10) == 0.8


def test_a_resumed_run_is_in_the_middle_of_the_ramp():
    whole = recipe_rate(load_recipe("imagenet_1hr"))
    resumed = recipe_rate(load_recipe("imagenet_1hr"))
    for step in range(300):
        whole(step / 156)
    assert resumed(300 / 156) == whole(300 / 156)


def test_constant_warmup_holds_the_base_rate_and_then_jumps():
    rate = recipe_rate(Recipe(schedule=Schedule(warmup="constant")))
    assert [rate(e) for e in (0, 4.999, 5)] == pytest.approx([0.1, 0.1, 3.2])


def test_without_warmup_the_first_rate_is_the_scaled_one():
    assert recipe_rate(Recipe(schedule=Schedule(warmup="none")))(0) == pytest.approx(3.2)


def test_a_minibatch_below_the_reference_has_nothing_to_warm_up():
    rate = recipe_rate(Recipe(k=2, n=32))
    assert rate(0) == rate(5) == pytest.approx(0.025)
