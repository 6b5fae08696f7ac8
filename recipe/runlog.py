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

from recipe.config import Recipe, differences, identity
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


def check_run(folder: Path, recipe: Recipe, resume: str) -> None:
    """Makes sure that a run may be written into the directory. One rank only.

    `resume`: "no", "yes" or "force". Raises UsageError when the directory holds a run already and `resume` is "no",
    another recipe's and it isn't "force", or none to resume."""
    if (folder / CONFIG).exists():
        if resume == "no":
            raise UsageError(f"--run_dir={folder} holds a run already; add --resume or choose another directory")
        if resume != "force":
            refuse_another(identity(read_recipe(folder)), recipe, folder)
    elif resume != "no":
        raise UsageError(f"--run_dir={folder} holds no run to resume; leave --resume out to start one")


def begin_run(folder: Path, recipe: Recipe, hosts: list[str]) -> None:
    """Writes what runs, and where. One rank only. Raises UsageError when the directory can't be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(folder, recipe)
        _write_json(folder / "environment.json", environment(hosts))
    except OSError as error:
        raise UsageError(f"--run_dir={folder} can't be written: {error.strerror}; free space or rights")


def refuse_another(old: dict[str, Any], recipe: Recipe, folder: Path) -> None:
    """Raises UsageError, naming the fields, when `recipe` is not the one whose `identity` is given."""
    if changed := differences(old, identity(recipe)):
        raise UsageError(
            f"--run_dir={folder} was started with another recipe: {changed}; resume with the old values, or with "
            "--resume=force"
        )


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run directory. Raises UsageError when it is not one."""
    try:
        return Recipe.from_dict(json.loads((folder / CONFIG).read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a run directory: {CONFIG} can't be read ({error})")


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """The inverse of `read_recipe`."""
    _write_json(folder / CONFIG, asdict(recipe))


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """The epoch lines of a run's metrics.jsonl, in order. Raises UsageError when there are none."""
    if not (epochs := read_lines(folder, "epoch")):
        raise UsageError(f"{folder / METRICS} has no finished epoch yet")
    return epochs


def read_lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics.jsonl, in order. Raises UsageError when the file can't be read."""
    try:
        lines = [json.loads(line) for line in _whole_lines(folder / METRICS)]
        return [line for line in lines if line["kind"] == kind]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / METRICS} can't be read ({error}); mend it, or name another run directory")


def environment(hosts: list[str]) -> dict[str, Any]:
    """What a figure needs to be believed: hosts, versions, source revision, command line."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "hosts": hosts,  # one entry a rank
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "git": _git_revision(),
    }


def versions() -> dict[str, str]:
    """The versions of the packages that a run's figures may depend on."""
    return {name: version for name in PACKAGES if (version := _version(name))}


class RunLog:
    """Appends figures to metrics.jsonl and to TensorBoard's event files. One rank only."""

    def __init__(self, folder: Path, step: int = 0, epochs: int = 0) -> None:
        """`step`, `epochs`: where the run continues; lines beyond, from before a crash, are dropped."""
        from tensorboardX import SummaryWriter

        self._path = folder / METRICS
        self._keep_until(step, epochs)
        self._file = self._path.open("a", buffering=1)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def write(self, kind: str, step: int, values: dict[str, float | int | str]) -> None:
        """One line: kind ("start", "step" or "epoch"), the number of finished steps, and the figures."""
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}; free space or rights, then --resume")
        for name, value in values.items():
            if not isinstance(value, str):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def _keep_until(self, step: int, epochs: int) -> None:
        if not self._path.exists():
            return
        try:
            lines = [(json.loads(line), line) for line in _whole_lines(self._path)]
            kept = [line for values, line in lines if step and _is_before(values, step, epochs)]
            _replace(self._path, "".join(kept))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self._path} has a damaged line ({error}); delete that line, then --resume")
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}; free space or rights, then --resume")


def _is_before(line: dict[str, Any], step: int, epochs: int) -> bool:
    """A checkpoint at an epoch's last step may have been saved before the epoch's evaluation."""
    return line["epoch"] <= epochs if line["kind"] == "epoch" else line["step"] <= step


def _whole_lines(path: Path) -> list[str]:
    """A killed run may have left half a line at the end."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _replace(path, json.dumps(value, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """Writes a file that is whole at any time; raises OSError when it can't, and leaves nothing behind."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


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
