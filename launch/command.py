"""Command lines that start in milliseconds, also where the environment isn't installed.

Their errors are one sentence.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from recipe.errors import INTERRUPTED, RunError, UsageError

# What other launchers and habits call our options and choices, without hyphens.
SYNONYMS = {
    "-np": "np nproc numproc ntasks ranks slots nprocpernode",
    "--hostfile": "h f host hosts hostlist machinefile hostsfile nodelist nodefile",
    "--interface": "networkinterface networkinterfaces iface nic nics networkifname",
    "--log-dir": "output outputfilename logs logfile",
    "--elastic": "minnp maxnp minnumproc maxnumproc",
    "--data_dir": "data tfdsdatadir",
    "mpirun": "mpi mpiexec openmpi orterun",
    "horovodrun": "gloo horovod hvd",
    "srun": "slurm pmix",
    "check": "verify validate test lint",
    "write": "make create new list",
}
ALIKE = 0.7  # of letters in common, from which on a name is taken for a slip of the keyboard


class Parser(argparse.ArgumentParser):
    """argparse with the docstring as its help; a wrong command line is a UsageError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, with the name that was perhaps meant."""
        raise UsageError(f"{message}{self._hint(message)} (--help says more)")

    def _hint(self, message: str) -> str:
        """Return the option or the choice that was perhaps meant, as a hint for the user."""
        if option := re.match(r"unrecognized arguments: (-[^\s=]*)", message):
            meant = nearest(option[1], self._options())
        elif choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            meant = nearest(choice[1], re.findall(r"[\w-]+", choice[2]))
        else:
            meant = ""
        return f"; did you mean {meant}?" if meant else ""

    def _options(self) -> list[str]:
        """Return all options, those of the commands included."""
        options: list[str] = []
        for action in self._actions:
            options += action.option_strings
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    options += command._options()
        return options


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that was meant, by a synonym or by its letters; "" if none is."""
    # Known names by all ways to write them.
    spellings = {_plain(each): each for each in known}
    for each, synonyms in SYNONYMS.items():
        if _plain(each) in spellings:
            meant = spellings[_plain(each)]
            spellings |= dict.fromkeys(synonyms.split(), meant)

    alike = difflib.get_close_matches(_plain(name), spellings, n=1, cutoff=ALIKE)
    return spellings[alike[0]] if alike else ""


def _plain(name: str) -> str:
    """Return a name without hyphens and underscores, in lower case."""
    return re.sub("[-_]", "", name).lower()


def plural(count: int, noun: str) -> str:
    """Return "1 host", "2 hosts"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}s"


def run(main: Callable[[list[str]], None]) -> None:
    """Run a program. Its exit status is 2 for a UsageError, 1 for a RunError, with the sentence."""
    try:
        main(sys.argv[1:])
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
