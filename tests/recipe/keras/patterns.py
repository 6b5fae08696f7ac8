"""The usual training patterns of Keras, small and in their usual form.

They are for 1 and 2 ranks. On 1 rank, where a pattern draws noise or contrasts examples with each
other, the halves of the minibatch do what two ranks do with theirs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops

import recipe.keras as hvd

if TENSORFLOW := keras.backend.backend() == "tensorflow":
    import tensorflow as tf
else:
    import torch

STEPS, EPOCHS, BATCH, WIDTH = 2, 2, 16, 6  # of the whole minibatch

Wrap = Callable[[keras.optimizers.Optimizer], keras.optimizers.Optimizer]
MakeCallbacks = Callable[[], list[keras.callbacks.Callback]]
Logs = dict[str, list[float]]


class Training(NamedTuple):
    """What a pattern has trained."""

    variables: list[keras.Variable]
    logs: Logs


Pattern = Callable[[Wrap, MakeCallbacks], Training]


def parts() -> int:
    """Return of how many ranks this rank's minibatch is."""
    return 2 // hvd.size()


def examples(seed: int, width: int = WIDTH) -> np.ndarray:
    """Return this rank's examples: a half of each minibatch, or the whole."""
    whole = np.random.default_rng(seed).normal(size=(STEPS, hvd.size(), BATCH // hvd.size(), width))
    return whole[:, hvd.rank()].reshape(-1, width).astype(np.float32)


def target(x: np.ndarray) -> np.ndarray:
    return x.sum(1, keepdims=True) / 8


def regression() -> tuple:
    x = examples(0)
    return x, target(x)


def momentum() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.05, momentum=0.9)


def adam() -> keras.optimizers.Optimizer:
    """Make Adam with a large ε, or rounding would decide where a gradient is almost 0."""
    return keras.optimizers.Adam(0.02, beta_1=0.5, epsilon=0.01)


def network(*more: layers.Layer, outputs: int = 1, inputs: int = WIDTH) -> keras.Sequential:
    return keras.Sequential(
        [keras.Input((inputs,)), *more, layers.Dense(5, activation="tanh"), layers.Dense(outputs)]
    )


def minimise(
    optimizer: keras.optimizers.Optimizer,
    variables: list,
    loss_of: Callable[[], Any],
    method: str = "apply",
) -> Any:
    """Do one update as Keras's guides write it for either backend. Return the loss."""
    if TENSORFLOW:
        with tf.GradientTape() as tape:
            loss = loss_of()
        update(optimizer, tape.gradient(loss, variables), variables, method)
        return loss
    for v in variables:
        v.value.grad = None
    loss = loss_of()
    loss.backward()
    with torch.no_grad():
        update(optimizer, [v.value.grad for v in variables], variables, method)
    return loss.detach()


def update(
    optimizer: keras.optimizers.Optimizer, gradients: list, variables: list, method: str
) -> None:
    if method == "apply":
        optimizer.apply(gradients, variables)
    else:
        optimizer.apply_gradients(zip(gradients, variables, strict=True))


def drawn(draw: Callable, rows: Any, width: int, seed: keras.random.SeedGenerator) -> Any:
    """Draw noise as two ranks do with `same_seeds=True`: the noise of their halves is equal."""
    rows_of_part = -(-rows // parts())
    noise = draw((rows_of_part, width), seed=seed)
    return ops.concatenate([noise] * parts())[:rows]


class OwnStep(keras.Model):
    """A train_step with compute_loss and the metrics of compile."""

    def train_step(self, data):
        x, y = data
        outputs = {}

        def loss_of():
            outputs["y"] = self(x, training=True)
            return self.compute_loss(y=y, y_pred=outputs["y"])

        loss = minimise(self.optimizer, self.trainable_weights, loss_of, "apply_gradients")
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, outputs["y"])
        return {m.name: m.result() for m in self.metrics}


def own_step(wrap: Wrap) -> keras.Model:
    inputs = keras.Input((WIDTH,))
    model = OwnStep(inputs, layers.Dense(1)(layers.Dense(5, activation="tanh")(inputs)))
    model.compile(wrap(momentum()), "mse", metrics=["mae"])
    return model


class CustomLoss(keras.Model):
    """Keras's own step with a user's loss, a tracker of it, and what layers add to the loss."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.tracker = keras.metrics.Mean(name="cubed")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = ops.mean(ops.abs(y - y_pred) ** 3) + sum(self.losses)
        self.tracker.update_state(loss)
        return loss

    @property
    def metrics(self):
        return [*super().metrics, self.tracker]


def custom_loss(wrap: Wrap) -> keras.Model:
    inputs = keras.Input((WIDTH,))
    regularizer = keras.regularizers.L2(0.1)
    hidden = layers.Dense(5, activation="tanh", kernel_regularizer=regularizer)(inputs)
    model = CustomLoss(inputs, layers.Dense(1)(hidden))
    model.compile(wrap(momentum()))
    return model


class Sampling(layers.Layer):
    """A point of the distribution that the encoder gives, by a seed generator."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(7)

    def call(self, inputs):
        mean, log_variance = inputs
        noise = drawn(keras.random.normal, ops.shape(mean)[0], 2, self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * noise


class Autoencoder(keras.Model):
    """A variational one of two functional models. A tracker has another name than its log."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.total = keras.metrics.Mean(name="total_loss")
        self.reconstruction = keras.metrics.Mean(name="reconstruction_loss")
        self.divergence = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self):
        return [self.total, self.reconstruction, self.divergence]

    def call(self, x):
        return self.decoder(self.encoder(x)[2])

    def train_step(self, x):
        losses = {}

        def loss_of():
            mean, log_variance, z = self.encoder(x)
            squares = ops.square(x - self.decoder(z))
            losses["reconstruction"] = ops.mean(ops.sum(squares, axis=1))
            divergence = 1 + log_variance - ops.square(mean) - ops.exp(log_variance)
            losses["divergence"] = ops.mean(ops.sum(-0.5 * divergence, axis=1))
            return losses["reconstruction"] + losses["divergence"]

        self.total.update_state(minimise(self.optimizer, self.trainable_weights, loss_of))
        self.reconstruction.update_state(losses["reconstruction"])
        self.divergence.update_state(losses["divergence"])
        return {
            "loss": self.total.result(),
            "reconstruction_loss": self.reconstruction.result(),
            "kl_loss": self.divergence.result(),
        }


def vae(wrap: Wrap) -> keras.Model:
    inputs = keras.Input((WIDTH,))
    hidden = layers.Dense(5, activation="tanh")(inputs)
    mean = layers.Dense(2, name="mean")(hidden)
    log_variance = layers.Dense(2, name="log_variance")(hidden)
    encoder = keras.Model(inputs, [mean, log_variance, Sampling()([mean, log_variance])])
    model = Autoencoder(encoder, network(inputs=2, outputs=WIDTH))
    model.compile(wrap(adam()))
    return model


class Adversaries(keras.Model):
    """A generator and its critic, each with an optimizer."""

    def __init__(self, critic, generator):
        super().__init__()
        self.critic, self.generator = critic, generator
        self.seed_generator = keras.random.SeedGenerator(11)
        self.d_tracker = keras.metrics.Mean(name="d_loss")
        self.g_tracker = keras.metrics.Mean(name="g_loss")

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

    @property
    def metrics(self):
        return [self.d_tracker, self.g_tracker]

    def call(self, x):
        return self.critic(x)

    def fake(self, rows):
        return self.generator(drawn(keras.random.normal, rows, 3, self.seed_generator))

    def logs(self, d_loss, g_loss):
        self.d_tracker.update_state(d_loss)
        self.g_tracker.update_state(g_loss)
        return {"d_loss": self.d_tracker.result(), "g_loss": self.g_tracker.result()}


class Gan(Adversaries):
    def train_step(self, x):
        rows = ops.shape(x)[0]
        entropy = keras.losses.BinaryCrossentropy(from_logits=True)
        labels = ops.concatenate([ops.ones((rows, 1)), ops.zeros((rows, 1))])

        def d_loss():
            return entropy(labels, self.critic(ops.concatenate([self.fake(rows), x])))

        def g_loss():
            return entropy(ops.zeros((rows, 1)), self.critic(self.fake(rows)))

        d = minimise(self.d_optimizer, self.critic.trainable_weights, d_loss)
        g = minimise(self.g_optimizer, self.generator.trainable_weights, g_loss)
        return self.logs(d, g)


class Wasserstein(Adversaries):
    """Several steps of the critic for one of the generator; the critic's slope is held at 1."""

    def slope(self, x):
        if TENSORFLOW:
            with tf.GradientTape() as tape:
                tape.watch(x)
                score = self.critic(x)
            return tape.gradient(score, x)
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.critic(x).sum(), x, create_graph=True)[0]

    def train_step(self, x):
        rows = ops.shape(x)[0]

        def d_loss():
            fake = self.fake(rows)
            between = x + drawn(keras.random.uniform, rows, 1, self.seed_generator) * (fake - x)
            squares = ops.sum(ops.square(self.slope(between)), axis=1)
            norm = ops.sqrt(squares + 1e-6)
            penalty = 10 * ops.mean((norm - 1) ** 2)
            return ops.mean(self.critic(fake)) - ops.mean(self.critic(x)) + penalty

        def g_loss():
            return -ops.mean(self.critic(self.fake(rows)))

        for _ in range(3):
            d = minimise(self.d_optimizer, self.critic.trainable_weights, d_loss)
        g = minimise(self.g_optimizer, self.generator.trainable_weights, g_loss)
        return self.logs(d, g)


def adversaries(kind: type, wrap: Wrap) -> keras.Model:
    model = kind(network(), network(inputs=3, outputs=WIDTH))
    model.compile(wrap(adam()), wrap(adam()))
    return model


def gan(wrap: Wrap) -> keras.Model:
    return adversaries(Gan, wrap)


def wgan_gp(wrap: Wrap) -> keras.Model:
    return adversaries(Wasserstein, wrap)


class Contrastive(keras.Model):
    """Two views of each example must be alike, and unlike those of the rank's other examples."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.tracker = keras.metrics.Mean(name="c_loss")

    @property
    def metrics(self):
        return [self.tracker]

    def call(self, x):
        return self.head(self.encoder(x))

    def contrast(self, one, other):
        alike = ops.matmul(unit(one), ops.transpose(unit(other))) / 0.5
        own = ops.arange(BATCH // 2)
        losses = []
        for logits in (alike, ops.transpose(alike)):
            entropy = keras.losses.sparse_categorical_crossentropy(own, logits, from_logits=True)
            losses.append(ops.mean(entropy))
        return sum(losses) / 2

    def train_step(self, x):
        def loss_of():
            views = [self(x * 0.9), self(ops.flip(x, axis=1))]
            halves = zip(*(ops.split(view, parts()) for view in views), strict=True)
            return sum(self.contrast(one, other) for one, other in halves) / parts()

        self.tracker.update_state(minimise(self.optimizer, self.trainable_weights, loss_of))
        return {"c_loss": self.tracker.result()}


def unit(vectors):
    """Return the vectors at length 1."""
    return vectors / ops.sqrt(ops.sum(ops.square(vectors), axis=1, keepdims=True))


def simclr(wrap: Wrap) -> keras.Model:
    model = Contrastive(network(outputs=4), network(inputs=4, outputs=3))
    model.compile(wrap(momentum()))
    return model


class Distiller(keras.Model):
    """A student between the labels and a frozen teacher."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.teacher.trainable = False

    def call(self, x):
        return self.student(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        taught = self.teacher(x, training=False)
        own = super().compute_loss(x, y, y_pred, sample_weight, training)
        return 0.3 * own + 0.7 * ops.mean(ops.square(taught - y_pred))


def distillation(wrap: Wrap) -> keras.Model:
    model = Distiller(network(), network(layers.Dense(8)))
    model.compile(wrap(momentum()), "mse", metrics=["mae"])
    return model


class Subclass(keras.Model):
    def __init__(self):
        super().__init__()
        self.a, self.b = layers.Dense(5, activation="tanh"), layers.Dense(1)

    def call(self, x):
        return self.b(self.a(x))


def subclassed(wrap: Wrap) -> keras.Model:
    model = Subclass()
    model.compile(wrap(momentum()), "mse", metrics=["mae"])
    return model


def sequential_without_input(wrap: Wrap) -> keras.Model:
    model = keras.Sequential([layers.Dense(5, activation="tanh"), layers.Dense(1)])
    model.compile(wrap(momentum()), "mse", metrics=["mae"])
    return model


def two_inputs_and_outputs(wrap: Wrap) -> keras.Model:
    a, b = keras.Input((WIDTH,), name="a"), keras.Input((3,), name="b")
    hidden = layers.Dense(5, activation="tanh")(layers.Concatenate()([a, b]))
    outputs = {"c": layers.Dense(1, name="c")(hidden), "d": layers.Dense(2, name="d")(hidden)}
    model = keras.Model({"a": a, "b": b}, outputs)
    losses, weights = {"c": "mse", "d": "mae"}, {"c": 1.0, "d": 0.5}
    model.compile(wrap(momentum()), losses, loss_weights=weights, metrics={"d": ["mse"]})
    return model


def two_of_each() -> tuple:
    a, b = examples(0), examples(1, 3)
    return {"a": a, "b": b}, {"c": target(a), "d": b[:, :2] / 2}


def mixed_float16(wrap: Wrap) -> keras.Model:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        outputs = layers.Dense(1, dtype="float32")
        model = keras.Sequential(
            [keras.Input((WIDTH,)), layers.Dense(5, activation="tanh"), outputs]
        )
        model.compile(wrap(momentum()), "mse", metrics=["mae"])
    finally:
        keras.config.set_dtype_policy("float32")
    return model


def fit(model: keras.Model, data: tuple, callbacks: list[keras.callbacks.Callback]) -> Logs:
    return model.fit(
        *data,
        batch_size=BATCH // hvd.size(),
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    ).history


def fitted(make: Callable[[Wrap], keras.Model], data: Callable[[], tuple]) -> Pattern:
    """Return a pattern that one `fit` trains."""

    def train(wrap: Wrap, make_callbacks: MakeCallbacks) -> Training:
        model = make(wrap)
        logs = fit(model, data(), make_callbacks())
        return Training(model.weights, logs)

    return train


def transfer(wrap: Wrap, make_callbacks: MakeCallbacks) -> Training:
    """Train a new head on a frozen base, then all of it at a lower rate.

    The normalisation stays frozen and so as in inference. (`training=False` alone doesn't do that:
    `fit` passes another to every layer.)
    """
    base = network(layers.BatchNormalization(), outputs=4)
    base.trainable = False
    inputs = keras.Input((WIDTH,))
    model = keras.Model(inputs, layers.Dense(1)(base(inputs, training=False)))
    model.compile(wrap(momentum()), "mse", metrics=["mae"])
    first = fit(model, regression(), make_callbacks())
    base.trainable = True
    base.layers[0].trainable = False
    model.compile(wrap(keras.optimizers.SGD(0.02)), "mse", metrics=["mae"])
    second = fit(model, regression(), make_callbacks())
    unfrozen = {f"{name} unfrozen": numbers for name, numbers in second.items()}
    return Training(model.weights, first | unfrozen)


def own_loop(method: str, traced: bool) -> Pattern:
    """Return a loop without fit, which itself calls the broadcast and the mean of the loss."""

    def train(wrap: Wrap, make_callbacks: MakeCallbacks) -> Training:
        model, optimizer = network(), wrap(momentum())
        optimizer.build(model.trainable_variables)
        hvd.broadcast_variables(model.variables + optimizer.variables, 0)

        def step(x, y):
            def loss_of():
                return ops.mean(ops.square(model(x) - y))

            return minimise(optimizer, model.trainable_variables, loss_of, method)

        step = tf.function(step) if traced and TENSORFLOW else step
        x, y = (ops.convert_to_tensor(array) for array in regression())
        losses = []
        for i in [*range(STEPS)] * EPOCHS:
            here = slice(i * len(x) // STEPS, (i + 1) * len(x) // STEPS)
            losses.append(float(hvd.allreduce(step(x[here], y[here]))))
        return Training(model.weights, {"loss": losses})

    return train


def images() -> tuple:
    return (examples(0),)


PATTERNS: dict[str, Pattern] = {
    "own_step": fitted(own_step, regression),
    "custom_loss": fitted(custom_loss, regression),
    "vae": fitted(vae, images),
    "gan": fitted(gan, images),
    "wgan_gp": fitted(wgan_gp, images),
    "simclr": fitted(simclr, images),
    "distillation": fitted(distillation, regression),
    "transfer": transfer,
    "subclassed": fitted(subclassed, regression),
    "sequential_without_input": fitted(sequential_without_input, regression),
    "two_inputs_and_outputs": fitted(two_inputs_and_outputs, two_of_each),
    "mixed_float16": fitted(mixed_float16, regression),
    "loop_apply": own_loop("apply", traced=False),
    "loop_apply_gradients": own_loop("apply_gradients", traced=True),
}
