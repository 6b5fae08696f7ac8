"""Starts Horovod through its binding of one framework, and says who this rank is."""

import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from recipe.errors import RunError, UsageError
from recipe.ranks import launched, machine
from recipe.system import watchdog

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


def start(framework: str, deterministic: bool) -> machine.HostShare:
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
    return machine.HostShare(horovod().local_rank(), machine.cores(horovod().local_size()))


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
