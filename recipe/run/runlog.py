"""The run directory: what ran, where, with which versions, and its figures as JSON lines and TensorBoard events."""

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
    """Makes the directory this process's as long as the context lasts, against other processes that would write there.

    Raises UsageError, saying who has it or why it can't be had."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(owner.only(folder / LOCK, f"--run_dir={folder}"))
        except OSError as error:
            raise _unwritable(folder, error)
        yield


def begin_run(folder: Path, recipe: Recipe, ranks: list[RankHost]) -> None:
    """Writes what runs, and where. `ranks`: each one's host and processor. One rank only.

    Raises UsageError when the directory can't be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(folder, recipe)
        _write_json(folder / ENVIRONMENT, environment(ranks))
    except OSError as error:
        raise _unwritable(folder, error)


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run directory. Raises UsageError when it is not one."""
    try:
        return Recipe.from_dict(json.loads((folder / CONFIG).read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a run directory: {CONFIG} can't be read ({error})")


def copy_run(old: Path, new: Path) -> None:
    """Copies what is in a run directory, but for its checkpoints and what belongs to a process that writes there.

    Raises OSError or shutil.Error."""
    ignored = shutil.ignore_patterns(CHECKPOINTS, LOCK, "*.partial")
    shutil.copytree(old, new, ignore=ignored, dirs_exist_ok=True)


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
        raise UsageError(
            f"{folder / METRICS} can't be read ({error}); mend it, or name another run directory"
        )


def environment(ranks: list[RankHost]) -> dict[str, Any]:
    """What a figure needs to be believed: hosts, processors, versions, source revision, command line."""
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
    """The kinds of processors that a run was on; none where they aren't known."""
    try:
        return list(json.loads((folder / ENVIRONMENT).read_text())["processors"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def versions() -> dict[str, str]:
    """The versions of the packages that a run's figures may depend on."""
    return {name: version for name in PACKAGES if (version := _version(name))}


class RunLog:
    """Appends figures to metrics.jsonl and to TensorBoard's event files. One rank only."""

    def __init__(self, folder: Path, step: int = 0, epochs: int = 0) -> None:
        """`step`, `epochs`: where the run continues; lines beyond, from before a crash, are dropped."""
        from recipe.run.events import Events

        self._path = folder / METRICS
        self._keep_until(step, epochs)
        try:
            self._file = self._path.open("a", buffering=1)
        except OSError as error:
            raise self._unwritable(error)
        self._events = Events(folder / EVENTS, step)

    def write(self, kind: str, step: int, values: Figures) -> None:
        """One line: kind ("start", "step" or "epoch"), the number of finished steps, and the figures.

        JSON has no NaN and no infinity: they become null."""
        known = {
            name: value
            for name, value in values.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        line = {
            "kind": kind,
            "step": step,
            **values,
            **{name: None for name in values.keys() - known.keys()},
        }
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise self._unwritable(error)
        numbers = {
            f"{kind}/{name}": value
            for name, value in known.items()
            if isinstance(value, (int, float))
        }
        self._events.scalars(numbers, step)

    def close(self) -> None:
        """What a full disk has no room for is lost; a write has said so."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._events.close()

    def _keep_until(self, step: int, epochs: int) -> None:
        try:
            if not exists(self._path):
                if step:
                    warn(f"{self._path} is missing: it begins anew after step {step}")
                return
            lines = [(json.loads(line), line) for line in _whole_lines(self._path)]
            kept = [line for values, line in lines if step and _is_before(values, step, epochs)]
            if not step and any(values["kind"] == "epoch" for values, _ in lines):
                aside = self._path.with_name(f"aside-{time.strftime('%Y%m%d-%H%M%S')}-{METRICS}")
                self._path.rename(aside)
                warn(f"beginning at step 0: the old figures are in {aside}")
            else:
                _replace(self._path, "".join(kept))
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
    """A checkpoint at an epoch's last step may have been saved before the epoch's evaluation."""
    return line["epoch"] <= epochs if line["kind"] == "epoch" else line["step"] <= step


def _whole_lines(path: Path) -> list[str]:
    """A killed run may have left half a line at the end."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def exists(path: Path) -> bool:
    """Whether there is something of this name, a dead link included. Raises OSError when that can't be found out."""
    try:
        path.lstat()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


def _unwritable(folder: Path, error: OSError) -> UsageError:
    advice = {errno.ENOSPC: "free space", errno.EDQUOT: "free space"}
    advice |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "get the rights to")
    what = (
        f"; {told}, or name another directory"
        if (told := advice.get(error.errno))
        else "; name another directory"
    )
    return UsageError(f"--run_dir={folder} can't be written: {error.strerror}{what}")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _replace(path, json.dumps(value, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file that is whole at any time. Raise OSError when it can't be, and leave nothing behind."""
    with whole_file(path, path.with_suffix(".partial")) as file:
        file.write(text.encode())


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
