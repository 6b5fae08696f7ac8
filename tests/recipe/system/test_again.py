"""The line that continues a run can be pasted, and says what is saved."""

import shlex

import pytest

from recipe.system import again


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "_command", "")
    monkeypatch.setattr(again, "_saved_step", None)
    monkeypatch.delenv(again.STARTED_AS, raising=False)


def test_before_a_run_has_begun_there_is_nothing_to_say():
    again.begun("runs/a", ["--config=quick"])
    assert again.advice() == ""


@pytest.mark.parametrize(
    ("step", "beginning"), [(0, "nothing is saved yet"), (7, "saved after step 7; ")]
)
def test_the_command_can_be_pasted(step, beginning):
    arguments = [
        "--config=quick",
        "--config.schedule.decay_epochs=(8, 9)",
        "--run_dir=elsewhere",
        "--resume=force",
    ]
    again.begun("runs/größe 1; rm -r $HOME", arguments)
    again.saved(step)
    line = again.advice()
    assert line.startswith(beginning)
    assert "\n" not in line
    words = [
        "python",
        "-m",
        "recipe.train",
        *arguments[:2],
        "--run_dir=runs/größe 1; rm -r $HOME",
        "--resume",
    ]
    assert shlex.split(line.partition("launcher: ")[2]) == words


def test_a_script_around_it_is_named_instead(monkeypatch):
    monkeypatch.setenv(again.STARTED_AS, "./launch/local")
    again.begun("runs/a", ["--config=quick"])
    again.saved(3)
    assert again.advice().endswith(
        "to go on from there: ./launch/local --config=quick --run_dir=runs/a --resume"
    )
