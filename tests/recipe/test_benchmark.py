"""`python -m recipe.benchmark` with real ranks: it runs and says what it found."""

import os
import signal
import subprocess
import sys

import pytest

from recipe.benchmark import __main__
from recipe.benchmark.__main__ import calmness, speed, verdict
from recipe.errors import RunError
from tests.ranks import ROOT, environment


def benchmark(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run it without the tests' settings for mpirun: it must work as it stands, also as root."""
    command = [*prefix, sys.executable, "-m", "recipe.benchmark", *arguments]
    bare = {name: value for name, value in environment().items() if not name.startswith("OMPI_")}
    return subprocess.run(
        command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.ranks
def test_the_benchmark_runs_and_prints_speeds_and_ratios():
    done = benchmark("1", "torch-here", "torch-ddp")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    speeds = [line for line in lines if "images/s per rank" in line]
    assert len(speeds) == 5  # of both on 1 and on 2 ranks, and of two of ours side by side
    for ratio in (
        "torch-here to torch-ddp, 1 rank ",
        "torch-here to torch-ddp, 2 ranks",
        "torch-here, weak scaling",
    ):
        assert any(line.startswith(ratio) and "target" in line for line in lines), ratio
    assert any(line.startswith("torch-here, kept by working together") for line in lines)
    assert all(" MB" in line for line in speeds)
    assert lines[-1].startswith("a fixed computation between them took")


@pytest.mark.parametrize(
    ("arguments", "prefix", "message"),
    [
        (("many",), (), "many is no number of repeats"),
        (("1", "jax"), (), "jax is no contender"),
        (("1",), ("taskset", "-c", str(min(os.sched_getaffinity(0)))), "need 2"),
    ],
)
def test_a_users_mistake_is_one_sentence(arguments, prefix, message):
    done = benchmark(*arguments, prefix=prefix)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_contenders_in_pytorch_load_no_tensorflow(tmp_path):
    """It would be two seconds of their way to the first step."""
    program = """
import sys
from recipe.benchmark import contender
contender.CONTENDERS[sys.argv[1]] = lambda *_: None
contender.main(sys.argv[1], 1, sys.argv[2])
assert 'tensorflow' not in sys.modules
"""
    for name in ("torch-here", "torch-ddp", "keras-torch-here"):
        command = [sys.executable, "-c", program, name, str(tmp_path / "result")]
        subprocess.run(command, cwd=ROOT, env=environment(BENCHMARK_CORE="0"), check=True)


def test_a_contender_that_hangs_is_ended_and_named(monkeypatch):
    monkeypatch.setattr(__main__, "PATIENCE", 0.5)
    jobs = [subprocess.Popen(["sleep", "100"], stdout=subprocess.PIPE) for _ in range(2)]
    with pytest.raises(RunError, match=r"tf-mirrored .* has not ended"):
        __main__.outputs(__main__.Entry("tf-mirrored", 2), jobs)
    assert [job.wait(timeout=10) for job in jobs] == [-signal.SIGTERM] * 2


def test_a_busy_machine_is_told():
    assert calmness([1.0, 1.1, 1.2]).endswith("1.20 times its least time: the machine was at rest")
    assert calmness([1.0, 1.3]).endswith("too busy to believe these figures")


def test_the_verdict_is_by_the_median_then_by_the_spread():
    assert "reached" in verdict([0.9, 1.0, 1.1], 1)
    assert "within the spread" in verdict([0.9, 0.99, 1.1], 1)
    assert "missed" in verdict([0.9, 0.91, 0.99], 1)


def test_copies_are_measured_while_all_of_them_run():
    """Of two copies with 64 images a step one takes 1 s, the other 2, and begins 20 s later."""
    early, late = [float(t) for t in range(60)], [20.0 + 2 * t for t in range(60)]
    assert speed([early]) == pytest.approx(64)
    assert speed([early, late]) == pytest.approx((64 + 32) / 2)
    with pytest.raises(RunError, match="not run side by side"):
        speed([early, [100.0 + t for t in range(60)]])
