"""The run directory: what ran, where, with which versions, and its figures as JSON lines and TensorBoard events."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipe.config import Recipe, flatten
from recipe.errors import RunError, UsageError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
PACKAGES = (
    "horovod",
    "keras",
    "tensorflow",
    "tensorflow-cpu",
    "torch",
    "numpy",
    "tensorflow-datasets",
    "mpi4py",
)


def open_run(folder: Path, recipe: Recipe, hosts: list[str], resume: bool) -> None:
    """Makes a new run directory, or checks that an old one belongs to this recipe. One rank only.

    Raises UsageError when the directory holds a run already and `resume` is false, or holds another recipe's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run_dir={folder} can't be made: {error.strerror}; name a new directory")
    if (folder / CONFIG).exists():
        if not resume:
            raise UsageError(f"--run_dir={folder} holds a run already; add --resume or choose another directory")
        _refuse_other_recipe(folder, recipe)
    elif resume:
        raise UsageError(f"--run_dir={folder} holds no run to resume; leave --resume out to start one")
    try:
        _write_json(folder / CONFIG, asdict(recipe))
        _write_json(folder / "environment.json", environment(hosts))
    except OSError as error:
        raise UsageError(f"--run_dir={folder} can't be written: {error.strerror}; free space or rights")


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run directory. Raises UsageError when it is not one."""
    try:
        return Recipe.from_dict(json.loads((folder / CONFIG).read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a run directory: {CONFIG} can't be read ({error})")


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """The epoch lines of a run's metrics.jsonl, in order. Raises UsageError when there are none."""
    try:
        lines = [json.loads(line) for line in _whole_lines(folder / METRICS)]
        epochs = [line for line in lines if line["kind"] == "epoch"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / METRICS} can't be read ({error}); mend it, or name another run directory")
    if not epochs:
        raise UsageError(f"{folder / METRICS} has no finished epoch yet")
    return epochs


def environment(hosts: list[str]) -> dict[str, Any]:
    """What a figure needs to be believed: hosts, versions, source revision, command line."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "hosts": hosts,  # one entry a rank
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "git": _git_revision(),
    }


class RunLog:
    """Appends figures to metrics.jsonl and to TensorBoard's event files. One rank only."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        """`step`: where the run continues; lines of later steps, from before a crash, are dropped."""
        from tensorboardX import SummaryWriter

        self._path = folder / METRICS
        self._keep_until(step)
        self._file = self._path.open("a", buffering=1)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def write(self, kind: str, step: int, values: dict[str, float | int]) -> None:
        """One line: kind ("step" or "epoch"), the number of finished steps, and the figures."""
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}; free space or rights, then --resume")
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def _keep_until(self, step: int) -> None:
        if self._path.exists():
            try:
                kept = [line for line in _whole_lines(self._path) if json.loads(line)["step"] <= step]
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{self._path} has a damaged line ({error}); delete that line, then --resume")
            self._path.write_text("".join(kept))


def _whole_lines(path: Path) -> list[str]:
    """A killed run may have left half a line at the end."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _refuse_other_recipe(folder: Path, recipe: Recipe) -> None:
    old, new = flatten(read_recipe(folder)), flatten(recipe)
    changed = [name for name in new if new[name] != old[name] and not name.startswith("run.")]
    if changed:
        differences = ", ".join(f"config.{name}={new[name]} (was {old[name]})" for name in changed)
        raise UsageError(
            f"--run_dir={folder} was started with another recipe: {differences}; resume with the old values"
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str:
    """Commit of the recipe's source, with "+changes" when the tree differs from it; "" outside a checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+changes",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
