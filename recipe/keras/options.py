"""The options of `DistributedOptimizer`, checked when they are made."""

from collections.abc import Sequence
from dataclasses import dataclass

from horovod.common.process_sets import ProcessSet

from recipe.keras import backend
from recipe.keras.tensors import Compressor, Variable

Groups = int | Sequence[Sequence[Variable]] | None

_hvd = backend.horovod


@dataclass(frozen=True, kw_only=True)
class Options:
    """How gradients are reduced. The names are those of Horovod's arguments.

    Raise ValueError for what can't be done.
    """

    name: str | None  # prefix of the collectives' names; the same on all ranks
    device_dense: str  # TensorFlow device of the reductions of dense gradients
    device_sparse: str  # and of sparse ones; with PyTorch both must be empty
    compression: Compressor  # how dense gradients travel: Compression.none or Compression.fp16
    sparse_as_dense: bool  # sum sparse gradients as dense ones instead of gathering their rows
    gradient_predivide_factor: float  # f: divide by f before the sum, multiply by f/size after it
    op: int  # Average or Sum
    backward_passes_per_step: int = 1  # gradients of so many calls are added up, then used once
    average_aggregated_gradients: bool = False  # divide their sum by the number of calls
    groups: Groups  # how many groups, or which variables, are reduced together
    process_set: ProcessSet  # ranks outside it keep their own gradients
    scale_local_gradients: bool  # divide gradients of local variables by the number of ranks
    overlap: bool = False  # with PyTorch: reduce beside backprop, as TensorFlow does anyway

    def __post_init__(self) -> None:
        self._check_op()
        self._check_predivide_factor()
        passes = self.backward_passes_per_step
        if not isinstance(passes, int) or passes < 1:
            raise ValueError(
                f"backward_passes_per_step={passes!r} must be an integer of at least 1"
            )
        self._check_device("device_dense", self.device_dense)
        self._check_device("device_sparse", self.device_sparse)
        self._check_groups()
        if self.overlap and passes > 1:
            raise ValueError(
                f"overlap=True reduces each backward pass, and backward_passes_per_step={passes} "
                "adds up several first; use one of the two"
            )

    def _check_op(self) -> None:
        if self.op == _hvd.Adasum:
            raise ValueError(
                "op=Adasum is not supported for Keras, by Horovod neither; use Average or Sum"
            )
        if self.op not in (_hvd.Average, _hvd.Sum):
            raise ValueError(f"op={self.op!r} is not a reduction of gradients; use Average or Sum")

    def _check_predivide_factor(self) -> None:
        factor = self.gradient_predivide_factor
        if factor != 1.0 and self.op != _hvd.Average:
            raise ValueError(
                f"gradient_predivide_factor={factor} splits an average; it needs op=Average"
            )
        if factor != 1.0 and _hvd.rocm_built():
            raise ValueError(
                f"gradient_predivide_factor={factor} is not supported by Horovod built for ROCm; "
                "leave 1.0"
            )
        if factor <= 0:
            raise ValueError(f"gradient_predivide_factor={factor} must be positive")

    def _check_device(self, argument: str, device: str) -> None:
        if device and not backend.DEVICES:
            raise ValueError(
                f"{argument}={device!r}: with PyTorch a gradient is reduced where it lies; "
                "leave it empty"
            )

    def _check_groups(self) -> None:
        groups = self.groups
        if groups is None:
            return
        if isinstance(groups, int) and not isinstance(groups, bool) and groups > 0:
            return
        if isinstance(groups, (list, tuple)) and all(isinstance(g, (list, tuple)) for g in groups):
            return
        raise ValueError(
            f"groups={groups!r} must be a positive number of groups or a list of lists of variables"
        )
