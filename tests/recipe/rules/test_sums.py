"""Sums of losses and errors against plain formulas."""

import math

import numpy as np
import pytest

from recipe.rules.sums import Sums, final_error


def test_sums_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 7)) * 30
    labels = rng.integers(0, 7, 50)

    sums = Sums()
    for part in (slice(0, 3), slice(3, 20), slice(20, 50)):
        one = Sums()
        one.add(logits[part], labels[part])
        sums += one

    losses = []
    for row, label in zip(logits, labels, strict=True):
        log_total = math.log(math.fsum(math.exp(logit) for logit in row))
        losses.append(log_total - row[label])
    assert sums.mean_loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert sums.error == pytest.approx(np.mean(logits.argmax(axis=1) != labels))
    assert sums.count == 50


def test_large_logits_do_not_overflow():
    sums = Sums()
    sums.add(np.array([[1e4, 0.0]], dtype=np.float32), np.array([1]))
    assert sums.mean_loss == pytest.approx(1e4)


def test_no_examples_have_no_error():
    assert math.isnan(Sums().error)
    assert math.isnan(Sums().mean_loss)


def test_the_result_is_the_median_of_the_last_five_epochs():
    assert final_error([0.9, 0.1, 0.5, 0.2, 0.4, 0.3]) == pytest.approx(0.3)
    assert final_error([0.9, 0.7]) == pytest.approx(0.8)
