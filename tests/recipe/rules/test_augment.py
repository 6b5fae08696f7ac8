"""Crops and flips: their distribution against a scalar reference, bounds, and what decides."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.rules import augment

SAMPLES = 20_000


def reference_crop(
    height: int, width: int, min_area: float, rng: random.Random
) -> tuple[int, int, int, int]:
    """Return one box, written down from the reference's description, a draw at a time."""
    for _ in range(10):
        area = height * width * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= h <= height and 1 <= w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def crops(
    height: int, width: int, count: int, seed: int = 0, epoch: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    return augment.crop_boxes(np.tile((height, width), (count, 1)), np.arange(count), seed, epoch)


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest distance between two samples' cumulative distributions."""
    values = np.sort(np.concatenate([a, b]))
    share_a = np.searchsorted(np.sort(a), values, side="right") / len(a)
    share_b = np.searchsorted(np.sort(b), values, side="right") / len(b)
    return np.abs(share_a - share_b).max()


@pytest.mark.parametrize(
    ("height", "width", "min_area"),
    [(375, 500, 0.08), (500, 333, 0.08), (28, 28, 0.08), (100, 900, 0.08), (28, 28, 0.5)],
)
def test_distribution_is_the_reference_samplers(height: int, width: int, min_area: float) -> None:
    # Two equal distributions are farther apart in one test of a million (Smirnov's bound).
    bound = math.sqrt(-math.log(1e-6 / 2) / 2) * math.sqrt(2 / SAMPLES)

    shapes = np.tile((height, width), (SAMPLES, 1))
    boxes, _ = augment.crop_boxes(shapes, np.arange(SAMPLES), 0, 0, min_area)
    rng = random.Random(0)
    expected = np.array([reference_crop(height, width, min_area, rng) for _ in range(SAMPLES)])
    for name, figure in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "y": lambda b: b[:, 0],
        "x": lambda b: b[:, 1],
        "bottom": lambda b: b[:, 0] + b[:, 2],
        "right": lambda b: b[:, 1] + b[:, 3],
    }.items():
        assert kolmogorov_smirnov(figure(boxes), figure(expected)) < bound, name


def test_flips_are_fair_and_independent_of_the_box() -> None:
    boxes, flips = crops(375, 500, SAMPLES)
    # Five standard deviations of SAMPLES tosses.
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / math.sqrt(SAMPLES)
    area = boxes[:, 2] * boxes[:, 3]
    assert abs(np.corrcoef(area, flips)[0, 1]) < 5 / math.sqrt(SAMPLES)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 2**32 - 1), st.integers(0, 500))
def test_boxes_are_inside_the_image(height: int, width: int, seed: int, epoch: int) -> None:
    boxes, _ = crops(height, width, 20, seed, epoch)
    y, x, h, w = boxes.T
    assert boxes.dtype == np.int32
    assert (boxes >= [0, 0, 1, 1]).all()
    assert (y + h <= height).all()
    assert (x + w <= width).all()


def test_only_the_example_decides() -> None:
    """An example's crop is the same in any batch, and another one in another epoch or seed."""
    shapes = np.random.default_rng(1).integers(20, 600, (64, 2))
    indices = np.random.default_rng(2).permutation(10_000)[:64]
    boxes, flips = augment.crop_boxes(shapes, indices, 7, 3)
    for part in (slice(0, 1), slice(5, 20), slice(None, None, -1)):
        part_boxes, part_flips = augment.crop_boxes(shapes[part], indices[part], 7, 3)
        assert np.array_equal(part_boxes, boxes[part])
        assert np.array_equal(part_flips, flips[part])
    for seed, epoch in ((7, 4), (8, 3), (3, 7)):
        other_boxes, _ = augment.crop_boxes(shapes, indices, seed, epoch)
        assert not np.array_equal(other_boxes, boxes)


def test_boxes_are_golden() -> None:
    boxes, flips = crops(375, 500, 3)
    assert boxes.tolist() == [[115, 243, 224, 194], [98, 64, 192, 199], [31, 221, 313, 251]]
    assert flips.tolist() == [True, True, True]


def test_uniforms_are_uniform_over_neighbouring_indices_epochs_and_seeds() -> None:
    count = 4096
    example = np.array([5])
    along = {
        "indices": augment.uniforms(np.arange(count), 0, 0, 1)[:, 0],
        "counters": augment.uniforms(example, 0, 0, count)[0],
        "epochs": np.array([augment.uniforms(example, 0, e, 1)[0, 0] for e in range(count)]),
        "seeds": np.array([augment.uniforms(example, s, 0, 1)[0, 0] for s in range(count)]),
    }
    even = (np.arange(count) + 0.5) / count
    for name, values in along.items():
        assert kolmogorov_smirnov(values, even) < 2.7 / math.sqrt(count), name
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / math.sqrt(count), name


def test_evaluation_boxes() -> None:
    boxes = augment.eval_boxes(np.array([[256, 256], [512, 512], [512, 1024]]), 224)
    assert boxes.tolist() == [[16, 16, 224, 224], [32, 32, 448, 448], [32, 288, 448, 448]]
    assert augment.eval_boxes(np.array([[28, 28]]), 28).tolist() == [[1.75, 1.75, 24.5, 24.5]]


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([28, 32, 160, 224]))
def test_evaluation_boxes_are_inside_and_central(height: int, width: int, size: int) -> None:
    (y, x, h, w) = augment.eval_boxes(np.array([[height, width]]), size)[0]
    assert y >= 0
    assert x >= 0
    assert y + h <= height + 1e-9
    assert x + w <= width + 1e-9
    # Within the rounding of the offset to a pixel of the resized image, half a one each way.
    assert abs(y + h / 2 - height / 2) <= 0.51 * h / size
    assert abs(x + w / 2 - width / 2) <= 0.51 * w / size
