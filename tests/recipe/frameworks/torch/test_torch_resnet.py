"""The network in PyTorch is torchvision's by its names, and Keras's by its numbers."""

import keras
import numpy as np
import pytest
import torch
from keras import layers

from recipe.cli import load_recipe
from recipe.config import Data, Model, Recipe, Run
from recipe.frameworks.keras import resnet as keras_resnet
from recipe.frameworks.torch import resnet
from recipe.frameworks.torch import weights as names
from recipe.rules import augment, dropout

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)


def torchvision_resnet50() -> dict[str, tuple]:
    """Names and shapes of the state dict of torchvision's ResNet-50, written down from its
    documentation.
    """
    found = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            prefix = f"layer{stage + 1}.{block}"
            for number, (outputs, size) in enumerate(
                [(width, 1), (width, 3), (4 * width, 1)], start=1
            ):
                fan = inputs if number == 1 else width
                found |= {f"{prefix}.conv{number}.weight": (outputs, fan, size, size)}
                found |= norm(f"{prefix}.bn{number}", outputs)
            if block == 0:
                found |= {f"{prefix}.downsample.0.weight": (4 * width, inputs, 1, 1)}
                found |= norm(f"{prefix}.downsample.1", 4 * width)
            inputs = 4 * width
    return found | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def norm(name: str, channels: int) -> dict[str, tuple]:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{v}": (channels,) for v in vectors} | {f"{name}.num_batches_tracked": ()}


def recipe(**model) -> Recipe:
    return Recipe(data=Data(image_size=64), model=Model(**{"blocks": (1, 2), "width": 8} | model))


def pair(settings: Recipe) -> tuple[keras.Model, resnet.ResNet]:
    """The Keras network with weights and statistics unlike the initial ones, and the same in
    PyTorch.
    """
    model, network = keras_resnet.build(settings, 10), resnet.build(settings, 10)
    draw = np.random.default_rng(1)
    for v in model.variables:
        v.assign(
            keras.ops.convert_to_numpy(v)
            + draw.uniform(0.05, 0.3, v.shape).astype(np.float32) / len(v.shape) ** 3
        )
    values = {v.path: keras.ops.convert_to_numpy(v) for v in model.variables}
    entries = {n: values[names.keras_path(n)] for n in network.state_dict() if names.keras_path(n)}
    tensors = {n: torch.from_numpy(names.from_keras(v).copy()) for n, v in entries.items()}
    network.load_state_dict(tensors, strict=False)
    return model, network


def test_a_torchvision_state_dict_loads_as_it_is():
    network = resnet.build(load_recipe("imagenet_1hr"), 1000)
    shapes = torchvision_resnet50()
    assert {name: tuple(v.shape) for name, v in network.state_dict().items()} == shapes
    assert list(network.state_dict()) == list(shapes)
    network.load_state_dict(
        {name: torch.zeros(shape) for name, shape in shapes.items()}, strict=True
    )
    assert sum(p.numel() for p in network.parameters()) == 25_557_032


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_initial_weights_are_those_of_keras_bit_for_bit(stem):
    model, network = keras_resnet.build(recipe(stem=stem), 10), resnet.build(recipe(stem=stem), 10)
    entries = {
        names.keras_path(n): v for n, v in network.state_dict().items() if names.keras_path(n)
    }
    assert entries.keys() == {v.path for v in model.variables}
    for v in model.variables:
        np.testing.assert_array_equal(
            names.to_keras(entries[v.path].numpy()), keras.ops.convert_to_numpy(v), v.path
        )


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_logits_are_those_of_keras(stem, layout):
    """float32; 1e-4 relative to the largest logit is the promise, 2e-6 what the summation orders
    leave here.
    """
    model, _ = pair(recipe(stem=stem))
    network = pair(recipe(stem=stem, data_format=layout))[1].eval()
    with torch.no_grad():
        ours = network(torch.from_numpy(IMAGES)).numpy()
    theirs = keras.ops.convert_to_numpy(model([IMAGES], training=False))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("workers", [1, 3])
def test_batch_statistics_are_the_biased_ones_of_keras_and_each_workers_own(workers):
    x = np.random.default_rng(2).normal(3, 2, (6, 5, 5, 4)).astype(np.float32)
    settings = Recipe(k=3, run=Run(workers_at_once=workers))
    ours = resnet.ResNet(settings, 10).norm(4)
    y = ours(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().permute(0, 2, 3, 1)
    found = [batch_norm(part) for part in np.split(x, workers)]
    outputs, means, variances = zip(*found, strict=True)
    np.testing.assert_allclose(
        y, np.concatenate(outputs), rtol=0, atol=1e-5
    )  # float32 rounding of values near 3
    np.testing.assert_allclose(ours.batch_mean, np.mean(means, axis=0), rtol=1e-5)
    np.testing.assert_allclose(ours.batch_variance, np.mean(variances, axis=0), rtol=1e-5)


def batch_norm(x: np.ndarray) -> tuple:
    """(output, mean, variance) of a Keras layer that remembers its last batch only."""
    layer = layers.BatchNormalization(momentum=0.0, epsilon=1e-5)
    y = layer(x, training=True)
    return tuple(
        keras.ops.convert_to_numpy(v) for v in (y, layer.moving_mean, layer.moving_variance)
    )


def test_one_value_per_channel_has_no_variance():
    """PyTorch refuses it; the short last minibatch of an epoch may consist of it."""
    layer = resnet.ResNet(recipe(), 10).norm(4)
    assert layer(torch.ones(1, 4, 1, 1)).abs().max() == 0
    assert layer.batch_variance.tolist() == [0] * 4


@pytest.mark.parametrize("rate", [0.3, 0.5])
def test_dropout_decides_as_keras_and_the_generator_do(rate):
    indices, units = np.arange(7, 12), 50
    keys = augment.keys(indices, 3, 2).view(np.int64)
    kept = augment.uniforms(indices, 3, 2, units, augment.DROPOUT) >= rate
    for ops in (torch, keras.ops):
        tensors = (torch.from_numpy, keras.ops.convert_to_tensor)[ops is keras.ops]
        found = dropout.kept(tensors(keys), tensors(dropout.counters(units)), rate, ops)
        np.testing.assert_array_equal(np.asarray(found), kept)
    compiled = torch.compile(
        dropout.kept, backend="eager", fullgraph=True
    )  # run.compile meets it in the network
    found = compiled(torch.from_numpy(keys), torch.from_numpy(dropout.counters(units)), rate, torch)
    np.testing.assert_array_equal(found, kept)


def test_dropout_in_the_network_is_that_of_keras():
    settings = recipe(dropout=0.4)
    model, network = pair(settings)
    keys = augment.keys(np.arange(len(IMAGES)), 0, 1).view(np.int64)
    with torch.no_grad():
        ours = network.train()(torch.from_numpy(IMAGES), torch.from_numpy(keys)).numpy()
    theirs = keras.ops.convert_to_numpy(model([IMAGES, keys], training=True))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
