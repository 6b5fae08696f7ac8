"""Starts preflight.rank on every host, by launch.run's mpirun as a real job would be, and never waits for ever."""

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
from typing import Any

from launch.hostfile import Host, render
from launch.preflight.rank import LISTENS, MARK, MPI_STARTS
from launch.preflight.reach import ROOT
from launch.preflight.verdicts import Finding, listed

LEAVES = 5  # seconds for mpirun to end its ranks


@dataclass(frozen=True)
class Measured:
    """What the ranks found: `parts` by name, as preflight.rank emits them; fewer when it ended early, for `faults`."""

    parts: dict[str, Any]
    faults: list[Finding]
    seconds: float


def measure(names: list[str], interface: str, data_dir: str, limit: float) -> Measured:
    """One rank a host. Takes `limit` seconds at most, and some to end what hangs."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(
            made
        )  # files, not pipes: an orphan would hold a pipe, and its reader, for ever
        hostfile, asked, out, err = (folder / name for name in ("hosts", "asked", "out", "err"))
        hostfile.write_text(render([Host(name, 1) for name in names], "openmpi"))
        asked.write_text(json.dumps(names))  # thousands are too long for an argument
        words = json.dumps({"data_dir": data_dir, "limit": limit})
        command = [
            sys.executable,
            "-m",
            "launch.run",
            "--hostfile",
            str(hostfile),
            "--interface",
            interface,
        ]
        command += ["--", sys.executable, "-m", "launch.preflight.rank", words]
        began = time.monotonic()
        with asked.open("rb") as stdin, out.open("wb") as stdout, err.open("wb") as stderr:
            files = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
            process = subprocess.Popen(command, **files, cwd=ROOT, start_new_session=True)
            with _ended(process):
                status = _wait(process, limit)
                heard = _listen(err) if status is None else ""
        seconds = time.monotonic() - began
        printed, said = (path.read_text(errors="replace") for path in (out, err))
    parts = parse(printed)
    if status == 0 and "facts" in parts:
        return Measured(parts, [], seconds)
    return Measured(
        parts,
        [hung(names, said, heard, limit) if status is None else failed(names, said, status)],
        seconds,
    )


def parse(printed: str) -> dict[str, Any]:
    """The parts on rank 0's stdout; of a line that isn't whole, nothing."""
    parts = {}
    for line in printed.splitlines():
        with contextlib.suppress(ValueError):
            part = json.loads(line)
            parts |= part if isinstance(part, dict) else {}
    return parts


def hung(names: list[str], said: str, heard: str, limit: float) -> Finding:
    """Who is silent in what is `heard` after the limit; else, who came least far."""
    alive = {
        names[int(rank)] for rank in re.findall(rf"^{MARK} (\d+) alive\r?$", heard, re.MULTILINE)
    }
    fix = "look at these hosts (disk, memory, firewall) and at the links between them, or give --timeout more seconds"
    parts = reached(names, said)
    silent = [name for name in names if name not in alive and parts[name][0] != MPI_STARTS]
    if 0 < len(silent) < len(names):
        where = listed([f"{name} has been silent since {parts[name][1]}" for name in silent])
        return Finding(listed(silent), f"no end after {limit:g} s: {where}", fix)
    slowest = behind(names, said)
    who = "" if len(slowest) == len(names) else listed(list(slowest))
    return Finding(who, f"no end after {limit:g} s: the job hung, {_where(names, slowest)}", fix)


def reached(names: list[str], said: str) -> dict[str, tuple[int, str]]:
    """The order and name of the last part that each host began."""
    found = dict.fromkeys(names, (-1, "its start"))
    for rank, order, part in re.findall(rf"^{MARK} (\d+) (\d+) (.*?)\r?$", said, re.MULTILINE):
        if int(rank) < len(names):
            found[names[int(rank)]] = max(found[names[int(rank)]], (int(order), part))
    return found


def behind(names: list[str], said: str) -> dict[str, str]:
    """The hosts that came least far, and the part they were in."""
    parts = reached(names, said)
    least = min(order for order, _ in parts.values())
    return {name: part for name, (order, part) in parts.items() if order == least}


def failed(names: list[str], said: str, status: int) -> Finding:
    """Why the job ended early: by a rank's own word, by mpirun's, or the last that was said."""
    if match := re.search(rf"^{MARK} (\d+) error (.*?)\r?$", said, re.MULTILINE):
        host, what = names[int(match[1])], match[2]
        return Finding(
            host,
            f"the check failed there: {what}",
            "mend the environment on it: launch/install/install",
        )
    if match := re.search(r"on node (\S+) exited on (signal \d+[^.]*)", said):
        host, what = match[1], " ".join(match[2].split())
        return Finding(
            host,
            f"its process was ended by {what}",
            "who kills there? See dmesg for a lack of memory",
        )
    if match := re.search(
        r"lost communication with a remote daemon.*?Remote daemon:[^\n]*? on node (\S+)",
        said,
        re.DOTALL,
    ):
        return Finding(
            match[1],
            "the host or its link died in the middle",
            "see its power, its network and its log",
        )
    if match := re.search(r"unexpectedly disconnected.*?Peer host:\s+(\S+)", said, re.DOTALL):
        what = "its process ended or its link was cut: another host lost the connection to it"
        return Finding(match[1], what, "see dmesg there for a lack of memory, and its network")
    text = [
        line.strip()
        for line in said.splitlines()
        if re.search(r"\w", line) and not line.startswith((MARK, "env -i "))
    ]
    last = " ".join(text[-6:])[-500:] or "it said nothing"
    where = _where(names, behind(names, said))
    return Finding(
        "",
        f"mpirun ended with status {status}, {where}: {last}",
        "mend what it says, then run this again",
    )


def _where(names: list[str], slowest: dict[str, str]) -> str:
    if len(slowest) == len(names) > 1:
        return f"all hosts in {next(iter(slowest.values()))}"
    return listed([f"{name} in {part}" for name, part in slowest.items()])


def _listen(err: Path) -> str:
    """What comes on stderr in the next seconds."""
    before = err.stat().st_size
    time.sleep(LISTENS)
    return err.read_bytes()[before:].decode(errors="replace")


def _wait(process: subprocess.Popen, limit: float) -> int | None:
    """The exit status; None when there is none within `limit` seconds."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """mpirun and its ssh have ended afterwards, also when this program is told to leave."""
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                _wait(process, LEAVES)
