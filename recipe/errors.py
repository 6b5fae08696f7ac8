"""Errors that end a program with one sentence instead of a traceback, and their exit statuses."""

from typing import ClassVar

INTERRUPTED = 130  # exit status of a program that Ctrl-C has ended, as a shell says


class _Sentence(Exception):
    status: ClassVar[int]  # exit status of a program that it ends

    def __init__(self, sentence: str, everywhere: bool = False) -> None:
        """`everywhere`: all ranks raise it together, so that it is enough if one says it."""
        super().__init__(sentence)
        self.everywhere = everywhere

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.everywhere)


class UsageError(_Sentence):
    """The user asked for something impossible. The sentence names the field or file and the fix."""

    status = 2


class RunError(_Sentence):
    """A run failed for a reason that one sentence explains."""

    status = 1


class Preempted(_Sentence):
    """The run was told to leave, has saved its state, and can be resumed."""

    status = 75  # EX_TEMPFAIL
