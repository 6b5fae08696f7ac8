"""Figures of a run survive the run being killed in the middle of a line."""

import json

import pytest

from recipe import runlog
from recipe.errors import RunError, UsageError


@pytest.fixture
def torn(tmp_path):
    lines = [json.dumps({"kind": kind, "step": step, "error": 0.5}) for kind, step in (("epoch", 2), ("epoch", 4))]
    (tmp_path / runlog.METRICS).write_text("\n".join(lines) + '\n{"kind": "epo')
    return tmp_path


def test_half_a_line_is_not_read(torn):
    assert [line["step"] for line in runlog.read_epochs(torn)] == [2, 4]


def test_a_resumed_log_drops_half_a_line_and_what_comes_later(torn):
    log = runlog.RunLog(torn, step=2)
    log.write("epoch", 3, {"error": 0.25})
    log.close()
    assert [line["step"] for line in runlog.read_epochs(torn)] == [2, 3]


def test_a_damaged_log_is_named(torn):
    with (torn / runlog.METRICS).open("a") as file:
        file.write("\n")
    with pytest.raises(UsageError, match=r"metrics\.jsonl can't be read"):
        runlog.read_epochs(torn)
    with pytest.raises(RunError, match=r"metrics\.jsonl has a damaged line"):
        runlog.RunLog(torn, step=2)
