"""How to go on with a run that ends early: said with the reason, by the rank that says why."""

import os
import shlex

STARTED_AS = "STARTED_AS"  # environment variable: the command of a script around recipe.train

_command, _saved = "", None  # the command, and the step that is saved, once the run has begun


def begun(run_dir: str, arguments: list[str]) -> None:
    """A run in this directory is about to begin, by recipe.train's `arguments`."""
    global _command
    program = os.environ.get(STARTED_AS) or "python -m recipe.train"
    kept = [
        word
        for word in arguments
        if word.lstrip("-").partition("=")[0] not in ("resume", "run_dir")
    ]
    _command = f"{program} {shlex.join([*kept, f'--run_dir={run_dir}', '--resume'])}"


def saved(step: int) -> None:
    """The run goes on, and its state after so many steps is on the disk; 0: there is none."""
    global _saved
    _saved = step


def advice() -> str:
    """One line, that can be pasted; empty where no run has begun."""
    if _saved is None:
        return ""
    how = "" if os.environ.get(STARTED_AS) else ", by the same launcher"
    if not _saved:
        return f"nothing is saved yet; to begin again{how}: {_command}"
    return f"saved after step {_saved}; to go on from there{how}: {_command}"
