"""The network is the paper's: parameters, operations, strides, initialisation, weight decay."""

import math

import keras
import numpy as np
import pytest

from recipe.cli import load_recipe
from recipe.config import Data, Model, Recipe
from recipe.frameworks.keras import resnet, sgd
from recipe.rules.pixels import MEAN


@pytest.fixture(scope="module")
def resnet50() -> keras.Model:
    return resnet.build(load_recipe("imagenet_1hr"), 1000)


def small(**settings) -> keras.Model:
    recipe = Recipe(
        seed=settings.pop("seed", 0),
        data=Data(image_size=settings.pop("image_size", 32)),
        model=Model(**{"blocks": (1, 2), "width": 4, "stem": "small"} | settings),
    )
    return resnet.build(recipe, 10)


def of_kind(model: keras.Model, kind: type) -> list:
    return [layer for layer in model.layers if isinstance(layer, kind)]


def numpy(value) -> np.ndarray:
    return keras.ops.convert_to_numpy(value)


def test_resnet50_has_the_papers_parameters(resnet50):
    assert sum(math.prod(v.shape) for v in resnet50.trainable_variables) == 25_557_032


def test_resnet50_has_the_papers_operations(resnet50):
    convolutions = sum(
        math.prod(layer.output.shape[1:3]) * math.prod(layer.kernel.shape)
        for layer in of_kind(resnet50, keras.layers.Conv2D)
    )
    assert convolutions + 2048 * 1000 == 4_089_184_256  # multiply-adds; "about 4.1 GFLOP"


def test_stride_2_is_on_the_3x3(resnet50):
    """keras.applications.ResNet50 has it on the 1×1."""
    strided = [layer for layer in of_kind(resnet50, keras.layers.Conv2D) if layer.strides == (2, 2)]
    kernels = sorted(layer.kernel_size for layer in strided if "shortcut" not in layer.name)
    assert kernels == [(3, 3)] * 3 + [(7, 7)]


def test_strided_convolutions_pad_both_sides_as_the_reference_does(resnet50):
    """Against PyTorch's convolution, on the stem; TensorFlow's "same" padding would shift the
    picture by a pixel.
    """
    import torch

    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    outputs = [resnet50.get_layer(name).output for name in ("normalise", "stem_conv")]
    normalised, found = map(numpy, keras.Model(resnet50.inputs, outputs)(images))
    kernel = torch.from_numpy(numpy(resnet50.get_layer("stem_conv").kernel)).permute(3, 2, 0, 1)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(normalised).permute(0, 3, 1, 2), kernel, stride=2, padding=3
    )
    np.testing.assert_allclose(
        found, expected.permute(0, 2, 3, 1).numpy(), rtol=1e-3, atol=1e-4
    )  # 147 float32 terms


def test_convolutions_start_as_he_says_and_the_classifier_at_a_hundredth(resnet50):
    for layer in of_kind(resnet50, keras.layers.Conv2D):
        kernel = numpy(layer.kernel)
        expected = math.sqrt(2 / (kernel.shape[0] * kernel.shape[1] * kernel.shape[3]))
        spread = 5 / math.sqrt(
            2 * kernel.size
        )  # five standard errors of a sample's standard deviation
        assert kernel.std() == pytest.approx(expected, rel=spread), layer.name
        assert not layer.use_bias
    assert numpy(resnet50.get_layer("fc").kernel).std() == pytest.approx(0.01, rel=0.01)
    assert not numpy(resnet50.get_layer("fc").bias).any()


def test_the_last_gamma_of_each_block_is_zero_and_no_other(resnet50):
    last = {
        f"stage{s + 1}_block{b + 1}_bn3"
        for s, blocks in enumerate((3, 4, 6, 3))
        for b in range(blocks)
    }
    for layer in of_kind(resnet50, keras.layers.BatchNormalization):
        assert (numpy(layer.gamma) == (0 if layer.name in last else 1)).all(), layer.name
        assert (layer.momentum, layer.epsilon) == (0.9, 1e-5)
    assert all(
        (numpy(layer.gamma) == 1).all()
        for layer in of_kind(small(zero_gamma=False), keras.layers.BatchNormalization)
    )


def test_weight_decay_is_on_kernels_only(resnet50):
    """Its gradient is λw: `test_weight_decay_is_part_of_the_gradient`."""
    decayed = [v.path for v in resnet50.trainable_variables if sgd.is_decayed(v)]
    kernels = [layer.kernel.path for layer in resnet50.layers if hasattr(layer, "kernel")]
    assert decayed == kernels
    assert len(decayed) == 54  # 53 convolutions and the FC
    assert not resnet50.losses  # it is in no penalty, too


def test_initial_weights_depend_on_the_seed_alone():
    """Not on what was built before, nor on a global generator."""
    first = small(seed=3).get_weights()
    keras.utils.set_random_seed(99)
    again, other = small(seed=3).get_weights(), small(seed=4).get_weights()
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_weights_and_logits_in_float32(precision):
    model = small(precision=precision)
    assert {v.dtype for v in model.variables} == {"float32"}
    assert model.output.dtype == "float32"
    assert model.get_layer("stem_conv").compute_dtype == precision.removeprefix("mixed_")


def test_channels_first_is_the_same_network():
    last, first = small(), small(data_format="channels_first")
    assert [v.shape for v in last.variables] == [v.shape for v in first.variables]
    assert first.get_layer("stage2_block2_add").output.shape == (None, 32, 16, 16)


def test_pixels_of_the_mean_colour_become_zero():
    normalise = small().get_layer("normalise")
    np.testing.assert_allclose(
        numpy(normalise(np.array(MEAN, np.float32)[None, None, None])), 0, atol=1e-5
    )


def test_small_images_keep_their_resolution_in_the_first_stage():
    assert small().get_layer("stage1_block1_add").output.shape == (None, 32, 32, 16)
