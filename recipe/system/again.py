"""How to continue a run that ends early: the command, printed beside the reason."""

import os
import shlex

STARTED_AS = "STARTED_AS"  # environment variable: the command of a script around recipe.train

_command = ""  # the command that continues the run
_saved_step: int | None = None  # None until the run has begun; 0 while nothing is saved


def begun(run_dir: str, arguments: list[str]) -> None:
    """Remember that a run in this directory begins with these arguments of recipe.train."""
    global _command
    program = os.environ.get(STARTED_AS) or "python -m recipe.train"
    remaining_args = [word for word in arguments if _flag_name(word) not in ("resume", "run_dir")]
    _command = f"{program} {shlex.join([*remaining_args, f'--run_dir={run_dir}', '--resume'])}"


def saved(step: int) -> None:
    """Remember that the state after so many steps is on the disk; 0 when there is none yet."""
    global _saved_step
    _saved_step = step


def advice() -> str:
    """Return one line with a command that can be pasted, or "" when no run has begun."""
    if _saved_step is None:
        return ""
    how = "" if os.environ.get(STARTED_AS) else ", by the same launcher"
    if _saved_step == 0:
        return f"nothing is saved yet; to begin again{how}: {_command}"
    return f"saved after step {_saved_step}; to go on from there{how}: {_command}"


def _flag_name(word: str) -> str:
    return word.lstrip("-").partition("=")[0]
