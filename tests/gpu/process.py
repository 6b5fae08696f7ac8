"""Runs functions of tests in processes of their own, with the GPU or without: one rank of Horovod."""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ranks import ROOT, environment

PROGRAM = ("-m", "tests.gpu.process")


def run(
    device: str, program: tuple[str, ...] | list[str], **variables: str
) -> subprocess.CompletedProcess:
    """Run Python with a program that sees the GPU, or none where the device is "cpu"."""
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [sys.executable, *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        cwd=ROOT,
        env=environment(KERAS_BACKEND="torch", **variables),
        check=False,
    )


def call(device: str, function: Callable, *arguments: Any, **variables: str) -> Any:
    """Return what a function of a module of tests/gpu returns in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "call"
        path.write_bytes(pickle.dumps((function.__module__, function.__name__, arguments)))
        done = run(device, (*PROGRAM, str(path)), **variables)
        assert done.returncode == 0, done.stdout[-6000:]
        return pickle.loads(path.read_bytes())


def main(path: Path) -> None:
    """Call the function that is in the file, and put its result there."""
    module, name, arguments = pickle.loads(path.read_bytes())
    result = getattr(importlib.import_module(module), name)(*arguments)
    assert "tensorflow" not in sys.modules
    path.write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # Horovod's end is no part of the tests


if __name__ == "__main__":
    main(Path(sys.argv[1]))
