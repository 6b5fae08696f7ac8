"""A line that can't be printed is lost, but the work goes on and the exit status stays right."""

import logging
import os
import subprocess
import sys

import pytest

from recipe.system import output
from tests.ranks import environment

PROGRAM = """
import os, sys
from pathlib import Path
from recipe import cli
from recipe.errors import RunError
def main(argv):
    path = Path(argv[0])
    for _ in range(3000):
        print("η ± a line \\udcff")
        print("η ± a line \\udcff", file=sys.stderr)
    with path.open("w") as file:
        assert file.fileno() > 2, "native code prints to 1 and 2"
        file.write("done")
    if argv[1] == "fail":
        raise RunError("made to fail")
cli.run(main)
"""


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("output", ["closed", "full", "reader gone", "ascii"])
def test_a_program_goes_on_and_ends_with_its_status(tmp_path, output, status):
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "result"), "fail" if status else "work"]
    if output == "closed":
        words = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]
    with open(os.devnull if output in ("closed", "ascii") else "/dev/full", "w") as sink:  # noqa: PTH123
        stream = sink
        if output == "reader gone":
            reader, stream = os.pipe()
            os.close(reader)
        extra = {"PYTHONIOENCODING": "ascii"} if output == "ascii" else {}
        done = subprocess.run(
            words, stdout=stream, stderr=stream, timeout=100, env=environment(**extra), check=False
        )
        if output == "reader gone":
            os.close(stream)
    assert (done.returncode, (tmp_path / "result").read_text()) == (status, "done")


def test_help_to_a_full_disk_ends_well():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        words = [sys.executable, "-m", "recipe.report", "--help"]
        done = subprocess.run(
            words, stdout=full, stderr=subprocess.PIPE, timeout=100, env=environment(), check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_file_that_is_out_of_reach_is_one_sentence():
    """It doesn't matter what looked at the file."""
    stderr = stderr_of_failing("Path('x' * 300).exists()")
    assert ": File name too long" in stderr
    assert "Traceback" not in stderr


def test_an_error_that_is_no_files_keeps_its_traceback():
    stderr = stderr_of_failing("1 / 0")
    assert "ZeroDivisionError" in stderr
    assert "Traceback" in stderr


class Seen(logging.Handler):
    """A user's handler: keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name} {record.levelname} {record.getMessage()}")


def test_a_warning_is_one_line_on_stderr_beside_any_root_handler(capsys, monkeypatch):
    root = Seen()
    monkeypatch.setattr(logging.getLogger(), "handlers", [root])
    output.warn("the disk is 100 % full: %s")
    assert capsys.readouterr().err == "warning: the disk is 100 % full: %s\n"
    assert root.lines == []


def test_a_user_of_the_library_redirects_warnings_by_a_handler(capsys, monkeypatch):
    user = Seen()
    monkeypatch.setattr(logging.getLogger("recipe"), "handlers", [user])
    output.warn("the disk is slow")
    assert user.lines == ["recipe WARNING the disk is slow"]
    assert capsys.readouterr().err == ""


def test_a_user_of_the_library_silences_warnings_by_the_level(capsys):
    logger = logging.getLogger("recipe")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        output.warn("the disk is slow")
    finally:
        logger.setLevel(level)
    assert capsys.readouterr().err == ""


def stderr_of_failing(expression: str) -> str:
    """Return what a program prints that fails in this expression."""
    program = f"from pathlib import Path\nfrom recipe import cli\ncli.run(lambda _: {expression})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(),
        check=False,
    )
    assert done.returncode == 1
    return done.stderr
