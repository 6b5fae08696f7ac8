"""Cross-entropy and top-1 error over the whole evaluation set: every example counts once."""

import contextlib
from typing import NamedTuple

from recipe.config import Recipe
from recipe.data.pipeline import EvaluationExamples, TrainingExamples
from recipe.frameworks.replica import Replica
from recipe.ranks import binding, collectives
from recipe.rules.epoch import Share, eval_indices
from recipe.rules.sums import Sums
from recipe.run.checks import Sources
from recipe.system import watchdog

BATCH = 256  # examples at a time; without effect on the result


class RunData(NamedTuple):
    """The examples of a run, as a rank takes them."""

    training: TrainingExamples
    evaluation: EvaluationExamples

    @classmethod
    def of(cls, recipe: Recipe, sources: Sources) -> "RunData":
        """Return this rank's examples of the sources."""
        share = Share.of(recipe, collectives.rank(), collectives.size())
        threads = binding.cores()
        return cls(
            TrainingExamples(sources.training, recipe, share, threads),
            EvaluationExamples(sources.evaluation, recipe, threads),
        )


def evaluate(recipe: Recipe, replica: Replica, data: RunData, epochs: int) -> Sums:
    """Return the sums over all evaluation examples after so many epochs. Collective.

    Batch normalisation uses the moving statistics or, with `model.precise_bn`, those of the last
    epoch's first minibatches under the present weights.
    """
    count = len(data.evaluation.source)
    indices = eval_indices(count, collectives.rank(), collectives.size())
    sums = Sums()
    with _statistics(recipe, replica, data.training, epochs):
        for images, labels in data.evaluation.batches(indices, BATCH):
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
