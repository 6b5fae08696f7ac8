"""The device of a rank in PyTorch, its GPU or its share of the CPU, and the input's way to it."""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch

from recipe.data import batches
from recipe.ranks.machine import check_gpus


def use_local_device(local_rank: int, threads: int, deterministic: bool = False) -> None:
    """Give this rank the GPU of its local rank, if there is one, and `threads` CPU threads."""
    if deterministic:
        # cuBLAS is repeatable only with this.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # Batches have one shape: the fastest kernels are worth finding.
    torch.backends.cudnn.benchmark = not deterministic
    # Convolutions of float32 keep 10 of its 23 bits on GPUs with TF32, as is PyTorch's default.
    torch.backends.cudnn.allow_tf32 = not deterministic
    if torch.cuda.is_available():
        check_gpus(torch.cuda.device_count(), local_rank)
        torch.cuda.set_device(local_rank)
        batches.use_memory(pinned_memory)
    torch.set_num_threads(threads)


def local_device() -> torch.device:
    """Return where this rank computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pinned_memory(count: int) -> np.ndarray:
    """Return empty uint8[count] from which a GPU copies while the host goes on.

    PyTorch keeps it for the next of its size when it is dropped.
    """
    return torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()


def on_device(element: Sequence[np.ndarray | None]) -> tuple[torch.Tensor, ...]:
    """Return the arrays of an element of the input pipeline as tensors on this rank's device.

    On the CPU they share the arrays' memory. To a GPU they go through pinned memory, without
    waiting for the copy. Images of the input pipeline lie there already.
    """
    return tuple(_on_device(part) for part in element if part is not None)


def when_done(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Copy a tensor as it is now; return a function that waits for the copy and returns it.

    On a GPU the copy goes to pinned memory behind the work that is queued now. The function then
    waits for that work alone, and not for what is queued later.
    """
    if tensor.device.type == "cpu":
        return tensor.clone().numpy
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return copy.numpy()

    return wait


def _on_device(array: np.ndarray) -> torch.Tensor:
    tensor = torch.as_tensor(array)
    if not torch.cuda.is_available():
        return tensor
    if not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to("cuda", non_blocking=True)
