"""float32 on GPUs: TF32 unless the run is deterministic. What the frameworks are told, no GPU."""

import subprocess
import sys

import pytest

from tests.ranks import ROOT, environment

TOLD = {
    "torch": "import torch; told = torch.backends.cudnn.allow_tf32",
    "tensorflow": "import tensorflow as tf; "
    "told = tf.config.experimental.tensor_float_32_execution_enabled()",
}


@pytest.mark.parametrize("backend", TOLD)
def test_a_deterministic_run_does_without_tf32(backend):
    program = f"""
from recipe.frameworks.keras import compute
for deterministic in (False, True):
    compute.use_local_device(0, 1, deterministic)
    {TOLD[backend]}
    assert told is not deterministic, (deterministic, told)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(KERAS_BACKEND=backend),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
