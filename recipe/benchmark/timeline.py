"""What a Horovod timeline says of a training's steps: which allreduces began beside backprop."""

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

PAUSE = 200  # ms between the steps, by which they are told apart

Event = dict[str, Any]  # of Chrome's trace format


class Allreduce(NamedTuple):
    """The reduction of one gradient, in ms of the timeline."""

    ready: float  # on rank 0
    began: float
    ended: float


class Phase(NamedTuple):
    """A phase of a tensor's processing that has begun and not ended."""

    name: str
    began: float  # ms


Step = dict[str, Allreduce]  # by the name of the gradient


def read_events(path: str) -> list[Event]:
    """Return the events of a timeline, which lacks its closing bracket when the run is cut."""
    text = Path(path).read_text().rstrip().rstrip(",")
    events = json.loads(text if text.endswith("]") else text + "]")
    return [event for event in events if event]


def steps_of(events: list[Event]) -> list[Step]:
    """Return the allreduces of each step, in which a gradient has one."""
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("args", {}).get("name")}
    steps: list[Step] = []
    phases: dict[int, list[Phase]] = {}  # by tensor, the innermost last
    ready: dict[int, float] = {}
    for event in events:
        # Only the beginnings and the ends of a gradient's phases matter.
        tensor = event.get("pid", -1)
        name = names.get(tensor, "")
        if "gradient" not in name or event["ph"] not in ("B", "E"):
            continue
        moment = event["ts"] / 1000

        # The end of an allreduce completes what is known of the gradient in this step.
        if event["ph"] == "E":
            phase = phases[tensor].pop()
            if phase.name == "ALLREDUCE":
                steps[-1][name] = Allreduce(ready[tensor], phase.began, moment)
            continue

        # A gradient is ready when the ranks negotiate about it. After a pause it is the next
        # step's.
        phases.setdefault(tensor, []).append(Phase(event["name"], moment))
        if event["name"].startswith("NEGOTIATE"):
            if not ready or moment - max(ready.values()) > PAUSE / 2:
                steps.append({})
            ready[tensor] = moment
    return [step for step in steps if step]


def described(steps: list[Step]) -> str:
    """Say how many allreduces began, and ended, before their step's last gradient was ready."""
    # Count what overlaps with the rest of backprop.
    began = ended = total = 0
    spans = []
    for step in steps:
        first_ready = min(allreduce.ready for allreduce in step.values())
        last_ready = max(allreduce.ready for allreduce in step.values())
        spans.append(last_ready - first_ready)
        total += len(step)
        for allreduce in step.values():
            began += allreduce.began < last_ready
            ended += allreduce.ended < last_ready

    # How long the gradients took says how much could overlap.
    return (
        f"two ranks, {len(steps)} steps: {began} of {total} allreduces began and {ended} ended "
        "before the last gradient of their step was ready "
        f"(median {statistics.median(spans):.1f} ms after the first)"
    )
