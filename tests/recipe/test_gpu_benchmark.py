"""`python -m recipe.benchmark --gpu`, rehearsed without a GPU."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

from recipe.benchmark import gpu, gpu_profile
from recipe.benchmark.gpu_profile import Interval, idle_share
from recipe.benchmark.gpu_rows import SIZES, Row, parts
from recipe.errors import UsageError
from tests.ranks import ROOT, environment


def benchmark(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "recipe.benchmark", "--gpu", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "PyTorch finds no GPU here"),
        (("1",), "or rehearse by --device=cpu"),
        (("3",), "3 is no part of --gpu; there are 1, 2"),
        (("--jsn=x",), "did you mean --json?"),
        (("--device=tpu",), "should be one of <cuda|cpu>"),
    ],
)
def test_a_users_mistake_is_one_sentence(arguments, message):
    done = benchmark(*arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path):
    done = benchmark("--device=cpu", f"--json={tmp_path}/no/gpu.json")
    assert done.returncode == 1
    assert "no/gpu.json can't be written: No such file or directory; give" in done.stderr
    assert not done.stdout


@pytest.mark.ranks
def test_each_row_is_measured_or_named(tmp_path, monkeypatch, capsys):
    """The clock shows the part's end after the fourth row."""
    peer, ours = Row("peer", "plain-loop", 4), Row("ours", "torch", 4, peer="peer")
    rows = [
        peer,
        ours,
        Row("failing", "no-contender", 4),
        Row("refused", "torch", 4, workers=2, data_format="sideways"),
        Row("late", "torch", 4),
    ]
    times = iter([0.0, 1.0, 2.0, 3.0, 4.0, gpu.PART_SECONDS - 1.0])
    results = gpu.Results(tmp_path / "gpu.json", "cpu")
    gpu.measure_part("1", rows, results, lambda: next(times))

    printed = capsys.readouterr().out.splitlines()
    assert f"to its peer {results.ratio(ours):.3f} " in printed[1]
    assert printed[2].split(maxsplit=1) == ["failing", "failed: KeyError: 'no-contender'"]
    assert printed[3].startswith("refused") and "did you mean 'channels_last'?" in printed[3]
    assert printed[4].split() == ["late", "not", "reached"]

    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["rehearsal"]
    by_name = {row["name"]: row for row in written["rows"]}
    assert list(by_name) == [row.name for row in rows]
    for name in ("peer", "ours"):
        assert len(by_name[name]["speeds"]) == SIZES["cpu"].steps
        assert 0 <= by_name[name]["idle"] < 1
        assert by_name[name]["machine"]["torch"] == torch.__version__


def test_a_row_that_hangs_is_ended_and_named():
    result = gpu.measure(Row("slow", "torch", 4), "cpu", patience=0.1)
    assert result == {"problem": "not finished after 0 s"}


@pytest.mark.parametrize("device", SIZES)
def test_every_row_is_a_recipe_with_a_peer_before_it(device):
    sizes, refused = SIZES[device], []
    for rows in parts(sizes).values():
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
        for position, row in enumerate(rows):
            assert not row.peer or row.peer in names[:position]
            try:
                row.recipe(sizes)
            except UsageError:
                refused.append(row)
    # Keras can't be compiled yet.
    assert all(row.compile and row.contender == "keras" for row in refused)


def test_the_idle_share_is_what_no_interval_covers():
    assert idle_share([]) == 1
    assert idle_share([Interval(5, 6)]) == 0
    overlapping = [Interval(0, 4), Interval(1, 2), Interval(3, 5), Interval(8, 10)]
    assert idle_share(overlapping) == pytest.approx(0.3)


def test_waits_are_named_by_their_line(monkeypatch):
    """PyTorch warns of them, and of other things."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def launch() -> None:
        for _ in range(2):
            warnings.warn(gpu_profile.WAIT, stacklevel=1)
        warnings.warn("another matter", stacklevel=1)

    line = launch.__code__.co_firstlineno + 2
    assert gpu_profile.waits(launch) == [f"{__file__}:{line}"]
    assert modes == ["warn", "default"]
