"""A folder has one writer; who it is stands in the lock, and the lock ends with it."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from recipe.errors import UsageError
from recipe.system import owner
from tests.ranks import environment

HOLDER = """
import sys, time
from pathlib import Path
from recipe.system import owner
with owner.only(Path(sys.argv[1]), "the folder"):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the same protocol take less time."""
    seconds = {"WAIT": 0.5, "LEASE": 30.0, "BEAT": 0.2, "WATCH": 1.5, "LOOK": 0.05}
    for name, value in seconds.items():
        monkeypatch.setattr(owner, name, value)


@contextlib.contextmanager
def held(path: Path) -> Iterator[subprocess.Popen]:
    """Hold the lock in another process."""
    words = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def take(path: Path) -> bool:
    """Take the lock and let it go; return whether its file existed meanwhile."""
    with owner.only(path, "the folder"):
        return path.exists()


def test_a_second_process_is_told_who_has_it_and_a_killed_one_has_it_no_longer(tmp_path, quick):
    path = tmp_path / "lock"
    with held(path) as process:
        with pytest.raises(UsageError) as refused:
            take(path)
        holder = f"process {process.pid} on {socket.gethostname()}"
        assert f"the folder is in use by {holder}, since 2" in str(refused.value)
        process.kill()
        process.wait()
        assert path.exists()
        began = time.monotonic()
        assert take(path)
        assert time.monotonic() - began < owner.WATCH  # the kernel knows; nobody watches
    assert not path.exists()


def elsewhere(path: Path) -> None:
    """Write the lock's file as a process of another host leaves it."""
    faraway = owner.Owner("faraway", 17, "2020-01-01 00:00:00 UTC", "another kernel")
    path.write_text(json.dumps(asdict(faraway)))


@pytest.mark.parametrize("locks", [True, False])
def test_an_owner_on_another_host_counts_as_long_as_it_shows_life(
    tmp_path, quick, monkeypatch, capsys, locks
):
    """This counts where the kernel's lock is one host's, or where there is none at all."""
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "lock"
    elsewhere(path)
    ended = threading.Event()

    def live() -> None:
        life = 0
        while not ended.wait(0.2):
            life += 1
            path.write_text(json.dumps(json.loads(path.read_text()) | {"life": life}))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        message = "in use by process 17 on faraway, since 2020-01-01 00:00:00 UTC"
        with pytest.raises(UsageError, match=message):
            take(path)
    finally:
        ended.set()
        thread.join()
    assert "watching for" in capsys.readouterr().err
    assert take(path)
    assert not path.exists()


def no_locks(file: int, operation: int) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def test_without_the_kernels_locks_two_of_this_host_exclude_each_other_too(
    tmp_path, quick, monkeypatch
):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "lock"
    with owner.only(path, "the folder"):
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()} on"):
            take(path)
        assert path.exists()


def test_a_dead_hosts_lock_is_waited_for_until_the_server_takes_it_back(tmp_path, quick):
    path = tmp_path / "lock"
    elsewhere(path)
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        back = threading.Timer(1.5, file.close)  # later than WAIT
        back.start()
        assert take(path)
        back.join()


def test_what_is_no_file_is_an_error_and_no_endless_wait(tmp_path, quick):
    (tmp_path / "lock").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="symbolic links"):
        take(tmp_path / "lock")


def test_who_waits_gets_it_from_who_leaves(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(owner, "WAIT", 30.0)
    path = tmp_path / "lock"
    order = []

    def second() -> None:
        with owner.only(path, "the folder"):
            order.append("second")

    with owner.only(path, "the folder"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
