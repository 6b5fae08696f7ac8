"""Batch normalisation by the frameworks' kernels against its definition in float64, in Keras on
both backends: forward, backward, statistics.

The bounds are derived, for sums of N float32 terms in any order. With u = 2⁻²⁴, the most by which
one operation rounds:

- a sum's error is at most N·u times the sum of its terms' absolute values;
- a variance's is at most N·u·κ of it, with κ² = 1 + mean²/variance, if it is computed stably (Chan,
  Golub and LeVeque 1983). A difference of squares has κ², which the case far from zero shows;
- what is rounded to a narrower dtype at the end is off by that dtype's u once more.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.ranks import ROOT, results

pytestmark = pytest.mark.ranks

PROGRAM = str(ROOT / "tests/recipe/frameworks/keras/normalization_program.py")
EPSILON, MOMENTUM = 1e-5, 0.9
U = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
OTHERS = 12  # roundings beside the N of a sum: differences, products, a root, a quotient
TINY = 2.0**-24  # what float16 rounds to below its normal numbers: half of its smallest step, twice


class Expected(NamedTuple):
    """A value by definition, and how far float32 may be from it."""

    value: np.ndarray
    bound: np.ndarray


@pytest.fixture(scope="module", params=["tensorflow", "torch"])
def found(request, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("normalization")
    return results(folder / "1", 1, PROGRAM, KERAS_BACKEND=request.param)[0]


def expected(inputs: dict[str, Any]) -> dict[str, Expected]:
    """All results by definition, in float64: each worker by itself."""
    parts = [np.float64(part) for part in np.split(inputs["x"], inputs["workers"])]
    upstreams = [np.float64(part) for part in np.split(inputs["upstream"], inputs["workers"])]
    gamma, beta = np.float32(inputs["gamma"]), np.float32(inputs["beta"])
    pairs = zip(parts, upstreams, strict=True)
    workers = [of_worker(x, dy, np.float64(gamma), np.float64(beta)) for x, dy in pairs]
    joined: dict[str, Expected] = {}
    for name in ("y", "dx"):
        values, bounds = zip(*[worker[name] for worker in workers], strict=True)
        joined[name] = Expected(np.concatenate(values), np.concatenate(bounds))
    for name in ("mean", "variance"):
        values, bounds = zip(*[worker[name] for worker in workers], strict=True)
        joined[name] = Expected(np.mean(values, axis=0), np.mean(bounds, axis=0))
    for name in ("dgamma", "dbeta"):
        values, bounds = zip(*[worker[name] for worker in workers], strict=True)
        joined[name] = Expected(np.sum(values, axis=0), np.sum(bounds, axis=0))
    return joined


def of_worker(
    x: np.ndarray, dy: np.ndarray, gamma: np.ndarray, beta: np.ndarray
) -> dict[str, Expected]:
    """One worker's results. `slack` is the relative error of a sum, `blur` the error of x̂."""
    axes = (0, 1, 2)
    count = x[..., 0].size
    slack = (count + OTHERS) * U["float32"]
    mean, variance = x.mean(axes), x.var(axes)
    inverse = 1 / np.sqrt(variance + EPSILON)
    normal = (x - mean) * inverse
    magnitude = np.abs(x).mean(axes)

    # κ·variance = √(variance·(variance + mean²)). That of a constant channel has only the error of
    # the mean, squared.
    spread = slack * np.sqrt(variance * (variance + mean**2)) + (slack * magnitude) ** 2
    blur = slack * inverse * (np.abs(x) + magnitude)
    blur = blur + np.abs(normal) * (spread * inverse**2 / 2 + slack)

    # Backward.
    sums = np.abs(dy).mean(axes), np.abs(dy * normal).mean(axes)
    factor = gamma * inverse
    dx = factor * (dy - dy.mean(axes) - normal * (dy * normal).mean(axes))
    terms = np.abs(dy) + sums[0] + np.abs(normal) * sums[1]
    blurred = blur * sums[1] + np.abs(normal) * (np.abs(dy) * blur).mean(axes)
    relative = slack + spread * inverse**2 / 2
    return {
        "y": Expected(gamma * normal + beta, gamma * blur + slack * np.abs(beta)),
        "mean": Expected(mean, slack * magnitude),
        "variance": Expected(variance, spread),
        "dx": Expected(dx, factor * (relative * terms + blurred)),
        "dgamma": Expected(
            (dy * normal).sum(axes), count * slack * sums[1] + (np.abs(dy) * blur).sum(axes)
        ),
        "dbeta": Expected(dy.sum(axes), count * slack * sums[0]),
    }


def check(name: str, value: np.ndarray, expected: Expected, dtype: str = "float32") -> None:
    """Compare with the definition. What comes in a narrower dtype was rounded to it at the end."""
    bound = expected.bound
    if dtype != "float32":
        bound = bound + U[dtype] * (np.abs(expected.value) + bound) + TINY
    excess = np.abs(np.float64(value) - expected.value) - bound
    assert (excess <= 0).all(), f"{name}: {excess.max()} over the bound, {bound.max()} at most"


def test_each_case_is_batch_normalisation_by_definition(found):
    for name, case in found["cases"].items():
        definition, dtype = expected(case["inputs"]), case["dtype"]
        check(f"{name}: y", case["y"], definition["y"], dtype)
        check(f"{name}: dx", case["dx"], definition["dx"], dtype)
        check(f"{name}: dgamma", case["dgamma"], definition["dgamma"])
        check(f"{name}: dbeta", case["dbeta"], definition["dbeta"])


def test_moving_statistics_move_by_the_mean_of_the_workers(found):
    """From a mean of 0 and a variance of 1."""
    for name, case in found["cases"].items():
        definition = expected(case["inputs"])
        for value, statistic, start in zip(
            case["moving"], ("mean", "variance"), (0, 1), strict=True
        ):
            wanted, bound = definition[statistic]
            moved = MOMENTUM * start + (1 - MOMENTUM) * wanted
            rounding = 4 * U["float32"] * (start + np.abs(moved))  # two products, a sum, momentum
            check(f"{name}: {statistic}", value, Expected(moved, (1 - MOMENTUM) * bound + rounding))


def test_the_layer_computes_in_its_policys_dtype(found):
    dtypes = {name: case["dtype"] for name, case in found["cases"].items()}
    for policy, dtype in (("mixed_bfloat16", "bfloat16"), ("mixed_float16", "float16")):
        assert {dtypes[name] for name in dtypes if name.startswith(policy)} == {dtype}


def test_evaluation_takes_the_moving_statistics_and_leaves_them(found):
    for name, case in found["cases"].items():
        inputs = case["inputs"]
        x, gamma, beta = (np.float64(inputs[key]) for key in ("x", "gamma", "beta"))
        mean, variance = (np.float64(value) for value in case["moving"])
        inverse = 1 / np.sqrt(variance + EPSILON)
        terms = gamma * inverse * (np.abs(x) + np.abs(mean)) + np.abs(beta)
        value = gamma * inverse * (x - mean) + beta
        evaluation = Expected(value, OTHERS * U["float32"] * terms)
        check(f"{name}: evaluation", case["evaluated"], evaluation, case["dtype"])
        for before, after in zip(case["moving"], case["moving after"], strict=True):
            np.testing.assert_array_equal(before, after, err_msg=name)


def test_one_value_a_channel_has_no_variance(found):
    """The short last minibatch of an epoch may consist of it."""
    case = found["cases"]["one value, 3 workers"]
    np.testing.assert_array_equal(case["moving"][1], np.full(8, np.float32(MOMENTUM)))


def test_again_it_gives_the_same_bits(found):
    for name, case in found["cases"].items():
        for key in ("y", "dx", "dgamma", "dbeta"):
            np.testing.assert_array_equal(case[key], found["again"][name][key], err_msg=name)


def test_a_short_batch_has_its_own_statistics(found):
    for batch in found["short"]:
        x = batch["x"]
        ones, zeros = np.ones(8), np.zeros(8)
        inputs = {"x": x, "upstream": x, "gamma": ones, "beta": zeros, "workers": 1}
        definition = expected(inputs)
        for key in ("y", "mean", "variance"):
            check(f"{len(x)} examples: {key}", batch[key], definition[key])


def test_an_untrainable_layer_evaluates(found):
    np.testing.assert_array_equal(found["untrainable"]["y"], found["untrainable"]["evaluated"])


def test_what_the_kernels_lack_is_refused(found):
    refusals = found["refusals"]
    assert refusals["scale"] == "WorkerBatchNormalization: scale can only be True"
    assert refusals["renorm"] == "WorkerBatchNormalization: renorm can only be False"
    assert "the shape (None, 8) with axis=-1 is another" in refusals["vectors"]
    assert "with axis=2 is another" in refusals["axis"]


def test_a_saved_layer_keeps_its_workers(found):
    assert found["workers kept"] == 3
