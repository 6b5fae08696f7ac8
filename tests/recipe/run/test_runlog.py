"""Figures of a run survive the run being killed in the middle of a line."""

import json
import os
from dataclasses import asdict, replace

import pytest

from recipe.configs.quick import RECIPE
from recipe.errors import RunError, UsageError
from recipe.run import runlog
from recipe.run.resume import Mode, check_directory, check_progress


@pytest.fixture
def torn(tmp_path):
    lines = [("start", 0, 0), ("step", 2, 1.0), ("epoch", 2, 1), ("step", 4, 2.0), ("epoch", 4, 2)]
    text = "".join(
        json.dumps({"kind": kind, "step": step, "epoch": epoch}) + "\n"
        for kind, step, epoch in lines
    )
    (tmp_path / runlog.METRICS).write_text(text + '{"kind": "epo')
    return tmp_path


def test_half_a_line_is_not_read(torn):
    assert [line["step"] for line in runlog.read_epochs(torn)] == [2, 4]


@pytest.mark.parametrize(
    "step, epochs, kept", [(2, 1, 3), (4, 1, 4), (4, 2, 5), (3, 1, 3), (0, 0, 0)]
)
def test_a_resumed_log_drops_half_a_line_and_what_comes_later(torn, step, epochs, kept):
    """Step 4 may be done and its epoch not yet evaluated; a run that begins anew begins an empty
    log.
    """
    runlog.RunLog(torn, step, epochs).close()
    assert len((torn / runlog.METRICS).read_text().splitlines()) == kept


def test_a_damaged_log_is_named(torn):
    with (torn / runlog.METRICS).open("a") as file:
        file.write("\n")
    with pytest.raises(UsageError, match=r"metrics\.jsonl can't be read"):
        runlog.read_epochs(torn)
    with pytest.raises(RunError, match=r"metrics\.jsonl has a damaged line"):
        runlog.RunLog(torn, step=2)


def test_every_line_is_json(tmp_path):
    """RFC 8259 has no NaN and no infinity; Python's own reader does."""
    log = runlog.RunLog(tmp_path)
    log.write(
        "step",
        2,
        {"loss": float("nan"), "rate": float("inf"), "error": 0.5, "images_per_second": None},
    )
    log.close()

    def refuse(word):
        raise ValueError(word)

    (line,) = (tmp_path / runlog.METRICS).read_text().splitlines()
    unknown = {"loss": None, "rate": None, "images_per_second": None}
    assert json.loads(line, parse_constant=refuse) == {
        "kind": "step",
        "step": 2,
        "error": 0.5,
        **unknown,
    }


def odd(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "file":
        folder.write_text("")
    elif kind == "below a file":
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "run"
    elif kind == "dead link":
        folder.symlink_to(tmp_path / "gone")
    elif kind == "long name":
        folder = tmp_path / ("x" * 300)
    elif kind == "loop":
        folder.symlink_to(folder)
    elif kind == "pipe":
        os.mkfifo(folder)
    elif kind == "checkpoints are a dead link":
        folder.mkdir()
        (folder / "checkpoints").symlink_to(tmp_path / "gone")
    elif kind == "config is gone":
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "step-00000004.npz").write_bytes(b"state")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "is a file and no folder"),
        ("below a file", "Not a directory; name another directory"),
        ("dead link", "is a link that leads to no folder"),
        ("long name", "File name too long"),
        ("loop", "is a link that leads to no folder"),
        ("pipe", "is a file and no folder"),
        ("checkpoints are a dead link", "checkpoints is a link that leads to no folder"),
        ("config is gone", "holds checkpoints of a run, and its config.json is missing"),
    ],
)
@pytest.mark.parametrize("resume", ["no", "force"])
def test_an_odd_run_directory_is_one_sentence(tmp_path, kind, message, resume):
    folder = odd(tmp_path, kind)
    if kind == "below a file" and resume == "force":
        message = "holds no run to resume"
    with pytest.raises(UsageError) as refused:
        check_directory(folder, RECIPE, Mode(resume))
        with runlog.owned(folder):
            pass
    assert message in str(refused.value) and str(folder) in str(refused.value)
    assert "free space" not in str(refused.value)


def test_a_directory_with_others_files_is_no_run(tmp_path):
    """Nor one that is prepared: its checkpoints shall be on another disk."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    check_directory(tmp_path, RECIPE, Mode.NO)
    with runlog.owned(tmp_path):
        runlog.begin_run(tmp_path, RECIPE, [runlog.RankHost("host", "a processor")])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert runlog.read_processors(tmp_path) == ["a processor"]


def lost(folder, *lines, **run):
    """A run directory with these (kind, step, epoch) of figures and no checkpoints."""
    runlog.write_recipe(folder, replace(RECIPE, run=replace(RECIPE.run, **run)))
    text = "".join(
        json.dumps({"kind": kind, "step": step, "epoch": epoch}) + "\n"
        for kind, step, epoch in lines
    )
    (folder / runlog.METRICS).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("lines", "run"),
    [
        ([("start", 0, 0), ("epoch", 4, 1)], {}),
        ([("epoch", 4, 1), ("epoch", 8, 2), ("epoch", 12, 3)], {"checkpoint_every": 3}),
        ([("step", 2, 0.5), ("step", 3, 0.75)], {"checkpoint_steps": 2}),
        ([("epoch", 4 * e, e) for e in range(1, RECIPE.epochs + 1)], {"checkpoint_every": 1000}),
    ],
)
def test_checkpoints_that_were_there_are_missed(tmp_path, lines, run):
    with pytest.raises(
        UsageError, match=r"checkpoints/ holds no checkpoint to go on from: bring .* --resume=force"
    ):
        check_progress(lost(tmp_path, *lines, **run))


@pytest.mark.parametrize(
    ("lines", "run"),
    [
        ([], {}),
        ([("start", 0, 0), ("step", 3, 0.75)], {}),
        ([("step", 2, 0.5)], {"checkpoint_steps": 2}),  # it was about to be written
        (
            [("step", 9, 2.25)],
            {"checkpoint_steps": 4, "checkpoint_every": 3},
        ),  # those would be ends of epochs
        ([("epoch", 4, 1), ("epoch", 8, 2)], {"checkpoint_every": 3}),
    ],
)
def test_checkpoints_that_never_were_are_not(tmp_path, lines, run):
    check_progress(lost(tmp_path, *lines, **run))


def test_a_first_save_that_was_cut_off_is_no_loss(tmp_path):
    folder = lost(tmp_path, ("epoch", 4, 1))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / ".step-00000004.npz.partial").write_bytes(b"half")
    check_progress(folder)


def test_figures_of_an_old_run_are_kept_when_it_begins_anew(torn, capsys):
    before = (torn / runlog.METRICS).read_text()
    runlog.RunLog(torn).close()
    (aside,) = torn.glob("aside-*-metrics.jsonl")
    assert aside.read_text() == before
    assert str(aside) in capsys.readouterr().err


def test_a_run_directory_copied_is_not_the_owners(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    with runlog.owned(old):
        runlog.begin_run(old, RECIPE, [])
        (old / "config.partial").write_text("")
        runlog.copy_run(old, new)
    assert {path.name for path in new.iterdir()} == {"config.json", "environment.json"}
    assert json.loads((new / "config.json").read_text())["k"] == asdict(RECIPE)["k"]
