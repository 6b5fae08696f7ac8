"""Whether ssh reaches a host and finds this project there, and if not, why: all hosts at once, without a password."""

import re
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONNECT = 10  # seconds until a host must answer
ENDS = 30  # seconds until all is done; a hung home directory would take for ever
REACHED = "launch.doctor was here"
SSH_FAILED = 255  # ssh's own exit status
NO_FOLDER, NO_PYTHON, NO_MPI, BROKEN_PYTHON = (
    71,
    72,
    73,
    74,
)  # the exit statuses of the script below

ENVIRONMENT = "share the environment's disk with it, or install there too (launch/install/install)"
NOT_REACHED = (  # what ssh says, what that means, and the fix; the first match counts
    (
        r"Could not resolve hostname",
        "the name doesn't resolve",
        "add {host} to /etc/hosts or DNS, or correct the hostfile",
    ),
    (
        r"HOST IDENTIFICATION HAS CHANGED",
        "the host's key has changed",
        "if it was installed anew: ssh-keygen -R {host}, then `ssh {host}` once",
    ),
    (
        r"Host key verification failed",
        "the host's key is unknown",
        "`ssh {host}` once and compare the key, or add it to known_hosts",
    ),
    (
        r"Permission denied \(",
        "permission denied: the host takes none of your keys",
        "ssh-copy-id {host}, or start ssh-agent",
    ),
    (
        r"Too many authentication failures",
        "too many keys were tried",
        "name one in ~/.ssh/config: IdentityFile",
    ),
    (
        r"Connection refused",
        "connection refused: nobody listens at ssh's port",
        "start sshd on {host}",
    ),
    (
        r"No route to host|Network is unreachable",
        "no route to the host",
        "is {host} up, and on this network? Is its address right?",
    ),
    (r"timed out", f"no answer in {CONNECT} s", "is {host} up? Does a firewall drop port 22?"),
    (
        r"kex_exchange_identification|Connection (?:closed|reset)",
        "sshd closed the connection",
        "see {host}'s MaxStartups, hosts.deny and sshd's log",
    ),
)
NOT_READY = {
    NO_FOLDER: (
        "{root} is not there",
        "share the project's disk with {host}, or copy the project to the same path",
    ),
    NO_PYTHON: ("{python} is not there", ENVIRONMENT),
    NO_MPI: ("{orted}, which mpirun starts there, is missing", ENVIRONMENT),
    BROKEN_PYTHON: ("{python} doesn't run: {said}", ENVIRONMENT),
}


@dataclass(frozen=True)
class Reach:
    """How a host was reached, or why not."""

    how: str  # "ssh", "this machine", "srun"; "" when it wasn't
    seconds: float = 0.0
    reason: str = ""
    fix: str = ""


def reach_all(names: list[str]) -> dict[str, Reach]:
    """Each host by ssh, at most 64 at a time; this machine needs none."""
    with ThreadPoolExecutor(max_workers=64) as pool:
        return dict(zip(names, pool.map(reach, names), strict=True))


def reach(name: str) -> Reach:
    if is_here(name):
        return Reach("this machine")
    command = [
        "ssh",
        "-n",
        "-T",
        "-o",
        "BatchMode=yes",
        "-o",
        f"ConnectTimeout={CONNECT}",
        name,
        _script(),
    ]
    began = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, timeout=ENDS, check=False)
    except subprocess.TimeoutExpired:
        return Reach(
            "",
            reason=f"ssh did not end in {ENDS} s",
            fix=f"look at `ssh {name}`: a shell or disk that hangs?",
        )
    except FileNotFoundError:
        return Reach("", reason="there is no ssh on this machine", fix="install OpenSSH's client")
    printed, said = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    if done.returncode == 0 and REACHED in printed:
        return Reach("ssh", time.monotonic() - began)
    reason, fix = explain(name, done.returncode, printed, said)
    return Reach("", reason=reason, fix=fix)


def explain(host: str, status: int, printed: str, said: str) -> tuple[str, str]:
    """(the reason, the fix) of an ssh that ended with this exit status, stdout and stderr."""
    last = (said.strip() or printed.strip() or "it said nothing").splitlines()[-1].strip()
    if status in NOT_READY:
        reason, fix = NOT_READY[status]
        return reason.format(
            root=ROOT, python=sys.executable, orted=_orted(), said=last
        ), fix.format(host=host)
    if status == SSH_FAILED:
        for pattern, reason, fix in NOT_REACHED:
            if re.search(pattern, said):
                return reason, fix.format(host=host)
        return f"ssh failed: {last}", f"see `ssh -v {host}`"
    return (
        f"no shell that runs commands (exit status {status}: {last})",
        f"see `ssh {host} true`, and your login shell",
    )


def is_here(name: str) -> bool:
    """Whether a name is this machine's, for which no launcher uses ssh."""
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        with socket.socket() as listener:
            listener.bind((name, 0))  # resolves it; only an address of this machine can be bound to
    except OSError:
        return False
    return True


def _script() -> str:
    """What ssh runs: in POSIX words for sh, quoted again for whatever the login shell is."""
    folder, python, orted = (shlex.quote(str(path)) for path in (ROOT, sys.executable, _orted()))
    script = f"cd {folder} || exit {NO_FOLDER}; test -x {python} || exit {NO_PYTHON}; "
    if _orted().exists():
        script += f"test -x {orted} || exit {NO_MPI}; "
    return (
        f"sh -c {shlex.quote(f'{script}{python} -c pass || exit {BROKEN_PYTHON}; echo {REACHED}')}"
    )


def _orted() -> Path:
    return Path(sys.prefix) / "bin" / "orted"
