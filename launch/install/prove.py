"""The proof that an environment works, run on every rank: what Horovod was built with, and a right allreduce."""

import importlib
import json
import sys
from pathlib import Path

MINE = (1.0, 2.0, 3.0)  # rank r contributes (r + 1) times this


def facts(framework: str) -> dict[str, bool]:
    """What `horovodrun --check-build` asks this framework's library (it imports the framework five times)."""
    hvd = importlib.import_module(f"horovod.{framework}")
    return {name: bool(getattr(hvd, f"{name}_built")()) for name in ("mpi", "gloo", "nccl")}


def total(framework: str, factor: int) -> list[float]:
    """The sum over ranks of factor · MINE, from host memory."""
    hvd = importlib.import_module(f"horovod.{framework}")
    library = importlib.import_module(framework)
    if framework == "tensorflow":
        with library.device("CPU"):
            return (
                hvd.allreduce(library.constant(MINE) * factor, op=hvd.Sum, name="proof")
                .numpy()
                .tolist()
            )
    return hvd.allreduce(library.tensor(MINE) * factor, op=hvd.Sum, name="proof").tolist()


def expected(size: int) -> list[float]:
    """1 + 2 + … + size, times MINE."""
    return [value * size * (size + 1) / 2 for value in MINE]


def problem(proof: dict, size: int, gpu: bool) -> str:
    """What is wrong with a proof, or ""."""
    missing = [name for name in ("mpi", "gloo", *(["nccl"] * gpu)) if not proof[name]]
    if missing:
        return f"Horovod's {proof['framework']} library was built without {' and '.join(missing)}"
    if proof["size"] != size:
        return f"{size} processes of {proof['framework']} see {proof['size']} ranks: MPI does not connect them"
    if proof["sum"] != expected(size):
        return f"allreduce in {proof['framework']} gave {proof['sum']}, not {expected(size)}"
    return ""


def main(framework: str, result: Path) -> None:
    """Every rank takes part; rank 0 writes what it found."""
    proof = {"framework": framework, **facts(framework)}
    hvd = importlib.import_module(f"horovod.{framework}")
    hvd.init()
    proof |= {"size": hvd.size(), "sum": total(framework, hvd.rank() + 1)}
    if hvd.rank() == 0:
        result.write_text(json.dumps(proof))
    hvd.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
