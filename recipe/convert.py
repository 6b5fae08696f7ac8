"""Takes a run over into the other framework: `python -m recipe.convert --run_dir=RUN --to=NEW`.

NEW gets RUN's figures and its newest checkpoint, as Keras or native PyTorch would have written it:
weights, moving statistics, velocities, loss scale. `python -m recipe.train --config=NEW/config.json
--run_dir=NEW --resume` goes on.

In both the weights are written by Keras's names in Keras's layout. What differs is the velocity:
Keras's v has the learning rate in it and is subtracted already (paper, eq. 10), PyTorch's u has not
(eq. 9): v = −ηu, with η of the last step.
"""

import contextlib
import os
import secrets
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from recipe import cli, config
from recipe.config import Recipe
from recipe.errors import RunError, UsageError
from recipe.run import checkpoint, runlog
from recipe.system import noise, output

VALUES = flags.FlagValues()
flags.DEFINE_string("run_dir", "", "a run directory of recipe.train", flag_values=VALUES)
flags.DEFINE_string("to", "", "the new run directory", flag_values=VALUES)

Arrays = dict[str, np.ndarray]

# The last part of a Keras variable's path, the name in a checkpoint of native PyTorch.
_LOSS_SCALE = {"dynamic_scale": "optimizer/loss_scale", "step_counter": "optimizer/finite_steps"}
_RATE = "optimizer/rate"


def main(argv: list[str]) -> None:
    cli.parse_flags(VALUES, argv)
    if not VALUES.run_dir or not VALUES.to:
        raise UsageError(
            "--run_dir and --to are needed: a run directory of recipe.train, and a new one"
        )
    old, new = Path(VALUES.run_dir), Path(VALUES.to)
    if os.path.lexists(new):
        raise UsageError(f"--to={new} exists; name a new directory")
    recipe = other(runlog.read_recipe(old))
    found = checkpoint.newest(old / runlog.CHECKPOINTS, output.warn)
    if found is None:
        raise RunError(f"{old / runlog.CHECKPOINTS} holds no checkpoint")
    arrays, meta = converted(*found, recipe)
    with made(new) as folder:
        runlog.copy_run(old, folder)
        runlog.write_recipe(folder, recipe)
        path = checkpoint.save(folder / runlog.CHECKPOINTS, meta["step"], arrays, meta, keep=1)
    config_, run_dir = (
        shlex.quote(f"--config={new / runlog.CONFIG}"),
        shlex.quote(f"--run_dir={new}"),
    )
    print(
        f"{new / runlog.CHECKPOINTS / path.name}: the state after step {meta['step']} for "
        f"{recipe.framework}; "
        f"to go on: python -m recipe.train {config_} {run_dir} --resume"
    )


@contextlib.contextmanager
def made(new: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all is in it; nothing of it stays otherwise. Raises UsageError when it
    can't be written."""
    folder = new.with_name(f".{new.name}-{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(new)
    except (OSError, shutil.Error) as error:
        raise UsageError(
            f"--to={new} can't be written: {error}; free space or rights, or name another directory"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def other(recipe: Recipe) -> Recipe:
    """The same recipe in the other framework."""
    framework = "keras" if recipe.framework == "torch" else "torch"
    return replace(recipe, framework=framework, run=replace(recipe.run, compile=False))


def converted(
    arrays: Arrays, meta: dict[str, Any], recipe: Recipe
) -> tuple[Arrays, dict[str, Any]]:
    """(arrays, description) of a checkpoint, for a recipe that differs in its framework."""
    if recipe.framework == "torch":
        arrays = to_torch(arrays)
    else:
        with noise.filtered():
            from recipe.frameworks.keras import replica as fit
        arrays = to_keras(arrays, fit.compiled(recipe, len(arrays["model/fc/bias"])), meta["step"])
    return arrays, meta | {
        "recipe": config.identity(recipe),
        "fingerprint": config.fingerprint(recipe),
    }


def to_torch(arrays: Arrays) -> Arrays:
    """What native PyTorch would have written for a Keras checkpoint's state."""
    (rate,) = (array for name, array in arrays.items() if name.endswith("/sgd/learning_rate"))
    found = {_RATE: rate}
    for name, array in arrays.items():
        last = name.rpartition("/")[2]
        if name.startswith("model/"):
            found[name] = array
        elif path := _slot(last):
            # At η = 0, of which there is no way back up, no velocity matters any more.
            found[f"optimizer/velocity/{path}"] = -array / rate if rate else np.zeros_like(array)
        elif last in _LOSS_SCALE:
            found[_LOSS_SCALE[last]] = array
    return found


def to_keras(arrays: Arrays, model: Any, step: int) -> Arrays:
    """What Keras would have written for a native PyTorch checkpoint's state after `step` steps. `model`: the Keras
    network with its optimizer, for names and order."""
    from recipe.keras import state

    rate, found = np.float32(arrays[_RATE]), {}
    for name, template in state.to_arrays(model).items():
        array, last = template, name.rpartition("/")[2]
        if name.startswith("model/"):
            array = arrays[name]
        elif path := _slot(last):
            array = -rate * arrays[f"optimizer/velocity/{path}"]
        elif last in _LOSS_SCALE:
            array = arrays[_LOSS_SCALE[last]]
        elif name.endswith("/sgd/learning_rate"):
            array = rate
        elif last == "iteration":
            array = np.int64(step)
        found[name] = np.asarray(array, dtype=template.dtype)
    return found


def _slot(name: str) -> str:
    """ "stem_conv/kernel" for Keras's velocity "stem_conv_kernel_momentum", "" for other variables."""
    layer, _, kind = name.removesuffix("_momentum").rpartition("_")
    return f"{layer}/{kind}" if name.endswith("_momentum") else ""


if __name__ == "__main__":
    cli.run(main, VALUES)
