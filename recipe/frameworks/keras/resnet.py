"""The paper's ResNet in Keras (sec. 5.1): stride 2 on the 3×3, γ = 0 at each block's end."""

import keras
import numpy as np
from keras import layers

from recipe.config import Model, Recipe
from recipe.frameworks.keras.dropout import ExampleDropout
from recipe.frameworks.keras.normalization import WorkerBatchNormalization
from recipe.rules import initial
from recipe.rules.pixels import MEAN, STD


class Normal(keras.initializers.Initializer):
    """Normal weights that depend on (seed, name) only: `recipe.rules.initial.normal`."""

    def __init__(self, seed: int, name: str, std: float | None = None) -> None:
        self.seed, self.name, self.std = seed, name, std

    def __call__(self, shape: tuple[int, ...], dtype: str | None = None) -> keras.KerasTensor:
        return keras.ops.convert_to_tensor(
            initial.normal(tuple(shape), self.std, self.seed, self.name), dtype=dtype
        )

    def get_config(self) -> dict:
        return {"seed": self.seed, "name": self.name, "std": self.std}


def build(recipe: Recipe, num_classes: int) -> keras.Model:
    """Return the recipe's network.

    uint8 images [b, s, s, 3] go in, with dropout also keys int64[b]; float32 logits [b,
    num_classes] come out. ResNet-50 has 25,557,032 parameters at 1000 classes. Weight decay is the
    optimizer's (`recipe.frameworks.keras.sgd`).
    """
    net = _Layers(recipe)
    size = recipe.data.image_size
    images = keras.Input((size, size, 3), dtype="uint8", name="images")
    x = _stem(net, _normalised(images, recipe.model), recipe.model)
    for stage, blocks in enumerate(recipe.model.blocks):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            width, name = recipe.model.width * 2**stage, f"stage{stage + 1}_block{block + 1}"
            x = _bottleneck(net, x, width, stride, name)
    x = layers.GlobalAveragePooling2D(data_format=net.data_format, name="pool", dtype=net.dtype)(x)
    inputs = images
    if recipe.model.dropout:
        keys = keras.Input((), dtype="int64", name="keys")
        inputs = [images, keys]
        x = ExampleDropout(recipe.model.dropout, dtype=net.dtype, name="dropout")(x, keys)
    return keras.Model(inputs, net.dense(x, num_classes, "fc"), name="resnet")


def _normalised(images: keras.KerasTensor, model: Model) -> keras.KerasTensor:
    """Normalise by mean and standard deviation of each channel (sec. 5.1), in float32."""
    std = np.asarray(STD, dtype=np.float32)
    offset = -np.asarray(MEAN, dtype=np.float32) / std
    x = layers.Rescaling(1 / std, offset, dtype="float32", name="normalise")(images)
    if model.data_format == "channels_first":
        return layers.Permute((3, 1, 2), name="channels_first")(x)
    return x


def _stem(net: "_Layers", x: keras.KerasTensor, model: Model) -> keras.KerasTensor:
    if model.stem == "small":
        x = net.conv(x, model.width, 3, 1, "stem_conv")
        return net.relu(net.norm(x, "stem_bn"), "stem_relu")
    x = net.conv(x, model.width, 7, 2, "stem_conv")
    x = net.relu(net.norm(x, "stem_bn"), "stem_relu")
    x = net.pad(x, 1, "stem_pool_pad")  # zeros never win: the input comes out of a ReLU
    pool = layers.MaxPooling2D(3, 2, data_format=net.data_format, dtype=net.dtype, name="stem_pool")
    return pool(x)


def _bottleneck(
    net: "_Layers", x: keras.KerasTensor, width: int, stride: int, name: str
) -> keras.KerasTensor:
    outputs = 4 * width
    shortcut = x
    if stride != 1 or x.shape[net.channel_axis] != outputs:
        shortcut = net.conv(x, outputs, 1, stride, f"{name}_shortcut")
        shortcut = net.norm(shortcut, f"{name}_shortcut_bn")
    y = net.conv(x, width, 1, 1, f"{name}_conv1")
    y = net.relu(net.norm(y, f"{name}_bn1"), f"{name}_relu1")
    # Stride 2 on the 3×3, not on the 1×1 as in the first ResNet paper (sec. 5.1).
    y = net.conv(y, width, 3, stride, f"{name}_conv2")
    y = net.relu(net.norm(y, f"{name}_bn2"), f"{name}_relu2")
    y = net.conv(y, outputs, 1, 1, f"{name}_conv3")
    y = net.norm(y, f"{name}_bn3", last=True)
    return net.relu(layers.Add(dtype=net.dtype, name=f"{name}_add")([shortcut, y]), f"{name}_relu3")


class _Layers:
    """The layers of one network, all with the recipe's settings."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.model = recipe, recipe.model
        self.dtype = recipe.model.precision
        self.data_format = recipe.model.data_format
        self.channel_axis = -1 if self.data_format == "channels_last" else 1

    def conv(
        self, x: keras.KerasTensor, filters: int, size: int, stride: int, name: str
    ) -> keras.KerasTensor:
        """Convolve without bias.

        Padding is the same on both sides, as in the reference. TensorFlow's "same" would put it on
        one side only when the stride is 2.
        """
        if size > 1 and stride > 1:
            x = self.pad(x, size // 2, f"{name}_pad")
        return layers.Conv2D(
            filters,
            size,
            stride,
            padding="same" if stride == 1 else "valid",
            data_format=self.data_format,
            use_bias=False,
            kernel_initializer=Normal(self.recipe.seed, name),
            dtype=self.dtype,
            name=name,
        )(x)

    def pad(self, x: keras.KerasTensor, pixels: int, name: str) -> keras.KerasTensor:
        return layers.ZeroPadding2D(
            pixels, data_format=self.data_format, dtype=self.dtype, name=name
        )(x)

    def norm(self, x: keras.KerasTensor, name: str, last: bool = False) -> keras.KerasTensor:
        """Normalise over each worker's n examples."""
        return WorkerBatchNormalization(
            workers=self.recipe.run.workers_at_once,
            axis=self.channel_axis,
            momentum=self.model.bn_momentum,
            epsilon=self.model.bn_epsilon,
            gamma_initializer="zeros" if last and self.model.zero_gamma else "ones",
            dtype=self.dtype,
            name=name,
        )(x)

    def relu(self, x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        return layers.ReLU(dtype=self.dtype, name=name)(x)

    def dense(self, x: keras.KerasTensor, units: int, name: str) -> keras.KerasTensor:
        return layers.Dense(
            units,
            kernel_initializer=Normal(self.recipe.seed, name, std=initial.FC_STD),
            # Logits and the softmax after them need the range also in mixed precision.
            dtype="float32",
            name=name,
        )(x)
