"""A folder's only writer: a lock that says who holds it, and that ends with its owner, however that ends.

The kernel's lock (flock) holds on a host, and on NFS or Lustre also between hosts, if mounted so. Where there is no
such lock or one host only knows it, a sign of life counts: the owner writes one into the lock's file every few
seconds, and whoever comes watches for a while whether there is one."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from recipe.errors import UsageError
from recipe.system.output import warn

WAIT = 10.0  # seconds for a lock that is held: its owner may be about to leave
BEAT = 5.0  # seconds between an owner's signs of life
WATCH = 15.0  # seconds without one after which an owner of another host is gone
LEASE = 120.0  # seconds for one that a dead host holds: a server of NFS takes it back after 90
LONGEST = (
    180.0  # seconds that it takes to get a lock, or to learn that it can't be had, and some more
)
LOOK = 0.2  # seconds between looks
LENGTH = 512  # bytes of the file
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    process: int
    since: str
    boot: str  # of the host's kernel, within which its locks hold
    life: int = 0  # grows with each sign of life

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


@contextlib.contextmanager
def only(path: Path, what: str) -> Iterator[None]:
    """Holds the lock at `path`, whose folder must exist. Raises UsageError, with the owner's name, when another has it,
    and OSError when the file can't be made or read. `what` it protects, for messages."""
    file, ended = _taken(path, what), threading.Event()
    mine = Owner(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %Z"), _boot())
    _write(file, mine)
    life = threading.Thread(target=_live, args=(file, mine, ended), name="owner", daemon=True)
    life.start()
    try:
        yield
    finally:
        ended.set()
        life.join(BEAT)
        with contextlib.suppress(OSError):
            if _same(file, path):
                path.unlink()
        if (
            not life.is_alive()
        ):  # else it waits for a file system that is away, and the number must not become another's
            os.close(file)


def _taken(path: Path, what: str) -> int:
    """The lock's file, open, once it is this process's."""
    began, first = time.monotonic(), _read(path)
    while True:
        file, made = _open(path)
        try:
            if _is_ours(file, made, path, what):
                return file
        except BlockingIOError:
            _wait(path, first, time.monotonic() - began, what)
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        time.sleep(LOOK)


def _is_ours(file: int, made: bool, path: Path, what: str) -> bool:
    """Tries it. Raises BlockingIOError when the kernel's lock is another's, UsageError when its owner shows life."""
    locked, owner = _lock(file), _read(path)
    if not (made or (locked and (owner is None or owner.boot == _boot()))):
        _watch(path, owner, what)
        if not locked:
            path.unlink(missing_ok=True)  # then to make the file is what only one can do
    return _same(file, path)  # else its owner has just left, and taken it away


def _wait(path: Path, first: Owner | None, waited: float, what: str) -> None:
    """For a lock that another process has. Raises UsageError when that is no use."""
    owner = _read(path)
    dead = owner is not None and owner.boot != _boot() and owner == first  # by all that is known
    if waited > (LEASE if dead else WAIT):
        _refuse(owner, what)


def _open(path: Path) -> tuple[int, bool]:
    """(the file, whether it was made just now)."""
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), True
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), False


def _lock(file: int) -> bool:
    """Whether the kernel's lock is there for it. Raises BlockingIOError when another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        raise
    except OSError:
        return False


def _watch(path: Path, owner: Owner | None, what: str) -> None:
    """Returns when the owner shows no sign of life. Raises UsageError when it does."""
    who = owner or "a process that has not yet said who it is"
    warn(f"{what} was in use by {who}: watching for {WATCH:.0f} s whether it still is")
    end = time.monotonic() + WATCH
    while time.monotonic() < end:
        time.sleep(LOOK)
        now = _read(path)
        if now is None and owner is not None:
            return  # it has just left
        if now != owner:
            _refuse(now, what)


def _refuse(owner: Owner | None, what: str) -> None:
    raise UsageError(
        f"{what} is in use by {owner or 'another process'}: wait until it has ended, or end it"
    )


def _live(file: int, owner: Owner, ended: threading.Event) -> None:
    life = 0
    while not ended.wait(BEAT):
        life += 1
        with contextlib.suppress(OSError):
            _write(file, Owner(**asdict(owner) | {"life": life}))


def _write(file: int, owner: Owner) -> None:
    """In place and of one length, so that a full disk has room for it; brought to the server, for other hosts."""
    with contextlib.suppress(OSError):
        os.pwrite(file, json.dumps(asdict(owner)).ljust(LENGTH - 1).encode() + b"\n", 0)
        os.fsync(file)


def _read(path: Path) -> Owner | None:
    """Opened anew: NFS looks at the server then."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _same(file: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _boot() -> str:
    try:
        return BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()
