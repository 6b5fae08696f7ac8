"""Several hosts on one machine: network namespaces with their own name, address and sshd, on one
bridge.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import BIN, ROOT, environment

NETNS = Path(
    "/etc/netns"
)  # `ip netns exec` shows what lies here under a host's name as that host's /etc


def missing() -> str:
    """Why hosts can't be made here; empty if they can."""
    if os.getuid() != 0:
        return "hosts as network namespaces need root"
    commands = ("ip", "unshare", "ssh", "ssh-keygen", "/usr/sbin/sshd")
    if lacking := [command for command in commands if not shutil.which(command)]:
        return f"{', '.join(lacking)} not installed"
    probe = f"probe{os.getpid()}"
    tried = subprocess.run(
        ["ip", "netns", "add", probe], capture_output=True, text=True, check=False
    )
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def may_be_named() -> bool:
    """Whether this machine may have another name for some of its processes."""
    return (
        subprocess.run(
            ["unshare", "--uts", "--mount", "true"], capture_output=True, check=False
        ).returncode
        == 0
    )


needs_hosts = pytest.mark.skipif(bool(missing()), reason=missing())
needs_names = pytest.mark.skipif(
    not may_be_named(), reason="a machine of another name (unshare --uts) needs root"
)


class Hosts:
    """`names`: h1, h2, … unless given, at 10.213.0.1, .2, …; from each, `ssh` reaches every other
    by its name.
    """

    def __init__(self, folder: Path, count: int, names: list[str] | None = None) -> None:
        self.folder, self.names = folder, names or [f"h{i + 1}" for i in range(count)]
        self._bridge = f"br{os.getpid()}"

    def namespace(self, host: str) -> str:
        return f"test{os.getpid()}-{host}"

    def start(self) -> None:
        self._keys()
        Path("/run/sshd").mkdir(exist_ok=True)
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        for number, host in enumerate(self.names, 1):
            self._etc(host)
            self._link(number, host)
            self.popen(
                host, ["/usr/sbin/sshd", "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        for host in self.names:
            _until(
                lambda host=host: self._run(self.names[0], ["ssh", host, "true"]).returncode == 0,
                f"sshd of {host}",
            )

    def stop(self) -> None:
        for host in self.names:
            for pid in self.pids(host):
                _kill(pid)
            _ip(
                "link", "delete", self._port(host), check=False
            )  # at once; with its namespace it would go some time later
            _ip("netns", "delete", self.namespace(host), check=False)
            shutil.rmtree(NETNS / self.namespace(host), ignore_errors=True)
        _ip("link", "delete", self._bridge, check=False)
        with contextlib.suppress(OSError):
            NETNS.rmdir()

    def popen(self, host: str, command: list[str], **options) -> subprocess.Popen:
        """Starts a command on a host, in a process group of its own."""
        inside = f"printf {host} >/proc/sys/kernel/hostname; exec {shlex.join(command)}"  # `hostname` takes no underscore
        enter = [
            "ip",
            "netns",
            "exec",
            self.namespace(host),
            "unshare",
            "--uts",
            "sh",
            "-c",
            inside,
        ]
        return subprocess.Popen(enter, start_new_session=True, text=True, **options)

    def run(
        self, host: str, command: list[str], timeout: float = 120, **extra: str
    ) -> subprocess.CompletedProcess:
        """Runs a command on a host to its end, in the environment of a rank; stdout and stderr
        together.
        """
        return self._run(host, command, timeout, env=environment(**extra))

    def cut(self, host: str) -> None:
        """The host's link goes down; nobody is told."""
        _ip("link", "set", self._port(host), "down")

    def mend(self, host: str) -> None:
        _ip("link", "set", self._port(host), "up")

    def pids(self, host: str) -> list[int]:
        """All processes on a host."""
        found = _ip("netns", "pids", self.namespace(host), check=False).split()
        return [int(pid) for pid in found if not _zombie(int(pid))]

    def commands(self, host: str) -> dict[int, str]:
        """The command lines of all processes on a host but its sshd, by their numbers."""
        found = {pid: _cmdline(pid) for pid in self.pids(host)}
        return {
            pid: command
            for pid, command in found.items()
            if command and "sshd" not in command.split()[0]
        }

    def settle(self) -> None:
        """Waits until nothing but sshd runs: daemons and shells of other hosts end a moment after
        their launcher.
        """
        _until(lambda: not any(self.commands(host) for host in self.names), "all processes gone", 5)

    def kill(self, host: str) -> None:
        """All of the host's processes but its sshd end at once; some may have ended by the others'
        death.
        """
        for pid in self.commands(host):
            _kill(pid)

    def mpirun(self, size: int, hosts: list[str], *options: str) -> list[str]:
        """The beginning of a command line: `size` ranks, evenly on `hosts`."""
        slots = ",".join(f"{host}:{size // len(hosts)}" for host in hosts)
        network = [
            word
            for name in ("btl_tcp", "oob_tcp")
            for word in ("--mca", f"{name}_if_include", "eth0")
        ]
        place = [
            "-np",
            str(size),
            "-H",
            slots,
            "--bind-to",
            "none",
            "--mca",
            "pml",
            "ob1",
            *network,
        ]
        return [str(BIN / "mpirun"), "--prefix", str(BIN.parent), *place, *options]

    def _run(
        self, host: str, command: list[str], timeout: float = 120, **options
    ) -> subprocess.CompletedProcess:
        process = self.popen(
            host, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
        )
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, printed)

    def _port(self, host: str) -> str:
        return f"p{os.getpid()}h{self.names.index(host) + 1}"

    def _link(self, number: int, host: str) -> None:
        namespace, port = self.namespace(host), self._port(host)
        _ip("netns", "add", namespace)
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", port, "master", self._bridge, "up")
        _ip("-n", namespace, "address", "add", f"10.213.0.{number}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", interface, "up")

    def _keys(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in ("user", "host"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(command, check=True)

    def _etc(self, host: str) -> None:
        """The host's own /etc/hosts and /etc/ssh: its ssh trusts the key that all hosts have, and
        shows the user's.
        """
        etc = NETNS / self.namespace(host)
        (etc / "ssh").mkdir(parents=True)
        lines = [
            "127.0.0.1 localhost",
            *(f"10.213.0.{i} {name}" for i, name in enumerate(self.names, 1)),
        ]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        for file in ("user", "host", "user.pub"):
            shutil.copy(self.folder / file, etc / "ssh")
        public = (self.folder / "host.pub").read_text()
        (etc / "ssh" / "ssh_known_hosts").write_text(
            "".join(f"{name} {public}" for name in self.names)
        )
        (etc / "ssh" / "ssh_config").write_text("IdentityFile /etc/ssh/user\nUpdateHostKeys no\n")
        (etc / "ssh" / "sshd_config").write_text(
            "HostKey /etc/ssh/host\nAuthorizedKeysFile /etc/ssh/user.pub\nUsePAM no\nStrictModes "
            "no\n"
            "PermitRootLogin prohibit-password\nPidFile none\nMaxStartups 64\n"
        )


@contextlib.contextmanager
def hosts(folder: Path, count: int, names: list[str] | None = None) -> Iterator[Hosts]:
    """`count` hosts, of these names if given, and nothing of them afterwards."""
    made = Hosts(folder, count, names)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def named(
    folder: Path, host: str, line: str, *command: str, **variables: str
) -> subprocess.CompletedProcess:
    """Runs a command on a machine of this name, whose /etc/hosts has one line more."""
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{line}\n")
    inside = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
    words = [
        "unshare",
        "--uts",
        "--mount",
        "sh",
        "-c",
        inside,
        "sh",
        str(folder / "hosts"),
        host,
        *command,
    ]
    return subprocess.run(
        words,
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _ip(*words: str, check: bool = True) -> str:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True).stdout


def _until(true, what: str, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not after {seconds} s: {what}"
        time.sleep(0.05)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _cmdline(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def _zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True
