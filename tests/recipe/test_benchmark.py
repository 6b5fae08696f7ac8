"""`python -m recipe.benchmark` with real ranks: it runs, says what it found, and leaves nothing behind."""

import subprocess
import sys

import psutil
import pytest

from recipe.benchmark.__main__ import verdict
from tests.ranks import ROOT, environment


def benchmark(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [*prefix, sys.executable, "-m", "recipe.benchmark", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)


@pytest.mark.ranks
def test_the_benchmark_runs_and_prints_speeds_and_ratios():
    done = benchmark("1", "torch-here")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("images/s per rank" in line for line in lines) == 3  # on 1, on 2, and two side by side
    for ratio in ("weak scaling", "kept by the machine", "kept in lockstep", "kept by communication"):
        assert any(ratio in line for line in lines), ratio
    ranks = [p for p in psutil.process_iter(["cmdline"]) if "recipe.benchmark.contender" in (p.info["cmdline"] or [])]
    assert [p for p in ranks if str(ROOT) == p.cwd()] == []


@pytest.mark.parametrize(
    ("arguments", "prefix", "message"),
    [
        (("many",), (), "many is no number of turns"),
        (("1", "jax"), (), "jax is no contender"),
        (("1",), ("taskset", "-c", "0"), "need 2"),
    ],
)
def test_a_user_s_mistake_is_one_sentence(arguments, prefix, message):
    done = benchmark(*arguments, prefix=prefix)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_verdict_is_by_the_median_then_by_the_spread():
    assert "reached" in verdict([0.9, 1.0, 1.1], 1)
    assert "within the spread" in verdict([0.9, 0.99, 1.1], 1)
    assert "missed" in verdict([0.9, 0.91, 0.99], 1)
