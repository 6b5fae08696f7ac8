"""Command lines that start in milliseconds, also where the environment isn't installed: errors are one sentence."""

import argparse
import sys
from collections.abc import Callable

from recipe.errors import RunError, UsageError


class Parser(argparse.ArgumentParser):
    """argparse with the docstring as its help; a wrong command line is a UsageError."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:
        raise UsageError(f"{message} (--help says more)")


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
