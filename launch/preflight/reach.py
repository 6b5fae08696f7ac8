"""Whether ssh reaches a host and finds this project there, and if not, why.

All hosts are asked at once, without a password.
"""

import re
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CONNECT = 10  # seconds until a host must answer
ENDS = 30  # seconds until all is done; a hung home directory would take for ever
REACHED = "launch.doctor was here"
SSH_FAILED = 255  # ssh's own exit status
NO_FOLDER, NO_PYTHON, NO_MPI, BROKEN_PYTHON = 71, 72, 73, 74  # of the script below


class Explanation(NamedTuple):
    """Why a host isn't reached, and what to do about it."""

    reason: str
    fix: str


# By what ssh says on stderr; the first match counts.
NOT_REACHED = {
    r"Could not resolve hostname": Explanation(
        "the name doesn't resolve",
        "add {host} to /etc/hosts or DNS, or correct the hostfile",
    ),
    r"HOST IDENTIFICATION HAS CHANGED": Explanation(
        "the host's key has changed",
        "if it was installed anew: ssh-keygen -R {host}, then `ssh {host}` once",
    ),
    r"Host key verification failed": Explanation(
        "the host's key is unknown",
        "`ssh {host}` once and compare the key, or add it to known_hosts",
    ),
    r"Permission denied \(": Explanation(
        "permission denied: the host takes none of your keys",
        "ssh-copy-id {host}, or start ssh-agent",
    ),
    r"Too many authentication failures": Explanation(
        "too many keys were tried",
        "name one in ~/.ssh/config: IdentityFile",
    ),
    r"Connection refused": Explanation(
        "connection refused: nobody listens at ssh's port",
        "start sshd on {host}",
    ),
    r"No route to host|Network is unreachable": Explanation(
        "no route to the host",
        "is {host} up, and on this network? Is its address right?",
    ),
    r"timed out": Explanation(
        f"no answer in {CONNECT} s",
        "is {host} up? Does a firewall drop port 22?",
    ),
    r"kex_exchange_identification|Connection (?:closed|reset)": Explanation(
        "sshd closed the connection",
        "see {host}'s MaxStartups, hosts.deny and sshd's log",
    ),
}
# By the exit status of the script below.
INSTALL_THERE = (
    "share the environment's disk with it, or install there too (launch/install/install)"
)
NOT_READY = {
    NO_FOLDER: Explanation(
        "{root} is not there",
        "share the project's disk with {host}, or copy the project to the same path",
    ),
    NO_PYTHON: Explanation("{python} is not there", INSTALL_THERE),
    NO_MPI: Explanation("{orted}, which mpirun starts there, is missing", INSTALL_THERE),
    BROKEN_PYTHON: Explanation("{python} doesn't run: {last_line}", INSTALL_THERE),
}


@dataclass(frozen=True)
class Reach:
    """How a host was reached, or why not."""

    how: str  # "ssh", "this machine", "srun"; "" when it wasn't
    seconds: float = 0.0
    reason: str = ""
    fix: str = ""


def reach_all(names: list[str]) -> dict[str, Reach]:
    """Reach each host, at most 64 at a time."""
    with ThreadPoolExecutor(max_workers=64) as pool:
        return dict(zip(names, pool.map(reach, names), strict=True))


def reach(name: str) -> Reach:
    """Reach a host by ssh, which this machine doesn't need."""
    if is_here(name):
        return Reach("this machine")

    # Run a script there, without a question to the user.
    options = ["-n", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT}"]
    command = ["ssh", *options, name, _script()]
    began = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, timeout=ENDS, check=False)
    except subprocess.TimeoutExpired:
        fix = f"look at `ssh {name}`: a shell or disk that hangs?"
        return Reach("", reason=f"ssh did not end in {ENDS} s", fix=fix)
    except FileNotFoundError:
        return Reach("", reason="there is no ssh on this machine", fix="install OpenSSH's client")

    # Only a host on which the whole script ran is reached.
    stdout = done.stdout.decode(errors="replace")
    stderr = done.stderr.decode(errors="replace")
    if done.returncode == 0 and REACHED in stdout:
        return Reach("ssh", time.monotonic() - began)
    explanation = explain(name, done.returncode, stdout, stderr)
    return Reach("", reason=explanation.reason, fix=explanation.fix)


def explain(host: str, status: int, stdout: str, stderr: str) -> Explanation:
    """Explain an ssh that ended with this exit status and output."""
    # The last line usually says why.
    output = stderr.strip() or stdout.strip() or "it said nothing"
    last_line = output.splitlines()[-1].strip()

    # The script has found something missing.
    if status in NOT_READY:
        reason, fix = NOT_READY[status]
        places = {"root": ROOT, "python": sys.executable, "orted": _orted()}
        return Explanation(reason.format(last_line=last_line, **places), fix.format(host=host))

    # ssh itself has failed.
    if status == SSH_FAILED:
        for pattern, known in NOT_REACHED.items():
            if re.search(pattern, stderr):
                return Explanation(known.reason, known.fix.format(host=host))
        return Explanation(f"ssh failed: {last_line}", f"see `ssh -v {host}`")

    # The script has not run at all.
    return Explanation(
        f"no shell that runs commands (exit status {status}: {last_line})",
        f"see `ssh {host} true`, and your login shell",
    )


def is_here(name: str) -> bool:
    """Return whether a name is this machine's, for which no launcher uses ssh."""
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        with socket.socket() as listener:
            listener.bind((name, 0))  # resolves it; only an address of this machine can be bound to
    except OSError:
        return False
    return True


def _script() -> str:
    """Return what ssh runs: POSIX words for sh, quoted again for whatever the login shell is."""
    folder = shlex.quote(str(ROOT))
    python = shlex.quote(sys.executable)
    orted = shlex.quote(str(_orted()))
    steps = [f"cd {folder} || exit {NO_FOLDER}"]
    steps.append(f"test -x {python} || exit {NO_PYTHON}")
    if _orted().exists():
        steps.append(f"test -x {orted} || exit {NO_MPI}")
    steps += [f"{python} -c pass || exit {BROKEN_PYTHON}", f"echo {REACHED}"]
    return f"sh -c {shlex.quote('; '.join(steps))}"


def _orted() -> Path:
    """Return Open MPI's daemon in this environment, whether it is there or not."""
    return Path(sys.prefix) / "bin" / "orted"
