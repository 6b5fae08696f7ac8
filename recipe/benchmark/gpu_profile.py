"""What a step costs on a GPU: times, idle share, the host's waits, memory. On a CPU to rehearse."""

import itertools
import resource
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

# Launches a step. What it returns waits for the step.
Step = Callable[[], Callable[[], object]]

WAIT = "called a synchronizing CUDA operation"  # PyTorch's words
STEPS_LOOKED_AT = 3
KERNELS_NAMED = 15


class Kernels(NamedTuple):
    """What the device did in some steps."""

    idle: float  # share of the time from its first kernel to the end of its last one
    per_step: float  # their number
    longest: dict[str, float]  # milliseconds of a step by name, the longest first


class Interval(NamedTuple):
    """When a kernel ran, in microseconds."""

    start: float
    end: float


def step_times(step: Step, count: int) -> list[float]:
    """Return the seconds of each of `count` steps. The next is always launched, as in a run."""
    step()()
    pending, ends = step(), []
    for _ in range(count + 1):
        following = step()
        pending()
        ends.append(time.perf_counter())
        pending = following
    pending()
    return [end - begin for begin, end in itertools.pairwise(ends)]


def waits(launch: Callable[[], object]) -> list[str]:
    """Return the lines at which `launch` makes the host wait for the GPU, as "FILE:LINE".

    Not all operations that wait are known to PyTorch. Without a GPU there is none.
    """
    if not torch.cuda.is_available():
        launch()
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{w.filename}:{w.lineno}" for w in caught if WAIT in str(w.message)})


def kernels(step: Step) -> Kernels:
    """Return what the GPU does in a few steps; on a CPU, what PyTorch's operators do there."""
    # Notes of the CPU would make the launches slower, and the GPU idle.
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    step()()
    with profile(activities=[activity]) as recorded:
        endings = [step() for _ in range(STEPS_LOOKED_AT)]
        for wait in endings:
            wait()

    # Kernels alone: neither copies nor the ranges of annotations.
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [
        event
        for event in recorded.events() or []
        if event.device_type == device
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    intervals = [Interval(e.time_range.start, e.time_range.end) for e in events]
    times: dict[str, float] = defaultdict(float)
    for event, interval in zip(events, intervals, strict=True):
        times[event.name] += (interval.end - interval.start) / 1000 / STEPS_LOOKED_AT
    longest = sorted(times.items(), key=lambda item: -item[1])[:KERNELS_NAMED]
    return Kernels(idle_share(intervals), len(events) / STEPS_LOOKED_AT, dict(longest))


def idle_share(intervals: Iterable[Interval]) -> float:
    """Return the share of the whole time in which none of the intervals lies; 1.0 for none."""
    ordered = sorted(intervals)
    if not ordered:
        return 1.0
    busy, reached = 0.0, ordered[0].start
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - ordered[0].start)


def peak_memory() -> int:
    """Return the most bytes that PyTorch had on the GPU; on a CPU, that this process had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
