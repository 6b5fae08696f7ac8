"""This rank's share of its host's GPUs."""

import socket

from recipe.errors import UsageError


def check_gpus(visible: int, local_rank: int) -> None:
    """Raises UsageError when this rank has no GPU of its own among those that it sees."""
    if local_rank >= visible:
        raise UsageError(
            f"local rank {local_rank} sees {visible} GPUs on {socket.gethostname()}: start a rank a GPU, each of which "
            "sees all of its host's (Slurm: --gpus-per-node, not --gpus-per-task)"
        )
