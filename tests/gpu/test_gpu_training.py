"""The recipe on a GPU beside the CPU, and beside itself. Built, not run on a GPU.

On the CPU each body runs, too, so that a GPU's first hour meets no slip of the pen.
"""

import functools

import numpy as np
import pytest

from recipe.system.arrays import digest
from tests.gpu import trainings
from tests.gpu.process import call
from tests.gpu.trainings import OVERFLOW, Trained

pytestmark = pytest.mark.ranks

# Float32 sums in another order, 10 to 20 steps: between frameworks it was 2e-6 after 12 steps.
ROUNDING = 3e-5


@functools.cache
def trained(device: str, form: str) -> Trained:
    """Return what one training for all tests has come to."""
    return call(device, trainings.train, form)


def check_losses(one: Trained, other: Trained, tolerance: float) -> None:
    assert np.isfinite(one.losses).all()
    np.testing.assert_allclose(one.losses, other.losses, rtol=tolerance)


@pytest.mark.parametrize("form", ["quick", "small", "dropout", "one value"])
def test_a_training_is_the_cpus(device, form):
    """On the CPU this shows only that it can be trained."""
    if (device, form) == ("cpu", "quick"):
        pytest.skip("on the CPU the form small shows as much, in less time")
    reference, result = trained("cpu", form), trained(device, form)
    check_losses(result, reference, ROUNDING)
    # With the statistics of two batches of what was trained.
    scale = np.abs(reference.logits).max()
    np.testing.assert_allclose(result.logits, reference.logits, atol=1e-3 * scale)


def test_a_deterministic_training_has_the_same_bits_again(device):
    again = call(device, trainings.train, "deterministic")
    assert digest(trained(device, "deterministic").arrays) == digest(again.arrays)


@pytest.mark.parametrize("form", ["channels_first", "at once"])
def test_layout_and_grouping_change_nothing_but_rounding(device, form):
    check_losses(trained(device, form), trained(device, "small"), ROUNDING)


def test_dropout_drops(device):
    losses = trained(device, "dropout").losses
    assert not np.allclose(losses, trained(device, "small").losses, rtol=1e-3)


@pytest.mark.parametrize("form", ["bfloat16", "float16", "reduced in float16"])
def test_less_precision_is_the_same_training(device, form):
    """Three digits, with 8 bits of mantissa in the activations or 11 on the wire."""
    less, full = trained(device, form), trained(device, "small")
    check_losses(less, full, 1e-2)
    assert less.losses.tolist() != full.losses.tolist()


def test_an_overflow_is_skipped(device):
    result = trained(device, "overflow")
    assert result.scales == [2.0**15] * OVERFLOW + [2.0**14] * 2
    assert all(np.isfinite(array).all() for array in result.arrays.values())


def test_reduced_gradients_of_one_rank_are_its_own(device):
    """By the hooks of several ranks, in buckets, through Horovod: not a bit changes."""
    check_losses(trained(device, "reduced"), trained(device, "small"), 0)


@pytest.mark.slow
def test_a_compiled_training_is_the_same(device):
    """Other kernels, some of which add up in another order."""
    check_losses(trained(device, "compiled"), trained(device, "not compiled"), ROUNDING)


@pytest.mark.parametrize("form", ["float16", "reduced"])
def test_no_step_waits_for_the_device(device, form):
    assert call(device, trainings.waits_of_steps, form) == []
