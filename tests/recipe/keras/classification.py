"""A small classification, of which ranks train their parts of each minibatch."""

import keras
import numpy as np

import recipe.keras as hvd
from recipe.keras.callbacks import BroadcastState

EXAMPLES = np.random.default_rng(0).normal(size=(96, 8, 8, 2)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, 96)
MINIBATCH = 24  # kn, divided among the ranks


def network(normalised: bool = False) -> keras.Model:
    """Make a small convolutional network. Every rank draws other weights."""
    keras.utils.set_random_seed(100 + hvd.rank())
    layers = [keras.layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")]
    if normalised:
        layers.append(keras.layers.BatchNormalization(momentum=0.9))
    layers += [
        keras.layers.Flatten(),
        keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.01)),
    ]
    return keras.Sequential([keras.Input((8, 8, 2)), *layers])


def compiled(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], jit_compile=False)
    return model


def nesterov() -> keras.optimizers.Optimizer:
    return hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True))


def share(array: np.ndarray, size: int, rank: int) -> np.ndarray:
    """Return a rank's part of every minibatch, in order."""
    parts = array.reshape(-1, size, MINIBATCH // size, *array.shape[1:])
    return parts[:, rank].reshape(-1, *array.shape[1:])


def fit(
    model: keras.Model, epochs: int, *callbacks: keras.callbacks.Callback
) -> keras.callbacks.History:
    """Train on this rank's parts of the minibatches, from rank 0's weights on."""
    size, rank = hvd.size(), hvd.rank()
    return model.fit(
        share(EXAMPLES, size, rank),
        share(LABELS, size, rank),
        batch_size=MINIBATCH // size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[BroadcastState(), *callbacks],
    )
