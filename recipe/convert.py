"""Takes a run over into the other framework: `python -m recipe.convert --run_dir=RUN --to=NEW`.

NEW gets RUN's figures and its newest checkpoint, as Keras or native PyTorch would have written it:
weights, moving statistics, velocities, loss scale.
`python -m recipe.train --config=NEW/config.json --run_dir=NEW --resume` goes on.

In both frameworks the weights are written by Keras's names in Keras's layout. What differs is the
velocity. Keras's v has the learning rate in it and is subtracted already (paper, eq. 10). PyTorch's
u has not (eq. 9). So v = −ηu, with η of the last step.
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
from recipe.system.arrays import Arrays
from recipe.system.checkpoint_file import Checkpoint

VALUES = flags.FlagValues()
flags.DEFINE_string("run_dir", "", "a run directory of recipe.train", flag_values=VALUES)
flags.DEFINE_string("to", "", "the new run directory", flag_values=VALUES)

# The last part of a Keras variable's path, and the name in a checkpoint of native PyTorch.
_LOSS_SCALE = {"dynamic_scale": "optimizer/loss_scale", "step_counter": "optimizer/finite_steps"}
_RATE = "optimizer/rate"
_KERAS_RATE = "/sgd/learning_rate"  # how the name of Keras's rate ends


def main(argv: list[str]) -> None:
    # Refuse before anything is read.
    cli.parse_flags(VALUES, argv)
    if not VALUES.run_dir or not VALUES.to:
        raise UsageError(
            "--run_dir and --to are needed: a run directory of recipe.train, and a new one"
        )
    old, new = Path(VALUES.run_dir), Path(VALUES.to)
    if os.path.lexists(new):
        raise UsageError(f"--to={new} exists; name a new directory")

    # Convert the newest checkpoint.
    recipe = for_other_framework(runlog.read_recipe(old))
    newest = checkpoint.newest(old / runlog.CHECKPOINTS, output.warn)
    if newest is None:
        raise RunError(f"{old / runlog.CHECKPOINTS} holds no checkpoint")
    arrays, meta = convert(newest, recipe)
    step = meta["step"]

    # Write the new run directory.
    with new_folder(new) as folder:
        runlog.copy_run(old, folder)
        runlog.write_recipe(folder, recipe)
        path = checkpoint.save(folder / runlog.CHECKPOINTS, step, arrays, meta, keep=1)

    # Say how the run goes on.
    arguments = shlex.join([f"--config={new / runlog.CONFIG}", f"--run_dir={new}"])
    print(
        f"{new / runlog.CHECKPOINTS / path.name}: the state after step {step} for "
        f"{recipe.framework}; to go on: python -m recipe.train {arguments} --resume"
    )


@contextlib.contextmanager
def new_folder(new: Path) -> Iterator[Path]:
    """Create a folder to fill, which gets its name when all is in it.

    After an error nothing of it stays. Raise UsageError when it can't be written.
    """
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


def for_other_framework(recipe: Recipe) -> Recipe:
    """Return the same recipe in the other framework."""
    framework = "keras" if recipe.framework == "torch" else "torch"
    return replace(recipe, framework=framework, run=replace(recipe.run, compile=False))


def convert(old: Checkpoint, recipe: Recipe) -> Checkpoint:
    """Return a checkpoint for a recipe that differs in its framework."""
    if recipe.framework == "torch":
        arrays = to_torch(old.arrays)
    else:
        with noise.filtered():
            from recipe.frameworks.keras import replica
        num_classes = len(old.arrays["model/fc/bias"])
        arrays = to_keras(old.arrays, replica.compiled(recipe, num_classes), old.meta["step"])
    description = {"recipe": config.identity(recipe), "fingerprint": config.fingerprint(recipe)}
    return Checkpoint(arrays, old.meta | description)


def to_torch(keras_arrays: Arrays) -> Arrays:
    """Return what native PyTorch would have written for a Keras checkpoint's state."""
    # Keras's velocities have -η as a factor, which PyTorch's lack.
    (rate,) = (array for name, array in keras_arrays.items() if name.endswith(_KERAS_RATE))
    arrays = {_RATE: rate}
    for name, array in keras_arrays.items():
        last_part = name.rpartition("/")[2]
        weight = _weight_of_velocity(last_part)
        if name.startswith("model/"):
            arrays[name] = array
        elif weight:
            # At η = 0, which never rises again, no velocity matters any more.
            velocity = -array / rate if rate else np.zeros_like(array)
            arrays[f"optimizer/velocity/{weight}"] = velocity
        elif last_part in _LOSS_SCALE:
            arrays[_LOSS_SCALE[last_part]] = array
    return arrays


def to_keras(torch_arrays: Arrays, model: Any, step: int) -> Arrays:
    """Return what Keras would have written for a native PyTorch checkpoint's state.

    `model` is the Keras network with its optimizer, for names and order. The state is that after
    `step` steps.
    """
    from recipe.keras import state

    # Each array of the template is a weight, a velocity or a number.
    rate = np.float32(torch_arrays[_RATE])
    arrays = {}
    for name, template in state.to_arrays(model).items():
        last_part = name.rpartition("/")[2]
        weight = _weight_of_velocity(last_part)
        value: Any = template
        if name.startswith("model/"):
            value = torch_arrays[name]
        elif weight:
            value = -rate * torch_arrays[f"optimizer/velocity/{weight}"]
        elif last_part in _LOSS_SCALE:
            value = torch_arrays[_LOSS_SCALE[last_part]]
        elif name.endswith(_KERAS_RATE):
            value = rate
        elif last_part == "iteration":
            value = np.int64(step)
        arrays[name] = np.asarray(value, dtype=template.dtype)
    return arrays


def _weight_of_velocity(name: str) -> str:
    """Return "stem_conv/kernel" for Keras's velocity "stem_conv_kernel_momentum".

    Return "" for other variables.
    """
    if not name.endswith("_momentum"):
        return ""
    layer, _, kind = name.removesuffix("_momentum").rpartition("_")
    return f"{layer}/{kind}"


if __name__ == "__main__":
    cli.run(main, VALUES)
