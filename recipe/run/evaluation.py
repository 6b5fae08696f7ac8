"""Cross-entropy and top-1 error over the whole evaluation set: every example once, on any number of ranks."""

import contextlib

from recipe.config import Recipe
from recipe.data.pipeline import eval_batches, train_batches
from recipe.data.sources import Source
from recipe.frameworks.replica import Replica
from recipe.ranks import collectives
from recipe.rules import sharding
from recipe.rules.sums import Sums
from recipe.system import watchdog

BATCH = 256  # examples at a time; without effect on the result

Sources = tuple[Source, Source]  # training and evaluation examples


def evaluate(recipe: Recipe, replica: Replica, sources: Sources, epoch: int) -> Sums:
    """The sums over all evaluation examples after `epoch` epochs. Collective.

    Batch normalisation uses the moving statistics, or with `model.precise_bn` those of the last epoch's first
    minibatches under the present weights."""
    training, evaluation = sources
    mine = sharding.eval_indices(len(evaluation), collectives.rank(), collectives.size())
    sums = Sums()
    with _statistics(recipe, replica, training, epoch):
        for images, labels in eval_batches(evaluation, recipe, mine, BATCH):
            sums.add(replica.predict(images), labels)
            watchdog.beat(f"the evaluation of {sums.count:.0f} examples")
    loss, correct, count = collectives.total([sums.loss, sums.correct, sums.count], "evaluate")
    return Sums(float(loss), float(correct), float(count))


def _statistics(
    recipe: Recipe, replica: Replica, training: Source, epoch: int
) -> contextlib.AbstractContextManager:
    if not recipe.model.precise_bn:
        return contextlib.nullcontext()
    steps = sharding.steps_per_epoch(len(training), recipe.k, recipe.n, recipe.data.remainder)
    workers = sharding.own_workers(recipe.k, collectives.rank(), collectives.size())
    elements = train_batches(training, recipe, workers, (max(epoch, 1) - 1) * steps)
    passes = len(workers) // recipe.run.workers_at_once
    return replica.statistics_of(iter(elements.take(min(recipe.model.precise_bn, steps) * passes)))
