"""Batch normalisation over one worker's examples (paper, sec. 2.3)."""

import torch
from torch import nn
from torch.nn import functional

from recipe.frameworks.normalised import Normalised


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
        output, self.batch_mean, self.batch_variance = normalised(
            x, self.weight, self.bias, self.eps, self.workers
        )
        return output


def normalised(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float, workers: int
) -> Normalised:
    """Normalise each of the workers' equal parts of a batch [n, c, h, w], in order."""
    if workers == 1:
        return _normalised(x, weight, bias, epsilon)
    parts = [_normalised(part, weight, bias, epsilon) for part in x.chunk(workers)]
    zeros = torch.zeros_like(parts[0].mean)
    return Normalised(
        torch.cat([part.output for part in parts]),
        sum((part.mean for part in parts), zeros) / workers,
        sum((part.variance for part in parts), zeros) / workers,
    )


def _normalised(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> Normalised:
    """Normalise one worker's batch. Mean and variance are by-products of the kernel."""
    mean, variance = torch.zeros_like(bias), torch.zeros_like(bias)
    # functional.batch_norm refuses a single value per channel, of which the short last minibatch
    # may consist.
    y = torch.batch_norm(x, weight, bias, mean, variance, True, 1.0, epsilon, True)
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
