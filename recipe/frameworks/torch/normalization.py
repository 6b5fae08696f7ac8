"""Batch normalisation over one worker's examples (paper, sec. 2.3)."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional


class Normalised(NamedTuple):
    """One worker's batch, normalised, and its statistics."""

    output: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor  # biased


class WorkerBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that normalises each worker's part of a batch by itself, in order.

    In training the running statistics stay: the step moves them, by the mean over all k workers.
    The last batch's are in `batch_mean` and `batch_variance`, float32[channels], averaged over this
    batch's workers. The variance is the biased one, as in Keras and in the paper's normalisation.
    PyTorch itself records the unbiased one.
    """

    batch_mean: torch.Tensor
    batch_variance: torch.Tensor

    def __init__(self, channels: int, workers: int, eps: float) -> None:
        super().__init__(channels, eps=eps)
        self.workers = workers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if self.workers == 1:
            output, self.batch_mean, self.batch_variance = self._normalised(x)
            return output
        workers = [self._normalised(part) for part in x.chunk(self.workers)]
        zeros = torch.zeros_like(workers[0].mean)
        self.batch_mean = sum((worker.mean for worker in workers), zeros) / self.workers
        self.batch_variance = sum((worker.variance for worker in workers), zeros) / self.workers
        return torch.cat([worker.output for worker in workers])

    def _normalised(self, x: torch.Tensor) -> Normalised:
        """Normalise one worker's batch. Mean and variance are by-products of the kernel."""
        mean, variance = self.running_mean, self.running_var
        assert mean is not None and variance is not None
        mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
        # functional.batch_norm refuses a single value per channel, of which the short last
        # minibatch may consist.
        y = torch.batch_norm(x, self.weight, self.bias, mean, variance, True, 1.0, self.eps, True)
        count = x.numel() // x.shape[1]
        if count == 1:
            return Normalised(y, mean, torch.zeros_like(variance))
        return Normalised(y, mean, variance * ((count - 1) / count))


def moving_statistics(network: nn.Module) -> torch.Tensor:
    """Return all moving statistics as one vector; the layers' buffers become views of it."""
    norms = _norms(network)
    names = ("running_mean", "running_var")
    buffers = [norm.get_buffer(name) for norm in norms for name in names]
    vector = torch.cat(buffers)
    parts = iter(vector.split([len(buffer) for buffer in buffers]))
    for norm in norms:
        norm.running_mean = next(parts)
        norm.running_var = next(parts)
    return vector


def batch_statistics(network: nn.Module) -> torch.Tensor:
    """Return the statistics of the last batch, in the order of `moving_statistics`."""
    norms = _norms(network)
    return torch.cat([part for norm in norms for part in (norm.batch_mean, norm.batch_variance)])


def _norms(network: nn.Module) -> list[WorkerBatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, WorkerBatchNorm2d)]
