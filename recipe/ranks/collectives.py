"""The one seam to Horovod outside recipe.keras and recipe.frameworks: sums, broadcasts and agreements over all ranks.

Every function here is collective: all ranks must call it, in the same order.
"""

import importlib
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from recipe.config import Recipe
from recipe.errors import RunError, UsageError
from recipe.ranks import launched
from recipe.system import processor, watchdog

T = TypeVar("T")

GROUP = (
    2**24
)  # bytes of gradients that are reduced together when the order of their sum must not vary

# The number of ranks by horovodrun, Open MPI's mpirun, MPICH's, and srun.
SIZE_VARIABLES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")

_binding: ModuleType | None = None


def bind(framework: str) -> ModuleType:
    """Chooses Horovod's binding of `framework` ("tensorflow" or "torch") for this process and returns it.

    A process uses one binding only: each brings its own background thread and its own copy of the ranks."""
    global _binding
    binding = importlib.import_module(f"horovod.{framework}")
    if _binding not in (None, binding):
        raise UsageError(
            f"this process runs Horovod through {_binding.__name__}; it cannot also serve {framework}"
        )
    _binding = binding
    return binding


def init(framework: str, **options: Any) -> ModuleType:
    """Starts Horovod through its binding of `framework`, with its own options, and returns that binding."""
    binding = bind(framework)
    if (Path(sys.prefix) / "bin" / "orted").exists():
        # Open MPI installed as a wheel finds its own files only under mpirun, unless told.
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
        launched.check_srun()
    if launched.homeless():
        os.environ["HOME"] = "/"  # Open MPI dies without any
    # Open MPI's ranks, waiting for each other, would spin on the cores that compute.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    if not binding.is_initialized():
        launched.check_gloo()
        binding.init(**options)
    return binding


def check_found(program: bool = True) -> None:
    """Compares Horovod's number of ranks with the launcher's: processes that don't find each other train alone.

    Raises UsageError in a program. In a user's script, RunError where it is certain and otherwise a warning: srun and
    torchrun may have started processes that are meant to be alone."""
    word = launched.word()
    if word.processes <= size():
        return
    said = (
        f"Horovod has {size()} rank{'s' * (size() > 1)}, but {word.launcher} started {word.processes} processes "
        f"({word.variable}): they don't find each other, and each would train alone; start them by the environment's "
        "mpirun, by horovodrun --gloo or, in a Slurm allocation, by python -m launch.run --launcher=srun-gloo; "
        f"or unset {word.variable} if this process is meant to be alone"
    )
    if not (program or word.certain):
        warnings.warn(said, RuntimeWarning, stacklevel=3)
        return
    raise (UsageError if program else RunError)(said)


def _alone() -> bool:
    """Whether the launcher, or its absence, says before Horovod does that there is one rank, and will be."""
    if os.environ.get("HOROVOD_ELASTIC"):
        return False
    return {os.environ[v] for v in SIZE_VARIABLES if v in os.environ} <= {"1"}


def start(framework: str, deterministic: bool) -> tuple[int, int]:
    """Starts Horovod for a run: (this rank's number on its host, its share of the host's cores)."""
    if deterministic:
        # Which tensors Horovod fuses depends on timing, and the order of a sum over three ranks or more on where in
        # the fused buffer a gradient lies: only given groups are fused then.
        os.environ["HOROVOD_DISABLE_GROUP_FUSION"] = "1"
    if _alone():
        # Horovod's thread looks for work every millisecond, and a run's only rank has hardly any. Not in `init`: a
        # user's wrapped optimizer on one rank reduces, and would wait for the cycle at each step.
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "10")
    watchdog.start()
    init(framework)
    check_found()
    return horovod().local_rank(), cores()


def cores() -> int:
    """This rank's share of its host's cores; without Horovod, all that this process may use."""
    return processor.cores(horovod().local_size() if started() else 1)


def check_gpus(visible: int, local_rank: int) -> None:
    """Raises UsageError when this rank has no GPU of its own among those that it sees."""
    if local_rank >= visible:
        raise UsageError(
            f"local rank {local_rank} sees {visible} GPUs on {socket.gethostname()}: start a rank a GPU, each of which "
            "sees all of its host's (Slurm: --gpus-per-node, not --gpus-per-task)"
        )


def groups(recipe: Recipe, parameters: int) -> int | None:
    """Into how many groups, fixed ones, a deterministic run fuses the gradients of so many parameters."""
    return max(1, 4 * parameters // GROUP) if recipe.run.deterministic else None


def started() -> bool:
    """Whether `init` was called in this process."""
    return _binding is not None and _binding.is_initialized()


def horovod() -> ModuleType:
    """The binding in use. Raises UsageError before `init`."""
    if _binding is None:
        raise UsageError("Horovod is not initialised; call init() first")
    return _binding


def rank() -> int:
    return horovod().rank()


def size() -> int:
    return horovod().size()


def total(values: Any, name: str) -> np.ndarray:
    """The sum over all ranks of an array of numbers, in float64 or int64. All ranks pass the same shape and name."""
    array = np.asarray(values)
    array = array.astype(np.int64 if array.dtype.kind in "iub" else np.float64)
    return _allreduce(array, horovod().Sum, name)


def mean(vectors: Iterable[np.ndarray], length: int, name: str) -> np.ndarray:
    """The mean of all ranks' vectors of this length, of which each rank may have another number, or none."""
    mine = np.zeros(length + 1)
    for vector in vectors:
        mine += [*vector, 1]
    sums = total(mine, name)
    return sums[:-1] / sums[-1]


def extremes(values: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest over all ranks of each element of an int64 array."""
    least = _allreduce(values, horovod().Min, f"{name}.min")
    return least, _allreduce(values, horovod().Max, f"{name}.max")


def broadcast(value: T, name: str) -> T:
    """Rank 0's value (any picklable object) on every rank."""
    value = horovod().broadcast_object(value, root_rank=0, name=name)
    watchdog.beat()
    return value


def gather(value: T, name: str) -> list[T]:
    """The values of all ranks, in the order of the ranks."""
    values = horovod().allgather_object(value, name=name)
    watchdog.beat()
    return values


def agreed(action: Callable[[], T], name: str) -> T:
    """Runs `action` on every rank; when it fails on some, raises the first failing rank's error on all of them.

    So a missing file on one host ends the run everywhere with that host's message."""
    result, failure = None, None
    try:
        result = action()
    except (UsageError, RunError) as error:
        failure = error
    failures = [(r, f) for r, f in enumerate(gather(failure, name)) if f is not None]
    if failures:
        failed, error = failures[0]
        raise type(error)(f"rank {failed}: {error}" if size() > 1 else str(error), everywhere=True)
    return result


def on_root(action: Callable[[], T], name: str) -> T:
    """Runs `action` on rank 0 alone and gives its result to all; its error becomes everyone's."""
    return broadcast(agreed(lambda: action() if rank() == 0 else None, f"{name}.agreed"), name)


def _allreduce(array: np.ndarray, op: int, name: str) -> np.ndarray:
    binding = horovod()
    if binding.__name__ == "horovod.torch":
        import torch

        return binding.allreduce(torch.from_numpy(np.atleast_1d(array)), op=op, name=name).numpy()
    import tensorflow as tf

    with tf.device("/cpu:0"):
        return binding.allreduce(tf.constant(np.atleast_1d(array)), op=op, name=name).numpy()
