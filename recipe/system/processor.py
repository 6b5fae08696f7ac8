"""This host's processor: its kind, and the instructions that decide how libraries round."""

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# The instructions by which oneDNN, Eigen and PyTorch choose how they compute, the newest first.
# The first of each line of development that a processor has names it.
CHOSEN_BY = {
    "matrix": ("amx_bf16", "amx_int8", "sme"),
    "vector": ("avx512f", "avx2", "avx", "sse4_2", "sve2", "sve", "asimd"),
    "other": ("avx512_bf16", "avx512_vnni", "avx_vnni", "bf16"),
}


def processor() -> str:
    """Return such as "Intel(R) Xeon(R) CPU, family 6, model 85 (x86_64: avx512f)"."""
    facts = _facts()
    kind = facts.get("model name") or f"processor {facts.get('CPU part', 'of an unknown kind')}"
    for name in ("cpu family", "model"):
        if name in facts:
            kind += f", {name.removeprefix('cpu ')} {facts[name]}"

    # x86's kernels call them flags, ARM's features.
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    instructions = []
    for names in CHOSEN_BY.values():
        instructions += [name for name in names if name in flags][:1]
    return f"{kind} ({platform.machine()}: {' '.join(instructions) or 'unknown instructions'})"


def cores(processes: int = 1) -> int:
    """Return how many CPU cores each of so many processes on this host may use."""
    share = (os.cpu_count() or 1) // processes
    return max(1, min(share, len(os.sched_getaffinity(0))))


def _facts() -> dict[str, str]:
    """Return what the kernel says of the first core, by name."""
    try:
        text = CPUINFO.read_text(errors="replace")
    except OSError:
        return {}
    facts = {}
    for line in text.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    return facts
