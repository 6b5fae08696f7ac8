"""Ways in which two real ranks can't come together, by the first argument; see test_together.py."""

import socket
import sys
import time

import keras
import numpy as np

import recipe.keras as hvd

WAY = sys.argv[1]
hvd.init()
rank = hvd.rank()


class Trouble(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if WAY == "error" and rank == 1 and batch == 1:
            raise KeyError("no such thing")
        if WAY == "long" and rank == 0 and batch == 1 and self.first():
            time.sleep(20)  # a save, say; longer than the limit

    def on_test_batch_end(self, batch, logs=None):
        if WAY == "long" and rank == 0 and self.first():
            time.sleep(20)

    def first(self):
        """Return whether this is the first or the second of the two places."""
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls <= 2


def main():
    if WAY.startswith("both"):
        starts_keras_own(and_sets=WAY == "both, set")
    x = np.ones((64, 4), np.float32)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    overlap = WAY == "changed gradient"
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), overlap=overlap)
    model.compile(optimizer, "mse", jit_compile=False)
    data = (x, x[:, :1])
    validation = data if rank == 0 and WAY == "long" else None
    if WAY == "absent" and rank == 1:
        waits_for_something_else()
    if WAY == "changed gradient":
        changes_a_gradient(model)
    if WAY == "own loop":
        for _ in range(3 + rank):
            model.train_on_batch(*data)
        waits_for_something_else()
    try:
        model.fit(
            *data,
            batch_size=32,
            epochs=2,
            verbose=0,
            callbacks=[Trouble()],
            validation_data=validation,
        )
    except KeyError:
        time.sleep(100)  # a script that goes on with something else
    sys.stdout.write(f"rank {rank} has ended\n")  # in one piece: both ranks share the output
    sys.stdout.flush()


def starts_keras_own(and_sets: bool):
    """Start Keras's own data parallelism, beside Horovod's."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = hvd.broadcast_object(free.getsockname()[1], 0)
    keras.distribution.initialize(f"localhost:{port}", hvd.size(), rank)
    if and_sets:
        keras.distribution.set_distribution(keras.distribution.DataParallel())


def changes_a_gradient(model):
    """In a loop of its own, where rank 1 clips by hand in the third step."""
    import torch

    for step in range(5):
        model.zero_grad()
        model(np.ones((3, 4), np.float32)).sum().backward()
        gradients = [v.value.grad for v in model.trainable_variables]
        with torch.no_grad():
            if rank == 1 and step == 2:
                gradients[0].clamp_(-0.1, 0.1)
            model.optimizer.apply(gradients, model.trainable_variables)


def waits_for_something_else():
    time.sleep(100)


main()
