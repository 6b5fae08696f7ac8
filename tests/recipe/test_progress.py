"""A bar where a person looks, plain lines in a log, also behind mpirun's pipes."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from tests.ranks import command, environment

PROGRAM = """
from recipe.progress import Progress
progress = Progress(steps=6, steps_per_epoch=3)
for step in range(1, 7):
    progress.step(step)
    progress.line(step, {"loss": 1.5, "error": 0.25, "rate": 0.1, "images_per_second": 1234.0})
progress.say("finished")
progress.close()
"""


def on_a_terminal(arguments: list[str]) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    with subprocess.Popen(arguments, stdout=theirs, stderr=theirs, stdin=theirs, env=environment()) as job:
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(ours, 65536):
                seen += part
        except OSError:
            pass  # the other side is closed
        finally:
            os.close(ours)
        assert job.wait(timeout=60) == 0, seen
    return seen.decode()


@pytest.mark.parametrize("launcher", [None, "mpirun"])
def test_a_terminal_shows_a_bar(launcher):
    program = ["-c", PROGRAM]
    seen = on_a_terminal(command(1, program, launcher) if launcher else [sys.executable, *program])
    assert "100%|" in seen
    assert "loss 1.500  error 25.0%  η 0.1  1,234 images/s" in seen
    assert "finished" in seen
    assert "step 3 of 6" not in seen


@pytest.mark.parametrize("launcher", [None, "mpirun"])
def test_a_log_has_plain_lines(launcher):
    arguments = command(1, ["-c", PROGRAM], launcher) if launcher else [sys.executable, "-c", PROGRAM]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=environment(), check=True)
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("epoch   0.33 of 2  step 1 of 6  loss 1.500  error 25.0%  η 0.1  1,234 images/s")
    assert last == "finished"
    assert "\r" not in done.stderr


def test_the_launchers_log_file_is_left_alone(tmp_path):
    log = tmp_path / "log"
    log.write_text("what was there before\n")
    with log.open("a") as file:
        arguments = command(1, ["-c", PROGRAM], "mpirun")
        subprocess.run(arguments, stdout=file, stderr=file, timeout=60, env=environment(), check=True)
    assert log.read_text().startswith("what was there before\nepoch")
