"""Horovod for Keras 3: `import recipe.keras as hvd`, on Keras's TensorFlow and PyTorch backends.

The names, arguments and defaults are those of `horovod.keras` and `horovod.tensorflow.keras`
0.28.1. docs/keras.md lists them one by one, with what is better here and what is refused.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from horovod.common.process_sets import ProcessSet

from recipe.keras import backend, callbacks, elastic, fitting, rollcall
from recipe.keras.backend import Compression
from recipe.keras.distributed import DistributedOptimizer, PartialDistributedOptimizer
from recipe.keras.division import divide
from recipe.keras.loading import load_model
from recipe.keras.normalization import SyncBatchNormalization
from recipe.keras.operations import (
    allgather,
    allgather_object,
    allreduce,
    alltoall,
    broadcast,
    broadcast_global_variables,
    broadcast_object,
    broadcast_variables,
    grouped_allreduce,
    reducescatter,
)
from recipe.keras.schedules import RateSchedule
from recipe.keras.sgd import SGD
from recipe.ranks import binding

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "SGD",
    "Compression",
    "DistributedOptimizer",
    "PartialDistributedOptimizer",
    "RateSchedule",
    "SyncBatchNormalization",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "broadcast",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "divide",
    "elastic",
    "grouped_allreduce",
    "init",
    "load_model",
    "reducescatter",
]

# Horovod's own, as they are.
_hvd = binding.bind(backend.FRAMEWORK)

is_initialized = _hvd.is_initialized
shutdown = _hvd.shutdown
rank = _hvd.rank
size = _hvd.size
local_rank = _hvd.local_rank
local_size = _hvd.local_size
cross_rank = _hvd.cross_rank
cross_size = _hvd.cross_size

start_timeline = _hvd.start_timeline
stop_timeline = _hvd.stop_timeline

mpi_threads_supported = _hvd.mpi_threads_supported
mpi_enabled = _hvd.mpi_enabled
mpi_built = _hvd.mpi_built
gloo_enabled = _hvd.gloo_enabled
gloo_built = _hvd.gloo_built
nccl_built = _hvd.nccl_built
ddl_built = _hvd.ddl_built
ccl_built = _hvd.ccl_built
cuda_built = _hvd.cuda_built
rocm_built = _hvd.rocm_built

Average = _hvd.Average
Sum = _hvd.Sum
Adasum = _hvd.Adasum
Min = _hvd.Min
Max = _hvd.Max
Product = _hvd.Product

global_process_set = _hvd.global_process_set
add_process_set = _hvd.add_process_set
remove_process_set = _hvd.remove_process_set

__all__ += [
    "Adasum",
    "Average",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Sum",
    "add_process_set",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "is_initialized",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]


def init(
    comm: "list[int] | MPI.Comm | None" = None,
    process_sets: Sequence[ProcessSet] | str | None = None,
    step_timeout: float | None = None,
) -> None:
    """Start Horovod through the binding of Keras's backend.

    `comm` is a list of ranks or an mpi4py communicator (default: all). `process_sets` are the
    ProcessSets to register.

    A job in which the ranks wait for each other for `step_timeout` seconds ends and says where each
    of them is. The default is RECIPE_STEP_TIMEOUT in the environment, or 600. With 0 it never ends.
    """
    binding.init(backend.FRAMEWORK, comm=comm, process_sets=process_sets)
    if comm is None:
        binding.check_all_ranks_found(in_program=False)
    rollcall.start(step_timeout)


fitting.install()
