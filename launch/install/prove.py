"""The proof that an environment works, run on every rank.

It shows what Horovod was built with, and a right allreduce.
"""

import importlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ADDEND = (1.0, 2.0, 3.0)  # rank r contributes (r + 1) times this


@dataclass(frozen=True)
class Proof:
    """What the ranks of one framework found."""

    framework: str
    mpi: bool  # whether Horovod was built with it, as the next two
    gloo: bool
    nccl: bool
    size: int
    sum: list[float]


def facts(framework: str) -> dict[str, bool]:
    """Return what Horovod's library for this framework was built with.

    `horovodrun --check-build` asks the same, but imports the framework five times.
    """
    hvd = importlib.import_module(f"horovod.{framework}")
    return {
        "mpi": bool(hvd.mpi_built()),
        "gloo": bool(hvd.gloo_built()),
        "nccl": bool(hvd.nccl_built()),
    }


def total(framework: str, factor: int) -> list[float]:
    """Return the sum over ranks of factor · ADDEND, from host memory. Collective."""
    hvd = importlib.import_module(f"horovod.{framework}")
    library = importlib.import_module(framework)
    if framework == "tensorflow":
        with library.device("CPU"):
            summed = hvd.allreduce(library.constant(ADDEND) * factor, op=hvd.Sum, name="proof")
            return summed.numpy().tolist()
    return hvd.allreduce(library.tensor(ADDEND) * factor, op=hvd.Sum, name="proof").tolist()


def expected(size: int) -> list[float]:
    """Return 1 + 2 + … + size, times ADDEND."""
    return [value * size * (size + 1) / 2 for value in ADDEND]


def problem(proof: Proof, size: int, gpu: bool) -> str:
    """Return what is wrong with a proof, or ""."""
    # Are the operations there?
    needed = {"mpi": proof.mpi, "gloo": proof.gloo}
    if gpu:
        needed["nccl"] = proof.nccl
    missing = [name for name, built in needed.items() if not built]
    if missing:
        return f"Horovod's {proof.framework} library was built without {' and '.join(missing)}"

    # Do the processes find each other, and add up?
    if proof.size != size:
        return (
            f"{size} processes of {proof.framework} see {proof.size} ranks: "
            "MPI does not connect them"
        )
    if proof.sum != expected(size):
        return f"allreduce in {proof.framework} gave {proof.sum}, not {expected(size)}"
    return ""


def main(framework: str, result: Path) -> None:
    """Take part in the proof; rank 0 writes it. Collective."""
    built = facts(framework)
    hvd = importlib.import_module(f"horovod.{framework}")
    hvd.init()
    reduced = total(framework, hvd.rank() + 1)
    proof = Proof(framework, **built, size=hvd.size(), sum=reduced)
    if hvd.rank() == 0:
        result.write_text(json.dumps(asdict(proof)))
    hvd.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
