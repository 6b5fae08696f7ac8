"""Native PyTorch and Keras here against their peers: `python -m recipe.benchmark [TURNS] [CONTENDER ...]`.

Each contender (torch-here, torch-ddp, keras-here, keras-fit, tf-mirrored; default: all) trains the same small network
on the same images on 1 and 2 ranks of this machine, one core a rank. Those of one framework are started, and then take
TURNS turns (default: 12) of about a second; the others are suspended. So what disturbs the machine disturbs all, and
ratios are taken within a turn. Prints medians over the turns, and in brackets their middle half:

- images/s of a rank, and the seconds from the launch to the end of the first step (of one launch);
- ours to the peer's speed; the target is 1;
- weak scaling: the speed of a rank of two to that of one alone; the target is 0.95. It is the product of what the
  machine keeps (two alone side by side share caches and memory), what lockstep keeps (if to communicate took no time,
  each step would still take as long as on the slower rank), and what communication keeps.
"""

import os
import signal
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from recipe import cli, noise
from recipe.benchmark.contender import BATCH, CONTENDERS, SETTLING, TURN
from recipe.benchmark.rival import Rival
from recipe.errors import UsageError

PEERS = {"torch-here": ("torch-ddp", "torch-ddp"), "keras-here": ("keras-fit", "tf-mirrored")}  # on 1 and on 2 ranks


class Entry(NamedTuple):
    """What takes turns: a contender on so many ranks, or two copies of one, side by side."""

    name: str
    ranks: int
    copies: int = 1

    def __str__(self) -> str:
        return f"{self.name:12} {'2 × 1' if self.copies > 1 else self.ranks:>6}"


Steps = list[list[float]]  # of each copy: seconds of each step of a turn
Found = dict[Entry, list[Steps]]  # of each turn


def main(argv: list[str]) -> None:
    turns, names = argv[0] if argv else "12", argv[1:] or list(CONTENDERS)
    check(turns, names)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is suspended must not stay behind
    with noise.filtered():
        from recipe.data.sources import prepare

        prepare(cli.load_recipe("quick").data)
    print(f"{BATCH} images per rank and step, one core per rank; {turns} turns of {TURN - SETTLING} steps")
    for framework in ("torch", ""):  # not all at once: they take memory
        if chosen := [name for name in names if name.startswith("torch") == bool(framework)]:
            report(compete(entries(chosen), int(turns)))


def check(turns: str, names: list[str]) -> None:
    if not turns.isdecimal() or int(turns) == 0:
        raise UsageError(f"{turns} is no number of turns: give 1 or more")
    if unknown := set(names) - set(CONTENDERS):
        raise UsageError(f"{min(unknown)} is no contender; there are {', '.join(CONTENDERS)}")
    if len(os.sched_getaffinity(0)) < 2:
        raise UsageError("this process may use one core only; two ranks with a core each need 2")


def entries(names: list[str]) -> list[Entry]:
    """Peers stand side by side."""
    several = [name for name in names if name != "keras-fit"]
    apart = [Entry(name, 1, copies=2) for name in names if name.endswith("here")]
    return [*(Entry(name, 1) for name in names), *(Entry(name, 2) for name in several), *apart]


def compete(chosen: list[Entry], turns: int) -> Found:
    """All turns of these entries."""
    rivals: dict[Entry, list[Rival]] = {entry: [] for entry in chosen}
    found: Found = {entry: [] for entry in chosen}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for entry, group in rivals.items():
                for core in range(entry.copies):
                    group.append(Rival(entry.name, entry.ranks, core, turns, Path(folder)))
                print(f"{entry}  first step after {group[0].start:.1f} s", flush=True)
            for _ in range(turns):
                for entry, group in rivals.items():
                    found[entry].append(turn(group))
        finally:
            for group in rivals.values():
                for rival in group:
                    rival.end()
    return found


def turn(group: list[Rival]) -> Steps:
    for rival in group:
        rival.go()
    steps = [rival.heard()[SETTLING:] for rival in group]
    for rival in group:
        rival.suspend()
    return steps


def report(found: Found) -> None:
    speeds = {entry: [BATCH / statistics.mean(map(statistics.mean, steps)) for steps in turns]
              for entry, turns in found.items()}  # fmt: skip
    for entry, values in speeds.items():
        print(f"{entry}  images/s per rank {spread(values, 0)}")
    for name, peers in PEERS.items():
        for ranks, peer in enumerate(peers, 1):
            if {Entry(name, ranks), Entry(peer, ranks)} <= speeds.keys():
                title = f"{name} to {peer}, {ranks} rank{'s' * (ranks > 1)}"
                ratio(title, speeds[Entry(name, ranks)], speeds[Entry(peer, ranks)], 1)
    for name in sorted({entry.name for entry in speeds if entry.ranks == 2}):
        target = 0.95 if name in PEERS else None
        ratio(f"{name} weak scaling", speeds[Entry(name, 2)], speeds[Entry(name, 1)], target)
    for name in [entry.name for entry in speeds if entry.copies == 2]:
        apart = Entry(name, 1, copies=2)
        lockstep = [BATCH / statistics.mean(map(max, *steps)) for steps in found[apart]]
        ratio(f"{name}, kept by the machine", speeds[apart], speeds[Entry(name, 1)])
        ratio(f"{name}, kept in lockstep", lockstep, speeds[apart])
        ratio(f"{name}, kept by communication", speeds[Entry(name, 2)], lockstep)


def ratio(title: str, ours: list[float], theirs: list[float], target: float | None = None) -> None:
    """Prints the ratios of two speeds within each turn, and how they stand to the target."""
    values = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"{title:40} {spread(values, 3)}{'' if target is None else verdict(values, target)}")


def verdict(values: list[float], target: float) -> str:
    if statistics.median(values) >= target:
        return f"  target {target:g}: reached"
    return f"  target {target:g}: {'within the spread' if quartiles(values)[1] >= target else 'missed'}"


def spread(values: list[float], digits: int) -> str:
    low, high = quartiles(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


if __name__ == "__main__":
    cli.run(main)
