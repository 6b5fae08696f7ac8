"""The run directory: what ran, where, with which versions, and its figures."""

import contextlib
import errno
import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from recipe.config import Recipe
from recipe.errors import RunError, UsageError
from recipe.system import owner
from recipe.system.files import whole_file
from recipe.system.output import warn

CONFIG = "config.json"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
CHECKPOINTS = "checkpoints"
EVENTS = "tensorboard"
LOCK = ".lock"

Figures = dict[str, Any]  # of one line: float, int, str or None

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


class RankHost(NamedTuple):
    """Where a rank runs."""

    host: str
    processor: str


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make the directory this process's as long as the context lasts.

    Other processes that would write there are refused. Raise UsageError, saying who has it or why
    it can't be had.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(owner.only(folder / LOCK, f"--run_dir={folder}"))
        except OSError as error:
            raise _unwritable(folder, error)
        yield


def begin_run(folder: Path, recipe: Recipe, ranks: list[RankHost]) -> None:
    """Write what runs, and where. One rank only.

    Raise UsageError when the directory can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(folder, recipe)
        _write_json(folder / ENVIRONMENT, environment(ranks))
    except OSError as error:
        raise _unwritable(folder, error)


def read_recipe(folder: Path) -> Recipe:
    """Return the recipe of a run directory. Raise UsageError when it is not one."""
    try:
        return Recipe.from_dict(json.loads((folder / CONFIG).read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a run directory: {CONFIG} can't be read ({error})")


def copy_run(old: Path, new: Path) -> None:
    """Copy a run directory, but for its checkpoints and the files of a process at work.

    Raise OSError or shutil.Error.
    """
    ignored = shutil.ignore_patterns(CHECKPOINTS, LOCK, "*.partial")
    shutil.copytree(old, new, ignore=ignored, dirs_exist_ok=True)


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe of a run directory."""
    _write_json(folder / CONFIG, asdict(recipe))


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """Return the epoch lines of a run, in order. Raise UsageError when there are none."""
    if not (epochs := read_lines(folder, "epoch")):
        raise UsageError(f"{folder / METRICS} has no finished epoch yet")
    return epochs


def read_lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind in a run's metrics.jsonl, in order.

    Raise UsageError when the file can't be read.
    """
    try:
        lines = [json.loads(line) for line in _whole_lines(folder / METRICS)]
        return [line for line in lines if line["kind"] == kind]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / METRICS} can't be read ({error}); mend it, or name another run directory"
        )


def environment(ranks: list[RankHost]) -> dict[str, Any]:
    """Return what a figure needs to be believed: hosts, processors, versions, command line."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "hosts": [rank.host for rank in ranks],  # one entry a rank
        "processors": sorted({rank.processor for rank in ranks}),  # each kind once
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "git": _git_revision(),
    }


def read_processors(folder: Path) -> list[str]:
    """Return the kinds of processors that a run was on; none where they aren't known."""
    try:
        return list(json.loads((folder / ENVIRONMENT).read_text())["processors"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def versions() -> dict[str, str]:
    """Return the versions of the packages that a run's figures may depend on."""
    installed = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


class RunLog:
    """Appends figures to metrics.jsonl and to TensorBoard's event files. One rank only."""

    def __init__(self, folder: Path, step: int = 0, epochs: int = 0) -> None:
        """Open the files of a run that continues after so many steps and epochs.

        Lines beyond, from before a crash, are dropped.
        """
        from recipe.run.events import Events

        self._path = folder / METRICS
        self._drop_lines_beyond(step, epochs)
        try:
            self._file = self._path.open("a", buffering=1)
        except OSError as error:
            raise self._unwritable(error)
        self._events = Events(folder / EVENTS, step)

    def write(self, kind: str, step: int, values: Figures) -> None:
        """Write one line: kind ("start", "step" or "epoch"), the finished steps, the figures.

        JSON has no NaN and no infinity: they become null.
        """
        line: Figures = {"kind": kind, "step": step}
        numbers = {}
        for name, value in values.items():
            is_writable = not isinstance(value, float) or math.isfinite(value)
            line[name] = value if is_writable else None
            if is_writable and isinstance(value, int | float):
                numbers[f"{kind}/{name}"] = value
        # The file counts. TensorBoard gets what is a number.
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise self._unwritable(error)
        self._events.scalars(numbers, step)

    def close(self) -> None:
        """Close the files. What a full disk has no room for is lost; a write has said so."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._events.close()

    def _drop_lines_beyond(self, step: int, epochs: int) -> None:
        """Keep the lines up to the run's new beginning. An old run's figures are set aside."""
        try:
            if not exists(self._path):
                if step:
                    warn(f"{self._path} is missing: it begins anew after step {step}")
                return

            # A run that begins anew leaves the figures of the old one to the user.
            texts = _whole_lines(self._path)
            lines = [json.loads(text) for text in texts]
            if not step and any(line["kind"] == "epoch" for line in lines):
                aside = self._path.with_name(f"aside-{time.strftime('%Y%m%d-%H%M%S')}-{METRICS}")
                self._path.rename(aside)
                warn(f"beginning at step 0: the old figures are in {aside}")
                return

            # A run that goes on keeps what was written before its checkpoint.
            remaining = [
                text
                for line, text in zip(lines, texts, strict=True)
                if step and _is_before(line, step, epochs)
            ]
            _replace(self._path, "".join(remaining))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self._path} has a damaged line ({error}); delete that line, then --resume"
            )
        except OSError as error:
            raise self._unwritable(error)

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write {self._path}: {error.strerror}; free space or rights, then --resume"
        )


def _is_before(line: dict[str, Any], step: int, epochs: int) -> bool:
    """Return whether a line was written before the checkpoint.

    One at an epoch's last step may have been saved before the epoch's evaluation.
    """
    return line["epoch"] <= epochs if line["kind"] == "epoch" else line["step"] <= step


def _whole_lines(path: Path) -> list[str]:
    """Return the lines, but for half a line that a killed run may have left at the end."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def exists(path: Path) -> bool:
    """Return whether there is something of this name, a dead link included.

    Raise OSError when that can't be found out.
    """
    try:
        path.lstat()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


def _unwritable(folder: Path, error: OSError) -> UsageError:
    advice = "name another directory"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = f"free space, or {advice}"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = f"get the rights to, or {advice}"
    return UsageError(f"--run_dir={folder} can't be written: {error.strerror}; {advice}")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _replace(path, json.dumps(value, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file that is whole at any time. Raise OSError when that fails."""
    with whole_file(path, path.with_suffix(".partial")) as file:
        file.write(text.encode())


def _git_revision() -> str:
    """Return the commit of the recipe's source, "" outside a checkout.

    "+changes" follows when the tree differs from it.
    """
    options = ["--always", "--abbrev=40", "--dirty=+changes"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
