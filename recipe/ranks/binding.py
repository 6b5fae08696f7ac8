"""Starts Horovod through its binding of one framework, and tells which rank this is.

Which function to call:

- A program that trains a recipe calls `start`, once, before any collective.
- The library (`recipe.keras`) calls `bind` when it is imported and `init` when its user does.
- Everything else calls `rank`, `size` and `horovod`. It asks `started` only where it may run
  without Horovod.
"""

import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from recipe.errors import RunError, UsageError
from recipe.ranks import launched, machine
from recipe.system import processor, watchdog

# The number of ranks, as horovodrun, Open MPI's mpirun, MPICH's mpiexec and srun give it.
SIZE_VARIABLES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")

_binding: ModuleType | None = None


def bind(framework: str) -> ModuleType:
    """Choose Horovod's binding of `framework` for this process, without starting, and return it.

    `framework` is "tensorflow" or "torch". A process uses one binding only: each brings its own
    background thread and its own copy of the ranks. Raise UsageError for a second one.
    """
    global _binding
    binding = importlib.import_module(f"horovod.{framework}")
    if _binding is not None and _binding is not binding:
        raise UsageError(
            f"this process runs Horovod through {_binding.__name__}; "
            f"it cannot also serve {framework}"
        )
    _binding = binding
    return binding


def init(framework: str, **options: Any) -> ModuleType:
    """Start Horovod, with its own options, and return the binding of `framework`. Collective.

    It may be called again. For a run of a recipe call `start`, which also sets Horovod up for it.
    """
    binding = bind(framework)
    if (Path(sys.prefix) / "bin" / "orted").exists():
        # Open MPI installed as a wheel finds its own files under mpirun only.
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


def start(framework: str, deterministic: bool) -> machine.HostShare:
    """Start Horovod for a run of a recipe; return this rank's share of its host. Collective.

    Raise UsageError when the processes that the launcher started don't find each other.
    """
    if deterministic:
        # Which tensors Horovod fuses depends on timing. With three ranks or more, the order of a
        # sum depends on where in the fused buffer a gradient lies. So only fuse given groups.
        os.environ["HOROVOD_DISABLE_GROUP_FUSION"] = "1"
    if _is_alone():
        # Horovod's thread looks for work every millisecond, and a run's only rank has hardly any.
        # Not in `init`: a user's wrapped optimizer on one rank reduces, and would wait for the
        # cycle at each step.
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "10")
    elif not ({"HOROVOD_ELASTIC", "HOROVOD_TIMELINE"} & set(os.environ)):
        # A reduction by NCCL then makes the GPU wait for it, and not this process. Where a rank may
        # be lost, or a timeline is written, the process must wait.
        os.environ.setdefault("HOROVOD_ENABLE_ASYNC_COMPLETION", "1")
    watchdog.start()
    init(framework)
    check_all_ranks_found()
    return machine.HostShare(horovod().local_rank(), cores())


def cores() -> int:
    """Return this rank's share of its host's cores."""
    return processor.cores(horovod().local_size())


def check_all_ranks_found(in_program: bool = True) -> None:
    """Compare Horovod's number of ranks with the launcher's count of processes.

    Processes that don't find each other train alone. Raise UsageError in a program of ours. In a
    user's script, raise RunError where the processes are certainly ranks, and otherwise warn: srun
    and torchrun may have started processes that are meant to be alone.
    """
    # Nothing is wrong unless there are more processes than ranks.
    count = launched.launcher_count()
    if count.processes <= size():
        return
    ranks = "1 rank" if size() == 1 else f"{size()} ranks"
    message = (
        f"Horovod has {ranks}, but {count.launcher} started {count.processes} processes "
        f"({count.variable}): they don't find each other, and each would train alone; start them "
        "by the environment's mpirun, by horovodrun --gloo or, in a Slurm allocation, by "
        "python -m launch.run --launcher=srun-gloo; "
        f"or unset {count.variable} if this process is meant to be alone"
    )

    # How sure is it, and whose program?
    if in_program:
        raise UsageError(message)
    if count.is_certain:
        raise RunError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def started() -> bool:
    """Return whether Horovod is started in this process, so that `rank` and `size` are known."""
    return _binding is not None and _binding.is_initialized()


def horovod() -> ModuleType:
    """Return the binding in use. Raise UsageError before `bind` or `init`."""
    if _binding is None:
        raise UsageError("Horovod is not initialised; call init() first")
    return _binding


def rank() -> int:
    return horovod().rank()


def size() -> int:
    return horovod().size()


def _is_alone() -> bool:
    """Return whether there is one rank, and will be, as far as the environment tells.

    Horovod's own cycle time is set before Horovod could say it.
    """
    if os.environ.get("HOROVOD_ELASTIC"):
        return False
    sizes = {os.environ[name] for name in SIZE_VARIABLES if name in os.environ}
    return sizes <= {"1"}
