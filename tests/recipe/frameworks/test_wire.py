"""float16 on the wire: a loss scale keeps small gradients, and all ranks skip what overflows."""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch

from recipe.config import Data, Model, Optimizer, Recipe, Schedule
from recipe.configs import quick
from recipe.data.element import Element
from recipe.data.pipeline import TrainingExamples
from recipe.data.sources import open_source
from recipe.frameworks.replica import load_framework
from recipe.frameworks.torch import resnet
from recipe.ranks import collectives
from recipe.rules.epoch import Share
from tests.pools import run_on_ranks

N, SIZE = 8, 16
# config.framework and Keras's backend, which decides what the ranks are bound to
FRAMEWORKS = [("keras", "tensorflow"), ("keras", "torch"), ("torch", "torch")]
BIAS = "model/fc/bias"  # it begins at 0, and has no weight decay


def recipe(framework: str, compression: str) -> Recipe:
    return Recipe(
        framework=framework,
        k=2,
        n=N,
        data=Data(image_size=SIZE),
        model=Model(blocks=(1, 1), width=8, stem="small"),
        # η = 1, so that a step takes the gradient away
        optimizer=Optimizer(
            base_rate=256 / (2 * N), momentum=0.0, nesterov=False, compression=compression
        ),
        schedule=Schedule(warmup="none"),
    )


def element(weight: float) -> Element:
    """Return this rank's examples, of this weight in the loss."""
    draw = np.random.default_rng(collectives.rank())
    images = draw.integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8)
    labels = draw.integers(0, 10, N, dtype=np.int32)
    return Element(images, labels, np.full(N, weight, np.float32))


def trained(framework: str, compression: str, weights: list[float]) -> list[dict]:
    """Train a step for each of the weights, which are this rank's; return the states."""
    replica = load_framework(framework).make_replica(recipe(framework, compression), 10)
    replica.begin(100)
    replica.begin_epoch(0)
    states = []
    for step, weight in enumerate(weights):
        replica.step(step, itertools.repeat(element(weight)), False)()
        states.append({name: array.copy() for name, array in replica.arrays().items()})
    return states


class Gradients(NamedTuple):
    """A bias's gradient."""

    exact: np.ndarray
    by_float16: np.ndarray


def small_gradients(framework: str) -> Gradients:
    (exact,) = trained(framework, "none", [5e-8])
    (by_float16,) = trained(framework, "fp16", [5e-8])
    return Gradients(-exact[BIAS], -by_float16[BIAS])


@pytest.mark.ranks
@pytest.mark.parametrize(("framework", "backend"), FRAMEWORKS)
def test_gradients_too_small_for_float16_arrive(framework, backend):
    """Two roundings to multiples of 2⁻²⁴, of a gradient and of the mean, 2¹⁰ smaller afterwards."""
    for exact, by_float16 in run_on_ranks(backend, 2, small_gradients, framework=framework):
        assert 1e-9 < np.abs(exact).max() < 2**-25  # float16 would make it 0
        np.testing.assert_allclose(by_float16, exact, rtol=0, atol=2 * 2**-25 / 2**10)


def loss_scale(state: dict) -> float:
    """Return the loss scale, by Keras's name or PyTorch's."""
    (name,) = (name for name in state if name.endswith(("/dynamic_scale", "/loss_scale")))
    return float(state[name])


def overflow(framework: str) -> list[dict]:
    last = collectives.rank() == collectives.size() - 1
    return trained(framework, "fp16", [1.0, 1e30 if last else 1.0, 1.0])


@pytest.mark.ranks
@pytest.mark.parametrize(("framework", "backend"), FRAMEWORKS)
def test_an_overflow_on_the_wire_is_skipped_by_all_ranks(framework, backend):
    """The scale begins at 2¹⁰ and is halved. The weights stay, and go on in the next step."""
    ranks = run_on_ranks(backend, 2, overflow, framework=framework)
    for before, skipped, after in ranks:
        assert [loss_scale(state) for state in (before, skipped, after)] == [2**10, 2**9, 2**9]
        kernel = "model/fc/kernel"
        np.testing.assert_array_equal(before[kernel], skipped[kernel])
        assert np.isfinite(after[kernel]).all()
        assert np.abs(after[kernel] - skipped[kernel]).max() > 0
        np.testing.assert_array_equal(after[kernel], ranks[0][2][kernel])


def gradient(network: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    network.zero_grad()
    logits = network(torch.as_tensor(images))
    torch.nn.functional.cross_entropy(logits, torch.as_tensor(labels).long()).backward()
    return np.concatenate([p.grad.numpy().ravel() for p in network.parameters()])


def lost(gradients: list[np.ndarray], ranks: int, scale: float) -> float:
    """Return the share of the mean's entries that become 0, summed in float16 as NCCL does.

    NCCL divides by the number of ranks first. The gradients are dealt to the ranks in turns.
    """
    total = np.zeros_like(gradients[0], np.float16)
    for rank in range(ranks):
        own = gradients[rank % len(gradients)] * np.float32(scale / ranks)
        total += own.astype(np.float16)
    mean = np.mean(gradients, axis=0, dtype=np.float64)
    return float(np.mean((total == 0) & (mean != 0)))


def test_the_scale_saves_the_gradients_of_256_ranks():
    """The real gradients of the small network after 20 steps: a quarter of them would vanish."""
    settings = dataclasses.replace(quick.RECIPE, n=32, k=8)
    source = open_source(settings.data, "train", 0)
    examples = TrainingExamples(source, settings, Share.of(settings, 0, 1), threads=1)
    elements = iter(examples.elements())
    network = resnet.build(settings, 10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        gradient(network, *next(elements)[:2])
        optimizer.step()

    gradients = [gradient(network, *next(elements)[:2]) for _ in range(8)]
    unscaled = lost(gradients, 256, 1.0)
    assert unscaled > 0.1
    assert lost(gradients, 256, 2.0**10) < unscaled / 100
