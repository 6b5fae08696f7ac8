"""Cross-entropy and top-1 error over the whole evaluation set: every example once, on any number of ranks."""

import contextlib

from recipe.config import Recipe
from recipe.data.pipeline import EvaluationExamples, TrainingExamples
from recipe.data.sources import Source
from recipe.frameworks.replica import Replica
from recipe.ranks import collectives
from recipe.rules import sharding
from recipe.rules.sums import Sums
from recipe.system import watchdog

BATCH = 256  # examples at a time; without effect on the result

Sources = tuple[Source, Source]  # training and evaluation examples


def evaluate(
    recipe: Recipe, replica: Replica, training: TrainingExamples, evaluation: Source, epoch: int
) -> Sums:
    """The sums over all evaluation examples after `epoch` epochs. Collective.

    Batch normalisation uses the moving statistics, or with `model.precise_bn` those of the last epoch's first
    minibatches under the present weights."""
    mine = sharding.eval_indices(len(evaluation), collectives.rank(), collectives.size())
    sums = Sums()
    with _statistics(replica, training, epoch):
        examples = EvaluationExamples(evaluation, recipe, training.threads)
        for images, labels in examples.batches(mine, BATCH):
            sums.add(replica.predict(images), labels)
            watchdog.beat(f"the evaluation of {sums.count:.0f} examples")
    loss, correct, count = collectives.total([sums.loss, sums.correct, sums.count], "evaluate")
    return Sums(float(loss), float(correct), float(count))


def _statistics(
    replica: Replica, training: TrainingExamples, epoch: int
) -> contextlib.AbstractContextManager:
    if not training.recipe.model.precise_bn:
        return contextlib.nullcontext()
    steps_per_epoch = training.division.steps
    elements = training.elements((max(epoch, 1) - 1) * steps_per_epoch)
    steps = min(training.recipe.model.precise_bn, steps_per_epoch)
    return replica.statistics_of(iter(elements.take(steps * training.share.passes)))
