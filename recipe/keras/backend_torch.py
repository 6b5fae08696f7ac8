"""What Horovod does to gradients and variables under Keras's PyTorch backend."""

import horovod.torch as hvd
import torch

Compression = hvd.Compression


def average(gradients: list, name: str, compression: type) -> list:
    """The mean over all ranks of each gradient. All start before the first is waited for, so that Horovod fuses them.

    Keras hands the gradients over when backprop is done, so here they don't overlap with it. None stays None."""
    pending = [None if g is None else _start(g, f"{name}.{i}", compression) for i, g in enumerate(gradients)]
    return [None if p is None else compression.decompress(hvd.synchronize(p[0]), p[1]) for p in pending]


def _start(gradient: torch.Tensor, name: str, compression: type) -> tuple:
    wire, context = compression.compress(gradient)
    return hvd.allreduce_async_(wire, op=hvd.Average, name=name), context


def broadcast(variables: list, root_rank: int, name: str) -> None:
    """Rank root_rank's values in floating-point Keras variables, on all ranks."""
    handles = [hvd.broadcast_async_(v.value.data, root_rank, name=f"{name}.{i}") for i, v in enumerate(variables)]
    for handle in handles:
        hvd.synchronize(handle)


def use_local_device(local_rank: int, threads: int) -> None:
    """Gives this rank the GPU of its local rank, if there is one, and `threads` CPU threads."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    torch.set_num_threads(threads)
