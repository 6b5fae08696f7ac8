"""This host's processor: its kind, and the instructions by which libraries choose how they compute, and so round."""

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# The newest of each line of development that oneDNN, Eigen and PyTorch choose by; the first that is there names it.
CHOSEN_BY = {
    "matrix": ("amx_bf16", "amx_int8", "sme"),
    "vector": ("avx512f", "avx2", "avx", "sse4_2", "sve2", "sve", "asimd"),
    "other": ("avx512_bf16", "avx512_vnni", "avx_vnni", "bf16"),
}


def processor() -> str:
    """Such as "Intel(R) Xeon(R) CPU, family 6, model 85 (x86_64: avx512f)"."""
    facts = _facts()
    kind = facts.get("model name") or f"processor {facts.get('CPU part', 'of an unknown kind')}"
    kind += "".join(
        f", {name.removeprefix('cpu ')} {facts[name]}"
        for name in ("cpu family", "model")
        if name in facts
    )
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    found = [next((name for name in names if name in flags), "") for names in CHOSEN_BY.values()]
    return (
        f"{kind} ({platform.machine()}: {' '.join(filter(None, found)) or 'unknown instructions'})"
    )


def cores(processes: int = 1) -> int:
    """Return how many CPU cores each of so many processes on this host may use."""
    share = (os.cpu_count() or 1) // processes
    return max(1, min(share, len(os.sched_getaffinity(0))))


def _facts() -> dict[str, str]:
    """What the kernel says of the first core."""
    try:
        lines = CPUINFO.read_text(errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
