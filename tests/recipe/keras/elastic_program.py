"""Run by an elastic horovodrun for test_elastic.py.

Rank 1 is killed after the second batch of the second epoch.
"""

import json
import os
import signal
import sys
from pathlib import Path

import keras

import recipe.keras as hvd
from tests.recipe.keras.classification import (
    EXAMPLES,
    LABELS,
    MINIBATCH,
    compiled,
    nesterov,
    network,
    share,
)

FOLDER = Path(sys.argv[1])


class KilledOnce(keras.callbacks.Callback):
    """Notes (ranks, epochs done, batch, steps) after each batch."""

    def __init__(self, held: hvd.elastic.KerasState) -> None:
        super().__init__()
        self.held, self.path = held, []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.path.append((hvd.size(), self.held.epoch, batch, int(self.model.optimizer.iterations)))
        if hvd.rank() == 1 and self.held.epoch == 1 and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@hvd.elastic.run
def train(held: hvd.elastic.KerasState, noted: KilledOnce) -> None:
    size, rank = hvd.size(), hvd.rank()
    held.model.fit(
        share(EXAMPLES, size, rank),
        share(LABELS, size, rank),
        batch_size=MINIBATCH // size,
        shuffle=False,
        initial_epoch=held.epoch,
        epochs=3,
        verbose=0,
        callbacks=[
            hvd.elastic.UpdateBatchStateCallback(held),
            hvd.elastic.UpdateEpochStateCallback(held),
            hvd.elastic.CommitStateCallback(held),
            noted,
        ],
    )


def main() -> None:
    hvd.init()
    held = hvd.elastic.KerasState(compiled(network(), nesterov()), batch=0, epoch=0)
    noted = KilledOnce(held)
    train(held, noted)
    found = {"path": noted.path, "epoch": held.epoch, "batch": held.batch}
    (FOLDER / f"{hvd.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
