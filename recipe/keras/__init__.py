"""Horovod for Keras 3: `import recipe.keras as hvd`, on Keras's TensorFlow and PyTorch backends."""

from recipe import collectives
from recipe.keras import backend, callbacks
from recipe.keras.backend import Compression
from recipe.keras.distributed import DistributedOptimizer

_hvd = collectives.bind(backend.FRAMEWORK)

is_initialized = _hvd.is_initialized
shutdown = _hvd.shutdown
rank = _hvd.rank
size = _hvd.size
local_rank = _hvd.local_rank
local_size = _hvd.local_size
cross_rank = _hvd.cross_rank
cross_size = _hvd.cross_size

__all__ = [
    "Compression",
    "DistributedOptimizer",
    "callbacks",
    "cross_rank",
    "cross_size",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "shutdown",
    "size",
]


def init() -> None:
    """Starts Horovod through the binding of Keras's backend."""
    collectives.init(backend.FRAMEWORK)
