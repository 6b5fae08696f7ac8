"""TensorBoard reads what is written, and a disk without room costs its figures only."""

import contextlib
import os
import subprocess
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipe.run.events import Events


def read(folder) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_them(tmp_path):
    threads = threading.active_count()
    with contextlib.closing(Events(tmp_path)) as events:
        for step in (1, 2, 3):
            events.scalars({"step/loss": step / 2, "step/rate": 0.5}, step)
        assert threading.active_count() == threads  # one that dies would not be noticed
    assert read(tmp_path) == {
        "step/loss": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "step/rate": [(s, 0.5) for s in (1, 2, 3)],
    }


def test_tensorboard_forgets_what_a_restart_in_the_same_second_does_again(tmp_path):
    with contextlib.closing(Events(tmp_path)) as first:
        for step in (1, 2, 3):
            first.scalars({"step/loss": step / 2}, step)
    with contextlib.closing(Events(tmp_path, step=2)) as second:
        second.scalars({"step/loss": 7.0}, 2)
    assert read(tmp_path) == {"step/loss": [(1, 0.5), (2, 7.0)]}


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small file system, which needs root")
def test_a_full_disk_is_one_warning_and_the_file_stays_whole(tmp_path, capsys):
    folder = tmp_path / "events"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)], check=True)
    try:
        events = Events(folder)
        for step in range(300):
            events.scalars({"step/loss": 1.0}, step)
        events.close()
        (warning,) = capsys.readouterr().err.splitlines()
        assert (
            warning.startswith(f"warning: {folder}/events.out.tfevents.")
            and "training goes on" in warning
        )
        steps = [step for step, _ in read(folder)["step/loss"]]
        assert steps == list(range(len(steps))) and 20 < len(steps) < 300
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    events = Events(tmp_path / "file" / "tensorboard", step=3)
    with contextlib.closing(events):
        events.scalars({"step/loss": 1.0}, 4)
    assert capsys.readouterr().err.count("\n") == 1
