"""This rank's share of its host: CPU cores and GPUs."""

import socket
from typing import NamedTuple

from recipe.errors import UsageError


class HostShare(NamedTuple):
    """What a rank has of its host."""

    local_rank: int  # this rank's number on its host
    threads: int  # its share of the host's cores


def check_gpus(visible: int, local_rank: int) -> None:
    """Raise UsageError when this rank has no GPU of its own among those that it sees."""
    if local_rank >= visible:
        raise UsageError(
            f"local rank {local_rank} sees {visible} GPUs on {socket.gethostname()}: start a rank "
            "a GPU, each of which sees all of its host's "
            "(Slurm: --gpus-per-node, not --gpus-per-task)"
        )
