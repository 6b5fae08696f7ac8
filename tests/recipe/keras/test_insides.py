"""The private names of Keras that recipe.keras uses exist in it; docs/keras.md lists them."""

import keras
import pytest


def built(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    optimizer.build([keras.Variable([1.0])])
    return optimizer


def model() -> keras.Model:
    compiled = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    compiled.compile("sgd", "mse")
    return compiled


def normalization() -> keras.layers.Layer:
    layer = keras.layers.BatchNormalization()
    layer.build((None, 4))
    return layer


def several() -> keras.optimizers.Optimizer:
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip(f"Keras {keras.__version__} has no MultiOptimizer")
    return keras.optimizers.MultiOptimizer(lambda variable: keras.optimizers.SGD())


INSIDES = {
    model: (
        "_compile_config",
        "_flatten_layers",
        "_initial_epoch",
        "_symbolic_build",
        "make_train_function",
        "train_function",
    ),
    lambda: keras.layers.Dropout(0.5): ("_seed_generators",),
    lambda: keras.random.SeedGenerator(1): ("_initial_seed",),
    lambda: built(keras.optimizers.SGD(gradient_accumulation_steps=2)): (
        "_accumulated_gradients",
        "_get_variable_index",
        "_iterations",
        "_trainable_variables",
    ),
    lambda: built(keras.optimizers.SGD(momentum=0.9)): ("momentums",),
    lambda: built(keras.optimizers.RMSprop(momentum=0.9)): ("_momentums",),
    lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()): ("inner_optimizer",),
    several: ("_inner_optimizers",),
    normalization: ("_moments", "_reduction_axes"),
}


@pytest.mark.parametrize(("make", "names"), INSIDES.items())
def test_what_recipe_keras_needs_of_keras_is_there(make, names):
    thing = make()
    missing = [name for name in names if not hasattr(thing, name)]
    assert not missing, (
        f"Keras {keras.__version__} has changed: {type(thing).__name__} lacks {', '.join(missing)}"
    )
