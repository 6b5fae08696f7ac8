"""A script of the usual shape, as written for `import horovod.tensorflow.keras as hvd`.

Only that line is changed.
"""

import sys
from pathlib import Path

import keras
import numpy as np

import recipe.keras as hvd

hvd.init()
keras.utils.set_random_seed(1)

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    gpus = tf.config.experimental.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if gpus:
        tf.config.experimental.set_visible_devices(gpus[hvd.local_rank()], "GPU")

# Blurred blobs in one of ten places stand in for digits.
random = np.random.default_rng(hvd.rank())
y = random.integers(0, 10, 512)
x = random.normal(0, 0.3, (512, 14, 14, 1)).astype("float32")
for image, label in zip(x, y, strict=True):
    image[3 * (label // 4) : 3 * (label // 4) + 3, 3 * (label % 4) : 3 * (label % 4) + 3] += 1.0

model = keras.Sequential(
    [
        keras.layers.Input((14, 14, 1)),
        keras.layers.Conv2D(8, (3, 3), activation="relu"),
        keras.layers.MaxPooling2D((2, 2)),
        keras.layers.Dropout(0.25),
        keras.layers.Flatten(),
        keras.layers.Dense(10, activation="softmax"),
    ]
)

opt = keras.optimizers.SGD(0.01 * hvd.size(), momentum=0.9)
opt = hvd.DistributedOptimizer(opt)

model.compile(
    loss=keras.losses.SparseCategoricalCrossentropy(), optimizer=opt, metrics=["accuracy"]
)

callbacks = [
    hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    hvd.callbacks.MetricAverageCallback(),
    hvd.callbacks.LearningRateWarmupCallback(
        initial_lr=0.01 * hvd.size(), warmup_epochs=2, verbose=1
    ),
    hvd.callbacks.LearningRateScheduleCallback(
        initial_lr=0.01 * hvd.size(), multiplier=1e-1, start_epoch=4
    ),
]

if hvd.rank() == 0:
    callbacks.append(keras.callbacks.ModelCheckpoint(f"{sys.argv[1]}/checkpoint-{{epoch}}.keras"))

history = model.fit(
    x,
    y,
    batch_size=32,
    steps_per_epoch=16 // hvd.size(),
    callbacks=callbacks,
    epochs=5,
    verbose=int(hvd.rank() == 0),
)
loss, accuracy = model.evaluate(x, y, verbose=0)
trained = history.history["accuracy"][-1]
print(f"rank {hvd.rank()} of {hvd.size()}: accuracy {trained:.6f} {accuracy:.3f}", flush=True)
np.savez(Path(sys.argv[1], f"rank{hvd.rank()}.npz"), *model.get_weights())
