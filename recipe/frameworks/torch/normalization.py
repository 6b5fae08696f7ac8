"""Batch normalisation over one worker's examples (paper, sec. 2.3), which leaves its statistics to the step."""

import torch
from torch import nn
from torch.nn import functional


class WorkerBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` of a batch that is several workers' batches, each normalised by itself, in order.

    In training the running statistics stay: the step moves them, by the mean over all k workers. The last batch's are
    kept in `batch_mean` and `batch_variance`, float32[channels], averaged over this batch's workers. The variance is
    the biased one, as in Keras and in the paper's normalisation; PyTorch itself records the unbiased one."""

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
            y, self.batch_mean, self.batch_variance = self._normalised(x)
            return y
        outputs, means, variances = zip(*map(self._normalised, x.chunk(self.workers)), strict=True)
        self.batch_mean, self.batch_variance = (
            sum(means) / self.workers,
            sum(variances) / self.workers,
        )
        return torch.cat(outputs)

    def _normalised(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(one worker's output, its batch's mean, its biased variance), the last two as by-products of the kernel."""
        mean, unbiased = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        # functional.batch_norm refuses a single value per channel, of which the short last minibatch may consist.
        y = torch.batch_norm(x, self.weight, self.bias, mean, unbiased, True, 1.0, self.eps, True)
        count = x.numel() // x.shape[1]
        return (
            y,
            mean,
            unbiased * ((count - 1) / count) if count > 1 else torch.zeros_like(unbiased),
        )


def moving_statistics(network: nn.Module) -> torch.Tensor:
    """All moving means and variances as one vector, on which the layers' buffers are views from now on."""
    buffers = [(norm, name) for norm in _norms(network) for name in ("running_mean", "running_var")]
    vector = torch.cat([norm.get_buffer(name) for norm, name in buffers])
    for (norm, name), part in zip(
        buffers, vector.split([norm.num_features for norm, _ in buffers]), strict=True
    ):
        setattr(norm, name, part)
    return vector


def batch_statistics(network: nn.Module) -> torch.Tensor:
    """Those of the last batch, in the order of `moving_statistics`."""
    return torch.cat(
        [part for norm in _norms(network) for part in (norm.batch_mean, norm.batch_variance)]
    )


def _norms(network: nn.Module) -> list[WorkerBatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, WorkerBatchNorm2d)]
