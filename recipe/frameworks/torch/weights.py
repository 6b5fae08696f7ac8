"""Names and layouts of weights: torchvision's, and Keras's, in which checkpoints are written."""

import re

import numpy as np

_KERAS_NAMES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
_UNKNOWN_TO_KERAS = "num_batches_tracked"  # PyTorch's count, which only momentum=None reads


def keras_path(name: str) -> str | None:
    """Return the Keras path of an entry of the state dict; None for what Keras lacks.

    It is "stage1_block1_conv1/kernel" for "layer1.0.conv1.weight".
    """
    module, _, kind = name.rpartition(".")
    if kind == _UNKNOWN_TO_KERAS:
        return None
    layer = keras_layer(module)
    if "bn" in layer:
        return f"{layer}/{_KERAS_NAMES[kind]}"
    return f"{layer}/{'kernel' if kind == 'weight' else 'bias'}"


def keras_layer(module: str) -> str:
    """Return the Keras layer that a torchvision module is.

    It is "stage3_block1_shortcut_bn" for "layer3.0.downsample.1".
    """
    match = re.fullmatch(r"layer(\d+)\.(\d+)\.(.+)", module)
    if not match:
        return {"conv1": "stem_conv", "bn1": "stem_bn"}.get(module, module)
    stage, block, part = match.groups()
    part = {"downsample.0": "shortcut", "downsample.1": "shortcut_bn"}.get(part, part)
    return f"stage{stage}_block{int(block) + 1}_{part}"


def to_keras(array: np.ndarray) -> np.ndarray:
    """Return a weight in Keras's layout.

    Kernels are [h, w, in, out] of PyTorch's [out, in, h, w], and [in, out] of [out, in].
    """
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def from_keras(array: np.ndarray) -> np.ndarray:
    """Return a weight of Keras's layout in PyTorch's."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
