"""Sums of losses and errors: added over batches and ranks as sums, divided once: averages of averages lie."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Sums:
    """Cross-entropy and top-1 hits summed over `count` examples."""

    loss: float = 0.0  # sum of the cross-entropies, nats
    correct: float = 0.0  # number of examples whose largest logit is the label's
    count: float = 0.0  # number of examples

    def add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Adds a batch. logits: [b, classes] floats; labels: [b] integers."""
        logits = np.asarray(logits, dtype=np.float64)
        top = logits.max(axis=1)
        with np.errstate(invalid="ignore"):  # ∞ − ∞ of a network that has diverged: its sum says so
            log_total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        self.loss += float((log_total - logits[np.arange(len(labels)), labels]).sum())
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
    """The run's result: the median top-1 error of the last five epochs (paper, sec. 5.1)."""
    return float(np.median(errors[-5:]))
