"""Reads what a run leaves: its figures, its checkpoints, what it printed, how it ended."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from recipe.run import checkpoint, runlog
from recipe.system import checkpoint_file
from recipe.system.arrays import Arrays, digest

Line = dict[str, Any]  # of metrics.jsonl

# What may differ between two runs of the same bits: how fast they were.
SPEEDS = ("images_per_second", "data_wait")


# Figures


def lines(run: Path, kind: str) -> list[Line]:
    """Return the lines of one kind of a run that has ended: "start", "step" or "epoch"."""
    every_line = (run / runlog.METRICS).read_text().splitlines()
    return [line for line in map(json.loads, every_line) if line["kind"] == kind]


def series(run: Path, kind: str, name: str) -> list[Any]:
    """Return one figure of all lines of a kind, of which there must be some.

    `series(run, "step", "loss")` are the losses.
    """
    found = lines(run, kind)
    assert found, f"{run} has no line of the kind {kind!r}"
    return [line[name] for line in found]


def figures(run: Path) -> list[Line]:
    """Return all lines but for the speeds, of a run that may still be under way or not begun."""
    path = run / runlog.METRICS
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole_lines = [json.loads(text) for text in texts if text.endswith("\n")]
    return [{n: v for n, v in line.items() if n not in SPEEDS} for line in whole_lines]


def has_line(run: Path, kind: str, step: int | None = None) -> bool:
    """Return whether a run under way has written a line of a kind, or that of a step."""
    written = [line["step"] for line in figures(run) if line["kind"] == kind]
    return step in written if step is not None else bool(written)


# Checkpoints


def saved(run: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first."""
    return checkpoint.checkpoints(run / runlog.CHECKPOINTS)


def saved_steps(run: Path) -> list[int]:
    """Return after how many steps there is a checkpoint."""
    return [checkpoint.step_of(path) for path in saved(run)]


def state(run: Path, back: int = 1) -> Arrays:
    """Return the state in the newest checkpoint, or in the one so many places from the end."""
    return checkpoint_file.load(saved(run)[-back]).arrays


def check_same_state(one: Path, other: Path) -> None:
    """Check that two runs end with the same bits."""
    assert digest(state(one)) == digest(state(other))


def check_same_run(run: Path, reference: Path) -> None:
    """Check that a run has another's bits: the figures, and the state at each of its checkpoints.

    Nothing may be left of what was killed.
    """
    assert figures(run) == figures(reference)
    assert saved(run)[-1].name == saved(reference)[-1].name
    for path in saved(run):
        arrays, meta = checkpoint_file.load(path)
        expected, expected_meta = checkpoint_file.load(reference / runlog.CHECKPOINTS / path.name)
        assert digest(arrays) == digest(expected), path.name
        assert meta == expected_meta
    assert not list(run.rglob("*.partial"))


# What is printed, and the end


def succeeded(done: subprocess.CompletedProcess) -> str:
    """Check that a program has ended well, and return what it printed."""
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def the_line(text: str, part: str) -> str:
    """Return the one line with this part in it."""
    (line,) = [line for line in text.splitlines() if part in line]
    return line


def the_error(text: str) -> str:
    """Return the one sentence that says why a program has failed."""
    (sentence,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return sentence


def refused(done: subprocess.CompletedProcess, status: int, *parts: str) -> None:
    """Check that a program has ended with this status and one sentence, without a traceback."""
    assert done.returncode == status, done.stdout
    sentence = the_error(done.stdout)
    for part in parts:
        assert part in sentence
    assert "Traceback" not in done.stdout


def check_printed_evaluation(run: Path, printed: str) -> None:
    """Check that recipe.evaluate has printed what the run found after its last epoch."""
    last = lines(run, "epoch")[-1]
    assert f"top-1 error {last['eval_error']:.2%}" in printed
    assert f"examples {last['eval_examples']}" in printed
    loss = float(printed.split("loss ")[1].split()[0])
    assert loss == pytest.approx(last["eval_loss"], abs=2e-4)  # four decimals, other batch shapes
