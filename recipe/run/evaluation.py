"""Cross-entropy and top-1 error over the whole evaluation set: every example counts once."""

import contextlib

from recipe.config import Recipe
from recipe.data.pipeline import EvaluationExamples, TrainingExamples
from recipe.data.sources import Source
from recipe.frameworks.replica import Replica
from recipe.ranks import collectives
from recipe.rules.epoch import eval_indices
from recipe.rules.sums import Sums
from recipe.system import watchdog

BATCH = 256  # examples at a time; without effect on the result


def evaluate(
    recipe: Recipe, replica: Replica, training: TrainingExamples, evaluation: Source, epochs: int
) -> Sums:
    """Return the sums over all evaluation examples after so many epochs. Collective.

    Batch normalisation uses the moving statistics or, with `model.precise_bn`, those of the last
    epoch's first minibatches under the present weights.
    """
    indices = eval_indices(len(evaluation), collectives.rank(), collectives.size())
    examples = EvaluationExamples(evaluation, recipe, training.threads)
    sums = Sums()
    with _statistics(recipe, replica, training, epochs):
        for images, labels in examples.batches(indices, BATCH):
            sums.add(replica.predict(images), labels)
            watchdog.beat(f"the evaluation of {sums.count:.0f} examples")
    loss, correct, count = collectives.total([sums.loss, sums.correct, sums.count], "evaluate")
    return Sums(float(loss), float(correct), float(count))


def _statistics(
    recipe: Recipe, replica: Replica, training: TrainingExamples, epochs: int
) -> contextlib.AbstractContextManager[None]:
    """Return the context in which the replica predicts."""
    if not recipe.model.precise_bn:
        return contextlib.nullcontext()
    first_step = (max(epochs, 1) - 1) * training.division.steps
    minibatches = min(recipe.model.precise_bn, training.division.steps)
    elements = training.elements(first_step).take(minibatches * training.share.passes)
    return replica.statistics_of(iter(elements))
