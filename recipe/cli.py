"""Command lines of the recipe's programs: a recipe from flags, errors of one sentence, statuses."""

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
from typing import NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from recipe import configs
from recipe.config import Recipe, flatten, meant, nearest
from recipe.errors import INTERRUPTED, Preempted, RunError, UsageError
from recipe.ranks import binding, collectives, launched
from recipe.system import again, output, watchdog

GONE = "another rank has gone"
HELP_FLAGS = ("help", "helpfull", "helpshort", "helpxml")  # absl's own


class CommandLine(NamedTuple):
    """What a program's arguments say."""

    recipe: Recipe
    name: str  # of the preset, or of the .json file
    remaining_args: list[str]  # those that are not about the recipe


def presets() -> list[str]:
    """Return the names of the recipes in recipe/configs."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def parse_recipe(argv: list[str]) -> CommandLine:
    """Parse a command line without the program's name. Raise UsageError.

    --config=NAME takes a preset's name or a run's config.json. --config.SECTION.FIELD=VALUE changes
    one field.
    """
    # Refuse wrong names here: ml_collections would not say which was meant.
    source, overrides, remaining_args = _split(argv)
    recipe = load_recipe(source)
    _refuse_unknown(overrides, recipe)

    # Override the fields.
    values = flags.FlagValues()
    config = ml_collections.ConfigDict(asdict(recipe))
    flag_args = ["", *overrides]
    try:
        # The types are checked by recipe/config.py: a tuple's override may change its length, and
        # 5 may stand for 5.0.
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=flag_args)
        values(flag_args)
    except (flags.Error, TypeError, ValueError) as error:
        raise UsageError(str(error).removeprefix("flag ")) from None
    recipe = Recipe.from_dict(values.config.to_dict())
    return CommandLine(recipe, Path(source).stem, remaining_args)


def load_recipe(source: str) -> Recipe:
    """Return the recipe of a preset's name or of a .json file.

    Raise UsageError, with the nearest preset's name.
    """
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
    """Parse the program's own flags, beside which it has the recipe's `fields`.

    Raise UsageError, with the name of the flag or field that may have been meant.
    """
    # Say which flag may have been meant.
    try:
        positional_args = values(["", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        known = [name for name in values if name not in HELP_FLAGS]
        suggestion = meant(error.flagname, [*known, *fields])
        raise UsageError(
            f"--{error.flagname} is not a flag of this program; did you mean --{suggestion}?"
        ) from None
    except flags.Error as error:
        raise UsageError(str(error)) from None

    # A program takes flags only.
    if positional_args:
        raise UsageError(
            f"{positional_args[0]!r} is not understood: flags begin with --, such as --config=quick"
        )


def run(main: Callable[[list[str]], None], values: flags.FlagValues | None = None) -> None:
    """Run a program and leave with its exit status.

    That is 0, 1 for a failed run, 2 for a usage error, or 75 for a run that was told to leave and
    can be resumed. --help prints the program's docstring and the flags in `values`.

    A rank that fails says so and leaves at once. Horovod's orderly shutdown would wait for the
    other ranks. The launcher then ends them.
    """
    output.forgive()
    if {"-h", "--help"} & set(sys.argv[1:]):
        _print_help(values or flags.FlagValues())
        return
    try:
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        _leave(_ending_of(error))


class _Ending(NamedTuple):
    """How a program ends that does not reach its end."""

    status: int
    message: str
    everywhere: bool = False  # whether all ranks end so, and know it
    kind: str = "error"  # the message's first word


def _ending_of(error: BaseException) -> _Ending:
    """Return how an error ends the program.

    Print the traceback of an error that the user can't be expected to know.
    """
    match error:
        case UsageError() | RunError():
            return _Ending(error.status, str(error), error.everywhere)
        case Preempted():
            return _Ending(error.status, str(error), error.everywhere, kind="preempted")
        case KeyboardInterrupt():
            return _Ending(INTERRUPTED, "interrupted", everywhere=True)
        case ImportError():
            status = UsageError.status if "KERAS_BACKEND" in str(error) else RunError.status
            return _Ending(status, _message_of(error), everywhere=True)
        case OSError(filename=str() | bytes() | os.PathLike() as filename):
            return _Ending(RunError.status, f"{os.fsdecode(filename)}: {error.strerror}")
        case _:
            status = UsageError.status if _is_homeless(error) else RunError.status
            return _Ending(status, _message_of(error))


def _message_of(error: BaseException) -> str:
    """Return one sentence for an error that is not ours.

    Print the traceback, unless the cause is known.
    """
    text = str(error)
    if "KERAS_BACKEND" in text:
        return text
    if _is_homeless(error):
        return f"{launched.no_home()}, or name the folder of the data without ~"
    if "Horovod" in type(error).__name__ or "Horovod" in text:
        time.sleep(1)  # let the rank that failed first be heard first
        return f"{GONE}; its own message says why ({text.splitlines()[0]})"
    traceback.print_exception(error)
    return f"{type(error).__name__}: {text}".splitlines()[0]


def _is_homeless(error: BaseException) -> bool:
    """Return whether it is pathlib's error when ~ stands for nothing."""
    return isinstance(error, RuntimeError) and launched.homeless()


def _leave(ending: _Ending) -> None:
    """Say why, unless rank 0 says it for all, and end the process."""
    speaker = _speaker(ending)
    if speaker is not None:
        advice = again.advice()
        if advice and not ending.message.startswith(GONE):
            output.say(advice)
        output.say(f"{ending.kind}: {speaker}{ending.message}")
    sys.stdout.flush()
    os._exit(ending.status)


def _speaker(ending: _Ending) -> str | None:
    """Return how this rank introduces its message; None when rank 0 says it for all.

    If every rank ends in the same way, only rank 0 says why; the others wait so that it can. Before
    Horovod has started, ranks can't know about each other, so each says why it ends.
    """
    know_each_other = binding.started() and collectives.size() > 1
    if know_each_other and not ending.everywhere:
        return f"rank {collectives.rank()} of {collectives.size()}: "
    rank = watchdog.launched_rank()
    if rank == "0":
        return ""
    # The launcher ends this rank as soon as rank 0 has left, and the wait is over. After a signal
    # it may not do so, because the ranks are leaving already: then wait less.
    time.sleep(3 if ending.status == Preempted.status else 10)
    if know_each_other:
        return None
    return f"rank {rank} on {socket.gethostname()}: "


def _print_help(values: flags.FlagValues) -> None:
    print(sys.modules["__main__"].__doc__)
    for name in values:
        print(f"  --{name}: {values[name].help} (default: {values[name].default!r})")


class _SplitArguments(NamedTuple):
    source: str  # the value of --config
    overrides: list[str]  # --config.SECTION.FIELD=VALUE
    remaining_args: list[str]


def _split(argv: list[str]) -> _SplitArguments:
    """Return the arguments that are about the recipe, and the others. Raise UsageError."""
    # Take out --config and --config.*, wherever they are.
    source: str | None = None
    overrides, remaining_args = [], []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        is_config = name == "config" or name.startswith("config.")
        if not (argument.startswith("-") and is_config):
            remaining_args.append(argument)
            continue
        # The value may also be the next argument.
        value = value if equals else next(arguments, "")
        if name == "config":
            source = value
        else:
            overrides.append(f"--{name}={value}")

    # There is no default recipe.
    if not source:
        raise UsageError(f"--config is missing: give one of {', '.join(presets())}")
    return _SplitArguments(source, overrides, remaining_args)


def _refuse_unknown(overrides: list[str], recipe: Recipe) -> None:
    known = [f"config.{name}" for name in flatten(recipe)]
    for override in overrides:
        name = override.lstrip("-").partition("=")[0]
        if name not in known:
            raise UsageError(
                f"--{name} is not a field of the recipe; did you mean --{meant(name, known)}?"
            )
