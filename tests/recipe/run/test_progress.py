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

BIG = """
import time
from recipe.system.progress import Tally
from recipe.run.progress import Progress
progress = Progress(steps=14040, steps_per_epoch=156)
for step, speed in ((1, None), (2, 32000.0)):
    progress.step(step)
    progress.show(step, {"loss": 6.912, "error": 0.999, "rate": 0.03012, "images_per_second": speed})
progress.close()
with Tally("verifying imagenet2012", 1281167) as tally:
    tally.add(1281167)
"""
SLOW = """
import time
from recipe.system import ticking
from recipe.system.progress import Tally
from recipe.run.progress import Progress
ticking.TERMINAL = ticking.LOG = 0.2
progress = Progress(steps=6, steps_per_epoch=3)
time.sleep(1)
progress.step(1)
time.sleep(1)
progress.doing("the evaluation after epoch 1")
time.sleep(1)
progress.close()
with ticking.ticking(lambda: "reading the heads"):
    time.sleep(1)
with Tally("writing train", 10):
    time.sleep(1)
"""
PROGRAM = """
from recipe.run.progress import Progress
progress = Progress(steps=6, steps_per_epoch=3)
for step in range(1, 7):
    progress.step(step)
    progress.show(step, {"loss": 1.5, "error": 0.25, "rate": 0.1, "images_per_second": 1234.0})
progress.say("finished")
progress.close()
"""


def on_a_terminal(arguments: list[str], rows: int = 40, columns: int = 160) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with subprocess.Popen(
        arguments, stdout=theirs, stderr=theirs, stdin=theirs, env=environment()
    ) as job:
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
    arguments = (
        command(1, ["-c", PROGRAM], launcher) if launcher else [sys.executable, "-c", PROGRAM]
    )
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=60, env=environment(), check=True
    )
    first, *_, last = done.stderr.splitlines()
    assert first.startswith(
        "epoch   0.33 of 2  step 1 of 6  loss 1.500  error 25.0%  η 0.1  1,234 images/s"
    )
    assert last == "finished"
    assert "\r" not in done.stderr


def test_the_launchers_log_file_is_left_alone(tmp_path):
    log = tmp_path / "log"
    log.write_text("what was there before\n")
    with log.open("a") as file:
        arguments = command(1, ["-c", PROGRAM], "mpirun")
        subprocess.run(
            arguments, stdout=file, stderr=file, timeout=60, env=environment(), check=True
        )
    assert log.read_text().startswith("what was there before\nepoch")


@pytest.mark.parametrize(("rows", "columns"), [(24, 80), (0, 0)])
def test_what_matters_fits_eighty_columns(rows, columns):
    """Also on a terminal of 0 × 0 characters, as containers have: it is taken for one of 80
    columns.
    """
    seen = on_a_terminal([sys.executable, "-c", BIG], rows, columns)
    lines = [line for part in seen.split("\r") for line in part.splitlines()]
    assert max(map(len, lines)) == 80
    (line,) = {line for line in lines if "32,000 images/s" in line}
    assert line.startswith("  0%|") and "2/14040 [" in line and "loss 6.912" in line
    assert len(line.partition("|")[2].partition("|")[0]) >= 4, "the bar"
    assert any(
        line.startswith("verifying imagenet2012:   0%|") and "0/1281167 [" in line for line in lines
    )


def test_a_log_is_never_silent_for_long():
    """Before the first step, between two of them, while something else is done, and where nothing
    comes of it.
    """
    done = subprocess.run(
        [sys.executable, "-c", SLOW], capture_output=True, text=True, env=environment(), check=True
    )
    for what in (
        "the first step: under way",
        "step 2 of 6: under way",
        "the evaluation after epoch 1: under way",
    ):
        assert done.stderr.count(what) >= 2, done.stderr
    assert done.stderr.count("reading the heads … ") >= 2
    assert done.stderr.count("writing train: 0 of 10 images, 0 images/s, not one yet") >= 2
    assert "\r" not in done.stderr


def test_a_terminal_moves_while_something_is_long():
    seen = on_a_terminal([sys.executable, "-c", SLOW])
    for what in ("the first step", "the evaluation after epoch 1", "\rreading the heads … "):
        assert seen.count(what) >= 2, seen


def test_the_first_step_counts_in_no_time_left():
    """All that is made ready is in it."""
    program = PROGRAM.replace(
        "progress.step(step)", "time.sleep(3 * (step == 1)); progress.step(step)"
    )
    words = [sys.executable, "-c", "import time" + program]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, env=environment(), check=True
    )
    first, *others, _ = done.stderr.splitlines()
    assert "left" not in first
    assert [line.split("  ")[-1] for line in others] == ["00:00 left"] * 5
