"""One rank of the native PyTorch replica on made-up examples; the tests look at what it reports."""

import sys

import numpy as np
import torch

from recipe.config import Data, Model, Optimizer, Recipe, Run, Schedule
from recipe.data.element import Element
from recipe.errors import RunError
from recipe.frameworks.replica import load_framework
from recipe.frameworks.torch.wire import packed
from recipe.ranks import collectives
from recipe.rules.epoch import Share
from tests.ranks import report

K, N, SIZE = 4, 8, 16


def recipe(run: dict | None = None, compression: str = "none", **model) -> Recipe:
    return Recipe(
        framework="torch",
        k=K,
        n=N,
        data=Data(image_size=SIZE),
        model=Model(**{"blocks": (1, 1), "width": 8, "stem": "small"} | model),
        optimizer=Optimizer(base_rate=0.8, compression=compression),
        schedule=Schedule(warmup="none"),
        run=Run(**run or {}),
    )


def replica(settings: Recipe) -> object:
    made = load_framework("torch").make_replica(settings, 10)
    made.begin(100)
    made.begin_epoch(0)
    return made


def elements(settings: Recipe, steps: int = 1) -> list[Element]:
    """This rank's share of the same minibatches, whatever the number of ranks."""
    found, together = [], settings.run.workers_at_once
    for step in range(steps):
        draw = np.random.default_rng(step)
        images = draw.integers(0, 256, (K, N, SIZE, SIZE, 3), dtype=np.uint8)
        labels = draw.integers(0, 10, (K, N), dtype=np.int32)
        own_workers = Share.of(settings, collectives.rank(), collectives.size()).workers
        for first in own_workers[::together]:
            part = slice(first, first + together)
            flat = images[part].reshape(-1, SIZE, SIZE, 3), labels[part].ravel()
            found.append(Element(*flat, np.ones(N * together, np.float32)))
    return found


def trained(settings: Recipe) -> dict:
    """Figures and state of four steps."""
    made, source = replica(settings), iter(elements(settings, 4))
    losses = [made.step(step, source, False)()[0] for step in range(4)]
    with made.statistics_of(iter(elements(settings, 2))):
        logits = made.predict(
            torch.arange(2 * SIZE * SIZE * 3).reshape(2, SIZE, SIZE, 3).to(torch.uint8)
        )
    return {"losses": np.array(losses), "arrays": made.arrays(), "precise": logits}


def broadcast() -> dict:
    """Rank 1's weights differ before `begin`."""
    made = load_framework("torch").make_replica(recipe(), 10)
    with torch.no_grad():
        for entry in made._state():
            entry.tensor.add_(collectives.rank())
    made.begin(100)
    return {"arrays": made.arrays()}


def overflow() -> dict:
    """The last rank's gradients overflow in the second of three steps."""
    settings = recipe(precision="mixed_float16")
    made, found = replica(settings), []
    for step in range(3):
        mine = elements(settings, step + 1)[-K // collectives.size() :]
        if step == 1 and collectives.rank() == collectives.size() - 1:
            mine = [element._replace(weights=element.weights * 1e30) for element in mine]
        made.step(step, iter(mine), False)()
        found.append(made.arrays())
    return {"arrays": found}


def poisoned() -> dict:
    """Rank 1's weight is changed by one bit: what the replica check says."""
    made = replica(recipe(run={"replica_check_every": 1}))
    if collectives.rank() == 1:
        packed(made.network.layer1[0].conv2.weight).view(torch.int32)[5] ^= 1 << 10
    try:
        made.step(6, iter(elements(recipe())), False)
    except RunError as error:
        return {"error": str(error)}
    return {"error": ""}


def restored() -> dict:
    """A replica takes up what another has written, and refuses what it hasn't: the sentences."""
    made = replica(recipe(precision="mixed_float16"))
    written = {name: array + 1 for name, array in made.arrays().items()}
    made.restore(written)
    name, sentences = "model/fc/bias", []
    lacking = {n: a for n, a in written.items() if n != name}
    for wrong in (lacking, written | {"another": written[name]}, written | {name: np.zeros(1)}):
        try:
            made.restore(wrong)
        except RunError as error:
            sentences.append(str(error))
    return {"written": written, "arrays": made.arrays(), "sentences": sentences}


def started() -> dict:
    """How many gradients' reductions are under way when each of this rank's backward passes returns."""
    made, counts = replica(recipe()), []
    step, backward = made._step, made._step.backward

    def count_after(*arguments: object) -> None:
        backward(*arguments)
        buckets = [b for b in step.reduction.buckets if b.handle is not None]
        counts.append(sum(len(bucket.parameters) for bucket in buckets))

    step.backward = count_after
    made.step(0, iter(elements(recipe())), False)()
    return {"counts": counts, "parameters": len(list(made.network.parameters()))}


def stopping() -> dict:
    """One rank wants to leave: all hear of it with the step's figures."""
    settings = recipe()
    made = replica(settings)
    return {
        "stop": made.step(
            0, iter(elements(settings)), collectives.rank() == collectives.size() - 1
        )()[2]
    }


def main() -> None:
    load_framework("torch").start(deterministic="deterministic" in sys.argv)
    found = {
        "plain": trained(recipe()),
        "at_once": trained(recipe(run={"workers_at_once": K // collectives.size()})),
        "first": trained(recipe(data_format="channels_first")),
        "bfloat16": trained(recipe(precision="mixed_bfloat16")),
        "compressed": trained(recipe(compression="fp16")),
        "overflow": overflow(),
        "broadcast": broadcast(),
        "stopping": stopping(),
        "poisoned": poisoned(),
        "started": started(),
        "restored": restored(),
    }
    report(collectives.rank(), found)


if __name__ == "__main__":
    main()
