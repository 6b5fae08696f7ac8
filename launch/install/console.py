"""What the user sees of the installation: one line a stage; the output of every command goes to a log file."""

import contextlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from recipe.errors import RunError
from recipe.system import ticking

# What a command's output says, and what to tell the user; the first match counts.
KNOWN = (
    (
        r"No space left on device",
        "the disk is full: free about 4 GB (15 GB with GPUs), then run this again",
    ),
    (
        r"name resolution|Name or service not known|Connection refused|Network is unreachable|Max retries exceeded"
        r"|NewConnectionError|ReadTimeout|ConnectTimeout|ProxyError|SSLError",
        "pip cannot reach a package index: check the network, the proxy and `pip config list`",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "the downloaded Horovod is not the trusted release (its sha256 differs): check `pip config list`",
    ),
    (
        r"No matching distribution found for (?P<name>\S+)",
        "the package index has no {name} for this Python and machine: check `pip config list`",
    ),
    (
        r"Killed signal terminated program|virtual memory exhausted",
        "the compiler ran out of memory: run this again with MAKEFLAGS=-j1",
    ),
)


TAIL = 4000  # bytes of the log


class Console:
    """Prints the stages of an installation, numbered, with the time each took."""

    def __init__(self, log: Path, total: int, held: Sequence[int] = ()):
        self.log, self.total, self.held = log, total, tuple(held)
        self.count = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Print what happens now, how long it has been going on, and at the end how long it took."""
        self.count += 1
        start, terminal = time.monotonic(), sys.stdout.isatty()
        head = f"[{self.count}/{self.total}] {text} ... "
        print(head, end="", flush=True)

        def tick() -> None:
            far = f"{time.monotonic() - start:.0f} s{self.far()}"
            print(f"\r{head}{far}\x1b[K" if terminal else f"{far}; ", end="", flush=True)

        try:
            with ticking.every(ticking.TERMINAL if terminal else ticking.LOG, tick):
                yield
        except BaseException:
            print(flush=True)
            raise
        print(f"\r{head}\x1b[K" if terminal else "", end="")
        print(f"{time.monotonic() - start:.0f} s", flush=True)

    def far(self) -> str:
        """How far a compilation says that it is, by its last lines in the log; else nothing."""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - TAIL))
            if shares := re.findall(rb"\[ *(\d+)%\]", log.read()):
                return f", {int(shares[-1])} %"
        return ""

    def run(
        self,
        command: Sequence[str | Path],
        what: str,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> str:
        """Run a command into the log and return its output; a failure ends the installation with a sentence."""
        words = [str(word) for word in command]
        start = self.log.stat().st_size
        with self.log.open("ab") as log:
            log.write(f"\n$ {shlex.join(words)}\n".encode())
            log.flush()
            code = self.call(words, log, env, timeout)
        output = self.log.read_bytes()[start:].decode(errors="replace")
        if code:
            raise RunError(f"{explain(what, code, output)}\nfull output: {self.log}")
        return output

    def call(
        self, words: list[str], log: BinaryIO, env: Mapping[str, str] | None, timeout: float | None
    ) -> int:
        """The exit status. Children hold the lock too: one that outlives us keeps the next installation waiting."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        try:
            return subprocess.call(words, **streams, env=env, timeout=timeout, pass_fds=self.held)
        except subprocess.TimeoutExpired:
            log.write(f"no end after {timeout:g} s\n".encode())
            return 124
        except OSError as error:
            log.write(f"{error}\n".encode())
            return 127


def explain(what: str, code: int, output: str) -> str:
    """The sentence for a failed command, and the last lines it wrote."""
    sentence = f"{what} failed (exit status {code})"
    for pattern, known in KNOWN:
        if match := re.search(pattern, output):
            sentence = f"{what} failed: {known.format(**match.groupdict())}"
            break
    return "\n".join([sentence, *(f"  | {line}" for line in last_lines(output))])


def last_lines(output: str) -> list[str]:
    """What is worth showing: the first error of a compiler, which pip buries, and the last lines."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("$ ", "WARNING: Location"))]
    first = next(
        (
            i
            for i, line in enumerate(lines)
            if re.search(r"CMake Error|: (fatal )?error: |\*\*\* ", line)
        ),
        -1,
    )
    buried = lines[first : first + 3] if 0 <= first < len(lines) - 6 else []
    return [*buried, *(["..."] if buried else []), *lines[-4:]]
