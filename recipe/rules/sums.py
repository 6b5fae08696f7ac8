"""Sums of losses and errors, added over batches and ranks and divided once, at the end.

An average of averages would weigh the examples of a short batch more.
"""

import math
from dataclasses import dataclass

import numpy as np

LAST_EPOCHS = 5  # over which the median is the run's result (paper, sec. 5.1)


@dataclass
class Sums:
    """Cross-entropy and top-1 hits summed over `count` examples."""

    loss: float = 0.0  # sum of the cross-entropies, nats
    correct: float = 0.0  # number of examples whose largest logit is the label's
    count: float = 0.0  # number of examples

    def add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Add a batch. logits: [b, classes] floats; labels: [b] integers."""
        logits = np.asarray(logits, dtype=np.float64)
        top = logits.max(axis=1)
        # A network that has diverged makes ∞ − ∞, which the sum shows.
        with np.errstate(invalid="ignore"):
            log_total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        label_logits = logits[np.arange(len(labels)), labels]
        self.loss += float((log_total - label_logits).sum())
        self.correct += int((logits.argmax(axis=1) == labels).sum())
        self.count += len(labels)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.loss + other.loss, self.correct + other.correct, self.count + other.count)

    @property
    def mean_loss(self) -> float:
        """Cross-entropy per example; nan without examples."""
        return self.loss / self.count if self.count else math.nan

    @property
    def error(self) -> float:
        """Top-1 error, from 0 to 1; nan without examples."""
        return 1 - self.correct / self.count if self.count else math.nan


def final_error(errors: list[float]) -> float:
    """Return the run's result: the median top-1 error of the last five epochs (paper, sec. 5.1)."""
    return float(np.median(errors[-LAST_EPOCHS:]))
