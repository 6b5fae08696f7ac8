"""Ctrl-C asks for a save, and once more leaves at once. Background jobs ignore it."""

import signal
import subprocess
import sys

from tests.ranks import environment

PROGRAM = """
import time
from recipe.ranks import preemption
with preemption.noticed() as notice:
    print("ready", flush=True)
    while not notice.received:
        time.sleep(0.01)
    print("noticed", flush=True)
    time.sleep(300)
"""


def test_a_second_ctrl_c_leaves_at_once():
    words = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as program:
        try:
            assert program.stdout.readline() == "ready\n"
            program.send_signal(signal.SIGINT)
            assert program.stdout.readline() == "noticed\n"
            program.send_signal(signal.SIGINT)
            assert program.wait(60) == -signal.SIGINT
            assert "once more leaves at once" in program.stderr.read()
        finally:
            program.kill()


IGNORED = """
import os, signal
from recipe.ranks import preemption
with preemption.noticed() as notice:
    os.kill(os.getpid(), signal.SIGINT)
    print(notice.received)
    os.kill(os.getpid(), signal.SIGUSR1)
    print(notice.received)
"""


def test_a_background_job_does_not_hear_ctrl_c():
    """A shell has it ignore the signal, which is meant for the foreground."""
    words = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", IGNORED]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.split() == ["False", "True"]
