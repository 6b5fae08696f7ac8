"""What the user sees of the installation: one line a stage.

The output of every command goes to a log file.
"""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from recipe.errors import RunError
from recipe.system import ticking

NO_INDEX = (
    r"name resolution|Name or service not known|Connection refused|Network is unreachable"
    r"|Max retries exceeded|NewConnectionError|ReadTimeout|ConnectTimeout|ProxyError|SSLError"
)
# What to tell the user, by what a command's output says. The first match counts.
ADVICE = {
    r"No space left on device": (
        "the disk is full: free about 4 GB (15 GB with GPUs), then run this again"
    ),
    NO_INDEX: (
        "pip cannot reach a package index: check the network, the proxy and `pip config list`"
    ),
    r"DO NOT MATCH THE HASHES": (
        "the downloaded Horovod is not the trusted release (its sha256 differs): "
        "check `pip config list`"
    ),
    r"No matching distribution found for (?P<name>\S+)": (
        "the package index has no {name} for this Python and machine: check `pip config list`"
    ),
    r"Killed signal terminated program|virtual memory exhausted": (
        "the compiler ran out of memory: run this again with MAKEFLAGS=-j1"
    ),
}
COMPILER_ERROR = re.compile(r"CMake Error|: (fatal )?error: |\*\*\* ")
TAIL = 4000  # bytes of the log
TIMED_OUT, NOT_STARTED = 124, 127  # exit statuses, a shell's


class Console:
    """Prints the stages of an installation, numbered, with the time each took.

    `held` are file descriptors of locks, which the commands inherit.
    """

    def __init__(self, log: Path, total: int, held: Sequence[int] = ()):
        self.log = log
        self.total = total
        self.held = tuple(held)
        self.count = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Print what happens now, how long it goes on, and at the end how long it took."""
        # The line's beginning.
        self.count += 1
        start, terminal = time.monotonic(), sys.stdout.isatty()
        head = f"[{self.count}/{self.total}] {text} ... "
        print(head, end="", flush=True)

        # A terminal's line is written anew, a log's grows.
        def tick() -> None:
            seconds = time.monotonic() - start
            progress = f"{seconds:.0f} s{self.compiled_share()}"
            line = f"\r{head}{progress}\x1b[K" if terminal else f"{progress}; "
            print(line, end="", flush=True)

        # Its growth while the work goes on, and its end.
        try:
            with ticking.every(ticking.TERMINAL if terminal else ticking.LOG, tick):
                yield
        except BaseException:
            print(flush=True)
            raise
        if terminal:
            print(f"\r{head}\x1b[K", end="")
        print(f"{time.monotonic() - start:.0f} s", flush=True)

    def compiled_share(self) -> str:
        """Return how far a compilation is, by its last lines in the log: ", 45 %", or ""."""
        with suppress(OSError), self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - TAIL))
            shares = re.findall(rb"\[ *(\d+)%\]", log.read())
            if shares:
                return f", {int(shares[-1])} %"
        return ""

    def run(
        self,
        command: Sequence[str | Path],
        what: str,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> str:
        """Run a command into the log and return its output. Raise RunError when it fails."""
        words = [str(word) for word in command]
        start = self.log.stat().st_size
        with self.log.open("ab") as log:
            log.write(f"\n$ {shlex.join(words)}\n".encode())
            log.flush()
            status = self._call(words, log, env, timeout)
        output = self.log.read_bytes()[start:].decode(errors="replace")
        if status:
            raise RunError(f"{explain(what, status, output)}\nfull output: {self.log}")
        return output

    def _call(
        self, words: list[str], log: BinaryIO, env: Mapping[str, str] | None, timeout: float | None
    ) -> int:
        """Run a command and return its exit status.

        It holds the locks too: if it outlives this process, the next installation waits for it.
        """
        try:
            return subprocess.call(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                timeout=timeout,
                pass_fds=self.held,
            )
        except subprocess.TimeoutExpired:
            log.write(f"no end after {timeout:g} s\n".encode())
            return TIMED_OUT
        except OSError as error:
            log.write(f"{error}\n".encode())
            return NOT_STARTED


def explain(what: str, status: int, output: str) -> str:
    """Return the sentence for a failed command, and the last lines it wrote."""
    sentence = f"{what} failed (exit status {status})"
    for pattern, advice in ADVICE.items():
        if match := re.search(pattern, output):
            sentence = f"{what} failed: {advice.format(**match.groupdict())}"
            break
    quoted = [f"  | {line}" for line in telling_lines(output)]
    return "\n".join([sentence, *quoted])


def telling_lines(output: str) -> list[str]:
    """Return the lines worth showing: a compiler's first error, which pip buries, and the last."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("$ ", "WARNING: Location"))]
    last = lines[-4:]
    for index, line in enumerate(lines):
        if COMPILER_ERROR.search(line):
            if index < len(lines) - 6:  # not among the last anyway
                return [*lines[index : index + 3], "...", *last]
            break
    return last
