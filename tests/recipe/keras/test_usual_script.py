"""The usual script, unchanged but for the import, on 1, 2 and 4 ranks."""

import re

import keras
import numpy as np
import pytest

from tests.ranks import ROOT, launch

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_usual_script_runs_and_learns(tmp_path, backend, size):
    script = str(ROOT / "tests/recipe/keras/usual_script.py")
    done = launch(size, [script, str(tmp_path)], KERAS_BACKEND=backend)
    assert done.returncode == 0, done.stdout[-4000:]
    lines = re.findall(r"rank (\d) of (\d): accuracy ([\d.]+) ([\d.]+)", done.stdout)
    assert sorted(lines)[0][:2] == ("0", str(size)) and len(lines) == size
    assert len({accuracy for _, _, accuracy, _ in lines}) == 1  # the metric of all ranks
    # Each rank evaluates its own examples, of ten classes.
    assert all(float(evaluated) > 0.5 for *_, evaluated in lines)
    weights = [list(np.load(tmp_path / f"rank{rank}.npz").values()) for rank in range(size)]
    for other in weights[1:]:
        for a, b in zip(weights[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    checkpoints = sorted(tmp_path.glob("checkpoint-*.keras"))
    assert len(checkpoints) == 5
    assert type(keras.models.load_model(checkpoints[-1]).optimizer).__module__.startswith("keras.")
    assert "warmed up to" in done.stdout


def test_a_wrapped_optimizer_on_one_rank_does_not_wait_for_slow_cycles():
    """Horovod's own is a millisecond; the ten of the recipe's only rank would cost each step."""
    program = (
        "import os, recipe.keras as hvd; hvd.init(); assert 'HOROVOD_CYCLE_TIME' not in os.environ"
    )
    done = launch(1, ["-c", program])
    assert done.returncode == 0, done.stdout[-2000:]
