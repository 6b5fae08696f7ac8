"""Starts preflight.rank on every host, by launch.run's mpirun, as a real job would be started.

It never waits for ever.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launch.hostfile import Host, render
from launch.preflight.measurements import Measurements
from launch.preflight.rank import LISTENS, MARK, MPI_STARTS
from launch.preflight.reach import ROOT
from launch.preflight.verdicts import Finding, listed

LEAVES = 5  # seconds for mpirun to end its ranks


@dataclass(frozen=True)
class Measured:
    """What the ranks measured. When they ended early it is less, and `faults` says why."""

    measurements: Measurements
    faults: list[Finding]


class Output(NamedTuple):
    """What a job printed, and how it ended."""

    stdout: str
    stderr: str
    status: int | None  # None: it had to be ended
    late: str  # what was on stderr after its time was up


class Progress(NamedTuple):
    """The last part that a host began: its order among the parts, and its name."""

    order: int
    part: str


def measure(names: list[str], interface: str, data_dir: str, limit: float) -> Measured:
    """Run one rank a host. Takes `limit` seconds at most, and some to end what hangs."""
    output = _run(names, interface, data_dir, limit)
    parts = parse(output.stdout)
    faults = []
    if output.status is None:
        faults.append(hung(names, output.stderr, output.late, limit))
    elif output.status != 0 or "facts" not in parts:
        faults.append(failed(names, output.stderr, output.status))
    return Measured(Measurements.from_parts(parts, names), faults)


def _run(names: list[str], interface: str, data_dir: str, limit: float) -> Output:
    """Start the ranks, wait for `limit` seconds at most, and end what still runs.

    All goes through files, not pipes: an orphan would hold a pipe, and its reader, for ever.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        # What the ranks read.
        hostfile, names_file = folder / "hosts", folder / "names"
        out, err = folder / "out", folder / "err"
        hostfile.write_text(render([Host(name, 1) for name in names], "openmpi"))
        names_file.write_text(json.dumps(names))  # thousands are too long for an argument

        # The command, in a session of its own, so that all of it can be ended.
        arguments = json.dumps({"data_dir": data_dir, "limit": limit})
        launcher = [sys.executable, "-m", "launch.run", "--hostfile", str(hostfile)]
        rank = [sys.executable, "-m", "launch.preflight.rank", arguments]
        command = [*launcher, "--interface", interface, "--", *rank]
        with names_file.open("rb") as stdin, out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=ROOT,
                start_new_session=True,
            )
            with _ended(process):
                status = _wait(process, limit)
                late = _listen(err) if status is None else ""
        return Output(
            out.read_text(errors="replace"), err.read_text(errors="replace"), status, late
        )


def parse(printed: str) -> dict[str, Any]:
    """Read the parts on rank 0's stdout. A line that isn't whole is left out."""
    parts: dict[str, Any] = {}
    for line in printed.splitlines():
        with contextlib.suppress(ValueError):
            part = json.loads(line)
            if isinstance(part, dict):
                parts |= part
    return parts


def hung(names: list[str], stderr: str, late: str, limit: float) -> Finding:
    """Say who is silent in what was on stderr after the limit; if nobody is, who came least far."""
    # Who lives, and how far has each come?
    fix = (
        "look at these hosts (disk, memory, firewall) and at the links between them, "
        "or give --timeout more seconds"
    )
    beats = re.findall(rf"^{MARK} (\d+) alive\r?$", late, re.MULTILINE)
    alive = {names[int(rank)] for rank in beats}
    progress = reached(names, stderr)

    # In MPI's start no host beats, so that its silence says nothing.
    silent = [name for name in names if name not in alive and progress[name].order != MPI_STARTS]
    if 0 < len(silent) < len(names):
        where = listed([f"{name} has been silent since {progress[name].part}" for name in silent])
        return Finding(listed(silent), f"no end after {limit:g} s: {where}", fix)

    # Without a silent one, those that came least far are suspect.
    slowest = behind(names, stderr)
    who = "" if len(slowest) == len(names) else listed(list(slowest))
    return Finding(who, f"no end after {limit:g} s: the job hung, {_where(names, slowest)}", fix)


def reached(names: list[str], stderr: str) -> dict[str, Progress]:
    """Return how far each host came."""
    progress = dict.fromkeys(names, Progress(-1, "its start"))
    for rank, order, part in re.findall(rf"^{MARK} (\d+) (\d+) (.*?)\r?$", stderr, re.MULTILINE):
        if int(rank) < len(names):
            name = names[int(rank)]
            progress[name] = max(progress[name], Progress(int(order), part))
    return progress


def behind(names: list[str], stderr: str) -> dict[str, str]:
    """Return the hosts that came least far, and the part they were in."""
    progress = reached(names, stderr)
    least = min(each.order for each in progress.values())
    return {name: each.part for name, each in progress.items() if each.order == least}


def failed(names: list[str], stderr: str, status: int) -> Finding:
    """Say why the job ended early: in a rank's words, in mpirun's, or by the last lines."""
    # A rank's words.
    if match := re.search(rf"^{MARK} (\d+) error (.*?)\r?$", stderr, re.MULTILINE):
        what = f"the check failed there: {match[2]}"
        fix = "mend the environment on it: launch/install/install"
        return Finding(names[int(match[1])], what, fix)

    # mpirun's, about a rank.
    if match := re.search(r"on node (\S+) exited on (signal \d+[^.]*)", stderr):
        what = f"its process was ended by {' '.join(match[2].split())}"
        return Finding(match[1], what, "who kills there? See dmesg for a lack of memory")

    # A connection that broke, to a host or to a rank.
    lost_daemon = r"lost communication with a remote daemon.*?Remote daemon:[^\n]*? on node (\S+)"
    if match := re.search(lost_daemon, stderr, re.DOTALL):
        what = "the host or its link died in the middle"
        return Finding(match[1], what, "see its power, its network and its log")

    lost_peer = r"unexpectedly disconnected.*?Peer host:\s+(\S+)"
    if match := re.search(lost_peer, stderr, re.DOTALL):
        what = "its process ended or its link was cut: another host lost the connection to it"
        return Finding(match[1], what, "see dmesg there for a lack of memory, and its network")

    # Whatever was said last.
    where = _where(names, behind(names, stderr))
    what = f"mpirun ended with status {status}, {where}: {_last_words(stderr)}"
    return Finding("", what, "mend what it says, then run this again")


def _last_words(stderr: str) -> str:
    """Return the last lines that neither a rank nor launch.run wrote."""
    lines = [
        line.strip()
        for line in stderr.splitlines()
        if re.search(r"\w", line) and not line.startswith((MARK, "env -i "))
    ]
    return " ".join(lines[-6:])[-500:] or "it said nothing"


def _where(names: list[str], slowest: dict[str, str]) -> str:
    """Return the parts that these hosts were in, in words."""
    if len(slowest) == len(names) > 1:
        return f"all hosts in {next(iter(slowest.values()))}"
    return listed([f"{name} in {part}" for name, part in slowest.items()])


def _listen(err: Path) -> str:
    """Return what comes on stderr in the next seconds."""
    before = err.stat().st_size
    time.sleep(LISTENS)
    return err.read_bytes()[before:].decode(errors="replace")


def _wait(process: subprocess.Popen, limit: float) -> int | None:
    """Return the exit status, or None when there is none within `limit` seconds."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """End mpirun and its ssh afterwards, also when this program is told to leave."""
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                _wait(process, LEAVES)
