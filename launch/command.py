"""Command lines that start in milliseconds, also where the environment isn't installed: errors are one sentence."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable

from recipe.errors import RunError, UsageError

# What other launchers and habits call our options and choices.
SYNONYMS = {
    "-np": ("np", "nproc", "numproc", "ntasks", "ranks", "slots", "nprocpernode"),
    "--hostfile": (
        "h",
        "f",
        "host",
        "hosts",
        "hostlist",
        "machinefile",
        "hostsfile",
        "nodelist",
        "nodefile",
    ),
    "--interface": (
        "networkinterface",
        "networkinterfaces",
        "iface",
        "nic",
        "nics",
        "networkifname",
    ),
    "--log-dir": ("output", "outputfilename", "logs", "logfile"),
    "--elastic": ("minnp", "maxnp", "minnumproc", "maxnumproc"),
    "--data_dir": ("data", "tfdsdatadir"),
    "mpirun": ("mpi", "mpiexec", "openmpi", "orterun"),
    "horovodrun": ("gloo", "horovod", "hvd"),
    "srun": ("slurm", "pmix"),
    "check": ("verify", "validate", "test", "lint"),
    "write": ("make", "create", "new", "list"),
}
ALIKE = 0.7  # of letters in common, from which on a name is taken for a slip of the keyboard


class Parser(argparse.ArgumentParser):
    """argparse with the docstring as its help; a wrong command line is a UsageError."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:
        raise UsageError(f"{message}{self._instead(message)} (--help says more)")

    def _instead(self, message: str) -> str:
        """The option or the choice that was meant, if one is like it."""
        if unknown := re.match(r"unrecognized arguments: (-[^\s=]*)", message):
            known = self._options()
        elif unknown := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            known = re.findall(r"[\w-]+", unknown[2])
        else:
            return ""
        meant = nearest(unknown[1], known)
        return f"; did you mean {meant}?" if meant else ""

    def _options(self) -> list[str]:
        """Those of the commands, too."""
        found = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [option for each in action.choices.values() for option in each._options()]
        return found


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was meant, by a synonym or by its letters; "" when none is like it."""
    plain = {_plain(each): each for each in known}
    plain |= {
        other: plain[_plain(each)]
        for each in SYNONYMS
        if _plain(each) in plain
        for other in SYNONYMS[each]
    }
    alike = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=ALIKE)
    return plain[alike[0]] if alike else ""


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name).lower()


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a program; its exit status is 2 for a UsageError, 1 for a RunError, with the sentence."""
    try:
        main(sys.argv[1:])
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
