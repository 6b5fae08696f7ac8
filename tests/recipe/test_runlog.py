"""Figures of a run survive the run being killed in the middle of a line."""

import json

import pytest

from recipe import runlog
from recipe.errors import RunError, UsageError


@pytest.fixture
def torn(tmp_path):
    lines = [("start", 0, 0), ("step", 2, 1.0), ("epoch", 2, 1), ("step", 4, 2.0), ("epoch", 4, 2)]
    text = "".join(json.dumps({"kind": kind, "step": step, "epoch": epoch}) + "\n" for kind, step, epoch in lines)
    (tmp_path / runlog.METRICS).write_text(text + '{"kind": "epo')
    return tmp_path


def test_half_a_line_is_not_read(torn):
    assert [line["step"] for line in runlog.read_epochs(torn)] == [2, 4]


@pytest.mark.parametrize("step, epochs, kept", [(2, 1, 3), (4, 1, 4), (4, 2, 5), (3, 1, 3), (0, 0, 0)])
def test_a_resumed_log_drops_half_a_line_and_what_comes_later(torn, step, epochs, kept):
    """Step 4 may be done and its epoch not yet evaluated; a run that begins anew begins an empty log."""
    runlog.RunLog(torn, step, epochs).close()
    assert len((torn / runlog.METRICS).read_text().splitlines()) == kept


def test_a_damaged_log_is_named(torn):
    with (torn / runlog.METRICS).open("a") as file:
        file.write("\n")
    with pytest.raises(UsageError, match=r"metrics\.jsonl can't be read"):
        runlog.read_epochs(torn)
    with pytest.raises(RunError, match=r"metrics\.jsonl has a damaged line"):
        runlog.RunLog(torn, step=2)
