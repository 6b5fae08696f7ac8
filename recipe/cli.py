"""Command lines of the recipe's programs: the recipe from flags, one sentence for a user's mistake, exit statuses."""

import importlib
import json
import os
import pkgutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from recipe import configs
from recipe.config import Recipe, flatten, meant, nearest
from recipe.errors import Preempted, RunError, UsageError
from recipe.ranks import binding, collectives, launched, preemption
from recipe.system import again, output, watchdog

GONE = "another rank has gone"


def presets() -> list[str]:
    """Names of the recipes in recipe/configs."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def parse_recipe(argv: list[str]) -> tuple[Recipe, str, list[str]]:
    """(recipe, its name, the arguments that are not about the recipe) of a command line without the program's name.

    --config=NAME takes a preset's name or a run's config.json; --config.SECTION.FIELD=VALUE changes one field.
    Raises UsageError."""
    source, overrides, others = _split(argv)
    recipe = load_recipe(source)
    values = flags.FlagValues()
    config = ml_collections.ConfigDict(asdict(recipe))
    _refuse_unknown(overrides, recipe)
    try:
        # A tuple's overrides may change its length, and 5 may stand for 5.0: recipe/config.py checks the types.
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=["", *overrides]
        )
        values(["", *overrides])
    except (flags.Error, TypeError, ValueError) as error:
        raise UsageError(str(error).removeprefix("flag ")) from None
    return Recipe.from_dict(values.config.to_dict()), Path(source).stem, others


def load_recipe(source: str) -> Recipe:
    """The recipe of a preset's name or of a .json file. Raises UsageError, with the nearest preset's name."""
    if source.endswith(".json"):
        try:
            return Recipe.from_dict(json.loads(Path(source).read_text()))
        except (OSError, ValueError) as error:
            raise UsageError(f"--config={source} can't be read: {error}")
    if source not in presets():
        raise UsageError(
            f"--config={source} is not a preset ({', '.join(presets())}) nor a .json file; "
            f"did you mean --config={nearest(source, presets())}?"
        )
    return importlib.import_module(f"recipe.configs.{source}").RECIPE


def parse_flags(values: flags.FlagValues, argv: list[str], fields: Iterable[str] = ()) -> None:
    """Parses the program's own flags, beside which it has the recipe's `fields`. Raises UsageError, with the name of
    the one that may have been meant."""
    try:
        rest = values(["", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        known = [
            name for name in values if name not in ("help", "helpfull", "helpshort", "helpxml")
        ]
        raise UsageError(
            f"--{error.flagname} is not a flag of this program; did you mean "
            f"--{meant(error.flagname, [*known, *fields])}?"
        ) from None
    except flags.Error as error:
        raise UsageError(str(error)) from None
    if rest:
        raise UsageError(
            f"{rest[0]!r} is not understood: flags begin with --, such as --config=quick"
        )


def run(main: Callable[[list[str]], None], values: flags.FlagValues | None = None) -> None:
    """Runs a program and leaves with its exit status: 0, 1 for a failed run, 2 for a usage error, 75 for a run that was
    told to leave and can be resumed.

    --help prints the program's docstring and the flags in `values`.

    A rank that fails says so and leaves at once, without Horovod's orderly shutdown, which would wait for the other
    ranks; the launcher then ends them."""
    output.forgive()
    if {"-h", "--help"} & set(sys.argv[1:]):
        _help(values or flags.FlagValues())
        return
    try:
        main(sys.argv[1:])
        return
    except UsageError as error:
        _leave(2, str(error), error.everywhere)
    except RunError as error:
        _leave(1, str(error), error.everywhere)
    except Preempted as error:
        _leave(preemption.STATUS, str(error), error.everywhere, kind="preempted")
    except ImportError as error:
        _leave(2 if "KERAS_BACKEND" in str(error) else 1, _unexpected(error), everywhere=True)
    except KeyboardInterrupt:
        _leave(130, "interrupted", True)
    except OSError as error:
        of_a_file = isinstance(error.filename, (str, bytes, os.PathLike))
        _leave(
            1,
            f"{os.fsdecode(error.filename)}: {error.strerror}" if of_a_file else _unexpected(error),
        )
    except Exception as error:
        _leave(2 if _homeless(error) else 1, _unexpected(error))


def quiet() -> bool:
    """Whether this process is a rank other than 0, by the launcher's word, before Horovod knows."""
    return watchdog.launched_rank() != "0"


def _help(values: flags.FlagValues) -> None:
    print(sys.modules["__main__"].__doc__)
    for name in values:
        print(f"  --{name}: {values[name].help} (default: {values[name].default!r})")


def _split(argv: list[str]) -> tuple[str, list[str], list[str]]:
    source, overrides, others = None, [], []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            source = value if equals else next(arguments, "")
        elif argument.startswith("-") and name.startswith("config."):
            overrides.append(f"--{name}={value if equals else next(arguments, '')}")
        else:
            others.append(argument)
    if not source:
        raise UsageError(f"--config is missing: give one of {', '.join(presets())}")
    return source, overrides, others


def _refuse_unknown(overrides: list[str], recipe: Recipe) -> None:
    known = [f"config.{name}" for name in flatten(recipe)]
    for override in overrides:
        name = override.lstrip("-").partition("=")[0]
        if name not in known:
            raise UsageError(
                f"--{name} is not a field of the recipe; did you mean --{meant(name, known)}?"
            )


def _unexpected(error: Exception) -> str:
    """The sentence for an error that isn't ours by type; prints its traceback when it is nobody's we know."""
    text = str(error)
    if "KERAS_BACKEND" in text:
        return text
    if _homeless(error):
        return f"{launched.no_home()}, or name the folder of the data without ~"
    if "Horovod" in f"{type(error).__name__} {text}":
        time.sleep(1)  # let the rank that failed first be heard first
        return f"{GONE}; its own message says why ({text.splitlines()[0]})"
    traceback.print_exc()
    return f"{type(error).__name__}: {text}".splitlines()[0]


def _homeless(error: Exception) -> bool:
    """Whether it is pathlib's, who finds nothing that ~ stands for."""
    return isinstance(error, RuntimeError) and launched.homeless()


def _leave(status: int, message: str, everywhere: bool = False, kind: str = "error") -> None:
    """Says why, and ends the process. What all ranks know rank 0 says; the others give it time to. Before Horovod has
    started none knows what the others do: one that still lives then failed without rank 0, and says so itself."""
    several = binding.started() and collectives.size() > 1
    who, said = "", False
    if several and not everywhere:
        who = f"rank {collectives.rank()} of {collectives.size()}: "
    elif quiet():
        # The launcher ends this rank as soon as rank 0 has left, but for one that leaves by such a signal already.
        time.sleep(3 if status == preemption.STATUS else 10)
        who, said = f"rank {watchdog.launched_rank()} on {socket.gethostname()}: ", several
    if not said:
        if (advice := again.advice()) and not message.startswith(GONE):
            output.say(advice)
        output.say(f"{kind}: {who}{message}")
    sys.stdout.flush()
    os._exit(status)
