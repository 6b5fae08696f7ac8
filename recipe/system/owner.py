"""A folder's only writer: a lock that names its owner, and that ends with it, however that ends.

The kernel's lock (flock) holds on a host, and on NFS or Lustre also between hosts, if mounted so.
Where there is no such lock, or only one host knows it, signs of life count: the owner writes one
into the lock's file every few seconds, and whoever comes watches for a while whether there is one.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from recipe.errors import UsageError
from recipe.system.output import warn

WAIT = 10.0  # seconds for a lock that is held: its owner may be about to leave
BEAT = 5.0  # seconds between an owner's signs of life
WATCH = 15.0  # seconds without one after which an owner of another host is gone
LEASE = 120.0  # seconds for one that a dead host holds: a server of NFS takes it back after 90
LONGEST = 180.0  # seconds in which a lock is obtained or refused, with a reserve
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
    """Hold the lock at `path`, whose folder must exist. `what` it protects, for messages.

    Raise UsageError, with the owner's name, when another process has the lock, and OSError when
    the file can't be created or read.
    """
    # Take the lock, and say whose it is.
    file = _acquire(path, what)
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    owner = Owner(socket.gethostname(), os.getpid(), since, _boot())
    _write(file, owner)

    # Show that the owner lives, as long as it does.
    ended = threading.Event()
    arguments = (file, owner, ended)
    signs_of_life = threading.Thread(
        target=_write_signs_of_life, args=arguments, name="owner", daemon=True
    )
    signs_of_life.start()
    try:
        yield
    finally:
        ended.set()
        signs_of_life.join(BEAT)
        with contextlib.suppress(OSError):
            if _is_same_file(file, path):
                path.unlink()
        # A thread that still lives waits for a file system that is away. It would write to
        # whatever file got this descriptor's number next, so the descriptor stays open.
        if not signs_of_life.is_alive():
            os.close(file)


def _acquire(path: Path, what: str) -> int:
    """Return the lock's file, open, once it belongs to this process."""
    began = time.monotonic()
    first_owner = _read(path)
    while True:
        file, is_new = _open(path)
        try:
            if _is_ours(file, is_new, path, what):
                return file
        except BlockingIOError:
            _check_wait(path, first_owner, time.monotonic() - began, what)
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        time.sleep(LOOK)


def _is_ours(file: int, is_new: bool, path: Path, what: str) -> bool:
    """Try to get the lock; return whether this process has it.

    Raise BlockingIOError when the kernel's lock is another's, and UsageError when its owner shows
    signs of life.
    """
    is_locked = _lock(file)
    owner = _read(path)
    kernel_decides = is_locked and (owner is None or owner.boot == _boot())
    if not (is_new or kernel_decides):
        _watch(path, owner, what)
        if not is_locked:
            # Without the kernel's lock, whoever creates the file next has the lock.
            path.unlink(missing_ok=True)
    # If the name leads to another file, the owner has just left and deleted this one.
    return _is_same_file(file, path)


def _check_wait(path: Path, first_owner: Owner | None, waited: float, what: str) -> None:
    """Raise UsageError when it is no use to wait longer for a lock that another process has."""
    owner = _read(path)
    seems_dead = owner is not None and owner.boot != _boot() and owner == first_owner
    if waited > (LEASE if seems_dead else WAIT):
        _refuse(owner, what)


def _open(path: Path) -> tuple[int, bool]:
    """Return the file's descriptor, and whether this call created the file."""
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), True
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), False


def _lock(file: int) -> bool:
    """Take the kernel's lock; return False where the file system has none.

    Raise BlockingIOError when another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        raise
    except OSError:
        return False


def _watch(path: Path, owner: Owner | None, what: str) -> None:
    """Return when the owner shows no sign of life. Raise UsageError when it does."""
    who = owner or "a process that has not yet said who it is"
    warn(f"{what} was in use by {who}: watching for {WATCH:.0f} s whether it still is")
    end = time.monotonic() + WATCH
    while time.monotonic() < end:
        time.sleep(LOOK)
        current_owner = _read(path)
        if current_owner is None and owner is not None:
            return  # it has just left
        if current_owner != owner:
            _refuse(current_owner, what)


def _refuse(owner: Owner | None, what: str) -> None:
    raise UsageError(
        f"{what} is in use by {owner or 'another process'}: wait until it has ended, or end it"
    )


def _write_signs_of_life(file: int, owner: Owner, ended: threading.Event) -> None:
    life = 0
    while not ended.wait(BEAT):
        life += 1
        with contextlib.suppress(OSError):
            _write(file, replace(owner, life=life))


def _write(file: int, owner: Owner) -> None:
    """Write the owner in place, and bring it to the server, for other hosts.

    The length is always the same, so that a full disk has room for it.
    """
    line = json.dumps(asdict(owner)).ljust(LENGTH - 1) + "\n"
    with contextlib.suppress(OSError):
        os.pwrite(file, line.encode(), 0)
        os.fsync(file)


def _read(path: Path) -> Owner | None:
    """Return who is named in the file. It is opened anew, because NFS asks the server then."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_same_file(file: int, path: Path) -> bool:
    """Return whether the open file is still the one with this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _boot() -> str:
    """Return what names the running kernel: its locks end with it."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()
